"""Digests of programs: the same for the same program, and no others."""

import enum
import functools as ft
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import optax
import pytest

from bilevel_eqx._solve.digest import (
    digest_of_object,
    digest_of_program,
    digest_of_values,
    Unknown,
)


x = jnp.arange(1.0, 4.0)
data = np.linspace(0, 1, 100_000)
other_data = data.copy()
other_data[71_828] = np.nextafter(other_data[71_828], 2)


def _digest(fn):
    return digest_of_program(fn, (x,), ())


def _linear_solve(scale, tolerance=1e-8):
    def solve(v):
        struct = jax.eval_shape(lambda: v)
        tags = lx.positive_semidefinite_tag
        operator = lx.FunctionLinearOperator(lambda u: scale * u, struct, tags)
        return lx.linear_solve(operator, v, lx.CG(tolerance, tolerance)).value

    return solve


def _custom(body, derivative):
    fn = jax.custom_jvp(body)
    fn.defjvp(lambda primals, tangents: (body(*primals), derivative * tangents[0]))
    return fn


def _on_host(callback):
    return lambda v: jax.pure_callback(callback, jax.ShapeDtypeStruct((3,), v.dtype), v)


def _branch(one, other):
    return lambda v: jax.lax.cond(v[0] > 0, lambda: one * v, lambda: v - other)


# The two of each pair differ in nothing but what the name says.
different = {
    "closed-over array": (lambda v: v * jnp.ones(3), lambda v: v * jnp.zeros(3)),
    "last bit of much data": (
        lambda v: v * jnp.sum(jnp.asarray(data)),
        lambda v: v * jnp.sum(jnp.asarray(other_data)),
    ),
    "NumPy array": (lambda v: v * np.ones(3), lambda v: v * np.full(3, 2.0)),
    "Python float": (lambda v: v * 2.0, lambda v: v * 3.0),
    "sign of zero": (lambda v: v * 0.0, lambda v: v * -0.0),
    "random key": (
        lambda v: v + jr.normal(jr.key(0), (3,)),
        lambda v: v + jr.normal(jr.key(1), (3,)),
    ),
    "exponent": (lambda v: v**2, lambda v: v**3),
    "operation": (jnp.sin, jnp.cos),
    "operand": (lambda v: v - 2 * jnp.sin(v), lambda v: 2 * v - jnp.sin(v)),
    "branches swapped": (
        lambda v: jnp.where(v > 1, v, 0.0),
        lambda v: jnp.where(v > 1, 0.0, v),
    ),
    "branch of cond": (_branch(2.0, 3.0), _branch(2.0, 4.0)),
    "body of scan": (
        lambda v: jax.lax.scan(lambda c, u: (c + u, c), 0.0, v)[1],
        lambda v: jax.lax.scan(lambda c, u: (c * u, c), 0.0, v)[1],
    ),
    "length of a loop": (
        lambda v: jax.lax.fori_loop(0, 3, lambda i, u: 2 * u, v),
        lambda v: jax.lax.fori_loop(0, 4, lambda i, u: 2 * u, v),
    ),
    "axis": (
        lambda v: jnp.sum(jnp.outer(v, v), 0),
        lambda v: jnp.sum(jnp.outer(v, v), 1),
    ),
    "output": (lambda v: (v, 2 * v), lambda v: (2 * v, v)),
    "type": (lambda v: v, lambda v: v.astype(jnp.float32)),
    "precision": (
        lambda v: jnp.dot(v, v),
        lambda v: jnp.dot(v, v, precision="highest"),
    ),
    "operator of a linear solve": (_linear_solve(2.0), _linear_solve(3.0)),
    "tolerance of a linear solve": (_linear_solve(2.0), _linear_solve(2.0, 1e-4)),
    "function with a rule": (_custom(jnp.sin, 1.0), _custom(jnp.cos, 1.0)),
    "callback": (
        _on_host(lambda v: np.asarray(v) + 1),
        _on_host(lambda v: np.asarray(v) + 2),
    ),
    "data of a callback": (
        _on_host(ft.partial(np.add, np.ones(3))),
        _on_host(ft.partial(np.add, np.zeros(3))),
    ),
}


@pytest.mark.parametrize("name", different)
def test_different(name):
    one, other = map(_digest, different[name])
    assert one != other
    only_numbers = {"closed-over array", "last bit of much data", "NumPy array"}
    only_numbers |= {"Python float", "sign of zero", "random key", "branch of cond"}
    only_numbers |= {"operator of a linear solve"}
    if name in only_numbers:
        assert one.form == other.form
    assert list(map(_digest, different[name])) == [one, other]


def _named(v):
    """Of another name, with another comment."""
    # And of other lines.
    return jnp.sum(jnp.tanh(v) * 2.0) + jnp.ones(())


# Written twice, and so two objects each; or different in what does not count.
same = {
    "lambdas": (lambda v: v * jnp.ones(3) + 2, lambda u: u * jnp.ones(3) + 2),
    "name": (lambda v: jnp.sum(jnp.tanh(v) * 2.0) + jnp.ones(()), _named),
    "name of a jitted function": (jax.jit(lambda v: 2 * v), jax.jit(lambda u: 2 * u)),
    "derivative": (_custom(jnp.sin, 1.0), _custom(jnp.sin, 2.0)),
    "linear solve": (_linear_solve(2.0), _linear_solve(2.0)),
    "callback": (
        _on_host(lambda v: np.asarray(v) + 1),
        _on_host(lambda v: np.asarray(v) + 1),
    ),
    "memory": (
        jax.checkpoint(lambda v: jnp.sin(v)),
        jax.checkpoint(
            lambda v: jnp.sin(v), policy=jax.checkpoint_policies.everything_saveable
        ),
    ),
    "message": (
        lambda v: eqx.error_if(v, v[0] > 9, "one"),
        lambda v: eqx.error_if(v, v[0] > 9, "other"),
    ),
}


@pytest.mark.parametrize("name", same)
def test_same(name):
    one, other = map(_digest, same[name])
    assert one == other


def test_what_is_only_shown_does_not_count():
    log = []

    def loud(scale):
        def fn(v):
            jax.debug.callback(lambda u: log.append(scale), v)
            return 2 * v

        return fn

    assert _digest(loud(1)) == _digest(loud(2))


def test_a_log_of_a_callback_does_not_count():
    log = []

    def note(v):
        log.append(v)
        return np.asarray(v)

    before = _digest(_on_host(note))
    log.append("something")
    assert _digest(_on_host(note)) == before


def test_arguments_of_another_program():
    """Which of them is used where is seen, and one that is not known is refused."""
    seen = []

    def outside(a, b):
        fns = lambda v: a * v + b, lambda v: b * v + a
        seen.extend(digest_of_program(fn, (x,), (a, b)) for fn in (*fns, fns[0]))
        with pytest.raises(Unknown):
            digest_of_program(fns[0], (x,), (a,))
        return a

    jax.eval_shape(outside, x, x)
    assert seen[0] == seen[2] != seen[1]


def test_values():
    tree = {"a": jnp.ones(2), "b": 3, "c": "text", "key": jr.key(0)}
    digest = digest_of_values(tree)
    assert digest == digest_of_values({**tree, "a": np.ones(2)})
    numbers = {"a": jnp.zeros(2)}, {"b": 4}, {"key": jr.key(1)}
    forms = {"a": jnp.ones(3)}, {"a": jnp.ones(2, jnp.float32)}, {"b": 3.0}, {"c": 1.0}
    for change in numbers:
        other = digest_of_values({**tree, **change})
        assert other.form == digest.form and other.numbers != digest.numbers
    for change in forms:
        assert digest_of_values({**tree, **change}).form != digest.form


class _Colour(enum.Enum):
    RED = 1
    BLUE = 2


class _Pair(NamedTuple):
    one: object
    other: object


class _Module(eqx.Module):
    field: object


def _closure(value):
    return lambda v: v + value


def test_objects():
    objects = [
        *(None, 1, 1.0, True, "1", b"1", _Colour.RED, _Colour.BLUE, np.dtype(float)),
        *(float, jnp.sin, jnp.cos, (1, 2), [1, 2], (1, (2,)), ((1,), 2), {1: 2}, {1, 2}),
        *(_Pair(1, 2), _Pair(2, 1), _Module(1), _Module(_Module(1)), _closure(1)),
        *(_closure(2), _closure(_closure(1)), ft.partial(max, 1), ft.partial(min, 1)),
        *(np.add, np.subtract, jax.jit(_closure(1)), jax.jit(_closure(2))),
        *(optax.sgd(0.1), optax.sign_sgd(0.1), optax.sgd(0.2), optax.adam(0.1)),
        *(np.ones(2), np.zeros(2), np.ones(3), _Module(1).__init__, lambda v: v),
    ]
    digests = [digest_of_object(value) for value in objects]
    assert len(set(digests)) == len(objects)
    assert digest_of_object(optax.adam(0.1)) == digest_of_object(optax.adam(0.1))
    # One that contains itself has an end.
    loop = {}
    loop["loop"] = loop
    assert digest_of_object(loop) != digest_of_object({"loop": None})
