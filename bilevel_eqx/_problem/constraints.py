r"""The sets that the variables live in: the whole space, or a convex set.

A minimum of $\phi$ in a convex set with the projection $\Pi$ is a fixed point of a
projected gradient step of any size, $v = \Pi(v - t \nabla \phi(v))$. Let
$D = \partial \Pi$ there, which is symmetric with eigenvalues between 0 and 1, and let H
be the Hessian of $\phi$. The derivative of that condition is

$$(I - D + t D H)\, \mathrm d v = -t D\, \mathrm d(\nabla \phi), \qquad\text{so that}
\qquad \mathrm d v = -D K^+ D\, \mathrm d(\nabla \phi), \quad
K = D H D + \tfrac1t (D - D^2).$$

If the set is a polyhedron, D projects on the face that v lies in, K is the Hessian on
that face, and the last term vanishes. Otherwise that term is the curvature of the
boundary times the multiplier. Without constraints D is the identity and K is H.
"""

import abc
import contextlib
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, PyTree, Scalar

from .._compat import is_traced, may_capture
from .._tree import (
    nonzero,
    tree_arrays,
    tree_axpy,
    tree_cast,
    tree_dot,
    tree_eps,
    tree_joined,
    tree_materialised,
    tree_norm,
    tree_rest,
    tree_scale,
    tree_struct,
    tree_sub,
    where,
)
from .base import AbstractBilevelProblem


class Stationarity(eqx.Module):
    """The first-order condition of a minimum in a set, linearised at a point."""

    residual: PyTree[Array]
    """The gradient. In a convex set: v minus the end of a projected gradient step from v,
    divided by the step size."""
    hessian: lx.AbstractLinearOperator
    """K."""
    free_hessian: lx.AbstractLinearOperator
    """H."""
    step_size: Scalar
    """t."""
    _tangent: lx.AbstractLinearOperator | None
    """D; `None` is the identity."""
    _rounding: Scalar | None = None
    """What a projected gradient step from v may move by without a reason."""

    def along(self, vector: PyTree[Array]) -> PyTree[Array]:
        """D applied to a vector."""
        return vector if self._tangent is None else self._tangent.mv(vector)

    def applied_to(self, operator: lx.AbstractLinearOperator):
        """D times an operator."""
        return operator if self._tangent is None else self._tangent @ operator

    def distance(self) -> Scalar:
        """That of the solution along the residual, if H does not depend on y."""
        g = self.residual
        Hg = self.free_hessian.mv(g)
        if self._tangent is not None:
            # The derivative of the residual is (I - D) / t + D H.
            across = tree_sub(g, self.along(g))
            Hg = tree_axpy(1 / self.step_size, across, self.along(Hg))
        gg = tree_dot(g, g)
        if lx.is_symmetric(self.free_hessian):
            curvature = jnp.abs(tree_dot(g, Hg))
        else:
            # The Jacobian of a root may turn the residual by a right angle.
            curvature = jnp.sqrt(gg * tree_dot(Hg, Hg))
        distance = gg / nonzero(curvature) * jnp.sqrt(gg)
        distance = where((curvature == 0) & (gg != 0), jnp.inf, distance)
        if self._rounding is None:
            return distance
        # The two products above may be of different residuals, if these are rounding:
        # XLA computes one more than once, and not always in the same way.
        step = self.step_size * jnp.sqrt(gg)
        return where(step <= self._rounding, step, distance)

    def definite_hessian(self) -> lx.AbstractLinearOperator:
        """K where v can move, and 1/t across the face, where it cannot."""
        D = self._tangent
        if D is None:
            return self.hessian

        def mv(vector):
            across = tree_sub(vector, D.mv(vector))
            across = tree_sub(across, D.mv(across))
            return tree_axpy(1 / self.step_size, across, self.hessian.mv(vector))

        return lx.FunctionLinearOperator(
            mv, self.hessian.in_structure(), lx.symmetric_tag
        )


class AbstractSet(eqx.Module):
    """A closed convex set that variables live in."""

    confines: eqx.AbstractClassVar[bool]
    """Whether it is smaller than the whole space."""

    @abc.abstractmethod
    def project(self, point: PyTree[Array]) -> PyTree[Array]:
        """The nearest point of the set."""

    @abc.abstractmethod
    def remaining_step(self, gradient: PyTree[Array], at: PyTree[Array]) -> PyTree[Array]:
        r"""The projected gradient step $v - \Pi(v - \nabla\phi(v))$.

        Without constraints it is the gradient. It is zero iff v is stationary.
        """

    @abc.abstractmethod
    def stationarity(
        self,
        gradient: PyTree[Array],
        hessian: lx.AbstractLinearOperator,
        at: PyTree[Array],
        tags: Any = (),
    ) -> Stationarity:
        """The gradient and the Hessian at a point, restricted to the set."""

    @abc.abstractmethod
    def minimum_tangent(
        self,
        at: Stationarity,
        y: PyTree[Array],
        gradient: Callable[[Any, PyTree], PyTree],
        primals: tuple[Any, PyTree],
        tangents: tuple[Any, PyTree],
        solve: Callable[[PyTree], PyTree],
    ) -> PyTree[Array]:
        r"""$\mathrm d y$ of an inner minimum y, for tangents of `(problem, x)`.

        `gradient(problem, x)` is $\nabla_y f$ at y, and `solve` applies $K^+$.
        """


class Unconstrained(AbstractSet):
    """The whole space."""

    confines: ClassVar[bool] = False

    def project(self, point):
        return point

    def remaining_step(self, gradient, at):
        return gradient

    def stationarity(self, gradient, hessian, at, tags=()):
        return Stationarity(gradient, hessian, hessian, jnp.ones(()), None)

    def minimum_tangent(self, at, y, gradient, primals, tangents, solve):
        _, moved = eqx.filter_jvp(gradient, primals, tangents)
        return tree_scale(-1, solve(moved))


class Convex(AbstractSet):
    """A convex set, given by the projection on it."""

    fn: Callable

    confines: ClassVar[bool] = True

    def project(self, point):
        return _projected(self._hoisted(point), point)

    def _hoisted(self, point) -> "Convex":
        """This set, with what the projection closes over as leaves, if a derivative can
        be asked for with respect to it. The rule below sees only its arguments, and would
        take zero."""
        if not may_capture(self.fn):
            return self
        rest = tree_rest(self)

        def raw(arrays, point):
            return tree_joined(arrays, rest).raw(point)

        program = jax.make_jaxpr(raw)(tree_arrays(self), point)
        if not any(map(is_traced, program.consts)):
            return self
        with _allowed():
            return Convex(eqx.filter_closure_convert(self.fn, _widest(point)))

    def remaining_step(self, gradient, at):
        return tree_sub(at, self.project(tree_sub(at, gradient)))

    def stationarity(self, gradient, hessian, at, tags=()):
        t = _step_size(self, gradient, hessian, at)
        moved, push = jax.linearize(self.project, tree_axpy(-t, gradient, at))
        D = lx.FunctionLinearOperator(push, tree_struct(at), lx.symmetric_tag)

        def reduced(vector):
            along = D.mv(vector)
            across = tree_sub(vector, along)
            return D.mv(tree_axpy(1 / t, across, hessian.mv(along)))

        # Symmetric, and positive semidefinite if H is.
        tags = frozenset(tags) | {lx.symmetric_tag}
        K = lx.FunctionLinearOperator(reduced, hessian.in_structure(), tags)
        residual = tree_scale(1 / t, tree_sub(at, moved))
        rounding = 10 * tree_eps(at) * tree_norm(at)
        return Stationarity(residual, K, hessian, t, D, rounding)

    def minimum_tangent(self, at, y, gradient, primals, tangents, solve):
        t = at.step_size

        def step(problem, x):
            return set_y(problem).project(tree_axpy(-t, gradient(problem, x), y))

        # The set may depend on the leaves of the problem, and then y moves with it.
        _, moved = eqx.filter_jvp(step, primals, tangents)
        moved = tree_materialised(moved, y)
        left = tree_axpy(-1, at.free_hessian.mv(moved), tree_scale(1 / t, moved))
        return tree_axpy(1, at.along(solve(at.along(left))), moved)

    def raw(self, point):
        """The user's projection, in the widest type.

        The projections of optax need dtype promotion, which the user may have forbidden,
        and their derivative rules need the widest type.
        """
        with _allowed():
            return self.fn(_widest(point))


@contextlib.contextmanager
def _allowed():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def _widest(point: PyTree[Array]) -> PyTree[Array]:
    widest = jax.dtypes.canonicalize_dtype(float)
    return jtu.tree_map(lambda u: u.astype(widest), point)


# A derivative rule around that of the projection: JAX traces the latter later, and it
# needs the same casts then.
@eqx.filter_custom_jvp
def _projected(convex: Convex, point: PyTree[Array]) -> PyTree[Array]:
    return tree_cast(convex.raw(point), point)


@_projected.def_jvp
def _projected_jvp(primals, tangents):
    def cast(convex, point):
        return tree_cast(convex.raw(point), point)

    return eqx.filter_jvp(cast, primals, tangents)


def _step_size(
    convex: Convex,
    gradient: PyTree[Array],
    hessian: lx.AbstractLinearOperator,
    at: PyTree[Array],
) -> Scalar:
    """That of steepest descent, along what a projection leaves of the step.

    The derivative depends on it only by rounding.

    Along the whole gradient it would be as long as one likes: most of a gradient may be
    the multiplier of a bound, and H may vanish there. What is free, and stationary but
    for rounding, would then be moved far away. Nor is a step longer than the variables:
    where H vanishes altogether, nothing else has their units.
    """
    gradient, at = jax.lax.stop_gradient((gradient, at))
    size, slope = tree_norm(at), tree_norm(gradient)
    most = where((size == 0) | (slope == 0), jnp.inf, size / nonzero(slope))

    def along(direction, otherwise):
        curvature = jnp.abs(tree_dot(direction, hessian.mv(direction)))
        square = tree_dot(direction, direction)
        t = jnp.minimum(square / nonzero(curvature), most)
        known = (curvature != 0) & (square != 0) & jnp.isfinite(t)
        return where(known, t, otherwise)

    t = along(gradient, where(jnp.isfinite(most), most, 1))
    left = convex.remaining_step(tree_scale(t, gradient), at)
    return jax.lax.stop_gradient(along(left, t))


def _set(projection: Callable | None) -> AbstractSet:
    return Unconstrained() if projection is None else Convex(projection)


def set_x(problem: AbstractBilevelProblem) -> AbstractSet:
    """The set that x lives in."""
    return _set(problem.project_x)


def set_y(problem: AbstractBilevelProblem) -> AbstractSet:
    """The set that y lives in."""
    return _set(problem.project_y)
