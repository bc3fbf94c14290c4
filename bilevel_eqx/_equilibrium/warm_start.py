"""The warm-start equilibrium."""

from typing import ClassVar

import equinox as eqx
from jaxtyping import ScalarLike

from .._arguments import as_rate, check_positive
from .._derivatives.first import outer_gradients
from .._derivatives.public import is_nonzero
from .._derivatives.second import cross_derivative_operator
from .._problem.proximal import proximal
from .._solution_set.tangent import SolutionSet
from .._tree import tree_sub
from .base import AbstractEquilibrium, Certificate, inner_residual, outer_residual


def _zero_or_rate(epsilon):
    """Full and partial are different programs, so that zero must be known to be so."""
    return as_rate(epsilon) if is_nonzero(epsilon) else 0.0


class WarmStart(AbstractEquilibrium):
    r"""The equilibrium of a warm start: the inner variables go on from where they are.

    $(x, y)$ is one if y is its own answer to x, and x is stationary for the outer
    objective through that answer:

    $$y \in \operatorname{argmin}_{y'} f(x, y') + \frac\epsilon2 \|y' - y\|^2, \qquad
    F_x - B^\top (H + \epsilon I)^{-1} F_y = 0,$$

    with $H^+$ for the inverse when $\epsilon = 0$ (a *full* warm start, where y is its
    own projection on $S(x)$). A positive $\epsilon$ is a *partial* one.

    This is the paper's Definition 3.2, mended: its first line, $x \in
    \operatorname{argmin} F(x, y)$ at fixed y, says nothing where F does not contain x,
    and is replaced by stationarity through the response. $\epsilon$ does not
    move the inner condition of a convex problem; it enters through the hypergradient.

    ??? cite "Reference"

        Vicol, Lorraine, Duvenaud and Grosse, *Implicit Regularization in
        Overparameterized Bilevel Optimization*, 2021: Definition 3.2, Appendix C.
    """

    warm: ClassVar[bool] = True
    admits_constraints: ClassVar[bool] = True
    epsilon: ScalarLike = eqx.field(converter=_zero_or_rate, default=0.0)

    def __check_init__(self):
        check_positive(self.epsilon, "epsilon", "WarmStart", or_zero=True)

    @property
    def partial(self) -> bool:
        """Whether epsilon is positive. If it is known only at run time it counts so."""
        return is_nonzero(self.epsilon)

    def certify(self, problem, x, y, y0):
        value, outer_x, outer_y = outer_gradients(problem, x, y)
        # At the anchor itself the pull vanishes but its curvature, epsilon I, does not.
        answering = proximal(problem, y, self.epsilon) if self.partial else problem
        S = SolutionSet(answering, x, y)
        B = cross_derivative_operator(problem, x, y)
        outer_y = S.at.along(outer_y)
        hypergradient = tree_sub(outer_x, S.at.cross(B).T.mv(S.pinv(outer_y)))
        name = "(H + epsilon I)^-1" if self.partial else "H^+"
        return Certificate(
            "a partial warm start" if self.partial else "a full warm start",
            {
                **inner_residual(problem, x, y, "y is its own answer"),
                **outer_residual(
                    problem,
                    x,
                    hypergradient,
                    value,
                    f"x is stationary through it: F_x - B^T {name} F_y = 0",
                ),
            },
            accuracy=S.accuracy(outer_y),
        )


WarmStart.__init__.__doc__ = r"""**Arguments:**

- `epsilon`: $\epsilon$, at least zero, in units of the curvature of the inner objective.
    Zero, the default, is a full warm start; a positive value a partial one.
"""
