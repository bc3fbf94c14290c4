"""How a failure is raised, inside and outside of transformations."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree, Scalar

from .._compat import any_of_batch, is_traced, on_error, raise_on_host, stack_inside
from .._tree import tree_scale
from .results import is_failure, RESULTS
from .sentences import sentences


def throw_if_failed(
    out: PyTree,
    result: RESULTS,
    figures: Callable[[], dict[str, Array]],
    more_figures: Callable[[], dict[str, Array]] = dict,
) -> PyTree:
    """`out`, or an error with the `figures` in its message if `result` is a failure.

    The figures are computed only after a failure. Inside a transformation they are in a
    branch of the program. `figures` is a pytree (a `jtu.Partial` of a function of a
    module), so that the program is compiled once. Those of `more_figures` are computed
    only outside of transformations: no program is longer for them.

    The environment variable `EQX_ON_ERROR` says what a failure does, as for
    `eqx.error_if`: `raise` (the default); `nan`, which makes the numbers of `out` NaN;
    `breakpoint`; or `off`.
    """
    mode = on_error()
    if mode == "off":
        return out
    failed = is_failure(result)
    if not is_traced(failed):
        if not failed:
            return out
        if mode == "raise":
            known = jax.lax.stop_gradient({**_found(more_figures), **figures()})
            raise eqx.EquinoxRuntimeError(sentences(failed, result, known))
    one = _ONE_OR[mode](failed, result, figures, stack_inside())
    # Only the numbers carry the error: it cannot pass through a typed key. The one is a
    # factor, so that their tangents carry the error too: the program of a gradient may
    # not contain the numbers themselves.
    numeric, rest = eqx.partition(out, eqx.is_inexact_array)
    return eqx.combine(tree_scale(one, numeric), rest)


def _found(figures: Callable[[], dict[str, Array]]) -> dict[str, Array]:
    """The figures that can be computed now."""
    try:
        found = figures()
    except Exception:
        # What cannot be found out about a failure may not stand in its place.
        return {}
    return {name: value for name, value in found.items() if not is_traced(value)}


#
# One, or the error, or NaN
#


def _nan() -> Scalar:
    return jnp.full((), jnp.nan)


def _on_host(callback: Callable, failed, result, figures, stack: str) -> Bool[Array, ""]:
    """Calls `callback` once for the whole batch, and returns `failed`."""
    # A callback has no derivative.
    arguments = jax.lax.stop_gradient((failed, result, figures()))
    return jax.pure_callback(
        lambda *known: callback(sentences(*known), stack, known[0]),
        jax.ShapeDtypeStruct((), jnp.bool_),
        *arguments,
        vmap_method="broadcast_all",
    )


def _raise(sentence: str, stack: str, failed: np.ndarray) -> None:
    raise_on_host(sentence, stack)


def _print(sentence: str, stack: str, failed: np.ndarray) -> np.ndarray:
    print(f"{stack}{sentence}", flush=True)
    return np.asarray(failed)


# Jitted, so that an error of XLA becomes an `eqx.EquinoxRuntimeError` under a plain
# `jax.vmap` too.
@eqx.filter_jit
def _one_or_raise(failed, result, figures, stack) -> Scalar:
    def error():
        # NaN, because a TPU continues after an error in a callback, with an arbitrary
        # value. Times that value, because the compiler would remove an unused callback.
        value = _on_host(_raise, failed, result, figures, stack)
        return _nan() * value.astype(float)

    return jax.lax.cond(any_of_batch(failed), error, lambda: jnp.ones(()))


@eqx.filter_jit
def _one_or_breakpoint(failed, result, figures, stack) -> Scalar:
    failed = jax.lax.cond(
        any_of_batch(failed),
        lambda: _on_host(_print, failed, result, figures, stack),
        lambda: failed,
    )
    return eqx.error_if(jnp.ones(()), failed, "The failure that is described above.")


def _one_or_nan(failed, result, figures, stack) -> Scalar:
    del result, figures, stack
    # Unlike `eqx.error_if`, this changes only the elements of a batch that failed.
    return jnp.where(failed, _nan(), jnp.ones(()))


_ONE_OR: dict[str, Any] = {
    "raise": _one_or_raise,
    "breakpoint": _one_or_breakpoint,
    "nan": _one_or_nan,
}
