"""The error bound of a hypergradient, against errors that are known."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from helpers import as_numpy, tree_has_dtype
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


def vouched(problem, x):
    """A lower bound on the curvature that holds at every y."""
    if isinstance(problem, Quadratic):
        return np.linalg.eigvalsh(problem.H)[0]
    # That of the penalty: the loss is convex.
    return 0.1 * np.min(np.exp(np.asarray(problem.groups @ x)))


def hypergradient(problem, x, y0, response, **kwargs):
    """One without its statistics. A bound does not read them, and without them it is one
    program for all linear solvers."""
    out = blx.hypergradient(problem, x, y0, response, **kwargs)
    return dataclasses.replace(out, stats={})


@eqx.filter_jit
def all_bounds(problem, x, hypergradient, known):
    """From each source of the curvature: one program, in which they share their parts."""
    sources = {"dense": "dense", "vouched": known, "lanczos": "lanczos"}
    return {k: blx.error_bound(problem, x, hypergradient, v) for k, v in sources.items()}


_slow = pytest.mark.slow


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, linear",
    (
        pytest.param(Quadratic, blx.Neumann(5, 0.3), marks=_slow),
        (Quadratic, blx.TruncatedCG(4)),
        pytest.param(Quadratic, blx.Pseudoinverse(), marks=_slow),
        pytest.param(Logistic, blx.Neumann(5, 0.3), marks=_slow),
        pytest.param(Logistic, blx.TruncatedCG(4), marks=_slow),
        pytest.param(Logistic, blx.Pseudoinverse(), marks=_slow),
    ),
    ids=lambda part: getattr(part, "__name__", type(part).__name__),
)
def test_never_violated_and_not_far_off(kind, linear):
    response = blx.Implicit(blx.GradientDescent(0.3, 100), linear, tolerance=None)
    errors, bounds = [], []
    for key in jr.split(jr.key(7), NUM_PROBLEMS):
        problem, x = kind.draw(key)
        out = hypergradient(problem, x, jnp.zeros(N), response, throw=False)
        found = all_bounds(problem, x, out, jnp.asarray(vouched(problem, x)))
        for source, error in found.items():
            # A decomposition is right at one point only.
            sure = source == "vouched" or (source == "dense" and kind is Quadratic)
            assert error.verified == sure
        errors.append(np.linalg.norm(np.asarray(out.gradient) - problem.truth(x)))
        bounds.append({source: float(error.bound) for source, error in found.items()})
    assert np.median(errors) > 1e-6, "an error that is none proves nothing"
    for source in ("dense", "vouched", "lanczos"):
        of_source = np.array([bound[source] for bound in bounds])
        assert np.all(np.isfinite(of_source))
        assert np.sum(errors > of_source) <= (5 if source == "lanczos" else 0)
        assert np.median(of_source / errors) <= 100


def test_formula():
    problem, x = Quadratic.draw(jr.key(0))
    linear = blx.Neumann(7, 0.5)
    response = blx.Implicit(None, linear)
    y = jr.normal(jr.key(1), (N,))
    out = blx.hypergradient(problem, x, y, response)
    error = blx.error_bound(problem, x, out, "dense")
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
    assert np.allclose(out.adjoint, q, rtol=1e-12)
    assert np.isclose(error.bound, expected, rtol=1e-9)
    assert np.isclose(error.inner_residual, slope)
    assert np.isclose(error.linear_residual, residual)
    assert np.isclose(error.distance, delta, rtol=1e-9)
    assert np.isclose(error.curvature, mu, rtol=1e-9)


@pytest.mark.slow
def test_holds_where_all_is_solved():
    # There rounding is all that is left, and the bound has to know of it.
    for seed in range(20):
        problem, x = Quadratic.draw(jr.key(seed))
        response = blx.Implicit(blx.Projection(), blx.Pseudoinverse())
        out = hypergradient(problem, x, jnp.zeros(N), response)
        error = np.linalg.norm(np.asarray(out.gradient) - problem.truth(x))
        assert error <= all_bounds(problem, x, out, jnp.ones(()))["dense"].bound


@pytest.mark.slow
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
    out = hypergradient(problem, x, anchor, response)
    error = np.linalg.norm(np.asarray(out.gradient) - damped.truth(x))
    found = blx.error_bound(problem, x, out, "dense")
    assert 1e-8 < error <= found.bound <= 100 * error
    assert found.curvature >= epsilon


@pytest.mark.slow
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
    out = blx.hypergradient(problem, x, jnp.zeros(n), response)
    error = jnp.linalg.norm(out.gradient - truth)
    for curvature in ("lanczos", 0.5):
        bound = blx.error_bound(problem, x, out, curvature).bound
        assert error <= bound <= 100 * error


@pytest.mark.slow
def test_single_precision():
    problem, x = Quadratic.draw(jr.key(5))
    problem, x = jax.tree.map(lambda u: u.astype(jnp.float32), (problem, x))
    response = blx.Implicit(blx.GradientDescent(0.5, 50), blx.TruncatedCG(6))
    y0 = jnp.zeros(N, jnp.float32)
    out = blx.hypergradient(problem, x, y0, response, throw=False)
    bound = blx.error_bound(problem, x, out, "lanczos")
    assert tree_has_dtype(bound, jnp.float32)
    problem, x = jax.tree.map(lambda u: u.astype(jnp.float64), (problem, x))
    truth = problem.truth(x)
    error = np.linalg.norm(np.asarray(out.gradient) - truth)
    assert error <= float(bound.bound)


@pytest.mark.slow
@pytest.mark.parametrize(
    "response",
    (
        blx.Implicit(None, blx.TruncatedCG(5)),
        blx.Proximal(0.5, None, blx.TruncatedCG(5)),
    ),
    ids=lambda response: type(response).__name__,
)
def test_a_hypergradient_holds_no_data(response):
    # It leaves programs and is batched: only arrays, and none of the problem's.
    problem, x = Quadratic.draw(jr.key(0))
    xs = jnp.stack([x, 2 * x])
    # As the other tests of the same response, so that the programs are theirs.
    implicit = isinstance(response, blx.Implicit)
    curvature = jnp.asarray(0.01) if implicit else "dense"

    @jax.jit
    @jax.vmap
    def run(x):
        return blx.hypergradient(problem, x, jnp.zeros(N), response)

    @jax.jit
    @jax.vmap
    def bounds(x, out):
        return blx.error_bound(problem, x, out, curvature).bound

    out = run(xs)
    assert max(leaf.size for leaf in jax.tree.leaves(out)) <= 2 * N
    found = bounds(xs, out)
    for i in range(2):
        one = hypergradient(problem, xs[i], jnp.zeros(N), response)
        if implicit:
            expected = all_bounds(problem, xs[i], one, curvature)["vouched"].bound
        else:
            expected = blx.error_bound(problem, xs[i], one, curvature).bound
        assert np.isclose(found[i], expected, rtol=1e-12)


@pytest.mark.slow
def test_says_what_it_knows():
    problem, x = Quadratic.draw(jr.key(0))
    response = blx.Implicit(None, blx.TruncatedCG(30))
    y = jnp.zeros(N)
    out = hypergradient(problem, x, y, response)
    found = all_bounds(problem, x, out, jnp.ones(()))
    for curvature, word in (("dense", "verified"), ("lanczos", "estimated")):
        error = found[curvature]
        assert word in str(error) and f"{float(error.bound):.3g}" in str(error)

    singular = eqx.tree_at(lambda p: p.H, problem, problem.H.at[0].set(0).at[:, 0].set(0))
    out = hypergradient(singular, x, y, response)
    error = all_bounds(singular, x, out, jnp.ones(()))["dense"]
    assert error.bound == jnp.inf
    assert "No bound" in str(error) and "Proximal" in str(error)


@pytest.mark.slow
def test_refusals():
    problem, x = Quadratic.draw(jr.key(0))
    y = jnp.zeros(N)
    implicit = blx.Implicit(None, blx.TruncatedCG(5))

    def run(response=implicit, curvature="dense", problem=problem):
        def bound(x):
            out = blx.hypergradient(problem, x, y, response, throw=False)
            return blx.error_bound(problem, x, out, curvature)

        # Traced only: they are refused before anything is compiled.
        eqx.filter_eval_shape(bound, x)

    with pytest.raises(ValueError, match="'dense', 'lanczos', or a lower bound"):
        run(curvature="exact")
    with pytest.raises(ValueError, match="greater than zero"):
        run(curvature=-1.0)
    with pytest.raises(ValueError, match="`Unrolled` does not have"):
        run(blx.Unrolled(optax.sgd(0.1), 3))
    with pytest.raises(ValueError, match="does not have"):
        run(blx.MinimumDisplacement())
    confined = blx.BilevelProblem(
        problem.outer, problem.inner, project_y=lambda y: jnp.maximum(y, 0)
    )
    with pytest.raises(ValueError, match="project_y"):
        run(problem=confined)


#
# Rounding
#


class NoisyRidge(blx.AbstractBilevelProblem):
    A: Array
    b: Array
    t: Array

    def inner(self, x, y):
        fit = 0.5 * jnp.sum((self.A @ y - self.b) ** 2)
        return fit + 0.5 * jnp.sum(jnp.exp(x) * y**2)

    def outer(self, x, y):
        return 0.5 * jnp.sum((y - self.t) ** 2)


MOST_ROWS = 1000


@pytest.mark.slow
@pytest.mark.parametrize(
    "rows, noise",
    (
        pytest.param(200, 1e4, marks=_slow),
        (200, 0.0),
        pytest.param(40, 1e6, marks=_slow),
        pytest.param(MOST_ROWS, 1e3, marks=_slow),
    ),
)
def test_rounding_does_not_violate_it(rows, noise):
    # The residual is large and orthogonal to A: the gradient is small because large
    # numbers cancel, and what is left of it in single precision is rounding.
    response = blx.Implicit(blx.Projection(), blx.Pseudoinverse())
    x, ratios = jnp.zeros(3, jnp.float32), []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        A, y, t = rng.normal(size=(rows, 3)), rng.normal(size=3), rng.normal(size=3)
        across = rng.normal(size=rows)
        across -= A @ np.linalg.lstsq(A, across)[0]
        # Rows of zeros add no rounding, and with them all cases are one program.
        more = [(0, MOST_ROWS - rows)]
        data = np.pad(A, [*more, (0, 0)]), np.pad(A @ y + noise * across, more), t
        problem = NoisyRidge(*(jnp.asarray(u, jnp.float32) for u in data))
        out = hypergradient(problem, x, jnp.zeros_like(x), response, throw=False)
        error = blx.error_bound(problem, x, out, "dense")
        assert error.verified and np.isfinite(error.bound)
        # Of the rounded data, in double precision, where exp(x) = 1.
        A, b, t = map(as_numpy, (problem.A, problem.b, problem.t))
        H = A.T @ A + np.eye(3)
        y = np.linalg.solve(H, A.T @ b)
        exact = -y * np.linalg.solve(H, y - t)
        off = np.linalg.norm(as_numpy(out.gradient) - exact)
        ratios.append(off / float(error.bound))
    assert max(ratios) <= 1
    # It is not so large as to say nothing.
    assert max(ratios) > 1e-3
