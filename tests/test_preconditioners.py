"""Preconditioners of conjugate gradients that are made of the parts of y."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import optax
import pytest
from helpers import as_numpy, tolerance, tree_allclose
from jaxtyping import Array

import bilevel_eqx as blx
from bilevel_eqx.pipelines import AbstractPreconditioner, Diagonal, Kronecker


one_is_slow = pytest.mark.parametrize(
    "dtype", (jnp.float32, pytest.param(jnp.float64, marks=pytest.mark.slow))
)


def _definite(rng, size, largest=9.0):
    vectors = np.linalg.qr(rng.normal(size=(size, size)))[0]
    return (vectors * np.geomspace(1, largest, size)) @ vectors.T


class Layered(blx.AbstractBilevelProblem):
    """H is A ⊗ G for a kernel of four axes, and diagonal for a vector and a number.

    The hypergradient of F = <c, y>, f = <y, H y> / 2 - <x, y> is H^-1 c.
    """

    left: Array
    right: Array
    diagonal: Array
    direction: dict[str, Array]

    def outer(self, x, y):
        return sum(jtu.tree_leaves(jtu.tree_map(jnp.vdot, self.direction, y)))

    def curvature(self, y):
        kernel = y["kernel"]
        matrix = self.left @ kernel.reshape(len(kernel), -1) @ self.right
        bias, scale = self.diagonal[1:] * y["bias"], self.diagonal[0] * y["scale"]
        return {"kernel": matrix.reshape(kernel.shape), "bias": bias, "scale": scale}

    def inner(self, x, y):
        products = jtu.tree_map(
            lambda u, v, w: 0.5 * jnp.vdot(u, v) - jnp.vdot(w, u), y, self.curvature(y), x
        )
        return sum(jtu.tree_leaves(products))


def _doubles(tree):
    return jtu.tree_map(as_numpy, tree)


def _layered(dtype):
    rng = np.random.default_rng(0)
    left, right = _definite(rng, 4), _definite(rng, 6)
    diagonal = np.geomspace(0.5, 40, 8)
    shapes = {"kernel": (4, 1, 2, 3), "bias": (7,), "scale": ()}
    c = {name: np.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    matrix = np.linalg.inv(left) @ c["kernel"].reshape(4, 6) @ np.linalg.inv(right)
    expected = {
        "kernel": matrix.reshape(shapes["kernel"]),
        "bias": c["bias"] / diagonal[1:],
        "scale": c["scale"] / diagonal[0],
    }
    cast = lambda tree: jtu.tree_map(lambda u: jnp.asarray(u, dtype), tree)  # noqa: E731
    problem = Layered(*cast((left, right, diagonal, c)))
    y = cast(expected)
    return problem, problem.curvature(y), y, expected


@eqx.filter_jit
def _answer(problem, x, y, solver):
    response = blx.Implicit(None, solver)
    return blx.hypergradient(problem, x, y, response, throw=False)


def test_a_kronecker_product_is_found():
    """Then P is H up to the damping, and one or two steps are enough. (In float64:
    `test_is_carried_in_a_run`.)"""
    dtype = jnp.float32
    problem, x, y, expected = _layered(dtype)
    out = _answer(problem, x, y, blx.TruncatedCG(2, preconditioner=Kronecker(40, 1e-6)))
    plain = _answer(problem, x, y, blx.TruncatedCG(2))
    gradient = _doubles(out.gradient)
    assert tree_allclose(gradient, expected, rtol=2e-3)
    assert out.gradient["kernel"].dtype == dtype
    assert not tree_allclose(_doubles(plain.gradient), expected, rtol=0.1, atol=0.1)


def _operator(matrix, dtype):
    matrix = jnp.asarray(matrix, dtype)
    return lx.MatrixLinearOperator(matrix, lx.positive_semidefinite_tag)


@one_is_slow
def test_a_diagonal_is_found(dtype):
    d = np.geomspace(1, 1e4, 12)
    b = np.ones(12)
    operator = _operator(np.diag(d), dtype)
    # One probe is enough, and the diagonal of a column is the same.
    for preconditioner in (Diagonal(1, 1e-3), Kronecker(1, 1e-3)):
        prepared = preconditioner.prepare(operator)
        z = preconditioner.precondition(prepared, jnp.asarray(b, dtype))
        assert z.dtype == dtype
        assert tree_allclose(as_numpy(z), b / (d + 1e-3), rtol=10 * tolerance(dtype))
    # Elsewhere the mean over signs is unbiased, with the variance that is stated.
    H = _definite(np.random.default_rng(1), 12)
    many = 4000
    found = as_numpy(Diagonal(many, 1.0).prepare(_operator(H, dtype)))
    variance = (np.sum(H**2, axis=1) - np.diag(H) ** 2) / many
    assert np.all(np.abs(found - np.diag(H)) < 4.5 * np.sqrt(variance))
    assert np.mean((found - np.diag(H)) ** 2 / variance) > 0.2


def test_always_positive_definite():
    """Also if H is not, or is not finite."""
    rng = np.random.default_rng(2)
    matrix = rng.normal(size=(12, 12))
    struct = jax.ShapeDtypeStruct((4, 3), jnp.float64)

    def operator(matrix):
        return lx.FunctionLinearOperator(
            lambda v: (matrix @ v.ravel()).reshape(v.shape), struct, lx.symmetric_tag
        )

    matrices = jnp.asarray([matrix + matrix.T, -np.eye(12), np.full((12, 12), np.nan)])
    for preconditioner in (Diagonal(3, 1e-2), Kronecker(3, 1e-2)):

        @jax.jit
        def inverse(matrix, preconditioner=preconditioner):
            prepared = preconditioner.prepare(operator(matrix))
            basis = jnp.eye(12).reshape(12, 4, 3)
            rows = jax.vmap(lambda r: preconditioner.precondition(prepared, r))(basis)
            return rows.reshape(12, 12)

        for found in map(inverse, matrices):
            assert tree_allclose(as_numpy(found), as_numpy(found).T, rtol=1e-9)
            assert np.linalg.eigvalsh(found)[0] > 0


@pytest.mark.slow
def test_is_carried_in_a_run():
    """P is kept for several solves, with the shapes of y."""
    problem, x, y, expected = _layered(jnp.float64)
    solver = blx.TruncatedCG(1, preconditioner=Kronecker(40, 1e-6), refresh_every=3)
    response = blx.Implicit(None, solver, carry_adjoint=True)
    pipeline = blx.GradientPipeline(response, optax.sgd(0.0))

    @eqx.filter_jit
    def run(problem, x, y):
        state = pipeline.init(problem, blx.WarmStart(), x, y, jax.random.key(0))

        def step(state, _):
            return pipeline.step(problem, blx.WarmStart(), state)[0], None

        return jax.lax.scan(step, state, length=5)[0]

    last = run(problem, x, y)
    assert last.inner_state.age == 5
    assert tree_allclose(_doubles(last.gradient), expected, rtol=1e-8)
    assert tree_allclose(_doubles(last.inner_state.adjoint), expected, rtol=1e-8)


class Exact(AbstractPreconditioner):
    """One of a user: the inverse itself."""

    def prepare(self, operator):
        return jnp.linalg.inv(operator.as_matrix())

    def precondition(self, prepared, r):
        return prepared @ r


def test_own_preconditioners_and_refusals():
    problem, x, y, expected = _layered(jnp.float64)
    out = _answer(problem, x, y, blx.TruncatedCG(1, preconditioner=Exact()))
    assert tree_allclose(_doubles(out.gradient), expected, rtol=1e-8)
    for kind in (Diagonal, Kronecker):
        with pytest.raises(ValueError, match="num_probes=...*must be at least one"):
            kind(0, 1.0)
        with pytest.raises(ValueError, match="damping=...*must be greater"):
            kind(2, 0.0)
