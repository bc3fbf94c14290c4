"""All of the tables on one GPU, in one run of less than eight minutes.

The problems A to E at the size of the CPU's tables, where a GPU mostly waits for the next
operation, and at one that fills it; the same in PyTorch, if it is installed. Then what
explains these: ceilings of the card and how near a Hessian-vector product comes to them,
how many operations a step of `solve` starts, and what a certificate spends on
decompositions of matrices.

Matrix products are in float32, not TF32, but where a row says otherwise. Errors are
relative to the same algorithm in float64; in E to the exact answer. Sections come in the
order of their importance, each has a share of the time, and what there was no time for is
a row that says so. With `--output FILE.json` all is written after each table, there and
as Markdown in `FILE.md`.
"""

import argparse
import contextlib
import functools as ft
import gc
import importlib
import importlib.util
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import _programs
import _timing
import compile_cost
import hypergradient
import jax
import jax.numpy as jnp
import jax.random as jr
import minimum_norm
import numpy as np
import optax
import stochastic
import unroll
import warm_start
from _problems import penalised_network, penalised_regression

import bilevel_eqx as blx
from bilevel_eqx._compat import LOOPS_IN_GRAPHS


Rows = dict[str, dict[str, Any]]


class Report:
    """The tables so far, and how much time is left."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.end = self.deadline = time.monotonic() + 60 * args.minutes
        # Those of the programs that `solve` and `certify` compile out of sight.
        self.written = _programs.Written("certify|segment")
        self.torch, self.no_torch = _peer()
        self.ceilings: dict[str, float] = {}
        self.section = ""
        self._tables: dict[str, Rows] = {}
        self._seconds: dict[str, float] = {}
        self._memory: dict[str, float] = {}

    @property
    def quick(self) -> bool:
        return self.args.quick

    def compare(self, contenders, baseline, **options) -> tuple[Rows, dict[str, Any]]:
        return _timing.compare(
            contenders,
            self.args,
            baseline,
            deadline=self.deadline,
            # A failure of ours should not cost the other tables, but CI has to notice it.
            tolerant=not self.quick,
            **options,
        )

    def run(self, name: str, seconds: float, measure: Callable[["Report"], None]) -> None:
        """A section, which may take so many seconds."""
        began = time.monotonic()
        self.section = name
        # A short run is to reach the end of everything, on however slow a machine.
        self.deadline = math.inf if self.quick else min(began + seconds, self.end)
        if self.end - began < 5 and not self.quick:
            self._add("not run", {name: {"failed": "no time was left"}})
            return
        try:
            measure(self)
        except Exception as error:
            if self.quick:
                raise
            self._add("broken off", {name: {"failed": _timing.failure(error)}})
        self._seconds[name] = time.monotonic() - began
        stats = jax.devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in stats:
            self._memory[name] = stats["peak_bytes_in_use"] / 2**20
        self._write()
        # The programs and the problems of a section are not for the next.
        jax.clear_caches()
        gc.collect()

    def read(self, text: str | None) -> _programs.Loop | None:
        """The loops of an optimised program, if there is one."""
        if text is None:
            return None
        try:
            return _programs.read_program(text)
        except Exception as error:
            # XLA may change the text at any time. That should not cost the times.
            if self.quick:
                raise
            print("A program could not be read:", _timing.failure(error), flush=True)
            return None

    @contextlib.contextmanager
    def table(self, title: str) -> Iterator[Rows]:
        """The rows of a table, to be filled in. If that breaks off, what there is of it
        counts."""
        rows: Rows = {}
        try:
            yield rows
        except Exception as error:
            if self.quick:
                raise
            rows["the rest"] = {"failed": _timing.failure(error)}
        self._add(title, rows)

    def _add(self, title: str, rows: Rows) -> None:
        title = f"{self.section}: {title}"
        _timing.print_table(title, rows)
        self._tables[title] = rows
        self._write()

    def _write(self) -> None:
        output = self.args.output
        _timing.write(
            self.args,
            self._tables,
            precision="float32, matrix products 'highest'",
            torch=None if self.torch is None else self.torch.torch.__version__,
            section_seconds={k: round(v, 1) for k, v in self._seconds.items()},
            device_peak_mebibytes={k: round(v) for k, v in self._memory.items()},
        )
        if output is not None:
            tables = [_timing.markdown_table(*table) for table in self._tables.items()]
            device = f"{jax.devices()[0].device_kind}, JAX {jax.__version__}"
            text = "\n".join([f"# {device}\n", *tables])
            output.with_suffix(".md").write_text(text)


def _peer() -> tuple[Any, str]:
    """The contenders in PyTorch; or `None`, and why not."""
    if importlib.util.find_spec("torch") is None:
        return None, "PyTorch is not installed"
    try:
        module = importlib.import_module("_torch")
        module.use_float32()
    except Exception as error:
        return None, _timing.failure(error)
    return module, ""


def _with_torch(report: Report, rows: Rows, names: list[str], contenders) -> None:
    """Completes the rows of PyTorch: its memory, or that it is missing."""
    for name in names:
        if report.torch is None:
            rows[name] = {"failed": report.no_torch}
        elif "failed" not in rows[name]:
            rows[name]["temporary_mebibytes"] = contenders[name].temporary_mebibytes()


def _program_figures(
    program: _programs.Loop | None, depth: int = 1, unknown_length: int = 1
) -> dict[str, Any]:
    """How many operations a program starts outside of its loops, and at each step of the
    loop in question, which is so many loops deep. Loops within a step whose length is not
    in the program are presumed to have the given one.
    """
    if program is None:
        return {}
    chain = program.chain
    depth = min(depth, len(chain) - 1)
    figures = {
        "operations_around": sum(u.operations for u in chain[:depth]),
        "operations_a_step": chain[depth].total(unknown_length),
        # Of this loop, of those around it, or of those within it.
        "asks_the_host": _asks(chain[1:]),
        "branches_a_step": chain[depth].branches_anywhere,
    }
    if program.callbacks_anywhere > 0:
        figures["callbacks"] = program.callbacks_anywhere
    return figures


def _asks(loops) -> str:
    """Whether the host is asked at each step of any of these whether to go on."""
    return "yes" if any(loop.length is None for loop in loops) else "no"


def _jitted_figures(report: Report, run: _timing.Jitted) -> dict[str, Any]:
    figures = _program_figures(report.read(run.program.as_text()))
    return {"temporary_mebibytes": run.temporary_mebibytes, **figures}


#
# The card
#


_PRECISIONS = {
    "float32": "highest",
    "TF32": "tensorfloat32",
    "bfloat16": "BF16_BF16_F32",
}


def _precisions(report: Report) -> dict[str, str]:
    # A CPU has one precision for all of these, or none.
    return {"float32": "highest"} if report.args.device == "cpu" else _PRECISIONS


def measure_ceilings(report: Report) -> None:
    """Large products of matrices, and a large copy."""
    size, length = (256, 2**18) if report.quick else (8192, 2**28)
    a, b = (jr.normal(key, (size, size)) for key in jr.split(jr.key(0)))
    title = f"products of size {size}, and a copy of {4 * length // 2**20} MiB"
    with report.table(title) as rows:
        for name, precision in _precisions(report).items():
            with jax.default_matmul_precision(precision):
                product = _timing.Jitted(jnp.matmul, a, b)
                figures, _ = report.compare({name: product}, name)
            if "seconds" in figures[name]:
                report.ceilings[name] = 2 * size**3 / figures[name]["seconds"]
                rows[name] = {"teraflops": report.ceilings[name] / 1e12}
            else:
                rows[name] = figures[name]
        vector = jr.normal(jr.key(1), (length,))
        copy = _timing.Jitted(lambda u: u + 1, vector)
        figures, _ = report.compare({"copy": copy}, "copy")
        report.ceilings["copy"] = 8 * length / figures["copy"]["seconds"]
        rows["copy"] = {"gigabytes_a_second": report.ceilings["copy"] / 1e9}
        tiny = _timing.Jitted(lambda u: u + 1, jnp.zeros(8))
        figures, _ = report.compare({"call": tiny}, "call")
        rows["a call of the smallest program"] = {
            "microseconds": 1e6 * figures["call"]["seconds"]
        }


#
# A and B
#


# In A samples and features; in B samples, widths of layers and steps of training.
_A = {"CPU size": (20_000, 500), "large": (1_000_000, 1_000)}


_B = {
    "CPU size": (256, (784, 256, 256, 10), 300),
    "large": (8_192, (784, 2_048, 2_048, 10), 300),
}


def _regressions(quick: bool) -> dict[str, Callable]:
    dimensions = {"tiny": (400, 20)} if quick else _A
    return {
        f"{name}, {n} x {d}": ft.partial(penalised_regression, jr.key(0), n, d)
        for name, (n, d) in dimensions.items()
    }


def _networks(quick: bool) -> dict[str, Callable]:
    dimensions = {"tiny": (32, (20, 16, 4), 1_000)} if quick else _B
    return {
        f"{name}, {n} samples, {'-'.join(map(str, sizes))}": ft.partial(
            penalised_network, jr.key(1), n, sizes, num_steps=num_steps
        )
        for name, (n, sizes, num_steps) in dimensions.items()
    }


def measure_hypergradients(report: Report, instances, num_steps: int) -> None:
    solve = ft.partial(hypergradient.conjugate_gradients, num_steps=num_steps)
    linear_solver = blx.TruncatedCG(num_steps)
    response = blx.Implicit(None, linear_solver)

    def within_jit(problem, x, y):
        return blx.hypergradient(problem, x, y, response, throw=False).gradient

    for name, make in instances.items():
        problem, x, y = make()
        contenders: dict[str, Any] = hypergradient.contenders(
            problem, x, y, linear_solver, solve
        )
        # Blocks are for the cache of a CPU.
        contenders.pop("in blocks", None)
        if not report.quick:
            contenders["ours, within jit"] = _timing.Jitted(within_jit, problem, x, y)
        if report.torch is not None:
            contenders["torch"] = report.torch.hypergradient(problem, x, y, num_steps)
        with report.table(f"{name}, CG-{num_steps}") as rows:
            figures, values = report.compare(contenders, "bare")
            rows |= figures
            if "ours" in values:
                # Fewer if it has converged, or has met negative curvature.
                rows["ours"]["steps"] = int(values["ours"].stats["linear_num_steps"])
            for row in ("bare", "ours, within jit"):
                if row in values:
                    rows[row] |= _jitted_figures(report, contenders[row])
            _with_torch(report, rows, ["torch"], contenders)
            exact = contenders["bare"].in_float64()[1]
            gradients = {
                "bare": lambda value: value[1],
                "ours": lambda value: value.gradient,
                "torch": lambda value: report.torch.as_arrays(value),
            }
            for row, value in values.items():
                gradient = gradients.get(row, lambda value: value)(value)
                rows[row]["error"] = _timing.relative_difference(
                    jax.tree.leaves(gradient), jax.tree.leaves(exact)
                )


def measure_A(report: Report) -> None:
    measure_hypergradients(report, _regressions(report.quick), 20)


def measure_B(report: Report) -> None:
    measure_hypergradients(report, _networks(report.quick), 10)


#
# How near a Hessian-vector product is to the ceilings
#


_PRODUCTS = 20


def _products(problem, x, y):
    """Products one after the other, of one linearisation."""
    _, product = jax.linearize(lambda y: jax.grad(problem.inner, argnums=1)(x, y), y)

    def step(v, _):
        Hv = product(v)
        size = jnp.sqrt(sum(jnp.vdot(u, u) for u in jax.tree.leaves(Hv)))
        return jax.tree.map(lambda u: u / size, Hv), None

    return jax.lax.scan(step, jax.tree.map(jnp.ones_like, y), None, length=_PRODUCTS)[0]


def _least_work(problem: Any, y: Any) -> tuple[float, float]:
    """The operations of one product, and the bytes that it must move in float32."""
    leaves = jax.tree.leaves(y)
    num_weights = sum(leaf.size for leaf in leaves)
    if len(leaves) == 1:
        n, d = problem.features.shape
        # X v and X^T u; X is too large to be kept between the two.
        return 4 * n * d, 4 * (2 * n * d + 3 * n)
    n = problem.inputs.shape[0]
    first, *others = [matrix.size for matrix, _ in y]
    widths = sum(bias.size for _, bias in y)
    # In the first layer the tangent of the input is zero, and its adjoint is not needed.
    flops = 2 * n * (2 * first + 6 * sum(others))
    # v, Hv, y and x; the activations and their adjoints; the inputs, on both ways.
    numbers = 4 * num_weights + 2 * n * widths + 2 * problem.inputs.size
    return flops, 4 * numbers


def measure_roofline(report: Report) -> None:
    problems = {"A": _regressions(report.quick), "B": _networks(report.quick)}
    if report.quick:
        del problems["A"]
    for letter, instances in problems.items():
        for name, make in instances.items():
            problem, x, y = make()
            flops, moved = _least_work(problem, y)
            with report.table(f"{letter}, {name}") as rows:
                exact = None
                for precision, setting in _precisions(report).items():
                    with jax.default_matmul_precision(setting):
                        run = _timing.Jitted(_products, problem, x, y)
                        figures, values = report.compare({precision: run}, precision)
                    rows[precision] = figures[precision]
                    if precision not in values or precision not in report.ceilings:
                        continue
                    if exact is None:
                        exact = run.in_float64()
                    seconds = figures[precision]["seconds"] / _PRODUCTS
                    by_flops = flops / report.ceilings[precision]
                    by_bytes = moved / report.ceilings["copy"]
                    rows[precision] = {
                        "microseconds": 1e6 * seconds,
                        "teraflops": flops / seconds / 1e12,
                        "share_of_flops": by_flops / seconds,
                        "gigabytes_a_second": moved / seconds / 1e9,
                        "share_of_bytes": by_bytes / seconds,
                        "bound": "operations" if by_flops > by_bytes else "bytes",
                        "roofline_share": max(by_flops, by_bytes) / seconds,
                        "error": _timing.relative_difference(values[precision], exact),
                    }
                    program = _jitted_figures(report, run)
                    rows[precision]["operations_a_step"] = program.get(
                        "operations_a_step"
                    )


#
# C
#


# Samples, widths of layers, and steps.
_C = [
    ("CPU size", 256, (784, 256, 256, 10), 100),
    ("large", 2_048, (784, 1_024, 1_024, 10), 100),
    ("CPU size", 256, (784, 256, 256, 10), 1_000),
]


def measure_C(report: Report) -> None:
    cases = [("tiny", 16, (20, 8, 4), 10)] if report.quick else _C
    for name, n, sizes, num_steps in cases:
        problem, x, y = penalised_network(jr.key(0), n, sizes, num_steps=0)
        contenders: dict[str, Any] = unroll.runners(problem, x, y, num_steps)
        reference = contenders["hand adjoint"]
        if report.quick:
            del contenders["hand adjoint"], contenders["Unrolled, reverse"]
        # Eagerly 1,000 steps take too long.
        names = ["torch"] if num_steps <= 100 else []
        if report.torch is not None and names:
            contenders["torch"] = report.torch.unrolled(
                problem, x, y, num_steps, unroll.STEP_SIZE
            )
        shape = "-".join(map(str, sizes))
        with report.table(f"{name}, {n} samples, {shape}, K = {num_steps}") as rows:
            figures, values = report.compare(contenders, "plain scan")
            rows |= figures
            _with_torch(report, rows, names, contenders)
            exact = reference.in_float64()
            for row, value in values.items():
                if row == "torch":
                    assert report.torch is not None
                    value = report.torch.as_arrays(value)
                else:
                    rows[row] |= _jitted_figures(report, contenders[row])
                rows[row]["error"] = _timing.relative_difference(
                    jax.tree.leaves(value), jax.tree.leaves(exact)
                )


#
# D
#


# How much of a run PyTorch takes. Its steps are all alike.
_PART = 0.1


# What `rings` is given, whether there is an inner update, and steps.
_D = [
    ("CPU size", {"width": 200}, True, 2_000),
    ("large", {"width": 2_048, "points_per_class": 1_000}, True, 200),
    ("CPU size", {"width": 16}, True, 2_000),
]


def measure_D(report: Report) -> None:
    tiny = ("tiny", {"width": 4, "num_hidden": 1}, True, 20)
    cases = [tiny] if report.quick else _D
    for name, sizes, with_inner_update, num_steps in cases:
        (problem, x, y), contenders = warm_start.instance(
            with_inner_update, num_steps, **sizes
        )
        contenders: dict[str, Any] = contenders
        # The loops in Python take most of the time, and the CPU's tables have both.
        kept = ("bare scan", "ours") if report.quick else (*contenders,)[:3]
        contenders = {k: contenders[k] for k in kept}
        if report.torch is not None:
            contenders["torch"] = report.torch.warm_start(
                problem,
                x,
                y,
                round(_PART * num_steps),
                inner_rate=warm_start.INNER_RATE,
                outer_rate=warm_start.OUTER_RATE,
                with_inner_update=with_inner_update,
            )
        how = "with" if with_inner_update else "without"
        title = f"{name}, {sizes}, {how} an inner update, {num_steps} steps"
        with report.table(title) as rows:
            with report.written.during() as programs:
                figures, values = report.compare(
                    contenders,
                    "bare scan",
                    shares={"torch": _PART},
                    quotient=lambda time, base: base / time,
                )
            rows |= figures
            for row in values:
                rows[row]["steps_a_second"] = num_steps / rows[row]["seconds"]
            if "bare scan" in values:
                rows["bare scan"] |= _jitted_figures(report, contenders["bare scan"])
            if "ours" in values:
                program = report.read(programs.get("_segment"))
                rows["ours"] |= _program_figures(program, _STEPS)
                x, _, solution = values["ours"]

                def certify(problem=problem, solution=solution):
                    return blx.certify(problem, blx.WarmStart(), solution.x, solution.y)

                alone, _ = report.compare({"certify": certify}, "certify")
                certificate = alone["certify"].get("seconds", np.nan)
                rows["ours"]["certificate_share"] = certificate / rows["ours"]["seconds"]
                rows["ours"] |= _busy(report, contenders["ours"], rows["ours"]["seconds"])
            _with_torch(report, rows, ["torch"], contenders)
            exact, _ = contenders["bare scan"].in_float64()
            for row in values:
                # PyTorch takes fewer steps.
                if row != "torch":
                    points = values[row][0]
                    rows[row]["error"] = _timing.relative_difference(points, exact)


# How deep the loop over the steps is in a segment of `solve`: it is in one over blocks,
# each with an entry of the history, and that in one over rounds, which can be undone.
_STEPS = 3


def _busy(report: Report, run: Callable[[], Any], seconds: float) -> dict[str, Any]:
    """How many operations a GPU ran, and the share of the time for which it was busy."""
    if report.args.device == "cpu" or time.monotonic() > report.deadline:
        return {}
    try:
        trace = _programs.device_trace(run)
    except Exception as error:
        return {"trace": _timing.failure(error)}
    if not trace:
        return {"trace": "without a GPU in it"}
    return {
        "launches": trace["launches"],
        "copies_to_host": trace["copies_to_host"],
        "busy_share": trace["busy_seconds"] / seconds,
    }


def measure_graphs(report: Report) -> None:
    """The loops that only wait for the next operation, each as one CUDA graph."""
    for name, sizes, with_inner_update, num_steps in [] if report.quick else _D[:1]:
        (problem, x, y), contenders = warm_start.instance(
            with_inner_update, num_steps, **sizes
        )

        def ours(problem, x, y, num_steps=num_steps):
            return warm_start.ours(problem, x, y, num_steps, certify=False)[0]

        plain = {
            "bare scan": contenders["bare scan"],
            "ours, within jit": _timing.Jitted(ours, problem, x, y),
        }
        _compare_graphs(report, f"D, {name}, {sizes}, {num_steps} steps", plain)
    problem, x, y = next(iter(_regressions(report.quick).values()))()
    linear_solver = blx.TruncatedCG(20)
    response = blx.Implicit(None, linear_solver)
    solve = ft.partial(hypergradient.conjugate_gradients, num_steps=20)

    def gradient(problem, x, y):
        return blx.hypergradient(problem, x, y, response, throw=False).gradient

    by_hand = hypergradient.contenders(problem, x, y, linear_solver, solve)["bare"]
    plain = {
        "bare scan": by_hand,
        "ours, within jit": _timing.Jitted(gradient, problem, x, y),
    }
    _compare_graphs(report, "A, CG-20", plain)


def _compare_graphs(report: Report, title: str, plain: dict[str, Any]) -> None:
    options = LOOPS_IN_GRAPHS["gpu"]
    graphs = {f"{k}, as a graph": v.with_options(options) for k, v in plain.items()}
    with report.table(title) as rows:
        figures, values = report.compare(plain | graphs, "bare scan")
        rows |= figures
        for name in values:
            run = (plain | graphs)[name]
            rows[name] |= _busy(report, run, rows[name]["seconds"])


#
# Other pipelines
#


def _marginal(
    report: Report, run: Callable[[int], Any], few: int, many: int
) -> dict[str, Any]:
    """The time of a step, and apart from it what a run costs once."""
    contenders = {"few": lambda: run(few), "many": lambda: run(many)}
    rows, _ = report.compare(contenders, "few")
    for row in rows.values():
        if "failed" in row:
            return row
    step = (rows["many"]["seconds"] - rows["few"]["seconds"]) / (many - few)
    return {
        "milliseconds_a_step": 1e3 * step,
        "milliseconds_once": 1e3 * (rows["few"]["seconds"] - few * step),
        "compile_seconds": rows["few"]["compile_seconds"],
    }


def measure_pipelines(report: Report) -> None:
    _measure_implicit(report)
    _measure_defaults(report)


def _measure_implicit(report: Report) -> None:
    """A warm start with CG, on the networks of B, and the same as a bare scan."""
    num_steps = 5
    solve = ft.partial(hypergradient.conjugate_gradients, num_steps=num_steps)
    pipeline = blx.GradientPipeline(
        blx.Implicit(None, blx.TruncatedCG(num_steps)),
        optax.adam(warm_start.OUTER_RATE),
        inner_update=blx.Unrolled(optax.sgd(warm_start.INNER_RATE), 1),
    )

    def by_hand(problem, x, y):
        value, gradient = hypergradient.bare_hypergradient(problem, x, y, solve)
        return value, gradient, y

    init, step = warm_start.bare_run(by_hand, warm_start.unrolled_step)
    few, many = (2, 4) if report.quick else (20, 120)
    for name, make in _networks(report.quick).items():
        problem, x, y = make()

        def ours(num_steps, problem=problem, x=x, y=y):
            return blx.solve(
                problem,
                blx.WarmStart(),
                x,
                y,
                pipeline=pipeline,
                num_steps=num_steps,
                save_every=num_steps,
                certify=False,
                throw=False,
            ).value

        def bare_scan(problem, x, y, num_steps):
            carry, _ = jax.lax.scan(
                lambda carry, _: step(problem, carry),
                init(problem, x, y),
                None,
                length=num_steps,
            )
            return carry[0]

        scans = {
            n: _timing.Jitted(ft.partial(bare_scan, num_steps=n), problem, x, y)
            for n in (few, many)
        }
        with report.table(f"WarmStart, Implicit, CG-{num_steps}, B, {name}") as rows:
            rows["bare scan"] = _marginal(report, lambda n, s=scans: s[n](), few, many)
            with report.written.during() as programs:
                rows["ours"] = _marginal(report, ours, few, many)
            if "milliseconds_a_step" in rows["bare scan"]:
                rows["bare scan"] |= _jitted_figures(report, scans[many])
                bare = rows["bare scan"]["milliseconds_a_step"]
                if "milliseconds_a_step" in rows["ours"]:
                    rows["ours"]["ratio"] = rows["ours"]["milliseconds_a_step"] / bare
            program = report.read(programs.get("_segment"))
            rows["ours"] |= _program_figures(program, _STEPS, unknown_length=num_steps)


# Widths of the network of F: 337 weights, and nearly as many as are decomposed at most.
_F = [16, 28]


_EQUILIBRIA = {
    "WarmStart": blx.WarmStart(),
    "ColdStart": blx.ColdStart(),
    "Optimistic": blx.Optimistic(),
}


def _measure_defaults(report: Report) -> None:
    """What `solve` does when no pipeline is named, on the learned points of F."""
    few, many = (2, 4) if report.quick else (10, 30)
    for width in [2] if report.quick else _F[:1]:
        problem, x, y = compile_cost.make_problem(width, 6)
        num_weights = sum(leaf.size for leaf in jax.tree.leaves(y))
        with report.table(f"default pipelines, {num_weights} weights") as rows:
            for name, equilibrium in _EQUILIBRIA.items():
                if report.quick and name != "WarmStart":
                    continue

                def run(num_steps, problem=problem, x=x, y=y, equilibrium=equilibrium):
                    return blx.solve(
                        problem,
                        equilibrium,
                        x,
                        y,
                        num_steps=num_steps,
                        save_every=num_steps,
                        certify=False,
                        throw=False,
                    ).value

                with report.written.during() as programs:
                    rows[name] = _marginal(report, run, few, many)
                seconds = 1e-3 * rows[name].get("milliseconds_a_step", np.nan)
                program = report.read(programs.get("_segment"))
                rows[name] |= _program_figures(program, _STEPS)
                if program is not None:
                    rows[name]["decompositions"] = program.decompositions_anywhere
                if np.isfinite(seconds):
                    long = _busy(report, lambda run=run: run(many), np.nan)
                    if "launches" in long:
                        short = _busy(report, lambda run=run: run(few), np.nan)
                        steps = many - few
                        launched = long["launches"] - short.get("launches", 0)
                        rows[name]["launches_a_step"] = launched / steps


#
# Single loops
#


def measure_single_loops(report: Report) -> None:
    """A step of `SingleLoop` beside the same step by hand, in batches of 64."""
    if report.quick:
        cases = {"tiny": (stochastic.regression(400, 20), 20)}
    else:
        cases = {
            "logistic regression, 20,000 x 200": (
                stochastic.regression(20_000, 200),
                5_000,
            ),
            "network, 203,530 weights": (
                stochastic.network(5_000, (784, 256, 10)),
                1_000,
            ),
        }
    for name, ((problem, x, y), num_steps) in cases.items():
        contenders = stochastic.step_contenders(problem, x, y, num_steps)
        with report.table(f"{name}, {num_steps} steps") as rows:
            figures, values = report.compare(contenders, "by hand")
            rows |= figures
            for row in values:
                rows[row]["microseconds_a_step"] = 1e6 * rows[row]["seconds"] / num_steps


#
# Certificates
#


def measure_certificates(report: Report) -> None:
    for width in [2] if report.quick else _F:
        problem, x, y = compile_cost.make_problem(width, 6)
        num_weights = sum(leaf.size for leaf in jax.tree.leaves(y))
        matrix = jr.normal(jr.key(0), (num_weights, num_weights))
        matrix = matrix + matrix.T
        eigh = _timing.Jitted(lambda matrix: tuple(jnp.linalg.eigh(matrix)), matrix)
        host = np.asarray(matrix)
        contenders = {
            "eigh on the device": eigh,
            "eigh on the host": lambda host=host: np.linalg.eigh(host),
        }
        with report.table(f"{num_weights} weights, 12 outer variables") as rows:
            figures, _ = report.compare(contenders, "eigh on the device")
            for name, row in figures.items():
                rows[name] = {"second_call": row.get("seconds"), **_only_failure(row)}
            one = rows["eigh on the device"]["second_call"]
            for name, equilibrium in _EQUILIBRIA.items():
                if report.quick and name != "WarmStart":
                    continue

                def certify(problem=problem, x=x, y=y, equilibrium=equilibrium):
                    certificate = blx.certify(problem, equilibrium, x, y, y0=y)
                    return certificate.residuals

                with report.written.during() as programs:
                    figures, _ = report.compare({name: certify}, name)
                row = rows[name] = _only_failure(figures[name])
                if row:
                    continue
                seconds = figures[name]["seconds"]
                row["first_call"] = seconds + figures[name]["compile_seconds"]
                row["second_call"] = seconds
                program = report.read(programs.get("certify"))
                if program is not None:
                    count = program.decompositions_anywhere
                    row["operations"] = program.total()
                    row["asks_the_host"] = _asks(program.loops)
                    row["decompositions"] = count
                    if one is not None:
                        row["share_of_decompositions"] = count * one / seconds
                    if program.callbacks_anywhere > 0:
                        row["callbacks"] = program.callbacks_anywhere
                row |= _busy(report, certify, seconds)


def _only_failure(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key == "failed"}


#
# E
#


# Samples and weights.
_E = {"CPU size": (200, 5_000), "large": (1_000, 50_000)}


def measure_E(report: Report) -> None:
    cases = {"tiny": (10, 50)} if report.quick else _E
    for name, (num_samples, num_weights) in cases.items():
        features, targets = minimum_norm.instance(num_samples, num_weights)
        exact = minimum_norm.exact_response(features, targets)
        contenders: dict[str, Any] = minimum_norm.runners(features, targets)
        if report.quick:
            kept = ("dual Cholesky", "response_jacobian, dense")
            contenders = {k: contenders[k] for k in kept}
        elif name == "large":
            # A singular value decomposition in several passes.
            del contenders["pinv"]
        jitted = list(contenders)
        names = ["torch, dual Cholesky", "torch, QR"]
        if report.torch is not None:
            contenders |= {
                "torch, dual Cholesky": report.torch.dual_cholesky(features, targets),
                "torch, QR": report.torch.qr(features, targets),
            }
        with report.table(
            f"{name}, {num_samples} samples, {num_weights} weights"
        ) as rows:
            figures, values = report.compare(contenders, "dual Cholesky")
            rows |= figures
            for row, value in values.items():
                if row in jitted:
                    rows[row]["temporary_mebibytes"] = contenders[row].temporary_mebibytes
                else:
                    assert report.torch is not None
                    (value,) = report.torch.as_arrays(value)
                rows[row]["error"] = _timing.relative_difference(value, exact)
            _with_torch(report, rows, names, contenders)


#
# What a user gets who sets nothing
#


def measure_defaults(report: Report) -> None:
    """The precision of matrix products that JAX chooses, which is TF32 on a GPU."""
    settings = {"highest": "highest", "JAX's default": "default"}
    if report.quick:
        del settings["highest"]
    instances = {
        "A": (next(iter(_regressions(report.quick).values())), 20),
        "B": (next(iter(_networks(report.quick).values())), 10),
    }
    for letter, (make, num_steps) in instances.items():
        if report.quick:
            continue
        problem, x, y = make()
        response = blx.Implicit(None, blx.TruncatedCG(num_steps))

        def gradient(problem, x, y, response=response):
            out = blx.hypergradient(problem, x, y, response, throw=False)
            return out.gradient, out.stats["linear_residual"]

        exact = None
        with report.table(f"{letter}, hypergradients, CG-{num_steps}") as rows:
            for name, setting in settings.items():
                with jax.default_matmul_precision(setting):
                    run = _timing.Jitted(gradient, problem, x, y)
                    figures, values = report.compare({name: run}, name)
                rows[name] = {k: v for k, v in figures[name].items() if "ratio" not in k}
                if exact is None:
                    exact = run.in_float64()[0]
                if name in values:
                    found, residual = values[name]
                    rows[name]["error"] = _timing.relative_difference(found, exact)
                    rows[name]["residual"] = float(residual)
    problem, x, y = compile_cost.make_problem(2 if report.quick else 16, 6)
    with report.table("a certificate, WarmStart") as rows:
        for name, setting in settings.items():
            with jax.default_matmul_precision(setting):
                certificate = blx.certify(problem, blx.WarmStart(), x, y, y0=y)
            rows[name] = {k: float(v) for k, v in certificate.residuals.items()}
            if certificate.accuracy is not None:
                rows[name]["accuracy"] = float(certificate.accuracy)


# In the order of their importance, with the seconds that each may take.
_SECTIONS: dict[str, tuple[float, Callable[[Report], None]]] = {
    "Ceilings": (25, measure_ceilings),
    "D, a warm-start run": (90, measure_D),
    "A, logistic regression": (50, measure_A),
    "Certificates": (60, measure_certificates),
    "B, a network": (50, measure_B),
    "Loops as CUDA graphs": (50, measure_graphs),
    "Hessian-vector products": (45, measure_roofline),
    "Pipelines": (75, measure_pipelines),
    "Single loops": (30, measure_single_loops),
    "E, minimum-norm responses": (50, measure_E),
    "C, unrolling": (80, measure_C),
    "Precision": (30, measure_defaults),
}


def main(args: argparse.Namespace) -> None:
    if args.device == "cpu" and not args.quick:
        raise SystemExit("These sizes are for a GPU: say --device gpu, or --quick.")
    # To try Triton's products of matrices would take most of the time of this script.
    # The code by hand is compiled in the same way.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_enable_triton_gemm=false"
    # PyTorch needs some of the memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6")
    jax.config.update("jax_default_matmul_precision", "highest")
    # It only has to be seen to run, and most of its time is that of the compiler.
    jax.config.update("jax_disable_most_optimizations", args.quick)
    report = Report(args)
    chosen = args.only or list(_SECTIONS)
    for name in _SECTIONS:
        if name in chosen:
            report.run(name, *_SECTIONS[name])
    print(f"\n{args.minutes * 60 - (report.end - time.monotonic()):.0f} seconds in all")


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--minutes", type=float, default=7.25, help="after these nothing is begun"
    )
    parser.add_argument("--only", nargs="+", choices=list(_SECTIONS), metavar="SECTION")


if __name__ == "__main__":
    main(_timing.parse_arguments(__doc__, rounds=5, add_options=_options))
