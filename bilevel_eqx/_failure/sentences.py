"""The message of a failure, with its numbers."""

from typing import Any

import jax.tree_util as jtu
import numpy as np

from .results import _MORE_PARTS, _PARTS, _UNKNOWN, RESULTS


# Of the gradient, relative to its size: a smooth objective has none but rounding.
_JUMP = 0.1


# By how much x may grow before a failure, or a run that comes to rest nowhere, is put
# down to it.
_GROWTH = 4.0


def _sentence(result: RESULTS, figures: dict[str, Any]) -> str:
    """What happened and at which step, the numbers, and what to do."""
    message = _message(RESULTS[result], figures)
    what, stop, way_out = message.partition(". ")
    sentence = " ".join(
        filter(
            None,
            (
                what + stop.strip(),
                _numbers(message, figures),
                way_out,
                _where_x_went(message, figures),
            ),
        )
    )
    if "num_steps" in figures and not _is(message, "outer_max_steps_reached"):
        sentence = f"At outer step {int(figures['num_steps']) + 1}: {sentence}"
    return sentence


def _is(message: str, name: str) -> bool:
    return message == RESULTS[getattr(RESULTS, name)]


_BLAMED = (
    "inner_not_converged",
    "not_selected",
    "neumann_diverged",
    "negative_curvature",
    "linear_not_converged",
    "singular",
    "nonfinite_input",
)


def _message(message: str, figures: dict[str, Any]) -> str:
    """The message; or that of the cause, if there is another one."""
    if not any(_is(message, name) for name in _BLAMED):
        return message
    # The solution of a linear solve is no cause: it is what the solver failed to find.
    causes = {"value", *_MORE_PARTS} - {"solution"}
    if not all(figures.get(part, True) for part in causes):
        return RESULTS[RESULTS.nonfinite_step]
    if _is(message, "inner_not_converged") and figures.get("kink", 0) > _JUMP:
        return RESULTS[RESULTS.at_kink]
    return message


def _not_finite(parts: dict[str, str], figures: dict[str, Any]) -> list[str]:
    return [name for part, name in parts.items() if not figures.get(part, True)]


def _safe_step(figures: dict[str, Any]) -> str:
    curvature = float(figures.get("inner_curvature", 0))
    if not 0 < curvature < np.inf:
        return ""
    return (
        f"At its start the curvature of the inner objective is about {curvature:.3g}: a "
        f"step size below {2 / curvature:.3g} does not diverge there."
    )


def _where_x_went(message: str, figures: dict[str, Any]) -> str:
    if _is(message, "interrupted"):
        return ""
    return where_x_went(figures.get("first_x", 0), figures.get("last_x", 0))


def where_x_went(first: Any, last: Any) -> str:
    """What to do if x runs off, for the largest entries of x at the start and at the end
    of a run; empty if it has not grown."""
    before, now = float(first), float(last)
    if now <= _GROWTH * max(before, 1):
        return ""
    return (
        f"The largest entry of x has grown from {before:.3g} to {now:.3g}: if x runs off "
        "to infinity, where the inner problem becomes flat, bound it (`project_x`), or "
        "add a penalty on x to the outer objective."
    )


def _numbers(message: str, figures: dict[str, Any]) -> str:
    numbers = [float(number) for number in figures["numbers"]]
    inner, displacement, linear, curvature, steps = numbers
    if _is(message, "nonfinite_step"):
        causes = _not_finite(_MORE_PARTS, figures)
        names = _not_finite(_PARTS, figures) + causes
        if "inner_y" not in figures and inner != _UNKNOWN:
            if not np.isfinite(inner):
                names.append(_MORE_PARTS["inner_y"])
        if len(names) == 0:
            return "x and y are finite, but the outer objective or a derivative is not."
        said = f"Not finite: {', '.join(names)}."
        if not figures["y"] and "inner_y" in figures and causes == []:
            said += (
                " At the start of the inner solve its objective is finite, so that the "
                f"inner solve may have diverged. {_safe_step(figures)}"
            )
        return said.strip()
    if _is(message, "inner_diverged"):
        return _safe_step(figures)
    if _is(message, "outer_max_steps_reached"):
        return (
            f"After {int(figures['num_steps'])} outer steps the outer residual is "
            f"{figures['last_outer_residual']:.3g} and the inner residual "
            f"{figures['last_inner_residual']:.3g}."
        )
    after = "" if steps == _UNKNOWN else f" after {steps:.0f} steps"
    remedy = (
        f"a step size below {2 / curvature:.3g} does not diverge on it"
        if curvature > 0
        else "no step size converges on it"
    )
    texts = {
        "inner_not_converged": (inner, "The inner gradient has norm {:.3g}."),
        "root_not_converged": (inner, "The residual has norm {:.3g}."),
        "root_diverged": (inner, "The residual has norm {:.3g}."),
        "not_selected": (
            displacement,
            "A share of {:.3g} of the displacement is still tangential to that set.",
        ),
        "neumann_diverged": (
            curvature,
            f"The residual grew {linear:.3g}-fold. H has an eigenvalue of about "
            f"{{:.3g}}: {remedy}.",
        ),
        "negative_curvature": (curvature, "The curvature is {:.3g}."),
        "linear_not_converged": (
            linear,
            f"The linear solve ended{after} with a relative residual of {{:.3g}}.",
        ),
    }
    for name, (number, text) in texts.items():
        if _is(message, name) and number != _UNKNOWN:
            return text.format(number)
    return ""


_SHOWN = 3


def sentences(failed: Any, result: RESULTS, figures: dict[str, Any]) -> str:
    """The message; for a batch, one for each element that failed."""
    failed, result, figures = jtu.tree_map(np.asarray, (failed, result, figures))
    elements = [tuple(index) for index in np.argwhere(failed).tolist()]
    lines = []
    for element in elements[:_SHOWN]:
        # The ellipsis makes the entries arrays, not scalars.
        one = jtu.tree_map(lambda u, e=element: u[(*e, ...)], (result, figures))
        line = _sentence(*one)
        if element != ():
            index = element[0] if len(element) == 1 else element
            line = f"Element {index} of the batch: {line}"
        lines.append(line)
    if len(elements) > _SHOWN:
        lines.append(f"{len(elements) - _SHOWN} more elements of the batch failed.")
    return "\n".join(lines)
