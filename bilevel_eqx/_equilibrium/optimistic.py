"""The optimistic equilibrium."""

from typing import ClassVar

import jax.numpy as jnp

from .._solution_set.curvature import curvatures_along
from .._solution_set.picture import picture
from .._solution_set.selected_value import second_derivative
from .._tree import vector_norm
from .base import AbstractEquilibrium, Certificate
from .outer_curvature import Derivatives, NOT_A_MINIMUM
from .residuals import measure, share, slopes_of


class Optimistic(AbstractEquilibrium):
    r"""The optimistic equilibrium: of all inner minima, the one with the smallest outer
    objective,

    $$\min_x \min_{y \in S(x)} F(x, y).$$

    It is the value of the bilevel problem if the inner player chooses, among its minima,
    the best one for the outer player. With the projection P on the null space of H, its
    conditions to first and second order are

    $$\nabla_y f = 0, \qquad P F_y = 0, \qquad F_x - B^\top H^+ F_y = 0, \qquad
    P W P \succeq 0,$$

    with $W = F_{yy} - \partial_y(H q)$ at $q = H^+ F_y$, the curvature of F along $S(x)$.
    The third expression is the exact gradient of $x \mapsto \min_{y \in S(x)} F$ there: a
    full warm start that has also found the best y is optimistic.

    It is also called strong Stackelberg equilibrium.

    ??? cite "Reference"

        Dempe, *Foundations of Bilevel Programming*, 2002.
    """

    bounds_products: ClassVar[bool] = True
    warm: ClassVar[bool] = True

    def outer_derivatives(self, problem, x, y, y0):
        here, _ = picture(problem, x, y)
        return Derivatives(*second_derivative(here))

    def certify(self, problem, x, y, y0, max_products=None):
        here, layout = picture(problem, x, y, max_products=max_products, share=0.5)
        at = measure(here, slopes_of(here))
        lagrangian = here.lagrangian(here.problem.outer, -at.adjoint)
        W = here.operator(lambda v: lagrangian.push(v)[1])
        curvatures = curvatures_along(here, W, at.outer.y)
        slope = vector_norm(here.project(at.outer.y))
        return Certificate(
            "an optimistic equilibrium",
            {
                **at.inner(),
                "selection": (
                    share(slope, at.outer.terms_y),
                    "no inner minimum nearby has a smaller F: P_null F_y = 0",
                ),
                "curvature": (
                    curvatures.negative,
                    "the same to second order: F is not concave along S(x)",
                ),
                **at.stationary(
                    "x is stationary for min F over S(x): F_x - B^T H^+ F_y = 0"
                ),
            },
            accuracy=jnp.maximum(at.accuracy, curvatures.across),
            decisions=at.decisions,
            notes=(*at.notes_along_set, NOT_A_MINIMUM),
        )
