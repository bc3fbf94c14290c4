"""The value-function method: optimistic, with gradients alone."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree, Scalar, ScalarLike

from .._arguments import as_pytree, as_rate, check_count, check_positive, check_type
from .._derivatives.first import inner_gradient, outer_gradients
from .._equilibrium.optimistic import Optimistic
from .._failure.results import finite_or_not
from .._linalg.power_iteration import largest_curvature
from .._optimiser.step import optimiser_step
from .._problem.constraints import set_x
from .._tree import nonzero, tree_axpy, tree_dot, tree_norm, tree_sub
from .base import AbstractPipeline


class ValueFunctionState(eqx.Module):
    """All that a run carries from one step to the next."""

    x: PyTree[Array]
    y: PyTree[Array]
    direction: tuple[PyTree[Array], PyTree[Array]]
    value: Scalar
    # One over the largest curvature of F at the start.
    rate: Scalar
    outer_state: Any


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

    ??? cite "Reference"

        Liu, Ye, Wright, Stone and Liu, *BOME! Bilevel optimization made easy: a simple
        first-order approach*, NeurIPS 2022.
    """

    aims_at: ClassVar = (Optimistic,)
    optimiser: optax.GradientTransformation | None
    num_inner_steps: int
    eta: ScalarLike

    def __init__(
        self,
        optimiser: optax.GradientTransformation | None = None,
        num_inner_steps: int = 10,
        eta: ScalarLike = 0.5,
    ):
        r"""**Arguments:**

        - `optimiser`: an optax optimiser; it moves x and y together. By default
            gradient descent, at a rate of $L^{-1} / \sqrt{1 + k / 100}$ in step k, with L
            the largest curvature of F, estimated at the start. Adaptive optimisers
            change the direction, and lose the constraint.
        - `num_inner_steps`: the number of descent steps to $\min f$.
        - `eta`: $\eta$: how much of $\nabla q$ is descended in each step.
        """
        self.optimiser = None if optimiser is None else as_pytree(optimiser)
        self.num_inner_steps = num_inner_steps
        self.eta = as_rate(eta)

    def __check_init__(self):
        owner = "ValueFunctionDescent"
        kind = optax.GradientTransformation | None
        check_type(self.optimiser, kind, "optimiser", owner)
        check_count(self.num_inner_steps, "num_inner_steps", owner)
        check_positive(self.eta, "eta", owner)

    def init(self, problem, equilibrium, x, y, key):
        del equilibrium, key
        value, direction = self._direction(problem, x, y)
        curvature = largest_curvature(lambda v: problem.outer(*v), (x, y))
        rate = 1 / nonzero(curvature)
        outer_state = self._optimiser(rate).init((x, y))
        return ValueFunctionState(x, y, direction, value, rate, outer_state)

    def step(self, problem, equilibrium, state):
        x_set = set_x(problem)
        (x, y), outer_state = optimiser_step(
            self._optimiser(state.rate),
            (state.x, state.y),
            state.outer_state,
            value=state.value,
            gradient=state.direction,
            value_fn=lambda variables: problem.outer(*variables),
            project=lambda xy: (x_set.project(xy[0]), xy[1]),
        )
        value, direction = self._direction(problem, x, y)
        metrics = {
            "value": value,
            "outer_residual": tree_norm(
                (x_set.remaining_step(direction[0], x), direction[1])
            ),
            "inner_residual": tree_norm(inner_gradient(problem, x, y)),
            "result": finite_or_not((x, y, value)),
        }
        rate = state.rate
        state = ValueFunctionState(x, y, direction, value, rate, outer_state)
        return state, metrics

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
