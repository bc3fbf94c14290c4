"""What is told of a run while it goes on, and to whom."""

import abc
import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .loop import Progress


Report = Callable[[int, int, dict[str, Any]], None]


class AbstractReporter(abc.ABC):
    """Is told what happens in a run outside of transformations."""

    wants_entries: bool
    """Whether `segment` is given the metrics of each entry of the history. That is a part
    of the program."""

    @abc.abstractmethod
    def compiling(self) -> contextlib.AbstractContextManager[None]:
        """A context for the time that compiling takes."""

    @abc.abstractmethod
    def begins(self, start: int) -> None:
        """There are `start` steps from an earlier run."""

    @abc.abstractmethod
    def segment(
        self,
        entries: PyTree[Array],
        start: int,
        end: int,
        metrics: Callable[[], dict[str, Any]],
    ) -> None:
        """The steps from `start` to `end` are taken. `metrics` returns those of the last
        of them."""

    @abc.abstractmethod
    def ends(self, progress: Progress, start: int, end: int, interrupted: bool) -> None:
        """The run from `start` to `end` has ended, well or not."""

    @abc.abstractmethod
    def certifying(self, cost: str | None) -> contextlib.AbstractContextManager[None]:
        """A context for the time that the certificate takes."""

    @abc.abstractmethod
    def close(self) -> None:
        """Nothing more will come: the run has ended, or an error was raised."""


class Silent(AbstractReporter):
    """Tells nobody."""

    wants_entries = False

    def compiling(self):
        return contextlib.nullcontext()

    def begins(self, start):
        pass

    def segment(self, entries, start, end, metrics):
        pass

    def ends(self, progress, start, end, interrupted):
        pass

    def certifying(self, cost):
        return contextlib.nullcontext()

    def close(self):
        pass


class ToFunction(AbstractReporter):
    """Calls a function of `(step, num_steps, metrics)` for each entry of the history,
    once, and for the last step."""

    wants_entries = True

    def __init__(self, report: Report, num_steps: int, save_every: int):
        self.report = report
        self.num_steps = num_steps
        self.save_every = save_every

    def compiling(self):
        return contextlib.nullcontext()

    def begins(self, start):
        pass

    def segment(self, entries, start, end, metrics):
        entries = jax.device_get(entries)
        for entry in range(start // self.save_every, end // self.save_every):
            # The ellipsis keeps them arrays.
            metrics_of_it = jtu.tree_map(lambda k, i=entry: k[i, ...], entries)
            self.report((entry + 1) * self.save_every, self.num_steps, metrics_of_it)

    def ends(self, progress, start, end, interrupted):
        # Where there is no entry.
        if end > start and end % self.save_every != 0:
            self.report(end, self.num_steps, jax.device_get(progress.metrics))

    def certifying(self, cost):
        return contextlib.nullcontext()

    def close(self):
        pass
