"""The Nash equilibrium."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._depends_on import depends_on
from .._solution_set.picture import picture
from .._tree import tree_norm
from .base import AbstractEquilibrium, Certificate
from .outer_curvature import outer_curvature
from .residuals import measure, outer_residual, slopes_of


class Nash(AbstractEquilibrium):
    r"""The Nash equilibrium: no player gains by moving alone,

    $$x \in \operatorname{argmin}_{x'} F(x', y), \qquad
    y \in \operatorname{argmin}_{y'} f(x, y').$$

    The outer player treats y as constant, so that the response of y to x does not matter.
    If F does not contain x, the condition on x is empty.

    ??? cite "Reference"

        Nash, *Non-cooperative games*, 1951.
    """

    bounds_products: ClassVar[bool] = True
    heeds_x0: ClassVar[bool] = True
    warm: ClassVar[bool] = True
    admits_constraints: ClassVar[bool] = True

    def certify(self, problem, x, y, y0, x0=None, max_products=None):
        here, layout = picture(problem, x, y, max_products=max_products)
        start = None if y0 is None else layout.ravel(y0)
        at = measure(here, slopes_of(here, x0, start))

        def gradient(x):
            return jax.grad(problem.outer)(x, y)

        notes = at.notes
        if not depends_on(lambda x: problem.outer(x, y), x):
            notes = (*notes, "F does not contain x: every x is equally good")
        ones = jtu.tree_map(jnp.ones_like, x)
        if depends_on(lambda x: jax.linearize(gradient, x)[1](ones), x):
            notes = (*notes, "F is not quadratic in x: that x is a minimum is local")
        return Certificate(
            "a Nash equilibrium",
            {
                **at.inner(),
                **outer_residual(
                    problem,
                    x,
                    at.outer.x,
                    tree_norm(at.outer.change_x),
                    "x is stationary at this y: F_x = 0",
                ),
                **outer_curvature(
                    problem,
                    x,
                    at.outer.x,
                    jax.linearize(gradient, x)[1],
                    "the same to second order: F_xx >= 0",
                ),
            },
            accuracy=at.accuracy,
            decisions=at.decisions,
            notes=notes,
        )
