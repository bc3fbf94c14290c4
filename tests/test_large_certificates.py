"""Certificates of problems whose inner Hessian is only multiplied with."""

import functools as ft

import jax
import jax.core
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

import bilevel_eqx as blx
from bilevel_eqx._linalg.eigenbasis import bidiagonal, block_lanczos


SIZE = 1100


#
# A matrix that counts how often it is multiplied with.
#

_counts = {"forward": 0, "transposed": 0}
_factor = np.random.default_rng(0).normal(size=(1050, SIZE)) / SIZE**0.5
_square = np.eye(SIZE)[::-1] + 0.1 * _factor[:1][:, ::-1].T @ _factor[:1]
_matrices = {"factor": _factor, "square": _square}
_product = Primitive("counted_product")


def _counted(vector, *, name, transposed):
    def count(_):
        _counts["transposed" if transposed else "forward"] += 1

    jax.debug.callback(count, vector[0])
    matrix = jnp.asarray(_matrices[name], vector.dtype)
    return vector @ matrix if transposed else matrix @ vector


@_product.def_abstract_eval
def _(vector, *, name, transposed):
    shape = _matrices[name].shape
    return jax.core.ShapedArray((shape[transposed],), vector.dtype)


@ft.partial(ad.deflinear2, _product)
def _(cotangent, vector, *, name, transposed):
    return [_product.bind(cotangent, name=name, transposed=not transposed)]


def _batched(args, axes, **parameters):
    rows = jnp.moveaxis(args[0], axes[0], 0)
    return jax.lax.map(lambda row: _product.bind(row, **parameters), rows), 0


batching.primitive_batchers[_product] = _batched
mlir.register_lowering(_product, mlir.lower_fun(_counted, multiple_results=False))


def _times(name, vector):
    return _product.bind(vector, name=name, transposed=False)


def _outer(x, y):
    return 0.5 * jnp.sum((y - 1) ** 2) + 0.5 * jnp.sum(x**2)


def _residual(x, y):
    return _times("factor", y) - x[0]


def _curved_residual(x, y):
    r = _residual(x, y)
    return r + 0.01 * jnp.sin(r)


def _half_square(residual):
    return lambda x, y: 0.5 * jnp.sum(residual(x, y) ** 2)


_kinds = {
    "plain": blx.BilevelProblem(_outer, _half_square(_residual)),
    "plain, curved": blx.BilevelProblem(_outer, _half_square(_curved_residual)),
    "squares": blx.LeastSquaresProblem(_outer, _residual),
    "squares, curved": blx.LeastSquaresProblem(_outer, _curved_residual),
    "root": blx.RootProblem(_outer, lambda x, y: _times("square", y) - x[0]),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", _kinds)
@pytest.mark.parametrize(
    "concept, max_products",
    (
        (blx.WarmStart(), 40),
        (blx.ColdStart(), 128),
        (blx.Optimistic(), 128),
        (blx.Stackelberg(), 128),
    ),
    ids=str,
)
def test_no_more_products_than_allowed(kind, concept, max_products):
    if kind == "root" and isinstance(concept, blx.ColdStart | blx.Optimistic):
        pytest.skip("for minima alone")
    problem, x, y = _kinds[kind], jnp.ones(1), jnp.full(SIZE, 0.1)
    options = dict(y0=jnp.zeros(SIZE), max_products=max_products)
    certified = jax.jit(lambda x, y: blx.certify(problem, concept, x, y, **options))
    _counts.update(forward=0, transposed=0)
    jax.block_until_ready(certified(x, y))
    jax.effects_barrier()
    # A product with H is one with the factor and one with its transpose, and as many for
    # what is curved. With a root it is the transpose that is counted separately.
    each = 2 if kind == "squares, curved" else 1
    total = _counts["forward"] + _counts["transposed"]
    allowed = max_products if kind == "root" else 2 * each * max_products
    # What evaluates f, its gradient and B^T is no product with H.
    assert total <= allowed + 8
    assert total >= 0.3 * allowed


#
# Displacements along directions of little curvature.
#


@pytest.mark.parametrize("squares", (pytest.param(True, marks=pytest.mark.slow), False))
@pytest.mark.parametrize("curvature", (1e-6, pytest.param(1e-3, marks=pytest.mark.slow)))
def test_a_step_that_the_gradient_hardly_shows(squares, curvature):
    """y is off by a percent along one eigenvector of H. F_y does not know it better than
    the others, and f_y is a percent of the curvature."""
    values = jnp.asarray(np.geomspace(1, curvature, SIZE))
    target = jnp.asarray(np.random.default_rng(0).normal(size=SIZE))

    def residual(x, y):
        return jnp.sqrt(values) * (y - x[0])

    def outer(x, y):
        return 0.5 * jnp.sum((y - target) ** 2)

    problem = blx.BilevelProblem(outer, _half_square(residual))
    if squares:
        problem = blx.LeastSquaresProblem(outer, residual)
    x = jnp.mean(target)[None]
    y = jnp.full(SIZE, x[0])
    length = 0.01 * jnp.linalg.norm(y)
    certificate = blx.certify(problem, blx.WarmStart(), x, y.at[-1].add(length))
    assert 3e-3 < certificate.residuals["inner"] < 3e-2
    known = blx.certify(problem, blx.WarmStart(), x, y)
    assert known.residuals["inner"] < 1e-14


#
# The curvature of F along S(x).
#


def _optimistic(across, along, lowest, rank=600, squares=False):
    """An inner problem of a given rank, its eigenvalues on the set between 1 and
    `lowest`, and the curvatures of F across S(x) and along it; at its equilibrium."""
    rng = np.random.default_rng(0)
    values = np.where(np.arange(SIZE) < rank, np.geomspace(1, lowest, SIZE), 0)
    bends = np.where(values > 0, across * rng.uniform(0.1, 1, SIZE), 1.0)
    bends[rank : rank + len(along)] = along
    target, normal = rng.normal(size=(2, SIZE))
    normal /= np.linalg.norm(normal)
    direction = np.where(values > 0, np.sin(np.arange(SIZE)), 0)
    weight = 10 + np.sum(np.abs(bends) * direction**2)
    x = np.sum(bends * direction * target) / (weight + np.sum(bends * direction**2))
    z = np.where(values > 0, direction * x, target)
    values, bends, target, normal, direction = map(
        jnp.asarray, (values, bends, target, normal, direction)
    )

    def mirrored(y):
        return y - 2 * normal * (normal @ y)

    def outer(x, y):
        square = jnp.sum(bends * (mirrored(y) - target) ** 2)
        return 0.5 * weight * x[0] ** 2 + 0.5 * square

    def residual(x, y):
        return jnp.sqrt(values) * (mirrored(y) - direction * x[0])

    problem = blx.BilevelProblem(outer, _half_square(residual))
    if squares:
        problem = blx.LeastSquaresProblem(outer, residual)
    return problem, jnp.array([x]), mirrored(jnp.asarray(z))


@pytest.mark.slow
@pytest.mark.parametrize(
    "squares, across, along, curvature",
    (
        # F is concave across S(x), where y cannot move.
        (False, -1.0, [], 0),
        (True, -1.0, [0.0], 0),
        # F is concave along one direction of S(x), or many.
        (False, -1.0, [-0.2], 0.2),
        (True, 1.0, [-1.0], 1.0),
        (False, -1.0, [-0.5] * 500, 0.5),
    ),
)
def test_curvature_along_a_large_set(squares, across, along, curvature):
    problem, x, y = _optimistic(across, along, 0.1, squares=squares)
    certificate = blx.certify(problem, blx.Optimistic(), x, y)
    found = certificate.residuals["curvature"]
    if curvature == 0:
        assert found == 0 and certificate.largest < 1e-12
    else:
        # Relative to the largest curvature of F, which is estimated from below.
        assert 0.99 * curvature < found < 1.3 * curvature
    assert certificate.accuracy < 1e-9
    assert any("Krylov space" in note for note in certificate.notes)


def _spheres(start, squares):
    """S(x) is a product of 20 spheres in 75 dimensions, with radii e^x. At the point that
    is the farthest along `start`, or the nearest to its opposite, and x stationary for
    it."""
    target = np.random.default_rng(0).normal(size=(20, 75))
    unit = start / np.linalg.norm(start, axis=1, keepdims=True)
    along = np.sum(unit * target, axis=1)

    def residual(x, y):
        return 0.5 * jnp.sum(y.reshape(20, 75) ** 2, axis=1) - 0.5 * jnp.exp(2 * x)

    def outer(x, y):
        square = jnp.sum((y - jnp.asarray(target.ravel())) ** 2)
        return 0.5 * square + 0.5 * jnp.sum(x**2)

    # d/dx of e^2x / 2 - e^x u.c + x^2 / 2 is zero.
    x = np.zeros(20)
    for _ in range(50):
        slope = np.exp(2 * x) - np.exp(x) * along + x
        x = x - slope / np.maximum(2 * np.exp(2 * x) - np.exp(x) * along + 1, 1)
    assert np.allclose(np.exp(2 * x) - np.exp(x) * along + x, 0, atol=1e-12)
    y = (np.exp(x)[:, None] * unit).ravel()
    problem = blx.BilevelProblem(outer, _half_square(residual))
    if squares:
        problem = blx.LeastSquaresProblem(outer, residual)
    return problem, jnp.asarray(x), jnp.asarray(y), target


@pytest.mark.slow
@pytest.mark.parametrize("squares", (False, True))
@pytest.mark.parametrize("sign", (1, -1))
@pytest.mark.parametrize("optimistic", (False, True))
def test_many_spheres(squares, sign, optimistic):
    """The nearest points on curved sets, and the farthest, in closed form."""
    start = np.random.default_rng(1).normal(size=(20, 75))
    if optimistic:
        start = _spheres(start, squares)[-1]
    problem, x, y, _ = _spheres(sign * start, squares)
    concept = blx.Optimistic() if optimistic else blx.ColdStart()
    anchor = jnp.asarray(start.ravel())
    certificate = blx.certify(problem, concept, x, y, y0=anchor)
    residuals = dict(certificate.residuals)
    curvature = residuals.pop("curvature")
    assert max(residuals.values()) < 1e-7 and certificate.accuracy < 1e-9
    # The farthest points are stationary, too.
    assert curvature == 0 if sign == 1 else curvature > 0.1


@pytest.mark.slow
def test_a_curvature_that_may_be_across_is_said_to_be_inaccurate():
    """F is concave where H is so small that few products do not tell it from zero."""
    problem, x, y = _optimistic(-1.0, [], 1e-4, rank=1050)
    certificate = blx.certify(problem, blx.Optimistic(), x, y)
    assert certificate.residuals["curvature"] > 0.1 and certificate.accuracy > 0.01
    assert "linear solves behind these" in str(certificate)


#
# The factorisations.
#


@pytest.mark.slow
def test_few_rows_are_decomposed():
    """A residual of few entries is known exactly, whatever its condition."""
    rng = np.random.default_rng(0)
    A = rng.normal(size=(20, SIZE)) * np.geomspace(1, 1e-6, 20)[:, None]
    b, target = rng.normal(size=20), rng.normal(size=SIZE)
    # F(y) = |y - target|^2 / 2 at y = A^+ (b x): dF/dx = (y - target) . A^+ b.
    step = np.linalg.pinv(A) @ b
    x = step @ target / (step @ step)
    A, b, target, y = map(jnp.asarray, (A, b, target, x * step))
    problem = blx.LeastSquaresProblem(
        lambda x, y: 0.5 * jnp.sum((y - target) ** 2), lambda x, y: A @ y - b * x[0]
    )
    certificate = blx.certify(problem, blx.WarmStart(), jnp.array([x]), y)
    assert certificate.largest < 1e-9 and certificate.accuracy < 1e-6


def _operator(matrix, symmetric=False):
    tags = lx.symmetric_tag if symmetric else ()
    return lx.MatrixLinearOperator(jnp.asarray(matrix), tags)


@pytest.mark.parametrize("curved", (False, True))
def test_a_krylov_space_with_its_image(curved):
    rng = np.random.default_rng(0)
    A, C = rng.normal(size=(30, 40)), rng.normal(size=(40, 40))
    C = C + C.T if curved else 0 * C
    starts = rng.normal(size=(3, 40))
    # The second is zero, and the third is the first: they take no steps.
    starts[1], starts[2] = 0, starts[0]
    known = bidiagonal(
        _operator(A), _operator(C, True) if curved else None, jnp.asarray(starts), 12
    )
    Q, P = np.asarray(known.right), np.asarray(known.left)
    assert np.allclose(Q @ Q.T, np.eye(12), atol=1e-12)
    assert np.allclose(P @ P.T, np.eye(12), atol=1e-12)
    # All of A on that space, to rounding.
    assert np.allclose(A @ Q.T, P.T @ known.image, atol=1e-12)
    assert np.allclose(np.tril(known.image, -1), 0)
    if curved:
        assert np.allclose(known.curvature, Q @ C @ Q.T, atol=1e-12)
    H = A.T @ A + C
    beyond = H @ Q.T - Q.T @ (Q @ H @ Q.T)
    sizes = np.linalg.norm(known.beyond, axis=0)
    assert np.allclose(sizes, np.linalg.norm(beyond, axis=0), atol=1e-10)
    # It is the space that Lanczos' method finds.
    basis, *_ = block_lanczos(_operator(H, True), jnp.asarray(starts[:1]), 12)
    assert np.allclose(Q.T @ Q, basis.T @ basis, atol=1e-6)


def test_a_krylov_space_that_is_all_there_is():
    A = np.random.default_rng(0).normal(size=(3, 9))
    starts = jnp.asarray(np.random.default_rng(1).normal(size=(1, 9)))
    known = bidiagonal(_operator(A), None, starts, 6)
    # The start has a part in the null space, so it takes four.
    assert np.allclose(np.sum(known.right**2, axis=1), [1, 1, 1, 1, 0, 0])
    assert np.allclose(np.sum(known.left**2, axis=1), [1, 1, 1, 0, 0, 0])
    values = np.linalg.svd(known.image, compute_uv=False)
    expected = np.linalg.svd(A, compute_uv=False)
    assert np.allclose(values, np.pad(expected, (0, 3)), atol=1e-12)
    assert np.allclose(known.beyond, 0, atol=1e-12)
