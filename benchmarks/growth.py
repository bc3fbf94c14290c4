"""How the cost of a hypergradient grows.

With the number of weights (a network, 32 samples, CG-5), of samples (logistic regression
on 50 features, in blocks, CG-10), of steps (CG, and unrolled gradient descent with and
without memory for its iterates), and of outer variables (weights of groups of samples,
implicitly, and through 20 steps forward and backward). The slope is that of the
logarithms over the larger half of each curve: 1 is proportional. Memory is the temporary
memory of the program.

And what devices send each other: for a product with the Hessian of the regression, data
split over 1, 2 and 4 devices of one CPU, the bytes that its program sums over devices.
The samples a device are the same each time.
"""

import argparse
import re
from typing import Any

import _timing
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from _problems import (
    in_blocks,
    penalised_network,
    penalised_regression,
    PenalisedRegression,
)

import bilevel_eqx as blx


class Groups(blx.AbstractBilevelProblem):
    """Least squares with a weight for each group of samples."""

    features: jax.Array
    targets: jax.Array

    def inner(self, x, y):
        weights = jnp.repeat(jax.nn.sigmoid(x), len(self.targets) // len(x))
        squares = (self.features @ y - self.targets) ** 2
        return jnp.mean(weights * squares) + 0.5 * jnp.sum(y**2)

    def outer(self, x, y):
        return 0.5 * jnp.sum((y - 1) ** 2)


def implicit(num_steps):
    return blx.Implicit(None, blx.TruncatedCG(num_steps))


def unrolled(num_steps, mode: Any = "checkpointed", memory=None):
    return blx.Unrolled(optax.sgd(0.01), num_steps, mode, memory=memory)


def network(num_weights):
    # 110 w + w^2 of them.
    width = int((55**2 + num_weights) ** 0.5 - 55) or 1
    return penalised_network(jr.key(0), 32, (99, width, width, 10), num_steps=0)


def regression(num_samples):
    keys = jr.split(jr.key(0), 2)
    features = jr.normal(keys[0], (num_samples, 50))
    data = features, jnp.sign(features[:, 0] + jr.normal(keys[1], (num_samples,)))
    problem = PenalisedRegression(*data, *(u[:1000] for u in data))
    return in_blocks(problem), jnp.full(50, -5.0), jnp.zeros(50)


def groups(num_outer):
    features = jr.normal(jr.key(0), (2**16, 20))
    return Groups(features, features[:, 0]), jnp.zeros(num_outer), jnp.zeros(20)


def curves(quick):
    """For each picture its axis, and the programs of each curve by their size."""
    weights = 10 ** np.arange(3, 5 if quick else 8)
    samples = 10 ** np.arange(3, 5 if quick else 7)
    steps = 10 ** np.arange(1, 3 if quick else 4)
    outer = 2 ** np.arange(0, 5 if quick else 17, 4 if quick else 2)
    few = outer[outer <= 2**8]
    small = penalised_network(jr.key(0), 64, (50, 32, 10), num_steps=0)
    return {
        "weights": {"CG-5": [(n, network(n), implicit(5)) for n in weights]},
        "samples": {"CG-10": [(n, regression(n), implicit(10)) for n in samples]},
        "steps": {
            "Neumann": [
                (k, small, blx.Implicit(None, blx.Neumann(int(k), 0.01))) for k in steps
            ],
            "unrolled, all iterates": [(k, small, unrolled(int(k))) for k in steps],
            "unrolled, least memory": [
                (k, small, unrolled(int(k), memory=1)) for k in steps
            ],
        },
        "outer variables": {
            "CG-10": [(m, groups(m), implicit(10)) for m in outer],
            "unrolled": [(m, groups(m), unrolled(20)) for m in outer],
            "unrolled, forward": [(m, groups(m), unrolled(20, "forward")) for m in few],
        },
    }


def measured(curve, args):
    points = []
    for size, (problem, x, y), response in curve:
        dynamic, static = eqx.partition(problem, eqx.is_array)

        def gradient(dynamic, x, y, static=static, response=response):
            problem = eqx.combine(dynamic, static)
            return blx.hypergradient(problem, x, y, response, throw=False).gradient

        run = _timing.Jitted(gradient, dynamic, x, y)
        rows, _ = _timing.compare({"ours": run}, args, "ours")
        point = {"size": int(size), "seconds": rows["ours"]["seconds"]}
        points.append(point | {"mebibytes": run.temporary_mebibytes})
    return points


def slope(points, figure):
    half = points[(len(points) - 1) // 2 :]
    values = np.log([[p["size"], max(p[figure] or 0, 1e-9)] for p in half])
    logarithms_of_size, logarithms = values.T
    return float(np.polyfit(logarithms_of_size, logarithms, 1)[0])


def bytes_moved(quick):
    """What a product with the Hessian sums over devices, by their number."""
    rows = {}
    for count in (1, 2, 4):
        problem, x, y = penalised_regression(jr.key(0), 200 * count, 50 if quick else 500)
        mesh = jax.make_mesh((count,), ("data",), (jax.sharding.AxisType.Auto,))
        split = jax.NamedSharding(mesh, jax.P("data"))
        data = jax.device_put((problem.features, problem.signs), split)

        def product(data, x, y, problem=problem):
            where = lambda p: (p.features, p.signs)  # noqa: E731
            gradient = jax.grad(eqx.tree_at(where, problem, data).inner, argnums=1)
            return jax.jvp(lambda y: gradient(x, y), (y,), (y,))[1]

        text = jax.jit(product).lower(data, x, y).compile().as_text() or ""
        sums = re.findall(r"= (.*?) all-reduce(?:-start)?\(", text)
        shapes = re.findall(r"f32\[([\d,]*)\]", " ".join(sums))
        entries = [[int(n) for n in shape.split(",") if n] for shape in shapes]
        moved = 4 * sum(int(np.prod(shape)) for shape in entries)
        # Each device sends and gets so much of it in a ring.
        ring = 2 * (count - 1) / count * moved
        rows[f"{count} devices"] = {"summed_bytes": moved, "sent_bytes": ring}
    _timing.print_table("Bytes over devices, a product with the Hessian", rows)
    return rows


def draw(figures, path):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
    for panel, (axis, rows) in zip(axes, figures.items()):
        for name, row in rows.items():
            sizes, seconds = zip(*((p["size"], p["seconds"]) for p in row["points"]))
            label = f"{name}: slope {row['slope']:.2f}"
            panel.loglog(sizes, seconds, "o-", label=label)
        panel.set(xlabel=axis, ylabel="seconds")
        panel.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main(args: argparse.Namespace) -> None:
    figures = {}
    for axis, all_curves in curves(args.quick).items():
        figures[axis] = {}
        for name, curve in all_curves.items():
            points = measured(curve, args)
            row = {"slope": slope(points, "seconds")}
            row["memory_slope"] = slope(points, "mebibytes")
            figures[axis][name] = row | {"points": points}
        slopes = ("slope", "memory_slope")
        table = {n: {k: row[k] for k in slopes} for n, row in figures[axis].items()}
        _timing.print_table(axis, table)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        draw(figures, args.output.with_suffix(".png"))
    figures["devices"] = bytes_moved(args.quick)
    _timing.write(args, figures)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)
    main(_timing.parse_arguments(__doc__, rounds=3))
