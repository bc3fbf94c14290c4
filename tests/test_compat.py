"""What the package uses of its dependencies beyond what they promise: a new release that
changes it is noticed here, and not by a user.
"""

import functools as ft
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import equinox as eqx
import equinox._errors
import equinox._jit
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import jaxlib
import lineax as lx
import numpy as np
import optax
import optimistix as optx
import pytest
from helpers import tree_allclose

import bilevel_eqx as blx
from bilevel_eqx import _compat


ROOT = Path(__file__).parent.parent


def test_nothing_private_is_used_elsewhere():
    private = re.compile(
        r"equinox\.(internal|_)|eqxi?\._|eqxi\.|jax\.(core|extend|_src|custom_batching)"
        r"|(lineax|lx|optimistix|optx|optax|jaxtyping|beartype)\._[a-z]"
    )
    package = Path(blx.__file__).parent
    for path in package.rglob("*.py"):
        if path.name != "_compat.py":
            assert private.findall(path.read_text()) == [], path


def test_what_is_pinned_has_an_upper_bound():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = {}
    for requirement in project["dependencies"]:
        found = re.fullmatch(r"(\w+)>=[\d.]+,<([\d.]+)", requirement)
        if found is not None:
            bounds[found[1]] = tuple(int(part) for part in found[2].split("."))
    assert {"jax", "jaxlib", "equinox", "lineax", "optimistix"} <= set(bounds)
    for name, bound in bounds.items():
        version = importlib.metadata.version(name).split(".")[: len(bound)]
        assert tuple(int(part) for part in version) < bound


#
# JAX
#


def test_manual_axes():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    for checked in (True, False):
        found = []

        def look(u):
            found.append(_compat.manual_axes(u))
            return u

        jax.jit(
            jax.shard_map(
                look, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=checked
            )
        )(jnp.ones(2))
        assert found[-1] == (frozenset({"data"}) if checked else frozenset())


def test_is_traced():
    seen = []

    def look(x):
        seen.append(_compat.is_traced(x))
        return x

    for transform in (jax.jit, jax.vmap, jax.grad):
        transform(look)(jnp.ones(3) if transform is jax.vmap else 1.0)
    assert seen == [True, True, True]
    for known in (1, 1.0, np.ones(3), jnp.ones(3), None):
        assert not _compat.is_traced(known)


def test_is_literal():
    equation = jax.make_jaxpr(lambda x: x * 2.0)(jnp.ones(())).jaxpr.eqns[0]
    assert [_compat.is_literal(v) for v in equation.invars] == [False, True]


def test_one_matrix_at_a_time():
    eigvalsh = _compat.one_matrix_at_a_time(lambda matrix: jnp.linalg.eigvalsh(matrix))
    matrices = jr.normal(jr.key(0), (5, 3, 3))
    matrices = matrices + jnp.swapaxes(matrices, 1, 2)
    expected = np.linalg.eigvalsh(np.asarray(matrices))
    assert tree_allclose(jax.vmap(eigvalsh)(matrices), expected, rtol=1e-10)
    # The program for a CPU decomposes single matrices.
    traced = jax.jit(jax.vmap(eigvalsh)).trace(matrices)
    text = traced.lower(lowering_platforms=("cpu",)).as_text()
    shapes = re.findall(r"@lapack_dsyevd.*? : \((.*?)\) ->", text)
    assert len(shapes) == 1 and shapes[0].startswith("tensor<3x3xf64>")


#
# Equinox
#


def test_any_of_batch():
    pred = jnp.array([False, True, False])
    assert jax.vmap(_compat.any_of_batch, out_axes=None)(pred)
    assert not jax.vmap(_compat.any_of_batch, out_axes=None)(jnp.zeros(3, bool))

    def branch(pred, x):
        return jax.lax.cond(_compat.any_of_batch(pred), jnp.sin, jnp.cos, x)

    # It remains a branch.
    batched = jax.make_jaxpr(jax.vmap(branch))(pred, jnp.ones(3))
    names = [equation.primitive.name for equation in batched.jaxpr.eqns]
    assert "cond" in names and "select_n" not in names


RATE = 0.0


def _by_default(r):
    return lambda count, r=r: r


def _by_keyword(r):
    return lambda count, *, r=r: r


def _by_global(r):
    global RATE
    RATE = r
    return lambda count: RATE


def _by_nested_global(r):
    global RATE
    RATE = r
    return lambda count: (lambda: RATE)()


def test_closure_to_pytree():
    rate = jnp.array(0.1)
    optimiser = _compat.closure_to_pytree(optax.sgd(rate))
    leaves = [leaf for leaf in jax.tree.leaves(optimiser) if eqx.is_array(leaf)]
    assert tree_allclose(leaves, [-rate], rtol=1e-12)

    @eqx.filter_jit
    def update(optimiser, gradient):
        return optimiser.update(gradient, optimiser.init(gradient))[0]

    # Data, of which a derivative can be taken.
    def length(rate):
        return update(_compat.closure_to_pytree(optax.sgd(rate)), jnp.array(2.0))

    assert tree_allclose(jax.grad(length)(rate), np.array(-2.0), rtol=1e-12)

    # Functions of one text are not one function.
    for rates in (_by_default, _by_keyword, _by_global, _by_nested_global):
        steps = []
        for r in (0.1, 0.2):
            optimiser = _compat.closure_to_pytree(optax.sgd(rates(r)))
            steps.append(update(optimiser, jnp.array(2.0)))
        assert tree_allclose(steps, [np.array(-0.2), np.array(-0.4)], rtol=1e-6)
    # And those of optax are one program.
    first, second = (_compat.closure_to_pytree(optax.adam(0.1)) for _ in range(2))
    assert jax.tree.structure(first) == jax.tree.structure(second)
    assert jax.tree.leaves(first) == jax.tree.leaves(second)

    # What `as_pytree` expects of closures that refer to themselves.
    def recursive(n):
        return recursive(n - 1) if n else 0

    with pytest.raises((RecursionError, ValueError)):
        _compat.closure_to_pytree(recursive)


def test_program(monkeypatch):
    """With options that a CPU takes: alone, within another program, where JAX refuses
    options, and under a transformation."""
    seen = []

    def double(u, v=0.0):
        seen.append(jax.typeof(u).shape)
        return 2 * u + v

    options = _compat.LOOPS_IN_GRAPHS["gpu"] | _compat.QUICK_TO_COMPILE["gpu"]
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    for wanted in ({}, {"cpu": options}):
        assert _compat.compiler_options(wanted) == wanted.get("cpu", {})
        doubled = _compat.program(double, wanted, donate="none")
        assert doubled.__name__ == "double"
        seen.clear()
        for _ in range(2):
            assert doubled(jnp.array(2.0), v=jnp.array(1.0)) == 5
        assert len(seen) == 1
        within = jax.jit(lambda: doubled(jnp.array(3.0)))
        assert within() == 6
        assert jax.jit(doubled)(jnp.array(3.0)) == 6
        assert jax.grad(doubled)(3.0) == 2
        np.testing.assert_array_equal(jax.vmap(doubled)(jnp.arange(3.0)), [0, 2, 4])


def test_traced_once():
    traced = []

    @ft.partial(jax.jit, static_argnums=0)
    def power(exponent, u):
        traced.append(exponent)
        return {"power": u["base"] ** exponent}

    def run(u):
        program, shapes = _compat.traced_once(power, 3, {"base": u})
        assert shapes["power"].shape == u.shape
        return _compat.as_function(program.jaxpr, program.consts)(u)[0]

    u = jnp.array([1.0, 2.0])
    for _ in range(2):
        np.testing.assert_array_equal(jax.jit(lambda u: run(u))(u), u**3)
    np.testing.assert_array_equal(jax.vmap(run)(u[None])[0], u**3)
    np.testing.assert_array_equal(jax.grad(lambda u: jnp.sum(run(u)))(u), 3 * u**2)
    assert traced == [3]


def test_traced_once_within_a_transformation():
    """A function that closes over a value of the transformation."""

    def run(factor, u):
        @ft.partial(jax.jit, static_argnums=0)
        def scaled(exponent, u):
            return factor * u**exponent

        for _ in range(2):
            program, _ = _compat.traced_once(scaled, 2, u)
            (out,) = _compat.as_function(program.jaxpr, program.consts)(u)
        return out

    u = jnp.array([1.0, 2.0])
    np.testing.assert_array_equal(jax.vmap(run, (0, None))(u, 3.0), 9 * u)
    assert jax.grad(run)(5.0, 3.0) == 9


def test_compiler_options(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    for wanted in (_compat.LOOPS_IN_GRAPHS, _compat.QUICK_TO_COMPILE):
        for device, options in wanted.items():
            monkeypatch.setattr(jax, "default_backend", lambda device=device: device)
            known = _compat.compiler_options(wanted)
            # Those of the versions that were tried, all of them. Later ones of XLA have
            # no older code generator for a CPU.
            if device == "gpu" or jaxlib.__version__.startswith("0.10."):
                assert known == options
            # What nobody knows is left out, and is no error.
            unknown = {device: options | {"xla_of_no_such_name": True}}
            assert _compat.compiler_options(unknown) == known
    # The user's own flags have the last word.
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=true")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert _compat.compiler_options(_compat.QUICK_TO_COMPILE) == {}
    assert _compat.compiler_options(_compat.LOOPS_IN_GRAPHS) != {}


def _equations(program):
    """Of a jaxpr, and of those within."""
    for equation in getattr(program, "jaxpr", program).eqns:
        yield equation
        for part in jax.tree.leaves(equation.params, is_leaf=_compat.is_program):
            if _compat.is_program(part):
                yield from _equations(part)


def _operations(program):
    return {equation.primitive.name for equation in _equations(program)}


def test_hidden_program():
    """That of a linear solve is found, and operations of JAX itself hide nothing."""

    def solve(v):
        struct = jax.eval_shape(lambda: v)
        tags = lx.positive_semidefinite_tag
        operator = lx.FunctionLinearOperator(lambda u: 2 * u.at[0].mul(3), struct, tags)
        return lx.linear_solve(operator, jnp.sin(v), lx.CG(1e-8, 1e-8)).value

    program = jax.make_jaxpr(solve)(jnp.ones(3))
    assert "scatter-mul" not in _operations(program)
    hidden = {e.primitive.name: _compat.hidden_program(e) for e in _equations(program)}
    assert "scatter-mul" in _operations(hidden.pop("linear_solve"))
    assert "sin" in hidden and set(hidden.values()) == {None}
    # This one runs on the host.
    program = jax.make_jaxpr(eqxi.noinline(jnp.sin))(jnp.ones(3))
    hidden = {e.primitive.name: _compat.hidden_program(e) for e in _equations(program)}
    assert hidden["noinline"] is None


def test_checkpointed_while_loop():
    def power(x):
        return _compat.checkpointed_while_loop(
            lambda carry: carry[0] < 20,
            lambda carry: (carry[0] + 1, carry[1] * x),
            (jnp.array(0), jnp.ones(())),
            checkpoints=3,
        )[1]

    x = jnp.array(1.1)
    assert tree_allclose(power(x), x**20, rtol=1e-12)
    assert tree_allclose(jax.grad(power)(x), 20 * x**19, rtol=1e-12)


def test_nondifferentiable():
    def square(x):
        return jnp.sum(_compat.nondifferentiable(x, name="The solver of the test") ** 2)

    x = jnp.ones(3)
    assert square(x) == 3
    with pytest.raises(Exception, match="The solver of the test"):
        jax.grad(square)(x)


def test_not_differentiable():
    def square(x):
        return _compat.not_differentiable({"square": x**2}, "No slope.")["square"]

    x = jnp.array(3.0)
    assert square(x) == 9 and jax.jit(square)(x) == 9
    for derivative in (jax.grad(square), lambda x: jax.jvp(square, (x,), (x,))):
        with pytest.raises(RuntimeError, match="No slope."):
            derivative(x)


def test_primitives():
    def search(x):
        return jax.lax.while_loop(lambda x: x < 9, lambda x: 2 * x, x)

    def nested(x):
        return jax.jit(lambda x: jax.lax.cond(x > 0, search, jnp.sin, x))(x)

    def counted(x):
        return jax.lax.fori_loop(0, 5, lambda _, x: 2 * x, x)

    def of(fn):
        return _compat.primitives(jax.make_jaxpr(fn)(1.0).jaxpr)

    assert {"while", "cond", "sin"} <= of(nested)
    assert "scan" in of(counted) and "while" not in of(counted)


def test_static():
    state = _compat.static(None)
    assert jax.tree.leaves(state) == []
    assert eqx.tree_equal(state, _compat.static(None)) is True


def test_on_error_is_what_equinox_reads(monkeypatch):
    assert _compat.on_error() == "raise"
    x = jnp.ones(())
    monkeypatch.setattr(equinox._errors, "EQX_ON_ERROR", "off")
    assert _compat.on_error() == "off"
    assert eqx.error_if(x, x > 0, "It must be off for Equinox too.") == 1


def test_raise_on_host():
    """`eqx.filter_jit` recognises the error, and finds message and stack in its text."""

    @eqx.filter_jit
    def fail(x):
        struct = jax.ShapeDtypeStruct((), x.dtype)
        return jax.pure_callback(
            lambda x: _compat.raise_on_host(f"It is {x}.", "  where it was\n"), struct, x
        )

    with pytest.raises(eqx.EquinoxRuntimeError) as info:
        fail(jnp.array(2.5))
    stack, _, message = str(info.value).partition("equinox.EquinoxRuntimeError: ")
    assert message.startswith("It is 2.5.\n\n")
    assert stack.endswith("Below is the stack inside of JIT:\n  where it was\n\n")


def test_errors_of_equinox_are_left_as_they_are():
    # Its variable holds ours from before, as it would after a failure in another thread.
    fail = eqx.filter_jit(lambda x: eqx.error_if(x, x > 0, "It must not be positive."))

    class Ours(Exception):
        pass

    original = equinox._jit.last_error_info
    with pytest.raises(eqx.EquinoxRuntimeError, match="It must not be positive."):
        fail(jnp.ones(()))
    error = f"..._EquinoxRuntimeError: It must not be positive.{_compat._RULE}And more."
    try:
        raise Ours(error)
    except Ours:
        assert list(_compat._IN_FLIGHT) == ["It must not be positive.", [""]]
    equinox._jit.last_error_info = original


def test_stack_inside():
    stacks = []

    def inside(x):
        stacks.append(_compat.stack_inside())
        return x

    eqx.filter_jit(inside)(jnp.ones(()))
    inside(1)
    jitted, plain = stacks
    assert "in inside\n" in jitted and "in test_stack_inside\n" not in jitted
    assert "in inside\n" in plain and "in test_stack_inside\n" in plain
    assert str(Path(sys.modules["jax"].__path__[0])) not in jitted + plain


#
# lineax
#


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.float64))
def test_lsmr(dtype):
    matrix = jr.normal(jr.key(0), (5, 3), dtype)
    b = jr.normal(jr.key(1), (5,), dtype)
    eps = float(jnp.finfo(dtype).eps)

    def solve(b):
        operator = lx.MatrixLinearOperator(matrix)
        return _compat.lsmr(operator, b, rtol=10 * eps, conlim=0.1 / eps, max_steps=50)

    q, stats = jax.jit(solve)(b)
    expected = np.linalg.lstsq(np.asarray(matrix), np.asarray(b))[0]
    assert q.dtype == dtype
    assert tree_allclose(q, expected, rtol=1e3 * eps)
    residual = np.asarray(matrix @ q - b)
    assert tree_allclose(
        stats["norm_r"].astype(dtype), np.linalg.norm(residual), rtol=1e3 * eps
    )
    assert tree_allclose(
        stats["norm_x"].astype(dtype), np.linalg.norm(expected), rtol=1e3 * eps
    )
    # At the end it is about zero; and this is an estimate, of the Frobenius norm.
    assert 0 <= stats["norm_Ar"] <= 1e3 * eps
    assert 0.3 < stats["norm_A"] / np.linalg.norm(np.asarray(matrix)) < 3
    assert 1 <= stats["num_steps"] <= 10


def test_lsmr_mixes_types():
    """The fault of lineax that is worked around. When it is mended this fails, and the
    work-around can go."""
    operator = lx.MatrixLinearOperator(jnp.eye(3, dtype=jnp.float32))
    solver = lx.LSMR(rtol=1e-6, atol=0.0)
    with pytest.raises(Exception):
        solver.compute(operator, jnp.ones(3, jnp.float32), {})


def test_say_instead():
    class Base(eqxi.Enumeration):
        good = ""
        bad = "It is bad."

    class Derived(Base):  # pyright: ignore
        good = ""
        worse = "It is worse."

    _compat.say_instead(Derived.good, "fine")
    messages = [Derived[Derived.good], Derived[Derived.bad], Derived[Derived.worse]]
    assert messages == ["fine", "It is bad.", "It is worse."]
    # The base class keeps its own, and its items are still taken.
    assert Base[Base.good] == ""
    assert Derived[Derived.promote(Base.good)] == "fine"


def test_code_of():
    names = "successful", "max_steps_reached", "singular"
    items = [getattr(optx.RESULTS, name) for name in names]
    for a in items:
        for b in items:
            assert (_compat.code_of(a) == _compat.code_of(b)) == bool(a == b)


def test_said():
    @_compat.said
    class Said(optx.RESULTS):  # pyright: ignore
        odd = "It is odd."

    class More(Said):  # pyright: ignore
        odder = "It is odder."

    # By its name, from a base class, chosen, and out of a program.
    promoted = Said.promote(optx.RESULTS.max_steps_reached)
    chosen = Said.where(jnp.asarray(True), Said.odd, promoted)
    out = jax.jit(lambda item: Said.where(item == Said.odd, item, promoted))(Said.odd)
    assert [str(item) for item in (Said.odd, chosen, out)] == ["It is odd."] * 3
    assert repr(chosen) == "Said<It is odd.>"
    assert str(promoted) == optx.RESULTS[optx.RESULTS.max_steps_reached]
    several = jax.vmap(lambda flag: Said.where(flag, Said.odd, promoted))
    assert str(several(jnp.array([True, False]))).count("It is odd.") == 1
    # All are one kind of pytree, so that branches of a program can return them.
    kinds = {jtu.tree_structure(item) for item in (Said.odd, promoted, chosen, out)}
    assert len(kinds) == 1
    # An enumeration that is derived from it is one of Equinox, with its own kind.
    kinds = {jtu.tree_structure(item) for item in (More.odder, More.promote(chosen))}
    assert len(kinds) == 1 and isinstance(More.promote(chosen), More)
    assert "It is odd." in str(More.where(jnp.asarray(False), More.odder, More.odd))
    # The base class is untouched.
    assert type(optx.RESULTS.successful) is not type(Said.odd)
    with pytest.raises(ValueError, match="must be members"):
        Said.where(True, Said.odd, optx.RESULTS.successful)


def _solved(x, scales, vector):
    """The sum over a batch of matrices of a solve with a vector that is not batched."""

    def one(scale):
        operator = lx.MatrixLinearOperator(scale * jnp.eye(2))
        return jnp.sum(lx.linear_solve(operator, vector(x, scale), lx.LU()).value)

    return jnp.sum(jax.vmap(one)(scales))


def test_batched_as():
    scales, x = jnp.array([1.0, 2.0, 4.0]), jnp.ones(2)
    # The fault that is worked around. When it is mended this fails.
    with pytest.raises(ValueError, match="out_axes"):
        jax.grad(_solved)(x, scales, lambda x, scale: x)
    mended = jax.grad(_solved)(x, scales, _compat.batched_as)
    assert tree_allclose(mended, jnp.full(2, 1.75), rtol=1e-6)
    infinite = jnp.array([jnp.nan, jnp.inf])
    assert tree_allclose(_compat.batched_as({"u": x}, infinite), {"u": x}, rtol=0)


class Scaled(eqx.Module):
    by: Any

    def project(self, y):
        return self.by * y


class Plain:
    def project(self, y):
        return self.by * y  # pyright: ignore


def test_may_capture():
    held, number = [], np.float64(2.0)

    def recursive(y):
        return recursive(y - number) if number > 3 else y

    safe = (
        lambda y: y,
        lambda y: y + number,
        lambda y: recursive(y),
        lambda y, by=jnp.ones(2): y * by,
        Scaled(jnp.ones(2)).project,
    )
    assert not any(map(_compat.may_capture, safe))
    # What cannot be looked through may hold anything.
    unsure = (
        lambda y: y + held[0],
        ft.partial(jnp.add, 1.0),
        eqx.nn.Identity(),
        Plain().project,
        Scaled(Plain()).project,
    )
    assert all(map(_compat.may_capture, unsure))

    def f(s):
        seen = (
            lambda y: y + s,
            lambda y, by=s: y + by,
            lambda y: recursive(y + s),
            Scaled(lambda y: y + s).project,
        )
        assert not _compat.may_capture(Scaled(s).project)
        assert all(map(_compat.may_capture, seen))
        return s

    jax.grad(f)(1.0)
