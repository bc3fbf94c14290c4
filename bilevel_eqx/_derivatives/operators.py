"""The kinds of lineax operators that this package adds."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import ScalarLike


class _CurvedTag:
    def __repr__(self):
        return "curved_tag"


curved_tag = _CurvedTag()


"""A tag of lineax operators: an inner Hessian that depends on y.

Its null space is the tangent space of $S(x)$ only at an exact minimum. Near a minimum,
the eigenvalues that should be zero are as large as the error of y, and a pseudoinverse
must not invert them.
"""


class LeastSquaresHessian(lx.AbstractLinearOperator):
    r"""The inner Hessian of a sum of squares, with the factor of its main part:
    $H = A^\top A + C$, where $A = \partial r / \partial y$.

    $C = \sum_i r_i \nabla^2 r_i$ vanishes if the residual is linear in y (`curved` is
    then `False`), and where the residual is zero.
    """

    hessian: lx.AbstractLinearOperator
    residual_jacobian: lx.AbstractLinearOperator
    curved: bool = eqx.field(static=True)

    def mv(self, vector):
        return self.hessian.mv(vector)

    def as_matrix(self):
        return self.hessian.as_matrix()

    def transpose(self):
        return self

    def in_structure(self):
        return self.hessian.in_structure()

    def out_structure(self):
        return self.hessian.out_structure()


for _query in (
    lx.is_symmetric,
    lx.is_diagonal,
    lx.is_tridiagonal,
    lx.is_lower_triangular,
    lx.is_upper_triangular,
    lx.is_positive_semidefinite,
    lx.is_negative_semidefinite,
    lx.has_unit_diagonal,
    lx.diagonal,
    lx.tridiagonal,
    lx.materialise,
):
    _query.register(LeastSquaresHessian)(
        lambda operator, query=_query: query(operator.hessian)  # pyright: ignore
    )


for _transform in (lx.linearise, lx.conj):
    _transform.register(LeastSquaresHessian)(  # pyright: ignore
        lambda operator, transform=_transform: LeastSquaresHessian(
            transform(operator.hessian),
            transform(operator.residual_jacobian),
            operator.curved,
        )
    )


class CrossDerivative(lx.AbstractLinearOperator):
    """B, without any structural tags.

    lineax treats a map from one number to one number as diagonal
    (https://github.com/patrick-kidger/lineax/pull/106), and a product of two such maps as
    symmetric. It then refuses x and y of one number each if their shapes differ.
    """

    operator: lx.AbstractLinearOperator

    def mv(self, vector):
        return self.operator.mv(vector)

    def as_matrix(self):
        return self.operator.as_matrix()

    def transpose(self):
        return CrossDerivative(self.operator.transpose())

    def in_structure(self):
        return self.operator.in_structure()

    def out_structure(self):
        return self.operator.out_structure()


for _query in (
    lx.is_symmetric,
    lx.is_diagonal,
    lx.is_tridiagonal,
    lx.is_lower_triangular,
    lx.is_upper_triangular,
    lx.is_positive_semidefinite,
    lx.is_negative_semidefinite,
    lx.has_unit_diagonal,
):
    _query.register(CrossDerivative)(lambda operator: False)  # pyright: ignore


for _transform in (lx.linearise, lx.conj, lx.materialise):
    _transform.register(CrossDerivative)(  # pyright: ignore
        lambda operator, transform=_transform: CrossDerivative(
            transform(operator.operator)
        )
    )


def damped(
    operator: lx.AbstractLinearOperator, damping: ScalarLike
) -> lx.AbstractLinearOperator:
    """H + damping I, with the tags of H, which a sum of lineax operators loses."""
    tags = set()
    if lx.is_symmetric(operator):
        tags.add(lx.symmetric_tag)
    if lx.is_positive_semidefinite(operator):
        tags.add(lx.positive_semidefinite_tag)

    def mv(vector):
        return jax.tree.map(
            lambda hv, v: hv + jnp.asarray(damping, v.dtype) * v,
            operator.mv(vector),
            vector,
        )

    # Not `H + damping * lx.IdentityLinearOperator(...)`, which promotes float32 to
    # float64 if 64-bit types are enabled.
    return lx.FunctionLinearOperator(mv, operator.in_structure(), tags)
