"""What `solve` returns."""

from typing import Any, Generic

import equinox as eqx
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree, Scalar

from .._compat import is_traced
from .._custom_types import X, Y
from .._equilibrium.base import Certificate
from .._failure.results import is_failure, RESULTS


class Solution(eqx.Module, Generic[X, Y]):
    """The answer of [`bilevel_eqx.solve`][]. `print` it for a summary.

    **Attributes:**

    - `x`: the outer variables.
    - `y`: the inner variables.
    - `value`: the outer objective at `(x, y)`.
    - `result`: one of [`bilevel_eqx.RESULTS`][].
    - `certificate`: how far `(x, y)` is from the equilibrium asked for, a
        [`bilevel_eqx.Certificate`][]; `None` after `solve(..., certify=False)`. This is
        not whether the algorithm has converged: an algorithm that truncates converges to
        another point.
    - `history`: what `record` returned, stacked along a leading axis with one entry for
        every `save_every` steps. Under `vmap`, where the number of entries cannot depend
        on the run, those that were never reached are NaN, or zero for integers.
    - `stats`: `num_steps`, the steps taken; `save_every`, the steps between two entries
        of the history; and the last `outer_residual` and `inner_residual` of the
        algorithm, which say whether it has come to rest. Where inner steps are unrolled,
        the latter is the norm of the inner gradient at which the last of them began.
        Outside of transformations also `compile_seconds`, `run_seconds` and
        `certify_seconds`, the wall-clock time of this call: of compiling the run (next to
        nothing if it was compiled before), of its steps, and of the certificate, the
        compiling of that included. With batches from an iterator, which come with the
        first segment, the steps of that count as compiling.
    - `state`: all that is needed to go on: pass it as `solve(..., state=...)`.
    """

    x: X
    y: Y
    value: Scalar
    result: RESULTS
    # Or `None`. Not written here, so that those who ask for it need not test for that.
    certificate: Certificate
    history: PyTree
    stats: dict[str, Any]
    state: Any

    def __str__(self):
        elsewhere = {"num_steps", "value", "save_every", *_SECONDS}
        stats = {k: v for k, v in self.stats.items() if k not in elsewhere}
        seconds = [
            f"{_seconds_as_text(self.stats[k])} to {k.removesuffix('_seconds')}"
            for k in _SECONDS
            if k in self.stats
        ]
        rows = [
            ("F", _as_text(self.value)),
            ("result", _as_text(self.result)),
            *((name, _as_text(value)) for name, value in stats.items()),
            ("steps", _as_text(self.stats["num_steps"])),
            *([("seconds", ", ".join(seconds))] if seconds else []),
        ]
        width = max(len(name) for name, _ in rows)
        lines = [f"  {name:<{width}}  {text}" for name, text in rows]
        asked = self.certificate is not None
        certificate = str(self.certificate) if asked else "certificate: not asked for"
        return "\n".join(["Solution", *lines, certificate])


_SECONDS = ("compile_seconds", "run_seconds", "certify_seconds")


def _as_text(value: Any) -> str:
    if any(is_traced(leaf) for leaf in jtu.tree_leaves(value)):
        return "traced"
    if isinstance(value, RESULTS):
        return _result_as_text(value)
    if not eqx.is_array(value):  # a placeholder, in a tree of something else
        return str(value)
    if value.ndim > 0:
        return np.array2string(np.asarray(value), precision=4, threshold=10)
    return f"{value:.6g}" if eqx.is_inexact_array(value) else str(value)


def _seconds_as_text(value: Any) -> str:
    if is_traced(value) or np.ndim(value) > 0:
        return _as_text(value)
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def _result_as_text(result: RESULTS) -> str:
    failed = np.asarray(is_failure(result))
    if failed.ndim > 0:
        return f"{failed.size - failed.sum()} of {failed.size} successful"
    return RESULTS[result].partition(". ")[0] if failed else "successful"
