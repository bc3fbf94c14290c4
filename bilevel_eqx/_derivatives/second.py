"""Second derivatives of the inner objective, as lineax operators."""

from collections.abc import Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, PyTree

from .._depends_on import depends_on
from .._problem.base import AbstractBilevelProblem
from .._problem.least_squares import AbstractLeastSquaresProblem
from .._tree import tree_struct
from .first import inner_gradient
from .operators import CrossDerivative, LeastSquaresHessian


def _linearised(fn, at: PyTree[Array], tags: Iterable[object] = ()):
    """`fn(at)`, and the Jacobian of `fn` there, from one linearisation."""
    value, tangent_map = jax.linearize(fn, at)
    return value, lx.FunctionLinearOperator(tangent_map, tree_struct(at), tags)


def gradient_and_hessian(
    problem: AbstractBilevelProblem, x: PyTree[Array], y: PyTree[Array], tags: Any = ()
) -> tuple[PyTree[Array], lx.AbstractLinearOperator]:
    """The inner gradient, which linearising it yields anyway, and the inner Hessian."""
    # `positive_semidefinite_tag` alone does not make an operator symmetric to lineax.
    tags = frozenset(tags) | {lx.symmetric_tag}
    gradient, hessian = _linearised(lambda y: inner_gradient(problem, x, y), y, tags)
    if isinstance(problem, AbstractLeastSquaresProblem):
        _, jacobian = _linearised(lambda y: problem.inner_residual(x, y), y)
        hessian = LeastSquaresHessian(
            hessian, jacobian, _is_curved_residual(problem, x, y)
        )
    return gradient, hessian


def gauss_newton_hessian(
    problem: AbstractLeastSquaresProblem, x: PyTree[Array], y: PyTree[Array]
) -> LeastSquaresHessian:
    r"""$A^\top A$: the inner Hessian without the curvature of the residual."""
    _, jacobian = _linearised(lambda y: problem.inner_residual(x, y), y)
    tags = {lx.symmetric_tag, lx.positive_semidefinite_tag}
    hessian = lx.TaggedLinearOperator(jacobian.T @ jacobian, tags)
    return LeastSquaresHessian(hessian, jacobian, curved=False)


def is_curved(
    problem: AbstractBilevelProblem, x: PyTree[Array], y: PyTree[Array]
) -> bool:
    """Whether the inner Hessian depends on y, so that S(x) need not be a plane."""
    return depends_on(lambda y: _hessian_times_ones(problem, x, y), y)


def is_turning(
    problem: AbstractBilevelProblem, x: PyTree[Array], y: PyTree[Array]
) -> bool:
    """Whether the inner Hessian depends on x, so that S(x) may turn where x moves."""
    return depends_on(lambda x: _hessian_times_ones(problem, x, y), x)


def _hessian_times_ones(problem, x, y):
    ones = jax.tree.map(jnp.ones_like, y)
    return jax.jvp(lambda y: inner_gradient(problem, x, y), (y,), (ones,))[1]


class HessianAt(eqx.Module):
    """y -> the Hessian for a Newton step: Gauss and Newton's, for a sum of squares."""

    problem: AbstractBilevelProblem
    x: PyTree[Array]

    def __call__(self, y: PyTree[Array]) -> lx.AbstractLinearOperator:
        if isinstance(self.problem, AbstractLeastSquaresProblem):
            return gauss_newton_hessian(self.problem, self.x, y)
        return gradient_and_hessian(self.problem, self.x, y)[1]


def _is_curved_residual(problem, x, y):
    def jacobian_times_ones(y):
        ones = jax.tree.map(jnp.ones_like, y)
        return jax.jvp(lambda y: problem.inner_residual(x, y), (y,), (ones,))[1]

    return depends_on(jacobian_times_ones, y)


def cross_derivative_operator(
    problem: AbstractBilevelProblem, x: PyTree[Array], y: PyTree[Array]
) -> lx.AbstractLinearOperator:
    """B, without the checks of the public function."""
    return CrossDerivative(_linearised(lambda x: inner_gradient(problem, x, y), x)[1])
