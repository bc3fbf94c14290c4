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
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

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
    jax.config.update("jax_platforms", {"cpu": "cpu", "gpu": "cuda"}[args.device])
    return args


def compare(
    contenders: dict[str, Callable[[], Any]],
    args: argparse.Namespace,
    baseline: str,
    *,
    rounds: int | None = None,
    quotient: Callable[[float, float], float] = lambda time, base: time / base,
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Times the contenders against each other.

    **Arguments:**

    - `contenders`: from names to functions without arguments, whose values are waited
        for.
    - `args`: what `parse_arguments` returned.
    - `baseline`: the name of the contender that the others are compared with.
    - `rounds`: how many rounds there are, if not `args.rounds`.
    - `quotient`: what the ratio is, of a contender's time and the baseline's.

    **Returns:**

    For each name the figures `ratio`, `smallest_ratio` and `largest_ratio` (the median
    and the extremes over the rounds), `seconds` (the median) and `compile_seconds` (what
    the first call took beyond that median); and for each name the value of its first
    call.
    """
    clock = time.process_time if args.shared else time.perf_counter
    first, values = {}, {}
    for name, run in contenders.items():
        first[name], values[name] = _timed(run, clock)
    # Once more, for caches and the allocator.
    for run in contenders.values():
        _timed(run, clock)

    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(args.rounds if rounds is None else rounds):
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(_timed(contenders[name], clock)[0])

    figures = {}
    for name in names:
        ratios = [quotient(t, base) for t, base in zip(times[name], times[baseline])]
        seconds = statistics.median(times[name])
        figures[name] = {
            "ratio": statistics.median(ratios),
            "smallest_ratio": min(ratios),
            "largest_ratio": max(ratios),
            "seconds": seconds,
            "compile_seconds": max(0.0, first[name] - seconds),
        }
    return figures, values


def _timed(run: Callable[[], Any], clock: Callable[[], float]) -> tuple[float, Any]:
    start = clock()
    value = jax.block_until_ready(run())
    return clock() - start, value


def temporary_mebibytes(fn: Callable, *args: Any) -> float | None:
    """The temporary memory of `jax.jit(fn)(*args)`, where the compiler says."""
    analysis = jax.jit(fn).lower(*args).compile().memory_analysis()
    size = getattr(analysis, "temp_size_in_bytes", None)
    return None if size is None else size / 2**20


def relative_difference(a: Any, b: Any) -> float:
    """The norm of `a - b` over that of `b`, for two pytrees."""
    leaves = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    difference = sum(float(((u - v) ** 2).sum()) for u, v in leaves)
    return (difference / sum(float((v**2).sum()) for _, v in leaves)) ** 0.5


def print_table(title: str, figures: dict[str, dict[str, Any]]) -> None:
    """A row for each contender and a column for each figure."""
    columns = list(dict.fromkeys(key for row in figures.values() for key in row))
    rows = [
        [name, *(_text(row.get(key)) for key in columns)] for name, row in figures.items()
    ]
    print(f"\n{title}", *aligned([["", *columns], *rows]), sep="\n", flush=True)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if value < 0.01 or value >= 1000 else f"{value:.3f}"
    return "" if value is None else str(value)


def write(
    args: argparse.Namespace, figures: dict[str, Any], clock: str | None = None
) -> None:
    """Writes the figures, and what they were measured on, if `--output` is given.

    `clock` is what was timed with, where that is not what `--shared` says.
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
        # Rounded, in the order in which they were printed.
        "figures": json.loads(json.dumps(figures), parse_float=_rounded),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record, indent=2) + "\n")


def _rounded(text: str) -> float:
    return float(f"{float(text):.4g}")
