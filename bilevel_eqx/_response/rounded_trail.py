"""Reverse mode through many steps, of which only rounded increments are kept."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree, Scalar

from .._tree import tree_axpy, tree_zeros_like, where


# Half as many bits.
_NARROW = {jnp.dtype(jnp.float32): jnp.float16, jnp.dtype(jnp.float64): jnp.float32}


def has_half(y: PyTree[Array]) -> bool:
    """Whether there are types of half as many bits for increments of y."""
    return all(u.dtype in _NARROW for u in jtu.tree_leaves(y))


class Carry(NamedTuple):
    """What a step makes of that of the last one: y, of whose trail increments are kept,
    and the rest, all of which is kept. (The second moments of Adam, slightly wrong, may
    be negative.)"""

    y: PyTree[Array]
    rest: PyTree[Array]


def rounded_trail(
    begin: Callable[[PyTree], Carry],
    step: Callable[[PyTree, Carry], Carry],
    x: PyTree[Array],
    num_steps: int,
) -> tuple[Carry, Callable[[PyTree], PyTree]]:
    r"""The end of $c_{k+1} = \Phi(x, c_k)$ from $c_0$, and the map from cotangents of its
    y to those of x.

    The way back needs each $y_k$, at which it linearises the step anew. It gets them from
    the end by $y_k \approx \hat y_k = \hat y_{k+1} - d_k$, where the increment $d_k$ is
    $y_{k+1} - \hat y_k$ rounded to half as many bits. The rounding error of one step is
    part of what the next increment is computed from, so that errors do not add up: an
    entry of $\hat y_k$ is wrong by at most $2^{-12}$ of its last increment in float32,
    and $2^{-24}$ in float64. Where that is less than the rounding of $y_k$ itself, it is
    exact. (For increments that are $2^{29}$ times below the largest one of their array,
    the bound is not relative to themselves.)

    **Arguments:**

    - `begin`: from x to $c_0$.
    - `step`: $\Phi$.
    - `x`: a pytree of floating-point arrays.
    - `num_steps`: how many steps.
    """
    _, pull_begin, start = _pulled(begin, x)

    def forward(pair, _):
        carry, near = pair
        new = step(x, carry)
        kept = jtu.tree_map(_increment, new.y, near)
        return (new, _moved(near, kept, 1)), (kept, carry.rest)

    (end, near), trail = jax.lax.scan(forward, (start, start.y), length=num_steps)

    def pull(u):
        def back(state, kept):
            total, cotangent, near = state
            increments, rest = kept
            near = _moved(near, increments, -1)
            real, other = eqx.partition(Carry(near, rest), eqx.is_inexact_array)
            _, pull_step, _ = _pulled(
                lambda x, real: step(x, eqx.combine(real, other)), x, real
            )
            share, cotangent = pull_step(cotangent)
            return (tree_axpy(1.0, share, total), cotangent, near), None

        rest = tree_zeros_like(eqx.filter(end.rest, eqx.is_inexact_array))
        state = tree_zeros_like(x), Carry(u, rest), near
        (total, cotangent, _), _ = jax.lax.scan(back, state, trail, reverse=True)
        return tree_axpy(1.0, pull_begin(cotangent)[0], total)

    # A pytree, so that it may leave a program.
    return end, eqx.filter_closure_convert(pull, end.y)


def _pulled(fn: Callable, *args: Any):
    """`jax.vjp` for the outputs that have cotangents, and all outputs."""

    def real(*args):
        out = fn(*args)
        return eqx.filter(out, eqx.is_inexact_array), out

    return jax.vjp(real, *args, has_aux=True)


class _Increment(NamedTuple):
    """Narrow entries times a power of two."""

    entries: Array
    scale: Scalar


def _increment(new: Array, near: Array) -> _Increment:
    increment = new - near
    top = jnp.max(jnp.abs(increment), initial=0)
    # The power of two with which the largest entry is at most 2^15, which float16 has.
    # To divide and to multiply by it is exact.
    tiny = top < 2.0**16 * jnp.finfo(top.dtype).tiny
    top = where(tiny, 1, top)
    scale = 2.0**-15 * (top / jnp.frexp(top)[0])
    narrow = _NARROW[new.dtype]
    # Rounded before it is narrow: where a narrow value is at once made wide again, as on
    # the way forward, XLA leaves both out, and then errors would add up. (On a GPU: see
    # `xla_allow_excess_precision`.)
    bits = jnp.finfo(narrow)
    rounded = jax.lax.reduce_precision(increment / scale, bits.nexp, bits.nmant)
    return _Increment(rounded.astype(narrow), scale)


def _moved(near: PyTree[Array], increments: PyTree, sign: int) -> PyTree[Array]:
    def move(u, increment):
        return u + sign * increment.scale * increment.entries.astype(u.dtype)

    return jtu.tree_map(move, near, increments)
