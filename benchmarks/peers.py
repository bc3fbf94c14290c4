"""Other libraries beside this one, in one process, on the problems of the other scripts.

A, B: implicit hypergradients by K steps of conjugate gradients, as in `hypergradient.py`.
C:    through 100 steps of gradient descent, as in `unroll.py`.
D:    a warm-start run with an inner update, as in `warm_start.py`.
E:    minimum-norm responses, as in `minimum_norm.py`.

Peers are jaxopt, optimistix, PyTorch by hand, TorchOpt, higher and Betty: the extra
`peers`. One that is missing or fails is a row that says so. The ratio is a contender's
time over that of bare JAX; the error is that of its gradient, relative to the same
computation in float64.
"""

import argparse
from typing import Any

import _peers
import _timing
import hypergradient
import jax
import jax.random as jr
import minimum_norm
import unroll
import warm_start
from _problems import penalised_network, penalised_regression

import bilevel_eqx as blx


def _table(
    title: str,
    contenders: dict[str, Any],
    baseline: str,
    exact: Any,
    args: argparse.Namespace,
) -> dict[str, dict[str, Any]]:
    rows, values = _timing.compare(contenders, args, baseline, tolerant=True)
    for name, value in values.items():
        error = _timing.relative_difference(_peers.as_arrays(value), exact)
        rows[name]["error"] = error
        peak = getattr(contenders[name], "temporary_mebibytes", None)
        if isinstance(peak, float):
            rows[name]["peak_mebibytes"] = peak
    _timing.print_table(title, rows)
    return rows


def implicit(title, instance, num_steps, args):
    """A or B."""
    problem, x, y = instance

    def gradient(problem, x, y):
        def solve(product, b):
            return hypergradient.conjugate_gradients(product, b, num_steps)

        return hypergradient.bare_hypergradient(problem, x, y, solve)[1]

    bare = _timing.Jitted(gradient, problem, x, y)
    response = blx.Implicit(None, blx.TruncatedCG(num_steps))

    def ours():
        return blx.hypergradient(problem, x, y, response, throw=False).gradient

    contenders = {
        "bare JAX": bare,
        "ours": ours,
        **_peers.contenders(_peers.IMPLICIT, problem, x, y, num_steps),
    }
    exact = jax.tree.leaves(bare.in_float64())
    return _table(f"{title}, CG-{num_steps}", contenders, "bare JAX", exact, args)


def unrolled(instance, num_steps, args):
    """C."""
    problem, x, y = instance
    ways = unroll.runners(problem, x, y, num_steps)
    plain = ways.pop("plain scan")
    contenders = {
        "plain scan": plain,
        **ways,
        **_peers.contenders(
            _peers.UNROLLED, problem, x, y, num_steps, step_size=unroll.STEP_SIZE
        ),
    }
    exact = jax.tree.leaves(plain.in_float64())
    return _table(f"C, K = {num_steps}", contenders, "plain scan", exact, args)


def warm(width, num_steps, args):
    """D. Peers that only differentiate leave its loop to the user, as PyTorch does."""
    (problem, x, y), ways = warm_start.instance(True, num_steps, width=width)
    baseline = ways.pop("bare scan")
    contenders = {
        "bare scan": lambda: baseline()[0],
        "ours": lambda: ways["ours"]()[0],
        "ours, certify=False": lambda: ways["ours, certify=False"]()[0],
        "PyTorch": _peers.warm_start(problem, x, y, num_steps),
    }
    rows = _table(f"D, width {width}", contenders, "bare scan", baseline()[0], args)
    for row in rows.values():
        if "seconds" in row:
            row["steps_per_second"] = num_steps / row["seconds"]
    return rows


def minimum(features, targets, args):
    """E."""
    exact = minimum_norm.exact_response(features, targets)
    contenders = minimum_norm.runners(features, targets)
    contenders |= _peers.contenders(_peers.MINIMUM_NORM, features, targets)
    title = f"E, {features.shape[0]} samples, {features.shape[1]} weights"
    return _table(title, contenders, "dual Cholesky", [exact], args)


def main(args: argparse.Namespace) -> None:
    key_A, key_B = jr.split(jr.key(0))
    if args.quick:
        A = penalised_regression(key_A, 2_000, 100)
        sizes, samples, num_steps, trained = (784, 32, 32, 10), (64,), 10, 500
    else:
        A = penalised_regression(key_A, 20_000, 500)
        sizes, samples, num_steps, trained = (784, 256, 256, 10), (256, 2_000), 100, 300
    figures = {"A": implicit("A, logistic regression", A, 20, args)}
    for n in samples:
        B = penalised_network(key_B, n, sizes, num_steps=trained)
        figures[f"B, {n} samples"] = implicit(f"B, network, {n} samples", B, 10, args)
    C = penalised_network(jr.key(0), samples[0], sizes, num_steps=0)
    figures[f"C, K = {num_steps}"] = unrolled(C, num_steps, args)
    for width in (16,) if args.quick else (200, 16):
        figures[f"D, width {width}"] = warm(width, 100 if args.quick else 500, args)
    size = (50, 500) if args.quick else (200, 5_000)
    figures["E"] = minimum(*minimum_norm.instance(*size), args)
    _timing.write(args, figures)


if __name__ == "__main__":
    main(_timing.parse_arguments(__doc__, rounds=7))
