"""Implicit hypergradients against JAX written by hand.

A: logistic regression on 20,000 samples of 500 features, with a log-penalty for each
   feature; 20 steps of conjugate gradients, and 20 Neumann terms.
B: a 784-256-256-10 network on 256 and on 2,000 samples, with a log-penalty for each of
   its 269,322 weights; 10 of each. And a 784-32-32-10 network on 64 samples, whose
   products are so small that all else shows.

The code written by hand linearises the inner gradient once, takes exactly K products
with the inner Hessian, and one more for the cross term. The ratio is our time over its
time. The products that are really made are counted on a smaller problem, by a callback
in the linearised gradient. A is also stated as a mean over data that are read in blocks
which fit into the cache: the code by hand reads them twice for each product.
"""

import argparse

import _timing
import jax
import jax.numpy as jnp
import jax.random as jr
from _problems import (
    in_blocks,
    penalised_network,
    penalised_regression,
    PenalisedRegression,
)
from jax.custom_derivatives import linear_call

import bilevel_eqx as blx


# The widths of the narrow network.
NARROW, TINY = (784, 32, 32, 10), (20, 16, 16, 4)


#
# By hand
#


def _dot(a, b):
    return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, a, b)))


def _axpy(scale, a, b):
    return jax.tree.map(lambda u, v: scale * u + v, a, b)


def conjugate_gradients(product, b, num_steps):
    def step(carry, _):
        q, r, p, rr = carry
        Hp = product(p)
        step_size = rr / _dot(p, Hp)
        q, r = _axpy(step_size, p, q), _axpy(-step_size, Hp, r)
        new_rr = _dot(r, r)
        return (q, r, _axpy(new_rr / rr, p, r), new_rr), None

    carry = jax.tree.map(jnp.zeros_like, b), b, b, _dot(b, b)
    return jax.lax.scan(step, carry, None, length=num_steps)[0][0]


def neumann_series(product, b, num_terms, step_size):
    def add_term(carry, _):
        term, total = carry
        total = _axpy(1.0, term, total)
        return (_axpy(-step_size, product(term), term), total), None

    carry = b, jax.tree.map(jnp.zeros_like, b)
    total = jax.lax.scan(add_term, carry, None, length=num_terms)[0][1]
    return jax.tree.map(lambda u: step_size * u, total)


def bare_hypergradient(problem, x, y, solve):
    """F and F_x - B^T H^-1 F_y, where `solve(product, b)` stands for H^-1."""
    outer = jax.value_and_grad(problem.outer, argnums=(0, 1))
    value, (outer_x, outer_y) = outer(x, y)
    _, product = jax.linearize(lambda y: jax.grad(problem.inner, argnums=1)(x, y), y)
    q = solve(product, outer_y)
    _, cross = jax.jvp(lambda y: jax.grad(problem.inner)(x, y), (y,), (q,))
    return value, jax.tree.map(jnp.subtract, outer_x, cross)


#
# Counting
#


class _Counter:
    count: int = 0


class _Counted(blx.AbstractBilevelProblem):
    """A problem that counts the products with its inner Hessian, as they are made."""

    problem: blx.AbstractBilevelProblem
    counter: _Counter

    def outer(self, x, y):
        return self.problem.outer(x, y)

    def inner(self, x, y):
        leaves, structure = jax.tree.flatten(y)
        leaves[0] = self._count(leaves[0])
        return self.problem.inner(x, jax.tree.unflatten(structure, leaves))

    def _count(self, y):
        """The identity, with a callback where a tangent of y comes in."""

        def called(tangent):
            self.counter.count += 1
            return tangent

        def push(_, tangent):
            struct = jax.ShapeDtypeStruct(tangent.shape, tangent.dtype)
            return jax.pure_callback(called, struct, tangent)

        def pull(_, cotangent):
            return cotangent

        @jax.custom_jvp
        def identity(y):
            return y

        @identity.defjvp
        def _(primals, tangents):
            return identity(*primals), linear_call(push, pull, (), *tangents)

        return identity(y)


def count_products(hypergradient, problem, x, y):
    """How many products with the inner Hessian `hypergradient(problem, x, y)` makes."""
    counter = _Counter()
    jax.block_until_ready(hypergradient(_Counted(problem, counter), x, y))
    jax.effects_barrier()
    return counter.count


#
# The comparison
#


def largest_eigenvalue(problem, x, y):
    """That of the inner Hessian, by 30 steps of the power method."""

    @jax.jit
    def run(problem, x, y):
        _, product = jax.linearize(lambda y: jax.grad(problem.inner, argnums=1)(x, y), y)

        def step(carry, _):
            v, _ = carry
            size = jnp.sqrt(_dot(v, v))
            return (product(jax.tree.map(lambda u: u / size, v)), size), None

        v = jax.grad(problem.inner, argnums=1)(x, jax.tree.map(jnp.ones_like, y))
        return jax.lax.scan(step, (v, jnp.zeros(())), None, length=30)[0][1]

    return float(run(problem, x, y))


def contenders(problem, x, y, linear_solver, solve):
    """Ours as it is called, and the code by hand, as functions without arguments.

    `solve(product, b)` is what `linear_solver` is by hand. The regression is there in
    blocks too.
    """
    response = blx.Implicit(None, linear_solver)

    def ours():
        # A truncated solve may be worse than none. Its error is in the table.
        return blx.hypergradient(problem, x, y, response, throw=False)

    def bare(problem, x, y):
        return bare_hypergradient(problem, x, y, solve)

    both = {"ours": ours, "bare": _timing.Jitted(bare, problem, x, y)}
    if not isinstance(problem, PenalisedRegression):
        return both
    blocked = in_blocks(problem)

    def ours_in_blocks():
        return blx.hypergradient(blocked, x, y, response, throw=False)

    return both | {"in blocks": ours_in_blocks}


def measure(title, instance, small_instance, num_steps, args):
    """Both linear solvers on one problem; one of them if --quick."""
    problem, x, y = instance
    # For both instances, so that the series converges on both.
    curvature = max(largest_eigenvalue(*instance), largest_eigenvalue(*small_instance))
    step_size = 1 / (1.2 * curvature)
    solvers = {
        f"CG-{num_steps}": (
            blx.TruncatedCG(num_steps),
            lambda product, b: conjugate_gradients(product, b, num_steps),
        ),
        f"Neumann-{num_steps}": (
            blx.Neumann(num_steps, step_size),
            lambda product, b: neumann_series(product, b, num_steps, step_size),
        ),
    }
    if args.quick:
        is_regression = isinstance(problem, PenalisedRegression)
        del solvers[f"{'Neumann' if is_regression else 'CG'}-{num_steps}"]
    figures = {}
    for name, (linear_solver, solve) in solvers.items():
        rows, values = _timing.compare(
            contenders(problem, x, y, linear_solver, solve), args, "bare"
        )
        out, (_, gradient) = values["ours"], values["bare"]

        def counted_ours(problem, x, y, response=blx.Implicit(None, linear_solver)):
            return blx.hypergradient(problem, x, y, response, throw=False)

        def counted_bare(problem, x, y, solve=solve):
            return bare_hypergradient(problem, x, y, solve)

        rows["ours"]["products"] = count_products(counted_ours, *small_instance)
        rows["bare"]["products"] = count_products(counted_bare, *small_instance)
        for found in ("ours", "in blocks"):
            if found in rows:
                difference = _timing.relative_difference(values[found].gradient, gradient)
                rows[found]["difference"] = difference
        if "linear_num_steps" in out.stats:
            rows["ours"]["steps"] = int(out.stats["linear_num_steps"])
        _timing.print_table(f"{title}, {name}", rows)
        figures[f"{title}, {name}"] = rows
    return figures


def main(args: argparse.Namespace) -> None:
    key_A, key_B = jr.split(jr.key(0))
    tiny_A = penalised_regression(key_A, 400, 40)
    tiny_B = penalised_network(key_B, 32, TINY, num_steps=2_000)
    if args.quick:
        A = penalised_regression(key_A, 2_000, 100)
        network, samples, num_steps = TINY, (64,), 500
    else:
        A = penalised_regression(key_A, 20_000, 500)
        network, samples, num_steps = (784, 256, 256, 10), (256, 2_000), 300
    figures = measure("A, logistic regression", A, tiny_A, 20, args)
    for n in samples:
        B = penalised_network(key_B, n, network, num_steps=num_steps)
        figures |= measure(f"B, network, {n} samples", B, tiny_B, 10, args)
    if not args.quick:
        B = penalised_network(key_B, 64, NARROW, num_steps=500)
        figures |= measure("B, narrow network, 64 samples", B, tiny_B, 10, args)
    _timing.write(args, figures)


if __name__ == "__main__":
    main(_timing.parse_arguments(__doc__, rounds=21))
