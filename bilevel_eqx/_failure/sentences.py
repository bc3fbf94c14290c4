"""The message of a failure, with its numbers."""

from typing import Any

import jax.tree_util as jtu
import numpy as np

from .results import _MORE_PARTS, _NUMBERS, _PARTS, _UNKNOWN, RESULTS


def _sentence(result: RESULTS, figures: dict[str, Any]) -> str:
    """What happened and at which step, the numbers, and what to do."""
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
        parts = {**_PARTS, **_MORE_PARTS}
        names = [name for part, name in parts.items() if not figures.get(part, True)]
        if len(names) == 0:
            return "x and y are finite, but the outer objective or a derivative is not."
        return f"Not finite: {', '.join(names)}."
    if _is(message, "outer_max_steps_reached"):
        return (
            f"After {int(figures['num_steps'])} outer steps the outer residual is "
            f"{figures['last_outer_residual']:.3g} and the inner residual "
            f"{figures['last_inner_residual']:.3g}."
        )
    inner, displacement, linear, curvature = (float(figures[k]) for k in _NUMBERS)
    remedy = (
        f"a step size below {2 / curvature:.3g} does not diverge on it"
        if curvature > 0
        else "no step size converges on it"
    )
    texts = {
        "inner_not_converged": (inner, "The inner gradient has norm {:.3g}."),
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
            "The linear solve ended with a relative residual of {:.3g}.",
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
