"""The response of the inner variables by finite differences in random directions."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
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
from .._equilibrium.stackelberg import Stackelberg
from .._equilibrium.warm_start import WarmStart
from .._failure.results import finite_or_not
from .._linalg.power_iteration import curvature_by_differences
from .._optimiser.step import descend, optimiser_step
from .._problem.batches import Batches, check_batch_argument
from .._problem.constraints import set_x, set_y
from .._problem.root import check_has_objective
from .._tree import nonzero, tree_axpy, tree_dot, tree_norm, tree_sub
from .base import AbstractPipeline
from .noise import after_step, no_noise, Noise, with_noise
from .penalty_descent import falling


class ZerothOrderState(eqx.Module):
    """All that a run carries from one step to the next."""

    x: PyTree[Array]
    y: PyTree[Array]
    outer_state: Any
    inner_state: Any
    # Of gradient descent on f: one over its largest curvature at the start.
    rate: Scalar
    key: PRNGKeyArray
    num_steps: Int[Array, ""]
    noise: Noise | None


class ZerothOrder(AbstractPipeline[ZerothOrderState]):
    r"""Aims at [`bilevel_eqx.Stackelberg`][] or [`bilevel_eqx.WarmStart`][] with the
    response Jacobian from differences of inner runs. Let $\Phi(x)$ be the result of T
    inner steps from the present y. Then, with Gaussian directions $u_1, \dots, u_m$,

    $$\delta_i = \frac{\Phi(x + \mu u_i) - \Phi(x)}{\mu}, \qquad
    x \leftarrow x - b\, \Bigl(F_x + \frac1m \sum_i \langle \delta_i, F_y \rangle\, u_i
    \Bigr), \qquad y \leftarrow \Phi(x),$$

    where $F_x$ and $F_y$ are at $(x, \Phi(x))$. All runs have the same batches.

    This is PZOBO. There are no second derivatives and no adjoint of an inner step in it.
    The estimate is right in expectation for small $\mu$, up to the truncation after T
    steps, as that of [`bilevel_eqx.Unrolled`][]. Its variance is about the dimension of x
    divided by m, times the square of what it estimates: this is for few outer variables.

    Where x is confined to a set, f is still asked for at $x + \mu u_i$, which may lie
    outside.

    ??? cite "Reference"

        Sow, Ji and Liang, *On the convergence theory for Hessian-free bilevel
        algorithms*, NeurIPS 2022.
    """

    aims_at: ClassVar = (Stackelberg, WarmStart)
    admits_batches: ClassVar[bool] = True
    inner_optimiser: optax.GradientTransformation | None
    outer_optimiser: optax.GradientTransformation
    num_inner_steps: int
    num_directions: int
    smoothing: ScalarLike
    inner_batch: int | None
    outer_batch: int | None

    def __init__(
        self,
        inner_optimiser: optax.GradientTransformation | None = None,
        outer_optimiser: optax.GradientTransformation = optax.adam(falling),
        *,
        num_inner_steps: int = 10,
        num_directions: int = 10,
        smoothing: ScalarLike = 0.1,
        inner_batch: int | None = None,
        outer_batch: int | None = None,
    ):
        r"""**Arguments:**

        - `inner_optimiser`: an optax optimiser; it moves y. By default gradient descent
            at the rate $1 / L$, with L the largest curvature of f in y, estimated at the
            start from differences of gradients.
        - `outer_optimiser`: an optax optimiser; it moves x. By default Adam, at a rate
            that falls.
        - `num_inner_steps`: T. Keyword only argument.
        - `num_directions`: m. The m + 1 runs are taken at once, with the memory of as
            many. Keyword only argument.
        - `smoothing`: $\mu$, in the unit of x. Keyword only argument.
        - `inner_batch`, `outer_batch`: the numbers of samples in a batch, for an
            [`bilevel_eqx.AbstractFiniteSumProblem`][]; `None`, the default, takes all
            data. Keyword only arguments.
        """
        is_given = inner_optimiser is not None
        self.inner_optimiser = as_pytree(inner_optimiser) if is_given else None
        self.outer_optimiser = as_pytree(outer_optimiser)
        self.num_inner_steps = as_count(num_inner_steps)
        self.num_directions = as_count(num_directions)
        self.smoothing = as_rate(smoothing)
        self.inner_batch = as_count(inner_batch)
        self.outer_batch = as_count(outer_batch)

    def __check_init__(self):
        owner, kind = "ZerothOrder", optax.GradientTransformation
        check_type(self.inner_optimiser, kind | None, "inner_optimiser", owner)
        check_type(self.outer_optimiser, kind, "outer_optimiser", owner)
        check_count(self.num_inner_steps, "num_inner_steps", owner)
        check_count(self.num_directions, "num_directions", owner)
        check_positive(self.smoothing, "smoothing", owner)
        for name in ("inner_batch", "outer_batch"):
            check_batch_argument(getattr(self, name), name, owner)

    @property
    def _batches(self) -> Batches:
        return Batches(self.inner_batch, self.outer_batch)

    def init(self, problem, equilibrium, x, y, key):
        if isinstance(equilibrium, WarmStart) and equilibrium.partial:
            raise ValueError(
                "`ZerothOrder` has no damping, and cannot aim at a partial warm start, "
                "`WarmStart(epsilon)`. Use `WarmStart()`, or `SingleLoop(damping=...)`."
            )
        check_has_objective(problem, "`ZerothOrder`")
        self._batches.check(problem, "ZerothOrder")
        curvature = jnp.ones(())
        if self.inner_optimiser is None:
            curvature = curvature_by_differences(
                lambda y: inner_gradient(problem, x, y), y
            )
        rate = 1 / nonzero(curvature)
        return ZerothOrderState(
            x,
            y,
            self.outer_optimiser.init(x),
            self._inner_optimiser(rate).init(y),
            rate,
            key,
            jnp.array(0),
            no_noise(problem, self._batches, x),
        )

    def step(self, problem, equilibrium, state):
        del equilibrium
        x, k, x_set = state.x, state.num_steps, set_x(problem)
        samples_key, directions_key = jr.split(state.key)

        def draw(t):
            count = k * self.num_inner_steps + t
            return self._batches(problem, samples_key, count, k)

        optimiser, project = self._inner_optimiser(state.rate), set_y(problem).project

        def run(direction):
            moved_x = tree_axpy(self.smoothing, direction, x)

            def inner_step(at, t):
                on = draw(t)
                at, *_ = descend(optimiser, lambda y: on.inner(moved_x, y), at, project)
                return at, None

            start = state.y, state.inner_state
            return jax.lax.scan(inner_step, start, jnp.arange(self.num_inner_steps))[0]

        # The first direction is zero, so that all runs are one program.
        directions = _gaussian(jr.fold_in(directions_key, k), x, self.num_directions)
        ends, inner_states = jax.vmap(run)(directions)
        y, inner_state = jtu.tree_map(lambda u: u[0], (ends, inner_states))

        on = draw(self.num_inner_steps - 1)
        value, outer_x, outer_y = outer_gradients(on, x, y)
        rises = jax.vmap(lambda end: tree_dot(tree_sub(end, y), outer_y))(ends)
        shares = rises / (jnp.asarray(self.smoothing, rises.dtype) * self.num_directions)
        through_y = jtu.tree_map(
            lambda u: jnp.tensordot(shares.astype(u.dtype), u, 1), directions
        )
        gradient = tree_axpy(1, outer_x, through_y)
        x, outer_state = optimiser_step(
            self.outer_optimiser,
            x,
            state.outer_state,
            value=value,
            gradient=gradient,
            value_fn=lambda x: on.outer(x, y),
            project=x_set.project,
        )
        left = set_y(problem).remaining_step(inner_gradient(on, x, y), y)
        metrics = {
            "value": on.outer(x, y),
            "outer_residual": tree_norm(x_set.remaining_step(gradient, x)),
            "inner_residual": tree_norm(left),
            "result": finite_or_not((x, y, value)),
        }
        noise = after_step(state.noise, gradient)
        state = ZerothOrderState(
            x, y, outer_state, inner_state, state.rate, state.key, k + 1, noise
        )
        return state, with_noise(metrics, noise)

    def _inner_optimiser(self, rate: Scalar) -> Any:
        return optax.sgd(rate) if self.inner_optimiser is None else self.inner_optimiser


def _gaussian(key: PRNGKeyArray, x: PyTree[Array], count: int) -> PyTree[Array]:
    """Zero and `count` Gaussian vectors like x, along a new leading axis."""
    leaves, treedef = jtu.tree_flatten(x)
    keys = jr.split(key, len(leaves))
    drawn = [jr.normal(k, (count, *u.shape), u.dtype) for k, u in zip(keys, leaves)]
    drawn = [jnp.concatenate([jnp.zeros_like(u[:1]), u]) for u in drawn]
    return jtu.tree_unflatten(treedef, drawn)
