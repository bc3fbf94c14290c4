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


def _problem(name, dtype, each, bound, num_classes=None):
    datasets = pytest.importorskip("sklearn.datasets")
    data = getattr(datasets, f"load_{name}")()
    inputs, labels = data.data.astype(float), data.target
    if num_classes is not None:
        inputs, labels = inputs[labels < num_classes], labels[labels < num_classes]
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


_STACKELBERG, _COLD = blx.Stackelberg(), blx.ColdStart()


# The least F of ten runs of SciPy's L-BFGS-B in double precision, to convergence, on a
# program of its own in NumPy: the inner minimum by Newton's method with Cholesky factors,
# to 1e-12, and the exact hypergradient. Ten starts: 0, three normal ones of deviation .1,
# and six of deviation 1. For one penalty a class all ten end in the same point.
_BEST = {
    ("diabetes", "class"): 0.25606011,
    ("diabetes", "feature"): 0.25591901,
    ("wine", "class"): 0.06011354,
    ("wine", "feature"): 0.02637574,
    ("breast_cancer", "class"): 0.07019712,
    ("breast_cancer", "feature"): 0.04800040,
    ("digits", "class"): 0.00216010,
    # Here F has several local minima, down to .00106 from other starts. This is the run
    # that starts where ours does.
    ("digits", "feature"): 0.00108983,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, each, equilibrium",
    [(*case, _STACKELBERG) for case in _BEST]
    # Of a quadratic inner objective: `test_anti_distillation`.
    + [("wine", "class", _COLD)],
)
def test_penalties(name, each, equilibrium):
    # Bounded, since one penalty a feature may run off to either side. Three classes of
    # digits: ten would be many minutes.
    bound = {"class": 5.0, "feature": 3.0}[each]
    num_classes = 3 if name == "digits" else None
    problem, x, y = _problem(name, jnp.float32, each, bound, num_classes)
    # Where the steps take longest, it is there after 15.
    num_steps = 30 if (name, each) == ("digits", "class") else 100
    found = blx.solve(problem, equilibrium, x, y, num_steps=num_steps)
    assert float(found.value) <= 1.01 * _BEST[name, each]
    # It says where it is: its hypergradient in double precision is as large.
    outer = float(found.certificate.residuals["outer"])
    double, *_ = _problem(name, jnp.float64, each, bound, num_classes)
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
