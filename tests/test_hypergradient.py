import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import optax
import optimistix as optx
import pytest
from helpers import (
    as_numpy,
    Counter,
    damped_jacobian,
    dense_derivatives,
    descend,
    finite_difference_gradient,
    finite_difference_jvp,
    flatten,
    linear_reference,
    LinearBilevel,
    LinearLeastSquares,
    make_linear,
    make_ridge,
    make_softmax,
    neumann_jacobian,
    project,
    random_like,
    resolve,
    Ridge,
    ridge_gradient,
    ridge_hessian,
    ridge_solution,
    STEP_SIZE,
    tolerance,
    tree_allclose,
    tree_dot,
    tree_has_dtype,
    tree_struct,
    value_and_both,
)

import bilevel_eqx as blx


slow = pytest.mark.slow
exact = blx.Implicit(blx.Projection(), lx.Cholesky())
# The same where the anchor is known to be a solution, with much less to compile.
at_solution = blx.Implicit(None, lx.Cholesky())
# Also with little to compile, for the ridge problems, whose curvature is at most 14.
descent = blx.GradientDescent(0.1, 400)


#
# Against closed forms, with both terms
#


def test_linear_closed_forms():
    """F_x + J^T F_y at the point of each response, for the J of each. (In float32, and
    for what is not known to be a sum of squares: `test_properties.test_hypergradient`.)
    """
    dtype = jnp.float64
    problem, x, anchor = make_linear(LinearLeastSquares, dtype)
    features = as_numpy(problem.features)
    pinv = np.linalg.pinv(features)
    damped = features.T @ features + 0.3 * np.eye(features.shape[1])
    pulled = features.T @ as_numpy(x) + 0.3 * as_numpy(anchor)
    for response, y, J in (
        (
            blx.Implicit(blx.Projection(), blx.Pseudoinverse()),
            project(features, x, anchor),
            pinv,
        ),
        (
            blx.Proximal(0.3, blx.Projection(), lx.Cholesky()),
            np.linalg.solve(damped, pulled),
            damped_jacobian(features, 0.3),
        ),
        (
            blx.Implicit(None, blx.Neumann(7, STEP_SIZE)),
            as_numpy(anchor),
            neumann_jacobian(features, 7, STEP_SIZE),
        ),
        (blx.Fixed(), as_numpy(anchor), 0 * pinv),
    ):
        out = blx.hypergradient(problem, x, anchor, response)
        expected = linear_reference(problem, x, y, J)
        assert tree_allclose(out.gradient, expected, rtol=10 * tolerance(dtype))
        assert tree_allclose(out.y, y, rtol=tolerance(dtype))
        value = problem.outer(x, jnp.asarray(y, dtype))
        assert tree_allclose(out.value, value, rtol=10 * tolerance(dtype))
        assert out.result == blx.RESULTS.successful
        numbers = out.value, out.gradient, out.y, out.stats["inner_residual"]
        assert tree_has_dtype(numbers, dtype)


def test_direct_term_alone():
    """With an outer objective that y is not in, what remains is F_x."""
    problem = blx.BilevelProblem(
        lambda x, y: jnp.sum(x**3), lambda x, y: 0.5 * jnp.sum((y - x) ** 2)
    )
    x = jnp.array([1.0, 2.0])
    out = blx.hypergradient(problem, x, x, exact)
    assert tree_allclose(out.gradient, 3 * x**2, rtol=1e-14)


def test_indirect_term_alone():
    problem = blx.BilevelProblem(
        lambda x, y: jnp.sum(y**3), lambda x, y: 0.5 * jnp.sum((y - 2 * x) ** 2)
    )
    x = jnp.array([1.0, 2.0])
    out = blx.hypergradient(problem, x, 0 * x, exact)
    assert tree_allclose(out.gradient, 2 * 3 * (2 * x) ** 2, rtol=1e-12)


def test_ridge():
    problem, x, anchor = make_ridge()
    value, gradient = ridge_gradient(problem, x)
    out = blx.hypergradient(problem, x, anchor, exact)
    assert tree_allclose(out.value, value, rtol=1e-10)
    assert tree_allclose(out.gradient, gradient, rtol=1e-10)


#
# Against finite differences through an accurate re-solve, on a nonlinear problem
#


def _softmax_responses():
    # Each with the map from x to y that it should be the derivative of.
    bfgs = optx.BFGS(rtol=1e-13, atol=1e-13)
    descent = blx.GradientDescent(0.6, 400)

    def proximal(problem, x, anchor):
        return resolve(problem, x, anchor, 0.4)

    def unrolled(problem, x, anchor):
        return descend(problem, x, anchor, 7, 0.5)

    return {
        "projection": (exact, resolve),
        "bfgs": (blx.Implicit(bfgs, lx.CG(1e-13, 1e-13)), resolve),
        "descent": (blx.Implicit(descent, blx.Neumann(2000, 0.6)), resolve),
        "proximal": (blx.Proximal(0.4, blx.Projection(), lx.Cholesky()), proximal),
        "checkpointed": (blx.Unrolled(optax.sgd(0.5), 7), unrolled),
        "reverse": (blx.Unrolled(optax.sgd(0.5), 7, "reverse"), unrolled),
        "forward": (blx.Unrolled(optax.sgd(0.5), 7, "forward"), unrolled),
    }


_softmax_outer = eqx.filter_jit(lambda problem, x, y: problem.outer(x, y))
_softmax_outer_x = eqx.filter_jit(lambda problem, x, y: jax.grad(problem.outer)(x, y))


@pytest.mark.parametrize(
    "name",
    (
        "projection",
        "proximal",
        "checkpointed",
        *(pytest.param(n, marks=slow) for n in ("bfgs", "descent", "reverse", "forward")),
    ),
)
def test_finite_differences(name):
    problem, x, y0 = make_softmax()
    anchor = jtu.tree_map(lambda u: 0.1 + u, y0)
    response, solution = _softmax_responses()[name]

    def value(x):
        return _softmax_outer(problem, x, solution(problem, x, anchor))

    expected = finite_difference_gradient(value, x)
    out = blx.hypergradient(problem, x, anchor, response)
    assert tree_struct(out.gradient) == tree_struct(x)
    assert tree_allclose(out.gradient, expected, rtol=1e-7, atol=1e-9)
    # BFGS itself ends with a residual of 1e-8.
    assert tree_allclose(out.value, value(x), rtol=1e-7)
    # Neither term is so small that it could be lost in the tolerance.
    direct = _softmax_outer_x(problem, x, out.y)
    assert np.linalg.norm(flatten(direct)) > 1e-2
    assert np.linalg.norm(flatten(out.gradient) - flatten(direct)) > 1e-2


# The proximal one is in `test_closed_over_values`.
@pytest.mark.parametrize("name", ("projection", "checkpointed"))
def test_best_response(name, getkey):
    """Differentiated in x and in the data, in both modes. The problem has integers
    among its leaves, too."""
    problem, x, y0 = make_softmax()
    anchor = jtu.tree_map(lambda u: 0.1 + u, y0)
    response, solution = _softmax_responses()[name]
    primals = x, problem.features
    tangents = random_like(getkey(), primals)

    def value_of(solve):
        def value(primals):
            x, features = primals
            changed = eqx.tree_at(lambda p: p.features, problem, features)
            return _softmax_outer(changed, x, solve(changed, x, anchor))

        return value

    @jax.jit
    def derivatives(primals, tangents):
        value = value_of(lambda *args: blx.best_response(*args, response))
        return value_and_both(value, (primals,), (tangents,))

    _, forward, (reverse,) = derivatives(primals, tangents)
    out = blx.hypergradient(problem, x, anchor, response)
    assert tree_allclose(reverse[0], out.gradient, rtol=1e-9)
    assert tree_allclose(forward, tree_dot(reverse, tangents), rtol=1e-9)
    expected = finite_difference_jvp(value_of(solution), primals, tangents)
    assert tree_allclose(forward, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ((2, 3), pytest.param((), marks=slow)), ids=str)
def test_best_response_of_an_array_of_any_shape(shape):
    r"""$f = \sum_i \cosh y_i - x_i y_i$, whose H depends on y, has its minimum at
    $\operatorname{arsinh} x$ and $\partial y / \partial x = (1 + x^2)^{-1/2}$."""
    problem = blx.BilevelProblem(
        lambda x, y: jnp.sum(y**2), lambda x, y: jnp.sum(jnp.cosh(y) - x * y)
    )
    size = int(np.prod(shape))
    x = jnp.linspace(-1.0, 2.0, size + 1)[1:].reshape(shape)
    y0, response = jnp.zeros(shape), blx.Implicit(blx.Projection(), blx.Pseudoinverse())
    y, slope = jax.jvp(
        lambda x: blx.best_response(problem, x, y0, response), (x,), (jnp.ones(shape),)
    )
    assert tree_allclose(y, np.arcsinh(x), rtol=1e-12)
    assert tree_allclose(slope, 1 / np.sqrt(1 + np.square(x)), rtol=1e-12)
    gradient = blx.hypergradient(problem, x, y0, response).gradient
    assert tree_allclose(gradient, 2 * y * slope, rtol=1e-12)


#
# Transformations
#


@pytest.mark.slow
def test_jit_and_vmap():
    problem, x, anchor = make_ridge()
    other, _, _ = make_ridge(seed=1)
    stacked = jtu.tree_map(lambda a, b: jnp.stack([a, b]), problem, other)
    xs, tangent = jnp.stack([x, x + 0.1]), jnp.array([1.0, -2.0, 0.5])

    @eqx.filter_jit
    @eqx.filter_vmap
    def gradients(problem, x):
        # Over problems, which have data in them, as well as over x.
        out = blx.hypergradient(problem, x, anchor, exact)

        def value(x):
            return problem.outer(x, blx.best_response(problem, x, out.y, at_solution))

        _, forward, (reverse,) = value_and_both(value, (x,), (tangent,))
        return out.value, out.gradient, reverse, forward

    found = gradients(stacked, xs)
    for i, problem in enumerate((problem, other)):
        value, gradient = ridge_gradient(problem, xs[i])
        expected = value, gradient, gradient, gradient @ tangent
        one = jtu.tree_map(lambda leaf, i=i: leaf[i], found)
        assert tree_allclose(one, expected, rtol=1e-10)


def test_scan():
    """A loop over the outer variables, as a program that uses it would have."""
    problem, x, anchor = make_ridge()

    def step(x, _):
        out = blx.hypergradient(problem, x, anchor, exact)
        return x - 0.1 * out.gradient, out.value

    found, values = jax.jit(lambda x: jax.lax.scan(step, x, None, length=3))(x)
    for i in range(3):
        value, gradient = ridge_gradient(problem, x)
        assert tree_allclose(values[i], value, rtol=1e-10)
        x = x - 0.1 * gradient
    assert tree_allclose(found, x, rtol=1e-10)


#
# Derivatives with respect to everything else
#


def test_influence_function(getkey):
    """How a datum moves the solution: (A^T A + D)^-1 applied to a_i, or to what the
    features do; in both modes."""
    problem, x, anchor = make_ridge()
    A, D = as_numpy(problem.features), np.diag(np.exp(as_numpy(x)))
    y = as_numpy(ridge_solution(problem, x))
    inverse = np.linalg.inv(A.T @ A + D)
    outer_y = as_numpy(jax.grad(problem.outer, argnums=1)(x, jnp.asarray(y)))

    def value(targets, features):
        changed = eqx.tree_at(
            lambda p: (p.targets, p.features), problem, (targets, features)
        )
        return problem.outer(x, blx.best_response(changed, x, anchor, exact))

    primals = problem.targets, problem.features
    tangents = random_like(getkey(), primals)
    derivatives = jax.jit(lambda *primals: value_and_both(value, primals, tangents))
    _, forward, reverse = derivatives(*primals)
    # dy/db_i = (A^T A + D)^-1 a_i; dy/da_i = (A^T A + D)^-1 ((b_i - a_i y) I - y a_i)^T.
    q = inverse @ outer_y
    misfit = as_numpy(problem.targets) - A @ y
    expected = A @ q, misfit[:, None] * q[None, :] - (A @ q)[:, None] * y[None, :]
    assert tree_allclose(reverse, expected, rtol=1e-10)
    assert tree_allclose(forward, tree_dot(expected, tangents), rtol=1e-10)


def test_filter_grad_of_a_problem():
    problem, x, y0 = make_softmax()
    y0 = resolve(problem, x, y0)

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(problem):
        y = blx.best_response(problem, x, y0, at_solution)
        return jnp.sum(y["weights"] ** 2)

    found = gradient(problem)
    # Integers have no derivative; the outer data do not matter to the inner solution.
    assert found.labels is None
    assert tree_allclose(found.outer_features, np.zeros((6, 2)), rtol=0)
    assert np.linalg.norm(found.features) > 1e-3


class Seeded(blx.AbstractBilevelProblem):
    """With a random key among its leaves, as a task that draws noise would have."""

    key: jax.Array

    def outer(self, x, y):
        return jnp.sum(y**2)

    def inner(self, x, y):
        return jnp.sum((y - x * jax.random.uniform(self.key, (2,))) ** 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make_key", (jax.random.key, pytest.param(jax.random.PRNGKey, marks=slow))
)
def test_key_in_a_problem(make_key):
    problem, x = Seeded(make_key(0)), jnp.array([1.0, 2.0])
    noise = jax.random.uniform(problem.key, (2,))

    y = noise * x

    @eqx.filter_jit
    def gradients(problem, x):
        def value(x):
            return problem.outer(x, blx.best_response(problem, x, y, at_solution))

        out = blx.hypergradient(problem, x, y, at_solution)
        return out.gradient, jax.grad(value)(x)

    expected = 2 * noise**2 * x
    assert tree_allclose(gradients(problem, x), (expected, expected), rtol=1e-12)


@jax.custom_vjp
def _square(v):
    return jnp.sum(v**2)


# Three times the derivative, to see that this one is made use of.
_square.defvjp(lambda v: (_square(v), v), lambda v, g: (6 * g * v,))


def test_derivatives_of_ones_own():
    """Objectives with a `jax.custom_vjp`, which has no forward mode."""
    problem = blx.BilevelProblem(
        lambda x, y: _square(y) + _square(x), lambda x, y: _square(y - 2 * x)
    )
    x = jnp.array([1.0, -2.0])
    out = blx.hypergradient(problem, x, 2 * x, at_solution)
    assert tree_allclose(out.gradient, 6 * x + 2 * 6 * 2 * x, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, structured",
    (
        ("implicit", False),
        pytest.param("implicit", True, marks=slow),
        ("proximal", True),
        ("unrolled", False),
    ),
)
def test_closed_over_values(name, structured):
    """What an objective closes over is differentiated with respect to, as well."""
    A = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)))
    x, anchor = jnp.array([0.3, -0.2, 0.1, 1.0]), jnp.array([0.1, 0.2, 0.3])
    epsilon, rate = 0.5, 0.1
    response = {
        "implicit": exact,
        "proximal": blx.Proximal(epsilon, blx.Projection(), lx.Cholesky()),
        "unrolled": blx.Unrolled(optax.sgd(rate), 3),
    }[name]

    def point(c):
        def inner_residual(x, y):
            return A @ y - c * x, jnp.sqrt(c) * y

        def inner(x, y):
            return 0.5 * sum(jnp.sum(r**2) for r in inner_residual(x, y))

        def outer(x, y):
            return jnp.sum(y)

        if structured:
            problem = blx.LeastSquaresProblem(outer, inner_residual)
        else:
            problem = blx.BilevelProblem(outer, inner)
        return blx.best_response(problem, x, anchor, response)

    def reference(c):
        features, at, y = map(as_numpy, (A, x, anchor))
        H, b = features.T @ features + c * np.eye(3), features.T @ at * c
        if name == "implicit":
            return np.linalg.solve(H, b)
        if name == "proximal":
            return np.linalg.solve(H + epsilon * np.eye(3), b + epsilon * y)
        for _ in range(3):
            y = y - rate * (H @ y - b)
        return y

    # Of a batch, so that the value closed over is a tracer of several kinds at once.
    @jax.jit
    @jax.vmap
    def derivatives(c):
        return value_and_both(lambda c: jnp.sum(point(c)), (c,), (jnp.ones_like(c),))

    cs = np.array([0.7, 1.4])
    value, forward, (reverse,) = derivatives(cs)
    # A step into the complex plane is a derivative without cancellation.
    expected = np.array([np.sum(reference(c + 1e-30j)) for c in cs])
    assert tree_allclose(value, np.real(expected), rtol=1e-12)
    assert tree_allclose(reverse, np.imag(expected) / 1e-30, rtol=1e-10)
    assert tree_allclose(forward, np.imag(expected) / 1e-30, rtol=1e-10)


def test_closed_over_values_without_jit():
    # Of a derivative alone, the value closed over is not the tracer of a program.
    x = jnp.array([1.0, 2.0])

    def point(c):
        problem = blx.BilevelProblem(
            lambda x, y: jnp.sum(y), lambda x, y: jnp.sum(jnp.cosh(y - c * x))
        )
        return blx.best_response(problem, x, c * x, blx.Implicit(None, lx.Cholesky()))

    c = jnp.array(3.0)
    assert tree_allclose(jax.jacfwd(point)(c), x, rtol=1e-12)
    assert tree_allclose(jax.grad(lambda c: jnp.sum(point(c)))(c), 3.0, rtol=1e-12)


@pytest.mark.slow
def test_hypergradient_of_closed_over_tracers():
    def gradient(c):
        problem = blx.BilevelProblem(
            lambda x, y: c * jnp.sum(y**2), lambda x, y: jnp.sum((y - c * x) ** 2)
        )
        x = jnp.array([1.0])
        return blx.hypergradient(problem, x, c * x, at_solution).gradient

    # c (c x)^2, differentiated by x.
    cs = jnp.array([1.0, 3.0])
    expected = 2 * cs[:, None] ** 3
    assert tree_allclose(jax.jit(jax.vmap(gradient))(cs), expected, rtol=1e-12)
    # A new function each time, and so nothing stale from the one before.
    for c, one in zip(cs, expected):
        assert tree_allclose(gradient(c), one, rtol=1e-12)


@pytest.mark.slow
def test_derivative_with_respect_to_the_anchor():
    """iMAML: z(x) = argmin f(z) + epsilon/2 |z - x|^2, whose anchor is the outer
    variable; in both modes."""
    problem, x, _ = make_ridge()
    epsilon = 0.6
    response = blx.Proximal(epsilon, descent, lx.Cholesky())
    anchor = jnp.array([0.4, -0.3, 0.2])

    def value(anchor):
        return problem.outer(x, blx.best_response(problem, x, anchor, response))

    # dz/da = epsilon (H + epsilon I)^-1.
    A, D = as_numpy(problem.features), np.diag(np.exp(as_numpy(x)))
    inverse = np.linalg.inv(A.T @ A + D + epsilon * np.eye(3))
    z = inverse @ (A.T @ as_numpy(problem.targets) + epsilon * as_numpy(anchor))
    *_, outer_y = dense_derivatives(problem, x, jnp.asarray(z))
    expected, tangent = epsilon * inverse @ outer_y, jnp.array([1.0, -2.0, 0.5])
    both = jax.jit(lambda a: value_and_both(value, (a,), (tangent,)))
    _, forward, (reverse,) = both(anchor)
    assert tree_allclose(reverse, expected, rtol=1e-10)
    assert tree_allclose(forward, expected @ as_numpy(tangent), rtol=1e-10)


def test_derivative_with_respect_to_the_anchor_of_the_others():
    problem, x, anchor = make_linear(LinearBilevel, jnp.float64)

    def jacobian(response):
        return jax.jit(jax.jacrev(lambda a: blx.best_response(problem, x, a, response)))(
            anchor
        )

    # Zero by definition, if implicit; the identity, if fixed.
    implicit = blx.Implicit(blx.Projection(), blx.Pseudoinverse())
    assert tree_allclose(jacobian(implicit), np.zeros((5, 5)), rtol=0)
    assert tree_allclose(jacobian(blx.Fixed()), np.eye(5), rtol=0)
    # The true one, (I - alpha H)^K, if unrolled.
    features = as_numpy(problem.features)
    step = np.eye(5) - STEP_SIZE * features.T @ features
    expected = np.linalg.matrix_power(step, 7)
    unrolled = jacobian(blx.Unrolled(optax.sgd(STEP_SIZE), 7))
    assert tree_allclose(unrolled, expected, rtol=1e-12)


@pytest.mark.slow
def test_derivative_with_respect_to_epsilon():
    problem, x, anchor = make_linear(LinearBilevel, jnp.float64)

    def point(epsilon):
        response = blx.Proximal(epsilon, blx.Projection(), lx.Cholesky())
        return blx.best_response(problem, x, anchor, response)

    def reference(epsilon):
        H = problem.features.T @ problem.features
        b = problem.features.T @ x + epsilon * anchor
        return jnp.linalg.solve(H + epsilon * jnp.eye(5), b)

    epsilon, weights = jnp.array(0.4), jnp.array([1.0, -0.5, 2.0, 0.3, -1.0])

    @jax.jit
    def both(epsilon):
        return value_and_both(
            lambda e: weights @ point(e), (epsilon,), (1.0 + 0 * epsilon,)
        )

    _, forward, (reverse,) = both(epsilon)
    expected = as_numpy(weights) @ as_numpy(jax.jit(jax.jacfwd(reference))(epsilon))
    assert tree_allclose((forward, reverse), (expected, expected), rtol=1e-10)


#
# Second derivatives
#


class RidgeLeastSquares(blx.AbstractLeastSquaresProblem):
    """`helpers.Ridge`, as a sum of squares."""

    ridge: Ridge

    def outer(self, x, y):
        return self.ridge.outer(x, y)

    def inner_residual(self, x, y):
        return self.ridge.features @ y - self.ridge.targets, jnp.exp(0.5 * x) * y


def _twice(first, second):
    return lambda fn: first(second(fn))


forward_over_reverse = _twice(jax.jacfwd, jax.jacrev)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, response, order",
    (
        ("general", blx.Implicit(descent, lx.Cholesky()), forward_over_reverse),
        pytest.param("general", at_solution, _twice(jax.jacrev, jax.jacrev), marks=slow),
        ("general", at_solution, _twice(jax.jacfwd, jax.jacfwd)),
        pytest.param(
            "general",
            blx.Implicit(None, blx.Pseudoinverse()),
            forward_over_reverse,
            marks=slow,
        ),
        ("least squares", blx.Implicit(None, blx.Pseudoinverse()), forward_over_reverse),
    ),
    ids=("solved", "reverse-reverse", "forward-forward", "pseudoinverse", "factor"),
)
def test_hessian(kind, response, order):
    """Of x -> F(x, best_response(x)): the rule itself must be differentiable."""
    ridge, x, anchor = make_ridge()
    problem = ridge if kind == "general" else RidgeLeastSquares(ridge)
    if response.solver is None:
        anchor = ridge_solution(ridge, x)

    def value(x):
        return problem.outer(x, blx.best_response(problem, x, anchor, response))

    hessian = jax.jit(order(value))(x)
    assert tree_allclose(hessian, ridge_hessian(ridge, x), rtol=1e-9)


@slow
def test_hessian_of_a_proximal_response():
    problem, x, anchor = make_ridge()
    epsilon = 0.4
    response = blx.Proximal(epsilon, descent, lx.Cholesky())

    def value(x):
        return problem.outer(x, blx.best_response(problem, x, anchor, response))

    def reference(x):
        A = problem.features
        H = A.T @ A + jnp.diag(jnp.exp(x)) + epsilon * jnp.eye(3)
        y = jnp.linalg.solve(H, A.T @ problem.targets + epsilon * anchor)
        return problem.outer(x, y)

    expected = jax.jit(jax.hessian(reference))(x)
    assert tree_allclose(jax.jit(jax.hessian(value))(x), expected, rtol=1e-9)


def test_hessian_of_an_unrolled_response():
    problem, x, anchor = make_ridge()
    response = blx.Unrolled(optax.sgd(0.05), 3)

    def value(x):
        return problem.outer(x, blx.best_response(problem, x, anchor, response))

    def reference(x):
        return problem.outer(x, descend(problem, x, anchor, 3, 0.05))

    expected = jax.jit(jax.hessian(reference))(x)
    assert tree_allclose(jax.jit(jax.hessian(value))(x), expected, rtol=1e-9)


@pytest.mark.slow
def test_mixed_second_derivative():
    """How a datum moves the hypergradient."""
    problem, x, anchor = make_ridge()

    def value(solve):
        def of(x, targets):
            changed = eqx.tree_at(lambda p: p.targets, problem, targets)
            return problem.outer(x, solve(changed, x))

        return jax.jit(jax.jacfwd(jax.grad(of), argnums=1))

    anchor = ridge_solution(problem, x)
    found = value(lambda p, x: blx.best_response(p, x, anchor, at_solution))
    expected = value(ridge_solution)
    arguments = x, problem.targets
    assert tree_allclose(found(*arguments), expected(*arguments), rtol=1e-9)


@pytest.mark.slow
def test_derivative_of_a_hypergradient():
    """`hypergradient` can be differentiated too, through the solution."""
    problem, x, anchor = make_ridge()

    def gradient(x):
        return blx.hypergradient(problem, x, anchor, exact).gradient

    expected = ridge_hessian(problem, x)
    assert tree_allclose(jax.jit(jax.jacfwd(gradient))(x), expected, rtol=1e-9)


#
# Three levels
#


class Middle(blx.AbstractBilevelProblem):
    """A problem whose inner objective contains the solution of a ridge problem."""

    bottom: Ridge
    anchor: jax.Array
    wanted: jax.Array
    solve: object = eqx.field(static=True)

    def outer(self, x, y):
        return jnp.sum((y - self.wanted) ** 2) + 0.1 * jnp.sum(x**3)

    def inner(self, x, y):
        z = self.solve(self.bottom, y)
        return 0.5 * jnp.sum((y - x) ** 2) + 0.3 * jnp.sum((z - self.wanted) ** 2)


@slow
def test_trilevel():
    """min_x F(x, y), y minimising over log-penalties what the ridge solution gives."""
    bottom, x, anchor = make_ridge()
    wanted = jnp.array([0.5, -0.2, 0.3])

    def solve(bottom, y):
        return blx.best_response(bottom, y, anchor, blx.Implicit(descent, lx.Cholesky()))

    problem = Middle(bottom, anchor, wanted, solve)
    reference = Middle(bottom, anchor, wanted, ridge_solution)

    # The middle problem in closed form, and then the implicit function theorem in
    # dense matrices.
    y = resolve(reference, x, x)
    H, B, outer_x, outer_y = dense_derivatives(reference, x, y)
    gradient = outer_x - B.T @ np.linalg.solve(H, outer_y)
    out = blx.hypergradient(problem, x, x, exact)
    assert tree_allclose(out.y, y, rtol=1e-10)
    assert tree_allclose(out.gradient, gradient, rtol=1e-9)


@pytest.mark.slow
def test_trilevel_of_unrolled_steps():
    """The same composition of other responses: all of it is one Python loop."""
    bottom, x, anchor = make_ridge()
    wanted = jnp.array([0.5, -0.2, 0.3])
    lower, upper = blx.Unrolled(optax.sgd(0.05), 3), blx.Unrolled(optax.sgd(0.3), 4)

    def solve(bottom, y):
        return blx.best_response(bottom, y, anchor, lower)

    def loop(bottom, y):
        return descend(bottom, y, anchor, 3, 0.05)

    problem = Middle(bottom, anchor, wanted, solve)
    reference = Middle(bottom, anchor, wanted, loop)

    def value(x):
        return reference.outer(x, descend(reference, x, jnp.zeros(3), 4, 0.3))

    out = blx.hypergradient(problem, x, jnp.zeros(3), upper)
    expected_value, expected = jax.jit(jax.value_and_grad(value))(x)
    assert tree_allclose(out.value, expected_value, rtol=1e-11)
    assert tree_allclose(out.gradient, expected, rtol=1e-10)


#
# Compilation
#


class Counting(blx.AbstractBilevelProblem):
    """Counts how often it is traced. (Several times for each compilation.)"""

    ridge: Ridge
    counter: Counter = eqx.field(static=True)

    def outer(self, x, y):
        self.counter.tick()
        return self.ridge.outer(x, y)

    def inner(self, x, y):
        return self.ridge.inner(x, y)


def _with_rate(name, rate):
    projection = blx.Projection()
    return {
        "neumann": lambda: blx.Implicit(None, blx.Neumann(5, rate)),
        "identity": lambda: blx.Implicit(None, blx.IdentityInverse(rate)),
        "descent": lambda: blx.Implicit(
            blx.GradientDescent(rate, 5), lx.Cholesky(), tolerance=None
        ),
        "proximal": lambda: blx.Proximal(rate, projection, lx.Cholesky()),
        "unrolled": lambda: blx.Unrolled(optax.sgd(jnp.asarray(rate)), 3),
    }[name]()


@pytest.mark.parametrize(
    "name", ("neumann", "identity", "descent", "proximal", "unrolled")
)
def test_new_data_and_rates_do_not_recompile(name):
    counter = Counter()
    gradients = []
    for seed, rate in enumerate((0.01, 0.02, 0.03)):
        ridge, x, anchor = make_ridge(seed=seed)
        problem, anchor = Counting(ridge, counter), anchor + 1
        out = blx.hypergradient(problem, x + seed, anchor, _with_rate(name, rate))
        gradients.append(as_numpy(out.gradient))
        if seed == 0:
            assert counter.read() > 0
    assert counter.read() == 0
    # And they were made use of.
    assert np.linalg.norm(gradients[0] - gradients[1]) > 1e-6
    assert np.linalg.norm(gradients[1] - gradients[2]) > 1e-6


def test_best_response_does_not_recompile():
    counter = Counter()
    for seed in range(3):
        ridge, x, anchor = make_ridge(seed=seed)
        blx.best_response(Counting(ridge, counter), x, anchor, exact)
        if seed == 0:
            assert counter.read() > 0
    assert counter.read() == 0


@pytest.mark.slow
def test_dtype_follows_the_data_and_not_the_rates():
    problem, x, anchor = make_ridge(jnp.float32)
    rate = jnp.asarray(0.05, jnp.float64)
    for name in ("neumann", "identity", "descent", "proximal", "unrolled"):
        # optax multiplies the rate and the gradient as they are.
        promotion = "standard" if name == "unrolled" else "strict"
        with jax.numpy_dtype_promotion(promotion):
            out = blx.hypergradient(problem, x, anchor, _with_rate(name, rate))
        assert tree_has_dtype((out.gradient, out.value, out.y), jnp.float32)


@eqx.filter_jit
def _made_use_of(answer, cotangent):
    pulled, *_ = answer.pullback(cotangent)
    return answer.jacobian.T.mv(cotangent), pulled


@pytest.mark.slow
def test_response_crosses_jit():
    """A response is a pytree: what it holds can be used outside of the program."""
    problem, x, anchor = make_linear(LinearBilevel, jnp.float64)
    pinv = np.linalg.pinv(as_numpy(problem.features))
    cotangent = jnp.arange(5.0)
    for response, J in (
        (blx.Implicit(blx.Projection(), blx.Pseudoinverse()), pinv),
        (
            blx.Unrolled(optax.sgd(STEP_SIZE), 7),
            neumann_jacobian(problem.features, 7, STEP_SIZE),
        ),
    ):
        answer = eqx.filter_jit(response)(problem, x, anchor)
        expected = J.T @ as_numpy(cotangent)
        # In a program of their own.
        product, pulled = _made_use_of(answer, cotangent)
        assert tree_allclose(product, expected, rtol=1e-10)
        assert tree_allclose(pulled, expected, rtol=1e-10)


@pytest.mark.parametrize(
    "response",
    (
        blx.Implicit(None, blx.Pseudoinverse()),
        blx.Proximal(0.5, None, blx.TruncatedCG(3)),
    ),
    ids=("implicit", "proximal"),
)
def test_one_number_each_in_different_shapes(response):
    # lineax takes a map from one number to another to be diagonal, and its product with
    # H to be symmetric, which asks for the same shape on both sides.
    problem = blx.BilevelProblem(
        lambda x, y: jnp.sum((y - 1) ** 2), lambda x, y: jnp.sum((y - jnp.sum(x)) ** 2)
    )
    out = blx.hypergradient(problem, jnp.ones(1), jnp.array(0.5), response)
    share = 1.0 if isinstance(response, blx.Implicit) else 2 / 2.5
    assert out.gradient.shape == (1,)
    assert np.allclose(out.gradient, -share)
