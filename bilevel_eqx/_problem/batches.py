"""The mini-batches that a run draws."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from .._arguments import check_count
from .base import AbstractBilevelProblem
from .finite_sum import (
    AbstractFiniteSumProblem,
    Batch,
    data_of,
    Level,
    neighbours,
    num_samples,
    OnBatches,
    rows,
)
from .sampling import check_batch_size, Epochs


class Batches(eqx.Module):
    """Mini-batches of both levels, each in epochs without replacement.

    Batch number t is a function of the key and of t, so there is no state to carry.
    """

    inner_size: int | None = eqx.field(static=True)
    outer_size: int | None = eqx.field(static=True)
    fixed: bool = eqx.field(static=True, default=False)

    def epochs(self, problem: AbstractBilevelProblem, level: Level) -> Epochs | None:
        """How the data of a level are drawn; `None` if all are used at once."""
        batch_size = self.inner_size if level == "inner" else self.outer_size
        if batch_size is None:
            return None
        assert isinstance(problem, AbstractFiniteSumProblem)
        size = num_samples(problem, level)
        return Epochs(size, batch_size, self.fixed, problem.shuffled)

    def __call__(
        self,
        problem: AbstractBilevelProblem,
        key: PRNGKeyArray,
        inner_count: Int[Array, ""],
        outer_count: Int[Array, ""],
    ) -> AbstractBilevelProblem:
        """The problem on inner batch number `inner_count` and outer batch number
        `outer_count`."""
        if self.inner_size is None and self.outer_size is None:
            return problem
        assert isinstance(problem, AbstractFiniteSumProblem)
        inner_key, outer_key = jr.split(key)
        return OnBatches(
            problem,
            self._batch(problem, "inner", inner_key, inner_count),
            self._batch(problem, "outer", outer_key, outer_count),
        )

    def num_batches(self, problem: AbstractBilevelProblem, level: Level) -> int:
        """The number of batches in an epoch of a level; one if all data are used."""
        epochs = self.epochs(problem, level)
        return 1 if epochs is None else epochs.num_batches

    def _batch(self, problem, level: Level, key, count) -> Batch | None:
        epochs = self.epochs(problem, level)
        if epochs is None:
            return None
        samples_key, losses_key = jr.split(key)
        place = epochs.place(samples_key, count)
        data = data_of(problem, level)
        if epochs.neighbours:
            start, weights = epochs.slice(place)
            samples = neighbours(data, start, epochs.batch_size)
        else:
            indices, weights = epochs.at(samples_key, count, place)
            samples = rows(data, indices)
        return Batch(samples, weights, jr.fold_in(losses_key, count), place)

    def check(self, problem: AbstractBilevelProblem, owner: str) -> None:
        """Refuses batches of a problem that has no data, or fewer than a batch."""
        sizes: dict[Level, int | None] = {
            "inner": self.inner_size,
            "outer": self.outer_size,
        }
        for level, size in sizes.items():
            if size is None:
                continue
            if not isinstance(problem, AbstractFiniteSumProblem):
                raise _no_samples(problem, f"{owner}({level}_batch={size})")
            check_count(size, f"{level}_batch", owner)
            available = num_samples(problem, level)
            check_batch_size(size, available, f"`problem.{level}_data`")


def _no_samples(problem: AbstractBilevelProblem, call: str) -> ValueError:
    return ValueError(
        f"`{call}` draws mini-batches, but `{type(problem).__name__}` does not say what "
        "its samples are. State the problem as a `FiniteSumProblem`, or leave the batch "
        "out to use all of it."
    )


def on_inner_batch(
    problem: AbstractBilevelProblem,
    size: int,
    key: PRNGKeyArray,
    count: Int[Array, ""],
    owner: str,
) -> AbstractBilevelProblem:
    """The problem on inner batch number `count`. Its outer objective remains as it is."""
    outer_batch = None
    if isinstance(problem, OnBatches):
        if problem.inner_batch is not None:
            raise ValueError(
                f"`{owner}(batch_size={size})` draws a batch for each inner step, but "
                "the inner objective is on a batch already. Leave out one of the two, "
                f"`inner_batch` or `{owner}(batch_size=...)`."
            )
        problem, outer_batch = problem.problem, problem.outer_batch
    if not isinstance(problem, AbstractFiniteSumProblem):
        raise _no_samples(problem, f"{owner}(batch_size={size})")
    check_batch_size(size, num_samples(problem, "inner"), "`problem.inner_data`")
    on = Batches(size, None)(problem, key, count, count)
    assert isinstance(on, OnBatches)
    return OnBatches(problem, on.inner_batch, outer_batch)


def place_of(problem: AbstractBilevelProblem, level: Level) -> Int[Array, ""]:
    """Which of the batches of an epoch a problem that was drawn is on. All data are the
    only batch of their epoch."""
    batch = None
    if isinstance(problem, OnBatches):
        batch = problem.inner_batch if level == "inner" else problem.outer_batch
    if batch is None or batch.place is None:
        return jnp.zeros((), jnp.int32)
    return batch.place


class GivenBatches(eqx.Module):
    """Batches from outside: samples of each level, along a leading axis of steps."""

    inner: PyTree[Array] | None
    outer: PyTree[Array] | None
    key: PRNGKeyArray
    # The number of the step that the first ones are for.
    start: Int[Any, ""]

    def at(self, count: Int[Array, ""]) -> tuple[Batch | None, Batch | None]:
        """The inner and the outer batch for step number `count`."""
        inner_key, outer_key = jr.split(jr.fold_in(self.key, count))

        def batch(samples, key) -> Batch | None:
            if samples is None:
                return None
            samples = jtu.tree_map(lambda u: u[count - self.start], samples)
            size = jtu.tree_leaves(samples)[0].shape[0]
            return Batch(samples, jnp.full((size,), 1 / size), key)

        return batch(self.inner, inner_key), batch(self.outer, outer_key)


def check_batch_argument(size: Any, name: str, owner: str) -> None:
    """Refuses the size of a batch that is not a positive integer or `None`."""
    if size is not None:
        check_count(size, name, owner)
