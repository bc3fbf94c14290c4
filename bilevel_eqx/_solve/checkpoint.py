"""Saving what a run needs to go on, so that being killed costs little."""

import hashlib
import itertools
import json
import math
import os
import pathlib
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree

from .._compat import is_traced
from .digest import is_key, numbers_of
from .identity import changes, Identity
from .loop import Progress


# Of the layout of the file. To be raised when that changes.
_FORMAT = 2


# How the name of a file ends that is still being written.
_UNFINISHED = ".unfinished"


_MAGIC = b"bilevel_eqx checkpoint\n"


_CHECKSUM = hashlib.sha256


T = TypeVar("T")


def write(path: str | os.PathLike, state: PyTree, metadata: dict[str, Any]) -> None:
    """Saves a state in a file, with something of one's own in the header.

    The file has a line that says what it is, a line of JSON, the bytes of all arrays, and
    a checksum of all that is before it.
    """
    # A link is followed, and remains one.
    path = pathlib.Path(os.path.realpath(path))
    if any(is_traced(leaf) for leaf in jtu.tree_leaves(state)):
        raise ValueError(
            "`save(path, state)` was called under `jax.jit` or `jax.vmap`, where the "
            "values of the state are not known: save what the transformed function "
            "returns."
        )
    header = {"format": _FORMAT, "leaves": described(state), **metadata}
    unfinished = _unfinished(path)
    try:
        # With the permissions of a new file, or those of the file that it replaces.
        with open(unfinished, "xb") as stream:
            checksum = _CHECKSUM()
            for part in (_MAGIC, json.dumps(header).encode() + b"\n", *_bytes(state)):
                stream.write(part)
                checksum.update(part)
            stream.write(checksum.digest())
            stream.flush()
            os.fsync(stream.fileno())
        if path.exists():
            os.chmod(unfinished, stat.S_IMODE(path.stat().st_mode))
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def read(
    path: str | os.PathLike, like: Callable[[dict[str, Any]], T]
) -> tuple[T, dict[str, Any]]:
    """What `write` has saved, where what to expect may hang on the header; and the
    header."""
    data = pathlib.Path(path).read_bytes()
    if not data.startswith(_MAGIC):
        raise ValueError(
            f"`{path}` was not written by `bilevel_eqx.save`, or its first bytes are "
            "damaged. Give another name, or remove it."
        )
    # Before the checksum, so that a file of another version is not called damaged.
    start = data.find(b"\n", len(_MAGIC)) + 1
    try:
        header = json.loads(data[len(_MAGIC) : start])
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "its header cannot be read") from error
    if not isinstance(header, dict) or "format" not in header:
        raise _damaged(path, "its header is not whole")
    if header["format"] != _FORMAT:
        raise ValueError(
            f"`{path}` is of format {header['format']}, and this version of "
            f"bilevel_eqx reads format {_FORMAT}. Load it with the version that "
            "wrote it, or start anew."
        )
    end = len(data) - _CHECKSUM().digest_size
    # Not a slice of `data`, which would be a copy.
    whole = memoryview(data)
    if _CHECKSUM(whole[:end]).digest() != data[end:]:
        raise _damaged(path, "it is cut off, or some of its bytes have changed")
    expected = like(header)
    compare(path, _field(path, header, "leaves", list), described(expected))
    return _from_bytes(path, whole[start:end], expected), header


def _field(path: Any, header: dict[str, Any], name: str, kind: type) -> Any:
    """A field of a header: of a type, and if it is a number, not negative."""
    value = header.get(name)
    if type(value) is not kind or (isinstance(value, int) and value < 0):
        raise _damaged(path, f"its header does not say what `{name}` is")
    return value


class _Saved(eqx.Module):
    """What a checkpoint holds."""

    end: Progress
    history: PyTree[Array]


class Checkpoint:
    """The file of a run, which is saved in it as it goes.

    That the file can be written is checked at once. That no other run writes it is
    checked before each saving: the file must be the one that this run has read or written
    last. (Of two runs that save within the same moment both may miss it.)

    **Arguments:**

    - `path`: the file.
    - `every`: how many steps lie between two savings.
    """

    def __init__(self, path: str | os.PathLike, every: int):
        self.path = pathlib.Path(path)
        self.every = every
        real = pathlib.Path(os.path.realpath(path))
        call = f"`solve(checkpoint={str(path)!r})`"
        check_folder(real, call)
        if real.is_dir():
            raise IsADirectoryError(f"{call}: that is a folder. Name a file in it.")
        try:
            for left in _left_by_a_kill(real):
                left.unlink(missing_ok=True)
            trial = _unfinished(real)
            trial.touch(exist_ok=False)
            trial.unlink()
        except OSError as error:
            raise type(error)(
                f"{call}: no file can be written in `{real.parent}` ({error}). Choose "
                "another folder."
            ) from error

        self._known = _token(real)

    def exists(self) -> bool:
        return self.path.exists()

    def next(self, done: int) -> int:
        """After which step the run is saved next, once `done` have been taken."""
        return done - done % self.every + self.every

    def write(
        self,
        identity: Identity,
        progress: Progress,
        history: PyTree[Array],
        place: Any = None,
    ) -> None:
        """Saves the run, and the `place` where its batches from outside are."""
        saved, header = self.contents(identity, progress, history, place)
        real = pathlib.Path(os.path.realpath(self.path))
        # A file that was removed is written anew.
        if _token(real) not in (None, self._known):
            raise self._of_two_runs()
        try:
            write(self.path, saved, header)
        except FileNotFoundError as error:
            # What is unfinished is removed when another run starts.
            if real.parent.is_dir():
                raise self._of_two_runs() from error
            raise
        self._known = _token(real)

    def contents(
        self, identity: Identity, progress: Progress, history: PyTree, place: Any
    ) -> tuple[PyTree, dict[str, Any]]:
        """What is saved of a run, and its header."""
        entries = jtu.tree_leaves(history)
        header = {
            "run": identity,
            "done": int(progress.num_steps),
            "saved": len(entries[0]) if len(entries) > 0 else 0,
            "place": place,
        }
        return _Saved(progress, history), header

    def _of_two_runs(self) -> FileExistsError:
        return FileExistsError(
            f"`solve(checkpoint={str(self.path)!r})`: another run has written this file "
            "while this one was running, and one of them would undo what the other has "
            "saved. Give each run a file of its own. This run ends here, and the file is "
            "that of the other one."
        )

    def read(
        self, identity: Identity, num_steps: int, progress: Progress, entry: PyTree
    ) -> tuple[Progress, PyTree[Array], Any]:
        """The progress, the history so far and the place of a run that is to have
        `num_steps`, given the shapes of the progress and of an entry."""

        def like(header):
            if "run" not in header:
                raise ValueError(
                    f"`{self.path}` was written by `bilevel_eqx.save`, and is no "
                    "checkpoint. Give another name, or pass the state that it holds "
                    "(`bilevel_eqx.load`) as `solve(state=...)`."
                )
            changed = changes(header["run"], identity)
            if len(changed) > 0:
                raise ValueError(
                    f"`{self.path}` is the checkpoint of another run: "
                    f"{'; '.join(changed)}. Remove it to start anew, or give another "
                    "name."
                )
            done = _field(self.path, header, "done", int)
            if done > num_steps:
                raise ValueError(
                    f"`solve(num_steps={num_steps})`: the run in `{self.path}` has taken "
                    f"{done} steps already. Ask for at least as many, or give another "
                    "name to start anew."
                )
            saved = _field(self.path, header, "saved", int)
            history = jtu.tree_map(
                lambda e: jax.ShapeDtypeStruct((saved, *e.shape), e.dtype), entry
            )
            return _Saved(progress, history)

        saved, header = self._read(like)
        if int(saved.end.num_steps) != header["done"]:
            raise _damaged(self.path, "its header and its arrays disagree")
        return saved.end, saved.history, header.get("place")

    def _read(self, like: Callable[[dict[str, Any]], T]) -> tuple[T, dict[str, Any]]:
        self._known = _token(pathlib.Path(os.path.realpath(self.path)))
        return read(self.path, like)


def check_folder(path: pathlib.Path, call: str) -> None:
    """Refuses a checkpoint whose folder does not exist. `call` is what the user wrote."""
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"{call}: there is no folder `{path.parent}`. Create it first."
        )


def _token(path: pathlib.Path) -> tuple | None:
    """What tells a file from the one that replaces it; `None` if there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def _damaged(path: Any, how: str) -> ValueError:
    return ValueError(
        f"`{path}` is damaged: {how}. Use an earlier copy of it, or remove it to start "
        "anew."
    )


def _unfinished(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}{_UNFINISHED}")


def _left_by_a_kill(path: pathlib.Path) -> list[pathlib.Path]:
    """What is left of a file that was being written. Not that of a file whose name only
    begins in the same way: another run may be writing it now."""
    name = re.compile(rf"{re.escape(path.name)}\.[0-9a-f]{{8}}{re.escape(_UNFINISHED)}")
    return [other for other in path.parent.iterdir() if name.fullmatch(other.name)]


def is_saved(leaf: Any) -> bool:
    return eqx.is_array_like(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def _bytes(tree: PyTree) -> Iterator[memoryview]:
    for leaf in filter(is_saved, jtu.tree_leaves(tree)):
        array = numbers_of(leaf)
        if array.dtype == object:
            raise ValueError(f"`save(path, state)`: the number {leaf} is too large.")
        yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _from_bytes(path: Any, data: memoryview, like: T) -> T:
    """A pytree like `like`, with the numbers that are in `data`."""
    leaves, treedef = jtu.tree_flatten(like)
    structs = [struct_of(leaf) if is_saved(leaf) else None for leaf in leaves]
    sizes = [0 if s is None else s.dtype.itemsize * math.prod(s.shape) for s in structs]
    # Before anything is allocated.
    if sum(sizes) != len(data):
        raise _damaged(
            path, f"it has {len(data)} bytes of arrays, where {sum(sizes)} belong"
        )
    ends = itertools.accumulate(sizes)
    for i, (leaf, struct, size, end) in enumerate(zip(leaves, structs, sizes, ends)):
        if struct is not None:
            array = np.frombuffer(data[end - size : end], struct.dtype)
            leaves[i] = _as(leaf, array.reshape(struct.shape))
    return jtu.tree_unflatten(treedef, leaves)


def struct_of(leaf: Any) -> Any:
    """The shape and the type of what is written of a leaf."""
    if is_key(leaf):
        return jax.eval_shape(jr.key_data, leaf)
    return leaf if hasattr(leaf, "dtype") else np.asarray(leaf)


def _as(leaf: Any, array: np.ndarray) -> Any:
    """The array, as what `leaf` is."""
    if is_key(leaf):
        return _lying_as(leaf, key_like(leaf, jnp.array(array)))
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return _lying_as(leaf, array)
    if isinstance(leaf, np.ndarray):
        return array.copy()
    return type(leaf)(array.item())


def key_like(leaf: Any, numbers: Array) -> Array:
    """The key of these numbers, of the kind that `leaf`, a key or its shape, is of."""
    # Asked within a trace, where a shape will do for a key.
    found = []
    jax.eval_shape(lambda key: found.append(jr.key_impl(key)), leaf)
    return jr.wrap_key_data(numbers, impl=found[0])


def _lying_as(leaf: Any, array: Any) -> Array:
    """The array, on the devices that `leaf` is on, if it is on several."""
    sharding = leaf.sharding
    if sharding is None or len(sharding.device_set) == 1:
        return jnp.array(array)
    return jax.device_put(array, sharding)


def described(tree: PyTree) -> list[str]:
    """What a pytree looks like: a line for each array or number."""
    return [
        f"{jtu.keystr(path)}: {leaf.dtype}{list(leaf.shape)}"
        if hasattr(leaf, "dtype")
        else f"{jtu.keystr(path)}: {type(leaf).__name__}"
        for path, leaf in jtu.tree_leaves_with_path(tree)
        if is_saved(leaf)
    ]


def compare(path, found: list[str], expected: list[str]) -> None:
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
