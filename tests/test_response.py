import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest
from helpers import (
    as_numpy,
    damped_jacobian,
    dense_derivatives,
    flatten,
    gradient_descent,
    LinearBilevel,
    LinearLeastSquares,
    make_linear,
    make_moving,
    make_softmax,
    moving_features,
    neumann_jacobian,
    project,
    random_like,
    resolve,
    STEP_SIZE,
    tolerance,
    toy_a,
    tree_allclose,
    tree_dot,
    tree_has_dtype,
    tree_struct,
)

import bilevel_eqx as blx


modes = ("checkpointed", "reverse", "forward")
slow = pytest.mark.slow


@eqx.filter_jit
def _respond(problem, x, anchor, response, state=None):
    """The point, J, its transpose, and the pullback of a basis of y; as matrices."""
    # By itself a response has the precision that JAX has: three digits on a GPU.
    with jax.default_matmul_precision("highest"):
        return _as_matrices(problem, x, anchor, response, state)


def _as_matrices(problem, x, anchor, response, state):
    answer = response(problem, x, anchor, state)
    J = answer.jacobian
    assert J.in_structure() == tree_struct(x)
    assert J.out_structure() == tree_struct(anchor)
    flat, unravel = jax.flatten_util.ravel_pytree(answer.y)

    def pull(basis_vector):
        pulled, *_ = answer.pullback(unravel(basis_vector))
        return jax.flatten_util.ravel_pytree(pulled)[0]

    # Not a matrix from the operator's own: what a hypergradient does.
    rows = jax.vmap(pull)(jnp.eye(flat.size, dtype=flat.dtype))
    return answer.y, (J.as_matrix(), J.T.as_matrix().T, rows), answer


def _check(problem, x, anchor, response, y, jacobian, rtol):
    """All three ways to the Jacobian, and the type of all that comes back."""
    found, jacobians, answer = _respond(problem, x, anchor, response)
    assert tree_allclose(flatten(found), flatten(y), rtol=rtol)
    assert tree_allclose(jacobians, (jacobian, jacobian, jacobian), rtol=rtol)
    dtype = jax.tree.leaves(x)[0].dtype
    assert tree_has_dtype((found, jacobians, answer.stats), dtype)
    assert answer.result == blx.RESULTS.successful
    return answer


#
# Unrolled: T1 and T11
#


@pytest.mark.parametrize(
    "mode, num_steps, dtype",
    (
        ("checkpointed", 1, jnp.float64),
        ("checkpointed", 1000, jnp.float64),
        ("reverse", 1000, jnp.float64),
        ("forward", 1000, jnp.float64),
        ("checkpointed", 100, jnp.float32),
        ("forward", 7, jnp.float32),
    ),
)
def test_t1_unrolling_is_the_neumann_series(mode, num_steps, dtype):
    """K steps have the Jacobian of exactly K terms, from any start."""
    problem, x, y0 = make_linear(LinearBilevel, dtype)
    response = blx.Unrolled(optax.sgd(STEP_SIZE), num_steps, mode)
    y = gradient_descent(problem.features, x, y0, num_steps, STEP_SIZE)
    J = neumann_jacobian(problem.features, num_steps, STEP_SIZE)
    answer = _check(problem, x, y0, response, y, J, tolerance(dtype))
    # Nothing is presumed of the point.
    assert answer.stats["inner_residual"] == 0
    # T11: what truncation drops is exactly how the start would depend on x.
    features = as_numpy(problem.features)
    pinv = np.linalg.pinv(features)
    step = np.eye(features.shape[1]) - STEP_SIZE * features.T @ features
    dropped = np.linalg.matrix_power(step, num_steps) @ pinv
    found = as_numpy(answer.jacobian.T.mv(jnp.ones_like(y0)))
    expected = (pinv - dropped).sum(axis=0)
    assert tree_allclose(found, expected, rtol=10 * tolerance(dtype))


@pytest.mark.parametrize("num_terms", (1, 7, 1001))
def test_t1_the_series_is_unrolling(num_terms):
    """The same of the solver, K = 1001 being summed in closed form."""
    problem, x, y0 = make_linear(LinearBilevel, jnp.float64)
    response = blx.Implicit(None, blx.Neumann(num_terms, STEP_SIZE))
    J = neumann_jacobian(problem.features, num_terms, STEP_SIZE)
    _check(problem, x, y0, response, y0, J, 1e-10)


@eqx.filter_jit
def _push(problem, x, anchor, response):
    """The point, and J applied to a vector of ones."""
    answer = response(problem, x, anchor)
    ones = jax.tree.map(jnp.ones_like, x)
    return answer.y, answer.jacobian.mv(ones)


@pytest.mark.slow
def test_t1_needs_a_quadratic(getkey):
    # On a nonlinear problem K steps and K terms agree only at a minimum.
    problem, x, y0 = make_softmax()
    unrolled = blx.Unrolled(optax.sgd(STEP_SIZE), 7)
    series = blx.Implicit(None, blx.Neumann(7, STEP_SIZE))
    start = random_like(getkey(), y0)
    _, by_steps = _push(problem, x, start, unrolled)
    _, by_terms = _push(problem, x, start, series)
    assert not tree_allclose(by_steps, by_terms, rtol=1e-2)
    minimum = resolve(problem, x, y0)
    y, by_steps = _push(problem, x, minimum, unrolled)
    _, by_terms = _push(problem, x, minimum, series)
    assert tree_allclose(y, minimum, rtol=1e-12)
    assert tree_allclose(by_steps, by_terms, rtol=1e-10)


#
# Unrolled: other optimisers, against loops of our own
#


def _momentum(gradient, y, num_steps, rate, decay):
    velocity = np.zeros_like(y)
    for _ in range(num_steps):
        velocity = decay * velocity + gradient(y)
        y = y - rate * velocity
    return y


def _adam(gradient, y, num_steps, rate, b1=0.9, b2=0.999, eps=1e-8):
    first, second = np.zeros_like(y), np.zeros_like(y)
    for k in range(1, num_steps + 1):
        g = gradient(y)
        first = b1 * first + (1 - b1) * g
        second = b2 * second + (1 - b2) * g**2
        corrected = second / (1 - b2**k)
        y = y - rate * first / (1 - b1**k) / (np.sqrt(corrected) + eps)
    return y


def _scheduled(gradient, y, num_steps, rate):
    for k in range(num_steps):
        y = y - rate / (1 + k) * gradient(y)
    return y


def _optimisers():
    return {
        "momentum": (
            optax.sgd(0.2, momentum=0.9),
            lambda gradient, y, num: _momentum(gradient, y, num, 0.2, 0.9),
        ),
        "adam": (
            optax.adam(0.1),
            lambda gradient, y, num: _adam(gradient, y, num, 0.1),
        ),
        "schedule": (
            optax.sgd(lambda count: 0.4 / (1 + count)),
            lambda gradient, y, num: _scheduled(gradient, y, num, 0.4),
        ),
    }


@pytest.mark.parametrize(
    "name, mode",
    (
        ("momentum", "checkpointed"),
        ("adam", "checkpointed"),
        pytest.param("adam", "reverse", marks=slow),
        pytest.param("adam", "forward", marks=slow),
        ("schedule", "checkpointed"),
    ),
)
def test_optimisers(name, mode):
    """The optimiser's state is part of what is differentiated through."""
    problem, x, y0 = make_linear(LinearBilevel, jnp.float64)
    optimiser, loop = _optimisers()[name]

    features, start = as_numpy(problem.features), as_numpy(y0)

    def reference(x):
        return loop(lambda y: features.T @ (features @ y - x), start, 7)

    # A step into the complex plane is a derivative without cancellation.
    columns = [reference(as_numpy(x) + 1e-30j * e).imag / 1e-30 for e in np.eye(x.size)]
    expected = reference(as_numpy(x)), np.stack(columns, axis=1)
    # optax.adam multiplies by Python floats that are float64 arrays by then.
    with jax.numpy_dtype_promotion("standard"):
        response = blx.Unrolled(optimiser, 7, mode)
        _check(problem, x, y0, response, *expected, rtol=1e-10)


@eqx.filter_jit
def _point(problem, x, anchor, response, state=None):
    answer = response(problem, x, anchor, state)
    return answer.y, eqx.filter(answer.state, eqx.is_array), answer.state


@pytest.mark.parametrize("name", ("momentum", "adam"))
def test_state_is_carried(name):
    """Calling twice is calling once with more steps: the state is in the response."""
    problem, x, y0 = make_linear(LinearBilevel, jnp.float64)
    optimiser, _ = _optimisers()[name]
    with jax.numpy_dtype_promotion("standard"):
        four, eight = blx.Unrolled(optimiser, 4), blx.Unrolled(optimiser, 8)
        state = four.init(problem, x, y0)
        y, _, state = _point(problem, x, y0, four, state)
        carried, carried_state, _ = _point(problem, x, y, four, state)
        once, once_state, _ = _point(problem, x, y0, eight)
        forgetful, _, _ = _point(problem, x, y, four)
    assert tree_allclose(carried, once, rtol=1e-13)
    assert tree_allclose(carried_state, once_state, rtol=1e-13)
    assert not tree_allclose(forgetful, once, rtol=1e-4)


def test_best_response_starts_anew():
    problem, x, y0 = make_linear(LinearBilevel, jnp.float64)
    response = blx.Unrolled(optax.sgd(0.2, momentum=0.9), 5)
    y, _, _ = _point(problem, x, y0, response)
    assert tree_allclose(blx.best_response(problem, x, y0, response), y, rtol=1e-13)


@pytest.mark.parametrize("mode", ("checkpointed", "forward"))
def test_traced_num_steps(mode):
    problem, x, y0 = make_linear(LinearBilevel, jnp.float64)

    def respond(num_steps):
        response = blx.Unrolled(optax.sgd(STEP_SIZE), num_steps, mode)
        answer = response(problem, x, y0)
        pulled, *_ = answer.pullback(jnp.ones_like(y0))
        return answer.y, pulled

    num_steps = jnp.array([1, 2, 7, 70])
    ys, pulled = jax.jit(jax.vmap(respond))(num_steps)
    for i, K in enumerate([1, 2, 7, 70]):
        y = gradient_descent(problem.features, x, y0, K, STEP_SIZE)
        J = neumann_jacobian(problem.features, K, STEP_SIZE)
        assert tree_allclose(ys[i], y, rtol=1e-12)
        assert tree_allclose(pulled[i], J.sum(axis=0), rtol=1e-12)


def test_jacobian_of_traced_num_steps():
    problem, x, y0 = make_linear(LinearBilevel, jnp.float64)
    J = neumann_jacobian(problem.features, 7, STEP_SIZE)
    for mode in ("checkpointed", "forward"):
        response = blx.Unrolled(optax.sgd(STEP_SIZE), jnp.array(7), mode)
        _, jacobians, _ = _respond(problem, x, y0, response)
        assert tree_allclose(jacobians, (J, J, J), rtol=1e-12)


def test_learning_rate_as_data():
    """Vmapped over, and differentiated with respect to."""
    problem, x, y0 = make_linear(LinearBilevel, jnp.float64)

    def point(rate):
        response = blx.Unrolled(optax.sgd(rate), 3)
        return blx.best_response(problem, x, y0, response)

    rates = jnp.array([0.1, 0.4])
    ys = jax.jit(jax.vmap(point))(rates)
    for y, rate in zip(ys, rates):
        expected = gradient_descent(problem.features, x, y0, 3, float(rate))
        assert tree_allclose(y, expected, rtol=1e-12)

    def reference(rate):
        y = y0
        for _ in range(3):
            y = y - rate * problem.features.T @ (problem.features @ y - x)
        return y

    derivatives = jax.jit(lambda r: (jax.jacrev(point)(r), jax.jacfwd(reference)(r)))
    found, expected = derivatives(rates[0])
    assert tree_allclose(found, expected, rtol=1e-12)


def test_unrolling_keeps_float32():
    # A rate in float64 makes neither the data nor the state float64.
    problem, x, y0 = make_linear(LinearBilevel, jnp.float32)
    with jax.numpy_dtype_promotion("standard"):
        for optimiser in (
            optax.sgd(np.float64(0.1), momentum=0.9),
            optax.adam(jnp.asarray(0.1, jnp.float64)),
        ):
            response = blx.Unrolled(optimiser, 3)
            y, jacobians, answer = _respond(problem, x, y0, response)
            assert tree_has_dtype((y, jacobians, answer.state), jnp.float32)


#
# Implicit
#


@pytest.mark.parametrize(
    "cls, dtype",
    ((LinearBilevel, jnp.float64), (LinearLeastSquares, jnp.float32)),
)
def test_implicit(cls, dtype):
    """Full warm start: the projection of the anchor, and -H^+ B."""
    problem, x, anchor = make_linear(cls, dtype)
    response = blx.Implicit(blx.Projection(), blx.Pseudoinverse())
    y = project(problem.features, x, anchor)
    J = np.linalg.pinv(as_numpy(problem.features))
    answer = _check(problem, x, anchor, response, y, J, tolerance(dtype))
    assert answer.stats["inner_residual"] < 1e3 * jnp.finfo(dtype).eps


def test_implicit_without_a_solver():
    # The anchor is taken to be a solution: the caller vouches for it.
    problem, x, anchor = make_linear(LinearBilevel, jnp.float64)
    response = blx.Implicit(None, blx.Pseudoinverse())
    J = np.linalg.pinv(as_numpy(problem.features))
    answer = _check(problem, x, anchor, response, anchor, J, 1e-10)
    # It says how far off it is, nonetheless.
    residual = as_numpy(problem.features).T @ (
        as_numpy(problem.features) @ as_numpy(anchor) - as_numpy(x)
    )
    expected = np.linalg.norm(residual)
    assert tree_allclose(answer.stats["inner_residual"], expected, rtol=1e-12)


@pytest.mark.parametrize(
    "linear_solver",
    (
        blx.Neumann(3000, 1.0),
        blx.TruncatedCG(30),
        blx.Pseudoinverse(),
        blx.Pseudoinverse(dense_size=1),
        lx.CG(rtol=1e-13, atol=1e-13),
        lx.Cholesky(),
        # The others are in `test_faults_derivatives.py`.
        pytest.param(lx.LSMR(rtol=1e-13, atol=1e-13), marks=slow),
    ),
    ids=lambda solver: type(solver).__name__,
)
def test_implicit_with_each_linear_solver(linear_solver):
    """J^T F_y as a hypergradient takes it, and what is reported of the solve."""
    problem, x, y = make_softmax()
    y = resolve(problem, x, y)
    H, B, outer_x, outer_y = dense_derivatives(problem, x, y)
    out = blx.hypergradient(problem, x, y, blx.Implicit(None, linear_solver))
    expected = outer_x - B.T @ np.linalg.solve(H, outer_y)
    assert tree_allclose(flatten(out.gradient), expected, rtol=1e-9)
    assert out.result == blx.RESULTS.successful


def test_linear_stats():
    """What is known of the linear solve comes back under its name."""
    problem, x, anchor = make_linear(LinearBilevel, jnp.float64)
    response = blx.Implicit(None, blx.TruncatedCG(2))
    hypergradient = blx.hypergradient(problem, x, anchor, response, throw=False)
    assert hypergradient.stats["linear_num_steps"] == 2
    # Two steps are worse than none here, and the hypergradient is off by 250 %.
    assert hypergradient.stats["linear_residual"] > 1
    assert hypergradient.result == blx.RESULTS.linear_not_converged
    response = blx.Implicit(blx.GradientDescent(STEP_SIZE, 300), blx.Pseudoinverse())
    hypergradient = blx.hypergradient(problem, x, anchor, response)
    assert hypergradient.stats["inner_steps"] == 300
    assert hypergradient.stats["linear_rank"] == 3


def test_t12_moving_feature():
    """The derivative of the cold response has a null-space term that -H^+ B has not.
    Unrolling to convergence from y0 gives the first, from y* the second."""
    problem, x, w0 = make_moving()
    phi, slope = jax.jvp(moving_features, (x,), (jnp.ones_like(x),))
    square = phi @ phi
    w = w0 + phi * (problem.target - phi @ w0) / square
    warm = -phi * (slope @ w) / square
    null = slope - phi * (phi @ slope) / square
    cold = warm + null * (problem.target - phi @ w0) / square

    unrolled = blx.Unrolled(optax.sgd(0.3), 200)
    implicit = blx.Implicit(blx.Projection(), blx.Pseudoinverse())
    assert tree_allclose(_push(problem, x, w0, unrolled), (w, cold), rtol=1e-10)
    assert tree_allclose(_push(problem, x, w, unrolled), (w, warm), rtol=1e-10)
    assert tree_allclose(_push(problem, x, w0, implicit), (w, warm), rtol=1e-10)
    assert not tree_allclose(cold, warm, rtol=1e-2)


#
# Proximal: T4
#


@pytest.mark.parametrize(
    "cls, linear_solver, dtype",
    (
        pytest.param(LinearBilevel, blx.Pseudoinverse(), jnp.float64, marks=slow),
        (LinearBilevel, lx.Cholesky(), jnp.float32),
        (LinearLeastSquares, lx.Cholesky(), jnp.float64),
    ),
)
def test_t4_proximal(cls, linear_solver, dtype):
    """(H + epsilon I)^-1 (Phi^T x + epsilon w), and (H + epsilon I)^-1 Phi^T."""
    problem, x, anchor = make_linear(cls, dtype)
    epsilon = 0.3
    response = blx.Proximal(epsilon, blx.Projection(), linear_solver)
    features = as_numpy(problem.features)
    damped = features.T @ features + epsilon * np.eye(features.shape[1])
    y = np.linalg.solve(damped, features.T @ as_numpy(x) + epsilon * as_numpy(anchor))
    J = damped_jacobian(features, epsilon)
    _check(problem, x, anchor, response, y, J, tolerance(dtype))


def test_t4_proximal_step_against_gradient_descent():
    """One step of size eta is within O(eta^2) of the proximal step, epsilon = 1/eta."""
    problem, x, anchor = make_linear(LinearLeastSquares, jnp.float64)

    @jax.jit
    def distance(eta):
        response = blx.Proximal(1 / eta, blx.Projection(), blx.Pseudoinverse())
        proximal = blx.best_response(problem, x, anchor, response)
        descent = blx.best_response(problem, x, anchor, blx.Unrolled(optax.sgd(eta), 1))
        return jnp.linalg.norm(proximal - descent)

    etas = 1e-2 * 0.5 ** np.arange(4)
    distances = np.array([float(distance(jnp.array(eta))) for eta in etas])
    assert np.all(distances > 0)
    assert tree_allclose(distances[:-1] / distances[1:], np.full(3, 4.0), rtol=2e-2)


def test_proximal_limit():
    # As epsilon tends to zero: the projection of the anchor, and the pseudoinverse.
    problem, x, anchor = make_linear(LinearLeastSquares, jnp.float64)
    response = blx.Proximal(1e-7, blx.Projection(), blx.Pseudoinverse())
    y = project(problem.features, x, anchor)
    J = np.linalg.pinv(as_numpy(problem.features))
    _check(problem, x, anchor, response, y, J, 1e-6)


def test_proximal_epsilons_under_vmap():
    problem, x, anchor = make_linear(LinearBilevel, jnp.float64)

    def respond(epsilon):
        response = blx.Proximal(epsilon, blx.Projection(), blx.Pseudoinverse())
        answer = response(problem, x, anchor)
        return answer.jacobian.as_matrix()

    epsilons = jnp.array([0.1, 1.0])
    for J, epsilon in zip(jax.jit(jax.vmap(respond))(epsilons), epsilons):
        expected = damped_jacobian(problem.features, float(epsilon))
        assert tree_allclose(J, expected, rtol=1e-10)


#
# Fixed
#


def test_fixed():
    problem, x, anchor = make_linear(LinearBilevel, jnp.float64)
    _check(problem, x, anchor, blx.Fixed(), anchor, np.zeros((5, 3)), 0)
    # The hypergradient is F_x alone.
    out = blx.hypergradient(problem, x, anchor, blx.Fixed())
    assert tree_allclose(out.gradient, 0.5 * (x - 1), rtol=1e-14)


#
# Toy A: with c the second inner variable, which f does not see
#


def test_toy_a():
    """The fixed points: full warm start 1/2, proximal 1/(2 + epsilon), K steps
    m / (1 + m) with m = 1 - (1 - alpha)^K."""
    problem = toy_a()
    m = 1 - 0.7**4
    epsilon = 0.6
    pinv = blx.Pseudoinverse()
    for w, response in (
        (1 / 2, blx.Implicit(blx.Projection(), pinv)),
        (1 / (2 + epsilon), blx.Proximal(epsilon, blx.Projection(), pinv)),
        (m / (1 + m), blx.Implicit(None, blx.Neumann(4, 0.3))),
        (m / (1 + m), blx.Unrolled(optax.sgd(0.3), 4)),
        # Enough steps for it to be exact, whatever F_y is on the null space of H.
        (1 / 2, blx.Implicit(None, blx.TruncatedCG(4))),
    ):
        w = jnp.asarray(w)
        # The point has converged: this is a warm start.
        anchor = jnp.stack([w, jnp.zeros(())])
        out = blx.hypergradient(problem, w, anchor, response)
        assert tree_allclose(out.y, anchor, rtol=1e-12)
        assert tree_allclose(out.gradient, 0.0, rtol=1e-12)
        expected = 0.5 * w**2 + 0.5 * (w - 1) ** 2
        assert tree_allclose(out.value, expected, rtol=1e-12)
        # And it is a simple zero, not zero everywhere.
        out = blx.hypergradient(problem, w + 0.1, anchor, response)
        assert abs(out.gradient) > 0.05


@pytest.mark.parametrize("c", (-0.4, 0.8))
def test_toy_a_depends_on_the_anchor(c):
    # Cold and full warm start from x1 = c are at w = (1 + c) / 2.
    problem, w = toy_a(), jnp.asarray((1 + c) / 2)
    response = blx.Implicit(blx.Projection(), blx.Pseudoinverse())
    out = blx.hypergradient(problem, w, jnp.array([9.0, c]), response)
    assert tree_allclose(out.y, np.array([float(w), c]), rtol=1e-12)
    assert tree_allclose(out.gradient, 0.0, rtol=1e-12)


#
# All of them
#


def _responses():
    return {
        # Taken to be at a solution, which is all that their Jacobians presume.
        "implicit": blx.Implicit(None, lx.Cholesky()),
        "reverse": blx.Unrolled(optax.sgd(0.5), 5, "reverse"),
        "forward": blx.Unrolled(optax.sgd(0.5), 5, "forward"),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", list(_responses()))
def test_jacobian_pullback_and_best_response_agree(name, getkey):
    """On a nonlinear problem over pytrees, in forward and in reverse mode. (Steps with
    checkpoints: `test_hypergradient.test_best_response`.)"""
    problem, x, y0 = make_softmax()
    anchor = jax.tree.map(lambda u: 0.1 + u, y0)
    tangent, cotangent = random_like(getkey(), x), random_like(getkey(), y0)
    response = _responses()[name]

    @eqx.filter_jit
    def directly(problem, x, anchor):
        answer = response(problem, x, anchor)
        pulled, result, *_ = answer.pullback(cotangent)
        return (
            answer.y,
            answer.jacobian.mv(tangent),
            answer.jacobian.T.mv(cotangent),
            pulled,
        )

    @eqx.filter_jit
    def by_differentiation(problem, x, anchor):
        y, push = jax.linearize(
            lambda x: blx.best_response(problem, x, anchor, response), x
        )
        # Reverse mode is the transpose of forward mode.
        return y, push(tangent), *jax.linear_transpose(push, x)(cotangent)

    y, push, pull, pulled = directly(problem, x, anchor)
    y_again, push_again, pull_again = by_differentiation(problem, x, anchor)
    assert tree_struct((y, push, pull)) == tree_struct((anchor, anchor, x))
    assert tree_allclose(y_again, y, rtol=1e-12)
    assert tree_allclose(push_again, push, rtol=1e-10)
    assert tree_allclose(pull_again, pull, rtol=1e-10)
    assert tree_allclose(pulled, pull, rtol=1e-10)
    forward, reverse = tree_dot(cotangent, push), tree_dot(pull, tangent)
    assert tree_allclose(forward, reverse, rtol=1e-10)
    assert np.linalg.norm(flatten(push)) > 1e-3


def test_abstract_response_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        blx.AbstractResponse()  # pyright: ignore


class _Task(blx.AbstractBilevelProblem):
    curvature: jax.Array
    target: jax.Array

    def inner(self, x, y):
        return 0.5 * self.curvature * jnp.sum((y - self.target) ** 2)

    def outer(self, x, y):
        return 0.5 * jnp.sum((y - self.target) ** 2)


def test_tasks_that_share_x():
    """iMAML: x is the same for all tasks, and the Hessian is another for each."""
    a, t, epsilon = jnp.array([1.0, 2.0, 5.0]), jnp.array([0.0, 1.0, 2.0]), 0.5
    tasks, x = _Task(a, jnp.stack([t, -t], axis=1)), jnp.array([0.3, -0.2])

    def loss(x, response):
        respond = lambda task: blx.best_response(task, x, x, response)  # noqa: E731
        ys = jax.vmap(respond)(tasks)
        return jnp.sum(jax.vmap(lambda task, y: task.outer(x, y))(tasks, ys))

    # y = (a t + epsilon x) / (a + epsilon)
    share = (epsilon / (a + epsilon))[:, None]
    gradient = jnp.sum(share**2 * (x[None] - tasks.target), axis=0)
    solvers = blx.Projection(), blx.Pseudoinverse()
    found = jax.grad(loss)(x, blx.Proximal(epsilon, *solvers))
    assert tree_allclose(found, gradient, rtol=1e-9)
    # Without the pull x is in no inner objective, and the derivative zero.
    found = jax.grad(loss)(x, blx.Implicit(*solvers))
    assert tree_allclose(found, jnp.zeros(2), rtol=1e-9)


class _Doubled(blx.Implicit):
    """A response of a user that changes what a response of ours returns."""

    def __call__(self, problem, x, anchor, state=None):
        answer = super().__call__(problem, x, anchor, state)
        return eqx.tree_at(lambda a: a.y, answer, jax.tree.map(lambda u: 2 * u, answer.y))


@pytest.mark.parametrize("kind", ("implicit", "proximal", "nearest"))
def test_answer_is_the_response_without_its_jacobian(kind):
    problem, x, y0 = make_linear(LinearBilevel, jnp.float64)
    solvers = blx.Projection(), blx.Pseudoinverse()
    response = {
        "implicit": blx.Implicit(*solvers),
        "proximal": blx.Proximal(0.1, *solvers),
        "nearest": blx.MinimumDisplacement(),
    }[kind]

    @eqx.filter_jit
    def both(x):
        short, whole = response.answer(problem, x, y0), response(problem, x, y0)
        assert short.jacobian is None and whole.jacobian is not None
        u = jax.tree.map(jnp.ones_like, y0)
        return (short.y, short.pullback(u)), (whole.y, whole.pullback(u))

    short, whole = both(x)
    assert tree_allclose(short, whole, rtol=0)


def test_call_of_a_subclass_is_what_a_hypergradient_asks():
    problem, x, y0 = make_linear(LinearBilevel, jnp.float64)
    solvers = blx.Projection(), blx.Pseudoinverse()
    once = blx.hypergradient(problem, x, y0, blx.Implicit(*solvers)).y
    twice = blx.hypergradient(problem, x, y0, _Doubled(*solvers)).y
    assert tree_allclose(twice, jax.tree.map(lambda u: 2 * u, once), rtol=1e-12)
