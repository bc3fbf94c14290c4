"""What holds of any problem: random pytrees, shapes, types, ranks and spectra.

Hypothesis draws them. Their numbers come from a seed, and so are data of a few compiled
programs, one for each `Kind`: compiling anew for each example is what would cost. With
`HYPOTHESIS_PROFILE=long` the pytrees are drawn too, and nothing is derandomised.
"""

import dataclasses
import os
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import optax
import pytest
from helpers import (
    as_numpy,
    flatten,
    tree_dot,
    tree_has_dtype,
    tree_identical,
    tree_struct,
)
from hypothesis import given, HealthCheck, Phase, settings, strategies as st
from jaxtyping import Array

import bilevel_eqx as blx


_shared = dict(
    # Compiling takes as long as it takes, and nothing is to be written into the tree.
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    # A seed is not simpler for being smaller.
    phases=(Phase.explicit, Phase.generate),
)
settings.register_profile("short", max_examples=12, derandomize=True, **_shared)
settings.register_profile(
    "long", max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "100")), **_shared
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))
_is_long = settings.get_current_profile_name() == "long"


def _names(fast, slow):
    """Each is a program or two. What the fast ones are made of is in the others too."""
    return pytest.mark.parametrize(
        "name", (*fast, *(pytest.param(name, marks=pytest.mark.slow) for name in slow))
    )


#
# The problem: least squares in y, whose features may move with x, of any rank.
#


def _flat(tree, dtype):
    """The entries as a vector. Not `ravel_pytree`, which refuses mixtures of types."""
    leaves = [u.astype(dtype).ravel() for u in jtu.tree_leaves(tree)]
    return jnp.concatenate(leaves)


class Squares(blx.AbstractLeastSquaresProblem):
    r"""$r = W ((G + \sum_i (x_i - p_i) D_i) y - b - M x)$, where W has a column of zeros
    for each row that does not count: the rank is data, and the same for all x."""

    mix: Array
    features: Array
    turns: Array | None
    pivot: Array
    targets: Array
    follows: Array
    outer_features: Array
    outer_targets: Array
    pairing: Array

    def outer(self, x, y):
        x, y = _flat(x, self.mix.dtype), _flat(y, self.mix.dtype)
        misfit = self.outer_features @ y - self.outer_targets
        direct = 0.25 * jnp.sum((x - 1) ** 2) + y @ self.pairing @ x
        return 0.5 * jnp.sum(misfit**2) + direct

    def inner_residual(self, x, y):
        x, y = _flat(x, self.mix.dtype), _flat(y, self.mix.dtype)
        features = self.features
        if self.turns is not None:
            features = features + jnp.tensordot(x - self.pivot, self.turns, 1)
        return self.mix @ (features @ y - self.targets - self.follows @ x)


class General(blx.AbstractBilevelProblem):
    """The same, without saying that the inner objective is a sum of squares."""

    squares: Squares

    def outer(self, x, y):
        return self.squares.outer(x, y)

    def inner(self, x, y):
        return 0.5 * jnp.sum(self.squares.inner_residual(x, y) ** 2)


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a program depends on: pytrees of shapes, a type, and the class."""

    x: Any
    y: Any
    dtype: str
    cls: type = General
    moving: bool = True

    def structure(self, tree):
        count = 0

        def leaf(shape):
            nonlocal count
            count += 1
            mixed = "float32" if count % 2 else "float64"
            dtype = mixed if self.dtype == "mixed" else self.dtype
            return jax.ShapeDtypeStruct(shape, dtype)

        return jtu.tree_map(leaf, tree, is_leaf=_is_shape)

    @property
    def eps(self):
        return np.finfo("float64" if self.dtype == "float64" else "float32").eps


def _unflatten(flat, structure):
    leaves, treedef = jtu.tree_flatten(structure)
    parts = np.split(as_numpy(flat), np.cumsum([s.size for s in leaves])[:-1])
    arrays = [jnp.asarray(v.reshape(s.shape), s.dtype) for v, s in zip(parts, leaves)]
    return jtu.tree_unflatten(treedef, arrays)


def _is_shape(tree):
    return isinstance(tree, tuple) and all(isinstance(n, int) for n in tree)


def _size(shapes):
    return sum(int(np.prod(s)) for s in jtu.tree_leaves(shapes, is_leaf=_is_shape))


@dataclasses.dataclass(frozen=True)
class Case:
    """What is data. It is what a failing example prints."""

    kind: Kind
    seed: int
    rank: float  # of the rows, as a share of them
    log_cond: float  # of H
    log_scale: float  # of H

    def __post_init__(self):
        kind, rng = self.kind, np.random.default_rng(self.seed)
        n, p = _size(kind.y), _size(kind.x)
        m = n + 1
        dtype = "float64" if kind.dtype == "mixed" else kind.dtype
        rows = 1 + round(self.rank * (m - 1))
        r = min(rows, n)

        def orthogonal(size):
            return np.linalg.qr(rng.normal(size=(size, size)))[0]

        # The two ends of the spectrum are there, unless there is only one value.
        share = np.concatenate([[0.0, 1.0], rng.uniform(size=r)])[:r]
        values = 10 ** (0.5 * (self.log_scale - self.log_cond * share))
        features = np.zeros((m, n))
        features[:rows] = orthogonal(rows)[:, :r] * values @ orthogonal(n)[:r]
        mix = orthogonal(m) * (np.arange(m) < rows)
        # Each row turns in proportion to its length, or the condition would be lost.
        lengths = np.linalg.norm(features, axis=1, keepdims=True)
        top = np.max(values)
        arrays = dict(
            mix=mix,
            features=features,
            turns=0.3 * rng.normal(size=(p, m, n)) * lengths if kind.moving else None,
            pivot=rng.normal(size=p),
            targets=top * rng.normal(size=m),
            follows=top * rng.normal(size=(m, p)),
            outer_features=rng.normal(size=(2, n)),
            outer_targets=rng.normal(size=2),
            pairing=0.3 * rng.normal(size=(n, p)),
        )
        arrays = jtu.tree_map(lambda a: jnp.asarray(a, dtype), arrays)

        squares = Squares(**arrays)
        problem = squares if kind.cls is Squares else General(squares)
        # At the pivot the spectrum is the one asked for.
        given = dict(
            problem=problem,
            squares=squares,
            x=self.as_x(arrays["pivot"]),
            v=self.as_x(rng.normal(size=p)),
            anchor=self.as_y(rng.normal(size=n)),
            u=self.as_y(rng.normal(size=n)),
        )
        for name, value in given.items():
            object.__setattr__(self, name, value)

    def as_x(self, flat):
        return _unflatten(flat, self.kind.structure(self.kind.x))

    def as_y(self, flat):
        return _unflatten(flat, self.kind.structure(self.kind.y))

    @property
    def dense(self):
        return Dense(self.squares, flatten(self.x))

    def rtol(self, power=1.0):
        """A few roundings for each entry, times (a power of) the condition of H."""
        return 200 * self.kind.eps * 10 ** (power * self.log_cond)


class Dense:
    """All that there is to know of the problem at x, in NumPy and float64."""

    def __init__(self, squares: Squares, x):
        s = jtu.tree_map(as_numpy, squares)
        m, n = s.features.shape
        turns = np.zeros((x.size, m, n)) if s.turns is None else s.turns
        self.x, self.squares = x, s
        self.A = s.mix @ (s.features + np.tensordot(x - s.pivot, turns, 1))
        self.dA = np.einsum("km,imn->ikn", s.mix, turns)
        self.t, self.dt = s.mix @ (s.targets + s.follows @ x), s.mix @ s.follows
        self.H = self.A.T @ self.A
        self.pinv_A = np.linalg.pinv(self.A, rcond=1e-6)
        self.pinv = self.pinv_A @ self.pinv_A.T
        self.null = np.eye(n) - self.pinv_A @ self.A
        self.largest = np.linalg.eigvalsh(self.H)[-1]
        self.rank = int(round(n - np.trace(self.null)))

    def gradient(self, y):
        return self.A.T @ (self.A @ y - self.t)

    def cross(self, y):
        """B, the derivative of the gradient in x."""
        moved = np.einsum("ikn,n->ki", self.dA, y) - self.dt
        return np.einsum("ikn,k->ni", self.dA, self.A @ y - self.t) + self.A.T @ moved

    def outer(self, y):
        s, x = self.squares, self.x
        misfit = s.outer_features @ y - s.outer_targets
        value = 0.5 * misfit @ misfit + 0.25 * np.sum((x - 1) ** 2) + y @ s.pairing @ x
        return (
            value,
            0.5 * (x - 1) + s.pairing.T @ y,
            s.outer_features.T @ misfit + s.pairing @ x,
        )

    def project(self, a):
        return a - self.pinv_A @ (self.A @ a - self.t)

    def filtered(self, fn):
        """A function of H, by its eigenvalues, those of the null space being zero."""
        values, vectors = np.linalg.eigh(self.H)
        values[: values.size - self.rank] = 0.0
        return (vectors * fn(values)[None, :]) @ vectors.T


#
# Strategies
#

_tree = {"w": ((2, 2), ()), "b": (0,)}
single = Kind({"a": (), "b": (2,)}, _tree, "float32")
double = Kind(((1, 2), (2,)), _tree, "float64", Squares)
mixed = Kind({"a": (), "b": (2,)}, _tree, "mixed")
scalar = Kind((), (), "float32", Squares, moving=False)

_shape = st.sampled_from(((), (0,), (1,), (2,), (3,), (1, 2), (2, 2), (2, 1, 2)))
_trees = st.recursive(
    _shape,
    lambda tree: (
        st.lists(tree, min_size=1, max_size=3)
        | st.lists(tree, min_size=1, max_size=3).map(lambda t: {"l": t})
        | st.dictionaries(st.sampled_from("abc"), tree, min_size=1, max_size=3)
    ),
    max_leaves=4,
).filter(lambda tree: 1 <= _size(tree) <= 8)


def _cases(*kinds, log_cond=4.0, rank=(0.0, 1.0), drawn=_is_long):
    some = st.sampled_from(kinds)
    if drawn:
        dtypes = ("float32", "float64", "mixed")[: 2 + (mixed in kinds)]
        some |= st.builds(
            Kind,
            _trees,
            _trees,
            st.sampled_from(dtypes),
            st.sampled_from((General, Squares)),
            st.booleans(),
        )
    return st.builds(
        Case,
        some,
        st.integers(0, 2**32 - 1),
        st.floats(*rank, width=16),
        st.floats(0.0, log_cond, width=16),
        st.floats(-3.0, 3.0, width=16),
    )


def _close(found, expected, rtol, scale):
    """In norm, and relative to what the answer is made of: it may have cancelled."""
    error = np.linalg.norm(flatten(found) - expected)
    allowed = rtol * scale
    assert error <= allowed, f"{error} > {allowed}: {flatten(found)} is not {expected}"


def _norm(*arrays):
    return sum(np.linalg.norm(a) for a in arrays)


#
# Linear solvers: -Q B, where Q is what stands for the inverse of H
#


@eqx.filter_jit
def _solve_both_ways(problem, x, y, v, u, solver):
    J = blx.response_jacobian(problem, x, y, solver)
    return J.mv(v), J.T.mv(u)


def _series(H, num_terms, step_size):
    """The sum by doubling: S_2K = S_K + (I - alpha H)^K S_K, and one more term if odd."""
    total, power = np.zeros_like(H), np.eye(len(H))
    step = power - step_size * H
    for bit in bin(num_terms)[2:]:
        total, power = total + power @ total, power @ power
        if bit == "1":
            total, power = total + step_size * power, step @ power
    return total


def _conjugate_gradients(H, b, num_steps):
    q, r, p = np.zeros_like(b), b, b
    for _ in range(num_steps):
        step_size = (r @ r) / (p @ H @ p)
        q, old = q + step_size * p, r
        r = r - step_size * H @ p
        p = r + (r @ r) / (old @ old) * p
    return q


def _step_size(case, dense):
    share = np.random.default_rng(case.seed).uniform(0.05, 1.9)
    return float(share / dense.largest)


def _neumann(num_terms):
    def make(case, dense):
        step_size = _step_size(case, dense)
        solver = blx.Neumann(num_terms, step_size)
        return solver, _series(dense.H, num_terms, step_size).dot, num_terms

    return make


def _neumann_drawn(case, dense):
    # As an array it is data, and then the sum is taken in closed form.
    # Mostly few, with which the parity shows; not by the numbers of the step size.
    num_terms = int(10 ** (5 * np.random.default_rng([case.seed, 1]).uniform() ** 3))
    _, Q, _ = _neumann(num_terms)(case, dense)
    solver = blx.Neumann(jnp.asarray(num_terms), _step_size(case, dense))
    return solver, Q, num_terms


def _identity(case, dense):
    scale = _step_size(case, dense)
    return blx.IdentityInverse(scale), lambda b: scale * b, 1


def _pinv(solver):
    def make(case, dense):
        return solver, dense.pinv.dot, 1

    return make


def _cg(case, dense):
    # With u nearly in the null space, little of it is left once that part is gone.
    u = flatten(case.u)
    angle = np.linalg.norm(u - dense.null @ u) / np.linalg.norm(u)
    num_steps = jnp.asarray(2 * dense.rank + 1)
    return blx.TruncatedCG(num_steps), dense.pinv.dot, angle**-3


def _cg_truncated(case, dense):
    num_steps = max(1, dense.rank - 1)
    solver = blx.TruncatedCG(jnp.asarray(num_steps))
    return solver, lambda b: _conjugate_gradients(dense.H, b, num_steps), 1


def _lx_cg(case, dense):
    # Asked for more than there is to have, it goes on until it divides zero by zero.
    rtol = 1e3 * float(case.kind.eps)
    return lx.CG(rtol, 1e-3 * rtol), dense.pinv.dot, 1e2


any_rank = {
    "identity": _identity,
    "neumann": _neumann(5),
    "neumann_long": _neumann(1500),
    "neumann_drawn": _neumann_drawn,
    "pseudoinverse": _pinv(blx.Pseudoinverse()),
    "matrix_free": _pinv(blx.Pseudoinverse(dense_size=0)),
    "cg": _cg,
    "svd": _pinv(lx.SVD()),
}
definite = {
    "cg_definite": _cg,
    "cg_truncated": _cg_truncated,
    "lx_cg": _lx_cg,
    "cholesky": _pinv(lx.Cholesky()),
}


# A matrix has one type, and so those that make one want a single type in all leaves.
mixable = ("identity", "neumann", "cg", "cg_definite", "cg_truncated")


# Truncated CG is exact only in exact arithmetic: rounding grows with the condition. And
# beyond the range of a singular H, whenever two eigenvalues are close: there comes a
# direction which is nearly flat, and its long step leaves few digits of the rest. So
# there it is given but one eigenvalue.
log_conds = {"cg": 0.0, "cg_definite": 1.0, "cg_truncated": 1.0, "lx_cg": 2.0}


def _solver_cases(name):
    rank = (1.0, 1.0) if name in definite else (0.0, 1.0)
    kinds = (double, mixed) if name in mixable else (double,)
    return _cases(*kinds, rank=rank, log_cond=log_conds.get(name, 4.0))


@pytest.mark.slow
@pytest.mark.parametrize("name", (*any_rank, *definite))
@given(data=st.data())
def test_solver(name, data):
    case = data.draw(_solver_cases(name))
    dense = case.dense
    solver, Q, growth = {**any_rank, **definite}[name](case, dense)
    # At a solution the range of B is within that of H, which is when all are exact.
    y = case.as_y(dense.project(flatten(case.anchor)))
    B = dense.cross(flatten(y))
    v, u = flatten(case.v), flatten(case.u)
    forward, backward = -Q(B @ v), -B.T @ Q(u)
    found = _solve_both_ways(case.problem, case.x, y, case.v, case.u, solver)
    rtol = case.rtol() * growth
    _close(found[0], forward, rtol, _norm(forward))
    _close(found[1], backward, rtol, _norm(backward))
    assert tree_struct(found) == tree_struct((y, case.x))


#
# Responses: the point and the Jacobian
#


@eqx.filter_jit
def _respond(problem, x, anchor, response, v, u):
    answer = response(problem, x, anchor)
    pulled, *_ = answer.pullback(u)
    J = answer.jacobian
    return answer.y, J.mv(v), J.T.mv(u), pulled, answer.result


def _descended(case, dense, num_steps, inner_step, outer_step=lambda k: 0.0):
    """Steps on f, and on F, each differentiated by hand."""
    C, E = dense.squares.outer_features, dense.squares.pairing
    y = flatten(case.anchor)
    J = np.zeros((y.size, dense.x.size))
    for k in range(num_steps):
        _, _, outer_y = dense.outer(y)
        t = outer_step(k)
        J = J - inner_step * (dense.H @ J + dense.cross(y)) - t * (C.T @ C @ J + E)
        y = y - inner_step * dense.gradient(y) - t * outer_y
    return y, J


def _warm(case, dense):
    response = blx.Implicit(blx.Projection(), blx.Pseudoinverse())
    y = dense.project(flatten(case.anchor))
    return response, y, -dense.pinv @ dense.cross(y)


def _cold(case, dense):
    """Golub and Pereyra's derivative of a pseudoinverse of constant rank."""
    P, a = dense.pinv_A, flatten(case.anchor)
    misfit = dense.A @ a - dense.t
    rest = np.eye(len(P.T)) - dense.A @ P

    def column(dA, dt):
        dP = -P @ dA @ P + P @ P.T @ dA.T @ rest + dense.null @ dA.T @ P.T @ P
        return -dP @ misfit - P @ (dA @ a - dt)

    columns = [column(dA, dt) for dA, dt in zip(dense.dA, dense.dt.T)]
    return blx.MinimumDisplacement(), dense.project(a), np.stack(columns, axis=1)


def _proximal(case, dense):
    epsilon = _step_size(case, dense) * dense.largest**2
    inverse = np.linalg.inv(dense.H + epsilon * np.eye(len(dense.H)))
    y = inverse @ (dense.A.T @ dense.t + epsilon * flatten(case.anchor))
    response = blx.Proximal(epsilon, blx.Projection(), blx.Pseudoinverse())
    return response, y, -inverse @ dense.cross(y)


def _partial(case, dense):
    """As many steps as terms, which is not unrolling where the features move."""
    step_size = _step_size(case, dense)
    y, _ = _descended(case, dense, 3, step_size)
    solver, series = blx.GradientDescent(step_size, 3), blx.Neumann(3, step_size)
    J = -_series(dense.H, 3, step_size) @ dense.cross(y)
    return blx.Implicit(solver, series, tolerance=None), y, J


def _unrolled(num_steps, mode):
    def make(case, dense):
        step_size = _step_size(case, dense)
        y, J = _descended(case, dense, num_steps, step_size)
        return blx.Unrolled(optax.sgd(jnp.asarray(step_size)), num_steps, mode), y, J

    return make


def _aggregated(case, dense):
    inner_step, outer_step, mixing = _step_size(case, dense), 0.1, 0.4
    y, J = _descended(
        case,
        dense,
        5,
        (1 - mixing) * inner_step,
        lambda k: mixing * outer_step / (k + 1),
    )
    return blx.Aggregated(5, inner_step, outer_step, mixing), y, J


def _fixed(case, dense):
    y = flatten(case.anchor)
    return blx.Fixed(), y, np.zeros((y.size, dense.x.size))


responses = {
    "warm": _warm,
    "cold": _cold,
    "proximal": _proximal,
    "partial": _partial,
    "one_step": _unrolled(1, "checkpointed"),
    "checkpointed": _unrolled(70, "checkpointed"),
    "reverse": _unrolled(4, "reverse"),
    "forward": _unrolled(4, "forward"),
    "aggregated": _aggregated,
    "fixed": _fixed,
}
# As for the linear solvers. The unrolled ones are the same in this.
mixable_responses = ("partial", "one_step", "aggregated", "fixed")
# That x and y are one number each matters to solves, not to steps.
with_solves = ("warm", "cold")


def _response_cases(name):
    kinds = [double]
    if name in mixable_responses:
        kinds.append(mixed)
    if name in with_solves:
        kinds.append(scalar)
    return _cases(*kinds)


def _scale(case, dense, y, J):
    """The sizes that y and J are sums of."""
    size = _norm(y, flatten(case.anchor))
    turning = _norm(dense.dA) / np.sqrt(dense.largest)
    return size, _norm(J) + turning * size


# The proximal one is in `test_solve` too, and the last in `test_faults_derivatives.py`.
_elsewhere = "proximal", "aggregated"


@pytest.mark.slow
@_names((name for name in responses if name not in _elsewhere), _elsewhere)
@given(data=st.data())
def test_response(name, data):
    case = data.draw(_response_cases(name))
    dense = case.dense
    response, y, J = responses[name](case, dense)
    found = _respond(case.problem, case.x, case.anchor, response, case.v, case.u)
    *found, result = found
    assert result == blx.RESULTS.successful
    assert tree_struct(tuple(found)) == tree_struct(
        (case.anchor, case.anchor, case.x, case.x)
    )
    v, u = flatten(case.v), flatten(case.u)
    rtol, (y_scale, J_scale) = case.rtol(), _scale(case, dense, y, J)
    _close(found[0], y, rtol, y_scale)
    _close(found[1], J @ v, rtol, J_scale * _norm(v))
    _close(found[2], J.T @ u, rtol, J_scale * _norm(u))
    _close(found[3], J.T @ u, rtol, J_scale * _norm(u))
    # <u, J v> = <J^T u, v>, whatever J is.
    between = tree_dot(case.u, found[1]) - tree_dot(found[3], case.v)
    assert abs(between) <= rtol * J_scale * _norm(u) * _norm(v)


#
# Transformations commute
#

# One kind is enough: what differs between them has been compared above.
_one = _cases(double, drawn=False)


@eqx.filter_jit
def _batched(problems, xs, anchors, response):
    def gradient(problem, x, anchor):
        return blx.hypergradient(problem, x, anchor, response).gradient

    axes = eqx.if_array(0)
    return eqx.filter_vmap(gradient, in_axes=(axes, axes, axes))(problems, xs, anchors)


def _stack(*trees):
    return jtu.tree_map(lambda *leaves: jnp.stack(leaves), *trees)


# The proximal one is "warm" of another problem, and damped.
@pytest.mark.slow
@_names(("cold",), ("checkpointed",))
@given(cases=st.tuples(*3 * [_one]))
def test_vmap(name, cases):
    """Over x, the anchor and all data at once: other ranks and other spectra."""
    # A step size that the steepest of them bears.
    steepest = max(cases, key=lambda case: case.dense.largest)
    response, _, _ = responses[name](steepest, steepest.dense)
    problems, xs, anchors = (
        _stack(*(getattr(case, field) for case in cases))
        for field in ("problem", "x", "anchor")
    )
    gradients = _batched(problems, xs, anchors, response)
    for i, case in enumerate(cases):
        found = jtu.tree_map(lambda leaf, i=i: leaf[i], gradients)
        out = blx.hypergradient(case.problem, case.x, case.anchor, response)
        expected, size = flatten(out.gradient), _norm(flatten(out.y)) ** 2 + 1
        _close(found, expected, case.rtol(), _norm(expected) + size)


@eqx.filter_jit
def _differentiated(problem, x, anchor, response):
    def value(x):
        y = blx.best_response(problem, x, anchor, response)
        return problem.outer(x, y)

    out = blx.hypergradient(problem, x, anchor, response)
    return out, *jax.value_and_grad(value)(x)


@pytest.mark.slow
@_names(("cold",), ("checkpointed",))
@given(case=_one)
def test_grad_and_jit(name, case):
    """The derivative of F(x, best_response(x)), and the hypergradient within a program
    and outside of any."""
    response, _, _ = responses[name](case, case.dense)
    inside, value, gradient = _differentiated(case.problem, case.x, case.anchor, response)
    out = blx.hypergradient(case.problem, case.x, case.anchor, response)
    size = _norm(flatten(out.y)) ** 2 + 1
    for other in (value, inside.value):
        _close(other, out.value, case.rtol(), size)
    for other in (gradient, inside.gradient):
        expected = flatten(out.gradient)
        _close(other, expected, case.rtol(), _norm(expected) + size)


#
# With 64-bit types enabled or not
#


def _floats(tree):
    return eqx.filter(tree, eqx.is_inexact_array)


def _with_and_without_x64(fn):
    """Of data in float32: nothing is promoted."""
    wide = fn()
    with jax.enable_x64(False):
        narrow = fn()
    assert tree_has_dtype(wide, jnp.float32)
    assert tree_struct(_floats(wide)) == tree_struct(_floats(narrow))
    return wide, narrow


# The others are parts of these, or less. The proximal one is in `test_solve`.
@pytest.mark.slow
@_names(("warm", "checkpointed"), ("cold", "partial", "forward", "aggregated"))
@given(case=_cases(single, drawn=False))
def test_hypergradient(name, case):
    """Against its closed form, in float32, twice, and with x64 and without."""
    dense = case.dense
    response, y, J = responses[name](case, dense)

    def gradient():
        return blx.hypergradient(case.problem, case.x, case.anchor, response)

    value, outer_x, outer_y = dense.outer(y)
    rtol, (y_scale, J_scale) = case.rtol(), _scale(case, dense, y, J)
    curvature = (
        1 + _norm(dense.squares.outer_features) ** 2 + _norm(dense.squares.pairing)
    )
    scale = curvature * (1 + y_scale) + _norm(outer_x, outer_y)
    outs = _with_and_without_x64(gradient)
    for out in outs:
        _close(out.y, y, rtol, y_scale)
        _close(out.gradient, outer_x + J.T @ outer_y, rtol, scale * (1 + J_scale))
        _close(out.value, value, rtol, abs(value) + scale * y_scale)
    assert tree_identical(outs[0], gradient())


@pytest.mark.slow
@_names(("neumann_drawn",), ("cg", "matrix_free"))
@given(data=st.data())
def test_x64_solver(name, data):
    log_cond = log_conds.get(name, 4.0)
    case = data.draw(_cases(single, log_cond=log_cond, drawn=False))
    solver, _, growth = any_rank[name](case, case.dense)
    y = case.as_y(case.dense.project(flatten(case.anchor)))
    arguments = case.problem, case.x, y, case.v, case.u, solver
    wide, narrow = _with_and_without_x64(lambda: _solve_both_ways(*arguments))
    for found, other in zip(wide, narrow):
        expected = flatten(other)
        _close(found, expected, case.rtol() * growth, _norm(expected))


#
# `solve`
#


@pytest.mark.slow
@given(case=_cases(Kind((2,), (3,), "float32"), log_cond=1.0, drawn=False))
def test_solve(case):
    """Twice the same bits, in the types of the data, with x64 and without."""

    def solve():
        optimiser = optax.sgd(jnp.asarray(0.01))
        response, _, _ = responses["proximal"](case, case.dense)
        return blx.solve(
            case.problem,
            blx.WarmStart(response.epsilon),
            case.x,
            case.anchor,
            pipeline=blx.GradientPipeline(response, optimiser),
            num_steps=3,
        )

    wide, narrow = _with_and_without_x64(solve)
    assert tree_identical(wide, solve())
    for found, other in ((wide.x, narrow.x), (wide.y, narrow.y)):
        expected = flatten(other)
        _close(found, expected, case.rtol(), _norm(expected) + 1)
