"""Default pipelines on data sets that everybody has, in single precision."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

import bilevel_eqx as blx
from bilevel_eqx import tasks


class Penalised(blx.AbstractBilevelProblem):
    """A linear model, with the logarithm of one penalty a feature or a class as x."""

    inputs: Array
    labels: Array
    validation_inputs: Array
    validation_labels: Array
    loss: str = eqx.field(static=True)
    bound: float = eqx.field(static=True)

    def project_x(self, x):
        return jnp.clip(x, -self.bound, self.bound)

    def _loss(self, y, inputs, labels):
        z = inputs @ y
        if self.loss == "ridge":
            return jnp.mean((z - labels) ** 2) / 2
        if self.loss == "logistic":
            return jnp.mean(jnp.logaddexp(0, z) - labels * z)
        return jnp.mean(jax.nn.logsumexp(z, 1) - jnp.sum(labels * z, 1))

    def outer(self, x, y):
        return self._loss(y, self.validation_inputs, self.validation_labels)

    def inner(self, x, y):
        penalty = jnp.sum(jnp.exp(x) * y**2) / (2 * len(self.labels))
        return self._loss(y, self.inputs, self.labels) + penalty


def _problem(name, dtype, each, bound):
    datasets = pytest.importorskip("sklearn.datasets")
    data = getattr(datasets, f"load_{name}")()
    inputs, labels = data.data.astype(float), data.target
    if name == "digits":
        # Three classes: ten would be many minutes.
        inputs, labels = inputs[labels < 3], labels[labels < 3]
    order = np.random.default_rng(0).permutation(len(labels))
    inputs, labels = inputs[order], labels[order]
    half = len(labels) // 2
    scale = inputs[:half].std(0)
    inputs = (inputs - inputs[:half].mean(0)) / np.where(scale == 0, 1, scale)
    inputs = np.column_stack([inputs, np.ones(len(labels))])
    losses = {"diabetes": "ridge", "breast_cancer": "logistic"}
    loss = losses.get(name, "softmax")
    if loss == "ridge":
        labels = (labels - labels[:half].mean()) / labels[:half].std()
    num_features, num_classes = inputs.shape[1], int(labels.max() + 1)
    if loss == "softmax":
        labels = np.eye(num_classes)[labels]
    halves = inputs[:half], labels[:half], inputs[half:], labels[half:]
    a, b, c, d = (jnp.asarray(part, dtype) for part in halves)
    problem = Penalised(a, b, c, d, loss, bound)
    if loss != "softmax":
        x = jnp.zeros(num_features if each == "feature" else 1, dtype)
        return problem, x, jnp.zeros(num_features, dtype)
    x = jnp.zeros((num_features, 1) if each == "feature" else (1, num_classes), dtype)
    return problem, x, jnp.zeros((num_features, num_classes), dtype)


# In single precision rounding of the cross-entropy (terms of 20 that cancel to 1e-3)
# hides the last decrease from the line search of `Projection`, and the minimum is .1 %
# off. A spectral projected gradient cannot come back from such a point.
_ends_too_early = pytest.mark.xfail(raises=eqx.EquinoxRuntimeError, strict=False)


_STACKELBERG, _COLD = blx.Stackelberg(), blx.ColdStart()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, each, equilibrium",
    [
        (name, each, _STACKELBERG)
        for name in ("breast_cancer", "wine", "diabetes")
        for each in ("class", "feature")
    ]
    + [("wine", "class", _COLD), ("diabetes", "feature", _COLD)]
    + [pytest.param("digits", "class", _STACKELBERG, marks=_ends_too_early)],
)
def test_penalties(name, each, equilibrium):
    # Bounded, since one penalty a feature may run off to either side.
    bound = {"class": 5.0, "feature": 3.0}[each]
    problem, x, y = _problem(name, jnp.float32, each, bound)
    found = blx.solve(problem, equilibrium, x, y, num_steps=100)
    double, x, y = _problem(name, jnp.float64, each, bound)
    rng, best = np.random.default_rng(0), np.inf
    for i in range(1 if name == "digits" else 3):
        start = x + (i > 0) * 0.1 * jnp.asarray(rng.normal(size=x.shape))
        longer = blx.solve(double, _STACKELBERG, start, y, num_steps=300, certify=False)
        best = min(best, float(longer.value))
    assert float(found.value) <= 1.01 * best
    # It says where it is: its hypergradient in double precision is as large.
    outer = float(found.certificate.residuals["outer"])
    x, y = found.x.astype(jnp.float64), found.y.astype(jnp.float64)
    again = blx.certify(double, _STACKELBERG, x, y).residuals["outer"]
    assert abs(outer - float(again)) < 1e-3 + 0.3 * outer


@pytest.mark.slow
@pytest.mark.parametrize("equilibrium", (blx.WarmStart(), blx.ColdStart()), ids=str)
def test_anti_distillation(equilibrium):
    problem, x, y = jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32) if eqx.is_array(leaf) else leaf,
        tasks.anti_distillation(),
    )
    found = blx.solve(problem, equilibrium, x, y, num_steps=100)
    assert found.value < 1e-10
    assert found.certificate.largest < 1e-5
