"""Truncated conjugate gradients."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx

from .._arguments import check_count
from .._linalg.zero_curvature import is_flat, rounding_of
from .._tree import (
    nonzero,
    tree_axpy,
    tree_dot,
    tree_dtype,
    tree_eps,
    tree_max,
    tree_norm,
    tree_scale,
    tree_size,
    tree_where,
    tree_zeros_like,
    where,
)
from .misc import check_square, relative


_GROWTH = 10


class TruncatedCG(lx.AbstractLinearSolver):
    r"""At most $K$ steps of conjugate gradients on $H q = b$, from $q = 0$.

    Each step is one product with $H$, and there are no other products. It stops early,
    with the current $q$ as its answer,

    - if the residual is as small as rounding error (convergence);
    - at a direction of negative curvature. If that is the first direction, there is no
      answer, and the result is `RESULTS.breakdown`.

    In an overparameterised problem $H$ is usually singular and $b$ is not in its range.
    CG then reaches a direction without curvature, where the textbook method divides zero
    by zero. That direction is the part of $b$ in the null space. It is removed from the
    residual, and the iteration continues: in exact arithmetic $B^\top q$ is exact after
    at most $2 r + 1$ steps, where $r$ is the rank.

    A truncated answer is an approximation, and it is a success only if it is better than
    none: if the residual $|b - H q|$ is smaller than that of $q = 0$. With a singular or
    ill-conditioned H and few steps it may have grown, since conjugate gradients reduce
    the error in the norm of H. The result is then `RESULTS.stagnation`.

    It supports the option `rtol` of `lineax.linear_solve`: the relative residual at which
    it stops, if that is above rounding error.

    All tests are relative, so that scaling $H$ or $b$ changes nothing. `stats` contains
    `num_steps`; the relative `residual`, including possible rounding error;
    `negative_curvature`; and the `curvature` along the last direction.

    !!! warning

        The truncated method is nonlinear in $b$, so that the derivative with respect
        to $b$ differs slightly from its transpose. If both matter, use
        [`bilevel_eqx.Neumann`][] or [`bilevel_eqx.Pseudoinverse`][].

    ??? cite "Reference"

        Pedregosa, *Hyperparameter optimization with approximate gradient*, ICML 2016.
    """

    num_steps: int

    judges_itself: ClassVar[bool] = True
    breakdown: ClassVar[str] = "negative_curvature"
    needs_symmetry: ClassVar[bool] = True

    def __check_init__(self):
        check_count(self.num_steps, "num_steps", "TruncatedCG")

    def init(self, operator: lx.AbstractLinearOperator, options: dict[str, Any]):
        del options
        check_square(operator, "TruncatedCG")
        return lx.linearise(operator)

    def compute(self, state, vector, options):
        operator = state
        dtype = tree_dtype(vector)
        eps = tree_eps(vector)
        size = tree_size(vector)
        rtol = jnp.maximum(jnp.asarray(options.get("rtol", 0), dtype), eps)
        # b scaled to order one, so that no square below overflows or underflows.
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
            image = jnp.sqrt(tree_dot(Hp, Hp) / pp)
            flat = is_flat(curvature, image, largest, size)
            # Negated, so that NaN is bad too.
            bad = ~flat & ~(curvature > 0)
            step_size = where(flat | bad, 0, rr / (pp * curvature))
            q = tree_axpy(step_size, p, q)
            longest = jnp.maximum(longest, step_size * jnp.sqrt(pp))
            # Along a flat direction no step is taken. The residual loses that component.
            share = where(flat, tree_dot(r, p) / pp, 0)
            r = tree_axpy(-step_size, Hp, r)
            r = tree_where(flat, tree_axpy(-share, p, r), r)
            new_rr = tree_dot(r, r)
            p = tree_axpy(where(flat, 0, new_rr / rr), p, r)
            converged = new_rr <= rtol**2 * rr0
            stop = bad | converged
            figures = largest, longest, curvature
            return num_steps + 1, q, r, p, new_rr, *figures, stop

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
        bad = ~(curvature >= -rounding_of(largest, size))
        # Rounding error of a long step, which the recursion of the residual does not see.
        rounding = eps * largest * longest / nonzero(tree_norm(b))
        residual = jnp.maximum(relative(r, b), rounding)
        stats = {
            "num_steps": num_steps,
            "residual": residual,
            "curvature": curvature,
            "negative_curvature": bad,
        }
        # At negative curvature the answer minimises as far as there is a minimum, and its
        # residual says little. Negated, so that NaN fails too.
        worse = ~(residual < where(bad, _GROWTH, 1)) & (rr0 > 0)
        result = lx.RESULTS.where(worse, lx.RESULTS.stagnation, lx.RESULTS.successful)
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
