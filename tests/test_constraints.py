"""Variables that are confined to convex sets, against closed forms."""

import functools
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from helpers import grid, tree_has_dtype
from jaxtyping import Array

import bilevel_eqx as blx


N, M = 6, 3
project = optax.projections

# Each with the closed form of the nearest point and of its derivative, in NumPy.


def _box(v):
    inside = (v > -0.5) & (v < 0.5)
    return np.clip(v, -0.5, 0.5), np.diag(inside.astype(float))


def _non_negative(v):
    return np.maximum(v, 0), np.diag((v > 0).astype(float))


def _ball(v):
    length = np.linalg.norm(v)
    assert length > 1
    n = v / length
    return n, (np.eye(v.size) - np.outer(n, n)) / length


def _simplex(v):
    # The support is that for which the shift is consistent.
    order = np.sort(v)[::-1]
    shifts = (np.cumsum(order) - 1) / np.arange(1, v.size + 1)
    shift = shifts[np.sum(order > shifts) - 1]
    support = (v > shift).astype(float)
    face = np.diag(support) - np.outer(support, support) / support.sum()
    return np.maximum(v - shift, 0), face


SETS = {
    "box": (lambda y: project.projection_box(y, -0.5, 0.5), _box),
    "non-negative": (project.projection_non_negative, _non_negative),
    "ball": (project.projection_l2_ball, _ball),
    "simplex": (project.projection_simplex, _simplex),
}


class OneOfThem(eqx.Module):
    """The projection on one of the sets. Which one is data: all sets are one program."""

    which: Array

    def __call__(self, v):
        return jax.lax.switch(self.which, [here for here, _ in SETS.values()], v)


def _set(name, alone):
    """The projection: as it is, a shorter program, or as one of all."""
    return SETS[name][0] if alone else OneOfThem(jnp.asarray(list(SETS).index(name)))


def _inside(name, v):
    """The nearest point of the set to any v, for one that is in the set already too."""
    if name == "ball" and np.linalg.norm(v) <= 1:
        return v
    return SETS[name][1](v)[0]


class Nearest(blx.AbstractBilevelProblem):
    """y is the nearest point of a set to C x."""

    C: Array
    target: Array
    set: Callable[[Array], Array]

    def outer(self, x, y):
        return jnp.sum(jnp.sin(y - self.target)) + 0.5 * jnp.sum(x**2)

    def inner(self, x, y):
        return 0.5 * jnp.sum((y - self.C @ x) ** 2)

    def project_y(self, y):
        return self.set(y)

    def truth(self, name, x):
        C, t, x = map(np.asarray, (self.C, self.target, x))
        y, D = SETS[name][1](C @ x)
        return y, D @ C, x + C.T @ D @ np.cos(y - t)


def nearest(name, dtype=jnp.float64, alone=False):
    keys = jr.split(jr.key(3), 3)
    arrays = (
        jr.normal(keys[0], (N, M)),
        jr.normal(keys[1], (N,)),
        jr.normal(keys[2], (M,)),
    )
    C, target, x = (u.astype(dtype) for u in arrays)
    return Nearest(C, target, _set(name, alone)), x


_descent = blx.ProjectedGradient()
_responses = {
    "pinv": blx.Implicit(_descent, blx.Pseudoinverse()),
    "cg": blx.Implicit(_descent, blx.TruncatedCG(2 * N + 1)),
    "neumann": blx.Implicit(blx.GradientDescent(0.9, 60), blx.Neumann(200, 0.9)),
    "unrolled": blx.Unrolled(optax.sgd(0.5), 80),
    "forward": blx.Unrolled(optax.sgd(0.5), 80, "forward"),
}


@eqx.filter_jit
def _respond(problem, x, anchor, response, v, u):
    answer = response(problem, x, anchor)
    pulled, *_ = answer.pullback(u)
    return answer.y, answer.jacobian.mv(v), answer.jacobian.T.mv(u), pulled


def _marked(kinds_and_sets):
    """Every kind with every set; with those that it is not tried on here, it is slow."""
    return [
        pytest.param(
            name,
            kind,
            id=f"{kind}-{name}",
            marks=[] if name in tried else [pytest.mark.slow],
        )
        for kind, tried in kinds_and_sets.items()
        for name in SETS
    ]


# The projection says what the set is; nothing else knows. Each is tried on one set with
# corners or on one that is round.
_tried = {
    "pinv": SETS,
    "cg": ("ball",),
    "neumann": ("simplex",),
    "unrolled": ("ball",),
    "forward": ("simplex",),
}


@pytest.mark.parametrize("name, kind", _marked(_tried))
def test_nearest_point(name, kind):
    """The point and the Jacobian. `test_hypergradient` is of what is made of them."""
    problem, x = nearest(name, alone=kind != "pinv" and name in _tried[kind])
    y, J, _ = problem.truth(name, x)
    assert 0 < np.linalg.matrix_rank(J) < M or name in ("ball", "box", "non-negative")
    v, u = jnp.arange(1.0, M + 1), jnp.arange(1.0, N + 1)
    found = _respond(problem, x, jnp.full(N, 0.1), _responses[kind], v, u)
    assert np.allclose(found[0], y, atol=1e-10)
    assert np.allclose(found[1], J @ v, atol=1e-9)
    assert np.allclose(found[2], J.T @ u, atol=1e-9)
    assert np.allclose(found[3], J.T @ u, atol=1e-9)


two = "simplex", "ball"


@jax.jit
def _both_modes(problem, x):
    def y_of(x):
        return blx.best_response(problem, x, jnp.zeros(N), _responses["pinv"])

    total = jax.grad(lambda x: problem.outer(x, y_of(x)))(x)
    return jax.jacfwd(y_of)(x), total


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_best_response_in_both_modes(name):
    problem, x = nearest(name)
    _, J, gradient = problem.truth(name, x)
    jacobian, total = _both_modes(problem, x)
    assert np.allclose(jacobian, J, atol=1e-10)
    assert np.allclose(total, gradient, atol=1e-10)


@pytest.mark.slow
def test_general_quadratic_on_its_face():
    """With an H that is not the identity: the free variables solve a smaller system."""
    keys = jr.split(jr.key(0), 3)
    A, B = jr.normal(keys[0], (9, N)), jr.normal(keys[1], (N, M))
    problem = blx.BilevelProblem(
        lambda x, y: jnp.sum(jnp.sin(y)),
        lambda x, y: 0.5 * jnp.sum((A @ y) ** 2) + y @ (B @ x),
        project_y=project.projection_non_negative,
    )
    x = 3 * jr.normal(keys[2], (M,))
    out = blx.hypergradient(problem, x, jnp.zeros(N), _responses["pinv"])
    free = np.asarray(out.y > 0)
    assert 0 < free.sum() < N
    H, B = np.asarray(A.T @ A), np.asarray(B)
    y, J = np.zeros(N), np.zeros((N, M))
    y[free] = -np.linalg.solve(H[np.ix_(free, free)], B[free] @ np.asarray(x))
    J[free] = -np.linalg.solve(H[np.ix_(free, free)], B[free])
    multiplier = H @ y + B @ np.asarray(x)
    assert np.all(y >= 0) and np.all(multiplier[~free] > 0), "the optimality conditions"
    assert np.allclose(out.y, y, atol=1e-12)
    assert np.allclose(out.gradient, J.T @ np.cos(y), atol=1e-11)


class Bounded(blx.AbstractBilevelProblem):
    """Its bound is a field, and y moves with it where it is active."""

    bound: Array

    def outer(self, x, y):
        return jnp.sum(y**2)

    def inner(self, x, y):
        return 0.5 * jnp.sum((y - x) ** 2) + 0.1 * (y[0] - y[2]) ** 2

    def project_y(self, y):
        return jnp.minimum(y, self.bound)


@pytest.mark.slow
def test_moves_with_a_moving_bound():
    problem = Bounded(jnp.array([1.0, 1.0, 9.0]))
    x = jnp.array([2.0, 0.5, 3.0])
    implicit = _responses["pinv"]

    def y_of(problem, x):
        return blx.best_response(problem, x, jnp.zeros(3), implicit)

    # y_0 is at its bound b; y_2 = (x_2 + b / 5) / (1 + 1 / 5).
    assert np.allclose(y_of(problem, x), [1.0, 0.5, 3.2 / 1.2])
    by_bound = jax.jit(jax.jacrev(lambda b: y_of(Bounded(b), x)))(problem.bound)
    expected = np.zeros((3, 3))
    expected[0, 0], expected[2, 0] = 1, 1 / 6
    assert np.allclose(by_bound, expected, atol=1e-12)
    bounds = np.array([1.0, 1.5, 5.0])[:, None] * np.ones((1, 3))
    many = jax.jit(jax.vmap(lambda b: y_of(Bounded(b), x)))(jnp.asarray(bounds))
    assert np.allclose(many[:, 0], [1.0, 1.5, 1.3 / 0.6 * 1.0], atol=0.2)
    for bound, y in zip(bounds, many):
        assert np.allclose(y, y_of(Bounded(jnp.asarray(bound)), x), atol=1e-12)


@pytest.mark.slow
def test_second_derivatives():
    # Where the boundary is curved, its curvature is part of them.
    C = jr.normal(jr.key(1), (N, M))
    x = jr.normal(jr.key(2), (M,))

    def length(y):
        return jnp.sqrt(jnp.sum(y**2))

    problem = blx.BilevelProblem(
        lambda x, y: jnp.sum(y),
        lambda x, y: 0.5 * jnp.sum((y - C @ x) ** 2),
        project_y=lambda y: y / jnp.maximum(length(y), 1),
    )

    def value(x):
        y = blx.best_response(problem, x, jnp.zeros(N), _responses["pinv"])
        return problem.outer(x, y)

    # The sum of u / |u| at u = C x, with the second derivatives of that in u.
    C, u = np.asarray(C), np.asarray(C @ x)
    size, ones = np.linalg.norm(u), np.ones(N)
    assert size > 1
    curved = np.outer(ones, u) + np.outer(u, ones) + np.sum(u) * np.eye(N)
    in_u = 3 * np.sum(u) * np.outer(u, u) / size**5 - curved / size**3
    assert np.allclose(jax.jit(jax.hessian(value))(x), C.T @ in_u @ C, atol=1e-9)


def test_proximal_pulls_within_the_set():
    problem, x = nearest("non-negative", alone=True)
    anchor, epsilon = jnp.full(N, 0.3), 0.5
    response = blx.Proximal(epsilon, _descent, blx.Pseudoinverse())
    out = blx.hypergradient(problem, x, anchor, response)
    middle = (np.asarray(problem.C @ x) + epsilon * 0.3) / (1 + epsilon)
    y, D = _non_negative(middle)
    J = D @ np.asarray(problem.C) / (1 + epsilon)
    expected = np.asarray(x) + J.T @ np.cos(y - np.asarray(problem.target))
    assert np.allclose(out.y, y, atol=1e-12)
    assert np.allclose(out.gradient, expected, atol=1e-12)


@pytest.mark.parametrize(
    "name, dtype",
    grid(
        lambda name, dtype: name in two and dtype == jnp.float32,
        SETS,
        (jnp.float32, jnp.float64),
    ),
)
def test_hypergradient(name, dtype):
    problem, x = nearest(name, dtype)
    out = blx.hypergradient(
        problem, x, jnp.zeros(N, dtype), _responses["pinv"], throw=False
    )
    assert out.result == blx.RESULTS.successful
    assert tree_has_dtype((out.y, out.gradient), dtype)
    y, _, gradient = problem.truth(name, x.astype(jnp.float64))
    single = dtype == jnp.float32
    assert np.allclose(out.y, y, atol=1e-5 if single else 1e-10)
    assert np.allclose(out.gradient, gradient, atol=1e-4 if single else 1e-9)


def test_projected_gradient_finds_its_step():
    # The curvature at the start says nothing of that at the minimum.
    problem = blx.BilevelProblem(
        lambda x, y: jnp.sum(y),
        lambda x, y: jnp.sum(y**4) - jnp.sum(x * y),
        project_y=project.projection_non_negative,
    )
    x = jnp.array([500.0, -1.0])
    y = blx.best_response(problem, x, jnp.full(2, 1e-3), _responses["pinv"])
    assert np.allclose(y, [5.0, 0.0], atol=1e-6)


#
# Runs
#


class Ridge(blx.AbstractBilevelProblem):
    """y = C x, so that x minimises a quadratic, in a set."""

    C: Array
    target: Array
    set: Callable[[Array], Array]

    def outer(self, x, y):
        return 0.5 * jnp.sum((y - self.target) ** 2) + 0.05 * jnp.sum(x**2)

    def inner(self, x, y):
        return 0.5 * jnp.sum((y - self.C @ x) ** 2)

    def project_x(self, x):
        return self.set(x)


def ridge(name, alone=False):
    keys = jr.split(jr.key(9), 2)
    C, target = jr.normal(keys[0], (N, M)), 3 * jr.normal(keys[1], (N,))
    return Ridge(C, target, _set(name, alone))


@functools.cache
def ridge_truth(name):
    """By many projected gradient steps, in NumPy."""
    problem = ridge(name)
    C, t = np.asarray(problem.C), np.asarray(problem.target)
    P = C.T @ C + 0.1 * np.eye(M)
    x = last = np.full(M, 0.3)
    length = np.linalg.norm(P, 2)
    for _ in range(2_000):
        x, last = _inside(name, x - (P @ x - C.T @ t) / length), x
    assert np.allclose(x, last, rtol=0, atol=1e-14)
    return x


def _x(x, y, metrics):
    return x


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, concept",
    _marked({"stackelberg": ("simplex",), "cold": (), "optimistic": ("ball",)}),
)
def test_solve_with_x_in_a_set(name, concept):
    problem = ridge(name)
    equilibrium = {
        "stackelberg": blx.Stackelberg(),
        "cold": blx.ColdStart(),
        "optimistic": blx.Optimistic(),
    }[concept]
    # The start is outside of the set.
    x0, y0 = jnp.full(M, 4.0), jnp.zeros(N)
    solution = blx.solve(problem, equilibrium, x0, y0, num_steps=200, record=_x)
    for x in np.asarray(solution.history)[::20]:
        assert np.allclose(_inside(name, x), x, atol=1e-14)
    expected = ridge_truth(name)
    C, target = np.asarray(problem.C), np.asarray(problem.target)
    gradient = C.T @ (C @ expected - target)
    assert np.linalg.norm(gradient + 0.1 * expected) > 0.1, "a constraint is active"
    assert np.allclose(solution.x, expected, atol=1e-8)
    assert solution.certificate.largest < 1e-8
    assert "in its set" in str(solution.certificate)
    # Inside of the set, and not where it should be.
    elsewhere = blx.certify(
        problem, equilibrium, 0.5 * solution.x, 0.5 * solution.y, y0=y0, x0=x0
    )
    assert elsewhere.residuals["outer"] > 1e-2


@pytest.mark.slow
def test_tolerance_is_of_the_projected_gradient():
    name = "box"
    problem = ridge(name)
    solution = blx.solve(
        problem,
        blx.Stackelberg(),
        jnp.full(M, 4.0),
        jnp.zeros(N),
        num_steps=200,
        tolerance=1e-9,
    )
    assert solution.stats["num_steps"] < 200
    assert np.allclose(solution.x, ridge_truth(name), atol=1e-8)
    assert solution.certificate.largest < 1e-8


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, optimiser",
    [
        ("box", optax.adam(0.03)),
        pytest.param("simplex", optax.sgd(0.05, momentum=0.5), marks=pytest.mark.slow),
    ],
    ids=["box", "simplex"],
)
def test_any_optimiser_is_projected(name, optimiser):
    problem = ridge(name)
    pipeline = blx.GradientPipeline(_responses["pinv"], optimiser)
    solution = blx.solve(
        problem,
        blx.WarmStart(),
        jnp.zeros(M),
        jnp.zeros(N),
        pipeline=pipeline,
        num_steps=1500,
        record=_x,
    )
    for x in np.asarray(solution.history)[::100]:
        assert np.allclose(_inside(name, x), x, atol=1e-15)
    assert np.allclose(solution.x, ridge_truth(name), atol=1e-5)
    assert solution.certificate.largest < 1e-4


@pytest.mark.slow
def test_the_certificate_tells_where_a_projection_does_not_fit_the_optimiser():
    # Adam measures each coordinate in a unit of its own. A box does not mind, and the
    # nearest point of a simplex is another one then.
    name = "simplex"
    problem = ridge(name)
    pipeline = blx.GradientPipeline(_responses["pinv"], optax.adam(0.03))
    solution = blx.solve(
        problem,
        blx.WarmStart(),
        jnp.zeros(M),
        jnp.zeros(N),
        pipeline=pipeline,
        num_steps=1500,
        record=_x,
    )
    assert np.linalg.norm(solution.x - ridge_truth(name)) > 0.1
    assert solution.certificate.residuals["outer"] > 1e-2


# But for the default of `Optimistic`, which is above.
_registered = [
    pytest.param(
        equilibrium,
        entry.name,
        id=entry.name,
        marks=[pytest.mark.slow] if entry.name == "null-space ascent" else [],
    )
    for equilibrium in (blx.Optimistic(), blx.Pessimistic(0.5), blx.Nash())
    for entry in blx.registered(type(equilibrium))
    if entry.name != "null-space descent"
]


@pytest.mark.parametrize("equilibrium, name", _registered)
def test_every_pipeline_keeps_x_in_its_set(equilibrium, name):
    problem = ridge("box", alone=True)
    solution = blx.solve(
        problem,
        equilibrium,
        jnp.full(M, 4.0),
        jnp.zeros(N),
        pipeline=name,
        num_steps=30,
        record=_x,
        certify=False,
    )
    size = np.max(np.abs(solution.history), axis=1)
    assert size[0] == 0.5 and np.all(size <= 0.5)


@pytest.mark.slow
def test_nash_with_both_in_sets():
    """F = x y and f = -x y, on boxes that do not have zero inside: a corner."""
    problem = blx.BilevelProblem(
        lambda x, y: jnp.sum(x * y),
        lambda x, y: -jnp.sum(x * y),
        project_x=lambda x: project.projection_box(x, 1.0, 2.0),
        project_y=lambda y: project.projection_box(y, -1.0, 3.0),
    )
    start = jnp.array([1.5])
    solution = blx.solve(problem, blx.Nash(), start, start, num_steps=200)
    assert np.allclose((solution.x, solution.y), ([1.0], [3.0]))
    assert solution.certificate.largest < 1e-10
    off = blx.certify(problem, blx.Nash(), jnp.array([2.0]), solution.y)
    assert off.residuals["outer"] > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [0.0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_solve_with_y_in_a_set(epsilon):
    # Of C x only the share between the bounds counts; F is least where y = .3.
    problem = blx.BilevelProblem(
        lambda x, y: jnp.sum((y - jnp.array([0.3, 0.9])) ** 2) + 0.5 * (x[1] - 2) ** 2,
        lambda x, y: 0.5 * jnp.sum((y - x) ** 2),
        project_y=lambda y: project.projection_box(y, -0.5, 0.5),
    )
    equilibrium = blx.WarmStart(epsilon) if epsilon else blx.Stackelberg()
    x0, y0 = jnp.array([0.1, 1.0]), jnp.zeros(2)
    solution = blx.solve(problem, equilibrium, x0, y0, num_steps=150)
    # y_1 stays at its bound, and then x_1 is free to go to 2.
    assert np.allclose(solution.x, [0.3, 2.0], atol=1e-7)
    assert np.allclose(solution.y, [0.3, 0.5], atol=1e-7)
    assert solution.certificate.largest < 1e-7
    # As if there were no constraint: far from stationary.
    free = blx.BilevelProblem(problem.outer, problem.inner)
    assert blx.certify(free, equilibrium, solution.x, solution.y).largest > 0.1


@pytest.mark.slow
def test_check_hypergradient_knows_of_constraints():
    problem, x = nearest("simplex")
    check = blx.check_hypergradient(problem, x, jnp.zeros(N))
    assert check.sound
    named = check.responses
    assert named["Implicit, Pseudoinverse"].right
    assert "MinimumDisplacement" not in named
    # One that forgets the constraint is found out.
    blind = blx.BilevelProblem(problem.outer, problem.inner)
    y = blx.best_response(problem, x, jnp.zeros(N), _responses["pinv"])
    wrong = blx.hypergradient(
        blind, x, y, blx.Implicit(None, blx.Pseudoinverse())
    ).gradient
    assert np.linalg.norm(wrong - problem.truth("simplex", x)[2]) > 0.1


#
# Refusals
#


@pytest.mark.slow
def test_refusals():
    problem, x = nearest("box")
    y0 = jnp.zeros(N)
    with pytest.raises(ValueError, match="`Projection` does not.*ProjectedGradient"):
        blx.hypergradient(
            problem, x, y0, blx.Implicit(blx.Projection(), blx.Pseudoinverse())
        )
    with pytest.raises(ValueError, match="Implicit.*ProjectedGradient.*Unrolled"):
        blx.hypergradient(problem, x, y0, blx.MinimumDisplacement())
    for equilibrium in (blx.ColdStart(), blx.Optimistic(), blx.Pessimistic(1.0)):
        with pytest.raises(ValueError, match="Stackelberg.*WarmStart.*Nash"):
            blx.solve(problem, equilibrium, x, y0, num_steps=1)
        with pytest.raises(ValueError, match="Stackelberg.*WarmStart.*Nash"):
            blx.certify(problem, equilibrium, x, y0, y0=y0)
    with pytest.raises(ValueError, match="Implicit.*jacobian"):
        blx.response_jacobian(problem, x, y0, blx.Pseudoinverse())
    with pytest.raises(ValueError, match="check_hypergradient"):
        blx.diagnose(problem, x, y0)
    elsewhere = blx.BilevelProblem(
        problem.outer, problem.inner, project_y=lambda y: y[:2]
    )
    with pytest.raises(ValueError, match=r"project_y\(y\).*nearest point"):
        blx.hypergradient(elsewhere, x, y0, _responses["pinv"])


#
# The step size of the condition y = proj(y - t f_y): what f has no curvature along
#


class PartlyLinear(blx.AbstractBilevelProblem):
    """y[0] = x / slope, and y[1] rests at its bound, where f is linear in it."""

    slope: Array
    sign: Array

    def outer(self, x, y):
        return (y[0] - 1) ** 2 + y[1]

    def inner(self, x, y):
        return self.sign * 0.5 * (self.slope * y[0] - x) ** 2 + y[1]

    def project_y(self, y):
        return jnp.clip(y, 0.0, 10.0)


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.float64))
def test_a_linear_variable_at_its_bound(dtype):
    # x over the slope is no number of few digits, so that y[0] is right to rounding only.
    slope, one = jnp.asarray(0.3, dtype), jnp.ones((), dtype)
    eps = float(jnp.finfo(dtype).eps)
    response = blx.Implicit(blx.ProjectedGradient(), blx.Pseudoinverse())
    problem, y0 = PartlyLinear(slope, one), jnp.zeros(2, dtype)

    @jax.jit
    def found(x):
        out = blx.hypergradient(problem, x, y0, response)
        return out.gradient, blx.certify(problem, blx.Stackelberg(), x, out.y).residuals

    for x in (0.1, 0.2, 0.37, 0.77):
        x = jnp.asarray(x, dtype)
        gradient, residuals = found(x)
        truth = 2 * (float(x) / float(slope) - 1) / float(slope)
        assert np.isclose(gradient, truth, rtol=1e3 * eps, atol=0)
        assert residuals["inner"] < 100 * eps and residuals["outer"] > 0.1


def test_a_linear_variable_hides_no_maximum():
    concave = PartlyLinear(jnp.array(0.3), jnp.array(-1.0))
    x, y = jnp.array(0.1), jnp.array([0.1 / 0.3, 0.0])
    found = blx.certify(concave, blx.WarmStart(), x, y).residuals
    assert found["inner"] < 1e-12 and found["inner curvature"] > 0.1

    # The same in x.
    game = blx.BilevelProblem(
        lambda x, y: -0.5 * (0.3 * x[0] - 0.7) ** 2 + x[1] + y**2,
        lambda x, y: 0.5 * y**2,
        project_x=lambda x: jnp.clip(x, 0.0, 10.0),
    )
    x = jnp.array([0.7 / 0.3, 0.0])
    found = blx.certify(game, blx.Nash(), x, jnp.array(0.0)).residuals
    assert found["outer"] < 1e-12 and found["outer curvature"] > 0.1


class OnAFace(blx.AbstractBilevelProblem):
    """A quadratic of which some variables rest at a bound, with any multipliers."""

    H: Array
    C: Array
    rest: Array
    multipliers: Array

    def outer(self, x, y):
        return jnp.sum(jnp.sin(y))

    def inner(self, x, y):
        move = y - self.rest
        return 0.5 * move @ self.H @ move - move @ (self.C @ x) + self.multipliers @ y

    def project_y(self, y):
        return jnp.clip(y, 0.0, 1e7)


def test_multipliers_of_any_size():
    """The face is that of y though free variables have residuals, and multipliers are
    small or large beside the curvature, which may vanish where y is at a bound."""
    rng, size, num_free, count = np.random.default_rng(0), 6, 3, 60
    H = np.zeros((count, size, size))
    factors = rng.normal(size=(count, num_free + 1, num_free))
    H[:, :num_free, :num_free] = np.einsum("kij,kil->kjl", factors, factors)
    C = rng.normal(size=(count, size, 2))
    rest, multipliers = np.zeros((2, count, size))
    rest[:, :num_free] = 10 ** rng.uniform(-1, 6, (count, num_free))
    multipliers[:, num_free:] = 10 ** rng.uniform(-6, 6, (count, size - num_free))
    y = rest * (1 + 1e-14 * rng.normal(size=rest.shape))
    problems = OnAFace(*map(jnp.asarray, (H, C, rest, multipliers)))
    response = blx.Implicit(None, blx.Pseudoinverse(), tolerance=None)

    @jax.jit
    @jax.vmap
    def gradients(problem, y):
        return blx.hypergradient(problem, jnp.zeros(2), y, response).gradient

    for k, gradient in enumerate(gradients(problems, jnp.asarray(y))):
        free = np.linalg.solve(H[k, :num_free, :num_free], C[k, :num_free])
        truth = free.T @ np.cos(rest[k, :num_free])
        assert np.allclose(gradient, truth, rtol=1e-6, atol=0), k


class LinearInY(blx.AbstractBilevelProblem):
    """f is linear in y, on a ball or on a box, in any units of f and of y."""

    unit_f: Array
    unit_y: Array
    direction: Array
    target: Array
    is_ball: bool = eqx.field(static=True)

    def outer(self, x, y):
        return jnp.sum((y / self.unit_y - self.target) ** 2) + jnp.sum((x - 1) ** 2)

    def inner(self, x, y):
        slope = self.direction + x if self.is_ball else self.direction * x
        return self.unit_f * jnp.sum(slope * y) / self.unit_y

    def project_y(self, y):
        if self.is_ball:
            return project.projection_l2_ball(y, self.unit_y)
        return jnp.clip(y, -self.unit_y, self.unit_y)


UNITS = ((1.0, 1.0), (1e-8, 1.0), (1e8, 1.0), (1.0, 1e-8), (1.0, 1e8), (1e-3, 1e3))


def test_a_linear_inner_objective_in_any_units():
    direction, x = jnp.array([1.5, 2.5, -0.5]), jnp.ones(3)
    points = {"least": [-1.0, -1, 1], "largest": [1.0, 1, -1], "neither": [0.0, 0.5, 0]}

    @jax.jit
    def residuals(unit_f, unit_y, y):
        problem = LinearInY(unit_f, unit_y, direction, jnp.ones(3), False)
        return blx.certify(problem, blx.WarmStart(), x, unit_y * y).residuals

    for name, y in points.items():
        first = residuals(*map(jnp.asarray, (1.0, 1.0)), jnp.array(y))
        assert (first["inner"] < 1e-12) if name == "least" else (first["inner"] > 0.1)
        for units in UNITS[1:]:
            found = residuals(*map(jnp.asarray, units), jnp.array(y))
            for key, value in found.items():
                assert np.isclose(value, first[key], rtol=1e-6, atol=1e-12), (units, key)


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.float64))
def test_a_linear_inner_objective_on_a_ball(dtype):
    a, t, x = np.array([[1.0, 2, -1], [0.6, 0, 0.8], [0.1, 0.2, 0.3]])
    length = np.linalg.norm(a + x)
    n = (a + x) / length
    truth = -(np.eye(3) - np.outer(n, n)) / length @ (2 * (-n - t)) + 2 * (x - 1)
    response = blx.Implicit(blx.ProjectedGradient(), blx.Pseudoinverse())
    eps = float(jnp.finfo(dtype).eps)
    a, t, x = (jnp.asarray(u, dtype) for u in (a, t, x))

    @jax.jit
    def found(unit_f, unit_y, y):
        problem = LinearInY(unit_f, unit_y, a, t, True)
        return blx.hypergradient(problem, x, y, response)

    for units in UNITS:
        unit_f, unit_y = (jnp.asarray(unit, dtype) for unit in units)
        # From the center. A minimum that is right to the last bit is no failure.
        out = found(unit_f, unit_y, jnp.zeros(3, dtype))
        assert np.allclose(out.y / unit_y, -n, rtol=0, atol=30 * eps)
        assert np.allclose(out.gradient, truth, rtol=0, atol=100 * eps)


@pytest.mark.parametrize(
    "response",
    (
        blx.Implicit(blx.ProjectedGradient(), blx.Pseudoinverse()),
        blx.Unrolled(optax.sgd(0.4), 60),
    ),
    ids=("implicit", "unrolled"),
)
def test_a_set_that_closes_over_what_is_differentiated(response):
    # Where the bound holds y moves with it, and elsewhere it does not.
    free = np.array([3.0, 1.0, 4.0])

    def total(bound, held):
        problem = blx.BilevelProblem(
            lambda x, y: jnp.sum(y),
            lambda x, y: jnp.sum((y - x - free) ** 2),
            project_y=lambda y: jnp.clip(y, -1.0, bound + held[0]),
        )
        y = blx.best_response(problem, jnp.zeros(3), jnp.zeros(3), response)
        return jnp.sum(y**2)

    bound, held = jnp.array(0.7), [jnp.array(0.8)]
    for transform in (jax.grad, jax.jacfwd):
        of_bound = transform(lambda bound: total(bound, held))
        assert np.isclose(of_bound(bound), 2 * 2 * 1.5, rtol=1e-10)
        of_held = transform(lambda held: total(bound, [held]))
        assert np.isclose(jax.jit(of_held)(held[0]), 2 * 2 * 1.5, rtol=1e-10)
