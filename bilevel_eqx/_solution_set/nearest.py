"""The point of S(x) nearest to an anchor, and how it moves with x."""

from typing import NamedTuple

import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, Int, PyTree, Scalar

from .._derivatives.second import hessian_depends_on_y
from .._failure.results import finite_or_not, first_failure, RESULTS
from .._linalg.eigenbasis import Eigenbasis
from .._linear_solver.truncated_cg import TruncatedCG
from .._problem.base import AbstractBilevelProblem
from .._tree import tree_axpy, tree_scale, vector_norm, where
from .curvature import Curvatures, curvatures_along
from .picture import Adjoint, flat_picture, Picture, Push
from .search import select


_MOST_STEPS = 200


class Displacement(NamedTuple):
    r"""The derivative of $x \mapsto \Pi(a, S(x))$, the inner minimum nearest to $a$.

    Differentiating the conditions of $\min \|y - a\|^2 / 2$ subject to
    $\nabla_y f(x, y) = 0$, which are $y - a + H \mu = 0$ with $\mu = -H^+ (y - a)$, and
    writing $W = I + \partial_y (H \mu)$ and $P$ for the projection on the null space of
    $H$, gives

    $$\dot y = n - (P W P)^+ P \bigl(W n + \partial_x (H \mu) \dot x - \dot a\bigr),
    \qquad n = -H^+ B \dot x.$$

    The second term lies in the null space, and $-H^+ B$ lacks it.
    """

    picture: Picture
    anchor: Float[Array, " n"]

    @property
    def multiplier(self) -> Adjoint:
        """mu, and for a plane that is of a sum of squares its image."""
        negative = self.picture.adjoint(-self.displacement)
        plane = self.picture.is_plane
        return negative if plane else negative._replace(image=None)

    @property
    def displacement(self) -> Float[Array, " n"]:
        """y - a."""
        return self.picture.y - self.anchor

    @property
    def tangential_residual(self) -> Scalar:
        """The share of the displacement that lies along S(x). It is zero at the nearest
        point."""
        displacement = self.displacement
        size = jnp.maximum(1, vector_norm(displacement))
        return vector_norm(self.picture.project(displacement)) / size

    def _push(self) -> Push:
        r"""$v \mapsto (\partial_x \langle v, H \mu \rangle, W v)$."""
        mu, image, _ = self.multiplier
        curved = self.picture.curvature_of_set(mu, image)

        def push(v):
            pushed_x, pushed_y = curved(v)
            return pushed_x, v + pushed_y

        return push

    def _solve_within(self, push: Push, vector):
        """(P W P)^+ P v, and whether it was found."""
        here = self.picture
        vector = here.project(vector)
        if here.is_plane:
            return vector, RESULTS.successful
        W = here.within(lambda v: push(v)[1])
        # Close to the identity, so that a few steps are all it takes, in any dimension.
        most = min(_MOST_STEPS, 2 * vector.size + 1)
        solver = TruncatedCG(here.share_of_products(0.5, most))
        if here.differentiable:
            solve = lx.linear_solve(W, vector, solver, throw=False)
            value, failed = solve.value, solve.result != lx.RESULTS.successful
        else:
            value, result, _ = solver.compute((W, None), vector, {})
            failed = result != lx.RESULTS.successful
        result = RESULTS.where(failed, RESULTS.linear_not_converged, RESULTS.successful)
        return here.project(value), result

    def push(
        self, condition_tangent: PyTree[Array], pull_tangent: Float[Array, " n"]
    ) -> Float[Array, " n"]:
        r"""$\dot y$, for the derivatives of `Picture.condition` and of $H \mu - a$ along
        the same tangent."""
        push = self._push()
        normal = -self.picture.step_of(condition_tangent)
        change = push(normal)[1] + pull_tangent
        tangential, _ = self._solve_within(push, change)
        return normal - tangential

    def pull(self, u: Float[Array, " n"]) -> tuple[PyTree[Array], RESULTS]:
        r"""$J^\top u = -B^\top H^+ (u - W v) - \partial_x \langle v, H \mu \rangle$
        with $v = (P W P)^+ P u$."""
        here, push = self.picture, self._push()
        v, result = self._solve_within(push, u)
        null_space_term, Wv = push(v)
        q, image, q_result = here.adjoint(u - Wv)
        pulled = here.cross_transposed(q, image=image)
        total = tree_axpy(1.0, pulled, null_space_term)
        # The solvers are not to be blamed for what they are given.
        result = first_failure(finite_or_not(u), q_result, result)
        return tree_scale(-1, total), result

    def curvatures(
        self, u: Float[Array, " n"]
    ) -> tuple[Curvatures, tuple[Float[Array, " n"], PyTree[Array]]]:
        r"""The eigenvectors of $P W P$ in the tangent space; and the two parts of `pull`,
        $u - W v$ and $-\partial_x \langle v, H \mu \rangle$, by its eigenvectors.

        Beyond the dense size these are Ritz values in a Krylov space of $P u$.
        """
        here, push = self.picture, self._push()
        in_x, W = here.parts(push)
        along = here.project(u)
        if here.is_plane and not here.is_dense:
            # W is the identity, and all is along this vector.
            basis = Eigenbasis(jnp.ones(1, u.dtype), along[:, None])
            none = jnp.zeros((), u.dtype)
            return Curvatures(basis, none, none), (u - along, tree_scale(-1, in_x(along)))
        known = curvatures_along(here, W, along, 1.0)
        basis = known.basis
        curvatures = where(basis.values == 0, jnp.inf, basis.values)
        v = basis.combine(basis.coordinates(along) / curvatures, along)
        return known, (u - W.mv(v), tree_scale(-1, in_x(v)))


def nearest_to(
    problem: AbstractBilevelProblem,
    x: PyTree[Array],
    y: Float[Array, " n"],
    anchor: Float[Array, " n"],
    linear_solver: lx.AbstractLinearSolver,
    max_steps: int,
) -> tuple[Displacement, Int[Array, ""]]:
    r"""$\Pi(a, S(x))$ from a point y of $S(x)$, what is known around it, and the number
    of steps that it took along $S(x)$."""
    if hessian_depends_on_y(problem, x, y):

        def half_square(y):
            return 0.5 * jnp.sum((y - anchor) ** 2)

        here, num_steps = select(problem, x, y, half_square, linear_solver, max_steps)
    else:
        # After a projection there is nothing to do; but y may be any minimum.
        there = flat_picture(problem, x, y, linear_solver)
        here = there.moved(y - there.project(y - anchor))
        num_steps = jnp.array(0)
    return Displacement(here, anchor), num_steps
