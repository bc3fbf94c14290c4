"""A problem with its inner variables and its residual as vectors."""

import equinox as eqx
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._tree import Layout
from .base import AbstractBilevelProblem
from .constraints import set_y
from .least_squares import AbstractLeastSquaresProblem
from .root import AbstractRootProblem


class _FlatProjection(eqx.Module):
    """The projection of a problem, on vectors."""

    problem: AbstractBilevelProblem
    layout: Layout = eqx.field(static=True)

    def __call__(self, v):
        # By the set, and not by `project_y`: the set knows which type that needs, and the
        # layout has only those of y.
        projected = set_y(self.problem).project(self.layout.unravel(v))
        return self.layout.ravel(projected)


def _flat_projection(problem, layout: Layout):
    confines = set_y(problem).confines
    return _FlatProjection(problem, layout) if confines else None


class _Flat(AbstractBilevelProblem):
    """What a problem whose inner variables are one vector has of the original one."""

    problem: eqx.AbstractVar[AbstractBilevelProblem]
    layout: eqx.AbstractVar[Layout]

    @property
    def project_x(self):
        return self.problem.project_x

    @property
    def project_y(self):
        return _flat_projection(self.problem, self.layout)

    def outer(self, x, y):
        return self.problem.outer(x, self.layout.unravel(y))


class _FlatProblem(_Flat):
    problem: AbstractBilevelProblem
    layout: Layout = eqx.field(static=True)

    def inner(self, x, y):
        return self.problem.inner(x, self.layout.unravel(y))


class _FlatLeastSquaresProblem(_Flat, AbstractLeastSquaresProblem):
    problem: AbstractLeastSquaresProblem
    layout: Layout = eqx.field(static=True)

    def inner_residual(self, x, y):
        residual = self.problem.inner_residual(x, self.layout.unravel(y))
        return Layout(residual).ravel(residual)


class _FlatRootProblem(_Flat, AbstractRootProblem):
    problem: AbstractRootProblem
    layout: Layout = eqx.field(static=True)

    def root(self, x, y):
        return self.layout.ravel(self.problem.root(x, self.layout.unravel(y)))


class AsItIs:
    """The layout of variables that stay a pytree."""

    def __init__(self, tree: PyTree):
        del tree

    def ravel(self, tree: PyTree) -> PyTree:
        """The same."""
        return tree

    def unravel(self, flat: PyTree) -> PyTree:
        """The same."""
        return flat


def flat_if_uniform(
    problem: AbstractBilevelProblem, y: PyTree, keeps_shapes: bool = False
) -> tuple[AbstractBilevelProblem, Layout | AsItIs]:
    """`flat`, unless the leaves of y have several types or are to keep their shapes.

    Computations with one vector would not know the rounding of the narrowest type.
    """
    types = {leaf.dtype for leaf in jtu.tree_leaves(y)}
    one = len(types) == 1 and not keeps_shapes
    return flat(problem, y) if one else (problem, AsItIs(y))


def flat(
    problem: AbstractBilevelProblem, y: PyTree
) -> tuple[AbstractBilevelProblem, Layout]:
    """`problem` for inner variables in one vector, and the layout of `y` in it."""
    layout = Layout(y)
    if isinstance(problem, AbstractLeastSquaresProblem):
        return _FlatLeastSquaresProblem(problem, layout), layout
    if isinstance(problem, AbstractRootProblem):
        return _FlatRootProblem(problem, layout), layout
    return _FlatProblem(problem, layout), layout
