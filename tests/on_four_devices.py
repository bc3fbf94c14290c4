"""What runs on four devices. `test_devices.py` runs this file in a process that has them.

By hand, with all pipelines:
`XLA_FLAGS=--xla_force_host_platform_device_count=4 pytest -m "" tests/on_four_devices.py`
"""

import re

import equinox as eqx
import jax
import jax.extend
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import optax
import pytest
from helpers import tree_allclose
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxtyping import Array

import bilevel_eqx as blx
from bilevel_eqx.pipelines import PenaltyDescent, SAGA, SingleLoop


KINDS = (AxisType.Auto, AxisType.Explicit)
SPLIT, COPIED = P("data"), P()


class Ridge(blx.AbstractFiniteSumProblem):
    inner_data: tuple[Array, Array]
    outer_data: tuple[Array, Array]
    block_size = 8

    def inner_losses(self, x, y, batch, key):
        features, targets = batch
        return 0.5 * (features @ y["weights"] - targets) ** 2

    outer_losses = inner_losses

    def inner_penalty(self, x, y):
        return 0.5 * jnp.sum(jnp.exp(x) * y["weights"] ** 2)

    def outer_penalty(self, x, y):
        return 0.01 * jnp.sum(x**2)


def _make(num_samples=32, dim=4):
    rng = np.random.default_rng(0)
    truth = rng.normal(size=dim)

    def draw():
        features = rng.normal(size=(num_samples, dim))
        noise = 0.3 * rng.normal(size=num_samples)
        return jnp.asarray(features), jnp.asarray(features @ truth + noise)

    return Ridge(draw(), draw()), jnp.full(dim, -1.0), {"weights": jnp.zeros(dim)}


def _mesh(kind):
    return jax.make_mesh((4,), ("data",), axis_types=(kind,))


def _put(tree, mesh, spec):
    return jax.device_put(tree, NamedSharding(mesh, spec))


def _specs(tree):
    leaves = [u for u in jtu.tree_leaves(tree) if eqx.is_array(u) and u.ndim > 0]
    assert all(len(u.sharding.device_set) == 4 for u in leaves)
    return {tuple(u.sharding.spec)[:1] for u in leaves}


_sgd = optax.sgd(0.1)
_batches = {"inner_batch": 8, "outer_batch": 8}
_loop = SingleLoop(_sgd, _sgd, optax.sgd(0.5, momentum=0.5), **_batches)
_unrolled = blx.Unrolled(_sgd, 5, batch_size=8)
PIPELINES = {
    "SAGA": (blx.WarmStart(), eqx.tree_at(lambda p: p.estimator, _loop, SAGA())),
    "PenaltyDescent": (blx.Optimistic(), PenaltyDescent(**_batches)),
    "Unrolled": (
        blx.WarmStart(),
        blx.GradientPipeline(_unrolled, optax.adam(0.05), outer_batch=8),
    ),
    # Its linear solves are those of lineax.
    "the default": (blx.ColdStart(), None),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n == "SAGA" else pytest.mark.slow) for n in PIPELINES],
)
def test_the_answer_is_that_of_one_device(name):
    problem, x, y = _make()
    equilibrium, pipeline = PIPELINES[name]
    options = {"pipeline": pipeline, "num_steps": 6, "certify": pipeline is None}

    def solved(problem, x, y):
        return blx.solve(problem, equilibrium, x, y, **options)

    wanted = solved(problem, x, y)
    # After the change of the axes both are the same program.
    for kind in KINDS:
        mesh = _mesh(kind)
        found = solved(
            _put(problem, mesh, SPLIT), _put(x, mesh, COPIED), _put(y, mesh, SPLIT)
        )
        for part in ("x", "y", "value"):
            assert tree_allclose(getattr(found, part), getattr(wanted, part), rtol=1e-9)
        if pipeline is None:
            for residual, value in wanted.certificate.residuals.items():
                assert jnp.abs(found.certificate.residuals[residual] - value) < 1e-9
        # They lie as they did, on the mesh that was given.
        assert found.x.sharding == NamedSharding(mesh, COPIED)
        assert found.y["weights"].sharding == NamedSharding(mesh, SPLIT)
        if name == "SAGA":
            # v, and the table of what is like y, lie as y does.
            assert found.state.v["weights"].sharding.spec == SPLIT
            table = found.state.estimator_state[0].entries
            assert table.slope["weights"].sharding.spec == P(None, "data")


@pytest.mark.parametrize("num_samples, with_variables", ((40, False), (48, True)))
def test_all_segments_are_one_program(num_samples, with_variables, caplog):
    """Also where x and y are on one device at first, and the data on four."""
    # A size that no other test has, since a known program is not compiled again.
    problem, x, y = _make(num_samples)
    mesh = _mesh(AxisType.Auto)
    problem = _put(problem, mesh, SPLIT)
    if with_variables:
        x, y = _put((x, y), mesh, COPIED)
    pipeline = SingleLoop(_sgd, _sgd, _sgd, **_batches)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        solution = blx.solve(
            problem,
            blx.WarmStart(),
            x,
            y,
            pipeline=pipeline,
            num_steps=6,
            save_every=3,
            certify=False,
        )
    assert solution.stats["num_steps"] == 6
    messages = [record.getMessage() for record in caplog.records]
    compiled = [m for m in messages if "Finished XLA compilation of jit(_segment)" in m]
    assert len(compiled) == 1


def test_each_device_has_its_share_of_a_batch():
    problem, x, y = _make(num_samples=64)
    state = _loop.init(problem, blx.WarmStart(), x, y, jr.key(0))
    arrays, rest = eqx.partition(state, eqx.is_array)

    def stepped(problem, arrays):
        whole = eqx.combine(arrays, rest)
        return eqx.filter(_loop.step(problem, blx.WarmStart(), whole)[0], eqx.is_array)

    split = _put(problem, _mesh(AxisType.Auto), SPLIT)
    program = jax.jit(stepped).lower(split, arrays).compile().as_text()
    # The residuals of the losses: two on each device, of a batch of eight. The others are
    # of the gather, which each device answers for its own samples.
    products = re.findall(r"= f64\[(\d+),?1?\]\S* (?:dot|multiply|subtract)\(", program)
    assert "2" in products and "8" not in products
    assert "all-reduce" in program


def test_resumes_to_the_last_bit(tmp_path):
    problem, x, y = _make()
    mesh = _mesh(AxisType.Explicit)
    problem = _put(problem, mesh, SPLIT)
    x, y = _put(x, mesh, COPIED), _put(y, mesh, SPLIT)
    equilibrium, pipeline = PIPELINES["SAGA"]

    def run(num_steps, checkpoint):
        return blx.solve(
            problem,
            equilibrium,
            x,
            y,
            pipeline=pipeline,
            num_steps=num_steps,
            checkpoint=checkpoint,
            checkpoint_every=2,
            certify=False,
        )

    whole = run(9, tmp_path / "whole.blx")
    for num_steps in (3, 5, 9):
        parts = run(num_steps, tmp_path / "parts.blx")
    # Not its `stats`, where times are.
    pairs = [(s.state, s.history, s.value) for s in (whole, parts)]
    for one, other in zip(*map(jtu.tree_leaves, pairs)):
        if eqx.is_array(one):
            assert one.sharding == other.sharding
            if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
                one, other = jr.key_data(one), jr.key_data(other)
            # Of a single step the noise is not known.
            is_float = jnp.issubdtype(one.dtype, jnp.inexact)
            assert jnp.array_equal(one, other, equal_nan=is_float)
    # A state is loaded to where `like` is.
    blx.save(tmp_path / "state.blx", whole.state)
    like = eqx.tree_at(lambda s: s.x, whole.state, _put(x, mesh, SPLIT))
    loaded = blx.load(tmp_path / "state.blx", like)
    assert loaded.x.sharding == NamedSharding(mesh, SPLIT)
    assert loaded.y["weights"].sharding == y["weights"].sharding
    assert tree_allclose(loaded.x, whole.x, rtol=0)


def test_batches_from_the_host():
    problem, x, y = _make()
    rng = np.random.default_rng(0)
    rows = [(rng.integers(0, 32, 8), rng.integers(0, 32, 8)) for _ in range(6)]

    def pairs(problem):
        for one, other in rows:
            yield (
                jtu.tree_map(lambda u: np.asarray(u)[one], problem.inner_data),
                jtu.tree_map(lambda u: np.asarray(u)[other], problem.outer_data),
            )

    loop = SingleLoop(_sgd, _sgd, _sgd)

    def solved(data, x):
        return blx.solve(
            data,
            blx.WarmStart(),
            x,
            y,
            pipeline=loop,
            num_steps=6,
            save_every=3,
            batches=pairs(problem),
            certify=False,
        )

    wanted = solved(problem, x)
    mesh = _mesh(AxisType.Explicit)
    found = solved(_put(problem, mesh, SPLIT), _put(x, mesh, COPIED))
    assert tree_allclose(found.x, wanted.x, rtol=1e-10)
    rows = [(one[:6], other[:6]) for one, other in rows]
    with pytest.raises(ValueError, match="6 samples.* 4 devices"):
        solved(_put(problem, mesh, SPLIT), _put(x, mesh, COPIED))


def test_many_runs():
    """Each device has two of eight runs."""
    problem, x, y = _make()
    starts = jnp.linspace(-1, 1, 32).reshape(8, 4)

    def ends(starts):
        def end(x):
            solution = blx.solve(
                problem,
                blx.WarmStart(),
                x,
                y,
                pipeline=_loop,
                num_steps=4,
                certify=False,
                throw=False,
            )
            return solution.x, solution.y

        return jax.vmap(end)(starts)

    wanted = jax.jit(ends)(starts)
    auto, explicit = (_put(starts, _mesh(kind), SPLIT) for kind in KINDS)
    mapped = jax.shard_map(
        ends, mesh=auto.sharding.mesh, in_specs=SPLIT, out_specs=SPLIT, check_vma=False
    )
    on_auto_axes = jax.sharding.auto_axes(ends, out_sharding=explicit.sharding)
    for fn, split in ((mapped, auto), (on_auto_axes, explicit)):
        found = jax.jit(fn)(split)
        assert tree_allclose(found, wanted, rtol=1e-12)
        assert _specs(found) == {("data",)}


def test_linear_solves():
    problem, x, y = _make()
    response = blx.Implicit(blx.Projection(), blx.Pseudoinverse())
    wanted = blx.hypergradient(problem, x, y, response)
    for kind in KINDS:
        mesh = _mesh(kind)
        found = blx.hypergradient(
            _put(problem, mesh, SPLIT),
            _put(x, mesh, COPIED),
            _put(y, mesh, SPLIT),
            response,
        )
        assert tree_allclose(found.gradient, wanted.gradient, rtol=1e-9)
        assert found.gradient.sharding.mesh == mesh


def _closure(A):
    """A problem of functions, which close over arrays."""

    def misfit(x, y):
        return A @ y - x

    return blx.BilevelProblem(
        lambda x, y: jnp.sum((y - 1) ** 2) + 0.1 * jnp.sum(x**2) + 0 * jnp.sum(A),
        lambda x, y: jnp.sum(jnp.log(jnp.cosh(misfit(x, y)))) + 0.05 * jnp.sum(y**2),
    )


def test_many_runs_with_linear_solves():
    """In a `shard_map`: derivatives, of a problem that closes over what differs between
    devices; and a run of the default pipeline with its certificate."""
    response = blx.Implicit(blx.Projection(), blx.Pseudoinverse())
    designs, x, y = jr.normal(jr.key(0), (8, 4, 3)), jnp.linspace(-1, 1, 4), jnp.zeros(3)

    def derivatives(A):
        problem = _closure(A)
        found = blx.hypergradient(problem, x, y, response, throw=False)

        def value(x):
            return jnp.sum(blx.best_response(problem, x, y, response) ** 2)

        return found.gradient, jax.grad(value)(x), found.result == blx.RESULTS.successful

    def run(A):
        problem = _closure(A)
        solution = blx.solve(
            problem, blx.WarmStart(), x, y, num_steps=3, throw=False, key=jr.key(1)
        )
        certificate = blx.certify(problem, blx.Optimistic(), solution.x, solution.y)
        residuals = solution.certificate.residuals, certificate.residuals
        return derivatives(A), (solution.x, solution.y), residuals

    wanted = jax.jit(jax.vmap(run))(designs)
    assert jnp.all(wanted[0][2])
    # Within it both kinds of axes are one. `test_many_runs` has a run with the others.
    auto, explicit = map(_mesh, KINDS)

    def mapped(fn, mesh):
        fn = jax.shard_map(
            fn, mesh=mesh, in_specs=SPLIT, out_specs=SPLIT, check_vma=False
        )
        return jax.jit(fn)(_put(designs, mesh, SPLIT))

    found = mapped(jax.vmap(derivatives), auto)
    assert tree_allclose(found, wanted[0], rtol=1e-9, atol=1e-12)
    assert _specs(found) == {("data",)}
    found = mapped(lambda A: jax.lax.map(run, A), explicit)
    assert tree_allclose(found[:2], wanted[:2], rtol=1e-9, atol=1e-12)
    assert tree_allclose(found[2], wanted[2], rtol=1e-6, atol=1e-9)
    assert _specs(found[:2]) == {("data",)}


def test_what_does_not_work_is_refused():
    problem, x, y = _make()
    mesh = _mesh(AxisType.Explicit)
    split = _put(problem, mesh, SPLIT)

    def solved(x):
        return blx.solve(
            split, blx.WarmStart(), x, y, pipeline=_loop, num_steps=2, certify=False
        ).x

    with pytest.raises(ValueError, match=r"jax\.sharding\.auto_axes"):
        jax.jit(solved)(x)
    with pytest.raises(ValueError, match="Outside of transformations both kinds work"):
        jax.jit(lambda key: split.sample(key, 8, 8).outer(x, y))(jr.key(0))

    response = blx.Implicit(blx.Projection(), blx.Pseudoinverse())

    def answered(x):
        return response(problem, x, y).y

    kinds = {"check_vma=False": True, "not in a response": False}
    for sentence, checks in kinds.items():
        # Of the first, `solve` says it.
        inside = solved if checks else answered
        if checks:
            split = problem
        mapped = jax.shard_map(
            jax.vmap(inside),
            mesh=mesh,
            in_specs=SPLIT,
            out_specs=SPLIT,
            check_vma=checks,
        )
        with pytest.raises(ValueError, match=sentence):
            jax.jit(mapped)(_put(jnp.stack([x] * 4), mesh, SPLIT))


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_outside_of_transformations(kind):
    problem, x, y = _make()
    wanted = problem.sample(jr.key(0), 8, None).inner(x, y)
    mesh = _mesh(kind)
    split = _put(problem, mesh, SPLIT)
    x, y = _put(x, mesh, COPIED), _put(y, mesh, COPIED)
    found = split.sample(jr.key(0), 8, None)
    assert tree_allclose(found.inner(x, y), wanted, rtol=1e-12)
    # On the mesh that was given.
    assert found.inner_batch.samples[0].sharding.mesh == mesh


def test_operators_on_a_mesh():
    problem, x, y = _make()
    make = {
        "inner_hessian": blx.inner_hessian,
        "cross_derivative": blx.cross_derivative,
        "response_jacobian": lambda *args: blx.response_jacobian(*args, lx.LU()),
    }
    for name, fn in make.items():
        vector = y if name == "inner_hessian" else x
        wanted = fn(problem, x, y).mv(vector)
        mesh = _mesh(AxisType.Auto)
        there = [_put(problem, mesh, SPLIT), *_put((x, y), mesh, COPIED)]
        found = fn(*there).mv(_put(vector, mesh, COPIED))
        assert tree_allclose(found, wanted, rtol=1e-9)
        mesh = _mesh(AxisType.Explicit)
        there = [_put(problem, mesh, SPLIT), *_put((x, y), mesh, COPIED)]
        for called in (fn, jax.jit(lambda *args, fn=fn: fn(*args).mv(args[1]))):
            with pytest.raises(ValueError, match=f"`{name}` returns an operator"):
                called(*there)
