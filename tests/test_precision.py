"""Products of matrices on devices that round them to a few digits.

A CPU stands in for such a device: what is looked at is the program.
"""

import re

import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import bilevel_eqx as blx
from bilevel_eqx._linalg.precision import full_precision


def _logits(y):
    return jr.normal(jr.key(0), (40, 20), jnp.float32) @ y


def _problem():
    def inner(x, y):
        losses = jax.nn.logsumexp(_logits(y), axis=1) - _logits(y)[:, 0]
        return jnp.mean(losses) + 0.5 * jnp.sum(jnp.exp(x) * y**2)

    def outer(x, y):
        return jnp.mean(_logits(y)[:, 1] ** 2) + jnp.sum(x**2)

    return blx.BilevelProblem(outer, inner)


def _squares():
    def residual(x, y):
        return jnp.concatenate([_logits(y).ravel(), (y - x).ravel()])

    return blx.LeastSquaresProblem(lambda x, y: jnp.sum(_logits(y) ** 2), residual)


SMALL, LARGE = 3, 60


KRONECKER = blx.TruncatedCG(3, preconditioner=blx.pipelines.Kronecker(3, 0.1))


def _hypergradient(problem, linear_solver):
    response = blx.Implicit(None, linear_solver)
    return lambda x, y: blx.hypergradient(problem, x, y, response).gradient


def _gradient_of_response(problem):
    response = blx.Implicit(blx.Projection(), blx.Pseudoinverse())

    def composed(x, y):
        return jnp.sum(blx.best_response(problem, x, y, response) ** 2)

    return jax.grad(composed)


def _solve(problem):
    def run(x, y):
        return blx.solve(problem, blx.WarmStart(), x, y, num_steps=2).x

    return run


def _certify(problem, **options):
    def run(x, y):
        certificate = blx.certify(problem, blx.WarmStart(), x, y, **options)
        return certificate.residuals

    return run


def _jacobian(problem, linear_solver):
    def run(x, y):
        return blx.response_jacobian(problem, x, y, linear_solver).as_matrix()

    return run


def _precisions(fn, num_classes):
    """Those of the products of matrices in the program."""
    x = y = jnp.ones((20, num_classes), jnp.float32)
    text = jax.jit(fn).lower(x, y).as_text()
    found = []
    for line in text.splitlines():
        if "stablehlo.dot_general" in line:
            precision = re.search(r"precision = \[(\w+), (\w+)\]", line)
            found.append("DEFAULT" if precision is None else precision[1])
    assert len(found) > 0
    return set(found)


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


@pytest.mark.parametrize(
    "make",
    (
        lambda: _hypergradient(_problem(), blx.Pseudoinverse()),
        lambda: _hypergradient(_problem(), blx.TruncatedCG(3)),
        lambda: _hypergradient(_problem(), blx.Neumann(200, 0.1)),
        lambda: _hypergradient(_problem(), blx.pipelines.Nystrom(3, 0.1)),
        lambda: _hypergradient(_problem(), KRONECKER),
        lambda: _gradient_of_response(_squares()),
        lambda: _solve(_problem()),
        lambda: _jacobian(_squares(), blx.Pseudoinverse()),
    ),
)
def test_small_problems(on_a_gpu, make):
    assert _precisions(make(), SMALL) == {"HIGHEST"}


def test_large_problems(on_a_gpu):
    # Training takes what JAX has chosen, an audit does not.
    fast = _hypergradient(_problem(), blx.TruncatedCG(3))
    assert _precisions(fast, LARGE) == {"DEFAULT"}
    audit = _certify(_problem(), max_products=8)
    assert _precisions(audit, LARGE) == {"HIGHEST"}
    # What decomposes takes its own products exactly, and those of the objectives as they
    # come.
    squares = _hypergradient(_squares(), blx.Pseudoinverse())
    assert "HIGHEST" in _precisions(squares, LARGE)


def test_what_a_user_has_chosen(on_a_gpu):
    for make in (_certify(_problem()), _hypergradient(_problem(), blx.Pseudoinverse())):
        with jax.default_matmul_precision("default"):
            assert "DEFAULT" in _precisions(make, SMALL)


def test_on_a_cpu_nothing_changes(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    before = jax.config.jax_default_matmul_precision  # pyright: ignore
    with full_precision():
        assert jax.config.jax_default_matmul_precision == before  # pyright: ignore
    assert "DEFAULT" in _precisions(_certify(_problem()), SMALL)
