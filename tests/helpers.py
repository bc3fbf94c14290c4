"""Problems whose answers are known, and ways to compare with them.

The reference answers are NumPy in float64, or JAX applied to a closed form; none of
them calls the library.
"""

import dataclasses
import itertools
from typing import Any

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import pytest
from jaxtyping import Array, PyTree

import bilevel_eqx as blx


dtypes = (jnp.float64, jnp.float32)


def grid(quick, *axes):
    """All combinations, to parametrise over. Those that are not `quick` are slow."""
    return [
        pytest.param(*case, marks=() if quick(*case) else pytest.mark.slow)
        for case in itertools.product(*axes)
    ]


def tolerance(dtype) -> float:
    """Relative and absolute, for well-conditioned problems of size about one."""
    return 1e-10 if dtype == jnp.float64 else 2e-5


def tree_allclose(a: PyTree, b: PyTree, *, rtol: float, atol: float | None = None):
    """Whether two pytrees have the same structure, shapes and nearly the same values.

    Not the same types: the references are in float64. See `tree_has_dtype`.
    """
    atol = rtol if atol is None else atol
    if jtu.tree_structure(a) != jtu.tree_structure(b):
        return False
    # NumPy, as in everything here that is not to be traced: it has nothing to compile.
    pairs = zip(map(as_numpy, jtu.tree_leaves(a)), map(as_numpy, jtu.tree_leaves(b)))
    return all(
        u.shape == v.shape and np.allclose(u, v, rtol=rtol, atol=atol) for u, v in pairs
    )


def tree_identical(a, b):
    """Bit for bit, whatever the leaves are; of a solution all but how long it took."""
    a, b = (eqx.filter(_untimed(tree), eqx.is_array) for tree in (a, b))
    assert jtu.tree_structure(a) == jtu.tree_structure(b)

    def same(u, v):
        if jnp.issubdtype(u.dtype, jax.dtypes.prng_key):
            u, v = jr.key_data(u), jr.key_data(v)
        return u.dtype == v.dtype and np.array_equal(u, v, equal_nan=True)

    return all(jtu.tree_leaves(jtu.tree_map(same, a, b)))


def _untimed(tree):
    if not isinstance(tree, blx.Solution):
        return tree
    stats = {k: v for k, v in tree.stats.items() if not k.endswith("_seconds")}
    return dataclasses.replace(tree, stats=stats)


def tree_has_dtype(tree: PyTree, dtype) -> bool:
    """Whether each floating-point array has this type, and there is at least one."""
    leaves = [u for u in jtu.tree_leaves(tree) if eqx.is_inexact_array(u)]
    return len(leaves) > 0 and all(u.dtype == dtype for u in leaves)


def tree_struct(tree: PyTree) -> PyTree[jax.ShapeDtypeStruct]:
    return jtu.tree_map(lambda u: jax.ShapeDtypeStruct(u.shape, u.dtype), tree)


def upcast(tree: PyTree) -> PyTree:
    """The same in float64, so that a reference is as good as its formula."""
    return jtu.tree_map(
        lambda u: jnp.asarray(as_numpy(u)) if eqx.is_inexact_array(u) else u, tree
    )


def as_numpy(array) -> np.ndarray:
    return np.asarray(array, np.float64)


def flatten(tree: PyTree) -> np.ndarray:
    return np.concatenate([as_numpy(u).ravel() for u in jtu.tree_leaves(tree)])


def random_like(key, tree: PyTree) -> PyTree:
    rng = np.random.default_rng(np.asarray(key))
    return jtu.tree_map(lambda u: jnp.asarray(rng.normal(size=u.shape), u.dtype), tree)


def tree_dot(a: PyTree, b: PyTree) -> np.ndarray:
    return flatten(a) @ flatten(b)


#
# Finite differences, and the re-solve that they go through. A few small programs, each
# compiled once for all tests, called from Python: compiling is what tests cost.
#


def finite_difference_jvp(fn, primal: PyTree, tangent: PyTree, eps: float = 1e-3):
    """The directional derivative, by central differences of fourth order."""

    def move(u, t, shift):
        return jnp.asarray(as_numpy(u) + shift * as_numpy(t), u.dtype)

    def moved(shift):
        return fn(jtu.tree_map(lambda u, t: move(u, t, shift), primal, tangent))

    stencil = ((-2, 1.0), (-1, -8.0), (1, 8.0), (2, -1.0))
    values = [
        jtu.tree_map(lambda v, w=weight: as_numpy(v) * w / (12 * eps), moved(k * eps))
        for k, weight in stencil
    ]
    return jtu.tree_map(lambda *parts: sum(parts), *values)


def finite_difference_gradient(fn, primal: PyTree, eps: float = 1e-3) -> PyTree:
    """The gradient of a scalar function, one coordinate after the other."""
    flat, unravel = jax.flatten_util.ravel_pytree(primal)
    basis = np.eye(flat.size)
    entries = [
        finite_difference_jvp(fn, primal, unravel(jnp.asarray(e)), eps) for e in basis
    ]
    return unravel(jnp.asarray(np.stack(entries)))


def value_and_both(fn, primals: tuple, tangents: tuple):
    """The value, the derivative along `tangents`, and the gradient (of a scalar `fn`).

    Forward mode and its transpose, which is what reverse mode is, of one linearisation:
    `fn` is in the program once.
    """
    value, push = jax.linearize(fn, *primals)
    return value, push(*tangents), jax.linear_transpose(push, *primals)(1.0 + 0 * value)


@eqx.filter_jit
def _newton_step(problem, x, y, anchor, epsilon):
    flat, unravel = jax.flatten_util.ravel_pytree(y)
    flat_anchor, _ = jax.flatten_util.ravel_pytree(anchor)

    def objective(flat):
        pull = 0.5 * epsilon * jnp.sum((flat - flat_anchor) ** 2)
        return problem.inner(x, unravel(flat)) + pull

    gradient, hessian = jax.grad(objective)(flat), jax.hessian(objective)(flat)
    return unravel(flat - jnp.linalg.solve(hessian, gradient))


def resolve(problem, x: PyTree, y0: PyTree, epsilon: float = 0.0) -> PyTree:
    """The minimum of f + epsilon / 2 |y - y0|^2, strongly convex, by Newton's method on
    a dense Hessian.

    It is what the library's inner solvers are compared with, so it shares nothing
    with them.
    """
    y, epsilon = y0, jnp.asarray(epsilon)
    for _ in range(12):
        y = _newton_step(problem, x, y, y0, epsilon)
    return y


@eqx.filter_jit
def _descent_step(problem, x, y, step_size):
    gradient = jax.grad(problem.inner, argnums=1)(x, y)
    return jtu.tree_map(lambda u, g: u - step_size * g, y, gradient)


def descend(problem, x: PyTree, y: PyTree, num_steps: int, step_size: float) -> PyTree:
    """Gradient descent, one step at a time."""
    for _ in range(num_steps):
        y = _descent_step(problem, x, y, jnp.asarray(step_size))
    return y


@eqx.filter_jit
def _derivatives(problem, x, y):
    flat_x, unravel_x = jax.flatten_util.ravel_pytree(x)
    flat_y, unravel_y = jax.flatten_util.ravel_pytree(y)

    def flat(fn):
        return lambda x, y: fn(unravel_x(x), unravel_y(y))

    inner, outer = flat(problem.inner), flat(problem.outer)
    H = jax.hessian(inner, argnums=1)(flat_x, flat_y)
    B = jax.jacfwd(jax.grad(inner, argnums=1), argnums=0)(flat_x, flat_y)
    return H, B, *jax.grad(outer, argnums=(0, 1))(flat_x, flat_y)


def dense_derivatives(problem, x: PyTree, y: PyTree):
    """H, B, F_x and F_y by JAX's own derivatives of the objectives as flat functions."""
    return tuple(as_numpy(d) for d in _derivatives(*upcast((problem, x, y))))


#
# Linear least squares with fixed features: T1 to T7, and T11.
#

NUM_ROWS, NUM_WEIGHTS = 3, 5
STEP_SIZE = 0.4


def make_features(seed=0, singular_values=(1.4, 1.0, 0.6), num_weights=NUM_WEIGHTS):
    """A matrix of given singular values. Its H is singular: it has more columns."""
    rng = np.random.default_rng(seed)
    num_rows = len(singular_values)
    left = np.linalg.qr(rng.normal(size=(num_rows, num_rows)))[0]
    right = np.linalg.qr(rng.normal(size=(num_weights, num_rows)))[0]
    return (left * np.asarray(singular_values)[None, :]) @ right.T


class LinearLeastSquares(blx.AbstractLeastSquaresProblem):
    """Anti-distillation: x are the targets of a linear regression on fixed features.

    The outer objective has both terms, so that neither can be lost unnoticed.
    """

    features: Array
    outer_features: Array
    outer_targets: Array

    def outer(self, x, y):
        misfit = self.outer_features @ y - self.outer_targets
        return 0.5 * jnp.sum(misfit**2) + 0.25 * jnp.sum((x - 1) ** 2)

    def inner_residual(self, x, y):
        return self.features @ y - x


class LinearBilevel(blx.AbstractBilevelProblem):
    """The same, without saying that the inner objective is a sum of squares."""

    features: Array
    outer_features: Array
    outer_targets: Array

    def outer(self, x, y):
        misfit = self.outer_features @ y - self.outer_targets
        return 0.5 * jnp.sum(misfit**2) + 0.25 * jnp.sum((x - 1) ** 2)

    def inner(self, x, y):
        return 0.5 * jnp.sum((self.features @ y - x) ** 2)


linear_problems = (LinearLeastSquares, LinearBilevel)


def make_linear(cls, dtype, seed=0):
    """The problem, x and y, none of them special."""
    rng = np.random.default_rng(seed + 100)
    outer_features = rng.normal(size=(2, NUM_WEIGHTS))
    outer_targets = rng.normal(size=2)
    arrays = make_features(seed), outer_features, outer_targets
    problem = cls(*(jnp.asarray(a, dtype) for a in arrays))
    x = jnp.asarray(rng.normal(size=NUM_ROWS), dtype)
    y = jnp.asarray(rng.normal(size=NUM_WEIGHTS), dtype)
    return problem, x, y


def linear_reference(problem, x, y, jacobian):
    """F_x + J^T F_y of the linear problems, for a given J."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    outer_features = np.asarray(problem.outer_features, np.float64)
    misfit = outer_features @ y - np.asarray(problem.outer_targets, np.float64)
    return 0.5 * (x - 1) + jacobian.T @ (outer_features.T @ misfit)


def neumann_jacobian(features, num_terms, step_size):
    """alpha sum_{j<K} (I - alpha H)^j Phi^T, term by term."""
    features = as_numpy(features)
    step = np.eye(features.shape[1]) - step_size * features.T @ features
    term, total = step_size * features.T, np.zeros_like(features.T)
    for _ in range(num_terms):
        total = total + term
        term = step @ term
    return total


def damped_jacobian(features, epsilon):
    """(H + epsilon I)^-1 Phi^T."""
    features = as_numpy(features)
    damped = features.T @ features + epsilon * np.eye(features.shape[1])
    return np.linalg.solve(damped, features.T)


def gradient_descent(features, x, y0, num_steps, step_size):
    """K steps on 1/2 |Phi y - x|^2, one at a time."""
    features, x, y = as_numpy(features), as_numpy(x), as_numpy(y0)
    for _ in range(num_steps):
        y = y - step_size * features.T @ (features @ y - x)
    return y


def project(features, x, y0):
    """The projection of y0 on the solutions of Phi y = x."""
    features, x, y0 = as_numpy(features), as_numpy(x), as_numpy(y0)
    return y0 + np.linalg.pinv(features) @ (x - features @ y0)


#
# Ridge regression with one log-penalty a weight
#


class Ridge(blx.AbstractBilevelProblem):
    features: Array
    targets: Array
    outer_features: Array
    outer_targets: Array

    def outer(self, x, y):
        misfit = self.outer_features @ y - self.outer_targets
        return 0.5 * jnp.sum(misfit**2) + 0.1 * jnp.sum(jnp.sin(x) * y)

    def inner(self, x, y):
        fit = 0.5 * jnp.sum((self.features @ y - self.targets) ** 2)
        return fit + 0.5 * jnp.sum(jnp.exp(x) * y**2)


def make_ridge(dtype=jnp.float64, seed=0):
    rng = np.random.default_rng(seed + 200)
    shapes = (6, 3), (6,), (4, 3), (4,)
    problem = Ridge(*(jnp.asarray(rng.normal(size=s), dtype) for s in shapes))
    return problem, jnp.asarray([-0.3, 0.2, 0.5], dtype), jnp.zeros(3, dtype)


@eqx.filter_jit
def ridge_solution(problem, x):
    """(A^T A + diag e^x)^-1 A^T b."""
    A, b = problem.features, problem.targets
    return jnp.linalg.solve(A.T @ A + jnp.diag(jnp.exp(x)), A.T @ b)


def ridge_value(problem, x):
    """x -> F(x, y(x)), to be differentiated by JAX."""
    return problem.outer(x, ridge_solution(problem, x))


ridge_gradient = eqx.filter_jit(lambda p, x: jax.value_and_grad(ridge_value, 1)(p, x))
ridge_hessian = eqx.filter_jit(lambda p, x: jax.hessian(ridge_value, 1)(p, x))


#
# Softmax regression with log-penalties: strongly convex, not quadratic, and over
# pytrees whose leaves are a scalar, vectors and a matrix.
#


class Softmax(blx.AbstractBilevelProblem):
    features: Array
    labels: Array
    outer_features: Array
    outer_labels: Array

    def outer(self, x, y):
        loss = _cross_entropy(y, self.outer_features, self.outer_labels)
        return loss + 0.05 * jnp.sum(x["penalty"] ** 2) * x["intercept_penalty"]

    def inner(self, x, y):
        loss = _cross_entropy(y, self.features, self.labels)
        squares = jnp.sum(y["weights"] ** 2, axis=0)
        penalty = 0.5 * jnp.sum(jnp.exp(x["penalty"]) * squares)
        intercept = jnp.exp(x["intercept_penalty"]) * jnp.sum(y["intercept"] ** 2)
        return loss + penalty + 0.5 * intercept


def _cross_entropy(y, features, labels):
    logits = features @ y["weights"] + y["intercept"][None, :]
    picked = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - picked)


def make_softmax(dtype=jnp.float64, seed=0):
    rng = np.random.default_rng(seed + 300)
    arrays = []
    for num in (8, 6):
        arrays.append(jnp.asarray(rng.normal(size=(num, 2)), dtype))
        # Labels are integers: a problem may have leaves that are not differentiable.
        arrays.append(jnp.asarray(rng.integers(0, 3, size=num)))
    x = {
        "penalty": jnp.asarray([-1.0, -1.5, -0.5], dtype),
        "intercept_penalty": jnp.asarray(-1.2, dtype),
    }
    y = {"weights": jnp.zeros((2, 3), dtype), "intercept": jnp.zeros(3, dtype)}
    return Softmax(*arrays), x, y


#
# Nonlinear least squares
#


class CurvedLeastSquares(blx.AbstractLeastSquaresProblem):
    """A network of one layer. The penalty makes the Jacobian of the residual have
    independent columns; without it, the solutions are not unique."""

    features: Array
    penalised: bool = eqx.field(static=True, default=True)

    def outer(self, x, y):
        return jnp.sum(jnp.sin(y["weights"])) + jnp.sum(y["bias"] * x["scale"])

    def inner_residual(self, x, y):
        hidden = jnp.tanh(self.features @ y["weights"] + y["bias"])
        misfit = hidden * x["scale"] - x["targets"]
        if not self.penalised:
            return {"misfit": misfit}
        return {
            "misfit": misfit,
            "penalty": (0.7 * y["weights"], 0.5 * y["bias"]),
        }


def make_curved(dtype=jnp.float64, seed=0, penalised=True, num_weights=4):
    rng = np.random.default_rng(seed + 400)
    features = rng.normal(size=(3, num_weights))
    weights, bias, scale = 0.3 * rng.normal(size=num_weights), 0.2, 1.3
    # Near enough for H to be definite, and far enough for its curved part to matter.
    targets = scale * np.tanh(features @ weights + bias) + 0.1 * rng.normal(size=3)
    problem = CurvedLeastSquares(jnp.asarray(features, dtype), penalised)
    x = {"scale": jnp.asarray(scale, dtype), "targets": jnp.asarray(targets, dtype)}
    y = {"weights": jnp.asarray(weights, dtype), "bias": jnp.asarray(bias, dtype)}
    return problem, x, y


#
# One row whose features move with x: T6, T7 and T12.
#


def moving_features(x):
    return jnp.stack([jnp.cos(x), jnp.sin(2 * x), 1 + 0.5 * x])


class MovingFeature(blx.AbstractLeastSquaresProblem):
    target: Array

    def outer(self, x, y):
        return 0.5 * jnp.sum((y - 1) ** 2)

    def inner_residual(self, x, y):
        return jnp.sum(moving_features(x) * y) - self.target


def make_moving(dtype=jnp.float64):
    problem = MovingFeature(jnp.asarray(1.5, dtype))
    return problem, jnp.asarray(0.4, dtype), jnp.asarray([0.3, -0.2, 0.1], dtype)


#
# Toy A: S(w) is a line, and every solution concept has an answer of its own.
#


def _toy_outer(w, y):
    return 0.5 * (w - y[1]) ** 2 + 0.5 * (y[0] - 1) ** 2


def _toy_inner(w, y):
    return 0.5 * y[0] ** 2 - w * y[0]


def toy_a() -> blx.BilevelProblem:
    """Outer variable w; inner variables (x0, x1), of which f sees only the first."""
    return blx.BilevelProblem(_toy_outer, _toy_inner)


#
# Counting
#


class Counter:
    """How often something ran, or was traced."""

    def __init__(self):
        self.count = 0

    def tick(self, *_):
        self.count += 1

    def when_run(self):
        """To be called inside a traced function: counts its executions."""
        jax.debug.callback(self.tick)

    def read(self) -> int:
        """The count since the last reading."""
        jax.effects_barrier()
        count, self.count = self.count, 0
        return count


class CountingOperator(lx.AbstractLinearOperator):
    """A symmetric matrix that counts the products taken with it."""

    matrix: Array
    counter: Counter = eqx.field(static=True)

    def mv(self, vector):
        self.counter.when_run()
        return self.matrix @ vector

    def as_matrix(self):
        return self.matrix

    def transpose(self):
        return self

    def in_structure(self):
        return jax.ShapeDtypeStruct(self.matrix.shape[:1], self.matrix.dtype)

    def out_structure(self):
        return self.in_structure()


@lx.linearise.register(CountingOperator)
def _(operator):
    return operator


@lx.conj.register(CountingOperator)
def _(operator):
    return operator


@lx.is_symmetric.register(CountingOperator)
def _(operator):
    return True


for _query in (
    lx.is_diagonal,
    lx.is_tridiagonal,
    lx.is_lower_triangular,
    lx.is_upper_triangular,
    lx.is_positive_semidefinite,
    lx.is_negative_semidefinite,
    lx.has_unit_diagonal,
):
    _query.register(CountingOperator)(lambda operator: False)


class FunctionOfValue(eqx.Module):
    """`scale * fn`: a function with a value in it that is data, not program."""

    fn: Any
    scale: Array

    def __call__(self, *args):
        return self.scale * self.fn(*args)
