"""Batches from an iterator on the host, put on the device ahead of their steps."""

import base64
import contextlib
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from .._mesh import on_devices_of
from .._problem.batches import GivenBatches
from .._problem.finite_sum import AbstractFiniteSumProblem, data_of, Level


class _Chunk(NamedTuple):
    batches: GivenBatches
    # The state of the iterator behind them, if it has one.
    place: Any


class Stream:
    """Pairs of an inner and an outer batch, one for each step, from an iterator.

    They are taken in chunks of `save_every` steps. While a segment of that length runs,
    the next chunk is fetched, stacked and sent to the device.
    """

    def __init__(
        self,
        pairs: Iterable,
        problem: AbstractFiniteSumProblem,
        key: PRNGKeyArray,
        num_steps: int,
        save_every: int,
        keeps_place: bool,
    ):
        self._iterator = iter(pairs)
        self._problem = problem
        self._key = key
        self._num_steps = num_steps
        self._save_every = save_every
        self._keeps_place = keeps_place
        # Of all chunks, so that there is one program.
        self._length = min(save_every, num_steps)
        self._next: _Chunk | None = None
        # The samples in a batch of each level, as in the first pair; `None` if that has
        # none.
        self._lengths: dict[Level, int | None] = {}
        self._num_pairs = 0
        # Where the iterator was after the chunk that was taken last, to be saved.
        self.place: Any = None

    @property
    def has_state(self) -> bool:
        """Whether the iterator can be asked where it is, and set there again."""
        names = ("get_state", "set_state")
        return all(callable(getattr(self._iterator, name, None)) for name in names)

    def end(self, done: int) -> int:
        """After which step the chunk ends that begins after step `done`."""
        end = done - done % self._save_every + self._save_every
        return min(end, self._num_steps)

    @contextlib.contextmanager
    def fetching(self, done: int) -> Iterator[None]:
        """Fetches the chunk for the steps after `done` while what is done within runs.

        In a thread, because what Equinox has compiled is waited for when it is called.
        """
        # What a user has set for the present thread alone.
        x64, device = jax.config.jax_enable_x64, jax.config.jax_default_device  # pyright: ignore

        def prepare():
            with jax.enable_x64(x64), jax.default_device(device):
                self.prepare(done)

        with ThreadPoolExecutor(1) as pool:
            fetched = pool.submit(prepare)
            yield
            fetched.result()

    def prepare(self, done: int) -> None:
        """Fetches the chunk for the steps after `done`, if it is not there yet."""
        if done >= self._num_steps or self._next is not None:
            return
        pairs = []
        for step in range(done, self.end(done)):
            try:
                pair = next(self._iterator)
            except StopIteration:
                return
            self._num_pairs += 1
            pairs.append(self._checked(pair, step))
        pairs += [pairs[-1]] * (self._length - len(pairs))
        inner, outer = jtu.tree_map(lambda *leaves: np.stack(leaves), *pairs)
        batches = GivenBatches(
            self._on_devices(inner, "inner"),
            self._on_devices(outer, "outer"),
            self._key,
            np.asarray(done),
        )
        place = self._state() if self._keeps_place else None
        self._next = _Chunk(batches, place)

    def _on_devices(self, batches: PyTree, level: Level) -> PyTree:
        if batches is None:
            return None
        return on_devices_of(batches, data_of(self._problem, level), level)

    def example(self) -> GivenBatches:
        """The first chunk, which is not used up by this."""
        self.prepare(0)
        return self._fetched(0).batches

    def take(self, done: int) -> GivenBatches | None:
        """The chunk for the steps after `done`; `None` if the iterator has ended."""
        self.prepare(done)
        if self._next is None:
            return None
        chunk, self._next = self._next, None
        self.place = chunk.place
        return chunk.batches

    def resume(self, place: Any, done: int) -> None:
        """Sets the iterator to where it was after step `done`."""
        self._next = None
        self._iterator.set_state(_decoded(place))  # pyright: ignore
        self._num_pairs = done
        self.place = place

    def _fetched(self, done: int) -> _Chunk:
        if self._next is None:
            raise self.ended(done)
        return self._next

    def ended(self, done: int) -> ValueError:
        """The sentence for an iterator that ends early."""
        return ValueError(
            f"`solve(batches=...)`: the iterator has ended after {self._num_pairs} pairs "
            f"of batches, and the run has taken {done} of its {self._num_steps} steps. "
            "It needs one pair for each step. Take fewer steps, or let the iterator "
            "begin again at the end of the data."
        )

    def _state(self) -> Any:
        state = self._iterator.get_state()  # pyright: ignore
        if isinstance(state, bytes):
            return {"bytes": base64.b64encode(state).decode()}
        try:
            return {"json": json.loads(json.dumps(state))}
        except TypeError as error:
            raise ValueError(
                "`solve(batches=...)`: `get_state()` of the iterator must return bytes, "
                f"or what can be written as JSON. It returned {state!r}."
            ) from error

    def _checked(self, pair: Any, step: int) -> tuple[PyTree, PyTree]:
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise ValueError(
                "`solve(batches=...)` takes an iterator of pairs `(inner_batch, "
                f"outer_batch)`, but number {step} is {pair!r}."
            )
        levels: tuple[Level, Level] = ("inner", "outer")
        inner, outer = (
            self._checked_batch(batch, level, step) for batch, level in zip(pair, levels)
        )
        return inner, outer

    def _checked_batch(self, batch: PyTree, level: Level, step: int) -> PyTree:
        if batch is not None:
            batch = jtu.tree_map(np.asarray, batch)
        leaves = jtu.tree_leaves(batch)
        lengths = {u.shape[0] if u.ndim > 0 else None for u in leaves}
        length = max((n for n in lengths if n is not None), default=0)
        given = None if batch is None else length
        expected = self._lengths.setdefault(level, given)
        if (given is None) != (expected is None):
            is_none, was = ("is", "was not") if given is None else ("is not", "was")
            raise ValueError(
                f"`solve(batches=...)`: {level} batch number {step} {is_none} `None`, "
                f"but the first one {was}. Give a batch of the {level} data in all "
                "steps, or `None` in all of them, which takes all of the problem's own "
                "data."
            )
        if batch is None:
            return None
        data = data_of(self._problem, level)
        forms = [
            (jtu.tree_structure(tree), [u.shape[1:] for u in jtu.tree_leaves(tree)])
            for tree in (batch, data)
        ]
        if forms[0] != forms[1] or lengths != {expected}:
            shown = eqx.tree_pformat(batch)
            raise ValueError(
                f"`solve(batches=...)`: {level} batch number {step} must be like "
                f"`problem.{level}_data`, with {expected} samples as the first one has, "
                f"but it is {shown}."
            )
        if expected == 0:
            raise ValueError(
                f"`solve(batches=...)`: {level} batch number {step} has no samples, and "
                "their mean is not defined. Give at least one, or `None` in all steps, "
                "which takes all of the problem's own data."
            )

        def cast(path, u, v):
            if not _keeps_values(u, v.dtype):
                place = jtu.keystr(path)
                raise ValueError(
                    f"`solve(batches=...)`: {level} batch number {step} has type "
                    f"{u.dtype} at `{level}_batch{place}`, but `problem.{level}_data"
                    f"{place}` has type {v.dtype}, and a cast would change the values. "
                    f"Let the iterator yield {v.dtype}, or make the problem with data of "
                    f"type {u.dtype}."
                )
            return u.astype(v.dtype)

        return jtu.tree_map_with_path(cast, batch, data)


# From the narrowest kind to the widest. By JAX's types, which include `bfloat16`.
_KINDS = (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating)


def _keeps_values(u: np.ndarray, dtype: Any) -> bool:
    """Whether a cast to `dtype` keeps the values, but for their precision."""
    if u.dtype == dtype:
        return True
    kind, wanted = (
        [jnp.issubdtype(of, name) for name in _KINDS] for of in (u.dtype, dtype)
    )
    if True not in kind or kind.index(True) > wanted.index(True):
        return False
    if not jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(u.dtype, jnp.bool_):
        return True
    # Integers wrap around where they do not fit, and labels are often of 64 bits.
    range_ = jnp.iinfo(dtype)
    return bool(u.min() >= range_.min and u.max() <= range_.max)


def _decoded(place: Any) -> Any:
    if "bytes" in place:
        return base64.b64decode(place["bytes"])
    return place["json"]
