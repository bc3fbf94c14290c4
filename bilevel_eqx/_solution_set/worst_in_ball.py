r"""The worst point of $S(x)$ within a ball of it, and how its value moves with x.

The ball lies in $S(x)$: around the point $c$ of it nearest to $y_0$, so that it is never
empty. With radius zero it would leave the cold start alone.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Bool, Int, PyTree, Scalar, ScalarLike

from .._derivatives.first import outer_gradients
from .._derivatives.second import cross_derivative_operator
from .._linalg.eigenbasis import Eigenbasis, eigenbasis_within
from .._linalg.trust_region import trust_region, WorstStep
from .._problem.base import AbstractBilevelProblem
from .._tree import (
    nonzero,
    tree_axpy,
    tree_dot,
    tree_draw_in,
    tree_dtype,
    tree_norm,
    tree_scale,
    tree_sub,
    tree_where,
)
from .nearest import Displacement
from .search import polished, restore
from .tangent import SolutionSet


class WorstCase(eqx.Module):
    r"""The conditions of $\max F(x, y)$ over $y \in S(x)$ with $\|y - c\| \le R$.

    With multipliers $\mu$ of $\nabla_y f = 0$ and $\nu \ge 0$ of the ball,

    $$F_y + H \mu - \nu (y - c) = 0, \qquad \mu = -H^+ (F_y - \nu (y - c)),$$

    and y is worst, of all the ball where $S(x)$ is a plane and F quadratic, iff
    $P (W - \nu I) P \le 0$ with $W = F_{yy} + \partial_y (H \mu)$.
    """

    solutions: SolutionSet
    center: Displacement
    radius: ScalarLike
    slope: PyTree[Array]
    multiplier: Scalar
    # The curvature of F along S(x), and its eigenvectors.
    hessian: lx.AbstractLinearOperator
    basis: Eigenbasis

    def __init__(self, problem, x, y, center: Displacement, radius):
        S = SolutionSet(problem, x, y, center.solutions.linear_solver)
        way = tree_sub(y, center.solutions.y)
        offset = S.project(way)
        slope = jax.grad(problem.outer, argnums=1)(x, y)
        tangential = S.project(slope)
        square = tree_dot(offset, offset)
        # Deep inside of the ball it does not press, whatever the quotient says.
        presses = 4 * tree_dot(way, way) > jnp.asarray(radius, square.dtype) ** 2
        presses = presses & (square > 0)
        pressure = tree_dot(tangential, offset) / jnp.where(presses, square, 1)
        multiplier = jnp.maximum(0, jnp.where(presses, pressure, 0))
        mu = tree_scale(-1, S.pinv(tree_axpy(-multiplier, way, slope)))
        W = S.lagrangian_hessian(lambda y: problem.outer(x, y), mu)
        self.solutions, self.center, self.radius = S, center, radius
        self.slope, self.multiplier, self.hessian = slope, multiplier, S.along(W)
        self.basis = eigenbasis_within(S.project, W, tangential)

    @property
    def offset(self) -> PyTree[Array]:
        """P (y - c): where y is in the ball, along S(x)."""
        return self.solutions.project(self.way)

    @property
    def way(self) -> PyTree[Array]:
        """y - c. Where S(x) bends, not all of it is along S(x)."""
        return tree_sub(self.solutions.y, self.center.solutions.y)

    @property
    def astray(self) -> PyTree[Array]:
        r"""$P F_y - \nu P (y - c)$, zero where no step along S(x) within the ball
        increases F to first order."""
        offset = tree_scale(-self.multiplier, self.offset)
        return tree_axpy(1.0, self.solutions.project(self.slope), offset)

    def step(self, rounding: ScalarLike = 0.0) -> tuple[WorstStep, PyTree[Array]]:
        """The worst offset by the quadratic model around y; and the present one."""
        offset = self.offset
        tangential = self.solutions.project(self.slope)
        # The model's slope at the center of the ball.
        slope = tree_axpy(-1.0, self.hessian.mv(offset), tangential)
        across = tree_sub(self.way, offset)
        radius = jnp.asarray(self.radius, tree_dtype(offset))
        room = jnp.maximum(radius**2 - tree_dot(across, across), 1e-6 * radius**2)
        return trust_region(self.basis, slope, jnp.sqrt(room), rounding), offset

    def mirrored(self) -> PyTree[Array]:
        """y on the other side of the ball, along its most curved direction.

        At a kink of the worst value both are equally bad.
        """
        values = self.basis.values
        top = (jnp.arange(values.size) == jnp.argmax(values)).astype(values.dtype)
        direction = self.solutions.project(self.basis.combine(top, self.slope))
        along = tree_dot(direction, self.offset)
        return tree_axpy(-2 * along, direction, self.solutions.y)


def danskin_gradient(
    problem: AbstractBilevelProblem,
    x: PyTree[Array],
    y: PyTree[Array],
    solutions: SolutionSet,
    center: Displacement,
    multiplier: ScalarLike,
) -> PyTree[Array]:
    r"""$F_x + B^\top \mu + \nu J_c^\top (y - c)$, the derivative of the worst value.

    By Danskin's theorem that of the Lagrangian at the worst y, with $J_c$ the derivative
    of the center of the ball, $c = \Pi(y_0, S(x))$.
    """
    _, outer_x, outer_y = outer_gradients(problem, x, y)
    offset = tree_sub(y, center.solutions.y)
    q = solutions.pinv(tree_axpy(-jnp.asarray(multiplier), offset, outer_y))
    B = cross_derivative_operator(problem, x, y)
    of_center, _ = center.pull(tree_scale(multiplier, offset))
    return tree_axpy(1.0, of_center, tree_sub(outer_x, B.T.mv(q)))


class Worst(eqx.Module):
    """A worst point; and the worst value with its kinks rounded off, and its gradient."""

    y: PyTree[Array]
    value: Scalar
    gradient: PyTree[Array]
    residual: Scalar


class _Search(eqx.Module):
    y: PyTree[Array]
    num_steps: Int[Array, ""]
    done: Bool[Array, ""]


def find_worst(
    problem: AbstractBilevelProblem,
    x: PyTree[Array],
    y: PyTree[Array],
    center: Displacement,
    radius: ScalarLike,
    max_steps: int,
    rounding: ScalarLike,
) -> Worst:
    """Ascends F along S(x) within the ball, by trust-region steps on quadratic models.

    Where S(x) is a plane and F quadratic, one step finds the worst point of all.
    Elsewhere it is a local one, started from y.
    """
    c = center.solutions.y
    flat = center.solutions.is_flat
    eps = float(jnp.finfo(tree_dtype(y)).eps)
    radius = jnp.asarray(radius, tree_dtype(y))

    def drawn_in(y):
        return tree_draw_in(y, c, radius)

    def unfinished(search: _Search):
        return ~search.done

    def body(search: _Search) -> _Search:
        here = WorstCase(problem, x, polished(problem, x, search.y), center, radius)
        S = here.solutions
        worst, offset = here.step()
        move = S.project(tree_sub(worst.step, offset))
        # An exact penalty: its weight exceeds the pressure of the ball.
        weight = 2 * tree_norm(S.project(here.slope))

        def merit(y):
            beyond = jnp.maximum(0, tree_norm(tree_sub(y, c)) - radius)
            value = problem.outer(x, y)
            return value - (weight * beyond).astype(value.dtype)

        value = merit(S.y)
        slack = eps * jnp.abs(value)

        # The model knows of better points far away, and the way to them may lead down.
        # Where it does there is still the gradient.
        uphill = S.project(here.slope)
        scale = radius / nonzero(tree_norm(uphill))
        climb = tree_sub(drawn_in(tree_axpy(scale, uphill, S.y)), S.y)

        def attempt(carry):
            count, _, _ = carry
            t = 0.5 ** (count % _HALVINGS).astype(tree_dtype(y))
            step = tree_where(count < _HALVINGS, move, climb)
            y_, _ = restore(S, drawn_in(tree_axpy(t, step, S.y)))
            return count + 1, y_, ~(merit(y_) >= value + slack)

        carry = jnp.array(0), S.y, jnp.array(True)
        _, new_y, rejected = jax.lax.while_loop(
            lambda carry: carry[2] & (carry[0] < 2 * _HALVINGS), attempt, carry
        )
        new_y = tree_where(rejected, S.y, new_y)
        length = tree_norm(tree_sub(new_y, S.y))
        num_steps = search.num_steps + 1
        settled = length <= 10 * eps * (tree_norm(c) + radius)
        return _Search(new_y, num_steps, settled | (num_steps >= max_steps))

    # On a plane the quadratic model knows all of the ball, from wherever it is made.
    start = c if flat else drawn_in(y)
    search = _Search(start, jnp.array(0), jnp.array(False))
    search = jax.lax.while_loop(unfinished, body, search)
    here = WorstCase(problem, x, search.y, center, radius)
    S = here.solutions
    y, multiplier = S.y, here.multiplier
    lift = jnp.zeros_like(multiplier)
    if flat:
        worst, offset = here.step(rounding)
        y = tree_axpy(1.0, tree_sub(worst.mixture, offset), y)
        multiplier = worst.multiplier
        lift = worst.lift
    value = problem.outer(x, y)
    value = value + lift.astype(value.dtype)
    gradient = danskin_gradient(problem, x, y, S, center, multiplier)
    return Worst(S.y, value, gradient, tree_norm(here.astray))


_HALVINGS = 10
