"""Tables as text, and objects as the code that makes them."""

import inspect
from typing import Any

import equinox as eqx
import numpy as np

from ._compat import is_traced


def aligned(
    rows: list[list[str]], alignments: str = "<>", ruled: bool = False
) -> list[str]:
    """The lines of a table. If it is `ruled`, its first row is the header.

    Each `<` or `>` aligns one column to the left or to the right. The last one also
    aligns all columns after it.
    """
    widths = [max(map(len, column)) for column in zip(*rows)]
    signs = alignments.ljust(len(widths), alignments[-1])
    lines = [
        "  ".join(f"{c:{sign}{w}}" for c, sign, w in zip(row, signs, widths)).rstrip()
        for row in rows
    ]
    if ruled:
        lines.insert(1, "  ".join("-" * width for width in widths))
    return lines


# The names under which these packages are usually imported. Ours have no prefix.
_PREFIXES = {"lineax": "lx.", "optimistix": "optx."}


def as_code(value: Any, **written: str) -> str:
    """A module as the code that makes it: `Implicit(Projection(), Pseudoinverse())`.

    Arguments at their defaults are left out. An argument without known code, such as an
    optax optimiser, is looked up by its name in `written`, and is `...` if it is not
    there.
    """
    if isinstance(value, eqx.Module):
        return _call_as_code(value, written)
    if value is None or isinstance(value, str | bool):
        return repr(value)
    if eqx.is_array_like(value) and np.ndim(value) == 0 and not is_traced(value):
        number = np.asarray(value)
        is_float = np.issubdtype(number.dtype, np.inexact)
        return f"{float(number):.6g}" if is_float else str(number)
    if inspect.isfunction(value) and value.__name__ != "<lambda>":
        return value.__name__
    return "..."


def _call_as_code(module: eqx.Module, written: dict[str, str]) -> str:
    kind = type(module)
    prefix = _PREFIXES.get(kind.__module__.partition(".")[0], "")
    arguments, skipped = [], False
    for name, parameter in inspect.signature(kind).parameters.items():
        # Our modules store each argument under its own name.
        value = getattr(module, name, ...)
        if _same(value, parameter.default):
            skipped = True
            continue
        code = written.get(name) or as_code(value, **written)
        by_name = skipped or parameter.kind is parameter.KEYWORD_ONLY
        arguments.append(f"{name}={code}" if by_name else code)
    return f"{prefix}{kind.__name__}({', '.join(arguments)})"


def _same(value: Any, default: Any) -> bool:
    if is_traced(value) or np.ndim(value) > 0 or value is ...:
        return False
    # A rate is stored as an array, but its default is a number.
    if isinstance(default, int | float) and eqx.is_array_like(value):
        return bool(np.asarray(value) == default)
    return eqx.tree_equal(value, default) is True
