"""The sets that the variables are confined to."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._tree import tree_cast, tree_sub
from .base import AbstractBilevelProblem


class _Projection(eqx.Module):
    """A projection that keeps types, whatever the one given relies on.

    Those of optax rely on promotion, which the user's own code may have forbidden, and in
    their derivative rules on the widest type. Hence a rule around theirs: it is traced
    later, wherever derivatives are, and takes the same care there.
    """

    fn: Callable

    def __call__(self, point):
        return _projected(self, point)

    def raw(self, point):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            widest = jax.dtypes.canonicalize_dtype(float)
            return self.fn(jtu.tree_map(lambda u: u.astype(widest), point))


@eqx.filter_custom_jvp
def _projected(projection: _Projection, point: PyTree[Array]) -> PyTree[Array]:
    return tree_cast(projection.raw(point), point)


@_projected.def_jvp
def _projected_jvp(primals, tangents):
    def cast(projection, point):
        return tree_cast(projection.raw(point), point)

    return eqx.filter_jvp(cast, primals, tangents)


def projection_x(problem: AbstractBilevelProblem) -> Callable[[PyTree], PyTree] | None:
    """The projection on the set that x is confined to, or `None`; it keeps types."""
    return None if problem.project_x is None else _Projection(problem.project_x)


def projection_y(problem: AbstractBilevelProblem) -> Callable[[PyTree], PyTree] | None:
    """The same for y."""
    return None if problem.project_y is None else _Projection(problem.project_y)


def step_left(
    gradient: PyTree[Array],
    at: PyTree[Array],
    project: Callable[[PyTree], PyTree] | None,
) -> PyTree[Array]:
    r"""The step that a projected descent would take, $v - \Pi(v - \nabla\phi(v))$: the
    gradient, less what the constraints take from it. Zero iff v is stationary."""
    if project is None:
        return gradient
    return tree_sub(at, project(tree_sub(at, gradient)))
