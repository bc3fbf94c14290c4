"""Whether a function is a sum of squares, read from its program."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, Scalar

from .._compat import is_literal, is_program


def num_squares(fn: Callable[[PyTree], Scalar], at: PyTree[Array]) -> int | None:
    r"""How many squares `fn` is a sum of, up to positive factors and up to what its
    argument does not enter; `None` if its program does not show that it is one.

    The program must end in sums of squares of something: `jnp.sum(r**2)`, `r @ r`,
    `jnp.mean(weights * jnp.square(r))`, and sums of such. What r is does not matter. A
    factor that is an array must not be negative at present. Nothing is guessed: a sum of
    squares that is written otherwise, say as $y^\top H y / 2 - b^\top y$, is not found.
    """
    closed = jax.make_jaxpr(fn)(at)
    inputs = [_Node("input", {}, (), v.aval.size) for v in closed.jaxpr.invars]
    (out,) = _interpreted(closed.jaxpr, map(_Known, closed.consts), inputs)
    count = _squares(out)
    # A constant is the sum of no squares, and not worth a word.
    return count or None


class _Known(NamedTuple):
    """What does not depend on the argument."""

    value: Any


class _Node(NamedTuple):
    """What does: the operation that it is the result of."""

    name: str
    params: dict[str, Any]
    inputs: tuple[Any, ...]
    size: int


def _interpreted(jaxpr, constants, arguments) -> list[Any]:
    """The outputs of a program as nodes, with the programs in it written out."""
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, constants, strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))

    def read(variable):
        return _Known(variable.val) if is_literal(variable) else values[variable]

    for equation in jaxpr.eqns:
        inputs = [read(v) for v in equation.invars]
        values.update(zip(equation.outvars, _results(equation, inputs), strict=True))
    return [read(v) for v in jaxpr.outvars]


def _results(equation, inputs) -> list[Any]:
    name, params = equation.primitive.name, equation.params
    inner = [params[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in params]
    calls = name in _CALLS and len(inner) == 1 and is_program(inner[0])
    if calls:
        program = getattr(inner[0], "jaxpr", inner[0])
        constants = map(_Known, getattr(inner[0], "consts", ()))
        if len(program.invars) == len(inputs):
            return _interpreted(program, constants, inputs)
    if all(isinstance(u, _Known) for u in inputs) and not calls:
        try:
            out = equation.primitive.bind(*(u.value for u in inputs), **params)
        except Exception:
            # An operation that takes functions. It counts as one that is not understood.
            pass
        else:
            outs = out if equation.primitive.multiple_results else [out]
            return list(map(_Known, outs))
    return [_Node(name, params, tuple(inputs), v.aval.size) for v in equation.outvars]


_CALLS = {
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "remat",
    "checkpoint",
    "custom_jvp_call",
    "custom_vjp_call",
}


def _squares(node) -> int | None:
    """The number of squares that the entries of an array are sums of."""
    if isinstance(node, _Known):
        return 0
    name, inputs = node.name, node.inputs
    if name in _MOVES:
        return _total(inputs)
    if name == "square" or (name == "integer_pow" and node.params["y"] == 2):
        return _of_square(inputs[0])
    if name == "mul":
        a, b = inputs
        if _same(a, b):
            return _of_square(a)
        return _weighted(a, b)
    if name == "div":
        a, b = inputs
        return _weighted(a, b) if isinstance(b, _Known) else None
    if name == "sub":
        return _squares(inputs[0]) if isinstance(inputs[1], _Known) else None
    if name == "dot_general":
        a, b = inputs
        (contracted, _), (batch, _) = node.params["dimension_numbers"]
        if _same(a, b) and node.size == 1 and not batch and len(contracted):
            return _of_square(a)
        return _weighted(a, b)
    return None


# These only move, add or copy numbers.
_MOVES = {
    "add",
    "add_any",
    "broadcast_in_dim",
    "concatenate",
    "convert_element_type",
    "copy",
    "reduce_sum",
    "reshape",
    "squeeze",
    "transpose",
}


def _total(nodes) -> int | None:
    total = 0
    for node in nodes:
        count = _squares(node)
        if count is None:
            return None
        total += count
    return total


def _of_square(base) -> int | None:
    # The square of a norm is the sum that it is the root of.
    return _squares(base.inputs[0]) if base.name == "sqrt" else base.size


def _weighted(a, b) -> int | None:
    """Squares times numbers that are not negative."""
    if isinstance(a, _Known):
        a, b = b, a
    if isinstance(a, _Known) or not isinstance(b, _Known):
        return None
    weights = np.asarray(jnp.asarray(b.value, float))
    return _squares(a) if np.all(weights >= 0) else None


def _same(a, b) -> bool:
    """Whether two nodes are the same value by construction."""
    if a is b:
        return not isinstance(a, _Known)
    if isinstance(a, _Known) or isinstance(b, _Known):
        return isinstance(a, _Known) and isinstance(b, _Known) and a.value is b.value
    alike = a.name == b.name and a.name in _PURE and a.size == b.size
    # The parameters of these are plain values.
    alike = alike and str(a.params) == str(b.params) and len(a.inputs) == len(b.inputs)
    return alike and all(_same(u, v) for u, v in zip(a.inputs, b.inputs, strict=True))


# The operations of which two copies are found to be the same.
_PURE = {"reshape", "convert_element_type", "squeeze", "transpose", "broadcast_in_dim"}
