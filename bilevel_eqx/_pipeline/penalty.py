"""The penalty method: pessimistic, with gradients alone."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree, Scalar, ScalarLike

from .._arguments import as_pytree, as_rate, check_positive, check_type
from .._derivatives.first import inner_gradient, outer_gradients
from .._derivatives.second import hessian_depends_on_x
from .._equilibrium.pessimistic import Pessimistic
from .._failure.results import finite_or_not
from .._linalg.power_iteration import largest_curvature
from .._optimiser.step import optimiser_step
from .._problem.constraints import set_x
from .._tree import nonzero, tree_axpy, tree_dtype, tree_norm, tree_scale, tree_sub
from .base import AbstractPipeline


def _decaying(count):
    return 0.02 / (1 + count / 1000)


class PenaltyState(eqx.Module):
    """All that a run carries from one step to the next."""

    x: PyTree[Array]
    y: PyTree[Array]
    # The inner minimum next to y, and the centre of the ball.
    z: PyTree[Array]
    center: PyTree[Array]
    inner_curvature: Scalar
    outer_curvature: Scalar
    outer_state: Any
    num_steps: Int[Array, ""]


class PenaltyAscent(AbstractPipeline[PenaltyState]):
    r"""Aims at [`bilevel_eqx.Pessimistic`][] by a single loop of gradient steps on

    $$\min_x \max_{y \in Y} \min_{z \in Y} F(x, y) - \rho\, (f(x, y) - f(x, z))
    - \sigma \langle y, z \rangle + \frac\sigma2 \|z\|^2 :$$

    y seeks the worst, and pays $\rho$ for what it is short of an inner minimum; z is one
    next to it. In step k, $\rho = \rho_0 (1 + k)^p$ and $\sigma = \sigma_0 (1 + k)^{-p}$.

    Neither linear solves nor second derivatives are in it, except for an estimate of
    curvatures at the start. The answer is right to the order of $1 / \rho$, and y moves
    along $S(x)$ at a rate of $1 / \rho$ only: this is for large problems and modest
    accuracy.

    ??? cite "Reference"

        SiPBA, a single-loop penalty method for pessimistic bilevel optimisation, 2025.
    """

    aims_at: ClassVar = (Pessimistic,)
    optimiser: optax.GradientTransformation
    penalty: ScalarLike
    smoothing: ScalarLike
    power: ScalarLike

    def __init__(
        self,
        optimiser: optax.GradientTransformation = optax.adam(_decaying),
        penalty: ScalarLike = 10.0,
        smoothing: ScalarLike = 0.1,
        power: ScalarLike = 0.4,
    ):
        r"""**Arguments:**

        - `optimiser`: any optax optimiser; it moves x. By default Adam, at a rate that
            decays.
        - `penalty`: $\rho_0$, relative to the ratio of the curvatures of F and f in y.
        - `smoothing`: $\sigma_0$, relative to the curvature of F in y.
        - `power`: $p$.
        """
        self.optimiser = as_pytree(optimiser)
        self.penalty = as_rate(penalty)
        self.smoothing = as_rate(smoothing)
        self.power = as_rate(power)

    def __check_init__(self):
        owner = "PenaltyAscent"
        check_type(self.optimiser, optax.GradientTransformation, "optimiser", owner)
        for name in ("penalty", "smoothing", "power"):
            check_positive(getattr(self, name), name, owner)

    def init(self, problem, equilibrium, x, y, key):
        assert isinstance(equilibrium, Pessimistic)
        del key
        if equilibrium.within is None and hessian_depends_on_x(problem, x, y):
            raise ValueError(
                "`PenaltyAscent` neglects how the centre of the ball moves with x, which "
                "is right only where the inner Hessian does not depend on x. Here it "
                "does: use `NullSpaceAscent`."
            )
        inner = largest_curvature(lambda y: problem.inner(x, y), y)
        outer = largest_curvature(lambda y: problem.outer(x, y), y)
        inner = nonzero(inner).astype(tree_dtype(y))
        outer = jnp.where(outer == 0, inner, outer).astype(tree_dtype(y))
        outer_state = self.optimiser.init(x)
        return PenaltyState(x, y, y, y, inner, outer, outer_state, jnp.array(0))

    def step(self, problem, equilibrium, state):
        assert isinstance(equilibrium, Pessimistic)
        x, y, z = state.x, state.y, state.z
        inner, outer = state.inner_curvature, state.outer_curvature
        dtype = inner.dtype
        growth = (1 + state.num_steps.astype(dtype)) ** jnp.asarray(self.power, dtype)
        rho = jnp.asarray(self.penalty, dtype) * outer / inner * growth
        sigma = jnp.asarray(self.smoothing, dtype) * outer / growth

        center = tree_axpy(
            -0.9 / inner, inner_gradient(problem, x, state.center), state.center
        )
        stiff = rho * inner + outer + sigma
        pull = tree_axpy(rho, inner_gradient(problem, x, z), tree_scale(-sigma, y))
        pull = tree_axpy(sigma, z, pull)
        z = equilibrium.draw_in(tree_axpy(-0.9 / stiff, pull, z), center)
        push = outer_gradients(problem, x, y)[2]
        push = tree_axpy(-rho, inner_gradient(problem, x, y), push)
        push = tree_axpy(-sigma, z, push)
        y = equilibrium.draw_in(tree_axpy(0.9 / stiff, push, y), center)

        value, outer_x, _ = outer_gradients(problem, x, y)
        inner_x = jax.grad(problem.inner)
        gap = tree_sub(inner_x(x, y), inner_x(x, z))
        gradient = tree_axpy(-rho, gap, outer_x)
        x, outer_state = optimiser_step(
            self.optimiser,
            x,
            state.outer_state,
            value=value,
            gradient=gradient,
            value_fn=lambda x: problem.outer(x, y),
            project=set_x(problem).project,
        )
        metrics = {
            "value": value,
            "outer_residual": tree_norm(set_x(problem).remaining_step(gradient, x)),
            "inner_residual": tree_norm(inner_gradient(problem, x, y)),
            "result": finite_or_not((x, y, value)),
        }
        count = state.num_steps + 1
        state = PenaltyState(x, y, z, center, inner, outer, outer_state, count)
        return state, metrics
