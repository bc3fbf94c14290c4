"""Stochastic methods on the problems of benchmark_bilevel, and what a step of ours costs.

G: quadratics, logistic regression, multiclass classification and hyper-cleaning, in that
   benchmark's shapes (the output says which data are drawn), with batches of 64.
   Each method is a call of `bilevel_eqx.solve` on a `FiniteSumProblem`. The protocol is
   theirs: the rates come from a grid, with one seed; then there are runs with other seeds
   for the batches; the figures are the median over the seeds and the band from the 20th
   to the 80th percentile.
   All methods have the same number of oracle calls: gradients, and pairs of products with
   f_yy and f_xy, of one sample each. The seconds are those of a run whose program is
   compiled already. Within a run they are taken as proportional to the steps.
   With `--peer`, a checkout of benchmark_bilevel, its own SOBA and SABA clean the same
   images.
H (`--steps`): the time of a step of `SingleLoop` (SOBA) beside the same step by hand in a
   bare `jax.lax.scan`, with the same samples. The ratio is our time over its time. With
   `--peer`, a checkout of benchmark_bilevel, also beside its own SOBA and SABA.
"""

import argparse
import functools as ft
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import _peer
import _timing
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from _stochastic_problems import cleaning, Instance, PROBLEMS

import bilevel_eqx as blx
from bilevel_eqx._problem.batches import Batches
from bilevel_eqx._problem.finite_sum import num_samples
from bilevel_eqx.pipelines import (
    Momentum,
    PenaltyDescent,
    SAGA,
    SARAH,
    SingleLoop,
    ValueFunctionDescent,
    ZerothOrder,
)


BATCH = 64
POINTS = 16


#
# The methods
#


class Rates(NamedTuple):
    """a and b, the rates of y and x, and how many steps there are."""

    y: Any
    x: Any
    num_steps: int


class Method(NamedTuple):
    """A method of the literature as a pipeline, and what a step of it asks for."""

    make: Callable[[blx.FiniteSumProblem, Rates], Any]
    calls: Callable[[blx.FiniteSumProblem], float]
    # Not `Stackelberg`, which decomposes the full inner Hessian before each run.
    equilibrium: Any = blx.WarmStart()


def _falling(rate, exponent, every=1):
    """As $k^{-p}$ in outer step k, of which each has `every` steps."""
    return lambda count: rate * (1.0 + count // every) ** -exponent


def _single_loop(schedule, **settings):
    def make(problem, rates):
        y, x = (optax.sgd(schedule(rate)) for rate in (rates.y, rates.x))
        return SingleLoop(y, y, x, inner_batch=BATCH, outer_batch=BATCH, **settings)

    return make


def _constant(rate):
    return rate


def _srba(problem, rates):
    estimator = SARAH(_period(problem))
    return _single_loop(_constant, estimator=estimator)(problem, rates)


def _period(problem):
    """In which all data are used once: half an epoch of both levels, as is theirs."""
    n, m = (num_samples(problem, level) for level in ("inner", "outer"))
    return max(1, (n + m) // (2 * BATCH))


def _srba_calls(problem):
    n, m = (num_samples(problem, level) for level in ("inner", "outer"))
    return 6 * BATCH + (2 * n + m) / _period(problem)


def _ma_soba(problem, rates):
    """All rates, and theta, as the square root of one over the number of steps."""
    size = 1 / math.sqrt(1 + rates.num_steps / 100)
    settings = {"estimator": Momentum(jnp.asarray(size))}
    return _single_loop(lambda rate: rate * size, **settings)(problem, rates)


def _f2sa(problem, rates):
    del problem
    return PenaltyDescent(
        optax.sgd(_falling(rates.y, 4 / 7, every=10)),
        optax.sgd(_falling(rates.y, 5 / 7, every=10)),
        optax.sgd(_falling(rates.x, 4 / 7)),
        inner_batch=BATCH,
        outer_batch=BATCH,
    )


def _bome(problem, rates):
    del problem
    x_rate, y_rate = rates.x, rates.y

    # x and y move together, each at a rate of its own.
    def update(updates, state, params=None):
        return (-x_rate * updates[0], -y_rate * updates[1]), state

    both = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    return ValueFunctionDescent(both, inner_batch=BATCH, outer_batch=BATCH)


def _pzobo(problem, rates):
    del problem
    y, x = optax.sgd(rates.y), optax.sgd(rates.x)
    return ZerothOrder(y, x, inner_batch=BATCH, outer_batch=BATCH)


def _root(rate):
    return _falling(rate, 1 / 2)


_ten = {"inner_steps": 10, "adjoint_steps": 10}
_cold = {**_ten, "warm_adjoint": False}


# The calls are those of the registry, for the samples of a batch.
METHODS = {
    "SOBA": Method(_single_loop(_root), lambda _: 3 * BATCH),
    "SABA": Method(_single_loop(_constant, estimator=SAGA()), lambda _: 3 * BATCH),
    "SRBA": Method(_srba, _srba_calls),
    "MA-SOBA": Method(_ma_soba, lambda _: 3 * BATCH),
    "AmIGO": Method(_single_loop(_constant, **_ten), lambda _: 23 * BATCH),
    "stocBiO": Method(_single_loop(_constant, **_cold), lambda _: 23 * BATCH),
    "F2SA": Method(_f2sa, lambda _: 33 * BATCH, blx.Optimistic()),
    "BOME": Method(_bome, lambda _: 24 * BATCH, blx.Optimistic()),
    "PZOBO": Method(_pzobo, lambda _: 111 * BATCH),
}


#
# G: the curves
#


def _record(x, y, metrics):
    return x, y


def run(instance: Instance, method: Method, rates: Rates, seed: int):
    """One run, of which `POINTS` points are recorded."""
    as_array = Rates(jnp.asarray(rates.y), jnp.asarray(rates.x), rates.num_steps)
    return blx.solve(
        instance.problem,
        method.equilibrium,
        instance.x0,
        instance.y0,
        pipeline=method.make(instance.problem, as_array),
        num_steps=rates.num_steps,
        key=jr.key(seed),
        record=_record,
        save_every=rates.num_steps // POINTS,
        certify=False,
        throw=False,
    )


def _reached(instance: Instance, solution) -> float:
    if not bool(solution.result == blx.RESULTS.successful):
        return math.inf
    value = float(instance.measure(solution.x, solution.y)[instance.metric])
    return value if math.isfinite(value) else math.inf


def best_rates(instance: Instance, method: Method, num_steps: int) -> Rates | None:
    """The pair of the grid that is best after these steps; `None` if all fail."""
    best, reached = None, math.inf
    for rate in instance.rates:
        for ratio in instance.ratios:
            pair = Rates(rate, rate / ratio, num_steps)
            value = _reached(instance, run(instance, method, pair, seed=0))
            if value < reached:
                best, reached = pair, value
    return best


def curve(instance: Instance, method: Method, rates: Rates, args) -> dict[str, Any]:
    """The metric along runs with several seeds."""
    clock = time.process_time if args.shared else time.perf_counter
    values, ends, seconds = [], [], []
    start = float(instance.measure(instance.x0, instance.y0)[instance.metric])
    for seed in range(1, args.seeds + 1):
        began = clock()
        solution = jax.block_until_ready(run(instance, method, rates, seed))
        seconds.append(clock() - began)
        xs, ys = (np.asarray(leaf) for leaf in solution.history)
        along = [instance.measure(x, y)[instance.metric] for x, y in zip(xs, ys)]
        # After a failure nothing is recorded.
        missing = [math.inf] * (POINTS - len(along))
        values.append([start, *map(float, along), *missing])
        ends.append(instance.measure(solution.x, solution.y))
    # Infinities are failures, and the rank of a run is all that counts.
    low, median, high = np.percentile(values, (20, 50, 80), axis=0, method="nearest")
    total = float(np.median(seconds))
    steps = np.arange(POINTS + 1) * (rates.num_steps // POINTS)
    further = {
        name: float(np.median([end[name] for end in ends]))
        for name in ends[0]
        if name != instance.metric
    }
    return {
        instance.metric: float(median[-1]),
        "20 %": float(low[-1]),
        "80 %": float(high[-1]),
        "steps": rates.num_steps,
        "seconds": total,
        "oracle_calls": rates.num_steps * method.calls(instance.problem),
        "a": rates.y,
        "a / b": rates.y / rates.x,
        **further,
        "curve": {
            "steps": steps.tolist(),
            "seconds": (total * steps / rates.num_steps).tolist(),
            "oracle_calls": (steps * method.calls(instance.problem)).tolist(),
            "median": median.tolist(),
            "low": low.tolist(),
            "high": high.tolist(),
        },
    }


def winners(metric: str, rows: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Who is best after all oracle calls, and who when the quickest has made its own."""
    rows = {name: row for name, row in rows.items() if "curve" in row}
    end = min(row["seconds"] for row in rows.values())

    def by_then(name):
        line = rows[name]["curve"]
        return np.interp(end, line["seconds"], line["median"])

    return {
        "at equal oracle calls": min(rows, key=lambda name: rows[name][metric]),
        f"after {end:.2g} s": min(rows, key=by_then),
    }


def compare_methods(instance: Instance, names, args) -> dict[str, Any]:
    """All methods on one problem."""
    rows = {}
    for name in names:
        method = METHODS[name]
        num_steps = args.calls / method.calls(instance.problem)
        num_steps = POINTS * max(1, round(num_steps / POINTS))
        rates = best_rates(instance, method, num_steps)
        if rates is None:
            rows[name] = {"failed": "no pair of the grid led to a finite point"}
            continue
        rows[name] = curve(instance, method, rates, args)
    shown = {
        name: {key: value for key, value in row.items() if key != "curve"}
        for name, row in rows.items()
    }
    title = f"G, {instance.title}"
    _timing.print_table(f"{title}; the data: {instance.source}", shown)
    best = winners(instance.metric, rows)
    for when, name in best.items():
        print(f"the winner {when}: {name}", flush=True)
    return {
        "source": instance.source,
        "metric": instance.metric,
        "winners": best,
        "methods": rows,
    }


def peer_on_cleaning(instance: Instance, args) -> dict[str, Any]:
    """Solvers of benchmark_bilevel on the same images, with the same grid, numbers of
    oracle calls and of seeds. Their batches are their own."""
    rows = {}
    for name in ("SOBA", "SABA"):
        num_steps = round(args.calls / METHODS[name].calls(instance.problem))
        steps = _peer.cleaning(
            args.peer,
            name.lower(),
            instance.problem,
            instance.x0,
            instance.y0,
            BATCH,
            num_steps,
        )

        def measured(rate, ratio, seed):
            figures = instance.measure(*steps(rate, ratio, seed))
            error = figures[instance.metric]
            return figures | {
                instance.metric: error if math.isfinite(error) else math.inf
            }

        grid = [(rate, ratio) for rate in instance.rates for ratio in instance.ratios]
        rate, ratio = min(grid, key=lambda at: measured(*at, 0)[instance.metric])
        ends = [measured(rate, ratio, seed) for seed in range(1, args.seeds + 1)]
        errors = [end[instance.metric] for end in ends]
        low, median, high = np.percentile(errors, (20, 50, 80), method="nearest")
        rows[f"{name} of benchmark_bilevel"] = {
            instance.metric: float(median),
            "20 %": float(low),
            "80 %": float(high),
            "steps": num_steps,
            "a": rate,
            "a / b": ratio,
            **{
                key: float(np.median([end[key] for end in ends]))
                for key in ends[0]
                if key != instance.metric
            },
        }
    _timing.print_table(f"G, {instance.title}, by benchmark_bilevel", rows)
    return rows


def draw(figures: dict[str, dict[str, Any]], path: Path, clock: str) -> None:
    """The metric against time and against oracle calls."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    from bilevel_eqx.plot._style import house_style

    with house_style():
        size = 3.1 * len(figures), 5.2
        picture, axes = plt.subplots(2, len(figures), figsize=size, squeeze=False)
        for column, (title, figure) in zip(axes.T, figures.items()):
            for ax, against in zip(column, ("seconds", "oracle_calls")):
                _draw_lines(ax, figure, against)
            column[0].set_title(title.removeprefix("G, "))
            column[0].set_xlabel(f"seconds ({clock})")
            column[1].set_xlabel("oracle calls (one sample each)")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        picture.legend(handles, labels, loc="lower center", ncols=len(labels))
        picture.tight_layout(rect=(0, 0.05, 1, 1))
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.savefig(path, dpi=110)
        plt.close(picture)


def _draw_lines(ax, figure: dict[str, Any], against: str) -> None:
    from matplotlib import rcParams
    from matplotlib.ticker import NullFormatter

    num_colours, medians = len(rcParams["axes.prop_cycle"]), []
    for i, (name, row) in enumerate(figure["methods"].items()):
        if "curve" not in row:
            continue
        # From the first recorded point on, since the axis is logarithmic.
        line = {key: np.asarray(value)[1:] for key, value in row["curve"].items()}
        band = [np.where(np.isfinite(line[k]), line[k], np.nan) for k in ("low", "high")]
        # There are more methods than colours.
        style = ("-", "--", ":")[i // num_colours]
        ax.plot(line[against], line["median"], style, color=f"C{i}", label=name)
        ax.fill_between(line[against], *band, color=f"C{i}", alpha=0.2, lw=0)
        medians.extend(line["median"][np.isfinite(line["median"])])
    ax.set_xscale("log")
    ax.xaxis.set_minor_formatter(NullFormatter())
    if max(medians) > 20 * min(medians):
        ax.set_yscale("log")
    ax.set_ylabel(figure["metric"])


#
# H: a step
#


def bare_step(problem, key, a, b):
    """A step of SOBA by hand, with the samples that `SingleLoop` draws."""
    batches = Batches(BATCH, BATCH)

    def step(carry, count):
        x, y, v = carry
        # Only the sampling is ours.
        drawn: Any = batches(problem, key, count, count)
        inner, outer = drawn.inner_batch, drawn.outer_batch

        def f(x, y):
            losses = problem.inner_losses(x, y, inner.samples, None)
            return inner.weights @ losses + problem.inner_penalty(x, y)

        def F(x, y):
            return outer.weights @ problem.outer_losses(x, y, outer.samples, None)

        slopes, products = jax.jvp(
            lambda y: jax.grad(f, argnums=(0, 1))(x, y), (y,), (v,)
        )
        F_x, F_y = jax.grad(F, argnums=(0, 1))(x, y)

        def move(rate, at, *directions):
            return jax.tree.map(lambda u, *d: u - rate * sum(d), at, *directions)

        x = move(b, x, products[0], F_x)
        return (x, move(a, y, slopes[1]), move(a, v, products[1], F_y)), None

    return step


def _whole_call(problem, x, y, pipeline, num_steps):
    def run():
        solution = blx.solve(
            problem,
            blx.WarmStart(),
            x,
            y,
            pipeline=pipeline,
            num_steps=num_steps,
            save_every=num_steps,
            key=jr.key(1),
            certify=False,
        )
        return solution.x, solution.y

    return run


def step_contenders(problem, x, y, num_steps):
    """The step by hand and ours, each in a bare scan, and the whole of `solve`."""
    key, a, b = jr.key(1), 0.1, 0.1
    counts = jnp.arange(num_steps, dtype=jnp.int32)
    y_step, x_step = optax.sgd(a), optax.sgd(b)
    pipeline = SingleLoop(y_step, y_step, x_step, inner_batch=BATCH, outer_batch=BATCH)

    def by_hand(problem, x, y):
        v = jax.tree.map(jnp.zeros_like, y)
        step = bare_step(problem, key, a, b)
        (x, y, _), _ = jax.lax.scan(step, (x, y, v), counts)
        return x, y

    def in_a_scan(problem, x, y):
        state = pipeline.init(problem, blx.WarmStart(), x, y, key)
        arrays, rest = eqx.partition(state, eqx.is_array)

        def step(arrays, _):
            whole = eqx.combine(arrays, rest)
            new, _ = pipeline.step(problem, blx.WarmStart(), whole)
            return eqx.filter(new, eqx.is_array), None

        arrays, _ = jax.lax.scan(step, arrays, None, length=num_steps)
        end = eqx.combine(arrays, rest)
        return end.x, end.y

    def jitted(fn):
        arrays, rest = eqx.partition(problem, eqx.is_array)
        return _timing.Jitted(
            lambda arrays, x, y: fn(eqx.combine(arrays, rest), x, y), arrays, x, y
        )

    return {
        "by hand": jitted(by_hand),
        "SingleLoop.step in a scan": jitted(in_a_scan),
        "solve, the whole call": _whole_call(problem, x, y, pipeline, num_steps),
    }


def _logistic_losses(x, y, batch, key):
    features, signs = batch
    return jax.nn.softplus(-signs * (features @ y))


def _network_losses(x, y, batch, key):
    inputs, labels = batch
    for matrix, bias in y[:-1]:
        inputs = jax.nn.relu(inputs @ matrix + bias)
    matrix, bias = y[-1]
    logits = inputs @ matrix + bias
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def _penalty_a_weight(x, y):
    squares = jax.tree.map(lambda u, v: jnp.sum(jnp.exp(u) * v**2), x, y)
    return 0.5 * sum(jax.tree.leaves(squares))


def _problem(losses, truth, size, label, rng, shuffled=False):
    """Training and validation data with labels by a true map, and a log-penalty for each
    weight. The samples are independent, and so in a random order."""

    def draw(size):
        inputs = np.asarray(rng.normal(size=(size, len(truth))), np.float32)
        return inputs, label(inputs @ truth)

    train, validation = draw(size), draw(size // 4)
    return blx.FiniteSumProblem(
        losses,
        losses,
        validation,
        train,
        inner_penalty=_penalty_a_weight,
        shuffled=shuffled,
    )


def regression(size, dim, shuffled=False):
    """Logistic regression, and where its runs begin."""
    rng = np.random.default_rng(0)
    truth = np.asarray(rng.normal(size=dim), np.float32)
    problem = _problem(_logistic_losses, truth, size, np.sign, rng, shuffled)
    return problem, jnp.full(dim, -7.0), jnp.zeros(dim)


def network(size, widths):
    """A network, and where its runs begin."""
    rng = np.random.default_rng(1)
    truth = np.asarray(rng.normal(size=(widths[0], widths[-1])), np.float32)
    problem = _problem(
        _network_losses, truth, size, lambda scores: np.argmax(scores, axis=1), rng
    )
    y = [
        (jnp.asarray(rng.normal(size=shape) * (2 / shape[0]) ** 0.5), jnp.zeros(shape[1]))
        for shape in zip(widths, widths[1:])
    ]
    return problem, jax.tree.map(lambda u: jnp.full_like(u, -7.0), y), y


def measure_steps(args) -> dict[str, Any]:
    if args.quick:
        cases = {
            "logistic regression, 1,000 x 20": (regression(1_000, 20), 500),
        }
    else:
        cases = {
            "logistic regression, 20,000 x 200": (regression(20_000, 200), 10_000),
            "the same, batches of neighbours": (
                regression(20_000, 200, shuffled=True),
                10_000,
            ),
            "a network of 2e5 weights": (network(5_000, (784, 256, 10)), 100),
        }
    figures = {}
    for name, ((problem, x, y), num_steps) in cases.items():
        contenders = step_contenders(problem, x, y, num_steps)
        rows, values = _timing.compare(contenders, args, "by hand")
        for row, value in zip(rows.values(), values.values()):
            row["microseconds_a_step"] = 1e6 * row["seconds"] / num_steps
            row["difference"] = _timing.relative_difference(value, values["by hand"])
        title = f"H, {name}, {num_steps} steps with batches of {BATCH}"
        _timing.print_table(title, rows)
        figures[title] = rows
    return figures


def measure_peer(args) -> dict[str, Any]:
    """Whole calls of ours beside its programs, of which the ratio is to its time."""
    num_steps, rate = 5_000, 0.1
    problem, x, y = regression(20_000, 200)
    shuffled, *_ = regression(20_000, 200, shuffled=True)
    figures = {}
    for name in ("SOBA", "SABA"):
        steps = _peer.regression(args.peer, name.lower(), problem, x, y, BATCH, num_steps)
        theirs = ft.partial(steps, rate, 1.0)
        pair = Rates(jnp.asarray(rate), jnp.asarray(rate), num_steps)
        pipeline = METHODS[name].make(problem, pair)
        contenders = {
            "benchmark_bilevel": theirs,
            "ours": _whole_call(problem, x, y, pipeline, num_steps),
            "ours, batches of neighbours as theirs": _whole_call(
                shuffled, x, y, pipeline, num_steps
            ),
        }
        rows, _ = _timing.compare(contenders, args, "benchmark_bilevel")
        for row in rows.values():
            row["microseconds_a_step"] = 1e6 * row["seconds"] / num_steps
        title = f"H, {name}, logistic regression, 20,000 x 200, {num_steps} steps"
        _timing.print_table(title, rows)
        figures[title] = rows
    return figures


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, help="by default 10; 2 if --quick")
    parser.add_argument(
        "--calls", type=float, help="oracle calls a run, by default 2e6; 5e4 if --quick"
    )
    parser.add_argument("--steps", action="store_true", help="H, and not G")
    parser.add_argument("--peer", type=Path, help="a checkout of benchmark_bilevel")
    parser.add_argument("--figure", type=Path, help="a PNG file for the curves of G")


def main(args: argparse.Namespace) -> None:
    args.seeds = args.seeds or (2 if args.quick else 10)
    args.calls = args.calls or (5e4 if args.quick else 2e6)
    figures: dict[str, Any] = {}
    if not args.steps:
        for i, make in enumerate(PROBLEMS):
            instance = make(args.quick)
            # To compile a method takes longer than such a short run of it.
            names = list(METHODS)[i :: len(PROBLEMS)] if args.quick else list(METHODS)
            figures[f"G, {instance.title}"] = compare_methods(instance, names, args)
            if args.peer is not None and make is cleaning:
                rows = peer_on_cleaning(instance, args)
                figures[f"G, {instance.title}"]["benchmark_bilevel"] = rows
            _write(args, figures)
        if args.figure is not None:
            draw(figures, args.figure, "processor" if args.shared else "wall")
    else:
        figures |= measure_steps(args)
        if args.peer is not None:
            figures |= measure_peer(args)
    _write(args, figures)


def _write(args: argparse.Namespace, figures: dict[str, Any]) -> None:
    _timing.write(args, _finite(figures), seeds=args.seeds, calls=args.calls)


def _finite(figures: Any) -> Any:
    """JSON has no infinity, which is what a run has reached that failed."""
    if isinstance(figures, dict):
        return {name: _finite(value) for name, value in figures.items()}
    if isinstance(figures, list):
        return [_finite(value) for value in figures]
    fails = isinstance(figures, float) and not math.isfinite(figures)
    return None if fails else figures


if __name__ == "__main__":
    main(_timing.parse_arguments(__doc__, rounds=9, add_options=_options))
