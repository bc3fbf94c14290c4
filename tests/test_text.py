"""Tables, and objects written as code."""

import jax
import jax.numpy as jnp
import lineax as lx
import optax
import pytest

import bilevel_eqx as blx
from bilevel_eqx._text import aligned, as_code


@pytest.mark.parametrize(
    "code",
    (
        "WarmStart()",
        "WarmStart(0.1)",
        "Pessimistic(2)",
        "Implicit(Projection(), Pseudoinverse())",
        "Implicit(None, TruncatedCG(20), max_steps=5)",
        "Implicit(Projection(max_steps=300), lx.SVD(), 0.5)",
        "Implicit(GradientDescent(0.5, 8), lx.CG(1e-06, 1e-06), None)",
        "Proximal(0.6, Projection(), TruncatedCG(100))",
        "MinimumDisplacement()",
        "MinimumDisplacement(selection_tolerance=None)",
        "Fixed()",
    ),
)
def test_code_makes_what_it_is_the_code_of(code):
    names = {**vars(blx), "lx": lx}
    assert as_code(eval(code, names)) == code


def test_what_does_not_know_how_it_was_made():
    response = blx.Unrolled(optax.sgd(0.05), 100)
    assert as_code(response) == "Unrolled(..., 100)"
    written = as_code(response, optimiser="optax.sgd(0.05)")
    assert written == "Unrolled(optax.sgd(0.05), 100)"
    many = blx.GradientDescent(jnp.array([0.1, 0.2]), 3)
    assert as_code(many) == "GradientDescent(..., 3)"
    assert as_code(blx.Pessimistic(within=lambda y: y)) == "Pessimistic(within=...)"
    assert as_code(blx.Pessimistic(within=jnp.tanh)) == "Pessimistic(within=...)"
    traced = []
    jax.jit(lambda e: traced.append(as_code(blx.WarmStart(e))))(0.5)
    assert traced == ["WarmStart(...)"]


def test_aligned():
    rows = [["", "a", "long"], ["name", "10", "b"]]
    assert aligned(rows) == ["       a  long", "name  10     b"]
    assert aligned(rows, "<", ruled=True) == [
        "      a   long",
        "----  --  ----",
        "name  10  b",
    ]
    assert aligned(rows, "><") == ["      a   long", "name  10  b"]
