"""The value-function method: optimistic, with gradients alone."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PRNGKeyArray, PyTree, Scalar, ScalarLike

from .._arguments import (
    as_count,
    as_pytree,
    as_rate,
    check_count,
    check_positive,
    check_type,
)
from .._derivatives.first import inner_gradient, outer_gradients
from .._equilibrium.optimistic import Optimistic
from .._failure.results import finite_or_not
from .._linalg.power_iteration import largest_curvature
from .._optimiser.step import optimiser_step
from .._problem.batches import Batches, check_batch_argument
from .._problem.constraints import set_x
from .._tree import nonzero, tree_axpy, tree_dot, tree_norm, tree_sub
from .base import AbstractPipeline
from .noise import after_step, no_noise, Noise, with_noise


class ValueFunctionState(eqx.Module):
    """All that a run carries from one step to the next."""

    x: PyTree[Array]
    y: PyTree[Array]
    direction: tuple[PyTree[Array], PyTree[Array]]
    value: Scalar
    # One over the largest curvature of F at the start.
    rate: Scalar
    outer_state: Any
    key: PRNGKeyArray
    num_steps: Int[Array, ""]
    noise: Noise | None


# Of the square of the gradient of q, relative to that of F, on a batch: there q is
# not small because y is right, but because the samples happen to say so.
_FLOOR = 1e-8


class ValueFunctionDescent(AbstractPipeline[ValueFunctionState]):
    r"""Aims at [`bilevel_eqx.Optimistic`][] by descending F in x and y together, under
    the constraint that y is an inner minimum, written with the value function:

    $$q(x, y) = f(x, y) - \min_{y'} f(x, y') \le 0, \qquad
    d = \nabla F + \max\Bigl(\eta - \frac{\langle \nabla F, \nabla q \rangle}
    {\|\nabla q\|^2}, 0\Bigr) \nabla q.$$

    The minimum is had by a few descent steps from y, held fixed in the gradient of q.
    Neither a linear solve nor a derivative of a derivative is in it, except for a
    product with $H$ that sets the size of each inner step.

    q shrinks as fast as $\eta$ and the rate allow, and the answer is only as good as
    the last rate: a schedule that decays brings it down.

    With batches, each step has one of each level, fresh, for all of its terms: the
    descent to the minimum, both gradients of q, and that of F. There
    $\|\nabla q\|^2$ counts as at least $10^{-8} \|\nabla F\|^2$.

    ??? cite "Reference"

        Liu, Ye, Wright, Stone and Liu, *BOME! Bilevel optimization made easy: a simple
        first-order approach*, NeurIPS 2022.
    """

    aims_at: ClassVar = (Optimistic,)
    admits_batches: ClassVar[bool] = True
    optimiser: optax.GradientTransformation | None
    num_inner_steps: int
    eta: ScalarLike
    inner_batch: int | None
    outer_batch: int | None

    def __init__(
        self,
        optimiser: optax.GradientTransformation | None = None,
        num_inner_steps: int = 10,
        eta: ScalarLike = 0.5,
        *,
        inner_batch: int | None = None,
        outer_batch: int | None = None,
    ):
        r"""**Arguments:**

        - `optimiser`: an optax optimiser; it moves x and y together. By default
            gradient descent, at a rate of $L^{-1} / \sqrt{1 + k / 100}$ in step k, with L
            the largest curvature of F, estimated at the start. Adaptive optimisers
            change the direction, and lose the constraint.
        - `num_inner_steps`: the number of descent steps to $\min f$.
        - `eta`: $\eta$: how much of $\nabla q$ is descended in each step.
        - `inner_batch`, `outer_batch`: the numbers of samples in a batch, for an
            [`bilevel_eqx.AbstractFiniteSumProblem`][]; `None`, the default, takes all
            data. Keyword only arguments.
        """
        self.optimiser = None if optimiser is None else as_pytree(optimiser)
        self.num_inner_steps = as_count(num_inner_steps)
        self.eta = as_rate(eta)
        self.inner_batch = as_count(inner_batch)
        self.outer_batch = as_count(outer_batch)

    def __check_init__(self):
        owner = "ValueFunctionDescent"
        kind = optax.GradientTransformation | None
        check_type(self.optimiser, kind, "optimiser", owner)
        check_count(self.num_inner_steps, "num_inner_steps", owner)
        check_positive(self.eta, "eta", owner)
        for name in ("inner_batch", "outer_batch"):
            check_batch_argument(getattr(self, name), name, owner)

    @property
    def _batches(self) -> Batches:
        return Batches(self.inner_batch, self.outer_batch)

    def init(self, problem, equilibrium, x, y, key):
        del equilibrium
        self._batches.check(problem, "ValueFunctionDescent")
        count = jnp.array(0)
        value, direction = self._direction(self._draw(problem, key, count), x, y)
        rate = jnp.ones_like(value)
        if self.optimiser is None:
            curvature = largest_curvature(lambda v: problem.outer(*v), (x, y))
            rate = 1 / nonzero(curvature)
        outer_state = self._optimiser(rate).init((x, y))
        noise = no_noise(problem, self._batches, x)
        return ValueFunctionState(
            x, y, direction, value, rate, outer_state, key, count, noise
        )

    def step(self, problem, equilibrium, state):
        x_set, key, count = set_x(problem), state.key, state.num_steps
        on = self._draw(problem, key, count)
        (x, y), outer_state = optimiser_step(
            self._optimiser(state.rate),
            (state.x, state.y),
            state.outer_state,
            value=state.value,
            gradient=state.direction,
            value_fn=lambda variables: on.outer(*variables),
            project=lambda xy: (x_set.project(xy[0]), xy[1]),
        )
        count = count + 1
        on = self._draw(problem, key, count)
        value, direction = self._direction(on, x, y)
        metrics = {
            "value": value,
            "outer_residual": tree_norm(
                (x_set.remaining_step(direction[0], x), direction[1])
            ),
            "inner_residual": tree_norm(inner_gradient(on, x, y)),
            "result": finite_or_not((x, y, value)),
        }
        rate = state.rate
        noise = after_step(state.noise, direction[0])
        state = ValueFunctionState(
            x, y, direction, value, rate, outer_state, key, count, noise
        )
        return state, with_noise(metrics, noise)

    def _draw(self, problem, key, count):
        """The batches of a step, and of all of its terms."""
        return self._batches(problem, key, count, count)

    def _optimiser(self, rate):
        if self.optimiser is not None:
            return self.optimiser
        return optax.sgd(
            lambda count: rate / jnp.sqrt(1 + count / 100).astype(rate.dtype)
        )

    def _direction(self, problem, x, y):
        value, *outer = outer_gradients(problem, x, y)
        best = steepest_descent(problem, x, y, self.num_inner_steps)
        at_y, at_best = (jax.grad(problem.inner)(x, point) for point in (y, best))
        gap = [tree_sub(at_y, at_best), inner_gradient(problem, x, y)]
        square = tree_dot(gap, gap)
        if self.inner_batch is not None or self.outer_batch is not None:
            square = jnp.maximum(square, _FLOOR * tree_dot(outer, outer))
        eta = jnp.asarray(self.eta, square.dtype)
        pressure = eta - tree_dot(outer, gap) / nonzero(square)
        pressure = jnp.where(square == 0, 0, jnp.maximum(pressure, 0))
        return value, tuple(tree_axpy(pressure, gap, outer))


def steepest_descent(problem, x, y: PyTree[Array], num_steps: int) -> PyTree[Array]:
    r"""Steps $y - t \nabla_y f$, each as long as the curvature along it says."""

    def step(y, _):
        gradient, product = jax.linearize(lambda y: inner_gradient(problem, x, y), y)
        square = tree_dot(gradient, gradient)
        curvature = jnp.abs(tree_dot(gradient, product(gradient)))
        safe = nonzero(curvature)
        t = jnp.where(curvature == 0, 0, square / safe)
        return tree_axpy(-t, gradient, y), None

    return jax.lax.scan(step, y, None, length=num_steps)[0]
