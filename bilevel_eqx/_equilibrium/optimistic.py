"""The optimistic equilibrium."""

from typing import ClassVar

from .._derivatives.first import outer_gradients
from .._derivatives.second import cross_derivative_operator
from .._linalg.eigenbasis import eigenbasis_within, negative_curvature
from .._solution_set.tangent import SolutionSet
from .._tree import tree_scale, tree_sub
from .base import (
    AbstractEquilibrium,
    Certificate,
    curved_notes,
    inner_residual,
    outer_residual,
    relative_gradient,
)


class Optimistic(AbstractEquilibrium):
    r"""The optimistic equilibrium: of all inner minima, the one that suits the outer
    objective best,

    $$\min_x \min_{y \in S(x)} F(x, y).$$

    It is what the bilevel problem is worth if the inner player, indifferent between its
    minima, does one a favour. With P the projection on the null space of H it holds
    there, to first and second order, that

    $$\nabla_y f = 0, \qquad P F_y = 0, \qquad F_x - B^\top H^+ F_y = 0, \qquad
    P W P \succeq 0,$$

    with $W = F_{yy} - \partial_y(H q)$ at $q = H^+ F_y$, the curvature of F along $S(x)$.
    The third is the exact gradient of $x \mapsto \min_{y \in S(x)} F$ there: a full warm
    start that has also found the best y is optimistic.

    Also known as strong Stackelberg equilibrium.

    ??? cite "Reference"

        Dempe, *Foundations of Bilevel Programming*, 2002.
    """

    warm: ClassVar[bool] = True

    def certify(self, problem, x, y, y0):
        S = SolutionSet(problem, x, y)
        value, outer_x, outer_y = outer_gradients(problem, x, y)
        q = S.pinv(outer_y)
        hypergradient = tree_sub(
            outer_x, cross_derivative_operator(problem, x, y).T.mv(q)
        )
        W = S.lagrangian_hessian(lambda y: problem.outer(x, y), tree_scale(-1, q))
        return Certificate(
            "an optimistic equilibrium",
            {
                **inner_residual(problem, x, y),
                "selection": (
                    relative_gradient(S.project(outer_y), y, value),
                    "no other one nearby has a smaller F: P_null F_y = 0",
                ),
                "curvature": (
                    negative_curvature(eigenbasis_within(S.project, W, outer_y)),
                    "nor to second order: F is not concave along S(x)",
                ),
                **outer_residual(
                    problem,
                    x,
                    hypergradient,
                    value,
                    "x is stationary for min F over S(x): F_x - B^T H^+ F_y = 0",
                ),
            },
            accuracy=S.accuracy(outer_y),
            notes=curved_notes(S),
        )
