"""The bar of `solve(..., progress=True)`."""

import contextlib
import importlib.util
import sys
from typing import Any

import numpy as np

from .report import AbstractReporter


class Bar(AbstractReporter):
    """One line in a terminal or a notebook, by tqdm: the step, the rate, the time left,
    and the metrics of the last step. Where the output is no terminal, nothing."""

    # The metrics at the end of a segment are enough, and they are computed anyway. So
    # the program with a bar is the program without one.
    wants_entries = False

    def __init__(self, num_steps: int | None = None):
        self.num_steps = num_steps
        self._bar: Any = None

    @contextlib.contextmanager
    def compiling(self):
        bar = self._opened()
        bar.set_description_str("compiling")
        try:
            yield
        finally:
            bar.set_description_str("", refresh=False)
            # The rate is one of steps, without the time that compiling has taken.
            bar.unpause()

    def begins(self, start):
        bar = self._opened()
        bar.n = bar.initial = bar.last_print_n = start

    def segment(self, entries, start, end, metrics):
        bar = self._opened()
        if not bar.disable and end > start:
            bar.set_postfix_str(summary(metrics()), refresh=False)
            bar.update(end - start)

    def ends(self, progress, start, end, interrupted):
        bar = self._opened()
        if bar.disable:
            return
        if bool(progress.verdict.failed):
            bar.set_description_str("failed", refresh=False)
        elif interrupted:
            bar.set_description_str("interrupted", refresh=False)
        elif bool(progress.converged):
            bar.set_description_str("converged", refresh=False)
        bar.refresh()

    @contextlib.contextmanager
    def certifying(self, cost):
        # A line below the bar, which is gone when it is done.
        text = "certifying" if cost is None else f"certifying: {cost}"
        with _tqdm(bar_format="{desc}", desc=text, leave=False):
            yield

    def close(self):
        if self._bar is not None:
            # A bar without a step says nothing: what went wrong is in the error.
            self._bar.leave = self._bar.n > self._bar.initial
            self._bar.close()
        self._bar = None

    def __call__(self, step: int, num_steps: int, metrics: dict[str, Any]) -> None:
        """A step within a program, as of a run under `jax.jit`. Of a batch the bar shows
        the element that is ahead, or the one that has said something last."""
        self.num_steps = num_steps
        bar = self._opened()
        if not bar.disable:
            bar.set_postfix_str(summary(metrics), refresh=False)
            bar.update(max(step - bar.n, 0))

    def _opened(self) -> Any:
        if self._bar is None:
            # `miniters`: otherwise tqdm learns how many steps to wait for, and segments
            # are of various lengths.
            self._bar = _tqdm(total=self.num_steps, unit=" steps", miniters=1)
        return self._bar


IN_PROGRAMS = Bar()
"""The bar of runs within a program. One for all of them, so that a second run of the same
program finds it compiled."""


def summary(metrics: dict[str, Any]) -> str:
    """The objective and the residuals, and what else a pipeline of the user's own has, as
    one short text."""
    texts = []
    for name, value in metrics.items():
        if np.ndim(value) == 0:
            texts.append(f"{_SHORT.get(name, name)} {float(value):.3g}")
    # The objective first.
    return ", ".join(sorted(texts, key=lambda text: not text.startswith("F ")))


_SHORT = {"value": "F", "outer_residual": "outer", "inner_residual": "inner"}


def _tqdm(**options: Any) -> Any:
    # `disable=None`: silent where the output is no terminal. That of a notebook says that
    # it is none, and can show a bar.
    in_notebook = _in_notebook()
    # Not `tqdm.auto`, which warns in a notebook without widgets. Text does there.
    if in_notebook and importlib.util.find_spec("ipywidgets") is not None:
        from tqdm.notebook import tqdm
    else:
        from tqdm import tqdm
    disable: Any = False if in_notebook else None
    return tqdm(disable=disable, dynamic_ncols=True, **options)


def _in_notebook() -> bool:
    """Whether this is the kernel of a notebook. A test of tqdm's is the same."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and "IPKernelApp" in shell.config
