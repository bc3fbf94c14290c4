"""Products with the inner Hessian that an outer step takes, over a run.

I: 200 outer steps on smaller instances of the problems A and B, and for each number of
   conjugate-gradient steps the error of the hypergradients: of a solve that starts from
   zero, of one that starts from the last adjoint, and of ones that are preconditioned
   too, by what is computed anew every so many outer steps: a Nystrom approximation, the
   diagonal, or a Kronecker product for each layer.

x moves along the exact hypergradient, so that all are asked for the same ones; y is at
the minimum for each x (A), or starts there and takes a step of gradient descent each (B).
B is a smooth network (tanh) on inputs of very different scales, whose Hessian is damped
by .02: a network's own is hardly ever positive definite. What is reported are
the products of a step, those for the first product with a guess and for the
approximation included, with which nine of ten steps have an error of at most 1e-3 from
the tenth step on.
"""

import argparse
from typing import Any

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


class Damped(blx.AbstractBilevelProblem):
    """The same problem at a point, with H + rho I for its inner Hessian H."""

    problem: blx.AbstractBilevelProblem
    damping: float
    center: Any

    def outer(self, x, y):
        return self.problem.outer(x, y)

    def inner(self, x, y):
        squares = jax.tree.map(lambda u, v: jnp.sum((u - v) ** 2), y, self.center)
        penalty = 0.5 * self.damping * sum(jax.tree.leaves(squares))
        return self.problem.inner(x, y) + penalty


@eqx.filter_jit
def path(problem, x, y, rate, inner_rate, num_steps, exact_steps, damping):
    """The points of a run along the hypergradient, and that."""
    low_rank = blx.pipelines.Nystrom(min(40, exact_steps), 1e-2)
    solver = blx.TruncatedCG(exact_steps, preconditioner=low_rank)
    exact = blx.Implicit(None, solver, carry_adjoint=True)
    optimiser = optax.adam(rate)

    def step(carry, _):
        x, y, state, adjoint = carry
        out, adjoint, _ = answered(Damped(problem, damping, y), x, y, exact, adjoint)
        updates, state = optimiser.update(out.gradient, state)
        new = optax.apply_updates(x, updates)
        next_y = move(problem, new, y, inner_rate)
        return (new, next_y, state, adjoint), (x, y, out.gradient)

    carry = x, y, optimiser.init(x), exact.init(problem, x, y)
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
def errors(problem, points, response, damping):
    """The relative error at each point, and the residual of the linear solve."""

    def step(state, point):
        x, y, exact = point
        at = Damped(problem, damping, y)
        out, state, _ = answered(at, x, y, response, state)
        difference = jax.tree.map(jnp.subtract, out.gradient, exact)
        return state, optax.tree.norm(difference) / optax.tree.norm(exact)

    first = jax.tree.map(lambda u: u[0], points)
    state = response.init(problem, first[0], first[1])
    return jax.lax.scan(step, state, points)[1]


def products(problem, points, damping, make, extra, first=FIRST) -> dict[str, Any]:
    """The fewest products with which the error is small enough, and the errors."""
    for num_steps in (1, 2, 3, 4, 6, 8, 11, 16, 22, 32, 45, 64, 90, 128, 180, 256):
        response = make(jnp.asarray(num_steps))
        found = np.asarray(errors(problem, points, response, damping))[first:]
        if np.quantile(found, 0.9) <= ERROR:
            return {"steps": num_steps, "products": num_steps + extra} | {
                "median_error": float(np.median(found)),
                "largest_error": float(found.max()),
            }
    return {"steps": None, "products": None, "median_error": float(np.median(found))}


def trained(problem, x, y, rate, num_steps):
    """A minimum, by Adam with a falling rate and then gradient descent."""
    optimiser = optax.adam(optax.exponential_decay(1e-2, num_steps // 6, 0.5))

    @jax.jit
    def run(problem, x, y):
        def step(carry, _):
            y, state = carry
            gradient = jax.grad(problem.inner, argnums=1)(x, y)
            updates, state = optimiser.update(gradient, state)
            return (optax.apply_updates(y, updates), state), None

        def descend(y, _):
            return move(problem, x, y, rate), None

        (y, _), _ = jax.lax.scan(step, (y, optimiser.init(y)), length=num_steps)
        return jax.lax.scan(descend, y, length=num_steps)[0]

    return run(problem, x, y)


def measure(title, problem, points, damping, preconditioners, refresh_every):
    def solver(num_steps, preconditioner=None):
        return blx.TruncatedCG(
            num_steps, preconditioner=preconditioner, refresh_every=refresh_every
        )

    def cold(num_steps):
        return blx.Implicit(None, solver(num_steps))

    def carried(num_steps):
        return blx.Implicit(None, solver(num_steps), carry_adjoint=True)

    # Without a memory every tenth point will do.
    some = jax.tree.map(lambda u: u[FIRST::10], points)
    rows = {
        "from zero": products(problem, some, damping, cold, 0, 0),
        "from the last adjoint": products(problem, points, damping, carried, 1),
    }
    for preconditioner in preconditioners:

        def preconditioned(num_steps, preconditioner=preconditioner):
            linear_solver = solver(num_steps, preconditioner)
            return blx.Implicit(None, linear_solver, carry_adjoint=True)

        kind = type(preconditioner).__name__
        # The products that it takes itself, the rank or the probes.
        own = getattr(preconditioner, "rank", None) or preconditioner.num_probes
        name = f"and {kind}({own}, {float(preconditioner.damping):g})"
        rows[f"{name}, every {refresh_every}"] = products(
            problem, points, damping, preconditioned, 1 + own / refresh_every
        )
    base = rows["from zero"]["products"]
    for row in rows.values():
        taken = row["products"]
        row["fewer"] = None if base is None or taken is None else base / taken
    _timing.print_table(title, rows)
    return rows


def main(args: argparse.Namespace) -> None:
    num_steps = 12 if args.quick else 200
    n, d = (200, 20) if args.quick else (2000, 200)
    problem, x, y = penalised_regression(jr.key(0), n, d)
    points = path(problem, x, y, args.rate, None, num_steps, d, 0.0)
    kinds = blx.pipelines.Nystrom, blx.pipelines.Diagonal, blx.pipelines.Kronecker
    # Kronecker is the diagonal for a vector.
    kinds_of_A, kinds_of_B = kinds[:2], kinds
    if args.quick:
        kinds_of_A, kinds_of_B = kinds[:1], kinds[2:]
    A = [kind(d // 5, 1e-3) for kind in kinds_of_A]
    figures = {"A": measure("A, logistic regression", problem, points, 0.0, A, 50)}
    sizes = (20, 8, 8, 10) if args.quick else (100, 16, 16, 10)
    network = penalised_network(jr.key(0), 256, sizes, num_steps=0, activation=jnp.tanh)
    problem, x, y = network
    scales = 2 * jnp.logspace(0, -1, sizes[0])
    inputs = lambda problem: (problem.inputs, problem.validation_inputs)  # noqa: E731
    problem = eqx.tree_at(inputs, problem, [scales * u for u in inputs(problem)])
    y = trained(problem, x, y, 0.5, 600 if args.quick else 3000)
    # Half as fast: with small penalties not even the damped Hessian is definite.
    points = path(problem, x, y, args.rate / 2, 0.5, num_steps, 150, 0.02)
    B = [kind(20, 1e-2) for kind in kinds_of_B]
    figures["B"] = measure("B, network", problem, points, 0.02, B, 50)
    _timing.write(args, figures, clock="none")


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rate", type=float, default=1e-2, help="of Adam, for x")


if __name__ == "__main__":
    main(_timing.parse_arguments(__doc__, rounds=1, add_options=_options))
