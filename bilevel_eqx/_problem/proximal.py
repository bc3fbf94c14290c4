"""The inner problem with a pull towards an anchor."""

import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree, ScalarLike

from .._linalg.power_iteration import DENSE_SIZE
from .._tree import tree_dot, tree_size, tree_sub
from .base import AbstractBilevelProblem
from .least_squares import AbstractLeastSquaresProblem
from .root import check_has_objective


class _ProximalProblem(AbstractBilevelProblem):
    problem: AbstractBilevelProblem
    anchor: PyTree[Array]
    epsilon: ScalarLike

    @property
    def project_x(self):
        return self.problem.project_x

    @property
    def project_y(self):
        return self.problem.project_y

    def outer(self, x, y):
        return self.problem.outer(x, y)

    def inner(self, x, y):
        displacement = tree_sub(y, self.anchor)
        square = tree_dot(displacement, displacement)
        inner = self.problem.inner(x, y)
        epsilon = jnp.asarray(self.epsilon, inner.dtype)
        return inner + 0.5 * epsilon * square.astype(inner.dtype)


class _ProximalLeastSquaresProblem(AbstractLeastSquaresProblem):
    problem: AbstractLeastSquaresProblem
    anchor: PyTree[Array]
    epsilon: ScalarLike

    @property
    def project_x(self):
        return self.problem.project_x

    @property
    def project_y(self):
        return self.problem.project_y

    def outer(self, x, y):
        return self.problem.outer(x, y)

    def inner_residual(self, x, y):
        root = jnp.sqrt(jnp.asarray(self.epsilon))
        displacement = tree_sub(y, self.anchor)
        pull = jtu.tree_map(lambda d: root.astype(d.dtype) * d, displacement)
        return self.problem.inner_residual(x, y), pull


def proximal(
    problem: AbstractBilevelProblem, anchor: PyTree[Array], epsilon: ScalarLike
) -> AbstractBilevelProblem:
    r"""`problem` with the inner objective $f(x, y) + \frac\epsilon2 \|y - a\|^2$.

    (Equation 3 of the paper. A small sum of squares stays a sum of squares.)
    """
    check_has_objective(
        problem,
        "`Proximal`, and so `WarmStart(epsilon)`,",
        "Use `Implicit` and a full warm start, `WarmStart()`.",
    )
    # The pull adds one square for each variable. If there are too many variables for a
    # dense factor, these squares bring no gain: the damped Hessian is well conditioned.
    is_small = tree_size(anchor) <= DENSE_SIZE
    if isinstance(problem, AbstractLeastSquaresProblem) and is_small:
        return _ProximalLeastSquaresProblem(problem, anchor, epsilon)
    return _ProximalProblem(problem, anchor, epsilon)
