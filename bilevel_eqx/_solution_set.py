r"""The set of inner minima, $S(x)$, near a point of it.

Where the inner Hessian $H$ has constant rank, $S(x)$ is a surface whose tangent space is
the null space of $H$. Everything that tells one inner minimum from another (the nearest
one, the best one, the worst one) is a matter of that space.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import optimistix as optx
from jaxtyping import Array, Bool, Int, PyTree, Scalar

from ._inner_solver import Projection
from ._linear_solver import Pseudoinverse, TruncatedCG
from ._linear_solver.truncated_cg import newton_direction
from ._misc import (
    nonzero,
    tree_axpy,
    tree_dot,
    tree_dtype,
    tree_norm,
    tree_scale,
    tree_size,
    tree_struct,
    tree_sub,
    tree_waves,
    tree_where,
)
from ._operators import (
    cross_derivative_operator,
    curved_tag,
    HessianAt,
    is_curved,
)
from ._problem import AbstractBilevelProblem, inner_gradient
from ._results import first_failure, RESULTS
from ._stationarity import Stationarity, stationarity


class SolutionSet(eqx.Module):
    """$S(x)$ around its point y, to second order."""

    problem: AbstractBilevelProblem
    x: PyTree[Array]
    y: PyTree[Array]
    # Where y is confined to a set, what that leaves of the gradient and of H.
    at: Stationarity
    linear_solver: lx.AbstractLinearSolver
    state: Any
    # Whether it is a plane: whether the inner Hessian does not depend on y.
    is_flat: bool = eqx.field(static=True)

    def __init__(
        self,
        problem: AbstractBilevelProblem,
        x: PyTree[Array],
        y: PyTree[Array],
        linear_solver: lx.AbstractLinearSolver = Pseudoinverse(),
    ):
        self.problem, self.x, self.y = problem, x, y
        self.is_flat = not is_curved(problem, x, y)
        tags = {lx.positive_semidefinite_tag} | (set() if self.is_flat else {curved_tag})
        self.at = stationarity(problem, x, y, tags)
        self.linear_solver = linear_solver
        # Factorised once, for all products with the pseudoinverse. Their derivatives
        # are lineax's, and do not go through the factors.
        dynamic, static = eqx.partition(self.hessian, eqx.is_array)
        fixed = eqx.combine(jax.lax.stop_gradient(dynamic), static)
        self.state = linear_solver.init(fixed, options={})

    @property
    def gradient(self) -> PyTree[Array]:
        return self.at.residual

    @property
    def hessian(self) -> lx.AbstractLinearOperator:
        return self.at.hessian

    def solve(self, vector: PyTree[Array]) -> tuple[PyTree[Array], RESULTS]:
        r"""$H^+ v$, and whether the solver found it."""
        solution = lx.linear_solve(
            self.hessian, vector, self.linear_solver, state=self.state, throw=False
        )
        failed = solution.result != lx.RESULTS.successful
        result = RESULTS.where(failed, RESULTS.linear_not_converged, RESULTS.successful)
        return solution.value, result

    def pinv(self, vector: PyTree[Array]) -> PyTree[Array]:
        r"""$H^+ v$."""
        return self.solve(vector)[0]

    def project(self, vector: PyTree[Array]) -> PyTree[Array]:
        r"""$P v = (I - H^+ H) v$, the part of a vector along $S(x)$."""
        return tree_sub(vector, self.pinv(self.hessian.mv(vector)))

    def pulled(self, multiplier: PyTree[Array]) -> Callable[[PyTree, PyTree], PyTree]:
        r"""$(x, y) \mapsto H(x, y)\, \mu$: the pull of the constraint $f_y = 0$."""

        def pull(x, y):
            def gradient(y):
                return inner_gradient(self.problem, x, y)

            return jax.jvp(gradient, (y,), (multiplier,))[1]

        return pull

    def lagrangian_hessian(
        self, objective: Callable[[PyTree], Scalar], multiplier: PyTree[Array]
    ) -> lx.AbstractLinearOperator:
        r"""$W = \phi_{yy} + \partial_y (H \mu)$, the curvature of an objective along
        $S(x)$, with the bend of $S(x)$ itself."""
        pull = self.pulled(multiplier)
        slope = jax.grad(objective)
        if self.is_flat:
            total = slope
        else:

            def total(y):
                return tree_axpy(1.0, pull(self.x, y), slope(y))

        _, product = jax.linearize(total, self.y)
        return lx.FunctionLinearOperator(product, tree_struct(self.y), lx.symmetric_tag)

    def along(self, operator: lx.AbstractLinearOperator) -> lx.AbstractLinearOperator:
        r"""$P W P$, a symmetric operator within the tangent space."""

        def product(vector):
            return self.project(operator.mv(self.project(vector)))

        return lx.FunctionLinearOperator(product, tree_struct(self.y), lx.symmetric_tag)

    def within(self, operator: lx.AbstractLinearOperator) -> lx.AbstractLinearOperator:
        r"""$P W P + I - P$: to solve with, for vectors in the tangent space.

        $P W P$ alone is zero across $S(x)$ up to rounding, and so is the vector: the
        quotient of the two would be anything. Where the minimum is unique, that is all
        there is.
        """

        def product(vector):
            along = self.project(vector)
            across = tree_sub(vector, along)
            return tree_axpy(1.0, self.project(operator.mv(along)), across)

        return lx.FunctionLinearOperator(product, tree_struct(self.y), lx.symmetric_tag)

    def accuracy(self, vector: PyTree[Array]) -> Scalar:
        r"""How far $q = H^+ v$ is from solving $H H q = H v$, relative to the size of
        $v$ and of $H$.

        Asked of $H$ itself, and not of the solver.
        """
        H = self.hessian
        remainder = tree_sub(H.mv(self.pinv(vector)), vector)
        # Not relative to H v alone: at an equilibrium v may lie in the null space.
        waves = tree_waves(vector)
        typical = tree_norm(H.mv(waves)) / tree_norm(waves)
        scale = typical * tree_norm(vector) + tree_norm(H.mv(vector))
        size = tree_norm(H.mv(remainder))
        return size / nonzero(scale)


#
# The point of S(x) at which an objective is least
#


class _Search(eqx.Module):
    y: PyTree[Array]
    num_steps: Int[Array, ""]
    done: Bool[Array, ""]


_RESTORATIONS = 30
_HALVINGS = 20


def select(
    problem: AbstractBilevelProblem,
    x: PyTree[Array],
    y: PyTree[Array],
    objective: Callable[[PyTree[Array]], Scalar],
    linear_solver: lx.AbstractLinearSolver,
    max_steps: int,
) -> tuple[PyTree[Array], Int[Array, ""]]:
    r"""Minimises an objective $\phi(y)$ within $S(x)$, from a point of it.

    Newton's method along $S(x)$: the step $d$ solves $P W P d = -P \phi_y$, by conjugate
    gradients, and what leaves $S(x)$ on the way is brought back by steps
    $-H^+ \nabla_y f$. One step is exact where $S(x)$ is a plane and $\phi$ quadratic.
    """
    eps = float(jnp.finfo(tree_dtype(y)).eps)
    value_and_slope = jax.value_and_grad(objective)

    def unfinished(search: _Search):
        return ~search.done

    def body(search: _Search) -> _Search:
        y = polished(problem, x, search.y)
        S = SolutionSet(problem, x, y, linear_solver)
        value, slope = value_and_slope(y)
        W = S.lagrangian_hessian(objective, tree_scale(-1, S.pinv(slope)))
        downhill = tree_scale(-1, S.project(slope))
        direction = newton_direction(S.within(W), downhill)
        direction = S.project(direction)
        expected = tree_dot(downhill, direction)
        t, new_y = _line_search(S, objective, value, direction, -expected)
        num_steps = search.num_steps + 1
        # At such a step rounding decides, and it was taken nonetheless: near the end
        # it squares the error.
        small = tree_norm(direction) <= 10 * eps * tree_norm(y)
        settled = expected <= eps * jnp.abs(value)
        # At a kink, which no tangent knows of, steps shrink and gain next to nothing.
        gained = value - objective(new_y)
        settled = settled | ((t < 1) & (gained <= 1e-3 * jnp.abs(value)))
        done = small | settled | (t == 0) | (num_steps >= max_steps)
        new_y = tree_where(small, y, new_y)
        return _Search(new_y, num_steps, done)

    search = _Search(y, jnp.array(0), jnp.array(False))
    search = jax.lax.while_loop(unfinished, body, search)
    return search.y, search.num_steps


def polished(problem, x, y: PyTree[Array]) -> PyTree[Array]:
    """A point of S(x) from one close to it. What a step along a curved S(x) leaves
    undone would pass for curvature, and hide that it is along S(x)."""
    if not is_curved(problem, x, y):
        return y

    def inner(y, args):
        return problem.inner(x, y)

    options = {"hessian": HessianAt(problem, x)}
    return optx.minimise(inner, Projection(), y, options=options, throw=False).value


def _line_search(S: SolutionSet, objective, value, direction, slope):
    """The first of 1, 1/2, ... whose step, brought back to S(x), descends; or none."""
    eps = jnp.finfo(value.dtype).eps
    slack = 10 * eps * jnp.abs(value)
    length = tree_norm(direction)
    at_start = tree_norm(S.gradient)

    def unfinished(carry):
        count, _, _, bad = carry
        return bad & (count < _HALVINGS)

    def halve(carry):
        count, t, _, _ = carry
        t = 0.5 * t
        y, astray = restore(S, tree_axpy(t, direction, S.y))
        bound = value + 1e-4 * (t * slope).astype(value.dtype)
        # Negated below, so that NaN is bad too.
        descends = objective(y) <= bound + slack
        gradient = tree_norm(inner_gradient(S.problem, S.x, y))
        back = (astray <= 1e-2 * t * length) | (gradient <= at_start)
        return count + 1, t, y, ~(descends & back)

    # Halved before it is tried: what is in the loop is compiled only once.
    carry = jnp.array(0), jnp.full_like(length, 2), S.y, jnp.array(True)
    _, t, y, bad = jax.lax.while_loop(unfinished, halve, carry)
    return jnp.where(bad, 0, t), tree_where(bad, S.y, y)


def restore(S: SolutionSet, y: PyTree[Array]) -> tuple[PyTree[Array], Scalar]:
    r"""Brings y back to $S(x)$ by steps $-H^+ \nabla_y f$, with the $H$ of `S`.

    Also returns the length of the last step, which says how far off it may still be.
    """
    eps = jnp.finfo(tree_dtype(y)).eps

    def unfinished(carry):
        count, y, length, before = carry
        contracts = length < 0.9 * before
        return contracts & (length > eps * tree_norm(y)) & (count < _RESTORATIONS)

    def body(carry):
        count, y, before, _ = carry
        step = S.pinv(inner_gradient(S.problem, S.x, y))
        length = tree_norm(step)
        # A step that is longer than the last leads away.
        y = tree_where(length < before, tree_sub(y, step), y)
        return count + 1, y, length, before

    largest = jnp.asarray(jnp.finfo(tree_dtype(y)).max, tree_dtype(y))
    carry = jnp.array(0), y, 0.5 * largest, largest
    _, y, length, _ = jax.lax.while_loop(unfinished, body, carry)
    return y, length


#
# How the nearest point moves with x
#


_WITHIN_STEPS = 200


class Displacement(eqx.Module):
    r"""The derivative of $x \mapsto \Pi(a, S(x))$, the inner minimum nearest to $a$.

    Differentiating the conditions of $\min \|y - a\|^2 / 2$ subject to
    $\nabla_y f(x, y) = 0$, which are $y - a + H \mu = 0$ with $\mu = -H^+ (y - a)$, and
    writing $W = I + \partial_y (H \mu)$ and $P$ for the projection on the null space of
    $H$:

    $$\dot y = n - (P W P)^+ P \bigl(W n + \partial_x (H \mu) \dot x - \dot a\bigr),
    \qquad n = -H^+ B \dot x.$$

    The second term lies in the null space, and $-H^+ B$ lacks it.
    """

    solutions: SolutionSet
    anchor: PyTree[Array]

    @property
    def multiplier(self) -> PyTree[Array]:
        return tree_scale(-1, self.solutions.pinv(self.travelled))

    @property
    def travelled(self) -> PyTree[Array]:
        return tree_sub(self.solutions.y, self.anchor)

    @property
    def astray(self) -> Scalar:
        """How much of the way was along S(x), and so for nothing; relative."""
        S = self.solutions
        way = tree_norm(self.travelled)
        return tree_norm(S.project(self.travelled)) / jnp.maximum(1, way)

    def _curvature(self, mu):
        """v -> d_y (H mu) v, or nothing if S(x) is a plane."""
        S = self.solutions
        pull = S.pulled(mu)
        if S.is_flat:
            return None
        return jax.linearize(lambda y: pull(S.x, y), S.y)[1]

    def _within(self, curvature, vector):
        """(P W P)^+ P v, and whether it was found."""
        S = self.solutions
        vector = S.project(vector)
        if curvature is None:
            return vector, RESULTS.successful

        def bent(v):
            return tree_axpy(1.0, curvature(v), v)

        W = lx.FunctionLinearOperator(bent, tree_struct(S.y), lx.symmetric_tag)
        # Close to the identity, so that a few steps are all it takes, in any dimension.
        solver = TruncatedCG(min(_WITHIN_STEPS, 2 * tree_size(vector) + 1))
        solve = lx.linear_solve(S.within(W), vector, solver, throw=False)
        failed = solve.result != lx.RESULTS.successful
        result = RESULTS.where(failed, RESULTS.linear_not_converged, RESULTS.successful)
        return S.project(solve.value), result

    def push(
        self, gradient_tangent: PyTree[Array], pull_tangent: PyTree[Array]
    ) -> PyTree[Array]:
        r"""$\dot y$, for $\partial (\nabla_y f)$ and $\partial (H \mu) - \dot a$ along
        the same tangent."""
        S = self.solutions
        curvature = self._curvature(self.multiplier)
        normal = tree_scale(-1, S.pinv(gradient_tangent))
        bend = pull_tangent
        if curvature is not None:
            bend = tree_axpy(1.0, curvature(normal), bend)
        tangential, _ = self._within(curvature, bend)
        return tree_sub(normal, tangential)

    def pull(self, u: PyTree[Array]) -> tuple[PyTree[Array], RESULTS]:
        r"""$J^\top u = -B^\top H^+ (u - W v) - \nabla_x \langle v, H \mu \rangle$ with
        $v = (P W P)^+ P u$."""
        S, mu = self.solutions, self.multiplier
        curvature = self._curvature(mu)
        v, result = self._within(curvature, u)
        bent = u if curvature is None else tree_sub(u, curvature(v))
        q, q_result = S.solve(bent)
        implicit = cross_derivative_operator(S.problem, S.x, S.y).T.mv(q)
        pull = S.pulled(mu)
        _, pull_x = jax.vjp(lambda x: pull(x, S.y), S.x)
        (null_space_term,) = pull_x(v)
        total = tree_axpy(1.0, implicit, null_space_term)
        return tree_scale(-1, total), first_failure(q_result, result)


def nearest_to(
    problem: AbstractBilevelProblem,
    x: PyTree[Array],
    y: PyTree[Array],
    anchor: PyTree[Array],
    linear_solver: lx.AbstractLinearSolver,
    max_steps: int,
) -> tuple[Displacement, Int[Array, ""]]:
    r"""$\Pi(a, S(x))$ from a point y of $S(x)$, what is known around it, and the number
    of steps that it took along $S(x)$."""
    if is_curved(problem, x, y):

        def half_square(y):
            way = tree_sub(y, anchor)
            return 0.5 * tree_dot(way, way)

        y, num_steps = select(problem, x, y, half_square, linear_solver, max_steps)
    else:
        # After a projection there is nothing to do; but y may be any minimum.
        S = SolutionSet(problem, x, y, linear_solver)
        y = tree_sub(y, S.project(tree_sub(y, anchor)))
        num_steps = jnp.array(0)
    S = SolutionSet(problem, x, y, linear_solver)
    return Displacement(S, anchor), num_steps
