"""`check_hypergradient`: what is right is found right, and planted faults are named."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import FunctionOfValue, LinearBilevel, make_linear
from jaxtyping import Array

import bilevel_eqx as blx


slow = pytest.mark.slow
exact = blx.Implicit(blx.Projection(), blx.Pseudoinverse())
# The same where y0 is a minimum, with less to compile.
at_minimum = blx.Implicit(None, blx.Pseudoinverse())
OUTER = np.random.default_rng(1).normal(size=(3, 4))


class Curve(blx.AbstractBilevelProblem[Array, Array]):
    """A nonlinear inner problem with one minimum, into which faults can be planted.

    Those that change no shape are data, so that they share a program.
    """

    features: Array
    faults: dict[str, Array]
    scale: Array
    fault: str = ""

    def outer(self, x, y):
        if self.fault == "unreachable":
            y = jnp.zeros_like(y)
        y = jnp.where(self.faults["unmoved"], jnp.zeros_like(y), y)
        return self.scale * jnp.sum((jnp.asarray(OUTER, y.dtype) @ y - 1) ** 2)

    def inner(self, x, y):
        if self.fault == "swapped":
            x, y = y, x
        stop = jax.lax.stop_gradient
        x = jnp.where(self.faults["stopped"], stop(x), x)
        y = jnp.where(self.faults["hidden"] & (jnp.arange(y.size) == 0), stop(y), y)
        # Separable, whatever x: the losses fall for as long as one goes.
        endless = jnp.sum(jax.nn.softplus(-self.features[:3] @ y + x[:3]))
        fit = 0.5 * jnp.sum((self.features @ jnp.sinh(y) - x) ** 2)
        return self.scale * jnp.where(self.faults["endless"], endless, fit)


_AS_DATA = "stopped", "hidden", "endless", "unmoved"


def _curve(fault="", dtype=jnp.float64, scale=1.0):
    rng = np.random.default_rng(0)
    features = jnp.asarray(rng.normal(size=(5, 4)), dtype)
    x = jnp.asarray(rng.normal(size=5), dtype)
    faults = {name: jnp.asarray(name == fault) for name in _AS_DATA}
    form = "" if fault in _AS_DATA else fault
    problem = Curve(features, faults, jnp.asarray(scale, dtype), form)
    return problem, x, jnp.asarray(rng.normal(size=4), dtype) / 10


class Negated(blx.AbstractResponse):
    """A response whose Jacobian has lost its sign, as Table 1 of the paper has it."""

    right: blx.AbstractResponse

    def init(self, problem, x, anchor):
        return None

    def __call__(self, problem, x, anchor, state=None):
        answer = self.right(problem, x, anchor)

        def pullback(u):
            return answer.pullback(jax.tree.map(jnp.negative, u))

        return eqx.tree_at(lambda r: r.pullback, answer, pullback)

    def best_response(self, problem, x, anchor):
        return self.right.best_response(problem, x, anchor)

    def reaches(self, problem, x, anchor):
        return self.right.reaches(problem, x, anchor)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (jnp.float64, jnp.float32))
def test_right_is_right(dtype):
    responses = {
        "exact": exact,
        "unrolled": blx.Unrolled(optax.sgd(0.05), 3000),
        "truncated": blx.Implicit(blx.GradientDescent(0.05, 3000), blx.TruncatedCG(4)),
    }
    check = blx.check_hypergradient(*_curve(dtype=dtype), responses)
    assert check.sound and check.findings == ()
    assert list(check.differences) == ["true"]
    for name, row in check.responses.items():
        assert row.right and "right: the derivative" in row.verdict, name
        # In double precision, whatever that of the problem.
        assert row.errors["true"] < 1e-7
        assert row.cosines["true"] > 1 - 1e-9
        assert row.cost > 0
    text = str(check)
    assert "true error" in text and "linear residual" in text and "truncated" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault, words",
    (
        ("stopped", "inner gradient in x is not that of its values"),
        ("hidden", "`inner` in y is not that of its values"),
        ("swapped", "`inner(x, y)` fails, but `inner(y, x)` does not"),
        ("unreachable", "x does not reach F"),
        ("endless", "the inner problem was not solved"),
    ),
)
def test_faults_of_a_problem(fault, words):
    check = blx.check_hypergradient(*_curve(fault), [exact])
    assert not check.sound
    assert any(words in finding for finding in check.findings), check.findings
    assert words in str(check)


def test_an_integer_leaf():
    problem, _, y0 = _curve()
    check = blx.check_hypergradient(problem, jnp.arange(5), y0, [exact])
    assert not check.sound
    assert "int64" in check.findings[0] and "no derivative" in check.findings[0]


@pytest.mark.parametrize(
    "response, words",
    (
        (Negated(exact), "A sign is wrong"),
        (blx.Implicit(blx.Projection(), blx.Neumann(2, 1e-3)), "has not converged"),
        (blx.Implicit(blx.Projection(), blx.TruncatedCG(1)), "has not converged"),
        (blx.Unrolled(optax.sgd(1e-3), 5), "have not reached the minimum"),
        (blx.Fixed(), "exactly zero"),
        (
            blx.Implicit(blx.GradientDescent(1e-3, 3), blx.Pseudoinverse()),
            "inner solve did not converge",
        ),
        (blx.Implicit(blx.Projection(), blx.Neumann(50, 10.0)), "diverges"),
        (blx.Unrolled(optax.sgd(100.0), 50), "NaN or infinity"),
    ),
    ids=("sign", "neumann", "cg", "unrolled", "fixed", "inner", "diverged", "nan"),
)
def test_faults_of_a_response(response, words):
    check = blx.check_hypergradient(*_curve(), [response], num_coordinates=2)
    assert check.sound
    (row,) = check.responses.values()
    assert not row.right
    assert words in row.verdict, row.verdict
    assert row.errors["true"] > 1e-2


@pytest.mark.slow
def test_many_minima_have_two_derivatives():
    nearest = blx.MinimumDisplacement(blx.Projection(), blx.Pseudoinverse())
    rng = np.random.default_rng(2)
    bent = blx.LeastSquaresProblem(
        lambda x, y: jnp.sum((y - 1) ** 2),
        lambda x, y: jnp.stack([jnp.cos(x) @ y[:2] + y[2] * x[0] - 1]),
    )
    x, y0 = jnp.asarray(rng.normal(size=2)), jnp.asarray(rng.normal(size=3))
    check = blx.check_hypergradient(bent, x, y0, {"implicit": exact, "nearest": nearest})
    assert list(check.differences) == ["cold", "warm"]
    assert "a warm start" in check.responses["implicit"].verdict
    assert "a cold start" in check.responses["nearest"].verdict
    assert check.responses["implicit"].errors["cold"] > 1e-2
    assert check.responses["nearest"].errors["warm"] > 1e-2
    assert any("disagree by design" in finding for finding in check.findings)


@pytest.mark.slow
def test_many_minima_of_a_linear_problem_have_one_derivative():
    problem, x, _ = make_linear(LinearBilevel, jnp.float64)
    responses = {"implicit": exact, "nearest": blx.MinimumDisplacement()}
    y0 = jnp.zeros(problem.features.shape[1])
    check = blx.check_hypergradient(problem, x, y0, responses)
    assert check.responses["implicit"].right
    assert check.responses["nearest"].right


@jax.custom_vjp
def _softly(u):
    return jnp.log(jnp.cosh(u))


_softly.defvjp(lambda u: (_softly(u), u), lambda u, c: (c * jnp.tanh(u),))


@jax.custom_vjp
def _tanh(u):
    return jnp.tanh(u)


_tanh.defvjp(lambda u: (_tanh(u), u), lambda u, c: (c / jnp.cosh(u) ** 2,))


@jax.custom_vjp
def _twice(u):
    return jnp.log(jnp.cosh(u))


# A rule that calls a second one: forward over reverse mode meets a reverse-only function.
_twice.defvjp(lambda u: (_twice(u), u), lambda u, c: (c * _tanh(u),))


@jax.custom_vjp
def _wrong(u):
    return jnp.log(jnp.cosh(u))


_wrong.defvjp(lambda u: (_wrong(u), u), lambda u, c: (c * _tanh(2 * u),))


def _ruled(rule):
    return blx.BilevelProblem(
        lambda x, y: jnp.sum(_softly(y - 2)),
        lambda x, y: jnp.sum(rule(y - x)) + 0.5 * jnp.sum(y**2),
    )


def _ruled_minimum(x):
    """y and dy/dx: tanh(y - x) + y = 0, and dy/dx = s / (1 + s), s the slope of tanh."""
    x, y = np.asarray(x), np.zeros(2)
    for _ in range(20):
        y = y - (np.tanh(y - x) + y) / (1 / np.cosh(y - x) ** 2 + 1)
    slope = 1 / np.cosh(y - x) ** 2
    return y, slope / (1 + slope)


@pytest.mark.slow
def test_a_rule_for_reverse_mode_alone():
    x = jnp.array([0.3, 1.0])
    responses = {
        "implicit": at_minimum,
        "unrolled": blx.Unrolled(optax.sgd(0.5), 100),
        "nearest": blx.MinimumDisplacement(),
    }
    y, _ = _ruled_minimum(x)
    check = blx.check_hypergradient(_ruled(_softly), x, jnp.asarray(y), responses)
    assert check.sound and check.findings == ()
    assert check.responses["implicit"].right
    assert check.responses["unrolled"].right
    # It takes third derivatives, in forward mode.
    nearest = check.responses["nearest"]
    assert nearest.right or "`jax.custom_vjp`" in nearest.verdict
    singular = blx.BilevelProblem(
        lambda x, y: jnp.sum(_softly(y - 2)), lambda x, y: _softly(jnp.sum(y) - x[0])
    )
    check = blx.check_hypergradient(singular, x, jnp.full(2, 0.5 * x[0]), [at_minimum])
    (row,) = check.responses.values()
    assert row.right and row.errors["warm"] < 1e-6


@slow
def test_rules_that_call_rules():
    """There are no second derivatives in forward mode. The check takes them in reverse
    mode, and says which responses cannot."""
    x = jnp.array([0.3, 1.0])
    responses = {"implicit": exact, "unrolled": blx.Unrolled(optax.sgd(0.3), 200)}
    check = blx.check_hypergradient(_ruled(_twice), x, jnp.zeros(2), responses)
    (finding,) = check.findings
    assert check.sound and "cannot be computed in forward mode" in finding
    assert "`jax.custom_vjp`" in check.responses["implicit"].verdict
    assert check.responses["unrolled"].errors["true"] < 1e-8
    y, slope = _ruled_minimum(x)
    gradient = np.tanh(y - 2) * slope
    # The last two directions are the axes, in some order.
    found = check.differences["true"][-2:]
    assert np.allclose(np.sort(found), np.sort(gradient), rtol=1e-8)
    # A wrong rule is seen to be wrong.
    check = blx.check_hypergradient(_ruled(_wrong), x, jnp.zeros(2), [])
    assert not check.sound
    assert any("`inner` in y is not that of its values" in f for f in check.findings)


@pytest.mark.parametrize("scale", (1e-10, 1e10))
def test_the_units_of_the_objectives_do_not_matter(scale):
    check = blx.check_hypergradient(*_curve(scale=scale), [exact])
    assert check.sound and check.findings == ()
    check = blx.check_hypergradient(*_curve("unmoved", scale=scale), [exact])
    assert any("x does not reach F" in finding for finding in check.findings)


def test_a_kink_at_x_itself():
    # There all central differences are zero.
    problem = blx.BilevelProblem(
        lambda x, y: jnp.sum(jnp.abs(y)), lambda x, y: jnp.sum((y - x) ** 2)
    )
    check = blx.check_hypergradient(problem, jnp.zeros(2), jnp.zeros(2), [exact])
    assert not check.sound
    (finding,) = check.findings
    assert "kink" in finding


class Kinked(eqx.Module):
    """A sum of functions, of which all but one count for nothing. Which one is data."""

    counts: Array

    def __call__(self, x, y):
        x_and_y = jnp.sum(jnp.abs(x)) + jnp.sum((y - 1) ** 2)
        in_y, relu = 5 + jnp.sum(jnp.abs(y)), 1e-10 * jnp.sum(jax.nn.relu(y))
        return self.counts @ jnp.stack([x_and_y, in_y, relu])


def _square(x, y):
    return jnp.sum(y**2)


def _distance(x, y):
    return jnp.sum((y - x) ** 2)


def _outer(x, y):
    return jnp.sum((y - 1) ** 2)


@pytest.mark.parametrize(
    "outer",
    (lambda x, y: jnp.sum(jnp.abs(x)), *(Kinked(row) for row in np.eye(3))),
    ids=("x", "x and y", "y", "relu"),
)
def test_a_kink_is_no_wrong_sign(outer):
    problem = blx.BilevelProblem(outer, _distance)
    responses = {"exact": exact, "negated": Negated(exact)}
    check = blx.check_hypergradient(problem, jnp.zeros(2), jnp.zeros(2), responses)
    assert not check.sound and any("kink" in f for f in check.findings)
    assert not any("does not reach" in f for f in check.findings)
    verdict = check.responses["exact"].verdict
    assert "lies between them" in verdict, verdict
    assert "sign" not in verdict


@pytest.mark.parametrize("scale", (1.0, 1e-10))
def test_a_stationary_point_is_no_kink(scale):
    outer = FunctionOfValue(_square, jnp.asarray(scale))
    problem = blx.BilevelProblem(outer, _distance)
    check = blx.check_hypergradient(problem, jnp.zeros(2), jnp.ones(2), [exact])
    (row,) = check.responses.values()
    assert check.sound and check.findings == () and row.right


class Pieces(eqx.Module):
    """A sum of convex functions with kinks, of which one counts. Which one is data."""

    counts: Array

    def __call__(self, x, y):
        rng = np.random.default_rng(0)
        A, t = rng.normal(size=(30, 3)), rng.normal(size=30)
        scale = jnp.exp(x[0])
        lasso = 0.5 * jnp.sum((A @ y - t) ** 2) + 10 * scale * jnp.sum(jnp.abs(y))
        hinge = jnp.sum(jax.nn.relu(1 - A @ y)) / 30 + scale * jnp.sum(y**2)
        median = jnp.sum(jnp.abs(A @ y - x[0]))
        return self.counts @ jnp.stack([lasso, hinge, median])


def _absolute_values(x, y):
    return jnp.exp(x[0]) * jnp.sum(jnp.sqrt(y**2))


@slow
def test_a_minimum_where_the_gradient_is_not_finite():
    """The steps go from -.25 to .25, and at zero the derivative of sqrt(y^2) is 0 / 0."""
    response = blx.Unrolled(optax.sgd(0.5), 101)
    problem = blx.BilevelProblem(_outer, _absolute_values)
    check = blx.check_hypergradient(
        problem,
        jnp.zeros(1),
        jnp.full(3, 0.25),
        [response],
        num_directions=1,
        num_coordinates=1,
    )
    (row,) = check.responses.values()
    assert not check.sound and not row.right and "kink" in row.verdict
    assert any("not finite at the inner minimum" in f for f in check.findings)
    assert not any("singular" in finding for finding in check.findings)


def _no_minimum(x, y):
    return x[0] * jnp.sum(y)


@slow
def test_an_inner_objective_without_curvature():
    """It has no minimum either. There is no step size to recommend for a series."""
    response = blx.Implicit(blx.Projection(), blx.Neumann(5, 0.1), tolerance=None)
    problem = blx.BilevelProblem(lambda x, y: x[0] * jnp.sum((y - 1) ** 2), _no_minimum)
    check = blx.check_hypergradient(
        problem, jnp.ones(1), jnp.full(3, 0.25), [response], num_directions=1
    )
    assert not check.sound
    assert any("the inner problem was not solved" in f for f in check.findings)
    (row,) = check.responses.values()
    assert "Give it more terms." in row.verdict


@pytest.mark.slow
@pytest.mark.parametrize("counts", np.eye(3), ids=("lasso", "hinge", "median"))
def test_a_minimum_at_a_kink(counts):
    response = blx.Implicit(blx.GradientDescent(0.01, 301), blx.Pseudoinverse(), None)
    problem = blx.BilevelProblem(_outer, Pieces(counts))
    x = jnp.array([-1.0])
    # Each direction takes many steps to and fro across the kink.
    check = blx.check_hypergradient(
        problem, x, jnp.ones(3), [response], num_directions=1, num_coordinates=1
    )
    (row,) = check.responses.values()
    assert not check.sound and not row.right
    assert any("the inner minimum is at a kink" in f for f in check.findings)
    assert "kink" in row.verdict and "sign" not in row.verdict


@slow
def test_few_programs():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(60, 4)), np.sign(rng.normal(size=60))
    problem = blx.BilevelProblem(
        lambda x, y: jnp.mean(jax.nn.softplus(-labels[:20] * (features[:20] @ y))),
        lambda x, y: (
            jnp.mean(jax.nn.softplus(-labels[20:] * (features[20:] @ y)))
            + jnp.exp(x) @ y**2
        ),
    )
    x, y0 = jnp.full(4, -3.0), jnp.zeros(4)
    compiled = []

    def listen(event, duration, **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        check = blx.check_hypergradient(problem, x, y0)
        assert check.sound and len(compiled) <= 20
        assert len(check.responses) == 5
        assert check.responses["Implicit, Pseudoinverse"].right
        assert check.responses["MinimumDisplacement"].right
        compiled.clear()
        blx.diagnose(problem, x, y0)
        assert len(compiled) <= 10
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.slow
def test_responses_in_a_sequence_are_named_as_code():
    short = blx.Implicit(blx.Projection(), blx.Neumann(3, 0.1))
    check = blx.check_hypergradient(*_curve(), [exact, short, exact])
    name = "Implicit(Projection(), Pseudoinverse())"
    code = "Implicit(Projection(), Neumann(3, 0.1))"
    assert list(check.responses) == [f"{name} [0]", code, f"{name} [2]"]
    assert "Neumann(3, 0.1) has not converged" in check.responses[code].verdict


def test_refused():
    problem, x, y0 = _curve()
    with pytest.raises(ValueError, match="num_directions"):
        blx.check_hypergradient(problem, x, y0, num_directions=0)
