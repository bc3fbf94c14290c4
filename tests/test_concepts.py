"""Every equilibrium: that each registered pipeline reaches it, that its certificate tells
it from the others, and that what cannot be computed is refused."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import as_numpy, toy_a, tree_allclose, tree_has_dtype
from jaxtyping import Array

import bilevel_eqx as blx


toy = toy_a()
zeros = jnp.zeros(2)

RADIUS, EPSILON = 0.5, 1.0


#
# Toy A: F = (w - x1)^2 / 2 + (x0 - 1)^2 / 2, f = x0^2 / 2 - w x0, from x1 = 0.
#

_concepts = {
    "optimistic": blx.Optimistic(),
    "cold": blx.ColdStart(),
    "warm": blx.WarmStart(),
    "partly warm": blx.WarmStart(EPSILON),
    "pessimistic": blx.Pessimistic(RADIUS),
    "Nash": blx.Nash(),
}

# Where each puts (w, x0, x1).
_points = {
    "optimistic": (1.0, 1.0, 1.0),
    "cold": (0.5, 0.5, 0.0),
    "warm": (0.5, 0.5, 0.0),
    "partly warm": (1 / 3, 1 / 3, 0.0),
    "pessimistic": (0.25, 0.25, -0.5),
    "Nash": (0.0, 0.0, 0.0),
    "nowhere": (0.3, -0.4, 2.0),
}

# The others that satisfy a definition too. A full warm start from x1 = c has
# w = (1 + c) / 2, whatever c is; the optimistic point is where all gradients vanish.
_also = {
    "optimistic": set(),
    "cold": {"warm"},
    "warm": {"cold", "optimistic", "pessimistic"},
    "partly warm": {"optimistic"},
    "pessimistic": set(),
    "Nash": {"optimistic"},
}

# Which pipelines are iterative, with the number of steps and what they then promise.
_promises = {
    "value function": (1000, 1e-5),
    "aggregation": (1000, 1e-5),
    "penalty": (10_000, 3e-2),
    "simultaneous": (300, 1e-6),
    "alternating": (300, 1e-6),
    "F2SA": (1000, 1e-6),
    "PBGD": (1000, 1e-6),
    "SOBA": (2000, 1e-5),
    "SABA": (2000, 2e-2),
    "SRBA": (2000, 2e-2),
    "MA-SOBA": (10_000, 3e-2),
    "AmIGO": (1000, 1e-6),
    # Ten terms of a series, and ten steps of y.
    "stocBiO": (1000, 1e-3),
    "PZOBO": (1000, 3e-2),
}

_slow = {"SRBA", "MA-SOBA", "stocBiO", "PBGD"}


def _cases():
    for concept, equilibrium in _concepts.items():
        for entry in blx.registered(type(equilibrium)):
            if (concept, entry.name) == ("partly warm", "PZOBO"):
                continue  # refused: below
            heavy = entry.name in _slow or concept == "partly warm"
            marks = pytest.mark.slow if heavy and entry.name in _promises else ()
            yield pytest.param(concept, entry.name, marks=marks)


def _steps_and_promise(name):
    return _promises.get(name, (30, 1e-6))


@pytest.mark.parametrize("concept, name", list(_cases()))
def test_toy_a(concept, name):
    equilibrium = _concepts[concept]
    num_steps, promise = _steps_and_promise(name)
    solution = blx.solve(
        toy, equilibrium, jnp.array(0.6), zeros, pipeline=name, num_steps=num_steps
    )
    w, x0, x1 = _points[concept]
    assert tree_allclose(solution.x, w, rtol=promise)
    assert tree_allclose(solution.y, np.array([x0, x1]), rtol=promise)
    assert solution.certificate.largest < promise


def test_a_partial_warm_start_needs_damping():
    with pytest.raises(ValueError, match="no damping"):
        blx.solve(
            toy, blx.WarmStart(1.0), jnp.array(0.6), zeros, pipeline="PZOBO", num_steps=1
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    "concept",
    (
        pytest.param("optimistic", marks=pytest.mark.slow),
        "cold",
        pytest.param("pessimistic", marks=pytest.mark.slow),
        "Nash",
    ),
)
def test_toy_a_in_float32(concept):
    w0, y0 = jnp.array(0.6, jnp.float32), jnp.zeros(2, jnp.float32)
    out = blx.solve(toy, _concepts[concept], w0, y0, num_steps=200, throw=False)
    parts = out.x, out.y, out.value, out.certificate, out.stats, out.history
    assert tree_has_dtype(parts, jnp.float32)
    assert tree_allclose((out.x, *out.y), _points[concept], rtol=1e-3)


def test_toy_a_by_name_covers_the_registry():
    tested = {type(equilibrium) for equilibrium in _concepts.values()}
    others = {blx.Stackelberg, blx.ProximalEquilibrium}  # below
    registered = {entry.equilibrium for entry in blx.registered()}
    assert {k for k in registered if k.__module__.startswith("bilevel_eqx")} == (
        tested | others
    )


def test_toy_a_pessimistic_radii():
    # From R = 1 on the answer is at a kink: both ends of the ball are as bad.
    start = jnp.array(0.6)
    for radius, w in [(0.3, 0.35), (1.0, 0.0), (2.0, 0.0)]:
        solution = blx.solve(toy, blx.Pessimistic(radius), start, zeros, num_steps=30)
        value = 0.5 * (w + radius) ** 2 + 0.5 * (w - 1) ** 2
        assert tree_allclose(solution.x, w, rtol=1e-6)
        assert tree_allclose(jnp.abs(solution.y), np.array([w, radius]), rtol=1e-6)
        assert tree_allclose(solution.value, value, rtol=1e-6)
        assert solution.certificate.largest < 1e-6


@pytest.mark.parametrize("concept", list(_concepts))
def test_certificates_tell_toy_a_s_concepts_apart(concept):
    for at, (w, x0, x1) in _points.items():
        w, y = jnp.array(w), jnp.array([x0, x1])
        largest = blx.certify(toy, _concepts[concept], w, y, y0=zeros).largest
        if at in {concept} | _also[concept]:
            assert largest < 1e-6
        else:
            assert largest > 1e-2


def test_unsatisfied_conditions_are_named():
    # A warm start that is no optimistic equilibrium, and what it is short of.
    w, y = jnp.array(0.5), jnp.array([0.5, 0.0])
    warm = blx.certify(toy, blx.WarmStart(), w, y)
    optimistic = blx.certify(toy, blx.Optimistic(), w, y)
    assert warm.largest < 1e-12
    residuals = {k: float(v) for k, v in optimistic.residuals.items()}
    # P F_y = -1/2, against F_y and its change if w and y change by their sizes.
    terms = np.hypot(0.5, 0.5) + 0.5 * np.hypot(np.sin(1), np.cos(1))
    assert residuals["selection"] == pytest.approx(0.5 / (0.5 + terms), rel=1e-8)
    assert residuals["inner"] == residuals["curvature"] == 0
    assert "P_null F_y = 0" in str(optimistic)


#
# Toy C: V = p x^2 / 2 + q x y - r y^2 / 2. At the origin it is proximal for weights up to
# 3, and so Stackelberg and not Nash.
#


class ToyC(blx.AbstractBilevelProblem):
    p: Array
    q: float = 2.0
    r: float = 1.0

    def outer(self, x, y):
        return 0.5 * self.p * x**2 + self.q * x * y - 0.5 * self.r * y**2

    def inner(self, x, y):
        return -self.outer(x, y)


def _toy_c(p=-1.0):
    return ToyC(jnp.array(p))


@pytest.mark.slow
def test_toy_c_threshold():
    origin = jnp.array(0.0)

    @jax.jit
    @jax.vmap
    def proximal(p, weight):
        equilibrium = blx.ProximalEquilibrium(weight)
        return blx.certify(ToyC(p), equilibrium, origin, origin).largest

    # Its limits are Stackelberg, which the origin is, and Nash, which it is not.
    weights = np.array([0.0, 0.1, 1.0, 2.9, 3.1, 10.0, np.inf])
    values = as_numpy(proximal(jnp.full(7, -1.0), jnp.asarray(weights)))
    assert np.all(values[:4] < 1e-6) and np.all(values[4:] > 1e-2)

    def largest(equilibrium, problem):
        return blx.certify(problem, equilibrium, origin, origin).largest

    stackelberg, nash = blx.Stackelberg(), blx.Nash()
    assert largest(stackelberg, _toy_c()) < 1e-6 and largest(nash, _toy_c()) > 1e-2
    # A convex-concave game has them all in one place.
    assert np.all(proximal(jnp.ones(7), jnp.asarray(weights)) < 1e-6)
    for equilibrium in (nash, stackelberg):
        assert largest(equilibrium, _toy_c(p=1.0)) < 1e-6


@pytest.mark.parametrize(
    "weight", (pytest.param(0.0, marks=pytest.mark.slow), 2.0, jnp.inf)
)
def test_toy_c_is_reached(weight):
    problem = _toy_c(p=-1.0 if weight < 3 else 1.0)
    solution = blx.solve(
        problem,
        blx.ProximalEquilibrium(jnp.array(weight)),
        jnp.array(0.5),
        jnp.array(0.3),
        num_steps=500,
    )
    assert tree_allclose((solution.x, solution.y), (0.0, 0.0), rtol=1e-6)
    assert solution.certificate.largest < 1e-6


@pytest.mark.slow
def test_stackelberg_of_toy_c_is_reached():
    solution = blx.solve(
        _toy_c(), blx.Stackelberg(), jnp.array(0.5), jnp.array(0.3), num_steps=20
    )
    assert tree_allclose((solution.x, solution.y), (0.0, 0.0), rtol=1e-6)
    assert solution.certificate.largest < 1e-6


@pytest.mark.parametrize("alternating", (False, True))
def test_play_does_not_cycle(alternating):
    # Plain descent spirals outwards here, and in turn it cycles.
    bilinear = ToyC(jnp.array(0.0), 1.0, 0.0)
    x0, y0 = jnp.array(1.0), jnp.array(0.7)
    play = blx.pipelines.GradientPlay(alternating)
    out = blx.solve(bilinear, blx.Nash(), x0, y0, pipeline=play, num_steps=300)
    assert tree_allclose((out.x, out.y), (0.0, 0.0), rtol=1e-9)


#
# Toy B: F = |x - e|^2 / n - |y - e|^2, f = (|x| - e^T y)^2, y >= 1 / (2 sqrt n). The
# inner minimum at the answer is a corner of the set; the worst value has a kink there.
#


def _toy_b(n):
    def outer(x, y):
        return jnp.sum((x - 1) ** 2) / n - jnp.sum((y - 1) ** 2)

    def inner(x, y):
        return (jnp.sqrt(jnp.sum(x**2)) - jnp.sum(y)) ** 2

    def projection(y):
        return jnp.clip(y, 0.5 / np.sqrt(n), 100.0)

    x, y = jnp.full(n, 0.5), jnp.full(n, 0.5 / np.sqrt(n))
    return blx.BilevelProblem(outer, inner), blx.Pessimistic(within=projection), x, y


@pytest.mark.parametrize("n", (1, 3, pytest.param(8, marks=pytest.mark.slow)))
def test_toy_b_certificate(n):
    problem, equilibrium, x, y = _toy_b(n)
    certificate = blx.certify(problem, equilibrium, x, y)
    assert certificate.largest < 1e-6
    assert "kinks" in str(certificate) and "penalty" in str(certificate)
    # Other x, whose worst point is known too; and another inner minimum of the same x.
    farther = 1.2 * x
    worst = jnp.full(n, jnp.linalg.norm(farther) / n)
    out = blx.certify(problem, equilibrium, farther, worst).residuals
    assert out["selection"] < 1e-5 and out["inner"] < 1e-6
    assert n == 1 or out["outer"] > 1e-2
    if n > 1:
        tilted = worst.at[0].add(0.03).at[1].add(-0.03)
        tilted = blx.certify(problem, equilibrium, farther, tilted).residuals
        assert tilted["selection"] > 1e-4 and tilted["inner"] < 1e-6


def test_toy_b_is_reached():
    problem, equilibrium, x, y = _toy_b(3)
    out = blx.solve(
        problem, equilibrium, 1.6 * x, y + 0.2, pipeline="penalty", num_steps=20_000
    )
    assert tree_allclose((out.x, out.y), (x, y), rtol=2e-2)
    assert isinstance(
        blx.default_pipeline(equilibrium, problem), blx.pipelines.PenaltyAscent
    )
    with pytest.raises(ValueError, match="PenaltyAscent"):
        pipeline = blx.pipelines.NullSpaceAscent()
        blx.solve(problem, equilibrium, x, y, pipeline=pipeline, num_steps=1)


#
# Random linear-quadratic problems. The cost is that of compiling, which grows with the
# size; the answers do not get harder. The large ones that select an inner minimum are
# solved as one batch. (Batches of the others are in `test_solve.py`.)
#

SMALL = dict(n=12, rank=5, m=4, k=14)
LARGE = dict(n=40, rank=14, m=7, k=46)
sizes = pytest.mark.parametrize(
    "size",
    (
        pytest.param(SMALL, id="small"),
        pytest.param(LARGE, id="large", marks=pytest.mark.slow),
    ),
)


class LinearQuadratic(blx.AbstractBilevelProblem):
    H: Array
    B: Array
    features: Array
    direct: Array
    targets: Array

    def outer(self, x, y):
        misfit = self.features @ y + self.direct @ x - self.targets
        return 0.5 * jnp.sum(misfit**2) + 0.5 * jnp.sum((x - 1) ** 2)

    def inner(self, x, y):
        return 0.5 * jnp.sum(y * (self.H @ y)) + jnp.sum(y * (self.B @ x))


def _linear_quadratic(seed, n, rank, m, k):
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(rank, n)) / np.sqrt(n)
    arrays = (
        factor.T @ factor,
        -factor.T @ rng.normal(size=(rank, m)),
        rng.normal(size=(k, n)) / np.sqrt(n),
        rng.normal(size=(k, m)) / 3,
        rng.normal(size=k),
    )
    return arrays, 0.3 * rng.normal(size=n)


class ClosedForm:
    """The dense answers, by NumPy alone."""

    def __init__(self, arrays, y0):
        H, B, A, C, b = arrays
        self.arrays, m = arrays, B.shape[1]
        pinv = np.linalg.pinv(H, rcond=1e-10)
        values, vectors = np.linalg.eigh(H)
        self.null = vectors[:, values < 1e-10]
        self.start = y0 - pinv @ (H @ y0)
        self.jacobian = -pinv @ B
        self.along_x = A @ self.jacobian + C
        self.along_null = A @ self.null
        self.misfit = A @ self.start - b
        self.identity = np.eye(m)

    def outer(self, x, y):
        _, _, A, C, b = self.arrays
        return 0.5 * np.sum((A @ y + C @ x - b) ** 2) + 0.5 * np.sum((x - 1) ** 2)

    def cold(self):
        M = self.along_x
        x = np.linalg.solve(M.T @ M + self.identity, 1 - M.T @ self.misfit)
        return x, self.start + self.jacobian @ x

    def optimistic(self):
        m = len(self.identity)
        both = np.hstack([self.along_x, self.along_null])
        normal, right = both.T @ both, -both.T @ self.misfit
        normal[:m, :m] += self.identity
        right[:m] += 1
        answer = np.linalg.solve(normal, right)
        x, z = answer[:m], answer[m:]
        return x, self.start + self.jacobian @ x + self.null @ z

    def pessimistic(self, radius):
        """By the dual of the trust region, a convex function of its multiplier."""
        q, U = np.linalg.eigh(self.along_null.T @ self.along_null)
        AU, M = self.along_null @ U, self.along_x
        normal, slope = M.T @ M + self.identity, 1 - M.T @ self.misfit
        K, c = AU.T @ M, AU.T @ self.misfit

        def at(multiplier):
            # The misfits count with the weight I + AU diag(d) AU^T.
            d = 1 / (multiplier - q)
            x = np.linalg.solve(normal + (K.T * d) @ K, slope - (K.T * d) @ c)
            misfit = M @ x + self.misfit
            dual = 0.5 * misfit @ misfit + 0.5 * d @ (K @ x + c) ** 2
            dual = dual + 0.5 * multiplier * radius**2
            return x, dual + 0.5 * np.sum((x - 1) ** 2)

        low, high = -25.0, 10.0
        for _ in range(200):  # golden section, in the logarithm of the excess
            a, b = low + 0.382 * (high - low), low + 0.618 * (high - low)
            if at(q[-1] + np.exp(a))[1] < at(q[-1] + np.exp(b))[1]:
                high = b
            else:
                low = a
        return at(q[-1] + np.exp(low))


@eqx.filter_jit
@eqx.filter_vmap(in_axes=(eqx.if_array(0), None, None, 0, None))
def _solve_batch(problem, equilibrium, x0, y0, num_steps):
    out = blx.solve(problem, equilibrium, x0, y0, num_steps=num_steps, throw=False)
    return out.x, out.y, out.value, out.certificate.largest


def _solve_all(size, equilibrium, num_steps):
    drawn = [_linear_quadratic(seed, **size) for seed in range(5)]
    references = [ClosedForm(*arrays_and_start) for arrays_and_start in drawn]
    problems = [LinearQuadratic(*map(jnp.asarray, arrays)) for arrays, _ in drawn]
    starts = [jnp.asarray(start) for _, start in drawn]
    x0 = jnp.zeros(size["m"])
    if size is LARGE and isinstance(equilibrium, blx.Optimistic | blx.Pessimistic):
        batch = jax.tree.map(lambda *u: jnp.stack(u), *problems)
        out = _solve_batch(batch, equilibrium, x0, jnp.stack(starts), num_steps)
        yield from zip(*map(as_numpy, out), references)
        return
    # One after the other: a program for a batch takes twice as long to compile.
    for problem, y0, reference in zip(problems, starts, references):
        out = blx.solve(problem, equilibrium, x0, y0, num_steps=num_steps, throw=False)
        found = out.x, out.y, out.value, out.certificate.largest
        yield *map(as_numpy, found), reference


@sizes
@pytest.mark.parametrize(
    "equilibrium",
    (
        blx.Optimistic(),
        pytest.param(blx.ColdStart(), marks=pytest.mark.slow),
        # The same path: T6, in `test_pipeline.py`.
        pytest.param(blx.WarmStart(), marks=pytest.mark.slow),
    ),
    ids=str,
)
def test_linear_quadratic(size, equilibrium):
    out = _solve_all(size, equilibrium, 40)
    for x, y, value, largest, reference in out:
        # With fixed features a full warm start is where a cold one is.
        best = isinstance(equilibrium, blx.Optimistic)
        true_x, true_y = reference.optimistic() if best else reference.cold()
        assert np.allclose(x, true_x, rtol=1e-6, atol=1e-6)
        assert np.allclose(y, true_y, rtol=1e-6, atol=1e-6)
        assert value == pytest.approx(reference.outer(true_x, true_y), rel=1e-8)
        assert largest < 1e-6


@pytest.mark.slow
@sizes
def test_linear_quadratic_pessimistic(size):
    # In a ball as large as the last, two points are equally bad at the answer.
    for radius, kink in ((0.5, False), (1.0, False), (20.0, True)):
        out = _solve_all(size, blx.Pessimistic(radius), 80)
        for x, y, value, largest, reference in out:
            true_x, true_value = reference.pessimistic(radius)
            center = reference.start + reference.jacobian @ x
            assert np.linalg.norm(y - center) == pytest.approx(radius, rel=1e-6)
            # Better than the worst is only chance, and better than the best nothing.
            cold, best = reference.outer(*reference.cold()), reference.optimistic()
            assert reference.outer(*best) <= cold <= value
            assert value == pytest.approx(true_value, rel=1e-5 if kink else 1e-7)
            assert largest < (1e-2 if kink else 1e-6)
            if not kink:
                assert np.allclose(x, true_x, rtol=1e-5, atol=1e-5)


#
# What is refused, before any work is done
#


def _refused(equilibrium, *, problem=toy, x0=0.1, y0=zeros, **keywords):
    with pytest.raises(ValueError) as info:
        blx.solve(problem, equilibrium, jnp.array(x0), y0, num_steps=1, **keywords)
    return str(info.value)


def test_no_compact_set_is_refused():
    for radius in ((), (None,), (jnp.inf,)):
        with pytest.raises(ValueError, match="only in a compact set|no compact set"):
            blx.Pessimistic(*radius)
    with pytest.raises(ValueError, match="greater than zero"):
        blx.Pessimistic(-1.0)
    with pytest.raises(ValueError, match="y0="):
        blx.certify(toy, blx.Pessimistic(1.0), jnp.array(0.1), zeros)


def test_many_minima_are_refused_by_stackelberg():
    message = _refused(blx.Stackelberg())
    assert "singular" in message and "Optimistic()" in message
    squares = blx.LeastSquaresProblem(toy.outer, lambda w, y: y[0] - w)
    message = _refused(blx.Stackelberg(), problem=squares)
    assert "a sum of 1 squares of 2 variables" in message


def test_other_than_zero_sum_is_refused():
    assert "zero-sum" in _refused(blx.ProximalEquilibrium(1.0))
    # Not "nan times".
    x = jnp.ones(2)
    undefined = blx.BilevelProblem(
        lambda x, y: jnp.sum(jnp.sqrt(x - 1) + y), lambda x, y: -jnp.sum(y)
    )
    with pytest.raises(ValueError, match="not finite at \\(x0, y0\\)"):
        blx.ProximalEquilibrium(1.0).check(undefined, -9 * x, x)
    # Defined near (x, y) alone.
    near = blx.BilevelProblem(
        lambda x, y: jnp.sum(jnp.sqrt(0.1 - x * x) * y),
        lambda x, y: -jnp.sum(jnp.sqrt(0.1 - x * x) * y),
    )
    blx.ProximalEquilibrium(1.0).check(near, 0.3 * x, x)
    with pytest.raises(ValueError, match="at least zero"):
        blx.ProximalEquilibrium(-1.0)


@pytest.mark.parametrize(
    "equilibrium, pipeline",
    [
        (blx.Nash(), blx.pipelines.NullSpaceDescent()),
        (blx.Optimistic(), blx.pipelines.NullSpaceAscent()),
        (blx.Pessimistic(1.0), blx.pipelines.ValueFunctionDescent()),
        (blx.WarmStart(), blx.pipelines.GradientPlay()),
        (blx.ColdStart(), blx.pipelines.ProximalPlay()),
        (blx.Optimistic(), blx.pipelines.PenaltyAscent()),
    ],
    ids=lambda part: type(part).__name__,
)
def test_a_pipeline_for_another_concept_is_refused(equilibrium, pipeline):
    message = _refused(equilibrium, pipeline=pipeline)
    assert "aims at" in message and "null-space descent" in message


def test_penalty_is_refused_where_the_hessian_moves():
    moving = blx.BilevelProblem(toy.outer, lambda w, y: 0.5 * (w * y[0] - 1) ** 2)
    message = _refused(
        blx.Pessimistic(1.0), problem=moving, pipeline="penalty", y0=jnp.ones(2)
    )
    assert "NullSpaceAscent" in message


def test_arguments_of_pipelines():
    with pytest.raises(ValueError, match="optimiser"):
        blx.pipelines.NullSpaceDescent(optimiser=0.1)
    with pytest.raises(ValueError, match="selection_steps"):
        blx.pipelines.NullSpaceAscent(selection_steps=0)
    with pytest.raises(ValueError, match="eta"):
        blx.pipelines.ValueFunctionDescent(optax.sgd(0.1), eta=-1.0)
    with pytest.raises(ValueError, match="penalty"):
        blx.pipelines.PenaltyAscent(penalty=0.0)
    with pytest.raises(ValueError, match="num_steps"):
        blx.Aggregated(0)
