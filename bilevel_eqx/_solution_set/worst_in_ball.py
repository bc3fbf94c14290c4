r"""The worst point of $S(x)$ within a ball of it, and how its value moves with x.

The ball lies in $S(x)$: around the point $c$ of it nearest to $y_0$, so that it is never
empty. With radius zero it would leave the cold start alone.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar, ScalarLike

from .._inner_solver.minimum import minimise_inner
from .._inner_solver.projection import Projection
from .._linalg.eigenbasis import Eigenbasis, eigenbasis_within
from .._linalg.trust_region import trust_region, WorstStep
from .._optimiser.backtracking import backtrack
from .._problem.base import AbstractBilevelProblem
from .._tree import nonzero, project_on_ball, tree_axpy, vector_norm
from .nearest import Displacement
from .picture import flat_picture, Picture, restore


class WorstCase(NamedTuple):
    r"""The conditions of $\max F(x, y)$ over $y \in S(x)$ with $\|y - c\| \le R$.

    With multipliers $\mu$ of $\nabla_y f = 0$ and $\nu \ge 0$ of the ball,

    $$F_y + H \mu - \nu (y - c) = 0, \qquad \mu = -H^+ (F_y - \nu (y - c)),$$

    and y is worst, of all the ball where S(x) is a plane and F quadratic, iff
    $P (W - \nu I) P \le 0$ with $W = F_{yy} + \partial_y (H \mu)$.
    """

    picture: Picture
    center: Displacement
    radius: ScalarLike
    value: Scalar
    """F."""
    slope: Float[Array, " n"]
    """F_y."""
    multiplier: Scalar
    """nu."""
    hessian: lx.AbstractLinearOperator
    """P W P, the curvature of F along S(x)."""
    basis: Eigenbasis
    """Its eigenvectors."""

    @property
    def displacement(self) -> Float[Array, " n"]:
        """y - c. Where S(x) is curved, not all of it is along S(x)."""
        return self.picture.y - self.center.picture.y

    @property
    def offset(self) -> Float[Array, " n"]:
        """P (y - c): where y is in the ball, along S(x)."""
        return self.picture.project(self.displacement)

    @property
    def tangential_residual(self) -> Float[Array, " n"]:
        r"""$P F_y - \nu P (y - c)$, zero where no step along S(x) within the ball
        increases F to first order."""
        return self.picture.project(self.slope - self.multiplier * self.displacement)

    def convexity(self, everywhere: bool) -> Scalar:
        r"""How far the curvature of the Lagrangian, $P (W - \nu I) P$, is above zero, in
        all directions if `everywhere`, relative to the norm of $P W P$ or to $\nu$.

        That is the condition that y is worst of all the ball if S(x) is a plane and F
        quadratic. In general it need hold only where the ball allows to go to first
        order: if it presses, that is orthogonal to the offset.
        """
        values, offset = self.basis.values, self.offset
        scale = jnp.maximum(vector_norm(values), self.multiplier)
        excess = jnp.max(values) - self.multiplier
        if not everywhere:
            square = jnp.vdot(offset, offset)
            along = jnp.vdot(offset, self.hessian.mv(offset)) / nonzero(square)
            rounding = jnp.sqrt(jnp.finfo(values.dtype).eps)
            presses = self.multiplier > rounding * jnp.abs(along)
            unit = jnp.where(presses, offset / jnp.sqrt(nonzero(square)), 0)

            def project(vector):
                vector = self.picture.project(vector)
                return vector - jnp.vdot(unit, vector) * unit

            within = self.picture.operator(
                lambda v: self.hessian.mv(v) - self.multiplier * v
            )
            excess = jnp.max(eigenbasis_within(project, within, self.slope).values)
        return jnp.maximum(0, excess) / nonzero(scale)

    def step(self, rounding: ScalarLike = 0.0) -> tuple[WorstStep, Float[Array, " n"]]:
        """The worst offset by the quadratic model around y; and the present one."""
        offset = self.offset
        tangential = self.picture.project(self.slope)
        # The model's slope at the center of the ball.
        slope = tangential - self.hessian.mv(offset)
        across = self.displacement - offset
        radius = jnp.asarray(self.radius, offset.dtype)
        room = jnp.maximum(radius**2 - jnp.vdot(across, across), 1e-6 * radius**2)
        return trust_region(self.basis, slope, jnp.sqrt(room), rounding), offset


def worst_case(here: Picture, center: Displacement, radius: ScalarLike) -> WorstCase:
    """The conditions of the worst point of the ball, at a point of S(x)."""
    x, y = here.x, here.y
    value, slope = jax.value_and_grad(here.problem.outer, argnums=1)(x, y)
    displacement = y - center.picture.y
    radius = jnp.asarray(radius, y.dtype)
    multiplier = pressure(here, slope, displacement, radius)
    mu = here.multiplier(slope - multiplier * displacement)
    lagrangian = here.lagrangian(here.problem.outer, mu)
    W = here.operator(lambda v: lagrangian.push(v)[1])
    basis = eigenbasis_within(here.project, W, here.project(slope))
    return WorstCase(here, center, radius, value, slope, multiplier, here.along(W), basis)


def pressure(
    here: Picture,
    slope: Float[Array, " n"],
    displacement: Float[Array, " n"],
    radius: ScalarLike,
) -> Scalar:
    """The multiplier nu of the ball, from F_y and y - c."""
    offset, tangential = here.project(displacement), here.project(slope)
    square = jnp.vdot(offset, offset)
    # Deep inside of the ball it does not press, whatever the quotient says.
    presses = (4 * jnp.vdot(displacement, displacement) > radius**2) & (square > 0)
    quotient = jnp.vdot(tangential, offset) / jnp.where(presses, square, 1)
    return jnp.maximum(0, jnp.where(presses, quotient, 0))


def danskin_gradient(
    here: Picture, y: Float[Array, " n"], center: Displacement, multiplier: ScalarLike
) -> PyTree[Array]:
    r"""$F_x + B^\top \mu + \nu J_c^\top (y - c)$, the derivative of the worst value.

    By Danskin's theorem that of the Lagrangian at the worst y, with $J_c$ the derivative
    of the center of the ball, $c = \Pi(y_0, S(x))$. The picture is one of S(x) at or
    near y.
    """
    offset = y - center.picture.y
    multiplier = jnp.asarray(multiplier, y.dtype)
    outer_x, outer_y = jax.grad(here.problem.outer, argnums=(0, 1))(here.x, y)
    mu = here.multiplier(outer_y - multiplier * offset)
    of_center, _ = center.pull(multiplier * offset)
    constraint_x = here.cross_transposed(mu, y)
    return tree_axpy(1.0, of_center, tree_axpy(1.0, constraint_x, outer_x))


class Worst(NamedTuple):
    """A worst point; and the worst value with its kinks rounded off, and its gradient."""

    y: Float[Array, " n"]
    value: Scalar
    gradient: PyTree[Array]
    residual: Scalar


class _Search(NamedTuple):
    y: Float[Array, " n"]
    num_steps: Int[Array, ""]
    done: Bool[Array, ""]


def find_worst(
    problem: AbstractBilevelProblem,
    x: PyTree[Array],
    y: Float[Array, " n"],
    center: Displacement,
    radius: ScalarLike,
    max_steps: int,
    rounding: ScalarLike,
) -> Worst:
    """Ascends F along S(x) within the ball, by trust-region steps on quadratic models.

    Where S(x) is a plane and F quadratic, one step finds the worst point of all.
    Elsewhere it is a local one, started from y.
    """
    c = center.picture.y
    plane = center.picture.is_plane
    eps = float(jnp.finfo(y.dtype).eps)
    radius = jnp.asarray(radius, y.dtype)

    def case(y) -> WorstCase:
        here = flat_picture(problem, x, y, center.picture.linear_solver)
        return worst_case(here, center, radius)

    def body(search: _Search) -> _Search:
        here = case(search.y)
        S = here.picture
        worst, offset = here.step()
        move = S.project(worst.step - offset)
        # An exact penalty: its weight exceeds the pressure of the ball.
        uphill = S.project(here.slope)
        weight = 2 * vector_norm(uphill)

        def cost(y):
            beyond = jnp.maximum(0, vector_norm(y - c) - radius)
            value = problem.outer(x, y)
            return (weight * beyond).astype(value.dtype) - value

        # The model knows of better points far away, and the path to them may lead down.
        # So the path bends: it begins along the gradient.
        scale = radius / nonzero(weight / 2)
        climb = project_on_ball(S.y + scale * uphill, c, radius) - S.y

        def trial(t):
            t = t.astype(y.dtype)
            step = t**2 * move + t * (1 - t) * climb
            point, _, _ = restore(S, project_on_ball(S.y + step, c, radius))
            return point, cost(point), jnp.array(True)

        value = cost(S.y)
        # Any true improvement will do.
        none = jnp.zeros_like(value)
        _, new_y, _ = backtrack(trial, S.y, value, none, rounding=-1.0)
        length = vector_norm(new_y - S.y)
        num_steps = search.num_steps + 1
        settled = length <= 10 * eps * (vector_norm(c) + radius)
        return _Search(new_y, num_steps, settled | (num_steps >= max_steps))

    # On a plane the quadratic model knows all of the ball, from wherever it is made.
    start = c
    if not plane:
        start = project_on_ball(y, c, radius)
        start = minimise_inner(problem, x, start, Projection()).value
    search = _Search(start, jnp.array(0), jnp.array(False))
    search = jax.lax.while_loop(lambda search: ~search.done, body, search)
    here = case(search.y)
    y, multiplier = search.y, here.multiplier
    lift = jnp.zeros_like(multiplier)
    if plane:
        worst, offset = here.step(rounding)
        y = y + worst.mixture - offset
        multiplier, lift = worst.multiplier, worst.lift
    value = problem.outer(x, y)
    value = value + lift.astype(value.dtype)
    gradient = danskin_gradient(here.picture, y, center, multiplier)
    residual = vector_norm(here.tangential_residual)
    return Worst(search.y, value, gradient, residual)
