"""Checks of a problem. They use only shapes and cost nothing in a compiled program."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._depends_on import depends_on
from .._tree import tree_struct
from .base import AbstractBilevelProblem
from .constraints import Convex, set_y
from .finite_sum import (
    AbstractFiniteSumProblem,
    check_losses,
    data_of,
    Level,
    losses_of,
    num_samples,
)
from .root import AbstractRootProblem, FixedPointProblem


def _check_scalar(fn: Callable, name: str, x: PyTree, y: PyTree) -> None:
    struct = jax.eval_shape(fn, x, y)
    leaves = jtu.tree_leaves(struct)
    is_scalar = (
        isinstance(struct, jax.ShapeDtypeStruct)
        and struct.shape == ()
        and jnp.issubdtype(struct.dtype, jnp.floating)
    )
    if not is_scalar:
        if len(leaves) == 1:
            got = f"shape {leaves[0].shape} and type {leaves[0].dtype}"
        else:
            got = f"a pytree of {len(leaves)} arrays: {struct}"
        raise ValueError(
            f"The {name} objective must return a floating-point scalar, of shape (), "
            f"but `problem.{name}(x, y)` has {got}. Reduce it with `jnp.sum` or "
            "`jnp.mean`."
        )


def _check_projection(fn: Callable | None, name: str, at: PyTree) -> None:
    if fn is None:
        return
    struct, wanted = jax.eval_shape(Convex(fn).raw, at), tree_struct(at)
    shapes, wanted_shapes = (jtu.tree_map(lambda u: u.shape, s) for s in (struct, wanted))
    if shapes != wanted_shapes:
        raise ValueError(
            f"`problem.project_{name}({name})` must return the nearest point of a set, "
            f"with the structure and shapes of {name}: {wanted}. It returns {struct}."
        )


def _check_root(problem: AbstractRootProblem, x: PyTree, y: PyTree) -> None:
    if set_y(problem).confines:
        raise ValueError(
            "The inner variables of a root problem cannot be confined to a set, but this "
            "problem has a `project_y`. Put the projection into the map: a fixed point "
            "of `project_y(fixed_point(x, y))` lies in the set."
        )
    name = "fixed_point" if isinstance(problem, FixedPointProblem) else "root"
    struct, wanted = jax.eval_shape(getattr(problem, name), x, y), tree_struct(y)
    if eqx.tree_equal(struct, wanted) is not True:
        raise ValueError(
            f"`problem.{name}(x, y)` must return a pytree with the structure, the shapes "
            f"and the types of y, {wanted}, but it returns {struct}. Check the order of "
            "its arguments, which is (x, y); a cast `.astype(...)` mends a type."
        )
    if not depends_on(lambda y: problem.root(x, y), y):
        raise ValueError(
            "The root does not depend on y: the derivative of `problem.root(x, y)` with "
            "respect to y is zero for all x and y. Check the order of its arguments, "
            "which is (x, y), and look for a `stop_gradient` or a cast to integers."
        )


def _check_losses(
    problem: AbstractFiniteSumProblem, level: Level, x: PyTree, y: PyTree
) -> None:
    size = num_samples(problem, level)
    losses, data = losses_of(problem, level), data_of(problem, level)
    struct = jax.eval_shape(lambda x, y, data: losses(x, y, data, None), x, y, data)
    check_losses(struct, level, size)


def check_problem(problem: AbstractBilevelProblem, x: PyTree, y: PyTree) -> None:
    """Refuses objectives that are not scalars, an inner objective or a root that does not
    depend on y, a root that is not like y, projections to other spaces, and losses that
    are not one for each sample."""
    _check_projection(problem.project_x, "x", x)
    _check_projection(problem.project_y, "y", y)
    if isinstance(problem, AbstractFiniteSumProblem):
        _check_losses(problem, "inner", x, y)
        _check_losses(problem, "outer", x, y)
    _check_scalar(problem.outer, "outer", x, y)
    if isinstance(problem, AbstractRootProblem):
        return _check_root(problem, x, y)
    _check_scalar(problem.inner, "inner", x, y)
    if not depends_on(lambda y: problem.inner(x, y), y):
        raise ValueError(
            "The inner objective does not depend on y: the derivative of "
            "`problem.inner(x, y)` with respect to y is zero for all x and y. Check the "
            "order of its arguments, which is (x, y), and look for a `stop_gradient` or "
            "a cast to integers."
        )
