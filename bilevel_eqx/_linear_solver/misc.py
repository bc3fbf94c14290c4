"""What our linear solvers share."""

import equinox as eqx
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, PyTree, Scalar

from .._tree import nonzero, tree_norm


def check_square(operator: lx.AbstractLinearOperator, owner: str) -> None:
    """Refuses an operator between different spaces."""
    same = eqx.tree_equal(operator.in_structure(), operator.out_structure())
    if same is not True:
        raise ValueError(
            f"`{owner}` solves only square systems, from a space to itself, but the "
            f"operator goes from {operator.in_structure()} to "
            f"{operator.out_structure()}."
        )


def relative(residual: PyTree[Array], vector: PyTree[Array]) -> Scalar:
    """The norm of `residual` relative to that of `vector`; zero if both are zero."""
    size, scale = tree_norm(residual), tree_norm(vector)
    return jnp.where(scale == 0, size, size / nonzero(scale))
