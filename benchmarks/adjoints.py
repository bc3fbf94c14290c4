"""Products with the inner Hessian that an outer step takes, over a run.

I: 200 outer steps on smaller instances of the problems A and B, and for each number of
   conjugate-gradient steps the error of the hypergradients: of a solve that starts from
   zero, of one that starts from the last adjoint, and of one that is preconditioned too,
   by a Nystrom approximation that is computed anew every so many outer steps.

x moves along the exact hypergradient, so that all are asked for the same ones; y is at
the minimum for each x (A), or takes a step of gradient descent (B). What is reported are
the products of a step, those for the first product with a guess and for the
approximation included, with which nine of ten steps have an error of at most 1e-3 from
the tenth step on.
"""

import argparse

import _timing
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from _problems import penalised_network, penalised_regression

import bilevel_eqx as blx
from bilevel_eqx._hypergradient import answered


ERROR, FIRST = 1e-3, 10


@eqx.filter_jit
def path(problem, x, y, rate, inner_rate, num_steps, exact_steps):
    """The points of a run along the hypergradient, and that."""
    low_rank = blx.pipelines.Nystrom(min(40, exact_steps), 1e-2)
    exact = blx.Implicit(None, blx.TruncatedCG(exact_steps, preconditioner=low_rank))
    optimiser = optax.adam(rate)

    def step(carry, _):
        x, y, state = carry
        out, *_ = answered(problem, x, y, exact)
        updates, state = optimiser.update(out.gradient, state)
        new = optax.apply_updates(x, updates)
        return (new, move(problem, new, y, inner_rate), state), (x, y, out.gradient)

    carry = x, y, optimiser.init(x)
    return jax.lax.scan(step, carry, length=num_steps)[1]


def move(problem, x, y, inner_rate):
    """One step of gradient descent, or Newton's method on a regression."""
    if inner_rate is not None:
        gradient = jax.grad(problem.inner, argnums=1)(x, y)
        return jax.tree.map(lambda u, g: u - inner_rate * g, y, gradient)
    for _ in range(2):
        H = jax.hessian(problem.inner, argnums=1)(x, y)
        y = y - jnp.linalg.solve(H, jax.grad(problem.inner, argnums=1)(x, y))
    return y


@eqx.filter_jit
def errors(problem, points, response):
    """The relative error at each point, and the residual of the linear solve."""

    def step(state, point):
        x, y, exact = point
        out, state, _ = answered(problem, x, y, response, state)
        difference = jax.tree.map(jnp.subtract, out.gradient, exact)
        return state, optax.tree.norm(difference) / optax.tree.norm(exact)

    first = jax.tree.map(lambda u: u[0], points)
    state = response.init(problem, first[0], first[1])
    return jax.lax.scan(step, state, points)[1]


def products(problem, points, make, extra, first=FIRST):
    """The fewest products with which the error is small enough, and the errors."""
    for num_steps in (1, 2, 3, 4, 6, 8, 11, 16, 22, 32, 45, 64, 90, 128, 180, 256):
        found = np.asarray(errors(problem, points, make(jnp.asarray(num_steps))))[first:]
        if np.quantile(found, 0.9) <= ERROR:
            return {"steps": num_steps, "products": num_steps + extra} | {
                "median_error": float(np.median(found)),
                "largest_error": float(found.max()),
            }
    return {"steps": None, "products": None, "median_error": float(np.median(found))}


def measure(title, problem, points, rank, damping, refresh_every):
    def solver(num_steps, preconditioner=None):
        return blx.TruncatedCG(
            num_steps, preconditioner=preconditioner, refresh_every=refresh_every
        )

    def cold(num_steps):
        return blx.Implicit(None, solver(num_steps))

    def carried(num_steps):
        return blx.Implicit(None, solver(num_steps), carry_adjoint=True)

    def preconditioned(num_steps):
        low_rank = blx.pipelines.Nystrom(rank, damping)
        return blx.Implicit(None, solver(num_steps, low_rank), carry_adjoint=True)

    # Without a memory every tenth point will do.
    some = jax.tree.map(lambda u: u[FIRST::10], points)
    rows = {
        "from zero": products(problem, some, cold, 0, 0),
        "from the last adjoint": products(problem, points, carried, 1),
        f"and Nystrom({rank}, {damping:g}), every {refresh_every}": products(
            problem, points, preconditioned, 1 + rank / refresh_every
        ),
    }
    base = rows["from zero"]["products"]
    for row in rows.values():
        known = base is not None and row["products"] is not None
        row["fewer"] = base / row["products"] if known else None
    _timing.print_table(title, rows)
    return rows


def main(args: argparse.Namespace) -> None:
    num_steps = 20 if args.quick else 200
    n, d = (200, 20) if args.quick else (2000, 200)
    problem, x, y = penalised_regression(jr.key(0), n, d)
    points = path(problem, x, y, args.rate, None, num_steps, d)
    figures = {"A": measure("A, logistic regression", problem, points, d // 5, 1e-3, 50)}
    sizes = (784, 8, 8, 10) if args.quick else (784, 16, 16, 10)
    problem, x, y = penalised_network(jr.key(0), 256, sizes, num_steps=6000)
    points = path(problem, x, y, args.rate, 0.01, num_steps, 150)
    figures["B"] = measure("B, network", problem, points, 40, 1e-2, 50)
    _timing.write(args, figures, clock="none")


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rate", type=float, default=1e-2, help="of Adam, for x")


if __name__ == "__main__":
    main(_timing.parse_arguments(__doc__, rounds=1, add_options=_options))
