"""Accelerated projected gradient descent, for inner problems with constraints."""

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, Bool, Int, PyTree, Scalar

from .._arguments import check_count
from .._linalg.power_iteration import largest_curvature
from .._tree import (
    nonzero,
    tree_axpy,
    tree_dot,
    tree_dtype,
    tree_norm,
    tree_sub,
    tree_where,
    where,
)


# How often a step is doubled: enough for units that differ by 1e19. If f is not bounded
# below, y runs off, but not to infinity.
_MOST_DOUBLED = 64


class _ProjectedState(eqx.Module):
    # Where the next gradient is taken: y plus its momentum.
    ahead: PyTree[Array]
    momentum: Scalar
    step_size: Scalar
    # Whether f has shown no curvature yet, as where it is linear.
    flat: Bool[Array, ""]
    num_steps: Int[Array, ""]
    terminate: Bool[Array, ""]


class ProjectedGradient(optx.AbstractMinimiser[Any, Any, _ProjectedState]):
    r"""Accelerated projected gradient descent, $y \leftarrow \Pi(z - t \nabla_y f(x, z))$
    where z is y plus its momentum.

    It solves inner problems with constraints to convergence. The step size starts at one
    over an estimate of the largest curvature, and is halved if the curvature of f is
    larger. Where f has none, as if it is linear, it is doubled with each step until one
    has to be taken back. The momentum is reset if it leads uphill.

    It supports the option `projection` of `optimistix.minimise`, a function of y. The
    responses of this package pass the projection of the problem. Without this option
    there is no constraint.

    ??? cite "References"

        Beck and Teboulle, *A fast iterative shrinkage-thresholding algorithm for linear
        inverse problems*, 2009. O'Donoghue and Candès, *Adaptive restart for accelerated
        gradient schemes*, 2015.
    """

    max_steps: int
    rtol: float | None
    atol: float
    norm: Callable[[PyTree], Scalar]

    projects: ClassVar[bool] = True
    counts_its_steps: ClassVar[bool] = True

    def __init__(
        self, max_steps: int = 100_000, rtol: float | None = None, atol: float = 0.0
    ):
        """**Arguments:**

        - `max_steps`: the largest number of steps.
        - `rtol`, `atol`: it stops if a projected gradient step is shorter than `atol`
            plus `rtol` times the norm of y. By default `rtol` is ten times machine
            precision.
        """
        self.max_steps = max_steps
        self.rtol = rtol
        self.atol = atol
        self.norm = optx.two_norm

    def __check_init__(self):
        check_count(self.max_steps, "max_steps", "ProjectedGradient")

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        dtype = tree_dtype(y)
        curvature = largest_curvature(lambda y: fn(y, args)[0], y)
        step_size = (0.9 / nonzero(curvature)).astype(dtype)
        one, start = jnp.ones((), dtype), _projection(options)(y)
        flat, num_steps, terminate = curvature == 0, jnp.array(0), jnp.array(False)
        return _ProjectedState(start, one, step_size, flat, num_steps, terminate)

    def step(self, fn, y, args, options, state, tags):
        project = _projection(options)
        y = project(y)
        ahead, t = state.ahead, state.step_size
        (value, aux), slope = jax.value_and_grad(fn, has_aux=True)(ahead, args)
        new_y = project(tree_axpy(-t, slope, ahead))
        displacement = tree_sub(new_y, ahead)
        length = tree_norm(displacement)

        # Is the curvature of f at most 1 / t? The slack is for rounding.
        eps = float(jnp.finfo(length.dtype).eps)
        square = tree_dot(displacement, displacement)
        model = tree_dot(slope, displacement) + square / (2 * t)
        slack = 10 * eps * (jnp.abs(value) + 1e-3 * jnp.abs(model))
        rise = fn(new_y, args)[0] - value
        accepted = rise <= (model + slack).astype(rise.dtype)

        move = tree_sub(new_y, y)
        uphill = tree_dot(displacement, move) < 0
        grown = 0.5 * (1 + jnp.sqrt(1 + 4 * state.momentum**2))
        share = where(uphill, 0, (state.momentum - 1) / grown)
        new_ahead = tree_axpy(share, move, new_y)
        momentum = where(uphill, 1, grown)

        rtol = 10 * eps if self.rtol is None else self.rtol
        # The length of a step from `ahead`. It is zero only at the minimum.
        small = accepted & (length <= self.atol + rtol * tree_norm(new_y))
        num_steps = state.num_steps + 1
        state = _ProjectedState(
            tree_where(accepted, new_ahead, y),
            where(accepted, momentum, 1),
            where(accepted, where(state.flat, 2 * t, t), 0.5 * t),
            state.flat & accepted & (num_steps < _MOST_DOUBLED),
            num_steps,
            small | (num_steps >= self.max_steps) | ~jnp.isfinite(length),
        )
        return tree_where(accepted, new_y, y), state, aux

    def terminate(self, fn, y, args, options, state, tags):
        # The response that uses this solver checks the point.
        return state.terminate, optx.RESULTS.successful

    def postprocess(self, fn, y, aux, args, options, state, tags, result):
        return _projection(options)(y), aux, {}


def _projection(options) -> Callable[[PyTree], PyTree]:
    return options.get("projection") or (lambda y: y)
