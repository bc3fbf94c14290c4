"""What can go wrong, and how it is said."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import optimistix as optx
from jaxtyping import Array, Bool, PyTree

from .._tree import all_finite, tree_dtype, tree_where


# Extends `optimistix.RESULTS`, which extends `lineax.RESULTS`, so that their failures
# can be passed on.
class RESULTS(optx.RESULTS):  # pyright: ignore
    successful = ""
    inner_not_converged = (
        "The inner solve did not converge, and the response presumes that it did: its "
        "Jacobian is that of a minimum. Give the inner solver more steps or a larger "
        "step size (a smaller one, if it diverges); or use `Proximal`, which presumes "
        "less, or `Unrolled`, which presumes nothing; or raise the `tolerance` of the "
        "response (`None` accepts any point) if an approximate hypergradient is what "
        "you want."
    )
    not_selected = (
        "An inner minimum was found, but not the one that was asked for: the search "
        "along the set of inner minima stopped short of the nearest of them. Give it "
        "more steps (`selection_steps=...`); or, where that set has kinks, as that of a "
        "network of ReLUs has, accept a point on the way (`selection_tolerance=None`)."
    )
    neumann_diverged = (
        "The Neumann series diverges: the residual of the linear system that it should "
        "solve has grown. It converges for step sizes below 2 / (largest eigenvalue of "
        "the inner Hessian), and only where that Hessian has no negative eigenvalue. "
        "Lower `Neumann(step_size=...)`, or use `Pseudoinverse` or `TruncatedCG`."
    )
    negative_curvature = (
        "Conjugate gradients met negative curvature at their first step: the inner "
        "Hessian is not positive semidefinite, so that the point is not a minimum of "
        "the inner objective. Solve the inner problem further, use `Proximal` with an "
        "`epsilon` above the size of the negative eigenvalue, or use `Pseudoinverse`."
    )
    linear_not_converged = (
        "The linear solve of the hypergradient did not converge. Give the linear solver "
        "more steps or a looser tolerance, or use one that fits the problem: "
        "`Pseudoinverse` where the inner Hessian is singular, `TruncatedCG` or "
        "`Neumann` where an approximation will do."
    )
    zero_hypergradient = (
        "The hypergradient is exactly zero whatever x and y are: x does not reach the "
        "outer objective. It neither appears in `problem.outer` nor moves the inner "
        "variables that appear there. Look for a `stop_gradient`, a cast to integers, "
        "an argument out of order, or a `Fixed` response."
    )
    nonfinite_step = (
        "NaN or infinity appeared. Lower the outer learning rate or the inner step "
        "size, or look for a function that has no finite derivative at this point. With "
        "`throw=False`, `solve` returns the last finite state and the history so far."
    )
    outer_max_steps_reached = (
        "The outer and the inner residual did not both fall below `tolerance` within "
        "`num_steps` steps. Take more steps, a larger outer learning rate, or a looser "
        "tolerance; with `throw=False` the last iterate is returned."
    )


def first_failure(*results: RESULTS) -> RESULTS:
    """The first of `results` that is a failure: the others may only suffer from it."""
    first, *rest = results
    for result in rest:
        first = RESULTS.where(first == RESULTS.successful, result, first)
    return first


def finite_or_not(tree: PyTree) -> RESULTS:
    """Success if all of `tree` is finite."""
    return RESULTS.where(all_finite(tree), RESULTS.successful, RESULTS.nonfinite_step)


#
# The figures behind a failure
#


_NUMBERS = (
    "inner_residual",
    "displacement_residual",
    "linear_residual",
    "linear_curvature",
)


# Not NaN, which a residual may well be, and should then be said.
_UNKNOWN = -np.inf


_PARTS = {
    "x": "x",
    "y": "y",
    "value": "the outer objective",
    "gradient": "the gradient",
}


def figures_of(x: PyTree, stats: dict[str, Any], **parts: PyTree) -> dict[str, Array]:
    """What a sentence might have to name: the numbers in `stats`, and which of x and of
    the `parts`, among `y`, `value` and `gradient`, are finite.

    Always with the same entries, in the type of x, so that a loop can carry them.
    """
    dtype = tree_dtype(x)
    numbers = {k: jnp.asarray(stats.get(k, _UNKNOWN), dtype) for k in _NUMBERS}
    return numbers | {k: all_finite({"x": x, **parts}.get(k)) for k in _PARTS}


class Verdict(eqx.Module):
    """A result, and the figures that its sentence may name."""

    result: RESULTS
    figures: dict[str, Array]

    @property
    def failed(self) -> Bool[Array, ""]:
        return self.result != RESULTS.successful


def verdict_where(pred: Bool[Array, ""], a: Verdict, b: Verdict) -> Verdict:
    result = RESULTS.where(pred, a.result, b.result)
    return Verdict(result, tree_where(pred, a.figures, b.figures))
