"""Unrolled hypergradients: time and peak memory.

C: K in {100, 1000} steps of gradient descent on a 784-256-256-10 network with a batch of
   256 and a log-penalty for each of its weights, and the hypergradient through them.

The baseline is a plain `jax.lax.scan`, all of whose intermediate values are kept for the
way back. For comparison there is also the adjoint written by hand: it stores the iterates
and takes one joint product with the second derivatives a step on its way back. The ratio
is a contender's time over the baseline's.

`Unrolled` is given memory for all iterates; for half of them, which are then rounded
increments; for a quarter, which are then the last ones; and for none, where it keeps as
little as it can.
"""

import argparse
import functools as ft

import _timing
import jax
import jax.random as jr
import optax
from _problems import penalised_network

import bilevel_eqx as blx


STEP_SIZE = 0.01


def _descend(y, gradient):
    return jax.tree.map(lambda u, g: u - STEP_SIZE * g, y, gradient)


def plain_scan(problem, x, y, num_steps):
    """Reverse mode through a scan, by hand."""

    def outer(x):
        def step(y, _):
            return _descend(y, jax.grad(problem.inner, argnums=1)(x, y)), None

        end = jax.lax.scan(step, y, None, length=num_steps)[0]
        return problem.outer(x, end)

    return jax.grad(outer)(x)


def hand_adjoint(problem, x, y, num_steps):
    """The same, with only the iterates stored."""

    def step(y, _):
        return _descend(y, jax.grad(problem.inner, argnums=1)(x, y)), y

    end, iterates = jax.lax.scan(step, y, None, length=num_steps)
    outer_x, adjoint = jax.grad(problem.outer, argnums=(0, 1))(x, end)

    def step_back(carry, y):
        total, adjoint = carry
        both = jax.grad(problem.inner, argnums=(0, 1))
        _, (cross, curved) = jax.jvp(lambda y: both(x, y), (y,), (adjoint,))
        return (_descend(total, cross), _descend(adjoint, curved)), None

    carry = outer_x, adjoint
    return jax.lax.scan(step_back, carry, iterates, reverse=True)[0][0]


def unrolled(mode, share=1.0):
    """With memory for this share of the iterates, and for a few numbers of each step."""

    def hypergradient(problem, x, y, num_steps):
        iterate = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(y))
        memory = int(share * num_steps * (iterate + 2000)) + 1
        response = blx.Unrolled(optax.sgd(STEP_SIZE), num_steps, mode, memory=memory)
        return blx.hypergradient(problem, x, y, response, throw=False).gradient

    return hypergradient


CONTENDERS = {
    "plain scan": plain_scan,
    "hand adjoint": hand_adjoint,
    "Unrolled, reverse": unrolled("reverse"),
    "Unrolled, iterates": unrolled("checkpointed"),
    "Unrolled, increments": unrolled("checkpointed", 0.51),
    "Unrolled, a quarter": unrolled("checkpointed", 0.25),
    "Unrolled, least memory": unrolled("checkpointed", 0.0),
}


def runners(problem, x, y, num_steps):
    """The contenders, on one problem, as functions without arguments."""
    return {
        name: _timing.Jitted(ft.partial(contender, num_steps=num_steps), problem, x, y)
        for name, contender in CONTENDERS.items()
    }


def measure(problem, x, y, num_steps, args, rounds):
    contenders = runners(problem, x, y, num_steps)
    rows, gradients = _timing.compare(contenders, args, "plain scan", rounds=rounds)
    for name, row in rows.items():
        row["peak_mebibytes"] = contenders[name].temporary_mebibytes
        row["difference"] = _timing.relative_difference(
            gradients[name], gradients["plain scan"]
        )
    _timing.print_table(f"C, K = {num_steps}", rows)
    return rows


def main(args: argparse.Namespace) -> None:
    batch_size, sizes, lengths = 256, (784, 256, 256, 10), (100, 1000)
    if args.quick:
        batch_size, sizes, lengths = 32, (20, 16, 16, 10), lengths[:1]
    problem, x, y = penalised_network(jr.key(0), batch_size, sizes, num_steps=0)
    figures = {}
    for num_steps in lengths:
        # A round of the second takes about a minute on two cores.
        rounds = args.rounds if num_steps == 100 else max(3, args.rounds // 3)
        figures[f"K = {num_steps}"] = measure(problem, x, y, num_steps, args, rounds)
    _timing.write(args, figures)


if __name__ == "__main__":
    main(_timing.parse_arguments(__doc__, rounds=9))
