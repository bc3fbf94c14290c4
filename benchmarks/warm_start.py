"""A whole warm-start run against one bare scan.

D: two learned points for the concentric rings, with a network of 3 hidden layers of 200
   or of 16 units; one unrolled step of gradient descent of size 1e-3, Adam with a rate of
   1e-2 on the points. An inner update (Algorithm 1 of the paper) or the response itself
   moves the weights.

Ours is the whole of `bilevel_eqx.solve`: checks, an entry of the history every 50 steps,
a certificate at the end. The bare scan makes the same updates, with none of this but a
history entry at every step. The ratio is the speed of a contender over that of the bare
scan: its steps a second, over the steps a second of the scan. The certificate is also
timed by itself (`certificate_share`, of our time): it does not grow with the run.
"""

import argparse

import _timing
import jax
import jax.random as jr
import optax

import bilevel_eqx as blx
from bilevel_eqx.tasks import rings


_INNER_RATE, _OUTER_RATE = 1e-3, 1e-2


def _record(x, y, metrics):
    return {"value": metrics["value"], "points": x["points"]}


def ours(problem, x, y, pipeline, num_steps):
    """The points at the end, their history, and the solution."""
    solution = blx.solve(
        problem,
        blx.WarmStart(),
        x,
        y,
        pipeline=pipeline,
        num_steps=num_steps,
        save_every=50,
        record=_record,
    )
    return solution.x, solution.history, solution


def _bare(with_inner_update):
    """The initial carry and the step of the run, by hand."""
    optimiser = optax.adam(_OUTER_RATE)

    def inner_step(problem, x, y):
        gradient = jax.grad(problem.inner, argnums=1)(x, y)
        return jax.tree.map(lambda u, g: u - _INNER_RATE * g, y, gradient)

    def respond(problem, x, y):
        def outer(x):
            answer = inner_step(problem, x, y)
            return problem.outer(x, answer), answer

        (value, answer), gradient = jax.value_and_grad(outer, has_aux=True)(x)
        return value, gradient, y if with_inner_update else answer

    def init(problem, x, y):
        _, gradient, y = respond(problem, x, y)
        return x, y, gradient, optimiser.init(x)

    def step(problem, carry):
        x, y, gradient, state = carry
        updates, state = optimiser.update(gradient, state)
        x = optax.apply_updates(x, updates)
        if with_inner_update:
            y = inner_step(problem, x, y)
        value, gradient, y = respond(problem, x, y)
        history = _record(x, y, {"value": value})
        return (x, y, gradient, state), history

    return init, step


def measure(title, width, with_inner_update, num_steps, args):
    problem, x, y = rings(jr.key(0), width=width)
    response = blx.Unrolled(optax.sgd(_INNER_RATE), num_steps=1)
    pipeline = blx.GradientPipeline(
        response,
        optax.adam(_OUTER_RATE),
        inner_update=response if with_inner_update else None,
    )
    init, step = _bare(with_inner_update)

    @jax.jit
    def bare_scan(problem, x, y):
        carry = init(problem, x, y)
        carry, history = jax.lax.scan(
            lambda carry, _: step(problem, carry), carry, None, length=num_steps
        )
        return carry[0], history

    jitted_init, jitted_step = jax.jit(init), jax.jit(step)

    def python_loop(read):
        carry, history = jitted_init(problem, x, y), []
        for _ in range(num_steps):
            carry, entry = jitted_step(problem, carry)
            history.append(float(entry["value"]) if read else entry)
        return carry[0], history

    contenders = {
        "bare scan": lambda: bare_scan(problem, x, y),
        "ours": lambda: ours(problem, x, y, pipeline, num_steps),
        "Python loop": lambda: python_loop(read=False),
        "Python loop, reading a float a step": lambda: python_loop(read=True),
    }
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
    for width, num_steps in ((200, 2_000), (16, 20_000)):
        num_steps = num_steps // 10 if args.quick else num_steps
        for with_inner_update in (True, False):
            kind = (
                "with an inner update" if with_inner_update else "without an inner update"
            )
            title = f"D, width {width}, {kind}, {num_steps} steps"
            figures[title] = measure(title, width, with_inner_update, num_steps, args)
    _timing.write(args, figures)


if __name__ == "__main__":
    main(_timing.parse_arguments(__doc__, rounds=9))
