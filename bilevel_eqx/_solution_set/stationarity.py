r"""What an inner minimum is, to first order, and how it moves: with constraints or not.

A minimum of f in a convex set with the projection $\Pi$ is a fixed point of a projected
gradient step of any size, $y = \Pi(y - t \nabla_y f(x, y))$. With $D = \partial \Pi$
there, which is symmetric with eigenvalues between 0 and 1, its derivative is

$$(I - D + t D H)\, \mathrm d y = -t D B\, \mathrm d x, \qquad\text{so that}\qquad
\mathrm d y = -D K^+ D B\, \mathrm d x, \quad K = D H D + \tfrac1t (D - D^2).$$

Where the set is a polyhedron D projects on the face that y lies in, K is the Hessian
there, and the last term vanishes; elsewhere that term is the curvature of the boundary,
times the multiplier. Without constraints D is the identity and K is H.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, PyTree, Scalar

from .._derivatives.second import gradient_and_hessian
from .._problem.base import AbstractBilevelProblem
from .._problem.constraints import projection_y
from .._tree import (
    nonzero,
    tree_axpy,
    tree_dot,
    tree_norm,
    tree_scale,
    tree_struct,
    tree_sub,
)


class Stationarity(eqx.Module):
    """The first-order condition of the inner problem at a point, linearised."""

    residual: PyTree[Array]
    """The inner gradient; with constraints the step to the projected gradient step's end,
    divided by its size."""
    hessian: lx.AbstractLinearOperator
    """K."""
    tangent: lx.AbstractLinearOperator | None
    """D, or `None` where there are no constraints."""
    free_hessian: lx.AbstractLinearOperator
    """H."""
    step_size: Scalar
    """t."""

    def along(self, vector: PyTree[Array]) -> PyTree[Array]:
        """D applied to a vector."""
        return vector if self.tangent is None else self.tangent.mv(vector)

    def cross(self, derivative: lx.AbstractLinearOperator) -> lx.AbstractLinearOperator:
        """D B."""
        return derivative if self.tangent is None else self.tangent @ derivative

    def stiffened(self) -> lx.AbstractLinearOperator:
        """K, and across the face, where it is zero and y does not move, one over t."""
        D = self.tangent
        if D is None:
            return self.hessian

        def mv(vector):
            across = tree_sub(vector, D.mv(vector))
            across = tree_sub(across, D.mv(across))
            return tree_axpy(1 / self.step_size, across, self.hessian.mv(vector))

        return lx.FunctionLinearOperator(
            mv, self.hessian.in_structure(), lx.symmetric_tag
        )


def stationarity(
    problem: AbstractBilevelProblem,
    x: PyTree[Array],
    y: PyTree[Array],
    tags: Any = (),
) -> Stationarity:
    """The first-order condition of the inner problem at (x, y)."""
    gradient, H = gradient_and_hessian(problem, x, y, tags)
    project = projection_y(problem)
    if project is None:
        return Stationarity(gradient, H, None, H, jnp.ones(()))
    residual, K, D, t = confined(gradient, H, y, project, tags)
    return Stationarity(residual, K, D, H, t)


class Confined(NamedTuple):
    """The first two derivatives of an objective in a set: what is left of them there."""

    residual: PyTree[Array]
    hessian: lx.AbstractLinearOperator
    tangent: lx.AbstractLinearOperator
    step_size: Scalar


def confined(
    gradient: PyTree[Array],
    hessian: lx.AbstractLinearOperator,
    at: PyTree[Array],
    project: Callable[[PyTree], PyTree],
    tags: Any = (),
) -> Confined:
    """What a set, known by the projection on it, leaves of a gradient and a Hessian."""
    t = _step_size(gradient, hessian)
    moved, push = jax.linearize(project, tree_axpy(-t, gradient, at))
    D = lx.FunctionLinearOperator(push, tree_struct(at), lx.symmetric_tag)
    residual = tree_scale(1 / t, tree_sub(at, moved))
    return Confined(residual, _reduced(hessian, D, t, tags), D, t)


def _step_size(gradient: PyTree[Array], hessian: lx.AbstractLinearOperator) -> Scalar:
    """That of steepest descent. The derivative does not depend on it; rounding does."""
    gradient = jax.lax.stop_gradient(gradient)
    curvature = jnp.abs(tree_dot(gradient, hessian.mv(gradient)))
    square = tree_dot(gradient, gradient)
    t = jnp.where(curvature == 0, 1, square / nonzero(curvature))
    return jax.lax.stop_gradient(jnp.where(tree_norm(gradient) == 0, 1, t))


def _reduced(H, D, t, tags) -> lx.AbstractLinearOperator:
    """K, which is symmetric, and positive semidefinite where H is."""

    def mv(vector):
        along = D.mv(vector)
        bent = tree_sub(vector, along)
        return D.mv(tree_axpy(1 / t, bent, H.mv(along)))

    return lx.FunctionLinearOperator(
        mv, H.in_structure(), frozenset(tags) | {lx.symmetric_tag}
    )
