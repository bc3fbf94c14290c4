"""In which precision matrices of float32 are multiplied.

A recent GPU or a TPU multiplies them with about three digits, unless it is told otherwise
(https://docs.jax.dev/en/latest/_autosummary/jax.default_matmul_precision.html). That is
enough for the steps of a training. But the pseudoinverse of a matrix multiplies its error
by the condition number, and what is an error of the products cannot be told from an
eigenvalue.
"""

import contextlib
import functools as ft
import inspect
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.tree_util as jtu
import numpy as np

from .._compat import Fn
from .power_iteration import DENSE_SIZE


def full_precision() -> contextlib.AbstractContextManager:
    """Within it, matrices are multiplied in the precision of their type.

    What the user has set by `jax.default_matmul_precision` stays. On a CPU there is
    nothing to do.
    """
    chosen = jax.config.jax_default_matmul_precision  # pyright: ignore
    if chosen is not None or jax.default_backend() == "cpu":
        return contextlib.nullcontext()
    return jax.default_matmul_precision("highest")


def in_full_precision(fn: Fn) -> Fn:
    """`fn` within `full_precision`: for our own linear algebra."""

    @ft.wraps(fn)
    def wrapped(*args, **kwargs):
        with full_precision():
            return fn(*args, **kwargs)

    return cast(Fn, wrapped)


def in_full_precision_if_small(name: str) -> Callable[[Fn], Fn]:
    """A decorator of public functions, with the `name` of the argument that is y.

    If y is so small that its Hessian is decomposed, all is within `full_precision`, the
    user's objectives too.
    """

    def decorate(fn: Fn) -> Fn:
        index = list(inspect.signature(fn).parameters).index(name)

        @ft.wraps(fn)
        def wrapped(*args, **kwargs):
            y = args[index] if index < len(args) else kwargs.get(name)
            within = full_precision() if _is_small(y) else contextlib.nullcontext()
            with within:
                return fn(*args, **kwargs)

        return cast(Fn, wrapped)

    return decorate


def _is_small(y: Any) -> bool:
    # Nothing is known of y yet: the checks of the arguments come later.
    return sum(np.size(leaf) for leaf in jtu.tree_leaves(y)) <= DENSE_SIZE
