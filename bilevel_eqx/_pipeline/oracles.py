"""The derivatives that one step of a single loop asks for."""

from typing import NamedTuple

import equinox as eqx
import jax
from jaxtyping import Array, Int, PRNGKeyArray, PyTree, Scalar, ScalarLike

from .._derivatives.first import outer_gradients
from .._problem.base import AbstractBilevelProblem
from .._problem.batches import Batches
from .._problem.finite_sum import Level
from .._tree import tree_axpy


class LoopPoint(NamedTuple):
    """Where a single loop is: x, y and the adjoint v."""

    x: PyTree[Array]
    y: PyTree[Array]
    v: PyTree[Array]


class InnerTerms(NamedTuple):
    """Of the inner objective: f_y, f_yy v and f_xy v."""

    slope: PyTree[Array]
    product: PyTree[Array]
    cross: PyTree[Array]


class OuterTerms(NamedTuple):
    """Of the outer objective: F_y and F_x."""

    y: PyTree[Array]
    x: PyTree[Array]


class Terms(NamedTuple):
    """All that is computed on one pair of batches."""

    inner: InnerTerms
    outer: OuterTerms
    inner_value: Scalar
    outer_value: Scalar


class Directions(NamedTuple):
    """Those that y, v and x move against."""

    y: PyTree[Array]
    v: PyTree[Array]
    x: PyTree[Array]


def terms_of(problem: AbstractBilevelProblem, point: LoopPoint) -> Terms:
    """The five terms, on all that the problem is made of."""
    x, y, v = point
    outer_value, outer_x, outer_y = outer_gradients(problem, x, y)

    def slopes(y):
        return jax.value_and_grad(problem.inner, argnums=(0, 1))(x, y)

    # Forward over reverse: one pass for the slope and both products with v.
    (inner_value, (_, slope)), (_, (cross, product)) = jax.jvp(slopes, (y,), (v,))
    inner, outer = InnerTerms(slope, product, cross), OuterTerms(outer_y, outer_x)
    return Terms(inner, outer, inner_value, outer_value)


class Oracle(eqx.Module):
    """What an estimator can ask in one step."""

    problem: AbstractBilevelProblem
    batches: Batches
    damping: ScalarLike
    key: PRNGKeyArray
    inner_count: Int[Array, ""]
    outer_count: Int[Array, ""]

    def on_batch(self) -> AbstractBilevelProblem:
        """The problem on the batches of this step."""
        return self.batches(self.problem, self.key, self.inner_count, self.outer_count)

    def on_inner_batch(self) -> AbstractBilevelProblem:
        """The same for who asks only for its inner objective."""
        batches = Batches(self.batches.inner_size, None, self.batches.fixed)
        return batches(self.problem, self.key, self.inner_count, self.outer_count)

    def num_batches(self, level: Level) -> int:
        """The number of batches in an epoch."""
        return self.batches.num_batches(self.problem, level)

    def directions(
        self, inner: InnerTerms, outer: OuterTerms, v: PyTree[Array]
    ) -> Directions:
        r"""$f_y$, $f_{yy} v + \epsilon v + F_y$ and $f_{xy} v + F_x$."""
        damped = tree_axpy(self.damping, v, tree_axpy(1, inner.product, outer.y))
        return Directions(inner.slope, damped, tree_axpy(1, inner.cross, outer.x))
