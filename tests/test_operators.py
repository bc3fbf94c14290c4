import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from helpers import (
    as_numpy,
    Counter,
    damped_jacobian,
    dense_derivatives,
    flatten,
    linear_problems,
    LinearBilevel,
    LinearLeastSquares,
    make_curved,
    make_linear,
    make_moving,
    make_ridge,
    make_softmax,
    moving_features,
    random_like,
    resolve,
    ridge_solution,
    tolerance,
    toy_a,
    tree_allclose,
    tree_dot,
    tree_has_dtype,
    tree_struct,
)

import bilevel_eqx as blx


makers = (make_softmax, make_curved, make_moving)


def _dense(problem, x, y):
    H, B, _, _ = dense_derivatives(problem, x, y)
    return H, B


@eqx.filter_jit
def _response_jacobian(problem, x, y, linear_solver, damping=0.0):
    """J and its transpose, as matrices. (In one program: eager operators are slow.)"""
    J = blx.response_jacobian(problem, x, y, linear_solver, damping=damping)
    return J.as_matrix(), J.T.as_matrix()


def _make_at(make, key, dtype):
    # Not at a minimum and not at zero, where some terms would vanish.
    problem, x, y = make(dtype)
    return problem, x, random_like(key, y)


@pytest.mark.parametrize(
    "make, dtype",
    (*((make, jnp.float64) for make in makers), (make_softmax, jnp.float32)),
)
def test_hessian_and_cross_derivative(make, dtype, getkey):
    problem, x, y = _make_at(make, getkey(), dtype)
    H_dense, B_dense = _dense(problem, x, y)
    tangent, vector = random_like(getkey(), x), random_like(getkey(), y)

    @eqx.filter_jit
    def products(problem, x, y):
        H = blx.inner_hessian(problem, x, y)
        B = blx.cross_derivative(problem, x, y)
        assert lx.is_symmetric(H)
        assert H.in_structure() == H.out_structure() == tree_struct(y)
        assert B.in_structure() == tree_struct(x)
        assert B.out_structure() == tree_struct(y)
        matrices = H.as_matrix(), B.as_matrix(), B.T.as_matrix()
        return matrices, (H.mv(vector), B.mv(tangent), B.T.mv(vector))

    matrices, (Hv, Bv, BTv) = products(problem, x, y)
    assert tree_has_dtype((matrices, Hv, Bv, BTv), dtype)
    rtol = tolerance(dtype)
    assert tree_allclose(matrices, (H_dense, B_dense, B_dense.T), rtol=rtol)
    # A product has the shape of y or x, leaf by leaf.
    assert tree_struct((Hv, Bv, BTv)) == tree_struct((y, y, x))
    v, t = flatten(vector), flatten(tangent)
    assert tree_allclose(flatten(Hv), H_dense @ v, rtol=rtol)
    assert tree_allclose(flatten(Bv), B_dense @ t, rtol=rtol)
    assert tree_allclose(flatten(BTv), B_dense.T @ v, rtol=rtol)


def test_sign_of_the_cross_derivative():
    # -Phi^T for the anti-distillation task: the paper's text has lost the sign.
    problem, x, y = make_linear(LinearBilevel, jnp.float64)
    B = blx.cross_derivative(problem, x, y)
    assert tree_allclose(B.as_matrix(), -problem.features.T, rtol=1e-14)


def test_tags():
    # Tags are static: nothing needs to be computed to see them.
    def hessian(make, **keywords):
        return eqx.filter_eval_shape(blx.inner_hessian, *make(), **keywords)

    assert not lx.is_positive_semidefinite(hessian(make_softmax))
    tags = {lx.positive_semidefinite_tag}
    for make in (make_softmax, make_curved):
        H = hessian(make, tags=tags)
        # Both: to lineax, the one does not imply the other.
        assert lx.is_positive_semidefinite(H)
        assert lx.is_symmetric(H)


@pytest.mark.parametrize("cls", linear_problems)
def test_operators_of_both_kinds_of_problem_agree(cls):
    problem, x, y = make_linear(cls, jnp.float64)

    @eqx.filter_jit
    def matrices(problem, x, y):
        H = blx.inner_hessian(problem, x, y)
        return H.as_matrix(), H.T.as_matrix(), lx.diagonal(H)

    features = as_numpy(problem.features)
    H = features.T @ features
    assert tree_allclose(matrices(problem, x, y), (H, H, np.diag(H)), rtol=1e-13)


@pytest.mark.parametrize("kind", ("general", "least squares"))
def test_linearised_once(kind):
    """However many products are taken, the objective is not evaluated again."""
    counter = Counter()

    def inner_residual(x, y):
        counter.when_run()
        return jnp.tanh(y) * x - 1

    def inner(x, y):
        return 0.5 * jnp.sum(inner_residual(x, y) ** 2)

    def outer(x, y):
        return jnp.sum(y)

    x, y = jnp.array(2.0), jnp.linspace(0.1, 0.9, 5)
    if kind == "general":
        problem, at_most = blx.BilevelProblem(outer, inner), 1
    else:
        # The residual is linearised as well as the gradient.
        problem, at_most = blx.LeastSquaresProblem(outer, inner_residual), 2

    H = blx.inner_hessian(problem, x, y)
    B = blx.cross_derivative(problem, x, y)
    assert 1 <= counter.read() <= at_most + 1
    for _ in range(3):
        H.mv(y)
        B.mv(x)
        B.T.mv(y)
    H.as_matrix()
    assert counter.read() == 0

    # And under jit, with the products in a loop.
    @eqx.filter_jit
    def products(problem, x, y, num_products):
        H = blx.inner_hessian(problem, x, y)
        return jax.lax.fori_loop(0, num_products, lambda _, v: 0.1 * H.mv(v), y)

    for num_products in (1, 50):
        products(problem, x, y, jnp.array(num_products))
        assert 1 <= counter.read() <= at_most


@pytest.mark.parametrize("num_terms", (1, 40))
def test_hypergradient_linearises_once(num_terms):
    counter = Counter()

    def inner(x, y):
        counter.when_run()
        return jnp.sum(jnp.cosh(y - x))

    problem = blx.BilevelProblem(lambda x, y: jnp.sum(y**2), inner)
    response = blx.Implicit(None, blx.Neumann(num_terms, 0.3))
    x = jnp.linspace(0.0, 1.0, 3)
    blx.hypergradient(problem, x, x + 0.1, response)
    # Once for H and B^T. Only the Jacobian needs B, and nobody asks for that.
    assert counter.read() == 1


@pytest.mark.slow
def test_operators_under_jit_and_vmap(getkey):
    problem, x, y = _make_at(make_softmax, getkey(), jnp.float64)

    @eqx.filter_jit
    def matrices(problem, x, y):
        H = blx.inner_hessian(problem, x, y)
        B = blx.cross_derivative(problem, x, y)
        J = blx.response_jacobian(problem, x, y, lx.Cholesky())
        return H.as_matrix(), B.as_matrix(), J.as_matrix()

    ys = [random_like(getkey(), y) for _ in range(3)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *ys)
    batched = eqx.filter_vmap(matrices, in_axes=(None, None, 0))(problem, x, stacked)
    for i, y in enumerate(ys):
        H, B = _dense(problem, x, y)
        expected = H, B, -np.linalg.solve(H, B)
        one = jax.tree.map(lambda leaf: as_numpy(leaf)[i], batched)
        assert tree_allclose(one, expected, rtol=1e-9)


#
# The response Jacobian
#

# Of a nonsingular Hessian, one that takes a matrix and one that takes products. CG,
# Cholesky, SVD and our own are in `test_properties.py`, and all others in
# `test_faults_derivatives.test_foreign_solvers_are_right_or_raise`, in both modes.
nonsingular_solvers = lx.LU(), lx.LSMR(rtol=1e-13, atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize(
    "linear_solver", nonsingular_solvers, ids=lambda solver: type(solver).__name__
)
def test_response_jacobian(linear_solver, getkey):
    problem, x, y = make_softmax()
    y = resolve(problem, x, y)
    H, B = _dense(problem, x, y)
    expected = -np.linalg.solve(H, B)
    tangent, cotangent = random_like(getkey(), x), random_like(getkey(), y)

    @eqx.filter_jit
    def products(problem, x, y, linear_solver):
        J = blx.response_jacobian(problem, x, y, linear_solver)
        assert J.in_structure() == tree_struct(x)
        assert J.out_structure() == tree_struct(y)
        return J.mv(tangent), J.T.mv(cotangent)

    push, pull = products(problem, x, y, linear_solver)
    assert tree_struct((push, pull)) == tree_struct((y, x))
    assert tree_allclose(flatten(push), expected @ flatten(tangent), rtol=1e-9)
    assert tree_allclose(flatten(pull), expected.T @ flatten(cotangent), rtol=1e-9)
    # The transpose is that of this very operator, not just of the exact one.
    forward, reverse = tree_dot(cotangent, push), tree_dot(pull, tangent)
    assert tree_allclose(forward, reverse, rtol=1e-10)


@pytest.mark.parametrize(
    "make, dtype", ((make_softmax, jnp.float64), (make_curved, jnp.float32))
)
def test_transpose_of_the_response_jacobian(make, dtype):
    problem, x, y = make(dtype)
    # Truncated, so that nothing agrees merely by being exact.
    J, JT = _response_jacobian(problem, x, y, blx.Neumann(3, 0.02))
    assert tree_has_dtype((J, JT), dtype)
    rtol = 1e-12 if dtype == jnp.float64 else 1e-5
    assert tree_allclose(JT, J.T, rtol=rtol)
    H, B = _dense(problem, x, y)
    identity = np.eye(H.shape[0])
    step = identity - 0.02 * H
    expected = -0.02 * (identity + step + step @ step) @ B
    assert tree_allclose(J, expected, rtol=tolerance(dtype))


def test_structures_of_the_transpose():
    problem, x, y = make_softmax()
    solver = blx.Neumann(3, 0.1)
    J = eqx.filter_eval_shape(blx.response_jacobian, problem, x, y, solver)
    assert J.T.in_structure() == J.out_structure() == tree_struct(y)
    assert J.T.out_structure() == J.in_structure() == tree_struct(x)


# Every combination of a problem, a type and a solver is in `test_properties.py`.
each_problem_and_type_once = pytest.mark.parametrize(
    "cls, dtype", ((LinearBilevel, jnp.float64), (LinearLeastSquares, jnp.float32))
)


@each_problem_and_type_once
def test_singular_hessian(cls, dtype):
    """The response Jacobian of an overparameterised problem is Phi^+."""
    problem, x, y = make_linear(cls, dtype)
    expected = np.linalg.pinv(as_numpy(problem.features))
    J, JT = _response_jacobian(problem, x, y, blx.Pseudoinverse())
    assert tree_has_dtype((J, JT), dtype)
    assert tree_allclose((J, JT), (expected, expected.T), rtol=tolerance(dtype))


@eqx.filter_jit
def _pull(problem, x, y, linear_solver):
    J = blx.response_jacobian(problem, x, y, linear_solver)
    return J.T.mv(jnp.ones_like(y))


@each_problem_and_type_once
def test_singular_hessian_matrix_free(cls, dtype):
    # The null space shows by the condition number that LSMR meets.
    problem, x, y = make_linear(cls, dtype)
    pulled = _pull(problem, x, y, blx.Pseudoinverse(dense_size=1))
    expected = np.linalg.pinv(as_numpy(problem.features)).sum(axis=0)
    assert tree_has_dtype(pulled, dtype)
    assert tree_allclose(pulled, expected, rtol=tolerance(dtype))


def test_singular_hessian_with_lineax():
    problem, x, y = make_linear(LinearBilevel, jnp.float64)
    expected = np.linalg.pinv(as_numpy(problem.features)).sum(axis=0)
    for solver in (lx.SVD(), lx.AutoLinearSolver(well_posed=False)):
        assert tree_allclose(_pull(problem, x, y, solver), expected, rtol=1e-10)


@pytest.mark.parametrize(
    "cls, linear_solver, dtype",
    (
        (LinearBilevel, lx.Cholesky(), jnp.float64),
        (LinearLeastSquares, lx.Cholesky(), jnp.float32),
        (LinearLeastSquares, blx.Pseudoinverse(), jnp.float64),
    ),
)
def test_damping(cls, linear_solver, dtype):
    # With damping, H is definite and Cholesky takes it: the tags are not lost.
    problem, x, y = make_linear(cls, dtype)
    expected = damped_jacobian(problem.features, 0.3)
    J, JT = _response_jacobian(problem, x, y, linear_solver, damping=0.3)
    assert tree_has_dtype((J, JT), dtype)
    assert tree_allclose((J, JT), (expected, expected.T), rtol=tolerance(dtype))


def test_traced_damping():
    problem, x, y = make_linear(LinearBilevel, jnp.float64)
    solver = blx.Pseudoinverse()
    dampings = jnp.array([0.0, 0.1, 1.0])
    Js, _ = jax.vmap(lambda d: _response_jacobian(problem, x, y, solver, d))(dampings)
    pinv = np.linalg.pinv(as_numpy(problem.features))
    damped = [damped_jacobian(problem.features, float(d)) for d in dampings[1:]]
    assert tree_allclose(Js, np.stack([pinv, *damped]), rtol=1e-10)


def test_identity_inverse():
    problem, x, y = make_linear(LinearBilevel, jnp.float64)
    J, _ = _response_jacobian(problem, x, y, blx.IdentityInverse(0.7))
    assert tree_allclose(J, 0.7 * problem.features.T, rtol=1e-14)


@pytest.mark.slow
def test_curved_residual_without_unique_solution():
    """-H^+ B where H = A^T A + C is singular, at zero residual."""
    problem, x, y = make_curved(penalised=False)
    hidden = jnp.tanh(problem.features @ y["weights"] + y["bias"])
    x = {**x, "targets": hidden * x["scale"]}
    H, B = _dense(problem, x, y)
    assert np.linalg.matrix_rank(H) == 3 < H.shape[0]
    expected = -np.linalg.pinv(H, rcond=1e-12) @ B
    J, JT = _response_jacobian(problem, x, y, blx.Pseudoinverse())
    assert tree_allclose((J, JT), (expected, expected.T), rtol=1e-9)
    # A multiple of ones in the leaves of y, so that the leaves cannot be confused.
    cotangent = {"weights": jnp.ones(4), "bias": jnp.array(-2.0)}

    @eqx.filter_jit
    def pull(problem, x, y):
        solver = blx.Pseudoinverse(dense_size=1)
        return blx.response_jacobian(problem, x, y, solver).T.mv(cotangent)

    pulled = flatten(pull(problem, x, y))
    assert tree_allclose(pulled, expected.T @ flatten(cotangent), rtol=1e-9)


def test_moving_feature():
    """T12, the part that -H^+ B has: -phi (phi'^T w) / |phi|^2 where phi^T w = t."""
    problem, x, w0 = make_moving()
    phi, slope = jax.jvp(moving_features, (x,), (jnp.ones_like(x),))
    w = w0 + phi * (problem.target - phi @ w0) / (phi @ phi)
    J, JT = _response_jacobian(problem, x, w, blx.Pseudoinverse())
    expected = -phi * (slope @ w) / (phi @ phi)
    assert tree_allclose(J, expected[:, None], rtol=1e-12)
    assert tree_allclose(JT, expected[None, :], rtol=1e-12)


def test_ridge():
    problem, x, _ = make_ridge()
    y = ridge_solution(problem, x)
    expected = jax.jacfwd(lambda x: ridge_solution(problem, x))(x)
    J, _ = _response_jacobian(problem, x, y, lx.Cholesky())
    assert tree_allclose(J, expected, rtol=1e-12)


def test_toy_a():
    # H = diag(1, 0): the second inner variable does not answer.
    problem, w, y = toy_a(), jnp.array(0.3), jnp.array([0.3, 0.0])
    for solver, damping, expected in (
        (blx.Pseudoinverse(), 0.0, 1.0),
        (blx.Neumann(3, 0.5), 0.0, 1 - 0.5**3),
        (lx.Cholesky(), 0.25, 1 / 1.25),
    ):
        J, _ = _response_jacobian(problem, w, y, solver, damping)
        assert tree_allclose(J, np.array([[expected], [0.0]]), rtol=1e-14)


#
# T3 and T5, on the operator
#


def test_t3_limits():
    """J_K tends to Phi^+ geometrically; J_epsilon tends to Phi^+ at O(epsilon)."""
    problem, x, y = make_linear(LinearBilevel, jnp.float64)
    pinv = np.linalg.pinv(as_numpy(problem.features))
    step_size, smallest = 0.4, 0.6**2

    def error(solver, damping=0.0):
        J, _ = _response_jacobian(problem, x, y, solver, damping)
        return np.linalg.norm(as_numpy(J) - pinv, 2)

    # Exactly (1 - alpha s)^K / sqrt(s), in the two-norm, for the flattest direction.
    for num_terms in (5, 20):
        expected = (1 - step_size * smallest) ** num_terms / 0.6
        found = error(blx.Neumann(num_terms, step_size))
        np.testing.assert_allclose(found, expected, rtol=1e-8)
    # Exactly 1/sqrt(s) - sqrt(s)/(s + epsilon), likewise.
    for epsilon in (1e-1, 1e-2):
        expected = 1 / 0.6 - 0.6 / (smallest + epsilon)
        found = error(blx.Pseudoinverse(), jnp.array(epsilon))
        np.testing.assert_allclose(found, expected, rtol=1e-8)


@pytest.mark.parametrize("num_terms", (20, 100_000))
def test_t5_neumann_against_damping(num_terms):
    """m_K / m_epsilon with epsilon = 1/(alpha K) is in [1, 2], and peaks at 1.2984."""
    step_size = 0.5
    curvatures = jnp.geomspace(1e-6, 1 / step_size, 100)

    def inner(x, y):
        return 0.5 * jnp.sum(curvatures * y**2) - jnp.sum(x * y)

    problem = blx.BilevelProblem(lambda x, y: jnp.sum(y), inner)
    x, y = jnp.ones_like(curvatures), jnp.zeros_like(curvatures)

    @eqx.filter_jit
    def filtered(solver, damping):
        J = blx.response_jacobian(problem, x, y, solver, damping=damping)
        return J.mv(jnp.ones_like(curvatures))

    neumann = filtered(blx.Neumann(num_terms, step_size), 0.0)
    damped = filtered(lx.Cholesky(), 1 / (step_size * num_terms))
    ratio = neumann / damped
    assert jnp.all(ratio >= 1 - 1e-10)
    assert jnp.all(ratio <= 2 + 1e-10)
    if num_terms == 100_000:
        assert tree_allclose(jnp.max(ratio), 1.2984, rtol=2e-3)


@pytest.mark.slow
def test_shapes_of_leaves_are_not_confused():
    # Leaves of equal sizes and different shapes, which a flat vector would mix up.
    def inner(x, y):
        matrix = jnp.sum((y["matrix"] - x["vector"].reshape(2, 3)) ** 2 * x["scale"])
        return matrix + jnp.sum((y["vector"] - x["vector"]) ** 2)

    problem = blx.BilevelProblem(lambda x, y: jnp.sum(y["vector"]), inner)
    vector = np.arange(6.0)
    x = {"vector": jnp.asarray(vector), "scale": jnp.array(2.0)}
    y = {"matrix": jnp.asarray(vector.reshape(2, 3) + 1), "vector": jnp.zeros(6)}

    @eqx.filter_jit
    def push(problem, x, y, tangent):
        return blx.response_jacobian(problem, x, y, lx.Cholesky()).mv(tangent)

    tangent = {"vector": jnp.asarray(vector**2), "scale": jnp.array(0.0)}
    expected = {"matrix": (vector**2).reshape(2, 3), "vector": vector**2}
    assert tree_allclose(push(problem, x, y, tangent), expected, rtol=1e-12)
    tangent = {"vector": jnp.zeros(6), "scale": jnp.array(1.0)}
    expected = {"matrix": np.full((2, 3), -0.5), "vector": np.zeros(6)}
    assert tree_allclose(push(problem, x, y, tangent), expected, rtol=1e-12)
