"""Penalty methods with first derivatives alone: F2SA and PBGD."""

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
from .._equilibrium.optimistic import Optimistic
from .._equilibrium.stackelberg import Stackelberg
from .._failure.results import finite_or_not
from .._linalg.power_iteration import curvature_by_differences
from .._optimiser.step import descend
from .._problem.batches import Batches, check_batch_argument
from .._problem.constraints import set_x, set_y
from .._problem.root import check_has_objective
from .._tree import nonzero, tree_dtype, tree_norm, tree_scale
from .base import AbstractPipeline
from .noise import after_step, no_noise, Noise, with_noise


def falling(count):
    """A rate for Adam, which needs one that falls to come to rest."""
    return 0.02 / (1 + count / 1000)


class PenaltyDescentState(eqx.Module):
    """All that a run carries from one step to the next."""

    x: PyTree[Array]
    # y and z of the formula: minima of F + lambda f and of f.
    penalised: PyTree[Array]
    minimum: PyTree[Array]
    x_state: Any
    penalised_state: Any
    minimum_state: Any
    # Of f and of F in y, at the start.
    curvatures: tuple[Scalar, Scalar]
    key: PRNGKeyArray
    num_steps: Int[Array, ""]
    noise: Noise | None
    # Whether there is one minimum only.
    is_unique: bool = eqx.field(static=True)

    @property
    def y(self) -> PyTree[Array]:
        # Where there are many inner minima, F has selected `penalised` among them. It is
        # short of one by F_y / lambda, so it is not the answer where there is only one.
        return self.minimum if self.is_unique else self.penalised


class PenaltyDescent(AbstractPipeline[PenaltyDescentState]):
    r"""Aims at [`bilevel_eqx.Stackelberg`][] or [`bilevel_eqx.Optimistic`][] through

    $$\min_x \Bigl( \min_y \bigl( F(x, y) + \lambda f(x, y) \bigr) -
    \lambda \min_z f(x, z) \Bigr)$$

    with first derivatives alone. An outer step takes, T times,

    $$y \leftarrow y - a_1 (F_y(x, y) + \lambda f_y(x, y)), \qquad
    z \leftarrow z - a_2 f_y(x, z),$$

    and then

    $$x \leftarrow x - b\, \bigl(F_x(x, y) + \lambda (f_x(x, y) - f_x(x, z))\bigr),
    \qquad \lambda \leftarrow \lambda + \delta.$$

    This is F²SA. PBGD is a setting of it, `PenaltyDescent(penalty=..., growth=0.0,
    joint=True)`: z moves T times, and then x and y move once, both from the old point.

    There are no second derivatives and no linear solves in it. So the objectives may have
    rules for their first derivative only (`jax.custom_vjp`), or loops of unknown length
    behind such a rule. The answer is right to the order of $1 / \lambda$. $\lambda$ has
    the unit of F / f: where f is a sum and not a mean, it should be as much smaller.

    With batches, each of the T + 1 updates has one batch of each level, fresh, the same
    for y and z. Most of the noise of $\lambda (f_x(x, y) - f_x(x, z))$ then cancels.

    The y of the answer is z for a [`bilevel_eqx.Stackelberg`][] equilibrium, and y for an
    [`bilevel_eqx.Optimistic`][] one.

    ??? cite "References"

        F²SA: Kwon, Kwon, Wright and Nowak, *A fully first-order method for stochastic
        bilevel optimization*, ICML 2023. PBGD: Shen and Chen, *On penalty-based bilevel
        gradient descent method*, ICML 2023.
    """

    aims_at: ClassVar = (Stackelberg, Optimistic)
    admits_batches: ClassVar[bool] = True
    inner_optimiser: optax.GradientTransformation | None
    penalised_optimiser: optax.GradientTransformation | None
    outer_optimiser: optax.GradientTransformation
    num_inner_steps: int
    penalty: ScalarLike
    growth: ScalarLike
    joint: bool
    inner_batch: int | None
    outer_batch: int | None

    def __init__(
        self,
        inner_optimiser: optax.GradientTransformation | None = None,
        penalised_optimiser: optax.GradientTransformation | None = None,
        outer_optimiser: optax.GradientTransformation = optax.adam(falling),
        *,
        num_inner_steps: int = 10,
        penalty: ScalarLike = 1.0,
        growth: ScalarLike = 0.1,
        joint: bool = False,
        inner_batch: int | None = None,
        outer_batch: int | None = None,
    ):
        r"""**Arguments:**

        - `inner_optimiser`, `penalised_optimiser`: optax optimisers; they move z and y.
            By default gradient descent at the rates $a_1 = a_2 / \lambda$ and
            $a_2 = s \lambda / (\lambda L + L_F)$, with L and $L_F$ the largest curvatures
            of f and F in y, estimated at the start from differences of gradients; s is 1,
            and in step k of a run with batches $(1 + k)^{-4/7}$. With a rate of your own,
            keep $\lambda a_1$ below $2 / L$: $\lambda$ grows.
        - `outer_optimiser`: an optax optimiser; it moves x. By default Adam, at a rate
            that falls. The rate of gradient descent may be that of the outer problem; but
            if `joint`, it must fall as $1 / \lambda$, as that of y does.
        - `num_inner_steps`: T. Keyword only argument.
        - `penalty`: $\lambda$ in the first step. Keyword only argument.
        - `growth`: $\delta$, at least zero. Keyword only argument.
        - `joint`: whether y moves once in a step, together with x, and not T times before
            it. Keyword only argument.
        - `inner_batch`, `outer_batch`: the numbers of samples in a batch, for an
            [`bilevel_eqx.AbstractFiniteSumProblem`][]; `None`, the default, takes all
            data. Keyword only arguments.
        """
        none = inner_optimiser is None, penalised_optimiser is None
        self.inner_optimiser = None if none[0] else as_pytree(inner_optimiser)
        self.penalised_optimiser = None if none[1] else as_pytree(penalised_optimiser)
        self.outer_optimiser = as_pytree(outer_optimiser)
        self.num_inner_steps = as_count(num_inner_steps)
        self.penalty = as_rate(penalty)
        self.growth = as_rate(growth)
        self.joint = joint
        self.inner_batch = as_count(inner_batch)
        self.outer_batch = as_count(outer_batch)

    def __check_init__(self):
        owner, kind = "PenaltyDescent", optax.GradientTransformation
        for name in ("inner_optimiser", "penalised_optimiser"):
            check_type(getattr(self, name), kind | None, name, owner)
        check_type(self.outer_optimiser, kind, "outer_optimiser", owner)
        check_type(self.joint, bool, "joint", owner)
        check_count(self.num_inner_steps, "num_inner_steps", owner)
        check_positive(self.penalty, "penalty", owner)
        check_positive(self.growth, "growth", owner, or_zero=True)
        for name in ("inner_batch", "outer_batch"):
            check_batch_argument(getattr(self, name), name, owner)

    @property
    def _batches(self) -> Batches:
        return Batches(self.inner_batch, self.outer_batch)

    def init(self, problem, equilibrium, x, y, key):
        check_has_objective(problem, "`PenaltyDescent`")
        self._batches.check(problem, "PenaltyDescent")
        dtype, count = tree_dtype(y), jnp.array(0)

        def curvature(fn):
            found = curvature_by_differences(lambda y: jax.grad(fn, argnums=1)(x, y), y)
            return found.astype(dtype)

        curvatures = jnp.ones((), dtype), jnp.zeros((), dtype)
        if self.inner_optimiser is None or self.penalised_optimiser is None:
            curvatures = nonzero(curvature(problem.inner)), curvature(problem.outer)
        moves_z, moves_y = self._inner_optimisers(curvatures, count)
        return PenaltyDescentState(
            x=x,
            penalised=y,
            minimum=y,
            x_state=self.outer_optimiser.init(x),
            penalised_state=moves_y.init(y),
            minimum_state=moves_z.init(y),
            curvatures=curvatures,
            key=key,
            num_steps=count,
            noise=no_noise(problem, self._batches, x),
            is_unique=isinstance(equilibrium, Stackelberg),
        )

    def step(self, problem, equilibrium, state):
        del equilibrium
        x, x_set, y_set = state.x, set_x(problem), set_y(problem)
        penalty = self._penalty(state.curvatures[0].dtype, state.num_steps)
        moves_z, moves_y = self._inner_optimisers(state.curvatures, state.num_steps)

        def draw(t):
            count = state.num_steps * (self.num_inner_steps + 1) + t
            return self._batches(problem, state.key, count, count)

        def move_z(on, at):
            return descend(moves_z, lambda z: on.inner(x, z), at, y_set.project)[0]

        def move_y(on, at):
            def penalised(y):
                return _penalised(on, penalty, x, y)

            return descend(moves_y, penalised, at, y_set.project)[0]

        def inner_step(carry, t):
            (at_z, at_y), on = carry, draw(t)
            return (move_z(on, at_z), at_y if self.joint else move_y(on, at_y)), None

        at_z = state.minimum, state.minimum_state
        at_y = state.penalised, state.penalised_state
        (at_z, at_y), _ = jax.lax.scan(
            inner_step, (at_z, at_y), jnp.arange(self.num_inner_steps)
        )
        (z, z_state), (y, _), on = at_z, at_y, draw(self.num_inner_steps)

        def lagrangian(x):
            value = _penalised(on, penalty, x, y)
            return value - penalty.astype(value.dtype) * on.inner(x, z)

        at_x, value, gradient = descend(
            self.outer_optimiser, lagrangian, (x, state.x_state), x_set.project
        )
        if self.joint:
            at_y = move_y(on, at_y)
        (new_x, x_state), (new_y, y_state) = at_x, at_y
        state = PenaltyDescentState(
            x=new_x,
            penalised=new_y,
            minimum=z,
            x_state=x_state,
            penalised_state=y_state,
            minimum_state=z_state,
            curvatures=state.curvatures,
            key=state.key,
            num_steps=state.num_steps + 1,
            noise=after_step(state.noise, gradient),
            is_unique=state.is_unique,
        )
        slope_z = jax.grad(on.inner, argnums=1)(new_x, z)
        slope_y = jax.grad(lambda y: _penalised(on, penalty, new_x, y))(new_y)
        # In the unit of f.
        slope_y = tree_scale(1 / penalty, slope_y)
        left = y_set.remaining_step(slope_z, z), y_set.remaining_step(slope_y, new_y)
        metrics = {
            "value": on.outer(new_x, state.y),
            "outer_residual": tree_norm(x_set.remaining_step(gradient, new_x)),
            "inner_residual": tree_norm(left),
            "result": finite_or_not((new_x, new_y, z, value)),
        }
        return state, with_noise(metrics, state.noise)

    def _penalty(self, dtype: Any, count: Int[Array, ""]) -> Scalar:
        start, growth = (jnp.asarray(u, dtype) for u in (self.penalty, self.growth))
        return start + growth * count.astype(dtype)

    def _inner_optimisers(
        self, curvatures: tuple[Scalar, Scalar], count: Int[Array, ""]
    ) -> tuple[Any, Any]:
        """What moves z and what moves y."""
        inner, outer = curvatures
        penalty = self._penalty(inner.dtype, count)
        rate = 1 / (penalty * inner + outer)
        if self.inner_batch is not None or self.outer_batch is not None:
            rate = rate * (1 + count.astype(rate.dtype)) ** jnp.asarray(
                -4 / 7, rate.dtype
            )
        moves_z, moves_y = self.inner_optimiser, self.penalised_optimiser
        moves_z = optax.sgd(penalty * rate) if moves_z is None else moves_z
        moves_y = optax.sgd(rate) if moves_y is None else moves_y
        return moves_z, moves_y


def _penalised(problem, penalty: Scalar, x, y) -> Scalar:
    value, inner = problem.outer(x, y), problem.inner(x, y)
    return value + penalty.astype(value.dtype) * inner.astype(value.dtype)
