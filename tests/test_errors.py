"""What gets a clear error: each is matched on its sentence."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import optax
import optimistix as optx
import pytest
from helpers import (
    as_numpy,
    FunctionOfValue,
    LinearBilevel,
    LinearLeastSquares,
    make_linear,
    make_ridge,
    tree_allclose,
)
from jaxtyping import TypeCheckError

import bilevel_eqx as blx
from bilevel_eqx._optimiser.lbfgs import LBFGS
from bilevel_eqx.pipelines import (
    NullSpaceDescent,
    PenaltyDescent,
    ProjectedQuasiNewton,
    SARAH,
    SingleLoop,
    SpectralProjectedGradient,
    ValueFunctionDescent,
    ZerothOrder,
)


slow = pytest.mark.slow
exact = blx.Implicit(blx.Projection(), lx.Cholesky())
x3 = np.array([0.5, -0.3, 0.2])


def _outer(x, y):
    return jnp.sum(y**2) + jnp.sum(x**2)


def _inner(x, y):
    return jnp.sum((y - x) ** 2)


def _operator_calls():
    """Everything that takes a problem, x and y."""
    return {
        "inner_hessian": blx.inner_hessian,
        "cross_derivative": blx.cross_derivative,
        "response_jacobian": lambda *args: blx.response_jacobian(*args, lx.Cholesky()),
        "hypergradient": lambda *args: blx.hypergradient(*args, exact),
        "best_response": lambda *args: blx.best_response(*args, exact),
    }


@pytest.fixture(params=list(_operator_calls()))
def call(request):
    return _operator_calls()[request.param]


def _plain_and_jitted(fn):
    """The two ways to call that must both say what is wrong."""
    return fn, eqx.filter_jit(fn)


#
# Objectives that are not scalars
#


@pytest.mark.parametrize(
    "value, got",
    (
        (lambda v: v, r"shape \(3,\) and type float64"),
        (lambda v: v[None, :1], r"shape \(1, 1\)"),
        (lambda v: (jnp.sum(v), jnp.sum(v)), "a pytree of 2 arrays"),
        (lambda v: jnp.sum(v).astype(int), "type int64"),
    ),
    ids=("vector", "matrix", "pair", "integer"),
)
@pytest.mark.parametrize("name", ("outer", "inner"))
def test_not_a_scalar(name, value, got, call):
    def bad(x, y):
        return value(x * y)

    objectives = {"outer": _outer, "inner": _inner, name: bad}
    problem = blx.BilevelProblem(**objectives)
    match = rf"The {name} objective must return a floating-point scalar.*{got}"
    with pytest.raises(ValueError, match=match):
        call(problem, jnp.asarray(x3), jnp.asarray(x3))


def test_not_a_scalar_under_jit():
    problem = blx.BilevelProblem(lambda x, y: x * y, _inner)
    x = jnp.asarray(x3)
    jitted = eqx.filter_jit(lambda x: blx.hypergradient(problem, x, x, exact))
    with pytest.raises(ValueError, match=r"outer objective must .* shape \(3,\)"):
        jitted(x)
    # It cannot be returned as a result: there is no value to return.
    with pytest.raises(ValueError, match=r"outer objective must .* shape \(3,\)"):
        blx.hypergradient(problem, x, x, exact, throw=False)


#
# Variables that are not floating-point arrays
#


@pytest.mark.parametrize(
    "leaf, said",
    (
        (jnp.arange(3), "has type int64"),
        (jnp.ones(3, bool), "has type bool"),
        (jnp.ones(3, complex), "has type complex128"),
        (1.0, "is 1.0, of type `float`"),
        ("one", "is 'one', of type `str`"),
        (jnp.sum, "of type"),
    ),
    ids=("integer", "boolean", "complex", "number", "string", "function"),
)
@pytest.mark.parametrize("which", ("x", "y"))
def test_not_a_floating_point_array(which, leaf, said, call):
    good = {"a": jnp.asarray(x3), "b": jnp.asarray(x3)}
    bad = {"a": jnp.asarray(x3), "b": leaf}
    x, y = (bad, good) if which == "x" else (good, bad)
    problem = blx.BilevelProblem(
        lambda x, y: _outer(x["a"], y["a"]), lambda x, y: _inner(x["a"], y["a"])
    )
    name = "x" if which == "x" else "(y|anchor)"
    match = rf"`{name}` must be a floating-point array, but `{name}\['b'\]` .*"
    with pytest.raises(ValueError, match=match + re.escape(said)):
        call(problem, x, y)


@pytest.mark.parametrize("which", ("x", "y"))
def test_no_variables(which, call):
    problem = blx.BilevelProblem(_outer, _inner)
    x, y = ((), jnp.asarray(x3)) if which == "x" else (jnp.asarray(x3), ())
    with pytest.raises(ValueError, match="`.*` contains no arrays"):
        call(problem, x, y)


def test_numpy_arrays_will_do():
    # Neither an error nor a difference.
    problem = blx.BilevelProblem(_outer, _inner)
    out = blx.hypergradient(problem, x3, x3, exact)
    assert tree_allclose(out.gradient, 4 * x3, rtol=1e-12)


#
# Counts and rates
#

_sgd = optax.sgd(0.1)


@pytest.mark.parametrize(
    "make, match",
    (
        (lambda v: blx.Neumann(v, 0.1), r"`Neumann\(num_terms=...\)` must be"),
        (lambda v: blx.TruncatedCG(v), r"`TruncatedCG\(num_steps=...\)` must be"),
        (
            lambda v: blx.GradientDescent(0.1, v),
            r"`GradientDescent\(num_steps=...\)` must be",
        ),
        (lambda v: blx.Unrolled(_sgd, v), r"`Unrolled\(num_steps=...\)` must be"),
        (
            lambda v: blx.Projection(max_steps=v),
            r"`Projection\(max_steps=...\)` must be",
        ),
        (
            lambda v: blx.Pseudoinverse(max_steps=v),
            r"`Pseudoinverse\(max_steps=...\)` must be",
        ),
        (
            lambda v: blx.Implicit(None, lx.LU(), max_steps=v),
            r"`Implicit\(max_steps=...\)` must be",
        ),
    ),
)
@pytest.mark.parametrize("value", (0, -1, 2.5, True, "three"))
def test_counts(make, match, value):
    with pytest.raises(ValueError, match=match):
        make(value)


@pytest.mark.parametrize(
    "make, match",
    (
        (lambda v: blx.Neumann(3, v), r"`Neumann\(step_size=...\)` must be greater"),
        (
            lambda v: blx.GradientDescent(v, 3),
            r"`GradientDescent\(step_size=...\)` must be greater",
        ),
        (
            lambda v: blx.IdentityInverse(v),
            r"`IdentityInverse\(scale=...\)` must be greater",
        ),
        (
            lambda v: blx.Proximal(v, None, lx.LU()),
            r"`Proximal\(epsilon=...\)` must be greater",
        ),
        (
            lambda v: blx.Implicit(None, lx.LU(), tolerance=v),
            r"`Implicit\(tolerance=...\)` must be greater",
        ),
    ),
)
@pytest.mark.parametrize("value", (0.0, -0.1, float("nan")))
def test_rates(make, match, value):
    with pytest.raises(ValueError, match=match):
        make(value)


def test_rates_as_arrays():
    with pytest.raises(ValueError, match="must be greater than zero; it is -1.0"):
        blx.Neumann(3, jnp.array(-1.0))
    # One of a batch, too.
    with pytest.raises(ValueError, match="must be greater than zero; it is 0.0"):
        blx.Proximal(jnp.array([1.0, 0.0]), None, lx.LU())


def test_counts_as_arrays():
    with pytest.raises(ValueError, match="must be at least one"):
        blx.Neumann(jnp.array(0), 0.1)


@pytest.mark.parametrize(
    "make, names",
    (
        (lambda n: SpectralProjectedGradient(n, n), "memory max_trials"),
        (lambda n: ProjectedQuasiNewton(n, n), "memory max_trials"),
        (lambda n: LBFGS(n, n), "memory max_trials"),
        (
            lambda n: PenaltyDescent(num_inner_steps=n, inner_batch=n, outer_batch=n),
            "num_inner_steps inner_batch outer_batch",
        ),
        (
            lambda n: ZerothOrder(
                num_inner_steps=n, num_directions=n, inner_batch=n, outer_batch=n
            ),
            "num_inner_steps num_directions inner_batch outer_batch",
        ),
        (
            lambda n: ValueFunctionDescent(
                num_inner_steps=n, inner_batch=n, outer_batch=n
            ),
            "num_inner_steps inner_batch outer_batch",
        ),
        (
            lambda n: SingleLoop(
                inner_batch=n, outer_batch=n, inner_steps=n, adjoint_steps=n
            ),
            "inner_batch outer_batch inner_steps adjoint_steps",
        ),
        (
            lambda n: blx.GradientPipeline(
                blx.Fixed(), _sgd, inner_batch=n, outer_batch=n
            ),
            "inner_batch outer_batch",
        ),
        (lambda n: NullSpaceDescent(selection_steps=n), "selection_steps"),
        (lambda n: SARAH(n), "period"),
        (lambda n: blx.Implicit(None, lx.LU(), max_steps=n), "max_steps"),
        (
            lambda n: blx.MinimumDisplacement(max_steps=n, selection_steps=n),
            "max_steps selection_steps",
        ),
        (lambda n: blx.Unrolled(_sgd, 3, memory=n, batch_size=n), "memory batch_size"),
        (lambda n: blx.Nystrom(n, 0.1), "rank"),
        (lambda n: blx.Diagonal(n, 0.1), "num_probes"),
        (lambda n: blx.Kronecker(n, 0.1), "num_probes"),
        (
            lambda n: blx.Pseudoinverse(dense_size=n, max_steps=n),
            "dense_size max_steps",
        ),
        (lambda n: blx.TruncatedCG(3, refresh_every=n), "refresh_every"),
        (
            lambda n: blx.FiniteSumProblem(None, None, 0.0, 0.0, block_size=n),  # pyright: ignore
            "block_size",
        ),
    ),
)
def test_counts_of_other_libraries_are_python_integers(make, names):
    for count in (np.int64(7), np.array(7), jnp.array(7)):
        made = make(count)
        for name in names.split():
            assert type(getattr(made, name)) is int and getattr(made, name) == 7, name


def test_a_seed_is_no_key():
    problem, x, y = make_linear(LinearBilevel, jnp.float64)
    calls = {
        "solve": lambda key: blx.solve(
            problem, blx.WarmStart(), x, y, num_steps=1, key=key
        ),
        "certify": lambda key: blx.certify(
            problem, blx.WarmStart(), x, y, num_samples=30, key=key
        ),
        "diagnose": lambda key: blx.diagnose(problem, x, y, key=key),
        "compare": lambda key: blx.compare(problem, x, y, num_steps=1, key=key),
        "check_hypergradient": lambda key: blx.check_hypergradient(
            problem, x, y, key=key
        ),
        "Unrolled": lambda key: blx.Unrolled(_sgd, 3, batch_size=2, key=key),
    }
    for name, call in calls.items():
        for key in (0, np.int64(0), jnp.array(0), np.zeros(2)):
            match = rf"`{name}\(key=...\)` must be a random key, such as `jax.random.key"
            with pytest.raises(ValueError, match=match):
                call(key)
    for key in (jr.key(0), jr.PRNGKey(0), np.asarray(jr.PRNGKey(0)), jr.split(jr.key(0))):
        blx.Unrolled(_sgd, 3, batch_size=2, key=key)


def test_a_number_of_steps_may_be_data():
    assert type(blx.Unrolled(_sgd, np.int64(7)).num_steps) is int
    assert isinstance(blx.Unrolled(_sgd, jnp.array(7)).num_steps, jax.Array)


def test_counts_of_functions(tmp_path):
    rng = np.random.default_rng(0)
    data = rng.normal(size=(40, 2)), rng.normal(size=40)

    def losses(x, y, batch, key):
        return (batch[0] @ y - batch[1]) ** 2

    def penalty(x, y):
        return jnp.sum(jnp.exp(x) * y**2)

    problem = blx.FiniteSumProblem(
        losses, losses, data, data, inner_penalty=penalty, block_size=np.int64(16)
    )
    start = jnp.zeros(2), jnp.zeros(2)
    response = blx.Unrolled(_sgd, np.int64(2))
    pipeline = blx.GradientPipeline(response, _sgd, inner_batch=np.int64(8))
    solution = blx.solve(
        problem,
        blx.WarmStart(),
        *start,
        pipeline=pipeline,
        num_steps=np.int32(4),
        save_every=np.int64(2),
        checkpoint=tmp_path / "run",
        checkpoint_every=np.int64(2),
        certify=False,
    )
    assert len(solution.history["value"]) == 2
    certificate = blx.certify(
        problem,
        blx.WarmStart(),
        *start,
        max_products=np.int64(9),
        num_samples=np.int64(40),
        key=jr.key(0),
    )
    assert np.isfinite(certificate.largest)


def test_damping():
    problem, x, y = make_linear(LinearBilevel, jnp.float64)
    match = r"`response_jacobian\(damping=...\)` must be at least zero; it is -0.5"
    with pytest.raises(ValueError, match=match):
        blx.response_jacobian(problem, x, y, lx.LU(), damping=-0.5)


@pytest.mark.parametrize("rcond", (-0.1, 1.0, 2.0))
def test_cutoff(rcond):
    match = rf"`Pseudoinverse\(rcond=...\)` must be in \[0, 1\); it is {rcond}"
    with pytest.raises(ValueError, match=match):
        blx.Pseudoinverse(rcond=rcond)


def test_mode():
    with pytest.raises(ValueError, match=r"`Unrolled\(mode=...\)` must be one of"):
        blx.Unrolled(_sgd, 3, mode="backward")  # pyright: ignore


def test_reverse_mode_of_an_unknown_number_of_steps():
    problem, x, anchor = make_ridge()

    def gradient(num_steps):
        response = blx.Unrolled(_sgd, num_steps, "reverse")
        return blx.hypergradient(problem, x, anchor, response).gradient

    with pytest.raises(ValueError, match="reverse mode cannot store an unknown number"):
        jax.jit(gradient)(jnp.array(3))


@pytest.mark.parametrize(
    "solver", (blx.Neumann(3, 0.1), blx.TruncatedCG(3), blx.IdentityInverse(0.1))
)
def test_not_square(solver):
    operator = lx.MatrixLinearOperator(jnp.ones((3, 2)))
    match = f"`{type(solver).__name__}` solves only square systems"
    with pytest.raises(ValueError, match=match):
        lx.linear_solve(operator, jnp.ones(3), solver)


#
# An inner objective without y
#


@pytest.mark.parametrize(
    "inner",
    (
        lambda x, y: jnp.sum(x**2),
        lambda x, y: jnp.sum(jax.lax.stop_gradient(y) * x),
        lambda x, y: jnp.sum(x * y.astype(int).astype(float)),
        lambda x, y: jnp.sum(x * (y > 0)),
        jax.jit(lambda x, y: jnp.sum(x**2)),
    ),
    ids=("absent", "stop_gradient", "integers", "comparison", "jitted"),
)
def test_inner_objective_without_y(inner, call):
    with jax.numpy_dtype_promotion("standard"):
        problem = blx.BilevelProblem(_outer, inner)
        with pytest.raises(ValueError, match="inner objective does not depend on y"):
            call(problem, jnp.asarray(x3), jnp.asarray(x3))


def test_order_of_arguments():
    # The mistake that is most easily made.
    problem = blx.BilevelProblem(_outer, lambda y, x: jnp.sum(y**2))
    x = jnp.asarray(x3)
    jitted = eqx.filter_jit(lambda x: blx.best_response(problem, x, x, exact))
    for call in (lambda x: blx.best_response(problem, x, x, exact), jitted):
        with pytest.raises(ValueError, match=r"order of its arguments, which is \(x, y"):
            call(x)


#
# A hypergradient that can only be zero
#


def _quadratic(outer=None, inner=None):
    return blx.BilevelProblem(outer or _outer, inner or _inner)


_only_y = lambda x, y: jnp.sum(y**2)  # noqa: E731
_only_x = lambda x, y: jnp.sum(x**2)  # noqa: E731


@pytest.mark.parametrize(
    "problem, response",
    (
        (_quadratic(outer=_only_y), blx.Fixed()),
        (_quadratic(outer=_only_y, inner=_only_y), exact),
        (_quadratic(outer=_only_y, inner=_only_y), blx.Unrolled(_sgd, 3)),
        (
            _quadratic(outer=_only_y, inner=_only_y),
            blx.Proximal(0.1, blx.Projection(), lx.LU()),
        ),
        # x is in the inner objective, and yet moves nothing.
        (
            _quadratic(outer=_only_y, inner=lambda x, y: jnp.sum(y**2) + jnp.sum(x**2)),
            exact,
        ),
        # y answers, but the outer objective does not ask.
        (_quadratic(outer=lambda x, y: jnp.sum(jax.lax.stop_gradient(y))), exact),
        (_quadratic(outer=jax.jit(_only_y), inner=jax.jit(_only_y)), exact),
    ),
    ids=("fixed", "implicit", "unrolled", "proximal", "separable", "stopped", "jitted"),
)
def test_zero_hypergradient(problem, response):
    x = jnp.asarray(x3)
    for call in _plain_and_jitted(lambda x: blx.hypergradient(problem, x, x, response)):
        with pytest.raises(ValueError, match="hypergradient is exactly zero"):
            call(x)
    out = blx.hypergradient(problem, x, x, response, throw=False)
    assert out.result == blx.RESULTS.zero_hypergradient
    assert tree_allclose(out.gradient, np.zeros(3), rtol=0)


def test_zero_by_value_is_no_error():
    # At a stationary point the hypergradient is zero too, and rightly so.
    problem = _quadratic()
    zeros = jnp.zeros(3)
    out = blx.hypergradient(problem, zeros, zeros, exact)
    assert out.result == blx.RESULTS.successful
    assert tree_allclose(out.gradient, zeros, rtol=0)


@pytest.mark.parametrize(
    "outer, inner",
    (
        (jax.jit(_outer), jax.jit(_inner)),
        # Through a loop, and through a function with a derivative of its own.
        (
            lambda x, y: jax.lax.scan(lambda c, v: (c + v**2, None), 0.0, y)[0],
            lambda x, y: jnp.sum(jax.nn.softplus(y - x) + jax.nn.relu(y - x) ** 2),
        ),
    ),
    ids=("jit", "loop"),
)
def test_no_false_alarm(outer, inner):
    problem = blx.BilevelProblem(outer, inner)
    response = blx.Unrolled(_sgd, 2)
    x = jnp.asarray(x3)
    out = blx.hypergradient(problem, x, x + 1, response)
    assert np.linalg.norm(out.gradient) > 1e-3


#
# A Neumann series that diverges
#


def _steep():
    """Curvatures 1 and 4: the series converges for step sizes below 1/2."""
    scale = jnp.array([1.0, 4.0, 4.0])
    return blx.BilevelProblem(
        _outer, lambda x, y: 0.5 * jnp.sum(scale * (y - x) ** 2)
    )  # fmt: skip


@pytest.mark.parametrize("num_terms", (60, 2000))
def test_neumann_diverges(num_terms):
    problem, x = _steep(), jnp.asarray(x3)
    diverging = blx.Implicit(None, blx.Neumann(num_terms, 0.6))
    with pytest.raises(eqx.EquinoxRuntimeError, match="Neumann series diverges") as info:
        blx.hypergradient(problem, x, x, diverging)
    # It says which step size does not diverge.
    found = re.search(r"a step size below ([\d.e+-]+) does not diverge", str(info.value))
    assert found is not None
    assert tree_allclose(float(found.group(1)), 0.5, rtol=1e-2)
    out = blx.hypergradient(problem, x, x, diverging, throw=False)
    assert out.result == blx.RESULTS.neumann_diverged
    assert tree_allclose(out.stats["linear_curvature"], 4.0, rtol=1e-2)
    # And it is right about that.
    safe = blx.Implicit(None, blx.Neumann(num_terms, 0.9 * float(found.group(1))))
    out = blx.hypergradient(problem, x, x, safe)
    assert tree_allclose(out.gradient, 4 * x, rtol=1e-3)


def test_neumann_diverges_under_jit():
    problem, x = _steep(), jnp.asarray(x3)
    diverging = blx.Implicit(None, blx.Neumann(60, 0.6))

    @eqx.filter_jit
    def gradient(x):
        return blx.hypergradient(problem, x, x, diverging).gradient

    with pytest.raises(eqx.EquinoxRuntimeError, match="Neumann series diverges"):
        gradient(x)


def test_neumann_diverges_for_one_of_a_batch():
    problem, x = _steep(), jnp.asarray(x3)

    def result(step_size):
        response = blx.Implicit(None, blx.Neumann(60, step_size))
        out = blx.hypergradient(problem, x, x, response, throw=False)
        return out.result == blx.RESULTS.neumann_diverged

    diverged = jax.vmap(result)(jnp.array([0.1, 0.49, 0.51, 0.6]))
    assert diverged.tolist() == [False, False, True, True]


def test_neumann_diverges_in_a_derivative():
    # There is nowhere to return it to, so it raises whatever `throw` says.
    problem, x = _steep(), jnp.asarray(x3)
    response = blx.Implicit(blx.Projection(), blx.Neumann(60, 0.6))

    @eqx.filter_jit
    def gradient(x):
        return jax.grad(
            lambda x: jnp.sum(blx.best_response(problem, x, x, response, throw=False))
        )(x)

    with pytest.raises(eqx.EquinoxRuntimeError):
        gradient(x)


#
# An inner solve that did not converge
#


def _slow_responses():
    descent = blx.GradientDescent(1e-3, 3)
    solver = lx.Cholesky()
    return {
        "gradient descent": blx.Implicit(descent, solver),
        "bfgs": blx.Implicit(optx.BFGS(1e-12, 1e-12), solver, max_steps=2),
        "projection": blx.Implicit(blx.Projection(max_steps=1), solver),
        "proximal": blx.Proximal(1.0, descent, solver),
    }


def _quartic():
    return blx.BilevelProblem(
        _outer, lambda x, y: jnp.sum((y - x) ** 4) + jnp.sum((y - 1) ** 2)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", list(_slow_responses()))
def test_inner_solve_did_not_converge(name):
    response = _slow_responses()[name]
    problem, x, anchor = _quartic(), jnp.asarray(x3), jnp.array([9.0, -7.0, 8.0])
    for fn in (blx.hypergradient, blx.best_response):
        plain, jitted = _plain_and_jitted(
            lambda x, fn=fn: eqx.filter(fn(problem, x, anchor, response), eqx.is_array)
        )
        # What `jit` does with a failure does not depend on the solver.
        for call in (plain, jitted) if name == "gradient descent" else (plain,):
            with pytest.raises(
                eqx.EquinoxRuntimeError, match="inner solve did not converge"
            ):
                call(x)
    out = blx.hypergradient(problem, x, anchor, response, throw=False)
    assert out.result == blx.RESULTS.inner_not_converged
    y = blx.best_response(problem, x, anchor, response, throw=False)
    # What it had got to.
    assert tree_allclose(y, out.y, rtol=1e-12)
    assert np.all(np.isfinite(y))


@pytest.mark.slow
def test_the_size_of_the_residual_is_said():
    problem, x, anchor = make_ridge()
    response = blx.Implicit(blx.GradientDescent(1e-6, 1), lx.Cholesky())
    A, b, at = map(as_numpy, (problem.features, problem.targets, x))

    def gradient(y):
        return A.T @ (A @ y - b) + np.exp(at) * y

    y = as_numpy(anchor)
    residual = np.linalg.norm(gradient(y - 1e-6 * gradient(y)))
    match = re.escape(f"The inner gradient has norm {residual:.3g}")
    with pytest.raises(eqx.EquinoxRuntimeError, match=match):
        blx.hypergradient(problem, x, anchor, response)


def test_tolerance():
    # `None` accepts any point, and a looser one a worse point.
    problem, x, anchor = make_ridge()
    descent = blx.GradientDescent(0.05, 30)
    y = blx.best_response(
        problem, x, anchor, blx.Implicit(descent, lx.LU(), tolerance=None)
    )
    loose = blx.Implicit(descent, lx.LU(), tolerance=0.5)
    assert tree_allclose(blx.best_response(problem, x, anchor, loose), y, rtol=1e-12)
    tight = blx.Implicit(descent, lx.LU(), tolerance=1e-8)
    with pytest.raises(eqx.EquinoxRuntimeError, match="inner solve did not converge"):
        blx.best_response(problem, x, anchor, tight)


@pytest.mark.parametrize("scale", (1e-6, 1e6))
@pytest.mark.parametrize("dtype", (jnp.float32, pytest.param(jnp.float64, marks=slow)))
def test_convergence_does_not_depend_on_the_scale(scale, dtype):
    """Of the inner objective: the same points are accepted and refused."""
    ridge, x, anchor = make_ridge(dtype)
    scale = jnp.asarray(scale, dtype)
    problem = blx.BilevelProblem(ridge.outer, FunctionOfValue(ridge.inner, scale))

    def result(step_size, num_steps):
        descent = blx.GradientDescent(step_size / scale, num_steps)
        response = blx.Implicit(descent, blx.Pseudoinverse())
        return blx.hypergradient(problem, x, anchor, response, throw=False).result

    step_size = jnp.asarray(0.05, dtype)
    assert result(step_size, 2) == blx.RESULTS.inner_not_converged
    assert result(step_size, 1000) == blx.RESULTS.successful


def test_least_squares_without_a_solution():
    """An inner problem whose minimum is at infinity."""
    problem = blx.LeastSquaresProblem(_outer, lambda x, y: jnp.exp(y) * (1 + x**2))
    x = jnp.asarray(x3)
    response = blx.Implicit(blx.GradientDescent(0.1, 50), blx.Pseudoinverse())
    with pytest.raises(eqx.EquinoxRuntimeError, match="inner solve did not converge"):
        blx.best_response(problem, x, x, response)


#
# A linear solve that failed
#


@pytest.mark.slow
def test_singular_hessian():
    """Where lineax's solvers cannot, they must not be silent about it. (LU and Cholesky:
    `test_faults_derivatives.test_foreign_solvers_are_right_or_raise`.)"""
    problem, x, anchor = make_linear(LinearBilevel, jnp.float64)
    linear_solver = lx.CG(rtol=1e-12, atol=1e-12, max_steps=3)
    response = blx.Implicit(blx.Projection(), linear_solver)
    for call in _plain_and_jitted(
        lambda x: blx.hypergradient(problem, x, anchor, response).gradient
    ):
        with pytest.raises(eqx.EquinoxRuntimeError):
            call(x)
    out = blx.hypergradient(problem, x, anchor, response, throw=False)
    assert out.result != blx.RESULTS.successful


def test_linear_solve_did_not_converge():
    problem, x, anchor = make_ridge()
    response = blx.Implicit(blx.Projection(), lx.CG(1e-14, 1e-14, max_steps=1))
    with pytest.raises(eqx.EquinoxRuntimeError, match="linear solve of the hypergrad"):
        blx.hypergradient(problem, x, anchor, response)
    out = blx.hypergradient(problem, x, anchor, response, throw=False)
    assert out.result == blx.RESULTS.linear_not_converged


def test_negative_curvature():
    problem = blx.BilevelProblem(_outer, lambda x, y: -jnp.sum((y - x) ** 2))
    x = jnp.asarray(x3)
    response = blx.Implicit(None, blx.TruncatedCG(5))
    for call in _plain_and_jitted(
        lambda x: blx.hypergradient(problem, x, x, response).gradient
    ):
        with pytest.raises(eqx.EquinoxRuntimeError, match="met negative curvature"):
            call(x)
    out = blx.hypergradient(problem, x, x, response, throw=False)
    assert out.result == blx.RESULTS.negative_curvature


#
# NaN and infinity
#


@pytest.mark.parametrize(
    "outer, inner, names",
    (
        (lambda x, y: jnp.sum(jnp.log(y - 9)), _inner, "the outer objective"),
        # A value without a derivative: the square root at zero.
        (lambda x, y: jnp.sum(jnp.sqrt(y - x)), _inner, "the gradient"),
        (_outer, lambda x, y: jnp.sum(jnp.log(x - 9) * (y - x) ** 2), "y"),
    ),
    ids=("outer", "derivative", "inner"),
)
def test_not_finite(outer, inner, names):
    problem = blx.BilevelProblem(outer, inner)
    x = jnp.asarray(x3)
    response = blx.Unrolled(_sgd, 2)
    with pytest.raises(eqx.EquinoxRuntimeError, match=f"Not finite: .*{names}"):
        blx.hypergradient(problem, x, x, response)
    jitted = eqx.filter_jit(lambda x: blx.hypergradient(problem, x, x, response).value)
    with pytest.raises(eqx.EquinoxRuntimeError, match="NaN or infinity appeared"):
        jitted(x)
    out = blx.hypergradient(problem, x, x, response, throw=False)
    assert out.result == blx.RESULTS.nonfinite_step


def test_best_response_not_finite():
    # A step size far beyond stability: infinity, and then NaN.
    problem, x, anchor = make_ridge()
    response = blx.Unrolled(optax.sgd(1e30), 20)
    for call in _plain_and_jitted(
        lambda x: blx.best_response(problem, x, anchor, response)
    ):
        with pytest.raises(eqx.EquinoxRuntimeError, match="NaN or infinity appeared"):
            call(x)
    y = blx.best_response(problem, x, anchor, response, throw=False)
    assert not np.all(np.isfinite(y))


@pytest.mark.parametrize("response", (exact, blx.Unrolled(_sgd, 2), blx.Fixed()))
def test_nan_in_the_anchor(response):
    # Each says that something is wrong, and none calls it a success.
    problem, x, anchor = make_ridge()
    anchor = anchor.at[1].set(jnp.nan)
    out = blx.hypergradient(problem, x, anchor, response, throw=False)
    assert out.result != blx.RESULTS.successful
    with pytest.raises(eqx.EquinoxRuntimeError):
        blx.hypergradient(problem, x, anchor, response)


def test_inner_descent_diverges():
    problem, x, anchor = make_linear(LinearLeastSquares, jnp.float64)
    response = blx.Implicit(blx.GradientDescent(3.0, 2000), blx.Pseudoinverse())
    with pytest.raises(eqx.EquinoxRuntimeError):
        blx.hypergradient(problem, x, anchor, response)
    out = blx.hypergradient(problem, x, anchor, response, throw=False)
    assert out.result in (
        blx.RESULTS.nonfinite_step,
        blx.RESULTS.inner_not_converged,
    )


#
# Types at the public boundary
#


@pytest.mark.parametrize(
    "name, arguments",
    (
        ("inner_hessian", ("problem", x3, x3)),
        ("inner_hessian", (None, x3, x3)),
        ("cross_derivative", (_outer, x3, x3)),
        ("response_jacobian", (_quadratic(), x3, x3, "cg")),
        ("response_jacobian", (_quadratic(), x3, x3, blx.Projection())),
        ("hypergradient", (_outer, x3, x3, exact)),
        ("hypergradient", (_quadratic(), x3, x3, lx.Cholesky())),
        ("hypergradient", (_quadratic(), x3, x3, blx.Implicit)),
        ("best_response", (_outer, x3, x3, exact)),
        ("best_response", (_quadratic(), x3, x3, "implicit")),
    ),
)
def test_wrong_types(name, arguments):
    fn = getattr(blx, name)
    with pytest.raises(TypeCheckError):
        fn(*arguments)


def test_wrong_type_of_throw():
    with pytest.raises(ValueError, match="throw=.*must be of type `bool`"):
        blx.hypergradient(_quadratic(), x3, x3, exact, throw="no")  # pyright: ignore


def test_wrong_type_of_damping():
    with pytest.raises(TypeCheckError):
        blx.response_jacobian(_quadratic(), x3, x3, lx.LU(), damping="0.1")  # pyright: ignore


@pytest.mark.parametrize(
    "make",
    (
        lambda: blx.Implicit(optax.sgd(0.1), lx.LU()),  # pyright: ignore
        lambda: blx.Implicit(blx.Projection(), "cg"),  # pyright: ignore
        lambda: blx.Implicit(lx.LU(), blx.Projection()),  # pyright: ignore
        lambda: blx.Proximal(0.1, "newton", lx.LU()),  # pyright: ignore
        lambda: blx.Proximal("small", None, lx.LU()),  # pyright: ignore
        lambda: blx.Unrolled(blx.Projection(), 3),  # pyright: ignore
        lambda: blx.Neumann(3, "small"),  # pyright: ignore
    ),
)
def test_wrong_types_of_fields(make):
    """Said where it is made, or at the latest where it is used; not from the depths."""
    with pytest.raises((TypeCheckError, ValueError, TypeError)):
        make()
