"""Checkpoints of arrays that several processes have parts of, by `orbax-checkpoint`."""

import os
import pathlib
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree

from .._compat import of_all_processes
from .._mesh import spans_processes
from .checkpoint import (
    check_folder,
    Checkpoint,
    compare,
    described,
    is_saved,
    key_like,
    struct_of,
)
from .digest import is_key
from .identity import Identity
from .loop import Progress


T = TypeVar("T")


_STATE, _HEADER = "state", "header"


def write_shared(path: pathlib.Path, state: PyTree, header: dict, number: int) -> None:
    """Saves a state and its header in a folder. All processes must call it, and each
    writes the parts that it has. `number` must be larger than that of the last saving."""
    ocp = _orbax(path)
    header = {"leaves": described(state), **header}
    arrays = {str(i): _writable(u) for i, u in _saved(state)}
    with _manager(ocp, path) as manager:
        items = {
            _STATE: ocp.args.StandardSave(arrays),
            _HEADER: ocp.args.JsonSave(header),
        }
        manager.save(number, args=ocp.args.Composite(**items))
        # Before the run goes on: what is then saved last is what it was told.
        manager.wait_until_finished()


def read_shared(
    path: pathlib.Path, like: Callable[[dict[str, Any]], T]
) -> tuple[T, dict[str, Any]]:
    """What `write_shared` has saved, lying as `like(header)` does; and the header."""
    ocp = _orbax(path)
    number = last_number(path)
    if number is None:
        raise ValueError(
            f"`{path}` is a folder in which `bilevel_eqx.save` has saved nothing. Give "
            "another name."
        )
    with _manager(ocp, path) as manager:
        only = ocp.args.Composite(**{_HEADER: ocp.args.JsonRestore()})
        header = manager.restore(number, args=only)[_HEADER]
        expected = like(header)
        compare(path, header["leaves"], described(expected))
        wanted = {str(i): _wanted(u) for i, u in _saved(expected)}
        only = ocp.args.Composite(**{_STATE: ocp.args.StandardRestore(wanted)})
        found = manager.restore(number, args=only)[_STATE]
    leaves, treedef = jtu.tree_flatten(expected)
    for i, leaf in _saved(expected):
        leaves[i] = _as(leaf, found[str(i)])
    return jtu.tree_unflatten(treedef, leaves), header


def last_number(path: pathlib.Path) -> int | None:
    """The number of the last whole saving in a folder; `None` if there is none."""
    # Orbax renames the folder of a saving when it is whole.
    found = [int(p.name) for p in path.glob("*") if p.name.isdecimal()]
    last = max(found, default=-1)
    if len(of_all_processes(last)) > 1:
        raise ValueError(
            f"`{path}`: not all processes see the same there. A checkpoint of several "
            "processes must be in a folder that they all share, such as a network disk."
        )
    return None if last < 0 else last


class SharedCheckpoint(Checkpoint):
    """The folder of a run of several processes, which is saved in it as it goes.

    **Arguments:**

    - `path`: the folder, which all processes share. It is made if there is none.
    - `every`: how many steps lie between two savings.
    """

    def __init__(self, path: str | os.PathLike, every: int):
        self.path = pathlib.Path(os.path.realpath(path))
        self.every = every
        call = f"`solve(checkpoint={str(path)!r})`"
        _orbax(self.path)
        check_folder(self.path, call)
        if self.path.is_file():
            raise FileExistsError(
                f"{call}: that is a file, and several processes save in a folder. Give "
                "another name."
            )

    def exists(self) -> bool:
        return last_number(self.path) is not None

    def write(
        self,
        identity: Identity,
        progress: Progress,
        history: PyTree[Array],
        place: Any = None,
    ) -> None:
        saved, header = self.contents(identity, progress, history, place)
        write_shared(self.path, saved, header, header["done"])

    def _read(self, like):
        return read_shared(self.path, like)


def _orbax(path: Any) -> Any:
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise ImportError(
            f"`{path}`: what several processes have parts of is saved with "
            "`orbax-checkpoint`, which is not installed: "
            "`pip install 'bilevel_eqx[distributed]'`."
        ) from error
    return orbax.checkpoint


def _manager(ocp: Any, path: pathlib.Path) -> Any:
    # The one before is removed when the new one is whole.
    options = ocp.CheckpointManagerOptions(
        max_to_keep=1, create=True, enable_async_checkpointing=False
    )
    return ocp.CheckpointManager(path, options=options)


def _saved(tree: PyTree) -> list[tuple[int, Any]]:
    return [(i, u) for i, u in enumerate(jtu.tree_leaves(tree)) if is_saved(u)]


def _writable(leaf: Any) -> Any:
    if is_key(leaf):
        leaf = jr.key_data(leaf)
    # What each process has for itself is the same in all of them.
    return leaf if spans_processes(leaf) else np.asarray(leaf)


def _wanted(leaf: Any) -> Any:
    """What to restore a leaf as."""
    struct = struct_of(leaf)
    sharding = None
    if spans_processes(leaf):
        sharding = (jr.key_data(leaf) if is_key(leaf) else leaf).sharding
    return jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=sharding)


def _as(leaf: Any, array: Any) -> Any:
    if is_key(leaf):
        return key_like(leaf, array)
    if isinstance(leaf, np.ndarray | jax.Array | jax.ShapeDtypeStruct):
        return array
    return type(leaf)(np.asarray(array).item())
