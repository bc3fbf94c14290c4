"""Projected gradient descent that chooses its own steps, for the outer variables."""

import equinox as eqx
import jax.numpy as jnp

from .._arguments import as_count, check_count
from .._tree import nonzero, where
from .projected_search import AbstractProjectedSearch


class SpectralProjectedGradient(AbstractProjectedSearch):
    r"""Gradient steps for variables that are confined to a convex set,

    $$x \leftarrow x + a\, d, \qquad d = \Pi(x - \lambda \nabla\phi(x)) - x, \qquad
    \lambda = \frac{\langle s, s \rangle}{\langle s, r \rangle},$$

    with s and r the last changes of x and of the gradient, and $\Pi$ the Euclidean
    projection on the set (`project_x`). No rate is to be chosen: a is 1, or less if the
    value would otherwise exceed the largest of the last ones. A point at which the inner
    or the linear solve fails is too far away, and the search comes back from it. If it
    finds no better point, x stays.

    It needs one projection a step and no memory of earlier ones.
    [`bilevel_eqx.pipelines.ProjectedQuasiNewton`][] needs fewer steps.

    ??? cite "Reference"

        Birgin, Martínez and Raydan, *Nonmonotone spectral projected gradient methods on
        convex sets*, 2000.
    """

    memory: int = eqx.field(default=10, converter=as_count)
    max_trials: int = eqx.field(default=20, converter=as_count)

    def __check_init__(self):
        check_count(self.memory, "memory", "SpectralProjectedGradient")
        check_count(self.max_trials, "max_trials", "SpectralProjectedGradient")

    @property
    def _num_values(self):
        return self.memory

    def _blank(self, layout):
        # The length of the gradient step; zero if it is not known yet.
        return jnp.zeros((), layout.dtype)

    def _direction(self, model, x, gradient, move):
        # The first step is of the size of one.
        first = 1 / nonzero(jnp.max(jnp.abs(move(x - gradient) - x)))
        length = where(model == 0, first, model)
        length = jnp.clip(length, 1 / _LONGEST, _LONGEST)
        return move(x - length * gradient) - x

    def _learnt(self, model, step, change):
        curvature, square = jnp.vdot(step, change), jnp.vdot(step, step)
        # One where the curvature is negative, long.
        return where(curvature > 0, square / nonzero(curvature), _LONGEST)


SpectralProjectedGradient.__init__.__doc__ = """**Arguments:**

- `memory`: how many of the last values there are to compare with.
- `max_trials`: the largest number of points that one line search evaluates.
"""


_LONGEST = 1e10
