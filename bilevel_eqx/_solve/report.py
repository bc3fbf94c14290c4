"""The lines of a run: what is printed, or handed to the user, while it goes on."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .loop import Progress


Report = Callable[[int, int, dict[str, Any]], None]


# A line says that the program is being compiled if this takes longer.
_PATIENCE = 1.0


def print_progress(step: int, num_steps: int, metrics: dict[str, Any]) -> None:
    """The default line of `solve(..., progress=True)`. One process of several prints."""
    if jax.process_index() > 0:
        return
    figures = "  ".join(f"{k} {float(v):.3e}" for k, v in metrics.items())
    print(f"step {step:>{len(str(num_steps))}}/{num_steps}  {figures}", flush=True)


class Reporter:
    """Reports each entry of the history once, and the end of the run."""

    def __init__(self, report: Report | None, num_steps: int, save_every: int):
        self.report = report
        self.num_steps = num_steps
        self.save_every = save_every

    def entries(self, kept: PyTree[Array], start: int, end: int) -> None:
        """Reports the entries that the steps from `start` to `end` have made."""
        if self.report is None:
            return
        kept = jax.device_get(kept)
        for entry in range(start // self.save_every, end // self.save_every):
            # The ellipsis keeps them arrays.
            metrics = jtu.tree_map(lambda k, i=entry: k[i, ...], kept)
            self.report((entry + 1) * self.save_every, self.num_steps, metrics)

    def end(self, progress: Progress, start: int, end: int) -> None:
        """Reports the last step, where there is no entry."""
        if self.report is not None and end > start and end % self.save_every != 0:
            self.report(end, self.num_steps, jax.device_get(progress.metrics))

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Says so if what is done within takes long."""
        if self.report is not print_progress:
            yield
            return
        notice = threading.Timer(_PATIENCE, print, ("compiling ...",), {"flush": True})
        notice.daemon = True
        notice.start()
        try:
            yield
        finally:
            notice.cancel()
