"""What a user waits for before the first answer: tracing and compiling.

A network of width W is trained on n learned points, which are the outer variables. For
each call: the length of its program, in lines of StableHLO, which does not depend on the
machine; the processor seconds to trace and to compile it; and those of a second call. The
unit of each is the same mathematics by hand: a Newton solve with the pseudoinverse of the
dense Hessian, and the hypergradient at its end.

Processor seconds are counted whatever the options say: compilers use many threads, and
others may use the machine.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import _timing
import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, PyTree

import bilevel_eqx as blx


class LearnedPoints(blx.AbstractBilevelProblem):
    """A network is trained on points x, whose labels are given; F is its error elsewhere.

    Its weights are the inner variables.
    """

    labels: Float[Array, "n 1"]
    inputs: Float[Array, "m 2"]
    truth: Float[Array, "m 1"]
    network: PyTree

    def outer(self, x, y):
        return 0.5 * jnp.mean((self.outputs(y, self.inputs) - self.truth) ** 2)

    def inner(self, x, y):
        return 0.5 * jnp.sum((self.outputs(y, x) - self.labels) ** 2)

    def outputs(self, y, inputs):
        return jax.vmap(eqx.combine(y, self.network))(inputs)


class LearnedPointsAsSquares(blx.AbstractLeastSquaresProblem):
    """The same, stated as a sum of squares."""

    plain: LearnedPoints

    def outer(self, x, y):
        return self.plain.outer(x, y)

    def inner_residual(self, x, y):
        return self.plain.outputs(y, x) - self.plain.labels


def make_problem(width: int, num_points: int):
    """The problem, stated plainly; the points; and the weights of the network."""
    network = eqx.nn.MLP(2, 1, width, 2, activation=jnp.tanh, key=jr.key(0))
    y, rest = eqx.partition(network, eqx.is_inexact_array)
    x = jr.normal(jr.key(1), (num_points, 2))
    labels = jr.normal(jr.key(2), (num_points, 1))
    inputs = jr.normal(jr.key(3), (30, 2))
    problem = LearnedPoints(labels, inputs, jnp.sin(inputs[:, :1]), rest)
    return problem, x, y


def by_hand(problem, x, y):
    """Eight Newton steps, and the hypergradient at their end."""
    flat, unravel = jax.flatten_util.ravel_pytree(y)

    def gradient(x, v):
        return jax.grad(lambda v: problem.inner(x, unravel(v)))(v)

    def solve(x, v, b):
        values, vectors = jnp.linalg.eigh(jax.jacfwd(lambda v: gradient(x, v))(v))
        keep = values > 1e-5 * values[-1]
        inverse = jnp.where(keep, 1 / jnp.where(keep, values, 1), 0)
        return vectors @ (inverse * (vectors.T @ b))

    def newton(v, _):
        return v - solve(x, v, gradient(x, v)), None

    v, _ = jax.lax.scan(newton, flat, None, length=8)
    outer_x, outer_v = jax.grad(lambda x, v: problem.outer(x, unravel(v)), (0, 1))(x, v)
    _, pullback = jax.vjp(lambda x: gradient(x, v), x)
    return outer_x - pullback(solve(x, v, outer_v))[0]


def contenders(quick: bool) -> dict[str, Callable]:
    """Functions of the problem, stated plainly, of x and of y."""
    implicit = blx.Implicit(blx.Projection(), blx.Pseudoinverse())
    inner_step = blx.Unrolled(optax.sgd(0.1), 1)
    alternating = blx.GradientPipeline(inner_step, optax.adam(0.01))

    def hypergradient(response):
        return lambda problem, x, y: blx.hypergradient(
            problem, x, y, response, throw=False
        )

    def certify(equilibrium):
        return lambda problem, x, y: blx.certify(problem, equilibrium, x, y, y0=y)

    def solve(equilibrium, stated=lambda problem: problem, **kwargs):
        return lambda problem, x, y: blx.solve(
            stated(problem), equilibrium, x, y, num_steps=20, throw=False, **kwargs
        )

    short = {
        "by hand": by_hand,
        "hypergradient implicit": hypergradient(implicit),
        "certify warm": certify(blx.WarmStart()),
    }
    if quick:
        return short
    squares = LearnedPointsAsSquares
    return short | {
        "hypergradient nearest": hypergradient(blx.MinimumDisplacement()),
        "certify cold": certify(blx.ColdStart()),
        "certify optimistic": certify(blx.Optimistic()),
        "solve alternating": solve(blx.WarmStart(), pipeline=alternating),
        "solve warm": solve(blx.WarmStart()),
        "solve cold": solve(blx.ColdStart()),
        "solve optimistic": solve(blx.Optimistic()),
        "solve pessimistic": solve(blx.Pessimistic(0.1)),
        "solve cold, squares": solve(blx.ColdStart(), squares),
        "solve optimistic, squares": solve(blx.Optimistic(), squares),
    }


def measure_one(call: Callable, problem, x, y, rounds: int) -> dict[str, float]:
    """The lines of a program, and the processor seconds that it takes."""
    dynamic, static = eqx.partition(problem, eqx.is_array)

    def arrays(dynamic, x, y):
        return eqx.filter(call(eqx.combine(dynamic, static), x, y), eqx.is_array)

    # A call before it may have left traces of the parts that both have.
    jax.clear_caches()
    start = time.process_time()
    lowered = jax.jit(arrays).lower(dynamic, x, y)
    traced = time.process_time()
    lines = lowered.as_text().count("\n")
    before = time.process_time()
    program = lowered.compile()
    compiled = time.process_time()
    jax.block_until_ready(program(dynamic, x, y))
    seconds = []
    for _ in range(rounds):
        begin = time.process_time()
        jax.block_until_ready(program(dynamic, x, y))
        seconds.append(time.process_time() - begin)
    return {
        "lines": lines,
        "trace_seconds": traced - start,
        "xla_seconds": compiled - before,
        "run_seconds": statistics.median(seconds),
    }


def measure(args, width: int, num_points: int) -> dict[str, dict[str, Any]]:
    problem, x, y = make_problem(width, num_points)
    # The compiler's own start is nobody's.
    jax.jit(jnp.linalg.eigh).lower(jnp.eye(2)).compile()
    rows, unit = {}, {}
    for name, call in contenders(args.quick and not args.only).items():
        if args.only and name not in ("by hand", *args.only):
            continue
        row = measure_one(call, problem, x, y, args.rounds)
        row["compile_seconds"] = row["trace_seconds"] + row["xla_seconds"]
        unit = unit or row
        rows[name] = {
            "lines": row["lines"],
            "lines_ratio": row["lines"] / unit["lines"],
            "trace_seconds": row["trace_seconds"],
            "xla_seconds": row["xla_seconds"],
            "compile_ratio": row["compile_seconds"] / unit["compile_seconds"],
            "run_seconds": row["run_seconds"],
            "run_ratio": row["run_seconds"] / unit["run_seconds"],
        }
    _timing.print_table(f"width {width}, {num_points} points", rows)
    return rows


def main(args: argparse.Namespace) -> None:
    widths, points = ([4], [3]) if args.quick else (args.widths, args.points)
    figures = {
        f"width {width}, {num_points} points": measure(args, width, num_points)
        for width in widths
        for num_points in points
    }
    _timing.write(args, figures, clock="processor")


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--widths", type=int, nargs="+", default=[16], metavar="W")
    parser.add_argument("--points", type=int, nargs="+", default=[6], metavar="N")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        choices=[name for name in contenders(quick=False) if name != "by hand"],
        metavar="CALL",
        help="such as 'solve cold'; by default all of them",
    )


if __name__ == "__main__":
    main(_timing.parse_arguments(__doc__, rounds=3, add_options=_options))
