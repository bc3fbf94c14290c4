"""What a preconditioner of conjugate gradients is."""

import abc
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.random as jr
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, PyTree


class AbstractPreconditioner(eqx.Module):
    r"""A symmetric positive definite $P \approx H$ whose inverse is cheap, for
    [`bilevel_eqx.TruncatedCG`][]. Subclass it for your own."""

    # Whether it has to see the leaves of y as they are, and not as one vector.
    keeps_shapes: ClassVar[bool] = False

    @abc.abstractmethod
    def prepare(self, operator: lx.AbstractLinearOperator) -> PyTree[Array]:
        """What P is made of, from products with the operator. It may serve for operators
        near that one too."""

    @abc.abstractmethod
    def precondition(self, prepared: Any, r: PyTree[Array]) -> PyTree[Array]:
        r"""$P^{-1} r$."""


def probed(
    operator: lx.AbstractLinearOperator, num_probes: int
) -> tuple[PyTree[Array], PyTree[Array]]:
    """Random signs z, the same ones each time, and their products H z. The probes lie
    along a leading axis."""
    leaves, treedef = jtu.tree_flatten(operator.in_structure())
    keys = jr.split(jr.key(0), len(leaves))
    signs = [
        jr.rademacher(key, (num_probes, *leaf.shape), leaf.dtype)
        for key, leaf in zip(keys, leaves)
    ]
    z = jtu.tree_unflatten(treedef, signs)
    return z, jax.vmap(operator.mv)(z)
