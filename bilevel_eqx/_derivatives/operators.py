"""The kinds of lineax operators that this package adds."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, PyTree, ScalarLike

from .._tree import tree_axpy, tree_zeros_like


class _Tag:
    def __init__(self, name: str):
        self.name = name

    def __repr__(self):
        return self.name


curved_tag = _Tag("curved_tag")


"""A tag of lineax operators: an inner Hessian that depends on y.

Its null space is the tangent space of $S(x)$ only at an exact minimum. Near a minimum,
the eigenvalues that should be zero are as large as the error of y, and a pseudoinverse
must not invert them.
"""


on_set_tag = _Tag("on_set_tag")


"""Further, that y is on $S(x)$ but for rounding, and not unique: H has low rank there, if
there are far fewer data than inner variables.
"""


class _Symmetric(lx.AbstractLinearOperator):
    """A symmetric operator without further structure that lineax should know of."""

    def transpose(self):
        return self

    def out_structure(self):
        return self.in_structure()


lx.is_symmetric.register(_Symmetric)(lambda operator: True)
lx.is_positive_semidefinite.register(_Symmetric)(lambda operator: False)
for _query in (
    lx.is_diagonal,
    lx.is_tridiagonal,
    lx.is_lower_triangular,
    lx.is_upper_triangular,
    lx.is_negative_semidefinite,
    lx.has_unit_diagonal,
):
    _query.register(_Symmetric)(lambda operator: False)  # pyright: ignore


@lx.materialise.register(_Symmetric)
def _(operator):
    return lx.MatrixLinearOperator(operator.as_matrix(), lx.symmetric_tag)


@lx.diagonal.register(_Symmetric)
def _(operator):
    return jnp.diag(operator.as_matrix())


@lx.tridiagonal.register(_Symmetric)
def _(operator):
    matrix = operator.as_matrix()
    return jnp.diag(matrix), jnp.diag(matrix, -1), jnp.diag(matrix, 1)


class CurvedHessian(_Symmetric):
    """An inner Hessian that depends on y, as a matrix, with the one at a point closer to
    the minimum. The latter tells which eigenvalues of the former vanish there."""

    hessian: lx.MatrixLinearOperator
    further: Float[Array, "n n"]

    def mv(self, vector):
        return self.hessian.mv(vector)

    def as_matrix(self):
        return self.hessian.as_matrix()

    def in_structure(self):
        return self.hessian.in_structure()


lx.is_positive_semidefinite.register(CurvedHessian)(
    lambda operator: lx.is_positive_semidefinite(operator.hessian)
)


class LeastSquaresHessian(_Symmetric):
    r"""The inner Hessian of a sum of squares, by its parts: $H = A^\top A + C$, where
    $A = \partial r / \partial y$ and $C = \sum_i r_i \nabla^2 r_i$.

    C is zero where the residual is zero, and `None` if the residual is linear in y.
    """

    residual_jacobian: lx.AbstractLinearOperator
    curvature: lx.AbstractLinearOperator | None
    tags: frozenset[object] = eqx.field(static=True)

    def mv(self, vector):
        A = self.residual_jacobian
        product = A.transpose().mv(A.mv(vector))
        if self.curvature is None:
            return product
        return tree_axpy(1.0, self.curvature.mv(vector), product)

    def as_matrix(self):
        A = self.residual_jacobian.as_matrix()
        square = A.T @ A
        return square if self.curvature is None else square + self.curvature.as_matrix()

    def in_structure(self):
        return self.residual_jacobian.in_structure()


lx.is_positive_semidefinite.register(LeastSquaresHessian)(
    lambda operator: lx.positive_semidefinite_tag in operator.tags
)


class AugmentedHessian(_Symmetric):
    r"""The Hessian of a sum of squares without a product of A with itself:

    $$\begin{pmatrix} -I & A \\ A^\top & C \end{pmatrix}
    \begin{pmatrix} p \\ q \end{pmatrix} = \begin{pmatrix} a \\ u \end{pmatrix}
    \quad\Longleftrightarrow\quad H q = u + A^\top a, \quad p = A q - a.$$

    To multiply a with $A^\top$, and q with A, would each lose as many digits as the
    condition number of A has. This is the Hessian in $(w, y)$ of
    $\langle w, r(x, y) \rangle - \|w\|^2 / 2$, whose maximum over w is $f$.

    ??? cite "Reference"

        Björck, *Numerical Methods for Least Squares Problems*, 1996, section 2.5.
    """

    hessian: LeastSquaresHessian

    def mv(self, vector):
        p, q = vector
        A, C = self.hessian.residual_jacobian, self.hessian.curvature
        pulled = A.transpose().mv(p)
        if C is not None:
            pulled = tree_axpy(1.0, C.mv(q), pulled)
        return tree_axpy(-1.0, p, A.mv(q)), pulled

    def as_matrix(self):
        as_function = lx.FunctionLinearOperator(self.mv, self.in_structure())
        return as_function.as_matrix()

    def in_structure(self):
        A = self.hessian.residual_jacobian
        return A.out_structure(), A.in_structure()

    def right_side(self, u: PyTree[Array]) -> tuple[PyTree[Array], PyTree[Array]]:
        """(0, u), with which this is $H q = u$."""
        return tree_zeros_like(self.in_structure()[0]), u


def _each_part(transform, operator):
    A, C = operator.residual_jacobian, operator.curvature
    C = None if C is None else transform(C)
    return LeastSquaresHessian(transform(A), C, operator.tags)


for _transform in (lx.linearise, lx.conj):
    _transform.register(CurvedHessian)(lambda operator: operator)  # pyright: ignore
    _transform.register(LeastSquaresHessian)(  # pyright: ignore
        ft.partial(_each_part, _transform)
    )
    _transform.register(AugmentedHessian)(  # pyright: ignore
        lambda operator, transform=_transform: AugmentedHessian(
            _each_part(transform, operator.hessian)
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
