r"""The worst point of $S(x)$ within a ball of it, and how its value moves with x.

The ball lies in $S(x)$: around the point $c$ of it nearest to $y_0$, so that it is never
empty. With radius zero it would leave the cold start alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar, ScalarLike

from .._depends_on import depends_on
from .._linalg.eigenbasis import Eigenbasis, eigenbasis_within
from .._linalg.trust_region import trust_region, WorstStep
from .._optimiser.backtracking import backtrack
from .._problem.base import AbstractBilevelProblem
from .._tree import nonzero, project_on_ball, tree_axpy, vector_norm, where
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
            unit = where(presses, offset / jnp.sqrt(nonzero(square)), 0)

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
    square, distance = jnp.vdot(offset, offset), jnp.vdot(displacement, displacement)
    # What a projection on nothing leaves by rounding has no direction.
    rounding = (100 * jnp.finfo(square.dtype).eps) ** 2 * distance
    # Deep inside of the ball it does not press, whatever the quotient says.
    presses = (4 * distance > radius**2) & (square > rounding)
    quotient = jnp.vdot(tangential, offset) / where(presses, square, 1)
    return jnp.maximum(0, where(presses, quotient, 0))


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


def gains_from(
    objective: Callable, x: PyTree[Array], y: Float[Array, " n"], value: Scalar
) -> Callable[[Float[Array, " n"]], Scalar]:
    """By how much an objective is larger at other points than at y, where it is `value`.

    Where a large constant in the objective drowns the difference, this is the integral of
    the slope on the way.
    """
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    nodes, weights = (jnp.asarray(u, y.dtype) for u in ((1 + nodes) / 2, weights / 2))

    def gain(to):
        way = to - y

        def slope(t):
            return jnp.vdot(jax.grad(objective, argnums=1)(x, y + t * way), way)

        by_slopes = jnp.vdot(weights, jax.vmap(slope)(nodes))
        after = objective(x, to)
        by_values = (after - value).astype(y.dtype)
        rounding = jnp.finfo(after.dtype).eps * (jnp.abs(value) + jnp.abs(after))
        drowned = jnp.abs(by_values - by_slopes) <= 10 * rounding
        return where(drowned, by_slopes, by_values)

    return gain


# Exact for polynomials of degree 31.
_NODES = 16


def is_quadratic(here: Picture) -> bool:
    """Whether S(x) is a plane and F quadratic in y, so that one model is all of F."""

    def product(y):
        slope = jax.grad(here.problem.outer, argnums=1)
        return jax.linearize(lambda y: slope(here.x, y), y)[1](jnp.ones_like(y))

    return here.is_plane and not depends_on(product, here.y)


class Worst(NamedTuple):
    """A worst point; and the worst value with its kinks rounded off, and its gradient."""

    picture: Picture
    value: Scalar
    gradient: PyTree[Array]
    residual: Scalar
    multiplier: Scalar
    uphill: Scalar
    """How steep F still is, along S(x) within the ball."""


class _Found(NamedTuple):
    """What the last step of a search knows."""

    y: Float[Array, " n"]
    """The worst point; where two are nearly so, a point between them."""
    multiplier: Scalar
    lift: Scalar
    residual: Scalar
    uphill: Scalar


class _Search(NamedTuple):
    y: Float[Array, " n"]
    num_steps: Int[Array, ""]
    # The next step is not to be taken: y is as bad as it gets.
    settled: Bool[Array, ""]
    done: Bool[Array, ""]
    found: _Found
    # The arrays of the picture at y; `None` where they are as cheap to compute anew.
    computed: Any


def find_worst(
    problem: AbstractBilevelProblem,
    x: PyTree[Array],
    y: Float[Array, " n"],
    center: Displacement,
    radius: ScalarLike,
    max_steps: int,
    rounding: ScalarLike,
) -> Worst:
    """Ascends F along S(x) within the ball, by trust-region steps on quadratic models,
    from y, which need not be in S(x).

    Where S(x) is a plane and F quadratic, one step finds the worst point of all.
    Elsewhere it is a local one.
    """
    c = center.picture.y
    plane, linear_solver = center.picture.is_plane, center.picture.linear_solver
    exact = is_quadratic(center.picture)
    eps = float(jnp.finfo(y.dtype).eps)
    radius = jnp.asarray(radius, y.dtype)

    def move(here: WorstCase, offset, worst_offset, arriving):
        S = here.picture
        across = S.project(worst_offset - offset)
        # An exact penalty: its weight exceeds the pressure of the ball.
        uphill = S.project(here.slope)
        weight = 2 * vector_norm(uphill)
        # A gain below this is rounding, and the point no worse.
        least = 10 * eps * vector_norm(here.slope)
        gain = gains_from(problem.outer, x, S.y, here.value)

        def penalty(y):
            return weight * jnp.maximum(0, vector_norm(y - c) - radius)

        # The model knows of better points far away, and the path to them may lead down.
        # So the path bends: it begins along the gradient.
        scale = radius / nonzero(weight / 2)
        climb = project_on_ball(S.y + scale * uphill, c, radius) - S.y

        def trial(t):
            t = t.astype(y.dtype)
            step = where(arriving, 0, t**2 * across + t * (1 - t) * climb)
            point, _, _ = restore(S, project_on_ball(S.y + step, c, radius))
            lost = penalty(point) - gain(point) + least * vector_norm(point - S.y)
            return point, lost, jnp.array(True)

        value = penalty(S.y)
        none, any_value = jnp.zeros_like(value), jnp.full_like(value, jnp.inf)
        # Any true improvement will do.
        highest = where(arriving, any_value, value)
        _, new_y, _ = backtrack(trial, S.y, value, none, highest=highest, rounding=-1.0)
        short = vector_norm(new_y - S.y) <= 10 * eps * (vector_norm(c) + radius)
        return new_y, short & ~arriving

    # As in `select`: the last step makes the picture, and does not move.
    def body(search: _Search) -> _Search:
        picture = flat_picture(problem, x, search.y, linear_solver, on_set=True)
        here = worst_case(picture, center, radius)
        last = search.settled | (search.num_steps > max_steps)
        worst, offset = here.step(where(last, rounding, 0))
        # A first step only leads to S(x). The center lies in it.
        arriving = (search.num_steps == 0) & (not plane)
        new_y, settled = jax.lax.cond(
            last,
            lambda: (search.y, last),
            lambda: move(here, offset, worst.step, arriving),
        )
        off = vector_norm(picture.gradient)
        uphill = vector_norm(here.tangential_residual)
        residual, none = jnp.hypot(off, uphill), jnp.zeros_like(off)
        found = _Found(search.y, here.multiplier, none, residual, uphill)
        if exact:
            # Elsewhere the model may know of points that are worse in the model alone.
            mixed = search.y + worst.mixture - offset
            found = _Found(mixed, worst.multiplier, worst.lift, residual, uphill)
        num_steps = search.num_steps + 1
        return _Search(new_y, num_steps, settled, last, found, picture.carried)

    no, zero = jnp.array(False), jnp.zeros((), y.dtype)
    found = _Found(c, zero, zero, zero, zero)
    carry = _Search(y, jnp.array(0), no, no, found, center.picture.carried)
    search = jax.lax.while_loop(lambda search: ~search.done, body, carry)
    found, computed = search.found, center.picture.computed_as(search.computed)
    here = flat_picture(problem, x, search.y, linear_solver, computed=computed)
    value = problem.outer(x, found.y)
    value = value + found.lift.astype(value.dtype)
    gradient = danskin_gradient(here, found.y, center, found.multiplier)
    return Worst(here, value, gradient, found.residual, found.multiplier, found.uphill)
