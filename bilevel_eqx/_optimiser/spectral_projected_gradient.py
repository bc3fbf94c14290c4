"""Projected gradient descent that chooses its own steps, for the outer variables."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree

from .._tree import (
    nonzero,
    tree_axpy,
    tree_dot,
    tree_dtype,
    tree_max,
    tree_scale,
    tree_sub,
    where,
)
from .backtracking import backtrack


class SpectralState(NamedTuple):
    """What is known of the steps before."""

    last: PyTree[Array]
    last_gradient: PyTree[Array]
    # The last values: a step may rise above the last one, and not above all of them.
    values: Float[Array, " memory"]
    begun: Bool[Array, ""]


def spectral_projected_gradient(
    project: Callable[[PyTree], PyTree], memory: int = 10, max_halvings: int = 20
) -> optax.GradientTransformationExtraArgs:
    r"""An optax optimiser for variables that are confined to a convex set,

    $$x \leftarrow x + a\, d, \qquad d = \Pi(x - \lambda \nabla\phi(x)) - x, \qquad
    \lambda = \frac{\langle s, s \rangle}{\langle s, r \rangle},$$

    with s and r the last changes of x and of the gradient. No rate is to be chosen: a is
    1, or less if the value would otherwise exceed the largest of the last ones. The
    default pipelines take it where a problem has a `project_x`; elsewhere they take
    L-BFGS, whose steps a projection would spoil.

    **Arguments:**

    - `project`: $\Pi$, the Euclidean projection on the set.
    - `memory`: how many of the last values there are to compare with.
    - `max_halvings`: how often a step is made shorter, at most.

    **Returns:**

    An optax optimiser. Its `update` needs `value` and `value_fn`, as those of
    `optax.lbfgs` do.

    ??? cite "Reference"

        Birgin, Martínez and Raydan, *Nonmonotone spectral projected gradient methods on
        convex sets*, 2000.
    """

    def init(params):
        dtype = tree_dtype(params)
        values = jnp.full((memory,), -jnp.inf, dtype)
        return SpectralState(params, params, values, jnp.array(False))

    def update(updates, state, params=None, **extra):
        if params is None or not {"value", "value_fn"} <= extra.keys():
            raise ValueError(
                "`spectral_projected_gradient` needs `update(gradient, state, params, "
                "value=..., value_fn=...)`, as `optax.lbfgs` does."
            )
        value, value_fn = extra["value"], extra["value_fn"]
        gradient, dtype = updates, tree_dtype(params)
        value = value.astype(dtype)
        change = tree_sub(params, state.last)
        curvature = tree_dot(change, tree_sub(gradient, state.last_gradient))
        square = tree_dot(change, change)
        # The first step is of the size of one; one where the curvature is negative, long.
        plain = tree_sub(project(tree_sub(params, gradient)), params)
        first = 1 / nonzero(tree_max(plain))
        spectral = where(curvature > 0, square / nonzero(curvature), _LONGEST)
        length = where(state.begun & (square > 0), spectral, first)
        length = jnp.clip(length, 1 / _LONGEST, _LONGEST)
        direction = tree_sub(project(tree_axpy(-length, gradient, params)), params)
        slope = tree_dot(gradient, direction)

        values = jnp.roll(state.values, 1).at[0].set(value)

        def trial(share):
            point = tree_axpy(share, direction, params)
            return share, value_fn(point), jnp.array(True)

        _, share, _ = backtrack(
            trial,
            jnp.zeros((), dtype),
            value,
            slope,
            highest=jnp.max(values),
            max_trials=max_halvings + 1,
            interpolate=True,
        )
        state = SpectralState(params, gradient, values, jnp.array(True))
        return tree_scale(share, direction), state

    return optax.GradientTransformationExtraArgs(init, update)


_LONGEST = 1e10
