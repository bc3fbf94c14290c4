"""The error bound of a hypergradient, against errors that are known."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from helpers import tree_has_dtype
from jaxtyping import Array

import bilevel_eqx as blx


NUM_PROBLEMS, N, M = 100, 12, 4


class Quadratic(blx.AbstractBilevelProblem):
    """Of random spectrum, with condition numbers up to a thousand."""

    H: Array
    B: Array
    c: Array
    W: Array
    C: Array

    def outer(self, x, y):
        mixed = x @ (self.C @ y)
        return 0.5 * y @ (self.W @ y) - jnp.sum(y) + mixed + 0.5 * x @ x

    def inner(self, x, y):
        return 0.5 * y @ (self.H @ y) + y @ (self.B @ x + self.c)

    @staticmethod
    def draw(key):
        keys = jr.split(key, 7)
        Q, _ = np.linalg.qr(np.asarray(jr.normal(keys[0], (N, N))))
        values = 10.0 ** np.asarray(jr.uniform(keys[1], (N,), minval=-3, maxval=0))
        root = jr.normal(keys[4], (N, N)) / N**0.5
        problem = Quadratic(
            jnp.asarray((Q * values) @ Q.T),
            jr.normal(keys[2], (N, M)),
            jr.normal(keys[3], (N,)),
            root @ root.T,
            jr.normal(keys[5], (M, N)),
        )
        return problem, jr.normal(keys[6], (M,))

    def truth(self, x):
        fields = self.H, self.B, self.c, self.W, self.C, x
        H, B, c, W, C, x = map(np.asarray, fields)
        y = -np.linalg.solve(H, B @ x + c)
        outer_y = W @ y - 1 + C.T @ x
        return C @ y + x - B.T @ np.linalg.solve(H, outer_y)


class Logistic(blx.AbstractBilevelProblem):
    """A penalty for each weight, in an exponential: strongly convex and not quadratic."""

    features: Array
    labels: Array
    groups: Array
    held_out: Array

    def outer(self, x, y):
        return jnp.mean(jax.nn.softplus(-(self.held_out @ y))) + 0.1 * x @ y[:M]

    def inner(self, x, y):
        loss = jnp.mean(jax.nn.softplus(-self.labels * (self.features @ y)))
        return loss + 0.05 * jnp.exp(self.groups @ x) @ y**2

    @staticmethod
    def draw(key):
        keys = jr.split(key, 6)
        scales = jnp.exp(jr.uniform(keys[1], (N,), minval=-2, maxval=1))
        problem = Logistic(
            jr.normal(keys[0], (30, N)) * scales[None, :],
            jnp.sign(jr.normal(keys[2], (30,))),
            jr.normal(keys[3], (N, M)) / 3,
            jr.normal(keys[4], (30, N)),
        )
        return problem, jr.normal(keys[5], (M,))

    def truth(self, x):
        """Newton's method and a dense solve, in NumPy."""
        A, s, G, V = map(
            np.asarray, (self.features, self.labels, self.groups, self.held_out)
        )
        x = np.asarray(x)
        weights, y = 0.1 * np.exp(G @ x), np.zeros(N)

        def sigmoid(t):
            return 1 / (1 + np.exp(-t))

        for _ in range(100):
            p = sigmoid(-s * (A @ y))
            gradient = -A.T @ (s * p) / 30 + weights * y
            H = (A.T * (p * (1 - p))) @ A / 30 + np.diag(weights)
            step = np.linalg.solve(H, gradient)
            y = y - step / max(1.0, np.linalg.norm(step))
        assert np.linalg.norm(gradient) < 1e-12
        outer_y = -V.T @ sigmoid(-(V @ y)) / 30 + 0.1 * np.eye(N)[:, :M] @ x
        B = G * (weights * y)[:, None]
        return 0.1 * y[:M] - B.T @ np.linalg.solve(H, outer_y)


def stacked(kind):
    drawn = [kind.draw(key) for key in jr.split(jr.key(7), NUM_PROBLEMS)]
    problems = jax.tree.map(lambda *u: jnp.stack(u), *[p for p, _ in drawn])
    return problems, jnp.stack([x for _, x in drawn]), [p.truth(x) for p, x in drawn]


def vouched(problems, xs):
    """Lower bounds on the curvature that hold at every y."""
    if isinstance(problems, Quadratic):
        return jnp.linalg.eigvalsh(problems.H)[:, 0]
    # That of the penalty: the loss is convex.
    return 0.1 * jnp.min(jnp.exp(jnp.einsum("knm,km->kn", problems.groups, xs)), axis=1)


_linear = {
    "neumann": blx.Neumann(5, 0.3),
    "cg": blx.TruncatedCG(4),
    "pinv": blx.Pseudoinverse(),
}


@pytest.mark.parametrize("linear", _linear)
@pytest.mark.parametrize("kind", [Quadratic, Logistic])
def test_never_violated_and_not_far_off(kind, linear):
    problems, xs, truths = stacked(kind)
    response = blx.Implicit(
        blx.GradientDescent(0.3, 100), _linear[linear], tolerance=None
    )
    bounds = {}
    for source in ("dense", "vouched", "lanczos"):
        given = vouched(problems, xs) if source == "vouched" else source

        @eqx.filter_jit
        @eqx.filter_vmap(in_axes=(0, 0, 0 if source == "vouched" else None))
        def run(problem, x, curvature):
            return blx.hypergradient(
                problem, x, jnp.zeros(N), response, curvature=curvature, throw=False
            )

        out = run(problems, xs, given)
        errors = np.linalg.norm(np.asarray(out.gradient) - np.stack(truths), axis=1)
        assert out.error.verified == (source != "lanczos")
        bounds[source] = np.asarray(out.error.bound)
        assert np.all(np.isfinite(bounds[source]))
    assert np.median(errors) > 1e-6, "an error that is none proves nothing"
    for source in ("dense", "vouched"):
        assert np.all(errors <= bounds[source])
    assert np.sum(errors > bounds["lanczos"]) <= 5
    for source in bounds:
        assert np.median(bounds[source] / errors) <= 100


def test_formula():
    problem, x = Quadratic.draw(jr.key(0))
    linear = blx.Neumann(7, 0.5)
    response = blx.Implicit(None, linear)
    y = jr.normal(jr.key(1), (N,))
    out = blx.hypergradient(problem, x, y, response, curvature="dense")
    H, B, W, C = (np.asarray(u) for u in (problem.H, problem.B, problem.W, problem.C))
    outer_y = W @ y - 1 + C.T @ x
    q = np.zeros(N)
    for _ in range(7):
        q = q + 0.5 * (outer_y - H @ q)
    slope = np.linalg.norm(H @ y + B @ x + np.asarray(problem.c))
    residual = np.linalg.norm(outer_y - H @ q)
    mu = np.linalg.eigvalsh(H)[0]
    B, C, W = (np.linalg.norm(u, 2) for u in (B, C, W))
    delta = slope / mu
    expected = C * delta + B / mu * (residual + W * delta)
    assert np.isclose(out.error.bound, expected, rtol=1e-9)
    assert np.isclose(out.error.inner_residual, slope)
    assert np.isclose(out.error.linear_residual, residual)
    assert np.isclose(out.error.distance, delta, rtol=1e-9)
    assert np.isclose(out.error.curvature, mu, rtol=1e-9)


def test_holds_where_all_is_solved():
    # There rounding is all that is left, and the bound has to know of it.
    for seed in range(20):
        problem, x = Quadratic.draw(jr.key(seed))
        response = blx.Implicit(blx.Projection(), blx.Pseudoinverse())
        out = blx.hypergradient(problem, x, jnp.zeros(N), response, curvature="dense")
        error = np.linalg.norm(np.asarray(out.gradient) - problem.truth(x))
        assert error <= out.error.bound


def test_proximal_is_bounded_as_what_it_is():
    problem, x = Quadratic.draw(jr.key(3))
    anchor, epsilon = jr.normal(jr.key(4), (N,)), 0.2
    damped = eqx.tree_at(
        lambda p: (p.H, p.c),
        problem,
        (problem.H + epsilon * jnp.eye(N), problem.c - epsilon * anchor),
    )
    response = blx.Proximal(
        epsilon, blx.GradientDescent(0.5, 20), blx.TruncatedCG(3), tolerance=None
    )
    out = blx.hypergradient(problem, x, anchor, response, curvature="dense")
    error = np.linalg.norm(np.asarray(out.gradient) - damped.truth(x))
    assert 1e-8 < error <= out.error.bound <= 100 * error
    assert out.error.curvature >= epsilon


def test_large_and_matrix_free():
    n = 3000
    values = jnp.linspace(0.5, 2.0, n)
    problem = blx.BilevelProblem(
        lambda x, y: 0.5 * jnp.sum((y - 1) ** 2),
        lambda x, y: 0.5 * jnp.sum(values * y**2) - jnp.sum(y * x),
    )
    x = jnp.linspace(-1.0, 1.0, n)
    response = blx.Implicit(
        blx.GradientDescent(0.5, 8), blx.TruncatedCG(4), tolerance=None
    )
    y = x / values
    truth = (y - 1) / values
    for curvature in ("lanczos", 0.5):
        out = blx.hypergradient(problem, x, jnp.zeros(n), response, curvature=curvature)
        error = jnp.linalg.norm(out.gradient - truth)
        assert error <= out.error.bound <= 100 * error


def test_single_precision():
    problem, x = Quadratic.draw(jr.key(5))
    problem, x = jax.tree.map(lambda u: u.astype(jnp.float32), (problem, x))
    response = blx.Implicit(blx.GradientDescent(0.5, 50), blx.TruncatedCG(6))
    y0 = jnp.zeros(N, jnp.float32)
    run = eqx.filter_jit(blx.hypergradient)
    out = run(problem, x, y0, response, curvature="lanczos", throw=False)
    assert tree_has_dtype(out.error, jnp.float32)
    problem, x = jax.tree.map(lambda u: u.astype(jnp.float64), (problem, x))
    truth = problem.truth(x)
    error = np.linalg.norm(np.asarray(out.gradient) - truth)
    assert error <= float(out.error.bound)


def test_none_unless_asked_for():
    problem, x = Quadratic.draw(jr.key(0))
    response = blx.Implicit(None, blx.TruncatedCG(5))
    assert blx.hypergradient(problem, x, jnp.zeros(N), response).error is None


def test_says_what_it_knows():
    problem, x = Quadratic.draw(jr.key(0))
    response = blx.Implicit(None, blx.TruncatedCG(30))
    y = jnp.zeros(N)
    for curvature, word in (("dense", "verified"), ("lanczos", "estimated")):
        out = blx.hypergradient(problem, x, y, response, curvature=curvature)
        sentence = str(out.error)
        assert word in sentence and f"{float(out.error.bound):.3g}" in sentence

    singular = eqx.tree_at(lambda p: p.H, problem, problem.H.at[0].set(0).at[:, 0].set(0))
    out = blx.hypergradient(singular, x, y, response, curvature="dense")
    assert out.error.bound == jnp.inf
    assert "No bound" in str(out.error) and "Proximal" in str(out.error)


def test_refusals():
    problem, x = Quadratic.draw(jr.key(0))
    y = jnp.zeros(N)
    implicit = blx.Implicit(None, blx.TruncatedCG(5))

    def run(response=implicit, curvature="dense", problem=problem):
        blx.hypergradient(problem, x, y, response, curvature=curvature)

    with pytest.raises(ValueError, match="'dense', 'lanczos', or a number"):
        run(curvature="exact")
    with pytest.raises(ValueError, match="greater than zero"):
        run(curvature=-1.0)
    with pytest.raises(ValueError, match="`Unrolled` has no such residuals"):
        run(blx.Unrolled(optax.sgd(0.1), 3))
    confined = blx.BilevelProblem(
        problem.outer, problem.inner, project_y=lambda y: jnp.maximum(y, 0)
    )
    with pytest.raises(ValueError, match="project_y"):
        run(problem=confined)
