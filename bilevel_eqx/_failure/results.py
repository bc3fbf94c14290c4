"""The codes of failures and their messages."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import optimistix as optx
from jaxtyping import Array, Bool, Float, PyTree

from .._compat import code_of, is_traced, said, say_instead
from .._tree import all_finite, tree_dtype, tree_where


# This extends `optimistix.RESULTS`, which extends `lineax.RESULTS`, so that their
# failures can be passed on.
@said
class RESULTS(optx.RESULTS):  # pyright: ignore
    successful = ""
    inner_not_converged = (
        "The inner solve did not converge, but the Jacobian of this response is right "
        "only at an inner minimum. Give the inner solver more steps or a larger step "
        "size, or use `Proximal`, which assumes less. If the inner objective has no "
        "minimum, y runs off: bound y (`project_y`), or add a penalty on y. If it has "
        "kinks (an L1 norm, a hinge, ReLUs), more steps do not help: state the kinks as "
        "constraints (`project_y`), or smooth them. If it is smooth and an approximate "
        "hypergradient is enough, use `Unrolled`, which assumes nothing, or raise the "
        "`tolerance` of the response (`None` accepts any point)."
    )
    inner_diverged = (
        "The inner solve diverged: the inner objective is larger where it ended than "
        "where it started. Lower the step size of the inner solver, or use one that "
        "chooses its steps itself, such as `Projection` (`ProjectedGradient` if y is "
        "confined to a set). More steps do not help."
    )
    at_kink = (
        "The inner solve did not converge: it met a kink of the inner objective, such as "
        "an L1 norm, a hinge or a ReLU has. There is no Hessian at a kink, and every "
        "derivative of this objective is wrong there, also with `Unrolled` or "
        "`tolerance=None`. State the kink as a constraint (`project_y`): for an L1 norm, "
        "y = u - v with u, v >= 0. Or smooth it: `jax.nn.softplus` for a ReLU or a hinge."
    )
    root_not_converged = (
        "The solve for the inner root did not converge, but the Jacobian of this "
        "response is right only at a root. Give the solver more steps or a smaller "
        "tolerance, start it closer to the root, or use a Newton method: `Projection()` "
        "or `optx.Newton(rtol, atol)`. If there is no root near the anchor, none of "
        "them finds one. If an approximate hypergradient is enough, raise the "
        "`tolerance` of the response (`None` accepts any point)."
    )
    root_diverged = (
        "The solve for the inner root diverges: the residual at its end is larger than "
        "at its start. A fixed-point iteration converges only if all eigenvalues of "
        "d phi / d y are smaller than one in absolute value. Use a Newton method, "
        "`Projection()` or `optx.Newton(rtol, atol)`, or damp the iteration: "
        "`optx.FixedPointIteration(rtol, atol, damp=0.5)`. If a Newton method diverges, "
        "start it closer to the root."
    )
    not_selected = (
        "An inner minimum was found, but not the nearest one: the search along the set "
        "of inner minima did not converge. Give it more steps (`selection_steps=...`). "
        "If that set has kinks, as for a network of ReLUs, accept any point of it "
        "(`selection_tolerance=None`)."
    )
    neumann_diverged = (
        "The Neumann series diverges: the residual of its linear system has grown. It "
        "converges only if the step size is below 2 / (largest eigenvalue of the inner "
        "Hessian) and that Hessian has no negative eigenvalue; for a root, only if all "
        "eigenvalues of I - step_size dr/dy are smaller than one in absolute value. "
        "Lower `Neumann(step_size=...)`, or use `Pseudoinverse`, or `TruncatedCG` (for a "
        "root `lx.GMRES`)."
    )
    negative_curvature = (
        "Conjugate gradients met negative curvature at their first step: the inner "
        "Hessian is not positive semidefinite, so the point is not a minimum of the "
        "inner objective. Solve the inner problem further, use `Proximal` with an "
        "`epsilon` above the size of the negative eigenvalue, or use `Pseudoinverse`."
    )
    linear_not_converged = (
        "The linear solve of the hypergradient did not converge. Give the linear solver "
        "more steps or a looser tolerance, or use one that fits the problem: "
        "`Pseudoinverse` if the inner Hessian is singular, `TruncatedCG` or `Neumann` "
        "if an approximation is enough."
    )
    zero_hypergradient = (
        "The hypergradient is exactly zero for all x and y: x does not reach the outer "
        "objective. x does not appear in `problem.outer`, and the inner variables that "
        "appear there do not depend on x. Look for a `stop_gradient`, a cast to "
        "integers, arguments in the wrong order, a `Fixed` response, or an inner "
        "objective in which x is only in kinks, such as |y - x|. If x is the "
        "anchor (MAML, where training starts at x): the derivative of a response is at a "
        "fixed anchor. Differentiate `best_response(problem, x, x, response)` with an "
        "`Unrolled` or `Proximal` response, or let y be the displacement from x: "
        "`inner(x, d) = f(x + d)`, from d = 0."
    )
    nonfinite_step = (
        "NaN or infinity appeared. Lower the outer learning rate or the inner step "
        "size, or look for a function that has no finite derivative at this point. "
        "(Adam's square root has none where a gradient is zero, as for a unit that never "
        "fires: where it is unrolled, use `optax.adam(..., eps_root=1e-8)`.) With "
        "`throw=False`, `solve` returns the last finite state and the history so far."
    )
    adjoint_diverged = (
        "The adjoint v of the single loop diverged. Lower the rate of the adjoint "
        "optimiser: gradient descent needs one below 2 / (largest eigenvalue of the "
        "inner Hessian + damping), on every batch. If the inner Hessian has negative "
        "eigenvalues no rate converges: give a `damping` above their size, or start from "
        "a y that is closer to a minimum."
    )
    adjoint_unbounded = (
        "The adjoint v of the single loop has grown along directions that the inner "
        "Hessian annihilates, until its product with that Hessian was lost in rounding: "
        "the inner minimum is not unique, and without damping v has no limit. Give "
        "`damping`, which is the epsilon of a `WarmStart(epsilon)` and bounds v, or make "
        "the inner minimum unique with a penalty on y."
    )
    outer_max_steps_reached = (
        "The outer and the inner residual did not both fall below `tolerance` within "
        "`num_steps` steps. Take more steps, a larger outer learning rate, or a looser "
        "tolerance; with `throw=False` the last iterate is returned."
    )
    interrupted = (
        "Ctrl-C interrupted the run before it had taken all of its steps. The solution "
        "is that of the last step. Pass its `state` to `solve(state=...)` to continue."
    )


# What is printed of it. The message of the others' success is empty.
say_instead(RESULTS.successful, "successful")


def is_failure(result: RESULTS) -> Any:
    """Whether a result is a failure. Outside of transformations this is asked on the
    host: `result != RESULTS.successful` would start another program."""
    code, success = code_of(result), code_of(RESULTS.successful)
    if is_traced(code):
        return code != success
    return np.asarray(code) != np.asarray(success)


def first_failure(*results: RESULTS) -> RESULTS:
    """The first of `results` that is a failure: it may be the cause of the others."""
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
    "linear_num_steps",
)


# Not NaN: a residual may be NaN, and the message should then say so.
_UNKNOWN = -np.inf


_PARTS = {
    "x": "x",
    "y": "y",
    "value": "the outer objective",
    "gradient": "the gradient",
}


# Those that only some failures know of.
_MORE_PARTS = {
    "outer_x": "F_x (the gradient of the outer objective in x)",
    "outer_y": "F_y (the gradient of the outer objective in y)",
    "inner": "the inner objective",
    "inner_y": "the gradient of the inner objective in y",
    "inner_yy": "the Hessian of the inner objective in y",
    "solved_for": "what a linear solve of the derivative was given (in reverse mode, the "
    "gradient of what is computed from y)",
    "solution": "the solution of a linear solve of the derivative",
}


def figures_of(x: PyTree, stats: dict[str, Any], /, **parts: PyTree) -> dict[str, Array]:
    """The numbers that a message may contain: those in `stats` as one vector, and which
    of x and of the `parts` are finite.

    Their type is that of x. The entries are always the same, so that a loop can carry
    them, and those of further parts.
    """
    parts = {**dict.fromkeys(_PARTS), "x": x, **parts}
    finite = {name: all_finite(part) for name, part in parts.items()}
    return {"numbers": _numbers(tree_dtype(x), stats), **finite}


def no_figures(x: PyTree) -> dict[str, Array]:
    """Those of a run that has not begun."""
    numbers = _numbers(tree_dtype(x), {})
    return {"numbers": numbers, **{name: jnp.asarray(True) for name in _PARTS}}


def _numbers(dtype: Any, stats: dict[str, Any]) -> Float[Array, " k"]:
    # A vector, so that a program that chooses between two of them is short.
    if not stats.keys() & set(_NUMBERS):
        return jnp.full(len(_NUMBERS), _UNKNOWN, dtype)
    return jnp.stack([jnp.asarray(stats.get(k, _UNKNOWN), dtype) for k in _NUMBERS])


class Verdict(eqx.Module):
    """A result, and the numbers that its message may contain."""

    result: RESULTS
    figures: dict[str, Array]

    @property
    def failed(self) -> Bool[Any, ""]:
        return is_failure(self.result)


def verdict_where(pred: Bool[Array, ""], a: Verdict, b: Verdict) -> Verdict:
    result = RESULTS.where(pred, a.result, b.result)
    return Verdict(result, tree_where(pred, a.figures, b.figures))
