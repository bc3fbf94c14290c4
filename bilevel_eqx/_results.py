"""What can go wrong, and how it is said."""

import equinox as eqx
import optimistix as optx
from jaxtyping import PyTree

from ._misc import all_finite, is_traced


# Extends `optimistix.RESULTS`, which extends `lineax.RESULTS`, so that their failures
# can be passed on.
class RESULTS(optx.RESULTS):  # pyright: ignore
    successful = ""
    inner_not_converged = (
        "The inner solve did not converge, and the response presumes that it did: its "
        "Jacobian is that of a minimum. Give the inner solver more steps or a larger "
        "step size; or use `Proximal`, which presumes less, or `Unrolled`, which "
        "presumes nothing; or raise the `tolerance` of the response (`None` accepts "
        "any point) if an approximate hypergradient is what you want."
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
        "epsilon above the negative eigenvalue, or use `Pseudoinverse`."
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
        "NaN or infinity appeared. With `throw=False` the last finite state and the "
        "history so far are returned. Lower the outer learning rate or the inner step "
        "size, or look for a function that has no finite derivative at this point."
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


def throw_if_failed(out: PyTree, result: RESULTS, details=None) -> PyTree:
    """`out`, or an error if `result` is a failure.

    Outside of any transformation the numbers behind the failure are known, and
    `details(out)` puts them into the sentence. Inside of one only the sentence is.
    """
    failed = result != RESULTS.successful
    if is_traced(failed):
        # The error hangs on the numbers alone: it cannot pass through a typed key.
        numeric, rest = eqx.partition(out, eqx.is_inexact_array)
        return eqx.combine(result.error_if(numeric, failed), rest)
    if failed:
        numbers = "" if details is None else details(out)
        raise eqx.EquinoxRuntimeError(f"{numbers} {RESULTS[result]}".strip())
    return out
