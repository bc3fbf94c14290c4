"""Simultaneous and alternating play: Nash and proximal equilibria."""

import abc
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree, Scalar

from .._derivatives.first import inner_gradient
from .._equilibrium.nash import Nash
from .._equilibrium.proximal_equilibrium import ProximalEquilibrium
from .._failure.results import finite_or_not
from .._problem.constraints import set_x, set_y
from .._tree import nonzero, tree_axpy, tree_dtype, tree_norm, tree_scale, tree_sub
from .base import AbstractPipeline


class PlayState(eqx.Module):
    """All that a run carries from one move to the next."""

    x: PyTree[Array]
    y: PyTree[Array]
    # What damps: an average of where the players have been.
    average: tuple[PyTree[Array], PyTree[Array]]
    # Where each player is pushed to, here and at the last point.
    field: tuple[PyTree[Array], PyTree[Array]]
    change: Scalar
    distance: Scalar
    rate: Scalar
    ratio: Scalar


# Between 1 and the golden ratio; the rate may grow by the second at each step.
_GOLDEN = 1.5


_GROWTH = 1 / _GOLDEN + 1 / _GOLDEN**2


class _AbstractPlay(AbstractPipeline[PlayState]):
    r"""Each player descends its own objective, from an average of where it was:

    $$\bar z \leftarrow \frac{(\varphi - 1) z + \bar z}{\varphi}, \qquad
    z \leftarrow \Pi(\bar z - \lambda\, v(z)), \qquad v = (F_x, f_y).$$

    Plain descent, from $z$ itself, cycles or diverges on as simple a game as $F = x y$,
    $f = -x y$. The average damps that. The rate $\lambda$ is the reciprocal of a
    local Lipschitz constant of $v$, measured along the way. $\Pi$ is the projection on
    the sets that x and y are confined to, if they are.
    """

    alternating: eqx.AbstractVar[bool] | eqx.AbstractClassVar[bool]

    @abc.abstractmethod
    def field(self, problem, equilibrium, x, y) -> tuple[PyTree[Array], PyTree[Array]]:
        """What x and what y descend."""

    def init(self, problem, equilibrium, x, y, key):
        del key
        field = self.field(problem, equilibrium, x, y)
        size = tree_norm(field)
        # One trial step, for a first idea of the rate.
        length = 1e-3 * jnp.maximum(1, tree_norm((x, y)))
        trial = tree_scale(-length / nonzero(size), field)
        moved = jtu.tree_map(jnp.add, (x, y), trial)
        change = tree_norm(tree_sub(self.field(problem, equilibrium, *moved), field))
        rate = 0.5 * length / jnp.where(change == 0, length, change)
        dtype = tree_dtype((x, y))
        one, zero = jnp.ones((), dtype), jnp.zeros((), dtype)
        rate = rate.astype(dtype)
        return PlayState(x, y, (x, y), field, zero, zero, rate, one)

    def step(self, problem, equilibrium, state):
        here = state.x, state.y
        average = jtu.tree_map(
            lambda z, a: ((_GOLDEN - 1) * z + a) / _GOLDEN, here, state.average
        )
        # Malitsky's rule: a safe rate for the Lipschitz constant that the last step saw.
        moved, unchanged = state.distance > 0, state.change == 0
        allowed = _GOLDEN * state.ratio / (4 * state.rate) * state.distance**2
        allowed = allowed / jnp.where(unchanged, 1, state.change**2)
        grown = _GROWTH * state.rate
        rate = jnp.where(moved & ~unchanged, jnp.minimum(grown, allowed), state.rate)
        x_field, y_field = state.field
        x_set, y_set = set_x(problem), set_y(problem)
        x = x_set.project(tree_axpy(-rate, x_field, average[0]))
        if self.alternating:
            _, y_field = self.field(problem, equilibrium, x, state.y)
        y = y_set.project(tree_axpy(-rate, y_field, average[1]))
        field = self.field(problem, equilibrium, x, y)
        value = problem.outer(x, y)
        metrics = {
            "value": value,
            "outer_residual": tree_norm(x_set.remaining_step(field[0], x)),
            "inner_residual": tree_norm(
                y_set.remaining_step(inner_gradient(problem, x, y), y)
            ),
            "result": finite_or_not((x, y, value, field)),
        }
        state = PlayState(
            x=x,
            y=y,
            average=average,
            field=field,
            change=tree_norm(tree_sub(field, state.field)),
            distance=tree_norm(tree_sub((x, y), here)),
            rate=rate,
            ratio=_GOLDEN * rate / state.rate,
        )
        return state, metrics


class GradientPlay(_AbstractPlay):
    r"""Aims at [`bilevel_eqx.Nash`][]: each player descends its own objective, x along
    $F_x$ and y along $f_y$, damped by an average of where they were; see the golden
    ratio algorithm. No rate is to be chosen, and no linear system solved.

    It converges where the pair $(F_x, f_y)$ is monotone: for convex-concave games, and
    wherever each player's objective is convex in its own variables and their conflict
    is not stronger than that.

    ??? cite "Reference"

        Malitsky, *Golden ratio algorithms for variational inequalities*, 2020.
    """

    aims_at: ClassVar = (Nash,)
    alternating: bool

    def __init__(self, alternating: bool = False):
        """**Arguments:**

        - `alternating`: whether y moves after x has, and knows where x went; otherwise
            both move at once.
        """
        self.alternating = alternating

    def field(self, problem, equilibrium, x, y):
        return jax.grad(problem.outer)(x, y), inner_gradient(problem, x, y)


class ProximalPlay(_AbstractPlay):
    r"""Aims at [`bilevel_eqx.ProximalEquilibrium`][], as the Nash equilibrium of
    $V(x, y) = \max_{y'} F(x, y') - \frac\lambda2 \|y' - y\|^2$ that it is by definition:
    with $y'$ the reply, x descends $V_x = F_x(x, y')$ and y moves towards $y'$. Damped
    like [`bilevel_eqx.pipelines.GradientPlay`][].

    ??? cite "Reference"

        Farnia and Ozdaglar, *Do GANs always have Nash equilibria?*, ICML 2020:
        proximal training.
    """

    aims_at: ClassVar = (ProximalEquilibrium,)
    # With a reply that runs ahead of y, moving in turn diverges where moving at once
    # does not.
    alternating: ClassVar[bool] = False

    def field(self, problem, equilibrium, x, y):
        outer_x = jax.grad(problem.outer)
        if equilibrium.plays_nash:
            return outer_x(x, y), inner_gradient(problem, x, y)
        reply = equilibrium.reply(problem, x, y)
        # V_y = weight (y' - y), in a metric that leaves a step at any weight.
        towards = tree_sub(y, reply)
        scale = 1 + jnp.asarray(equilibrium.weight, tree_dtype(y))
        return outer_x(x, reply), tree_scale(scale, towards)
