"""The problems that more than one benchmark is about."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, Int

import bilevel_eqx as blx


class PenalisedRegression(blx.AbstractBilevelProblem[Array, Array]):
    """Logistic regression whose outer variables are a log-penalty for each feature."""

    features: Float[Array, "n d"]
    signs: Float[Array, " n"]
    validation_features: Float[Array, "v d"]
    validation_signs: Float[Array, " v"]

    def outer(self, x, y):
        margins = self.validation_signs * (self.validation_features @ y)
        return jnp.mean(jax.nn.softplus(-margins))

    def inner(self, x, y):
        margins = self.signs * (self.features @ y)
        return jnp.mean(jax.nn.softplus(-margins)) + 0.5 * jnp.sum(jnp.exp(x) * y**2)


def penalised_regression(key, num_samples, num_features):
    """The problem, its outer variables, and the inner solution for them."""
    keys = jr.split(key, 5)
    scales = jnp.logspace(0, -1, num_features)
    truth = jr.normal(keys[0], (num_features,))

    def draw(feature_key, noise_key, n):
        features = scales * jr.normal(feature_key, (n, num_features))
        noise = jr.logistic(noise_key, (n,))
        return features, jnp.where(features @ truth + noise > 0, 1.0, -1.0)

    train = draw(keys[1], keys[2], num_samples)
    validation = draw(keys[3], keys[4], num_samples // 4)
    problem = PenalisedRegression(*train, *validation)
    x = jnp.full(num_features, jnp.log(1e-3))

    @jax.jit
    def newton_step(problem, y):
        gradient = jax.grad(problem.inner, argnums=1)(x, y)
        slopes = jax.nn.sigmoid(problem.features @ y)
        weights = slopes * (1 - slopes) / num_samples
        hessian = (problem.features.T * weights) @ problem.features
        return y - jnp.linalg.solve(hessian + jnp.diag(jnp.exp(x)), gradient)

    y = jnp.zeros(num_features)
    for _ in range(10):
        y = newton_step(problem, y)
    return problem, x, y


def _logistic(x, y, batch, key):
    features, signs = batch
    return jax.nn.softplus(-signs * (features @ y))


def _penalty(x, y):
    return 0.5 * jnp.sum(jnp.exp(x) * y**2)


def in_blocks(problem: PenalisedRegression) -> blx.FiniteSumProblem:
    """The same problem, as means over data that are read in blocks."""
    validation = problem.validation_features, problem.validation_signs
    train = problem.features, problem.signs
    return blx.FiniteSumProblem(
        _logistic,
        _logistic,
        validation,
        train,
        inner_penalty=_penalty,
        block_size="auto",
    )


class PenalisedNetwork(blx.AbstractBilevelProblem):
    """A network whose outer variables are a log-penalty for each of its weights.

    Both x and y are lists of a matrix and a bias for each layer.
    """

    inputs: Float[Array, "n d"]
    labels: Int[Array, " n"]
    validation_inputs: Float[Array, "v d"]
    validation_labels: Int[Array, " v"]
    activation: Callable[[Array], Array] = eqx.field(static=True, default=jax.nn.relu)

    def outer(self, x, y):
        at = self.validation_inputs, self.validation_labels
        return _cross_entropy(y, *at, self.activation)

    def inner(self, x, y):
        squares = jax.tree.map(lambda u, v: jnp.sum(jnp.exp(u) * v**2), x, y)
        penalty = 0.5 * sum(jax.tree.leaves(squares))
        at = self.inputs, self.labels
        return _cross_entropy(y, *at, self.activation) + penalty


def _cross_entropy(weights, inputs, labels, activation):
    activations = inputs
    for matrix, bias in weights[:-1]:
        activations = activation(activations @ matrix + bias)
    matrix, bias = weights[-1]
    log_probabilities = jax.nn.log_softmax(activations @ matrix + bias)
    return -jnp.mean(jnp.take_along_axis(log_probabilities, labels[:, None], axis=1))


def penalised_network(key, batch_size, sizes, *, num_steps, activation=jax.nn.relu):
    """The problem, its outer variables, and weights after some steps of training."""
    keys = jr.split(key, 3)
    truth = jr.normal(keys[0], (sizes[0], sizes[-1]))

    def draw(key):
        inputs = jr.normal(key, (batch_size, sizes[0]))
        return inputs, jnp.argmax(inputs @ truth, axis=1)

    problem = PenalisedNetwork(*draw(keys[1]), *draw(keys[2]), activation)
    shapes = list(zip(sizes, sizes[1:]))
    y = [
        (jr.normal(k, (m, n)) * (2 / m) ** 0.5, jnp.zeros(n))
        for k, (m, n) in zip(jr.split(keys[0], len(shapes)), shapes)
    ]
    x = jax.tree.map(lambda u: jnp.full_like(u, jnp.log(1e-2)), y)

    @jax.jit
    def train(problem, y):
        optimiser = optax.adam(1e-3)

        def step(carry, _):
            y, state = carry
            gradient = jax.grad(problem.inner, argnums=1)(x, y)
            updates, state = optimiser.update(gradient, state)
            return (optax.apply_updates(y, updates), state), None

        carry = y, optimiser.init(y)
        return jax.lax.scan(step, carry, None, length=num_steps)[0][0]

    return problem, x, train(problem, y) if num_steps > 0 else y
