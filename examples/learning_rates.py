"""Four learning rates, one for each step, are learned through those steps.

python examples/learning_rates.py --output outputs
"""

import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import optax
from _gallery import main
from sklearn.datasets import load_diabetes

import bilevel_eqx as blx
from bilevel_eqx import plot


NUM_STEPS = 4


class Training(blx.AbstractBilevelProblem):
    """Linear regression from several starts, along the axis 0 of y. The targets are
    those that the features explain, so that the least loss is zero."""

    features: jax.Array
    targets: jax.Array

    def losses(self, y):  # one for each start
        return 0.5 * jnp.mean((y @ self.features.T - self.targets) ** 2, axis=1)

    def outer(self, x, y):
        return jnp.mean(self.losses(y))

    def inner(self, x, y):
        return jnp.sum(self.losses(y))


def with_rates(x):  # x are the logarithms of the rates
    return optax.sgd(lambda count: jnp.exp(x)[count])


def load():
    features, targets = map(np.asarray, load_diabetes(return_X_y=True, scaled=False))
    features = (features - features.mean(0)) / features.std(0)
    best = np.linalg.lstsq(features, (targets - targets.mean()) / targets.std())[0]
    return Training(*(jnp.asarray(u, "float32") for u in (features, features @ best)))


def best_polynomial(problem, y0):
    """The mean loss after K steps, with the best rates. In the eigenbasis of H the steps
    multiply the error by p(lambda) = prod_k (1 - rate_k lambda), so that the loss is
    sum_i weight_i p(lambda_i)^2, and the best p of degree K is a linear least squares."""
    A = np.asarray(problem.features, np.float64)
    curvatures, basis = np.linalg.eigh(A.T @ A / len(A))
    errors = np.asarray(y0) @ basis - np.linalg.lstsq(A @ basis, problem.targets)[0]
    scale = np.sqrt(0.5 * curvatures * np.mean(errors**2, axis=0))
    powers = (curvatures / curvatures.max())[:, None] ** np.arange(NUM_STEPS + 1)
    powers = scale[:, None] * powers
    rest = np.linalg.lstsq(powers[:, 1:], -powers[:, 0])[0]
    return np.sum((powers @ np.append(1, rest)) ** 2)


def run(quick):
    problem = load()
    y0, fresh = jr.normal(jr.key(0), (20, 10)), jr.normal(jr.key(1), (1000, 10))

    training = blx.Unrolled(with_rates, NUM_STEPS)
    solution = blx.solve(
        problem,
        blx.ColdStart(),
        jnp.log(jnp.geomspace(0.2, 5.0, NUM_STEPS)),
        y0,
        pipeline=blx.GradientPipeline(training, blx.pipelines.LBFGS()),
        num_steps=60 if quick else 200,
        certify=False,
    )

    @jax.jit
    def after(x):  # the losses from starts that nothing has seen, after each step
        def one(y, rate):
            slope = jax.grad(problem.inner, argnums=1)(x, y)
            y = y - jnp.exp(rate) * slope
            return y, problem.outer(x, y)

        return jax.lax.scan(one, fresh, x)[1]

    constants = jnp.log(jnp.linspace(0.1, 1.0, 91))[:, None] + jnp.zeros(NUM_STEPS)
    constant = constants[jnp.nanargmin(jax.vmap(after)(constants)[:, -1])]
    rates = {"constant": constant, "learned": solution.x}
    courses = {name: after(x) for name, x in rates.items()}
    numbers = {f"loss, {name}": course[-1] for name, course in courses.items()}
    numbers |= {
        "in training": solution.value,
        "in closed form": best_polynomial(problem, y0),
    }
    pictures = {"rates": [*rates.values()], "courses": [*courses.values()]}
    return numbers | {"names": list(rates)} | pictures


def check(results):
    assert results["in training"] < 1.001 * results["in closed form"]
    assert results["loss, learned"] < 0.5 * results["loss, constant"]


def draw(results):
    figure, axes = plt.subplots(1, 2, figsize=(6, 2.2), layout="constrained")
    steps = range(1, NUM_STEPS + 1)
    rows = zip(*(results[k] for k in ("names", "rates", "courses")))
    for (name, x, losses), colour in zip(rows, plot.CLASS_COLOURS[1:]):
        axes[0].plot(steps, jnp.exp(x), "o-", color=colour, label=name)
        axes[1].plot(steps, losses, "o-", color=colour)
    axes[0].set(xlabel="step", ylabel="learning rate", xticks=steps)
    axes[1].set(xlabel="step", ylabel="loss, of fresh starts", yscale="log", xticks=steps)
    axes[0].legend()
    return figure


if __name__ == "__main__":
    main(__file__, __doc__, run, check, draw)
