import equinox as eqx
import jax
import jax.extend
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from helpers import (
    as_numpy,
    Counter,
    CountingOperator,
    dense_derivatives,
    dtypes,
    flatten,
    LinearBilevel,
    make_curved,
    make_features,
    make_linear,
    random_like,
    tolerance,
    tree_allclose,
    tree_has_dtype,
)

import bilevel_eqx as blx


def _symmetric(matrix, dtype=jnp.float64):
    return lx.MatrixLinearOperator(jnp.asarray(matrix, dtype), lx.symmetric_tag)


def _positive_definite(size=6, seed=0):
    """A random H whose eigenvalues are between 0.2 and 2."""
    rng = np.random.default_rng(seed)
    vectors = np.linalg.qr(rng.normal(size=(size, size)))[0]
    values = np.linspace(0.2, 2.0, size)
    return (vectors * values[None, :]) @ vectors.T, rng.normal(size=size)


def _neumann(matrix, vector, num_terms, step_size):
    """alpha sum_{j<K} (I - alpha H)^j b, term by term."""
    term, total = vector, np.zeros_like(vector)
    for _ in range(num_terms):
        total = total + step_size * term
        term = term - step_size * matrix @ term
    return total, np.linalg.norm(term) / np.linalg.norm(vector)


@eqx.filter_jit
def _solve(operator, vector, solver):
    solution = lx.linear_solve(operator, vector, solver, throw=False)
    return solution.value, solution.result, solution.stats


@eqx.filter_jit
def _solve_at(problem, x, y, vector, solver):
    """The same for the Hessian of a problem."""
    return _solve(blx.inner_hessian(problem, x, y), vector, solver)


#
# Neumann
#


@pytest.mark.parametrize("dtype", dtypes)
@pytest.mark.parametrize("num_terms", (1, 7, 100))
def test_neumann(num_terms, dtype):
    H, b = _positive_definite()
    expected, residual = _neumann(H, b, num_terms, 0.7)
    solver = blx.Neumann(num_terms, 0.7)
    value, result, stats = _solve(_symmetric(H, dtype), jnp.asarray(b, dtype), solver)
    assert tree_allclose(value, expected, rtol=tolerance(dtype))
    assert tree_allclose(stats["residual"], residual, rtol=tolerance(dtype))
    assert result == lx.RESULTS.successful
    assert tree_has_dtype((value, stats), dtype)


@pytest.mark.parametrize("num_terms", (1, 5, 17))
def test_neumann_takes_exactly_k_products(num_terms):
    H, b = _positive_definite()
    counter = Counter()
    operator = CountingOperator(jnp.asarray(H), counter)
    value, _, _ = _solve(operator, jnp.asarray(b), blx.Neumann(num_terms, 0.7))
    assert counter.read() == num_terms
    expected, _ = _neumann(H, b, num_terms, 0.7)
    assert tree_allclose(value, expected, rtol=1e-12)


def test_t2_limit():
    """The series tends to the inverse for 0 < alpha < 2 / lambda_max, and not beyond."""
    H, b = _positive_definite()
    inverse = np.linalg.solve(H, b)
    for step_size in (0.3, 0.9):
        solver = blx.Neumann(900, step_size)
        value, result, _ = _solve(_symmetric(H), jnp.asarray(b), solver)
        assert tree_allclose(value, inverse, rtol=1e-10)
        assert result == lx.RESULTS.successful
    solver = blx.Neumann(900, 1.01)
    _, result, stats = _solve(_symmetric(H), jnp.asarray(b), solver)
    assert result == lx.RESULTS.breakdown
    # What there is to say about it: the eigenvalue to blame, here 2.
    assert tree_allclose(stats["curvature"], 2.0, rtol=1e-6)
    assert stats["residual"] > 1e5


def test_t2_null_space():
    """On null(H) the sum grows as alpha K, and that is no divergence."""
    H = np.diag([1.0, 0.0])
    b = np.array([3.0, 5.0])
    for num_terms in (50, 2000):
        solver = blx.Neumann(num_terms, 0.5)
        value, result, _ = _solve(_symmetric(H), jnp.asarray(b), solver)
        assert tree_allclose(value, np.array([3.0, 2.5 * num_terms]), rtol=1e-12)
        assert result == lx.RESULTS.successful


@pytest.mark.parametrize("dtype", dtypes)
@pytest.mark.parametrize("num_terms", (1001, 1_000_000))
def test_neumann_of_many_terms(num_terms, dtype):
    """The closed form: every kind of eigenvalue that there is."""
    step_size = 0.5
    s = np.array([3.9, 3.0, 2.0, 1.2, 1e-1, 1e-3, 1e-6, 1e-9, 1e-13, 0.0])
    # (1 - alpha s)^K without cancellation.
    base = 1 - step_size * s
    with np.errstate(divide="ignore"):
        magnitude = np.exp(num_terms * np.log(np.abs(base)))
    power = np.sign(base) ** num_terms * magnitude
    stable = -np.expm1(num_terms * np.log1p(-np.where(base > 0, step_size * s, 0)))
    numerator = np.where(base > 0, stable, 1 - power)
    filtered = np.where(s > 0, numerator / np.where(s > 0, s, 1), num_terms * step_size)

    rng = np.random.default_rng(0)
    b = 1 + rng.uniform(size=s.size)
    solver = blx.Neumann(num_terms, step_size)
    value, result, stats = _solve(
        _symmetric(np.diag(s), dtype), jnp.asarray(b, dtype), solver
    )
    assert result == lx.RESULTS.successful
    assert tree_has_dtype((value, stats), dtype)
    # float32: 1 - alpha s is rounded, and then raised to the power of K.
    rtol = 1e-10 if dtype == jnp.float64 else 1e-3
    assert tree_allclose(value, filtered * b, rtol=rtol, atol=0)
    residual = np.linalg.norm(power * b) / np.linalg.norm(b)
    assert tree_allclose(stats["residual"], residual, rtol=1e-3)


def test_closed_form_is_the_sum():
    # Of a dense matrix, and for even and odd K: 1.2 * 2 > 1 has a negative base.
    H, b = _positive_definite()
    for num_terms in (1001, 1002):
        for step_size in (0.99, 0.01):
            expected, residual = _neumann(H, b, num_terms, step_size)
            solver = blx.Neumann(num_terms, step_size)
            value, _, stats = _solve(_symmetric(H), jnp.asarray(b), solver)
            assert tree_allclose(value, expected, rtol=1e-10)
            assert tree_allclose(stats["residual"], residual, rtol=1e-8)


def test_closed_form_diverges_too():
    H, b = _positive_definite()
    _, result, stats = _solve(_symmetric(H), jnp.asarray(b), blx.Neumann(5000, 1.01))
    assert result == lx.RESULTS.breakdown
    assert tree_allclose(stats["curvature"], 2.0, rtol=1e-12)


def test_many_terms_on_a_large_operator():
    # Too large to be diagonalised: the terms are summed after all.
    s = np.linspace(0.0, 1.9, 300)
    expected, _ = _neumann(np.diag(s), np.ones(300), 1001, 1.0)
    operator = lx.DiagonalLinearOperator(jnp.asarray(s))
    value, _, _ = _solve(operator, jnp.ones(300), blx.Neumann(1001, 1.0))
    assert tree_allclose(value, expected, rtol=1e-10)


def test_traced_num_terms():
    H, b = _positive_definite()
    operator, vector = _symmetric(H), jnp.asarray(b)

    def solve(num_terms, step_size):
        return _solve(operator, vector, blx.Neumann(num_terms, step_size))[0]

    num_terms = jnp.array([1, 2, 3, 10, 2000])
    step_sizes = jnp.array([0.7, 0.8, 0.9, 0.2, 0.5])
    values = jax.vmap(solve)(num_terms, step_sizes)
    for value, K, step_size in zip(values, num_terms, step_sizes):
        expected, _ = _neumann(H, b, int(K), float(step_size))
        assert tree_allclose(value, expected, rtol=1e-10)


@pytest.mark.parametrize(
    "solver", (blx.Neumann(4, 0.3), blx.Neumann(2000, 0.3), blx.IdentityInverse(0.4))
)
def test_transpose(solver):
    """Reverse mode is the transpose, which shows where the operator has no symmetry."""
    rng = np.random.default_rng(0)
    matrix = jnp.asarray(np.eye(4) + 0.3 * rng.normal(size=(4, 4)))
    operator = lx.MatrixLinearOperator(matrix)

    @eqx.filter_jit
    def both(operator, solver):
        # The columns are the solves; the rows are what reverse mode makes of them.
        inverse = lx.invert(operator, solver)
        return inverse.as_matrix(), inverse.T.as_matrix()

    columns, rows = both(operator, solver)
    assert tree_allclose(rows, columns.T, rtol=1e-12)
    if isinstance(solver, blx.Neumann):
        expected, _ = _neumann(matrix, np.eye(4), solver.num_terms, 0.3)
        assert tree_allclose(columns, expected, rtol=1e-10)


#
# Truncated conjugate gradients
#


def _krylov(matrix, vector, num_steps):
    """The minimum of 1/2 q^T H q - b^T q over span{b, Hb, ..., H^(K-1) b}."""
    columns = [vector]
    for _ in range(num_steps - 1):
        columns.append(matrix @ columns[-1] / np.linalg.norm(columns[-1]))
    basis = np.linalg.qr(np.stack(columns, axis=1))[0]
    return basis @ np.linalg.solve(basis.T @ matrix @ basis, basis.T @ vector)


@pytest.mark.parametrize("dtype", dtypes)
@pytest.mark.parametrize("num_steps", (1, 3, 6))
def test_truncated_cg(num_steps, dtype):
    H, b = _positive_definite()
    expected = _krylov(H, b, num_steps)
    value, result, stats = _solve(
        _symmetric(H, dtype), jnp.asarray(b, dtype), blx.TruncatedCG(num_steps)
    )
    assert tree_allclose(value, expected, rtol=5 * tolerance(dtype))
    residual = np.linalg.norm(b - H @ expected) / np.linalg.norm(b)
    assert tree_allclose(stats["residual"], residual, rtol=5 * tolerance(dtype))
    assert stats["num_steps"] == num_steps
    assert result == lx.RESULTS.successful
    assert tree_has_dtype((value, stats), dtype)


@pytest.mark.parametrize("num_steps", (1, 5, 8))
def test_truncated_cg_takes_exactly_k_products(num_steps):
    # Not one more for the first residual, nor to stabilise it now and then.
    H, b = _positive_definite(size=30)
    counter = Counter()
    operator = CountingOperator(jnp.asarray(H), counter)
    _, _, stats = _solve(operator, jnp.asarray(b), blx.TruncatedCG(num_steps))
    assert counter.read() == num_steps == stats["num_steps"]


def test_truncated_cg_stops_when_converged():
    # Three distinct eigenvalues: three steps are enough, and then there is nothing left.
    H = np.diag([1.0, 1.0, 2.0, 2.0, 3.0])
    b = np.arange(1.0, 6.0)
    counter = Counter()
    operator = CountingOperator(jnp.asarray(H), counter)
    value, result, _ = _solve(operator, jnp.asarray(b), blx.TruncatedCG(1000))
    assert tree_allclose(value, b / np.diag(H), rtol=1e-14)
    assert counter.read() <= 6
    assert result == lx.RESULTS.successful


@pytest.mark.parametrize("dtype", dtypes)
@pytest.mark.parametrize("num_steps", (3, 4, 100))
def test_truncated_cg_on_a_singular_operator(num_steps, dtype):
    """K past convergence, where the textbook method divides zero by zero."""
    features = make_features()
    H = features.T @ features
    in_range = features.T @ np.array([1.0, -2.0, 0.5])
    value, result, _ = _solve(
        _symmetric(H, dtype), jnp.asarray(in_range, dtype), blx.TruncatedCG(num_steps)
    )
    expected = np.linalg.pinv(H) @ in_range
    assert tree_allclose(value, expected, rtol=5 * tolerance(dtype))
    assert result == lx.RESULTS.successful


@pytest.mark.parametrize("dtype", dtypes)
@pytest.mark.parametrize("num_steps", (7, 8, 100))
def test_truncated_cg_outside_of_the_range(num_steps, dtype):
    """The usual case of an overparameterised problem: B has the range of H and F_y has
    not. The part of the answer that B^T keeps must be right nonetheless."""
    features = make_features()
    H = features.T @ features
    b = np.array([1.0, -2.0, 0.5, 3.0, -1.0])
    value, result, stats = _solve(
        _symmetric(H, dtype), jnp.asarray(b, dtype), blx.TruncatedCG(num_steps)
    )
    expected = features @ np.linalg.pinv(H) @ b
    # Rounding is amplified by how far the residual grew on the way.
    rtol = 1e-9 if dtype == jnp.float64 else 1e-2
    assert tree_allclose(features @ as_numpy(value), expected, rtol=rtol)
    assert np.all(np.isfinite(value))
    assert np.isfinite(stats["residual"])
    assert result == lx.RESULTS.successful


@pytest.mark.parametrize("dtype", dtypes)
def test_truncated_cg_on_zero(dtype):
    # Nothing to solve for, and nothing to solve with.
    solver = blx.TruncatedCG(5)
    eye, zero = _symmetric(np.eye(3), dtype), _symmetric(np.zeros((3, 3)), dtype)
    ones, zeros = jnp.ones(3, dtype), jnp.zeros(3, dtype)
    for operator, vector in ((eye, zeros), (zero, ones), (zero, zeros)):
        value, _, stats = _solve(operator, vector, solver)
        assert tree_allclose(value, zeros, rtol=0)
        assert np.isfinite(stats["residual"])


def test_truncated_cg_meets_negative_curvature():
    solver = blx.TruncatedCG(10)
    # At the first direction of all there is no answer.
    _, result, stats = _solve(_symmetric(-np.eye(3)), jnp.ones(3), solver)
    assert result == lx.RESULTS.breakdown
    assert stats["negative_curvature"]
    # Later on there is what came before: here one step along b, whose curvature is
    # positive. The second direction has the curvature -1 in it.
    H, b = np.diag([4.0, -1.0]), np.array([1.0, 1.0])
    value, result, stats = _solve(_symmetric(H), jnp.asarray(b), solver)
    assert tree_allclose(value, _krylov(H, b, 1), rtol=1e-14)
    assert result == lx.RESULTS.successful
    assert stats["negative_curvature"]
    assert stats["num_steps"] == 2


@pytest.mark.parametrize("operator_scale", (1e-3, 1e-12, 1e12))
def test_truncated_cg_is_scale_invariant(operator_scale):
    """Finite and right in float32 and at a size where absolute tests fail."""
    size = 300_000
    scale = jnp.asarray(operator_scale, jnp.float32)
    structure = jax.ShapeDtypeStruct((size,), jnp.float32)
    operator = lx.FunctionLinearOperator(lambda v: scale * v, structure, lx.symmetric_tag)
    vector = jnp.ones(size, jnp.float32)
    value, result, _ = _solve(operator, vector, blx.TruncatedCG(10))
    assert tree_has_dtype(value, jnp.float32)
    expected = np.full(size, 1 / float(scale))
    assert tree_allclose(value / float(1 / scale), expected * float(scale), rtol=1e-5)
    assert result == lx.RESULTS.successful


@pytest.mark.parametrize("vector_scale", (1e-25, 1e25))
def test_truncated_cg_does_not_overflow(vector_scale):
    # The square of neither is a number in float32.
    H, b = _positive_definite()
    b = b * vector_scale
    value, _, _ = _solve(
        _symmetric(H, jnp.float32), jnp.asarray(b, jnp.float32), blx.TruncatedCG(6)
    )
    expected = np.linalg.solve(H, b)
    ours, theirs = as_numpy(value) / vector_scale, expected / vector_scale
    assert tree_allclose(ours, theirs, rtol=1e-4)


#
# The pseudoinverse
#


def _rank_deficient(kind):
    rng = np.random.default_rng(0)
    if kind == "symmetric":
        factor = rng.normal(size=(3, 6))
        return factor.T @ factor
    shape = {"tall": (9, 4), "wide": (4, 9), "square": (5, 5)}[kind]
    matrix = rng.normal(size=shape)
    # Of rank 3, whichever way.
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    values[3:] = 0
    return (left * values[None, :]) @ right


@pytest.mark.parametrize("dtype", dtypes)
@pytest.mark.parametrize("dense_size", (1024, 1))
@pytest.mark.parametrize("kind", ("symmetric", "tall", "wide"))
def test_pseudoinverse(kind, dense_size, dtype):
    matrix = _rank_deficient(kind)
    tags = lx.symmetric_tag if kind == "symmetric" else frozenset()
    operator = lx.MatrixLinearOperator(jnp.asarray(matrix, dtype), tags)
    # With a part outside of the range, which is to be ignored.
    b = np.random.default_rng(1).normal(size=matrix.shape[0])
    solver = blx.Pseudoinverse(dense_size=dense_size)
    value, result, stats = _solve(operator, jnp.asarray(b, dtype), solver)
    expected = np.linalg.pinv(matrix, rcond=1e-10) @ b
    rtol = 1e-10 if dtype == jnp.float64 else 2e-4
    assert tree_allclose(value, expected, rtol=rtol)
    assert result == lx.RESULTS.successful
    assert tree_has_dtype(value, dtype)
    if dense_size > 1:
        assert stats["rank"] == 3
    else:
        assert stats["num_steps"] > 0


@pytest.mark.parametrize("dense_size", (1024, 1))
def test_transpose_of_the_pseudoinverse(dense_size):
    matrix = _rank_deficient("square")
    operator = lx.MatrixLinearOperator(jnp.asarray(matrix))
    inverse = lx.invert(operator, blx.Pseudoinverse(dense_size=dense_size))
    expected = np.linalg.pinv(matrix, rcond=1e-10)

    @jax.jit
    def matrices():
        return inverse.as_matrix(), inverse.T.as_matrix()

    assert tree_allclose(matrices(), (expected, expected.T), rtol=1e-9)


def test_cutoff():
    # What counts as zero: by default rounding, or whatever one says.
    H, b = _symmetric(np.diag([1.0, 1e-3, 1e-20])), jnp.ones(3)
    value, _, stats = _solve(H, b, blx.Pseudoinverse())
    assert tree_allclose(value, np.array([1.0, 1e3, 0.0]), rtol=1e-12)
    assert stats["rank"] == 2
    value, _, stats = _solve(H, b, blx.Pseudoinverse(rcond=1e-2))
    assert tree_allclose(value, np.array([1.0, 0.0, 0.0]), rtol=1e-12)
    assert stats["rank"] == 1


@pytest.mark.parametrize("dense_size", (1024, 1))
def test_pseudoinverse_of_zero(dense_size):
    solver = blx.Pseudoinverse(dense_size=dense_size)
    value, result, _ = _solve(_symmetric(np.zeros((3, 3))), jnp.ones(3), solver)
    assert tree_allclose(value, np.zeros(3), rtol=0)
    assert result == lx.RESULTS.successful


def _make_wide(kind, num_weights=40):
    features = jnp.asarray(make_features(num_weights=num_weights))

    def residual(x, y):
        return features @ y - x

    def outer(x, y):
        return jnp.sum(y)

    x, y = jnp.ones(features.shape[0]), jnp.ones(num_weights)
    if kind == "general":
        inner = lambda x, y: 0.5 * jnp.sum(residual(x, y) ** 2)  # noqa: E731
        return blx.BilevelProblem(outer, inner), x, y
    return blx.LeastSquaresProblem(outer, residual), x, y


def _sizes(jaxpr):
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield variable.aval.size
        for inside in jax.extend.core.jaxprs_in_params(equation.params):
            yield from _sizes(inside)


@pytest.mark.parametrize("kind", ("general", "least squares"))
def test_matrix_free_materialises_nothing(kind):
    # Nor does a dense one form H where it is told of the residual's Jacobian.
    problem, x, y = _make_wide(kind)
    H = blx.inner_hessian(problem, x, y)
    size = H.in_size()

    def largest_array(dense_size):
        solver = blx.Pseudoinverse(dense_size=dense_size)
        jaxpr = jax.make_jaxpr(lambda v: _solve.__wrapped__(H, v, solver)[0])(y)
        return max(_sizes(jaxpr.jaxpr))

    assert largest_array(1) < size**2
    if kind == "least squares":
        assert largest_array(8) < size**2


@pytest.mark.parametrize("dtype", dtypes)
@pytest.mark.parametrize("dense_size", (1024, 1))
def test_pseudoinverse_of_a_factor(dense_size, dtype):
    """Through the residual's Jacobian, the condition number is not squared."""
    # cond(H) = 1e10 (or 1e6) would be beyond a decomposition of H.
    smallest = 1e-5 if dtype == jnp.float64 else 1e-3
    features = make_features(singular_values=(1.0, 0.3, smallest))

    def residual(x, y):
        return jnp.asarray(features, dtype) @ y - x

    problem = blx.LeastSquaresProblem(lambda x, y: jnp.sum(y), residual)
    x, y = jnp.ones(3, dtype), jnp.ones(5, dtype)
    target = np.array([0.5, -1.0, 2.0])
    solver = blx.Pseudoinverse(dense_size=dense_size)
    # H^+ Phi^T t = Phi^+ t.
    b = jnp.asarray(features.T @ target, dtype)
    value, result, _ = _solve_at(problem, x, y, b, solver)
    expected = np.linalg.pinv(features) @ target
    assert result == lx.RESULTS.successful
    assert tree_has_dtype(value, dtype)
    error = np.linalg.norm(as_numpy(value) - expected) / np.linalg.norm(expected)
    # b = Phi^T t is itself rounded, which costs what remains.
    assert error < (1e-5 if dtype == jnp.float64 else 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "dense_size, dtype",
    (
        (1024, jnp.float64),
        (1024, jnp.float32),
        (1, jnp.float64),
    ),
)
def test_curved_residual(dense_size, dtype, getkey):
    """The second derivatives of a nonlinear residual belong to H; without them, the
    answer here would be another by some per cent."""
    problem, x, y = make_curved(dtype)
    vector = random_like(getkey(), y)
    H_dense, _, _, _ = dense_derivatives(problem, x, y)
    expected = np.linalg.solve(H_dense, flatten(vector))
    solver = blx.Pseudoinverse(dense_size=dense_size)
    value, result, _ = _solve_at(problem, x, y, vector, solver)
    assert result == lx.RESULTS.successful
    assert tree_has_dtype(value, dtype)
    rtol = 1e-9 if dtype == jnp.float64 else 2e-4
    assert tree_allclose(flatten(value), expected, rtol=rtol)


@pytest.mark.slow
def test_derivatives_of_the_pseudoinverse():
    """With their null-space terms, of a matrix whose range moves."""
    left = jnp.asarray(make_features(seed=3))
    direction = jnp.asarray(make_features(seed=4))

    def matrix(t):
        # Of rank three for every t.
        factor = left + t * direction
        return factor.T @ factor

    b = jnp.array([1.0, -2.0, 0.5, 3.0, -1.0])
    solver = blx.Pseudoinverse()

    def solve(t):
        operator = lx.MatrixLinearOperator(matrix(t), lx.symmetric_tag)
        return lx.linear_solve(operator, b, solver).value

    def reference(t):
        # H^+ = A^+ (A^+)^T, A of full row rank: nothing but an inverse.
        factor = left + t * direction
        inverse = factor.T @ jnp.linalg.inv(factor @ factor.T)
        return inverse @ (inverse.T @ b)

    @eqx.filter_jit
    def derivatives(fn, t):
        return fn(t), jax.jacrev(fn)(t), jax.jacfwd(jax.jacrev(fn))(t)

    t = jnp.array(0.3)
    value, first, second = derivatives(solve, t)
    expected = derivatives(reference, t)
    assert tree_allclose(value, expected[0], rtol=1e-9)
    assert tree_allclose(first, expected[1], rtol=1e-8)
    assert tree_allclose(second, expected[2], rtol=1e-7)


#
# The identity
#


@pytest.mark.parametrize("dtype", dtypes)
def test_identity_inverse(dtype):
    H, b = _positive_definite()
    counter = Counter()
    operator = CountingOperator(jnp.asarray(H, dtype), counter)
    vector = jnp.asarray(b, dtype)
    value, result, _ = _solve(operator, vector, blx.IdentityInverse(0.25))
    assert counter.read() == 0
    assert tree_allclose(value, 0.25 * b, rtol=tolerance(dtype))
    assert result == lx.RESULTS.successful
    assert tree_has_dtype(value, dtype)
    # It is one Neumann term.
    value, _, _ = _solve(operator, vector, blx.Neumann(1, 0.25))
    assert tree_allclose(value, 0.25 * b, rtol=tolerance(dtype))


#
# All of them
#


def test_rates_do_not_recompile():
    H, b = _positive_definite()
    counter = Counter()

    @eqx.filter_jit
    def solve(operator, vector, solver):
        counter.tick()
        return lx.linear_solve(operator, vector, solver).value

    for scale in (0.1, 0.2, 0.3):
        solve(_symmetric(scale * H), jnp.asarray(b), blx.Neumann(3, scale))
        solve(_symmetric(scale * H), jnp.asarray(b), blx.IdentityInverse(scale))
    assert counter.read() == 2


def test_solvers_of_the_problem_and_of_a_matrix_agree():
    # The operators of a problem are lineax operators like any others.
    problem, x, y = make_linear(LinearBilevel, jnp.float64)
    features = as_numpy(problem.features)
    matrix = _symmetric(features.T @ features)
    for solver in (blx.Neumann(5, 0.4), blx.TruncatedCG(2), blx.Pseudoinverse()):
        ours, _, _ = _solve_at(problem, x, y, y, solver)
        theirs, _, _ = _solve(matrix, y, solver)
        assert tree_allclose(ours, theirs, rtol=1e-10)


def test_cg_keeps_its_digits_along_nearly_flat_directions():
    # Two eigenvalues that are close let a direction come up that is flat but for a few
    # digits. A step along it is so long that the rest of q is lost to rounding.
    rng = np.random.default_rng(101)
    worst = 0.0
    for values in ([0, 1, 1.0001, 2, 3], [0, 1, 1.01, 2, 30], [0, 1e-3, 1, 1.1, 2]):
        for _ in range(20):
            Q = np.linalg.qr(rng.normal(size=(5, 5)))[0]
            H, b = (Q * np.array(values)) @ Q.T, rng.normal(size=5)
            operator = lx.MatrixLinearOperator(jnp.asarray(H), lx.symmetric_tag)
            solution = lx.linear_solve(
                operator, jnp.asarray(b), blx.TruncatedCG(40), throw=False
            )
            in_range = b - Q[:, 0] * (Q[:, 0] @ b)
            error = np.linalg.norm(H @ solution.value - in_range) / np.linalg.norm(b)
            worst = max(worst, error)
    assert worst < 1e-4


def test_cg_reports_what_rounding_has_taken():
    # The recursion of the residual does not see it.
    rng = np.random.default_rng(0)
    Q = np.linalg.qr(rng.normal(size=(20, 20)))[0]
    H = ((Q * np.logspace(-6, 0, 20)) @ Q.T).astype(np.float32)
    b = rng.normal(size=20).astype(np.float32)
    operator = lx.MatrixLinearOperator(jnp.asarray(H), lx.symmetric_tag)
    solution = lx.linear_solve(
        operator, jnp.asarray(b), blx.TruncatedCG(200), throw=False
    )
    q = np.asarray(solution.value, np.float64)
    true = np.linalg.norm(H.astype(np.float64) @ q - b) / np.linalg.norm(b)
    assert true > 1e-4, "an exact solution proves nothing"
    assert 0.03 * true <= float(solution.stats["residual"]) <= 30 * true
