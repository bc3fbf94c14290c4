"""Whether `plan` finds a response that is nearly as fast as the best of a grid.

On smaller instances of the problems of the other scripts: A, logistic regression; B, a
network at its minimum, which has to be one without hidden layers (with some, plan would
first look for a minimum); C, B away from its minimum; E, least squares with more weights
than samples. D is a whole run, and has no error that could be asked for.

The grid has the decomposition, conjugate gradients with and without each preconditioner,
and Neumann series, with numbers of steps about 1.4 times apart; away from a minimum each
after `Projection`, and unrolled gradient descent too. Of each method the first number
that has the error is timed beside the response of `plan`. The ratio is the time of the
plan over that of the fastest one of the grid. At most 1.5 is aimed at.
"""

import argparse
from typing import Any

import _timing
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import minimum_norm
import optax
from _problems import penalised_network, penalised_regression

import bilevel_eqx as blx
from bilevel_eqx._hypergradient import answered
from bilevel_eqx._text import as_code


# How often a contender is called at its turn.
REPEATS = 10

COUNTS = (1, 2, 3, 4, 6, 8, 11, 16, 22, 32, 45, 64, 90, 128, 180, 256)


def grid(solver, step_size, away):
    """Functions from a number of steps to a response."""
    parts = blx.pipelines
    kinds = {
        "CG": None,
        "CG, Nystrom": parts.Nystrom(20, 1e-3),
        "CG, Diagonal": parts.Diagonal(5, 1e-3),
        "CG, Kronecker": parts.Kronecker(5, 1e-3),
    }
    methods: dict[str, Any] = {"Pseudoinverse": None}
    for name, preconditioner in kinds.items():

        def conjugate_gradients(count, preconditioner=preconditioner):
            linear_solver = blx.TruncatedCG(count, preconditioner=preconditioner)
            return blx.Implicit(solver, linear_solver)

        methods[name] = conjugate_gradients
    methods["Neumann"] = lambda k: blx.Implicit(solver, blx.Neumann(k, step_size))
    if away:
        methods["Unrolled"] = lambda k: blx.Unrolled(optax.sgd(step_size), k)
    return methods


@eqx.filter_jit
def gradient(at, response):
    problem, x, y = at
    return answered(problem, x, y, response)[0].gradient


def first_accurate(make, at, exact, error):
    """The response with the first number of steps that has the error."""
    for count in COUNTS:
        response = make(count)
        # One program for all numbers, but for the one whose stored iterates they count.
        known = isinstance(response, blx.Unrolled)
        found = gradient(at, response if known else make(jnp.asarray(count)))
        if _timing.relative_difference(found, exact) <= error:
            return response
    return None


def measure(title, at, error, args, away=False):
    exact_response = blx.Implicit(blx.Projection() if away else None, blx.Pseudoinverse())
    exact = gradient(at, exact_response)
    found = blx.reports.plan(*at, error=error)
    step_size = float(f"{blx.diagnose(*at).step_size:.2g}")
    responses = {"plan": found.response}
    for name, make in grid(exact_response.solver, step_size, away).items():
        response = exact_response
        if make is not None:
            response = first_accurate(make, at, exact, error)
        if response is not None:
            responses[name] = response

    def runner(response):
        once = _timing.Jitted(lambda *at: gradient(at, response), *at)

        def run():
            # Several times: another contender has left its data in the cache.
            for _ in range(REPEATS - 1):
                jax.block_until_ready(once())
            return once()

        return run

    runners = {name: runner(response) for name, response in responses.items()}
    rows, _ = _timing.compare(runners, args, "plan")
    best = min(row["seconds"] for name, row in rows.items() if name != "plan")
    for name, row in rows.items():
        row["ratio"] = row["seconds"] / best
        row["seconds"] /= REPEATS
        code = as_code(responses[name], optimiser=f"optax.sgd({step_size:g})")
        row["response"] = code
        del row["smallest_ratio"], row["largest_ratio"]
    _timing.print_table(f"{title}, error {error:g}", rows)
    return {f"{title}, error {error:g}": rows}


class MinimumNorm(minimum_norm.Regression):
    """With validation samples."""

    validation: jax.Array

    def outer(self, x, y):
        return 0.5 * jnp.mean((self.validation @ y) ** 2)


def main(args: argparse.Namespace) -> None:
    if args.quick:
        A = penalised_regression(jr.key(0), 500, 40)
        _timing.write(args, measure("A, logistic regression", A, 1e-2, args))
        return
    A = penalised_regression(jr.key(0), 4_000, 200)
    problem, x, y = penalised_network(jr.key(0), 200, (100, 10), num_steps=0)
    descent = blx.Implicit(blx.Projection(), blx.Pseudoinverse())
    minimum = blx.best_response(problem, x, y, descent)
    features, targets = minimum_norm.instance(100, 1_000)
    validation = jr.normal(jr.key(1), (50, features.shape[1])) @ (features.T @ features)
    E = MinimumNorm(features, validation)
    least = minimum_norm.dual_cholesky(features, targets)
    figures = {}
    for error in (1e-1, 1e-2):
        figures |= measure("A, logistic regression", A, error, args)
        figures |= measure("B, one layer", (problem, x, minimum), error, args)
        figures |= measure("E, least squares", (E, targets, least), error, args)
    figures |= measure("C, one layer, from its start", (problem, x, y), 1e-2, args, True)
    _timing.write(args, figures)


if __name__ == "__main__":
    main(_timing.parse_arguments(__doc__, rounds=7))
