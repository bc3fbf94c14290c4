"""The point of S(x) nearest to an anchor, and how it moves with x."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Int, PyTree, Scalar

from .._derivatives.second import cross_derivative_operator, is_curved
from .._failure.results import first_failure, RESULTS
from .._linear_solver.truncated_cg import TruncatedCG
from .._problem.base import AbstractBilevelProblem
from .._tree import (
    tree_axpy,
    tree_dot,
    tree_norm,
    tree_scale,
    tree_size,
    tree_struct,
    tree_sub,
)
from .search import select
from .tangent import SolutionSet


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
