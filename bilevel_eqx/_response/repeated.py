"""A step, many times, in forms for the modes of differentiation."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp

from .._compat import checkpointed_while_loop, is_traced
from .._tree import tree_bytes


# How many bytes of steps are kept for the way back, unless the user says another number.
MEMORY = 2**26


def repeat(step, carry, num_steps, mode, memory=MEMORY):
    """`step`, `num_steps` times, in a form for this mode of differentiation.

    With checkpoints, what is kept of as many of the last steps as fit in the `memory` is
    their carries, and of the steps before them the carries at the ends of chunks, as many
    as there are steps in a chunk. A step is then computed once again on the way back, and
    a step in a chunk twice.
    """
    if is_traced(num_steps) or not isinstance(num_steps, int):
        return _repeat_dynamic(step, carry, num_steps, mode)
    if num_steps == 1:
        # Without a loop, the compiler can share the first gradient.
        return step(carry, None)[0]
    if mode != "checkpointed":
        return jax.lax.scan(step, carry, None, length=num_steps)[0]
    # Store only the carries, and recompute the inside of each step.
    step = jax.checkpoint(step, prevent_cse=False)  # pyright: ignore
    num_chunks, size = _chunks(num_steps, memory // max(1, tree_bytes(carry)))
    if num_chunks > 0:

        def chunk(carry, _):
            return jax.lax.scan(step, carry, None, length=size)

        chunk = jax.checkpoint(chunk, prevent_cse=False)  # pyright: ignore
        carry = jax.lax.scan(chunk, carry, None, length=num_chunks)[0]
    rest = num_steps - num_chunks * size
    return jax.lax.scan(step, carry, None, length=rest)[0]


def _chunks(num_steps: int, fitting: int) -> tuple[int, int]:
    """How many chunks there are, and of how many steps, where so many carries fit.

    n chunks of s steps keep n carries, s of the chunk that is gone through, and all those
    of the `num_steps - n s` steps that are in no chunk.
    """
    if num_steps <= fitting:
        return 0, 1
    sizes = range(2, 2 * math.isqrt(num_steps) + 1)
    enough = {s: -((fitting - num_steps - s) // (s - 1)) for s in sizes}
    fewest = {s: n for s, n in enough.items() if n * s <= num_steps}
    if fewest:
        # As few steps in chunks as possible: they are computed once more.
        size = min(fewest, key=lambda s: fewest[s] * s)
        return fewest[size], size
    # It does not fit. This is the least.
    size = min(sizes, key=lambda s: num_steps // s + s + num_steps % s, default=1)
    return num_steps // size, size


# Of a loop of unknown length. It looks through all of them at each step.
_CHECKPOINTS = 64


def _repeat_dynamic(step, carry, num_steps, mode):
    if mode == "reverse":
        raise ValueError(
            "`Unrolled(num_steps=...)` is known only at run time, but reverse mode "
            "cannot store an unknown number of steps. Use `mode='checkpointed'`."
        )
    dynamic, static = eqx.partition(carry, eqx.is_array)

    def unfinished(carry):
        return carry[0] < num_steps

    def body(carry):
        count, dynamic = carry
        new, _ = step(eqx.combine(dynamic, static), None)
        return count + 1, eqx.filter(new, eqx.is_array)

    carry = jnp.zeros_like(jnp.asarray(num_steps)), dynamic
    if mode == "forward":
        _, dynamic = jax.lax.while_loop(unfinished, body, carry)
    else:
        _, dynamic = checkpointed_while_loop(
            unfinished, body, carry, checkpoints=_CHECKPOINTS
        )
    return eqx.combine(dynamic, static)
