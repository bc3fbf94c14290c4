"""The Stackelberg equilibrium."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp

from .._compat import is_traced
from .._derivatives.second import gradient_and_hessian
from .._linalg.eigenbasis import eigenbasis
from .._problem.constraints import set_y
from .._problem.least_squares import AbstractLeastSquaresProblem
from .._solution_set.picture import picture
from .._tree import nonzero, tree_size
from .base import AbstractEquilibrium, Certificate
from .residuals import measure, NOT_A_MINIMUM, slopes_of


class Stackelberg(AbstractEquilibrium):
    r"""The Stackelberg equilibrium of a problem whose inner minimum is unique:

    $$\nabla_y f = 0, \qquad H \succ 0, \qquad F_x - B^\top H^{-1} F_y = 0.$$

    It claims that the inner minimum is unique, and the certificate checks the curvature
    that makes it unique. A problem with a singular H is refused, since the concepts
    [`bilevel_eqx.Optimistic`][], [`bilevel_eqx.ColdStart`][] and the others then differ.

    ??? cite "Reference"

        von Stackelberg, *Marktform und Gleichgewicht*, 1934.
    """

    bounds_products: ClassVar[bool] = True
    warm: ClassVar[bool] = True
    admits_constraints: ClassVar[bool] = True

    def check(self, problem, x, y):
        if set_y(problem).confines:
            # A Hessian that is singular without the constraints need not be so with them.
            return
        count = _too_few_squares(problem, x, y)
        if count is not None:
            why = f"its inner objective is a sum of {count[0]} squares of {count[1]}"
            raise _singular(f"{why} variables")
        lowest, largest = _extreme_eigenvalues(problem, x, y)
        if is_traced(lowest):
            return
        # If some are negative, y is not a minimum yet. The certificate then decides.
        if abs(lowest) <= _threshold(largest):
            raise _singular(
                "the eigenvalues of the inner Hessian at (x0, y0) lie between "
                f"{float(lowest):.2g} and {float(largest):.2g}"
            )

    def certify(self, problem, x, y, y0, max_products=None):
        here, layout = picture(problem, x, y, max_products=max_products)
        at = measure(here, slopes_of(here))
        values = here.eigenvalues()
        lowest, largest = jnp.min(values), jnp.max(jnp.abs(values))
        threshold = _threshold(largest)
        share = lowest / nonzero(threshold)
        return Certificate(
            "a Stackelberg equilibrium",
            {
                **at.inner(),
                "uniqueness": (
                    1 - jnp.clip(share, 0, 1),
                    "there is no other inner minimum nearby: H is positive definite",
                ),
                **at.stationary("x is stationary: F_x - B^T H^-1 F_y = 0"),
            },
            accuracy=at.accuracy,
            notes=(*at.notes, NOT_A_MINIMUM),
        )


def _threshold(largest):
    """Eigenvalues below this count as zero."""
    return 100 * jnp.finfo(largest.dtype).eps * largest


def _too_few_squares(problem, x, y) -> tuple[int, int] | None:
    """The numbers of squares and of variables, if there are fewer squares."""
    if not isinstance(problem, AbstractLeastSquaresProblem):
        return None
    residual = jax.eval_shape(problem.inner_residual, x, y)
    count = tree_size(residual), tree_size(y)
    return count if count[0] < count[1] else None


@eqx.filter_jit
def _extreme_eigenvalues(problem, x, y):
    _, H = gradient_and_hessian(problem, x, y)
    values = eigenbasis(H).values
    return jnp.min(values), jnp.max(jnp.abs(values))


def _singular(why: str) -> ValueError:
    return ValueError(
        "A `Stackelberg` equilibrium needs a unique inner minimum, but the inner Hessian "
        f"of this problem is singular: {why}. Choose an equilibrium that selects one of "
        "the inner minima (`Optimistic()`, `Pessimistic(radius)`, `ColdStart()`, "
        "`WarmStart()`), or make the minimum unique with a penalty on y."
    )
