"""Second derivatives of the inner objective, as lineax operators."""

from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, PyTree, Scalar

from .._depends_on import depends_on
from .._problem.base import AbstractBilevelProblem
from .._problem.least_squares import AbstractLeastSquaresProblem
from .._problem.root import AbstractRootProblem
from .._tree import tree_struct
from .first import inner_gradient
from .operators import CrossDerivative, LeastSquaresHessian


def _linearised(fn, at: PyTree[Array], tags: Iterable[object] = ()):
    """`fn(at)`, and the Jacobian of `fn` there, from one linearisation."""
    value, tangent_map = jax.linearize(fn, at)
    return value, lx.FunctionLinearOperator(tangent_map, tree_struct(at), tags)


class _Component(eqx.Module):
    """One of the values of a function. A module, so that it may leave a program."""

    fn: Callable
    index: int

    def __call__(self, argument):
        return self.fn(argument)[self.index]


def value_gradient_and_product(
    fn: Callable[[PyTree[Array]], Scalar], at: PyTree[Array]
) -> tuple[Scalar, PyTree[Array], Callable[[PyTree[Array]], PyTree[Array]]]:
    """A function's value, its gradient, and the products with its Hessian, from one
    linearisation."""

    def gradient_and_value(at):
        value, gradient = jax.value_and_grad(fn)(at)
        return gradient, value

    # The value is not linearised: JAX cannot where a function has a rule for reverse mode
    # alone (`jax.custom_vjp`), and nobody asks for it.
    gradient, product, value = jax.linearize(gradient_and_value, at, has_aux=True)
    return value, gradient, product


def gradient_and_hessian(
    problem: AbstractBilevelProblem, x: PyTree[Array], y: PyTree[Array], tags: Any = ()
) -> tuple[PyTree[Array], lx.AbstractLinearOperator]:
    """The inner gradient, which linearising it yields anyway, and the inner Hessian."""
    gradient, hessian, _ = expansion(problem, x, y, tags)
    return gradient, hessian


def expansion(
    problem: AbstractBilevelProblem, x: PyTree[Array], y: PyTree[Array], tags: Any = ()
) -> tuple[PyTree[Array], lx.AbstractLinearOperator, Callable[[PyTree], PyTree]]:
    r"""f_y, H and the map $q \mapsto B^\top q$, from one linearisation in y.

    For a root they are r, dr/dy and $q \mapsto (\partial r / \partial x)^\top q$.
    """
    if isinstance(problem, AbstractRootProblem):
        residual, jacobian = _linearised(lambda y: problem.root(x, y), y, tags)
        _, pull = jax.vjp(lambda x: problem.root(x, y), x)
        return residual, jacobian, _Component(pull, 0)
    # `positive_semidefinite_tag` alone does not make an operator symmetric to lineax.
    tags = frozenset(tags) | {lx.symmetric_tag}

    def gradients(y):
        return jax.grad(problem.inner, argnums=(1, 0))(x, y)

    (gradient, _), push = jax.linearize(gradients, y)
    hessian = lx.FunctionLinearOperator(_Component(push, 0), tree_struct(y), tags)
    if isinstance(problem, AbstractLeastSquaresProblem):
        _, jacobian = _linearised(lambda y: problem.inner_residual(x, y), y)
        hessian = LeastSquaresHessian(
            hessian, jacobian, _is_curved_residual(problem, x, y)
        )
    return gradient, hessian, _Component(push, 1)


def gauss_newton_hessian(
    problem: AbstractLeastSquaresProblem, x: PyTree[Array], y: PyTree[Array]
) -> LeastSquaresHessian:
    r"""$A^\top A$: the inner Hessian without the curvature of the residual."""
    _, jacobian = _linearised(lambda y: problem.inner_residual(x, y), y)
    tags = {lx.symmetric_tag, lx.positive_semidefinite_tag}
    hessian = lx.TaggedLinearOperator(jacobian.T @ jacobian, tags)
    return LeastSquaresHessian(hessian, jacobian, curved=False)


def hessian_depends_on_y(
    problem: AbstractBilevelProblem, x: PyTree[Array], y: PyTree[Array]
) -> bool:
    """Whether the inner Hessian depends on y, so that S(x) need not be a plane."""
    return depends_on(lambda y: _hessian_times_ones(problem, x, y), y)


def hessian_depends_on_x(
    problem: AbstractBilevelProblem, x: PyTree[Array], y: PyTree[Array]
) -> bool:
    """Whether the inner Hessian depends on x, so that its null space may too."""
    return depends_on(lambda x: _hessian_times_ones(problem, x, y), x)


def _hessian_times_ones(problem, x, y):
    ones = jax.tree.map(jnp.ones_like, y)
    # Not `jax.jvp`: JAX cannot take its second derivative if an objective has a
    # `jax.custom_vjp`.
    return jax.linearize(lambda y: inner_gradient(problem, x, y), y)[1](ones)


class HessianAt(eqx.Module):
    """y -> the Hessian for a Newton step; for a sum of squares, that of Gauss-Newton."""

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
