r"""The set of inner minima, $S(x)$, near a point of it.

Where the inner Hessian $H$ has constant rank, $S(x)$ is a surface whose tangent space is
the null space of $H$. Everything that tells one inner minimum from another (the nearest
one, the best one, the worst one) is a matter of that space.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import lineax as lx
from jaxtyping import Array, PyTree, Scalar

from .._derivatives.first import inner_gradient
from .._derivatives.operators import curved_tag
from .._derivatives.second import is_curved
from .._failure.results import RESULTS
from .._linear_solver.pseudoinverse import Pseudoinverse
from .._problem.base import AbstractBilevelProblem
from .._tree import nonzero, tree_axpy, tree_norm, tree_struct, tree_sub, tree_waves
from .stationarity import Stationarity, stationarity


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
