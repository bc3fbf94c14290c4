"""The eigenvectors of a matrix of low rank, against NumPy's of the whole matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_eqx as blx
from bilevel_eqx._linalg import low_rank
from bilevel_eqx._linalg.zero_curvature import rounding_of
from bilevel_eqx._solution_set.picture import flat_picture, restore


N = 160
MOST = N // 4


@jax.jit
def decomposed(matrix):
    values, rows, _ = low_rank.eigenvectors_of_low_rank(matrix, matrix)
    return values, rows


def matrix_of(eigenvalues, dtype, seed=0):
    """A matrix with these eigenvalues and otherwise zeros, and its eigenvectors."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(N, N)))[0][:, : len(eigenvalues)]
    return jnp.asarray((basis * np.asarray(eigenvalues)) @ basis.T, dtype), basis


def check(matrix, full=None):
    """What counts is NumPy's, and whether all of the matrix was decomposed."""
    values, rows = decomposed(matrix)
    true, vectors = np.linalg.eigh(np.asarray(matrix, np.float64))
    largest = np.max(np.abs(true), initial=0)
    rounding = float(rounding_of(jnp.asarray(largest, matrix.dtype), N))
    counts = np.abs(np.asarray(values)) > rounding
    np.testing.assert_array_equal(counts, np.abs(true) > rounding)
    np.testing.assert_allclose(values[counts], true[counts], atol=rounding)
    # Its eigenvectors may be rotated among equal eigenvalues, but not what they span.
    kept = np.asarray(rows)[counts]
    np.testing.assert_allclose(kept @ kept.T, np.eye(len(kept)), atol=rounding / largest)
    gap = np.min(np.abs(true[counts]), initial=largest)
    span = vectors[:, counts] @ vectors[:, counts].T
    np.testing.assert_allclose(kept.T @ kept, span, atol=4 * rounding / gap)
    if full is not None:
        assert np.all(np.sum(np.asarray(rows) ** 2, axis=1) > 0.5) == full


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_ranks(dtype):
    rng = np.random.default_rng(1)
    for rank in (1, 2, 7, MOST):
        matrix, _ = matrix_of(10 ** rng.uniform(-2, 2, rank), dtype, rank)
        check(matrix, full=False)
    for rank in (MOST + 1, N // 2, N):
        matrix, _ = matrix_of(10 ** rng.uniform(-2, 2, rank), dtype, rank)
        check(matrix, full=True)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_in_any_unit_and_with_rounding(dtype, scale):
    matrix, _ = matrix_of([3.0, 3.0, 1.0, 1e-3], dtype)
    noise = np.random.default_rng(2).normal(size=(N, N))
    noise = noise + noise.T
    noise *= 3.0 * jnp.finfo(dtype).eps / np.linalg.norm(noise, 2)
    check(scale * (matrix + jnp.asarray(noise, dtype)), full=False)
    # The most that Hessians by automatic differentiation have.
    check(scale * (matrix + jnp.asarray(3 * noise, dtype)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_no_eigenvalue_is_lost(dtype):
    """Spread over all entries, an eigenvalue is far less than rounding on the diagonal,
    and yet it counts."""
    rounding = float(rounding_of(jnp.ones((), dtype), N))
    matrix, basis = matrix_of([1.0], dtype)
    spread = np.ones(N) - basis[:, 0] * np.sum(basis[:, 0])
    spread /= np.linalg.norm(spread)
    for value in (3 * rounding, -3 * rounding):
        hidden = jnp.asarray(value * np.outer(spread, spread), dtype)
        assert np.max(np.abs(np.diagonal(hidden))) < 4 * jnp.finfo(dtype).eps
        check(matrix + hidden, full=True)


def test_negative_zero_and_nan():
    for eigenvalues in ([2.0, -1.0], [-1.0], [-3.0, 1e-3]):
        check(matrix_of(eigenvalues, jnp.float64)[0], full=True)
    # Only off its diagonal.
    matrix = jnp.zeros((N, N)).at[0, 1].set(1.0).at[1, 0].set(1.0)
    check(matrix, full=True)
    values, rows = decomposed(jnp.zeros((N, N)))
    assert not jnp.any(values) and jnp.all(jnp.isfinite(rows))
    values, _ = decomposed(matrix.at[3, 3].set(jnp.nan))
    assert jnp.isnan(values[-1])


def test_a_small_matrix_is_decomposed():
    matrix, other = jnp.diag(jnp.arange(5.0)), jnp.diag(jnp.arange(5.0, 10.0))
    values, rows, forms = low_rank.eigenvectors_of_low_rank(matrix, other)
    np.testing.assert_allclose(values, np.arange(5.0), atol=1e-15)
    np.testing.assert_allclose(jnp.abs(rows), np.eye(5), atol=1e-15)
    np.testing.assert_allclose(forms, np.arange(5.0, 10.0), atol=1e-14)


@pytest.mark.parametrize("rank", [2, MOST + 1])
def test_quadratic_forms_of_another_matrix(rank):
    matrix, _ = matrix_of(np.arange(1.0, rank + 1), jnp.float64)
    other, _ = matrix_of(np.linspace(-1.0, 2.0, N), jnp.float64, seed=1)
    values, rows, forms = jax.jit(low_rank.eigenvectors_of_low_rank)(matrix, other)
    true = np.sum(np.asarray(rows) @ np.asarray(other) * np.asarray(rows), axis=1)
    np.testing.assert_allclose(forms, true, atol=1e-12)
    # Of those that are left out there is none.
    assert np.sum(np.asarray(forms) != 0) == (rank if rank <= MOST else N)


def test_at_most_64_at_any_size():
    """OpenBLAS takes several threads for more, which wait for work at full speed."""
    wide = jnp.concatenate([jnp.arange(1.0, 66.0), jnp.zeros(4 * N - 65)])
    for rank, full in ((64, False), (65, True)):
        matrix = jnp.diag(wide.at[rank:].set(0.0))
        values, rows, _ = jax.jit(low_rank.eigenvectors_of_low_rank)(matrix, matrix)
        np.testing.assert_allclose(values[-rank:], jnp.arange(1.0, rank + 1), rtol=1e-13)
        assert bool(jnp.all(jnp.sum(rows**2, axis=1) > 0.5)) == full


def test_vmap():
    matrices = [matrix_of([2.0, u], jnp.float64)[0] for u in (1.0, -1.0)]
    values, rows = jax.vmap(decomposed)(jnp.stack(matrices))
    for i, matrix in enumerate(matrices):
        one_value, one_row = decomposed(matrix)
        np.testing.assert_allclose(values[i], one_value, atol=1e-14)
        spans = [u[jnp.abs(one_value) > 1e-8] for u in (rows[i], one_row)]
        spans = [u.T @ u for u in spans]
        np.testing.assert_allclose(*spans, atol=1e-13)


def _outputs(y):
    """Four curved functions of 160 variables."""
    rows = jnp.sin(jnp.outer(jnp.arange(1.0, 5.0), jnp.arange(1.0, N + 1.0)))
    return jnp.tanh(rows @ y / 10) + 0.1 * jnp.sum(y**2) / N


def test_a_picture_is_the_same_either_way():
    problem = blx.BilevelProblem(
        lambda x, y: jnp.sum((y - x[0]) ** 2),
        lambda x, y: 0.5 * jnp.sum((_outputs(y) - x) ** 2),
    )
    v = jnp.cos(jnp.arange(float(N)))
    x = _outputs(0.1 * v) + 0.01

    @jax.jit
    def pictures(y):
        for _ in range(2):
            y, *_ = restore(flat_picture(problem, x, y), y)
        found, num_zeros = [], []
        for on_set in (False, True):
            here = flat_picture(problem, x, y, on_set=on_set)
            clear = jnp.sort(jnp.abs(here.clearance()))[-5:]
            num_zeros.append(jnp.sum(here.inverse.values == 0))
            outer = here.outer()
            found.append((here.pinv(v), here.project(v), clear[1:], outer.hypergradient))
        return problem.inner(x, y), clear[0], num_zeros, found

    value, fifth, num_zeros, (whole, low_rank) = pictures(0.1 * v)
    # On the set, with four eigenvalues that count.
    assert value < 1e-25 and fifth < 1
    assert num_zeros[0] < N - MOST <= num_zeros[1]
    for one, other in zip(whole, low_rank):
        np.testing.assert_allclose(other, one, rtol=1e-8, atol=1e-10)
