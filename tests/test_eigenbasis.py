"""Lanczos' method."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from helpers import dtypes

from bilevel_eqx._linalg.eigenbasis import block_lanczos, lanczos


def _run(values, num_steps, seed=0):
    values = jnp.asarray(values)
    structure = jax.ShapeDtypeStruct(values.shape, values.dtype)
    operator = lx.FunctionLinearOperator(
        lambda v: values * v, structure, lx.symmetric_tag
    )
    first = np.random.default_rng(seed).normal(size=values.size)
    first = jnp.asarray(first, values.dtype)
    out = jax.jit(lambda first: lanczos(operator, first, num_steps))(first)
    return tuple(np.asarray(u, np.float64) for u in out)


@pytest.mark.parametrize("dtype", dtypes)
def test_no_eigenvalue_comes_back(dtype):
    """Those far from the others converge within some steps, and from then on rounding
    brings their vectors back: without a remedy they are there several times."""
    outside = np.array([3.0, 5.0, 10.0, 20.0, 50.0])
    values = np.concatenate([np.geomspace(1e-6, 1, 1_995), outside]).astype(dtype)
    basis, found, rotation, _ = _run(values, 150)
    eps = np.finfo(dtype).eps
    assert np.max(np.abs(basis @ basis.T - np.eye(150))) < 10 * eps**0.75
    assert np.max(np.abs(found[-5:] - outside)) < 1e3 * eps * 50
    assert found[-6] <= 1 + 1e3 * eps
    vectors = basis.T @ rotation
    residual = values[:, None] * vectors - vectors * found
    # On a GPU only as exact as the basis is orthogonal.
    bound = 1e3 * eps if jax.default_backend() == "cpu" else 10 * eps**0.75
    assert np.max(np.abs(residual[:, -5:])) < bound * 50


@pytest.mark.parametrize("dtype", dtypes)
def test_a_krylov_space_that_ends(dtype):
    """Three eigenvalues: three vectors span it, and what comes after them is zero."""
    values = np.repeat([1.0, 2.0, 7.0], 40).astype(dtype)
    basis, found, _, last = _run(values, 10)
    tolerance = 100 * np.finfo(dtype).eps
    assert np.max(np.abs(basis[:3] @ basis[:3].T - np.eye(3))) < tolerance
    assert np.all(basis[3:] == 0) and last == 0
    distances = np.abs(found[:, None] - np.array([1.0, 2.0, 7.0]))
    assert np.all(distances.min(axis=0) < tolerance)
    assert 1 - tolerance < found.min() and found.max() < 7 + tolerance


def test_the_space_of_two_vectors():
    """It has both, unlike that of their sum; and one that adds nothing takes no steps."""
    rng = np.random.default_rng(0)
    values = np.geomspace(0.1, 1, 300)
    a, b = rng.normal(size=(2, 300))

    @jax.jit
    def run(starts):
        operator = lx.FunctionLinearOperator(
            lambda v: jnp.asarray(values) * v, jax.eval_shape(lambda: starts[0])
        )
        return block_lanczos(operator, starts, 80)

    def solved(v, first, second):
        starts = jnp.stack([jnp.asarray(first), jnp.asarray(second)])
        basis, ritz, rotation, errors = map(np.asarray, run(starts))
        V = basis.T @ rotation
        residual = np.linalg.norm(values[:, None] * V - V * ritz, axis=0)
        assert np.max(np.abs(errors - residual)) < 1e-13
        assert np.max(np.abs(basis @ basis.T - np.eye(80))) < 1e-13
        return np.linalg.norm(V @ ((V.T @ v) / ritz) - v / values)

    # Forty steps of conjugate gradients each, with a condition number of ten.
    bound = 2 * ((10**0.5 - 1) / (10**0.5 + 1)) ** 40 * 10 * np.linalg.norm(a)
    assert max(solved(v, a, b) for v in (a, b)) < bound
    # Eighty.
    for second in (0 * a, -3 * a):
        assert solved(a, a, second) < 1e-13 * np.linalg.norm(a / values)
