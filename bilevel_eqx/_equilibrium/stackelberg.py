"""The Stackelberg equilibrium."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Scalar

from .._compat import called_once, is_traced
from .._linalg.eigenbasis import extreme_eigenvalues
from .._linalg.power_iteration import DENSE_SIZE
from .._linear_solver.pseudoinverse import Pseudoinverse
from .._problem.constraints import set_y
from .._problem.finite_sum import (
    AbstractFiniteSumProblem,
    Batch,
    num_samples,
    OnBatches,
    rows,
)
from .._problem.least_squares import AbstractLeastSquaresProblem
from .._problem.root import AbstractRootProblem
from .._response.implicit import Implicit
from .._solution_set.picture import Picture, picture
from .._tree import nonzero, tree_size
from .base import AbstractEquilibrium, Certificate
from .outer_curvature import derivatives, NOT_A_MINIMUM
from .residuals import measure, slopes_of


class Stackelberg(AbstractEquilibrium):
    r"""The Stackelberg equilibrium of a problem whose inner minimum is unique:

    $$\nabla_y f = 0, \qquad H \succ 0, \qquad F_x - B^\top H^{-1} F_y = 0.$$

    It claims that the inner minimum is unique, and the certificate checks the curvature
    that makes it unique. A problem with a singular H is refused, since the concepts
    [`bilevel_eqx.Optimistic`][], [`bilevel_eqx.ColdStart`][] and the others then differ.

    If y is a root ([`bilevel_eqx.AbstractRootProblem`][]) the conditions are
    $r(x, y) = 0$, a nonsingular $\partial r / \partial y$, and
    $F_x - (\partial r / \partial x)^\top (\partial r / \partial y)^{-\top} F_y = 0$.

    ??? cite "Reference"

        von Stackelberg, *Marktform und Gleichgewicht*, 1934.
    """

    bounds_products: ClassVar[bool] = True
    warm: ClassVar[bool] = True
    admits_constraints: ClassVar[bool] = True
    admits_roots: ClassVar[bool] = True

    def check(self, problem, x, y):
        if set_y(problem).confines:
            # A Hessian that is singular without the constraints need not be so with them.
            return
        count = _too_few_squares(problem, x, y)
        if count is not None:
            why = f"its inner objective is a sum of {count[0]} squares of {count[1]}"
            raise _singular(f"{why} variables")
        if tree_size(y) > DENSE_SIZE:
            return
        some = _on_some_samples(problem, y)
        if some is not None:
            lowest, _ = _extremes(some, x, y)
            if is_traced(lowest) or abs(lowest) > 1:
                return
        lowest, extremes = _extremes(problem, x, y)
        if is_traced(lowest):
            return
        if extremes is not None:
            if lowest <= 1:
                raise _singular_root(*extremes)
            return
        # If some are negative, y is not a minimum yet. The certificate then decides.
        if abs(lowest) <= 1:
            raise _singular(
                "an eigenvalue of the inner Hessian at (x0, y0) is "
                f"{abs(float(lowest)):.2g} times its own uncertainty"
            )

    def outer_derivatives(self, problem, x, y, y0):
        response = Implicit(None, Pseudoinverse(), None)

        def fn(x):
            return problem.outer(x, response.best_response(problem, x, y)[0])

        return derivatives(fn, x)

    def certify(self, problem, x, y, y0, max_products=None):
        # Half of the products are for the question whether the minimum is unique.
        share = 1.0 if isinstance(problem, AbstractRootProblem) else 0.5
        here, _ = picture(problem, x, y, max_products=max_products, share=share)
        at = measure(here, slopes_of(here))
        notes, decisions = (*at.notes, NOT_A_MINIMUM), at.decisions
        if here.y.size <= DENSE_SIZE or here.is_root:
            # Zero if no eigenvalue counts as zero, and none is negative.
            clearance = here.clearance()
            missing = jnp.where(jnp.min(clearance) > 1, 0.0, 1.0)
            if decisions is None and not here.is_root:
                decisions = clearance, None, "an eigenvalue of H in the set"
        else:
            num_products = _share_of(max_products)
            missing, resolved = _missing_uniqueness(here, num_products)
            notes = (
                *notes,
                f"uniqueness is shown by {num_products} products with H, up to a "
                f"condition number of {1 / resolved:.2g}; more `max_products` show more",
            )
        unique = "there is no other inner minimum nearby: H is positive definite"
        through = "B^T H^-1"
        if here.is_root:
            unique = "there is no other root nearby: dr/dy is nonsingular"
            through = "(dr/dx)^T (dr/dy)^-T"
        return Certificate(
            "a Stackelberg equilibrium",
            {
                **at.inner(),
                "uniqueness": (missing, unique),
                **at.stationary(f"x is stationary: F_x - {through} F_y = 0"),
            },
            accuracy=at.accuracy,
            decisions=decisions,
            notes=notes,
        )


def _share_of(max_products: int | None) -> int:
    return 64 if max_products is None else max(1, max_products // 2)


def _missing_uniqueness(here: Picture, num_products: int) -> tuple[Scalar, float]:
    """How far the smallest eigenvalue of a large H is from being shown positive, and the
    smallest share of the largest one that can be shown."""
    operator = here.at.definite_hessian()
    lowest, highest, error = extreme_eigenvalues(operator, num_products)
    resolved = error * (highest - lowest)
    return 1 - jnp.clip(lowest / nonzero(resolved), 0, 1), error


def _too_few_squares(problem, x, y) -> tuple[int, int] | None:
    """The numbers of squares and of variables, if there are fewer squares."""
    if not isinstance(problem, AbstractLeastSquaresProblem):
        return None
    residual = jax.eval_shape(problem.inner_residual, x, y)
    count = tree_size(residual), tree_size(y)
    return count if count[0] < count[1] else None


# Of the inner variables: so many samples show what H is like.
_SAMPLES = 4


def _on_some_samples(problem, y) -> OnBatches | None:
    """The problem on some of many samples, evenly spaced.

    H on all data is at least the share of these samples times H on them, if the losses
    are convex: where it is definite on them it is on all. H takes a pass over the samples
    for each inner variable, and so all data are looked at only in doubt.
    """
    if not isinstance(problem, AbstractFiniteSumProblem):
        return None
    size, count = num_samples(problem, "inner"), _SAMPLES * max(tree_size(y), 64)
    if size <= 2 * count:
        return None
    samples = rows(problem.inner_data, jnp.arange(count) * (size // count))
    return OnBatches(problem, Batch(samples, jnp.full((count,), 1 / count), None), None)


@called_once
def _extremes(problem, x, y):
    """The lowest clearance, and for a root the extreme singular values."""
    here, _ = picture(problem, x, y)
    lowest = jnp.min(here.clearance())
    if here.spectrum is not None:
        return lowest, (jnp.min(here.spectrum), jnp.max(here.spectrum))
    return lowest, None


def _singular(why: str) -> ValueError:
    return ValueError(
        "A `Stackelberg` equilibrium needs a unique inner minimum, but the inner Hessian "
        f"of this problem is singular: {why}. Choose an equilibrium that selects one of "
        "the inner minima (`Optimistic()`, `Pessimistic(radius)`, `ColdStart()`, "
        "`WarmStart()`), or make the minimum unique with a penalty on y."
    )


def _singular_root(lowest, largest) -> ValueError:
    return ValueError(
        "A `Stackelberg` equilibrium needs an isolated root, but dr/dy is singular at "
        f"(x0, y0): its singular values lie between {float(lowest):.2g} and "
        f"{float(largest):.2g}. Start from another y0; or, if there are many roots, use "
        "`WarmStart()`, which follows the one nearest to the last."
    )
