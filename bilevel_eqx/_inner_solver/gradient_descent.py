"""Gradient descent with a fixed step size, for a fixed number of steps."""

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, Int, PyTree, Scalar, ScalarLike

from .._arguments import as_rate, check_count, check_positive
from .._tree import tree_axpy


class _DescentState(eqx.Module):
    num_steps: Int[Array, ""]
    # At the start, and before the last step.
    first_value: Scalar
    value: Scalar


class GradientDescent(optx.AbstractMinimiser[Any, Any, _DescentState]):
    r"""$y \leftarrow y - \alpha \nabla_y f(x, y)$, a fixed number of times.

    On a quadratic it converges to the projection of its start $y_0$ on the set of minima,
    $\Pi(y_0, S(x))$. This is the implicit bias of a cold start.

    If the objective is larger at the end than at the start, the result is
    `optimistix.RESULTS.nonlinear_divergence`.

    If the problem confines y to a set, each step is projected on it (the option
    `projection` of `optimistix.minimise`).
    """

    step_size: ScalarLike = eqx.field(converter=as_rate)
    num_steps: int
    # Every optimistix solver has these three. This one does not use them.
    rtol: float
    atol: float
    norm: Callable[[PyTree], Scalar]

    projects: ClassVar[bool] = True
    counts_its_steps: ClassVar[bool] = True

    def __init__(self, step_size: ScalarLike, num_steps: int):
        r"""**Arguments:**

        - `step_size`: $\alpha$, positive.
        - `num_steps`: the number of steps, at least one. The response that uses this
            solver checks whether it has converged.
        """
        self.step_size = step_size
        self.num_steps = num_steps
        self.rtol = 0.0
        self.atol = 0.0
        self.norm = optx.two_norm

    def __check_init__(self):
        check_positive(self.step_size, "step_size", "GradientDescent")
        check_count(self.num_steps, "num_steps", "GradientDescent")

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        zero = jnp.zeros((), f_struct.dtype)
        return _DescentState(jnp.array(0), zero, zero)

    def step(self, fn, y, args, options, state, tags):
        (value, aux), gradient = jax.value_and_grad(fn, has_aux=True)(y, args)
        y = tree_axpy(-jnp.asarray(self.step_size), gradient, y)
        projection = options.get("projection")
        y = y if projection is None else projection(y)
        first_value = jnp.where(state.num_steps == 0, value, state.first_value)
        return y, _DescentState(state.num_steps + 1, first_value, value), aux

    def terminate(self, fn, y, args, options, state, tags):
        done = state.num_steps >= self.num_steps
        # Not of the order of rounding: at a minimum that decides which value is larger.
        scale = jnp.abs(state.first_value) + jnp.abs(state.value)
        slack = jnp.sqrt(jnp.finfo(scale.dtype).eps) * scale
        diverged = done & (state.value - state.first_value > slack)
        return done, optx.RESULTS.where(
            diverged, optx.RESULTS.nonlinear_divergence, optx.RESULTS.successful
        )

    def postprocess(self, fn, y, aux, args, options, state, tags, result):
        return y, aux, {}
