"""How the benchmarks are timed, and how they report.

The machine may be shared and its clock may drift, so no two times are compared that were
not taken next to each other: in each round every contender runs once, in an order that
is rotated from round to round, and what is reported is the median over the rounds of the
ratios within a round. Compilation is timed apart, by the first call.

On a CPU that others use heavily not even that is enough. `--shared` then counts the
processor time that the process was given, on one core, instead of the time on the wall.
"""

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bilevel_eqx as blx
from bilevel_eqx._text import aligned


def parse_arguments(
    description: str | None,
    rounds: int,
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> argparse.Namespace:
    """The options that all benchmarks share, and those that `add_options` adds. Call this
    before anything runs in JAX.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument(
        "--rounds",
        type=int,
        help=f"how often everything is timed (by default {rounds}; 3 if --quick)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="smaller problems, to see that it runs"
    )
    parser.add_argument(
        "--shared",
        action="store_true",
        help="for a CPU shared with others: processor time, on one core (Linux only)",
    )
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    add_options(parser)
    args = parser.parse_args()
    if args.rounds is None:
        args.rounds = 3 if args.quick else rounds
    if args.rounds < 1:
        parser.error("--rounds must be at least 1.")
    if args.shared and args.device == "gpu":
        parser.error("--shared is for the CPU.")
    # Both have to be said before JAX starts its backend.
    if args.shared:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    # With the CPU beside a GPU, since JAX hands it the arguments of callbacks.
    jax.config.update("jax_platforms", {"cpu": "cpu", "gpu": "cuda,cpu"}[args.device])
    return args


def compare(
    contenders: Mapping[str, Callable[[], Any]],
    args: argparse.Namespace,
    baseline: str,
    *,
    rounds: int | None = None,
    quotient: Callable[[float, float], float] = lambda time, base: time / base,
    shares: Mapping[str, float] | None = None,
    deadline: float = math.inf,
    tolerant: bool = False,
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Times the contenders against each other.

    **Arguments:**

    - `contenders`: from names to functions without arguments, whose values are waited
        for.
    - `args`: what `parse_arguments` returned.
    - `baseline`: the name of the contender that the others are compared with.
    - `rounds`: how many rounds there are, if not `args.rounds`.
    - `quotient`: what the ratio is, of a contender's time and the baseline's.
    - `shares`: from the names of contenders that do only a part of the work, because the
        whole would take too long, to that part. Their times are those of the whole.
    - `deadline`: by `time.monotonic()`, when no further round and no first call is
        begun. There is at least one round.
    - `tolerant`: whether a contender that fails, or whose turn does not come before the
        deadline, is a row that says so, or raises its error.

    **Returns:**

    For each name the figures `ratio`, `smallest_ratio` and `largest_ratio` (the median
    and the extremes over the rounds), `seconds` (the median) and `compile_seconds` (what
    the first call took beyond that median), or else `failed`, a sentence; and for each
    name that has not failed the value of its first call.
    """
    clock = time.process_time if args.shared else time.perf_counter
    shares = shares or {}
    first: dict[str, float] = {}
    values: dict[str, Any] = {}
    failures: dict[str, str] = {}
    for name, run in contenders.items():
        try:
            if time.monotonic() > deadline:
                raise TimeoutError("no time was left")
            first[name], values[name] = _timed(run, clock)
            # Once more, for caches and the allocator.
            _timed(run, clock)
        except Exception as error:
            if not tolerant:
                raise
            values.pop(name, None)
            failures[name] = failure(error)

    names = list(values)
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(args.rounds if rounds is None else rounds):
        if i > 0 and time.monotonic() > deadline:
            break
        shift = i % max(1, len(names))
        for name in names[shift:] + names[:shift]:
            seconds, _ = _timed(contenders[name], clock)
            times[name].append(seconds / shares.get(name, 1))

    figures: dict[str, dict[str, Any]] = {}
    for name in contenders:
        if name in failures:
            figures[name] = {"failed": failures[name]}
            continue
        seconds = statistics.median(times[name])
        figures[name] = {
            "seconds": seconds,
            "compile_seconds": max(0.0, first[name] - shares.get(name, 1) * seconds),
        }
        if baseline in times:
            ratios = [quotient(t, base) for t, base in zip(times[name], times[baseline])]
            figures[name] = {
                "ratio": statistics.median(ratios),
                "smallest_ratio": min(ratios),
                "largest_ratio": max(ratios),
                **figures[name],
            }
    return figures, values


def failure(error: Exception) -> str:
    """What a row says of a contender that has failed."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__


def _timed(run: Callable[[], Any], clock: Callable[[], float]) -> tuple[float, Any]:
    start = clock()
    value = jax.block_until_ready(run())
    return clock() - start, value


class Jitted:
    """`jax.jit(fn)(*args)`, without arguments, and with what the compiler says of it.

    It is compiled by the first call, in the precision that is set by then, and with these
    options of XLA.
    """

    def __init__(self, fn: Callable, *args: Any, options: dict[str, Any] | None = None):
        self._fn = fn
        self._args = args
        self._options = options
        self._program: Any = None

    def __call__(self) -> Any:
        return self.program(*self._args)

    @property
    def program(self) -> Any:
        """The compiled program."""
        if self._program is None:
            lowered = jax.jit(self._fn).lower(*self._args)
            self._program = lowered.compile(compiler_options=self._options)
        return self._program

    def with_options(self, options: dict[str, Any]) -> "Jitted":
        """The same, to be compiled with these options of XLA."""
        return Jitted(self._fn, *self._args, options=options)

    def in_float64(self) -> Any:
        """The value of the same function, computed in float64."""
        with jax.enable_x64(True):
            args = jax.tree.map(_as_float64, self._args)
            return jax.block_until_ready(jax.jit(self._fn)(*args))

    @property
    def temporary_mebibytes(self) -> float | None:
        """Its temporary memory, where the compiler says."""
        size = getattr(self.program.memory_analysis(), "temp_size_in_bytes", None)
        return None if size is None else size / 2**20


def _as_float64(leaf: Any) -> Any:
    is_real = jnp.issubdtype(leaf.dtype, jnp.floating)
    return leaf.astype(jnp.float64) if is_real else leaf


def relative_difference(a: Any, b: Any) -> float:
    """The norm of `a - b` over that of `b`, for two pytrees."""
    doubles = [
        [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
        for tree in (a, b)
    ]
    leaves = list(zip(*doubles, strict=True))
    difference = sum(float(((u - v) ** 2).sum()) for u, v in leaves)
    return (difference / sum(float((v**2).sum()) for _, v in leaves)) ** 0.5


def print_table(title: str, figures: dict[str, dict[str, Any]]) -> None:
    """A row for each contender and a column for each figure."""
    print(f"\n{title}", *aligned(_rows(figures)), sep="\n", flush=True)


def markdown_table(title: str, figures: dict[str, dict[str, Any]]) -> str:
    """The same, in Markdown."""
    header, *rows = _rows(figures)
    lines = [header, ["---"] * len(header), *rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"**{title}**\n\n{text}\n"


def _rows(figures: dict[str, dict[str, Any]]) -> list[list[str]]:
    columns = list(dict.fromkeys(key for row in figures.values() for key in row))
    rows = [
        [name, *(_text(row.get(key)) for key in columns)] for name, row in figures.items()
    ]
    return [["", *columns], *rows]


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if value < 0.01 or value >= 1000 else f"{value:.3f}"
    return "" if value is None else str(value)


def write(
    args: argparse.Namespace,
    figures: dict[str, Any],
    clock: str | None = None,
    **further: Any,
) -> None:
    """Writes the figures, and what they were measured on, if `--output` is given.

    `clock` is what was timed with, where that is not what `--shared` says. What is
    `further` is written beside the figures.
    """
    if args.output is None:
        return
    device = jax.devices()[0]
    record = {
        "device": {"platform": device.platform, "kind": device.device_kind},
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "bilevel_eqx": blx.__version__,
        },
        "clock": clock or ("processor, one core" if args.shared else "wall"),
        "rounds": args.rounds,
        "quick": args.quick,
        **further,
        # Rounded, in the order in which they were printed.
        "figures": json.loads(json.dumps(figures), parse_float=_rounded),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record, indent=2) + "\n")


def _rounded(text: str) -> float:
    return float(f"{float(text):.4g}")
