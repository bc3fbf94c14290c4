"""Quasi-Newton steps for outer variables that are confined to a convex set."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar

from .._arguments import as_count, check_count
from .._tree import nonzero, where
from .lbfgs import remembered
from .projected_search import AbstractProjectedSearch


# Of the projected steps that minimise the model: at most so many, until one is so small
# relative to the first. They evaluate nothing but the projection.
_MODEL_STEPS = 50
_MODEL_ACCURACY = 1e-2


class ProjectedQuasiNewton(AbstractProjectedSearch):
    r"""Quasi-Newton steps for variables that are confined to a convex set C,

    $$x \leftarrow x + a\, d, \qquad x + d \approx \operatorname*{argmin}_{u \in C}
    \langle \nabla\phi(x), u - x \rangle + \tfrac12 \langle u - x, B (u - x) \rangle,$$

    with B the limited-memory approximation (BFGS) of the Hessian from the last changes of
    x and of the gradient. Spectral projected gradient steps minimise this model. They
    need the Euclidean projection on the set (`project_x`) and no evaluation of $\phi$,
    which would be an inner solve. No rate is to be chosen: a is 1, or less if the value
    would otherwise not decrease. A point at which the inner or the linear solve fails is
    too far away, and the search comes back from it. If it finds no better point, x stays.

    The default pipelines take it where a problem has a `project_x`; elsewhere they take
    L-BFGS, whose steps a projection would spoil.

    ??? cite "References"

        Schmidt, van den Berg, Friedlander and Murphy, *Optimizing costly functions with
        simple constraints: a limited-memory projected quasi-Newton algorithm*, 2009.
        Nocedal and Wright, *Numerical Optimization*, 2006: (6.19) for B.
    """

    memory: int = eqx.field(default=10, converter=as_count)
    max_trials: int = eqx.field(default=20, converter=as_count)

    def __check_init__(self):
        check_count(self.memory, "memory", "ProjectedQuasiNewton")
        check_count(self.max_trials, "max_trials", "ProjectedQuasiNewton")

    @property
    def _num_values(self):
        return 1

    def _blank(self, layout):
        # Changes of x and of the gradient; the newest come last.
        history = jnp.zeros((self.memory, layout.size), layout.dtype)
        return history, history

    def _direction(self, model, x, gradient, move):
        steps, changes = model
        newest = jnp.vdot(steps[-1], changes[-1])
        # The first step is of the size of one.
        size = jnp.max(jnp.abs(move(x - gradient) - x))
        scale = jnp.vdot(changes[-1], changes[-1]) / nonzero(newest)
        scale = nonzero(where(newest == 0, size, scale))
        gained, lost = _factors(steps, changes, scale)

        def product(v):
            # Not `gained.T @ ...`, which is several times slower on a CPU.
            return scale * v + (gained @ v) @ gained - (lost @ v) @ lost

        def body(carry):
            count, point, slope, length, _, first = carry
            step = move(point - length * slope) - point
            bent = product(step)
            curvature, square = jnp.vdot(step, bent), jnp.vdot(step, step)
            convex = curvature > 0
            divisor = where(convex, curvature, 1)
            least = -jnp.vdot(slope, step) / divisor
            share = where(convex, jnp.clip(least, 0, 1), 1)
            length = where(convex, square / divisor, 1 / scale)
            size = jnp.sqrt(square)
            return (
                count + 1,
                point + share * step,
                slope + share * bent,
                length,
                size,
                where(count == 0, size, first),
            )

        def unfinished(carry):
            count, *_, size, first = carry
            moves = (count == 0) | (size > _MODEL_ACCURACY * first)
            return moves & (count < _MODEL_STEPS)

        zero = jnp.zeros_like(scale)
        start = jnp.array(0), x, gradient, 1 / scale, zero, zero
        direction = jax.lax.while_loop(unfinished, body, start)[1] - x
        # Rounding may spoil B.
        descends = jnp.vdot(gradient, direction) < 0
        return where(descends, direction, move(x - gradient / scale) - x)

    def _learnt(self, model, step, change):
        steps, changes = model
        return remembered(steps, changes, step, change)


ProjectedQuasiNewton.__init__.__doc__ = """**Arguments:**

- `memory`: how many of the last changes of x and of the gradient are kept.
- `max_trials`: the largest number of points that one line search evaluates.
"""


def _factors(
    steps: Float[Array, "memory n"], changes: Float[Array, "memory n"], scale: Scalar
) -> tuple[Float[Array, "memory n"], Float[Array, "memory n"]]:
    r"""P and N of $B = \sigma I + P^\top P - N^\top N$. Each pair (s, r) of the memory,
    from the oldest on, adds a row to both: $r / \sqrt{\langle s, r \rangle}$ and
    $B s / \sqrt{\langle s, B s \rangle}$, with the B of the pairs before it."""
    products = jnp.sum(steps * changes, axis=1, keepdims=True)
    gained = where(products > 0, changes / jnp.sqrt(nonzero(products)), 0)

    def add(lost, entry):
        k, step = entry
        earlier = where(jnp.arange(len(steps)) < k, gained @ step, 0)
        bent = scale * step + earlier @ gained - (lost @ step) @ lost
        product = jnp.vdot(step, bent)
        row = where(product > 0, bent / jnp.sqrt(where(product > 0, product, 1)), 0)
        return lost.at[k].set(row), None

    rows = jnp.arange(len(steps)), steps
    return gained, jax.lax.scan(add, jnp.zeros_like(steps), rows)[0]
