"""What can go wrong, and how it is said."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
from jaxtyping import Array, Bool, PyTree

from ._misc import all_finite, is_traced, tree_dtype, tree_scale, tree_where


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


#
# What is said. This is called on the host, in the midst of a program, where JAX must
# not be: everything is NumPy's.
#


def _sentence(result: RESULTS, figures: dict[str, Any]) -> str:
    """What has happened, where, the numbers, and the way out."""
    message = RESULTS[result]
    what, stop, way_out = message.partition(". ")
    sentence = " ".join(
        filter(None, (what + stop.strip(), _numbers(message, figures), way_out))
    )
    if "num_steps" in figures and not _is(message, "outer_max_steps_reached"):
        sentence = f"At outer step {int(figures['num_steps']) + 1}: {sentence}"
    return sentence


def _is(message: str, name: str) -> bool:
    return message == RESULTS[getattr(RESULTS, name)]


def _numbers(message: str, figures: dict[str, Any]) -> str:
    if _is(message, "nonfinite_step"):
        names = [name for part, name in _PARTS.items() if not figures[part]]
        if len(names) == 0:
            return "x and y are finite: the outer objective or a derivative is not."
        return f"Not finite: {', '.join(names)}."
    if _is(message, "outer_max_steps_reached"):
        return (
            f"After {int(figures['num_steps'])} outer steps the outer residual is "
            f"{figures['last_outer_residual']:.3g} and the inner residual "
            f"{figures['last_inner_residual']:.3g}."
        )
    inner, displacement, linear, curvature = (float(figures[k]) for k in _NUMBERS)
    remedy = (
        f"a step size below {2 / curvature:.3g} would not diverge on it"
        if curvature > 0
        else "no step size converges on it"
    )
    texts = {
        "inner_not_converged": (inner, "The inner gradient has norm {:.3g}."),
        "not_selected": (
            displacement,
            "The share {:.3g} of the way there still leads along that set.",
        ),
        "neumann_diverged": (
            curvature,
            f"The residual grew {linear:.3g}-fold. H has an eigenvalue of about "
            f"{{:.3g}}: {remedy}.",
        ),
        "negative_curvature": (curvature, "The curvature is {:.3g}."),
        "linear_not_converged": (
            linear,
            "The linear solve ended with a relative residual of {:.3g}.",
        ),
    }
    for name, (number, text) in texts.items():
        if _is(message, name) and number != _UNKNOWN:
            return text.format(number)
    return ""


_SHOWN = 3


def _sentences(failed: Any, result: RESULTS, figures: dict[str, Any]) -> str:
    """Those of the elements of a batch that failed, if it is a batch."""
    failed, result, figures = jtu.tree_map(np.asarray, (failed, result, figures))
    elements = [tuple(index) for index in np.argwhere(failed).tolist()]
    lines = []
    for element in elements[:_SHOWN]:
        # The ellipsis keeps them arrays.
        one = jtu.tree_map(lambda u, e=element: u[(*e, ...)], (result, figures))
        line = _sentence(*one)
        if element != ():
            index = element[0] if len(element) == 1 else element
            line = f"Element {index} of the batch: {line}"
        lines.append(line)
    if len(elements) > _SHOWN:
        lines.append(f"{len(elements) - _SHOWN} more elements of the batch failed.")
    return "\n".join(lines)


#
# Raising
#


class _Composed(Sequence):
    """What stands for the list of messages of `branched_error_if`, which is fixed when
    the program is traced: the sentence that the program has just had composed.
    """

    sentence = ""

    def __getitem__(self, index):
        return self.sentence

    def __len__(self):
        return 1


_composed = _Composed()


def _compose(failed, result, figures):
    _composed.sentence = _sentences(failed, result, figures)
    return np.zeros(np.shape(failed), np.int32)


def throw_if_failed(
    out: PyTree, result: RESULTS, figures: Callable[[], dict[str, Array]]
) -> PyTree:
    """`out`, or an error if `result` is a failure, whose sentence names the `figures`.

    They are asked for only then; inside of a transformation, in a branch of the program
    that is not taken otherwise.
    """
    failed = result != RESULTS.successful
    if not is_traced(failed):
        if failed:
            known = jax.lax.stop_gradient(figures())
            raise eqx.EquinoxRuntimeError(_sentences(failed, result, known))
        return out

    def compose():
        # There is no derivative of a callback, and none of a sentence.
        arguments = jax.lax.stop_gradient((failed, result, figures()))
        # One call for all of a batch, which says which elements of it failed.
        return jax.pure_callback(
            _compose,
            jax.ShapeDtypeStruct((), jnp.int32),
            *arguments,
            vmap_method="broadcast_all",
        )

    index = jax.lax.cond(
        eqxi.unvmap_any(failed), compose, lambda: jnp.zeros((), jnp.int32)
    )
    # The error hangs on the numbers alone: it cannot pass through a typed key.
    numeric, rest = eqx.partition(out, eqx.is_inexact_array)
    return eqx.combine(_throw(numeric, failed, index), rest)


@eqx.filter_custom_jvp
def _throw(numeric, failed, index):
    return eqxi.branched_error_if(numeric, failed, index, _composed)


@_throw.def_jvp
def _throw_jvp(primals, tangents):
    _, failed, index = primals
    # A gradient may have no use for the primal output. Multiplied by a one that hangs on
    # the error, the tangent hangs on it too, and remains linear.
    one = _throw(jnp.ones(()), failed, index)
    return _throw(*primals), tree_scale(one, tangents[0])
