"""Truncated conjugate gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, PyTree, ScalarLike

from .._arguments import check_count
from .._tree import (
    nonzero,
    tree_axpy,
    tree_dot,
    tree_dtype,
    tree_max,
    tree_norm,
    tree_scale,
    tree_size,
    tree_where,
    tree_zeros_like,
)
from .misc import check_square, relative


# On an ill-conditioned but regular system the residual may rise for a while, before it
# falls: CG decreases the error in the norm of H, not the residual.
_GROWTH = 10.0


class TruncatedCG(lx.AbstractLinearSolver):
    r"""At most $K$ steps of conjugate gradients on $H q = b$, from $q = 0$.

    Each step is one product with $H$ and there are no others: exactly $K$ products,
    unless it stops before, and then what it has is the answer. It stops

    - when the residual is down to rounding error (convergence);
    - at a direction of negative curvature. If that is the first direction of all there
      is no answer to give, and the result is `RESULTS.breakdown`.

    Where $H$ is singular and $b$ is not in its range, which is the rule for a
    hypergradient in an overparameterised problem, there comes a direction without
    curvature, and there the textbook method divides zero by zero. That direction is the
    part of $b$ in the null space. It is taken out of the residual, and the iteration goes
    on from there: in exact arithmetic $B^\top q$ is exact after at most $2 r + 1$ steps,
    with $r$ the rank. With fewer steps the residual may have grown instead, and the
    result is then `RESULTS.stagnation`.

    It supports the option `rtol` of `lineax.linear_solve`: a relative residual at which
    to stop before rounding error.

    All three tests compare like with like, so that scaling $H$ or $b$ changes nothing.
    `stats` has `num_steps`; the relative `residual`, with what rounding may have added to
    it; `negative_curvature`, and the `curvature` along the last direction.

    !!! warning

        The truncated method is nonlinear in $b$, so that the derivative with respect
        to $b$ is not quite its transpose. Where both matter use
        [`bilevel_eqx.Neumann`][] or [`bilevel_eqx.Pseudoinverse`][].

    ??? cite "Reference"

        Pedregosa, *Hyperparameter optimization with approximate gradient*, ICML 2016.
    """

    num_steps: int

    def __check_init__(self):
        check_count(self.num_steps, "num_steps", "TruncatedCG")

    def init(self, operator: lx.AbstractLinearOperator, options: dict[str, Any]):
        del options
        check_square(operator, "TruncatedCG")
        return lx.linearise(operator)

    def compute(self, state, vector, options):
        operator = state
        dtype = tree_dtype(vector)
        # The rounding of the narrowest type among the leaves: no residual is below it.
        eps = max(float(jnp.finfo(u.dtype).eps) for u in jtu.tree_leaves(vector))
        # Halfway, in digits, between what rounding makes of no curvature at all and what
        # the residual can do without: a step along less would cost it its last digits.
        flatness = eps ** (2 / 3)
        rtol = jnp.maximum(jnp.asarray(options.get("rtol", 0), dtype), eps)
        # Of order one, so that no square below overflows or underflows.
        scale = tree_max(vector)
        b = tree_scale(1 / nonzero(scale), vector)
        rr0 = tree_dot(b, b)

        def unfinished(carry):
            num_steps, *_, stop = carry
            return ~stop & (num_steps < self.num_steps)

        def step(carry):
            num_steps, q, r, p, rr, largest, longest, _, _ = carry
            Hp = operator.mv(p)
            pp = tree_dot(p, p)
            curvature = tree_dot(p, Hp) / pp
            largest = jnp.maximum(largest, jnp.abs(curvature))
            # `<=`, and so true for the zero operator, whose largest curvature is zero.
            flat = jnp.abs(curvature) <= flatness * largest
            # NaN too is worse than flat.
            bad = ~flat & ~(curvature > 0)
            step_size = jnp.where(flat | bad, 0, rr / (pp * curvature))
            q = tree_axpy(step_size, p, q)
            longest = jnp.maximum(longest, step_size * jnp.sqrt(pp))
            # Along a flat direction no step is taken, and b loses its share of it.
            share = jnp.where(flat, tree_dot(r, p) / pp, 0)
            r = tree_axpy(-step_size, Hp, r)
            r = tree_where(flat, tree_axpy(-share, p, r), r)
            new_rr = tree_dot(r, r)
            p = tree_axpy(jnp.where(flat, 0, new_rr / rr), p, r)
            converged = new_rr <= rtol**2 * rr0
            stop = bad | converged
            return num_steps + 1, q, r, p, new_rr, largest, longest, curvature, stop

        zero = jnp.zeros((), dtype)
        carry = (
            jnp.array(0),
            tree_zeros_like(b),
            b,
            b,
            rr0,
            zero,
            zero,
            zero,
            rr0 == 0,
        )
        out = jax.lax.while_loop(unfinished, step, carry)
        num_steps, q, r, _, _, largest, longest, curvature, _ = out
        bad = ~(curvature >= -flatness * largest)
        # What a long step has added to the residual, and its recursion does not see.
        rounding = eps * largest * longest / nonzero(tree_norm(b))
        residual = jnp.maximum(relative(r, b), rounding)
        stats = {
            "num_steps": num_steps,
            "residual": residual,
            "curvature": curvature,
            "negative_curvature": bad,
        }
        # With a singular H and too few steps the residual can only grow.
        diverged = ~(residual <= _GROWTH)
        result = lx.RESULTS.where(diverged, lx.RESULTS.stagnation, lx.RESULTS.successful)
        result = lx.RESULTS.where(bad & (num_steps == 1), lx.RESULTS.breakdown, result)
        q = jtu.tree_map(lambda u: scale.astype(u.dtype) * u, q)
        return q, result, stats

    def transpose(self, state, options):
        return state.transpose(), options

    def conj(self, state, options):
        return lx.conj(state), options

    def assume_full_rank(self):
        return False


TruncatedCG.__init__.__doc__ = """**Arguments:**

- `num_steps`: the largest number $K$ of steps, each of which is one product with $H$.
"""


def newton_direction(
    hessian: lx.AbstractLinearOperator, downhill: PyTree[Array], rtol: ScalarLike = 0.0
) -> PyTree[Array]:
    r"""A direction of descent: $H^{-1}$ applied to `downhill`, by conjugate gradients,
    as far as the curvature is positive.

    Where it is not from the outset, downhill itself, scaled by the size of the curvature.
    """
    solver = TruncatedCG(min(_NEWTON_STEPS, 2 * tree_size(downhill) + 1))
    options = {"rtol": rtol}
    solve = lx.linear_solve(hessian, downhill, solver, options=options, throw=False)
    square = tree_dot(downhill, downhill)
    curvature = jnp.abs(tree_dot(downhill, hessian.mv(downhill)))
    length = jnp.where(curvature == 0, 1, square / nonzero(curvature))
    descends = tree_dot(solve.value, downhill) > 0
    good = descends & (solve.result != lx.RESULTS.breakdown)
    return tree_where(good, solve.value, tree_scale(length, downhill))


_NEWTON_STEPS = 100
