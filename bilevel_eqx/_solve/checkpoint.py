"""Saving what a run needs to go on, so that being killed costs little."""

import glob
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree

from .._compat import is_traced
from .loop import Progress


# Of the layout of the file. To be raised when that changes.
_FORMAT = 1


# How the name of a file ends that is still being written.
_UNFINISHED = ".unfinished"


_MAGIC = b"bilevel_eqx checkpoint\n"


T = TypeVar("T")


def save(path: str | os.PathLike, state: PyTree) -> None:
    """Saves the state of a run, or any pytree of arrays.

    The file is whole or it is not there: it is written under another name beside `path`,
    flushed to the disk, and then renamed. A kill in the middle of that leaves the
    previous file as it was.

    **Arguments:**

    - `path`: the file. It is replaced if there is one; its folder must exist.
    - `state`: for instance the `state` of a [`bilevel_eqx.Solution`][]. Its arrays and
        numbers are saved, random keys among them; what else it holds is not.

    **Raises:**

    An `OSError` if the file cannot be written, and a `ValueError` for a `state` whose
    values are not known, under `jax.jit` or `jax.vmap`.
    """
    write(path, state, {})


def load(path: str | os.PathLike, like: T) -> T:
    """Loads what [`bilevel_eqx.save`][] has saved.

    **Arguments:**

    - `path`: the file.
    - `like`: a pytree of the same structure, whose arrays are replaced by those of the
        file; for instance the state of a run of one step.

    **Returns:**

    A pytree like `like`.

    **Raises:**

    A `ValueError` with a sentence if the file was written by another version, is of
    another structure, or is no such file or not whole. A `FileNotFoundError` if there is
    none.

    !!! Example

        ```python
        blx.save("run.blx", solution.state)
        start = blx.solve(problem, blx.WarmStart(), x0, y0, num_steps=1)
        state = blx.load("run.blx", like=start.state)
        more = blx.solve(problem, blx.WarmStart(), x0, y0, num_steps=100, state=state)
        ```
    """
    return read(path, lambda metadata: like)[0]


def write(path: str | os.PathLike, state: PyTree, metadata: dict[str, Any]) -> None:
    """`save`, with something of one's own in the header."""
    # A link is followed, and remains one.
    path = pathlib.Path(os.path.realpath(path))
    if any(is_traced(leaf) for leaf in jtu.tree_leaves(state)):
        raise ValueError(
            "`save(path, state)` was called under `jax.jit` or `jax.vmap`, where the "
            "values of the state are not known: save what the transformed function "
            "returns."
        )
    header = {"format": _FORMAT, "leaves": _description(state), **metadata}
    descriptor, unfinished = tempfile.mkstemp(
        dir=path.parent, prefix=path.name + ".", suffix=_UNFINISHED
    )
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(_MAGIC + json.dumps(header).encode() + b"\n")
            eqx.tree_serialise_leaves(stream, _without_keys(state))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(unfinished, path)
    except BaseException:
        pathlib.Path(unfinished).unlink(missing_ok=True)
        raise


def read(
    path: str | os.PathLike, like: Callable[[dict[str, Any]], T]
) -> tuple[T, dict[str, Any]]:
    """`load`, where what to expect may hang on the header; and the header."""
    with open(path, "rb") as stream:
        if stream.read(len(_MAGIC)) != _MAGIC:
            raise ValueError(
                f"`{path}` was not written by `bilevel_eqx.save`: give it another name, "
                "or remove it."
            )
        try:
            header = json.loads(stream.readline())
        except ValueError as error:
            raise ValueError(f"`{path}` is damaged: its header is not whole.") from error
        if header.get("format") != _FORMAT:
            raise ValueError(
                f"`{path}` is of format {header.get('format')}, and this version of "
                f"bilevel_eqx reads format {_FORMAT}. Load it with the version that "
                "wrote it, or start anew."
            )
        expected = like(header)
        _compare(path, header["leaves"], _description(expected))
        try:
            state = eqx.tree_deserialise_leaves(stream, _without_keys(expected))
        except Exception as error:
            raise ValueError(
                f"`{path}` is damaged: it ends before all arrays have been read. Load "
                "an earlier file, or start anew."
            ) from error
    return _with_keys(state, expected), header


def fingerprint(*trees: PyTree) -> str:
    """A digest of all numbers in `trees`: another run has another one."""
    digest = hashlib.sha256()
    for path, leaf in jtu.tree_leaves_with_path(trees):
        if eqx.is_array_like(leaf):
            digest.update(jtu.keystr(path).encode())
            digest.update(np.ascontiguousarray(_numbers(leaf)).tobytes())
    return digest.hexdigest()


class _Saved(eqx.Module):
    """What a checkpoint holds."""

    end: Progress
    history: PyTree[Array]


class Checkpoint:
    """The file of a run, which is saved in it as it goes.

    **Arguments:**

    - `path`: the file.
    - `every`: how many steps lie between two savings.
    - `mark`: what tells the run from others.
    """

    def __init__(self, path: str | os.PathLike, every: int, mark: str):
        self.path = pathlib.Path(path)
        self.every = every
        self.mark = mark
        real = pathlib.Path(os.path.realpath(path))
        if not real.parent.is_dir():
            raise FileNotFoundError(
                f"`solve(checkpoint={str(path)!r})`: there is no folder `{real.parent}`. "
                "Create it first."
            )
        # Those of a run that was killed while it wrote.
        for unfinished in real.parent.glob(f"{glob.escape(real.name)}.*{_UNFINISHED}"):
            unfinished.unlink(missing_ok=True)

    def exists(self) -> bool:
        return self.path.exists()

    def next(self, done: int) -> int:
        """After which step the run is saved next, once `done` have been taken."""
        return done - done % self.every + self.every

    def write(self, progress: Progress, history: PyTree[Array]) -> None:
        entries = jtu.tree_leaves(history)
        header = {
            "run": self.mark,
            "done": int(progress.num_steps),
            "saved": len(entries[0]) if len(entries) > 0 else 0,
        }
        write(self.path, _Saved(progress, history), header)

    def read(self, progress: Progress, entry: PyTree) -> tuple[Progress, PyTree[Array]]:
        """The progress and the history so far, given the shapes of the progress and of
        an entry."""

        def like(header):
            if header.get("run") != self.mark:
                raise ValueError(
                    f"`{self.path}` is the checkpoint of another run: its data, initial "
                    "values, rates or equilibrium are not those given. Remove it to "
                    "start anew, or give another name."
                )
            history = jtu.tree_map(
                lambda e: jax.ShapeDtypeStruct((header["saved"], *e.shape), e.dtype),
                entry,
            )
            return _Saved(progress, history)

        saved, _ = read(self.path, like)
        return saved.end, saved.history


def _is_key(leaf: Any) -> bool:
    is_array = isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)
    return is_array and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _numbers(leaf: Any) -> np.ndarray:
    return np.asarray(jr.key_data(leaf) if _is_key(leaf) else leaf)


def _without_keys(tree: PyTree) -> PyTree:
    """The numbers behind random keys in their place: Equinox does not write keys."""

    def without(leaf):
        if not _is_key(leaf):
            return leaf
        is_shape = isinstance(leaf, jax.ShapeDtypeStruct)
        return jax.eval_shape(jr.key_data, leaf) if is_shape else jr.key_data(leaf)

    return jtu.tree_map(without, tree)


def _with_keys(tree: PyTree, like: PyTree) -> PyTree:
    def with_(leaf, model):
        if not _is_key(model):
            return leaf
        # Asked within a trace, where a shape will do for a key.
        found = []
        jax.eval_shape(lambda key: found.append(jr.key_impl(key)), model)
        return jr.wrap_key_data(leaf, impl=found[0])

    return jtu.tree_map(with_, tree, like)


def _description(tree: PyTree) -> list[str]:
    """What a pytree looks like: a line for each array or number."""
    return [
        f"{jtu.keystr(path)}: {leaf.dtype}{list(leaf.shape)}"
        if hasattr(leaf, "dtype")
        else f"{jtu.keystr(path)}: {type(leaf).__name__}"
        for path, leaf in jtu.tree_leaves_with_path(tree)
        if eqx.is_array_like(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)
    ]


def _compare(path, found: list[str], expected: list[str]) -> None:
    if found == expected:
        return
    for one, other in zip(found, expected):
        if one != other:
            difference = f"it has `{one}` where `{other}` was expected"
            break
    else:
        difference = f"it has {len(found)} arrays, and {len(expected)} were expected"
    raise ValueError(
        f"`{path}` is of another structure: {difference}. It was saved by a run of "
        "another problem, of another pipeline or in another precision."
    )
