"""The cold-start equilibrium."""

from typing import ClassVar

import jax.numpy as jnp

from .._response.minimum_displacement import MinimumDisplacement
from .._solution_set.nearest import Displacement
from .._solution_set.picture import picture
from .._tree import vector_norm
from .base import AbstractEquilibrium, Certificate, require_start
from .outer_curvature import derivatives, NOT_A_MINIMUM
from .residuals import measure, share, slopes_of


class ColdStart(AbstractEquilibrium):
    r"""The equilibrium of a cold start: the inner variables always start from $y_0$.

    $(x, y)$ is a cold-start equilibrium if y is the inner minimum nearest to $y_0$, and x
    is stationary for the outer objective at that minimum:

    $$y = \Pi(y_0, S(x)), \qquad
    \frac{\mathrm d}{\mathrm d x} F\bigl(x, \Pi(y_0, S(x))\bigr) = 0.$$

    Where S(x) is curved, nearest means to second order that $I + \partial_y (H \mu)$ is
    not negative along $S(x)$, with the multiplier $\mu = -H^+ (y - y_0)$.

    This corrects the paper's Definition 3.1, which minimises F(x, y) without defining y.
    If H depends on x, the derivative of the projection has a term in the null space of H,
    which $-H^+ B$ lacks; see [`bilevel_eqx.MinimumDisplacement`][].

    ??? cite "Reference"

        Vicol, Lorraine, Duvenaud and Grosse, *Implicit Regularization in
        Overparameterized Bilevel Optimization*, 2021: Definition 3.1.
    """

    bounds_products: ClassVar[bool] = True
    warm: ClassVar[bool] = False

    def outer_derivatives(self, problem, x, y, y0):
        response = MinimumDisplacement(tolerance=None, selection_tolerance=None)

        def fn(x):
            return problem.outer(x, response.best_response(problem, x, y0)[0])

        return derivatives(fn, x)

    def certify(self, problem, x, y, y0, max_products=None):
        require_start(y0, "ColdStart()", "A cold start")
        here, layout = picture(
            problem, x, y, max_products=max_products, share=0.5, anchor=y0
        )
        nearest = Displacement(here, layout.ravel(y0))
        outer = slopes_of(here, y0=nearest.anchor)
        curvatures, tangential = nearest.curvatures(outer.y)
        at = measure(here, outer, tangential)
        along = vector_norm(here.project(nearest.displacement))
        accuracy = jnp.maximum(at.accuracy, curvatures.across)
        if not here.is_dense:
            projected = here.accuracy_of_projection(outer.y, nearest.displacement)
            accuracy = jnp.maximum(accuracy, projected)
        notes = at.notes if here.is_plane else at.notes_along_set
        return Certificate(
            "a cold start",
            {
                **at.inner(),
                "displacement": (
                    share(along, outer.size),
                    "y is the inner minimum nearest to y0: P_null (y - y0) = 0",
                ),
                "curvature": (
                    curvatures.negative,
                    "the same to second order: S(x) does not bend away from y0",
                ),
                **at.stationary("x is stationary for F(x, proj(y0, S(x)))"),
            },
            accuracy=accuracy,
            decisions=at.decisions,
            notes=(*notes, NOT_A_MINIMUM),
        )
