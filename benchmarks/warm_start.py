"""A whole warm-start run against one bare scan.

D: two learned points for the concentric rings, with a network of 3 hidden layers of 200
   or of 16 units; one unrolled step of gradient descent of size 1e-3, Adam with a rate of
   1e-2 on the points. An inner update (Algorithm 1 of the paper) or the response itself
   moves the weights.

Ours is the whole of `bilevel_eqx.solve`: checks, an entry of the history every 50 steps,
a certificate at the end; and the same without the certificate, which does not grow with
the run. That is also timed by itself (`certificate_share`, of our time). The bare scan
makes the same updates, with none of this but a history entry at every step. The ratio is
the speed of a contender over that of the bare scan: its steps a second, over the steps a
second of the scan.
"""

import argparse
import functools as ft

import _timing
import jax
import jax.random as jr
import optax

import bilevel_eqx as blx
from bilevel_eqx.tasks import rings


INNER_RATE, OUTER_RATE = 1e-3, 1e-2


def _record(x, y, metrics):
    return {"value": metrics["value"], "points": x["points"]}


@ft.cache
def pipeline(with_inner_update):
    response = blx.Unrolled(optax.sgd(INNER_RATE), num_steps=1)
    return blx.GradientPipeline(
        response,
        optax.adam(OUTER_RATE),
        inner_update=response if with_inner_update else None,
    )


def ours(problem, x, y, num_steps, *, with_inner_update=True, certify=True):
    """The points at the end, their history, and the solution."""
    solution = blx.solve(
        problem,
        blx.WarmStart(),
        x,
        y,
        pipeline=pipeline(with_inner_update),
        num_steps=num_steps,
        save_every=50,
        record=_record,
        certify=certify,
    )
    return solution.x, solution.history, solution


def unrolled_step(problem, x, y):
    """One step of gradient descent on the inner objective, by hand."""
    gradient = jax.grad(problem.inner, argnums=1)(x, y)
    return jax.tree.map(lambda u, g: u - INNER_RATE * g, y, gradient)


def unrolled_hypergradient(problem, x, y):
    """The value, the gradient through one such step, and where the step leads."""

    def outer(x):
        answer = unrolled_step(problem, x, y)
        return problem.outer(x, answer), answer

    (value, answer), gradient = jax.value_and_grad(outer, has_aux=True)(x)
    return value, gradient, answer


def bare_run(hypergradient, inner_update):
    """The initial carry and the step of a warm-start run, by hand.

    `hypergradient(problem, x, y)` is the value, the gradient and the answer. The weights
    move by `inner_update(problem, x, y)`, or to the answer if that is `None`.
    """
    optimiser = optax.adam(OUTER_RATE)

    def respond(problem, x, y):
        value, gradient, answer = hypergradient(problem, x, y)
        return value, gradient, answer if inner_update is None else y

    def init(problem, x, y):
        _, gradient, y = respond(problem, x, y)
        return x, y, gradient, optimiser.init(x)

    def step(problem, carry):
        x, y, gradient, state = carry
        updates, state = optimiser.update(gradient, state)
        x = optax.apply_updates(x, updates)
        if inner_update is not None:
            y = inner_update(problem, x, y)
        value, gradient, y = respond(problem, x, y)
        return (x, y, gradient, state), value

    return init, step


def instance(with_inner_update, num_steps, **sizes):
    """The problem with its initial variables, and the contenders."""
    problem, x, y = rings(jr.key(0), **sizes)
    init, step = bare_run(
        unrolled_hypergradient, unrolled_step if with_inner_update else None
    )

    def recorded_step(problem, carry):
        carry, value = step(problem, carry)
        return carry, _record(carry[0], carry[1], {"value": value})

    def bare_scan(problem, x, y):
        carry = init(problem, x, y)
        carry, history = jax.lax.scan(
            lambda carry, _: recorded_step(problem, carry),
            carry,
            None,
            length=num_steps,
        )
        return carry[0], history

    jitted_init, jitted_step = jax.jit(init), jax.jit(recorded_step)

    def python_loop(read):
        carry, history = jitted_init(problem, x, y), []
        for _ in range(num_steps):
            carry, entry = jitted_step(problem, carry)
            history.append(float(entry["value"]) if read else entry)
        return carry[0], history

    contenders = {
        "bare scan": _timing.Jitted(bare_scan, problem, x, y),
        "ours": lambda: ours(
            problem, x, y, num_steps, with_inner_update=with_inner_update
        ),
        "ours, certify=False": lambda: ours(
            problem,
            x,
            y,
            num_steps,
            with_inner_update=with_inner_update,
            certify=False,
        ),
        "Python loop": lambda: python_loop(read=False),
        "Python loop, reading a float a step": lambda: python_loop(read=True),
    }
    return (problem, x, y), contenders


def measure(title, width, with_inner_update, num_steps, args):
    (problem, _, _), contenders = instance(with_inner_update, num_steps, width=width)
    rows, values = _timing.compare(
        contenders, args, "bare scan", quotient=lambda time, base: base / time
    )
    reference, history = values["bare scan"]
    for name, row in rows.items():
        row["difference"] = _timing.relative_difference(values[name][0], reference)
        row["steps_per_second"] = num_steps / row["seconds"]

    # Of the histories too, where both have an entry.
    _, our_history, solution = values["ours"]
    there = jax.tree.map(lambda h: h[49::50], history)
    rows["ours"]["history_difference"] = _timing.relative_difference(our_history, there)

    def certify():
        return blx.certify(problem, blx.WarmStart(), solution.x, solution.y)

    alone, _ = _timing.compare({"certify": certify}, args, "certify")
    share = alone["certify"]["seconds"] / rows["ours"]["seconds"]
    rows["ours"]["certificate_share"] = share
    _timing.print_table(title, rows)
    return rows


def main(args: argparse.Namespace) -> None:
    figures = {}
    for width, num_steps in [(16, 200)] if args.quick else [(200, 2_000), (16, 20_000)]:
        for with_inner_update in (True, False):
            kind = (
                "with an inner update" if with_inner_update else "without an inner update"
            )
            title = f"D, width {width}, {kind}, {num_steps} steps"
            figures[title] = measure(title, width, with_inner_update, num_steps, args)
    _timing.write(args, figures)


if __name__ == "__main__":
    main(_timing.parse_arguments(__doc__, rounds=9))
