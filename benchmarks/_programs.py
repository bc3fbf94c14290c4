"""What a compiled program does at each step of its loops, and what a device then ran.

A device that is fast is idle for as long as the host, or its own front, takes to start
the next operation. So the number of operations a step of a loop matters as much as their
size. It is read from the text of the optimised program, which XLA writes on request.
"""

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax


# Those that only name or rearrange what is there, and the ends of what has been started.
_FREE = re.compile(
    r"parameter|constant|tuple|get-tuple-element|bitcast|after-all|partition-id|"
    r"replica-id|opt-barrier|while|call|conditional|.*-done|.*-update"
)


_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{")


_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?[\w.\-]+ = (.*)")


_DECOMPOSITION = re.compile(r"syev|heev|eigh|gesvd|gesdd|geqrf|potrf|cholesky", re.I)


class Loop(NamedTuple):
    """One step of a loop, without those of the loops inside it.

    The whole program counts as the one step of a loop.

    - `operations`: how many operations it starts; of a branch, the longest one.
    - `callbacks`: how many of these call the host.
    - `decompositions`: how many of these decompose a matrix.
    - `branches`: how many of these choose between branches. A GPU hands each choice to
        the host too.
    - `length`: the number of steps, if that is known beforehand. If it is not, a GPU
        hands the condition to the host at every step, and waits for its answer.
    - `loops`: those inside it.
    """

    operations: int
    callbacks: int
    decompositions: int
    branches: int
    length: int | None
    loops: tuple["Loop", ...]

    @property
    def chain(self) -> list["Loop"]:
        """This loop, the largest one inside it, the largest one inside that, ..."""
        if not self.loops:
            return [self]
        return [self, *max(self.loops, key=lambda loop: loop.total()).chain]

    def total(self, unknown_length: int = 1) -> int:
        """The operations of a step and of the loops inside it, where those of an unknown
        length have the given one."""
        inside = [
            (u.length or unknown_length) * u.total(unknown_length) for u in self.loops
        ]
        return self.operations + sum(inside)

    @property
    def decompositions_anywhere(self) -> int:
        inside = sum(u.decompositions_anywhere for u in self.loops)
        return self.decompositions + inside

    @property
    def callbacks_anywhere(self) -> int:
        return self.callbacks + sum(u.callbacks_anywhere for u in self.loops)

    @property
    def branches_anywhere(self) -> int:
        return self.branches + sum(u.branches_anywhere for u in self.loops)


def read_program(text: str) -> Loop:
    """The loops of an optimised program, given its text."""
    computations: dict[str, list[str]] = {}
    current: list[str] = []
    entry = None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header is not None:
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif (instruction := _INSTRUCTION.match(line)) is not None:
            current.append(instruction[1])
    if entry is None:
        raise ValueError("This is not the text of an optimised program.")
    return _step(computations, [entry], 1)


def _step(computations: dict[str, list[str]], names: list[str], length) -> Loop:
    operations = callbacks = decompositions = branches = 0
    loops: list[Loop] = []
    for instruction in (i for name in names for i in computations[name]):
        opcode = _opcode(instruction)
        if opcode == "while":
            inside = [_attribute(instruction, part) for part in ("body", "condition")]
            known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', instruction)
            loops.append(_step(computations, inside, int(known[1]) if known else None))
        elif opcode in ("call", "conditional"):
            parts = [_step(computations, [name], 1) for name in _called(instruction)]
            longest = max(parts, key=lambda part: part.total())
            operations += longest.operations
            branches += longest.branches + (opcode == "conditional")
            callbacks += longest.callbacks
            decompositions += longest.decompositions
            loops += longest.loops
        elif not _FREE.fullmatch(opcode):
            operations += 1
            target = re.search(r'custom_call_target="([^"]*)"', instruction)
            if target is not None:
                callbacks += "callback" in target[1]
                decompositions += _DECOMPOSITION.search(target[1]) is not None
    return Loop(operations, callbacks, decompositions, branches, length, tuple(loops))


def _opcode(instruction: str) -> str:
    """What follows the type, which may be a tuple of types."""
    depth = 0
    for i, character in enumerate(instruction):
        depth += (character in "([{") - (character in ")]}")
        if character == " " and depth == 0:
            return instruction[i + 1 :].partition("(")[0]
    raise ValueError(f"There is no operation in `{instruction}`.")


def _attribute(instruction: str, name: str) -> str:
    found = re.search(rf"\b{name}=%?([\w.\-]+)", instruction)
    assert found is not None
    return found[1]


def _called(instruction: str) -> list[str]:
    several = re.search(r"branch_computations=\{([^}]*)\}", instruction)
    if several is not None:
        return [name.strip().lstrip("%") for name in several[1].split(",")]
    names = r"(?:to_apply|true_computation|false_computation)=%?([\w.\-]+)"
    return re.findall(names, instruction)


#
# Programs that are compiled out of sight: XLA writes them to a folder
#


class Written:
    """The optimised programs that XLA writes from now on, of functions of some names.

    Create this before JAX starts its backend.
    """

    def __init__(self, names: str):
        self._folder = tempfile.TemporaryDirectory()
        flags = (
            f"--xla_dump_to={self._folder.name} --xla_dump_hlo_as_text "
            f"--xla_dump_hlo_module_re=.*({names}).*"
        )
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()

    @contextlib.contextmanager
    def during(self) -> Iterator[dict[str, str]]:
        """The texts of what is written in the meantime, by the names of the functions: of
        those of one name the longest. They are there at the end."""
        before = set(self._files())
        texts: dict[str, str] = {}
        yield texts
        for path in sorted(set(self._files()) - before):
            # As in `module_0012.jit_certify.sm_9.0_gpu_after_optimizations.txt`.
            name, text = path.name.split(".")[1].removeprefix("jit_"), path.read_text()
            texts[name] = max(text, texts.get(name, ""), key=len)

    def _files(self) -> Iterator[Path]:
        return Path(self._folder.name).glob("*after_optimizations.txt")


#
# What ran
#


def device_trace(run: Callable[[], Any]) -> dict[str, float]:
    """How many operations a GPU ran during `run`, how many of these were copies to the
    host, and the seconds for which it was busy; empty where the profiler says nothing of
    a GPU.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = 1
    options.enable_hlo_proto = False
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            jax.block_until_ready(run())
        events = [
            (event.start_ns, event.end_ns, event.name)
            for file in Path(folder).rglob("*.xplane.pb")
            for plane in jax.profiler.ProfileData.from_file(str(file)).planes
            if plane.name.startswith("/device:GPU")
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        ]
    if not events:
        return {}
    # Streams overlap. A moment is counted once.
    busy, end = 0.0, 0.0
    for start, stop, _ in sorted(events):
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return {
        "launches": len(events),
        "copies_to_host": sum("D2H" in name for _, _, name in events),
        "busy_seconds": busy / 1e9,
    }
