"""Saving and loading a state, in a file or in a folder of several processes."""

import os
import pathlib
from typing import TypeVar

from jaxtyping import PyTree

from .._mesh import spans_processes
from .checkpoint import read, write
from .shared_checkpoint import last_number, read_shared, write_shared


T = TypeVar("T")


def save(path: str | os.PathLike, state: PyTree) -> None:
    """Saves the state of a run, or any pytree of arrays.

    The file is whole or it is not there: it is written under another name beside `path`,
    flushed to the disk, and then renamed. A kill in the middle of that leaves the
    previous file as it was.

    If some of the arrays lie on devices of several processes, `path` is a folder that all
    of them share, all of them must call this, and `orbax-checkpoint` must be installed.

    **Arguments:**

    - `path`: the file. It is replaced if there is one; its folder must exist.
    - `state`: for instance the `state` of a [`bilevel_eqx.Solution`][]. Its arrays and
        numbers are saved, random keys among them; what else it holds is not.

    **Raises:**

    An `OSError` if the file cannot be written, and a `ValueError` for a `state` whose
    values are not known, under `jax.jit` or `jax.vmap`, or with an integer of more than
    64 bits.
    """
    if not spans_processes(state):
        write(path, state, {})
        return
    folder = pathlib.Path(os.path.realpath(path))
    last = last_number(folder)
    write_shared(folder, state, {}, 0 if last is None else last + 1)


def load(path: str | os.PathLike, like: T) -> T:
    """Loads what [`bilevel_eqx.save`][] has saved.

    **Arguments:**

    - `path`: the file.
    - `like`: a pytree of the same structure, whose arrays are replaced by those of the
        file; for instance the state of a run of one step. What is on several devices
        there is put on them in the same way.

    **Returns:**

    A pytree like `like`.

    **Raises:**

    A `ValueError` with a sentence if the file was written by another version, is of
    another structure, is no such file, or is damaged, which its checksum shows. A
    `FileNotFoundError` if there is none.

    !!! Example

        ```python
        blx.save("run.blx", solution.state)
        start = blx.solve(problem, blx.WarmStart(), x0, y0, num_steps=1)
        state = blx.load("run.blx", like=start.state)
        more = blx.solve(problem, blx.WarmStart(), x0, y0, num_steps=100, state=state)
        ```
    """
    folder = pathlib.Path(os.path.realpath(path))
    if folder.is_dir():
        return read_shared(folder, lambda header: like)[0]
    return read(path, lambda header: like)[0]
