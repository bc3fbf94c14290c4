r"""The local picture: all that is known of an inner problem at a point, computed once.

Where the inner Hessian H has constant rank, the set of inner minima S(x) is a surface
whose tangent space is the null space of H. Everything that tells one inner minimum from
another (the nearest one, the best one, the worst one) is a matter of that space.

The inner variables are one vector here. Up to `DENSE_SIZE` entries H is a matrix and is
decomposed once; what follows is a matrix times a vector.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, PyTree, Scalar

from .._arguments import says
from .._derivatives.first import inner_gradient, outer_gradients
from .._derivatives.operators import LeastSquaresHessian
from .._derivatives.second import (
    gradient_and_hessian,
    hessian_depends_on_y,
)
from .._failure.results import RESULTS
from .._linalg.eigenbasis import eigenbasis, negative_share
from .._linalg.power_iteration import DENSE_SIZE
from .._linear_solver.misc import explain, tags_for
from .._linear_solver.pseudoinverse import krylov_inverse, Pseudoinverse
from .._problem.base import AbstractBilevelProblem
from .._problem.constraints import set_y, Stationarity
from .._problem.flat import flat
from .._tree import Layout, nonzero, tree_axpy, tree_waves, vector_norm


class Outer(NamedTuple):
    r"""The outer objective in a picture, and its derivative through the inner minimum."""

    value: Scalar
    x: PyTree[Array]
    """F_x."""
    y: Float[Array, " n"]
    """F_y."""
    adjoint: Float[Array, " n"]
    r"""$q = H^+ F_y$; in a set, $K^+ D F_y$."""
    multiplier: Float[Array, " n"]
    r"""$\mu = -H^+ F_y$, the multiplier of $\nabla_y f = 0$."""
    hypergradient: PyTree[Array]
    r"""$F_x + B^\top \mu = F_x - B^\top H^+ F_y$."""
    result: RESULTS
    """Whether the linear solver found the multiplier."""


class NewtonStep(NamedTuple):
    r"""How far y is from an inner minimum, in two parts."""

    step: Float[Array, " n"]
    r"""$H^+ \nabla_y f$. In a set $D K^+ D r + t (r - D r)$, with the residual r of the
    condition that y is stationary. Rounding of the gradient is left out."""
    rest: Scalar
    """The norm of what no step removes from the gradient: its part in the null space."""
    curvature: Scalar
    """The largest of f. It compares the rest with the step."""


Push = Callable[[Float[Array, " n"]], tuple[PyTree[Array], Float[Array, " n"]]]
"""A linear map of vectors like y to what is like x and y."""


class Lagrangian(NamedTuple):
    r"""$\Lambda(x, y) = \phi(x, y) + \langle \mu, \nabla_y f(x, y) \rangle$."""

    x: PyTree[Array]
    r"""$\Lambda_x = \phi_x + B^\top \mu$."""
    y: Float[Array, " n"]
    r"""$\Lambda_y = \phi_y + H \mu$."""
    push: Push
    r"""$v \mapsto (\Lambda_{xy} v, \Lambda_{yy} v)$."""


class Picture(eqx.Module):
    """The inner problem at (x, y) to second order. Its vectors are flat."""

    problem: AbstractBilevelProblem
    """With the inner variables in one vector."""
    x: PyTree[Array]
    y: Float[Array, " n"]
    value: Scalar
    """f."""
    gradient: Float[Array, " n"]
    """f_y."""
    at: Stationarity
    """What the set of y leaves of f_y and H."""
    linear_solver: lx.AbstractLinearSolver
    inverse: Any
    """The state of the linear solver that stands for the pseudoinverse."""
    cross: Callable[[Float[Array, " n"]], PyTree[Array]] | None
    r"""$\mu \mapsto B^\top \mu$, where it is known from the linearisation for H."""
    spectrum: Float[Array, " k"] | None
    """All Ritz values of K, where the pseudoinverse is made of some of them."""
    max_products: int | None = eqx.field(static=True)
    """How many products with H may be taken, if that is bounded."""
    is_plane: bool = eqx.field(static=True)
    """Whether H does not depend on y, so that S(x) is a plane."""
    differentiable: bool = eqx.field(static=True)

    @property
    def is_dense(self) -> bool:
        return self.y.size <= DENSE_SIZE and not self.differentiable

    @property
    def computed(self) -> tuple:
        """What is costly in it, for a loop to carry."""
        return self.value, self.gradient, self.at.free_hessian, self.inverse

    def solve(self, vector: Float[Array, " n"]) -> tuple[Float[Array, " n"], RESULTS]:
        r"""$H^+ v$, and whether the solver found it. In a set, $K^+ v$."""
        if self.differentiable:
            out = lx.linear_solve(
                self.at.hessian,
                vector,
                self.linear_solver,
                state=self.inverse,
                throw=False,
            )
            q, result = out.value, out.result
        else:
            q, result, _ = self.linear_solver.compute(self.inverse, vector, {})
        return q, explain(self.linear_solver, result)

    def pinv(self, vector: Float[Array, " n"]) -> Float[Array, " n"]:
        r"""$H^+ v$."""
        return self.solve(vector)[0]

    def project(self, vector: Float[Array, " n"]) -> Float[Array, " n"]:
        r"""$P v = (I - H^+ H) v$, the part of a vector along S(x)."""
        if self._knows_range:
            rows = self.inverse.right
            # Not `rows.T @ ...`, which is several times slower on a CPU.
            return vector - (rows @ vector) @ rows
        return vector - self.pinv(self.at.hessian.mv(vector))

    @property
    def _knows_range(self) -> bool:
        return not self.differentiable and says(self.inverse, "knows_range", False)

    def multiplier(self, slope: Float[Array, " n"]) -> Float[Array, " n"]:
        r"""$\mu = -D K^+ D \phi_y$: that of $\nabla_y f = 0$ for an objective $\phi$."""
        return -self.at.along(self.pinv(self.at.along(slope)))

    def pull(self, vector: Float[Array, " n"]) -> PyTree[Array]:
        r"""$J^\top u = -B^\top H^+ u$."""
        return self.cross_transposed(self.multiplier(vector))

    def newton_step(self, size: Scalar) -> NewtonStep:
        r"""The step from y to an inner minimum, for a y of a given size."""
        H, residual = self.at.hessian, self.at.residual
        curvature = self.largest_curvature
        if set_y(self.problem).confines:
            # H may vanish in a set. Then the step size is in units of the set.
            curvature = curvature + 1 / self.at.step_size.astype(curvature.dtype)
        # What cancels in the gradient, and so decides how much of it is rounding.
        terms = curvature * size + vector_norm(self.gradient)
        along = self.at.along(residual)
        significant = self._beyond(along, 10 * jnp.finfo(size.dtype).eps * terms)
        q = self.pinv(significant)
        across = self.at.step_size.astype(size.dtype) * (residual - along)
        rest = vector_norm(along - H.mv(q))
        return NewtonStep(self.at.along(q) + across, rest, curvature)

    def _beyond(self, vector: Float[Array, " n"], rounding: Scalar):
        """A vector without those of its coordinates, in the eigenvectors of H, that may
        be rounding. A nearly singular H would turn them into a long step."""
        if not self._knows_range:
            return vector
        rows = self.inverse.right
        coordinates = rows @ vector
        excess = jnp.maximum(0, jnp.abs(coordinates) - rounding)
        return (jnp.sign(coordinates) * excess) @ rows

    def cross_transposed(
        self, multiplier: Float[Array, " n"], y: Float[Array, " n"] | None = None
    ) -> PyTree[Array]:
        r"""$B^\top \mu = \nabla_x \langle \mu, \nabla_y f \rangle$, at another y if one
        is given."""
        if y is None and self.cross is not None:
            return self.cross(multiplier)
        return self._constraint(self.y if y is None else y, multiplier)[0]

    def _constraint(self, y, multiplier):
        """The gradients of <mu, f_y> in x and y, which are B^T mu and H mu.

        They are those of f, differentiated along mu. Not `jax.jvp`: JAX takes no second
        derivative of it where an objective has a `jax.custom_vjp`.
        """

        def gradients(y):
            return jax.grad(self.problem.inner, argnums=(0, 1))(self.x, y)

        return jax.linearize(gradients, y)[1](multiplier)

    def outer(self) -> Outer:
        """The outer objective and its hypergradient."""
        value, outer_x, outer_y = outer_gradients(self.problem, self.x, self.y)
        q, result = self.solve(self.at.along(outer_y))
        mu = -self.at.along(q)
        hypergradient = tree_axpy(1.0, self.cross_transposed(mu), outer_x)
        return Outer(value, outer_x, outer_y, q, mu, hypergradient, result)

    def curvature_of_set(self, multiplier: Float[Array, " n"]) -> Push:
        r"""How S(x) is curved: $v \mapsto (\partial_x \langle v, H \mu \rangle,
        \partial_y (H \mu) v)$."""
        return jax.linearize(lambda y: self._constraint(y, multiplier), self.y)[1]

    def lagrangian(
        self,
        objective: Callable[[PyTree, Float[Array, " n"]], Scalar],
        multiplier: Float[Array, " n"],
    ) -> Lagrangian:
        """The Lagrangian of an objective on S(x), linearised in y."""

        def gradients(y):
            slopes = jax.grad(objective, argnums=(0, 1))(self.x, y)
            return tree_axpy(1.0, self._constraint(y, multiplier), slopes)

        (slope_x, slope_y), push = jax.linearize(gradients, self.y)
        return Lagrangian(slope_x, slope_y, push)

    def operator(
        self, product: Callable[[Float[Array, " n"]], Float[Array, " n"]]
    ) -> lx.AbstractLinearOperator:
        """A symmetric operator on vectors like y; a matrix where the picture is dense."""
        return as_operator(product, self.y, self.is_dense)

    def along(self, operator: lx.AbstractLinearOperator) -> lx.AbstractLinearOperator:
        r"""$P W P$, a symmetric operator within the tangent space."""

        def product(vector):
            return self.project(operator.mv(self.project(vector)))

        return self._function(product)

    def within(
        self, product: Callable[[Float[Array, " n"]], Float[Array, " n"]]
    ) -> lx.AbstractLinearOperator:
        r"""$P W P + I - P$: to solve with, for vectors in the tangent space.

        $P W P$ alone is zero across S(x) up to rounding, and so is the vector: the
        quotient of the two would be anything. Where the minimum is unique, that is all
        there is.
        """

        def total(vector):
            along = self.project(vector)
            return self.project(product(along)) + (vector - along)

        return self._function(total)

    def _function(self, product):
        structure = jax.ShapeDtypeStruct(self.y.shape, self.y.dtype)
        return lx.FunctionLinearOperator(product, structure, lx.symmetric_tag)

    @property
    def largest_curvature(self) -> Scalar:
        """The largest eigenvalue of H; or the size of H along a vector that is nothing
        special, where eigenvalues are not known."""
        if not self._knows_range:
            waves = tree_waves(self.y)
            return vector_norm(self.at.hessian.mv(waves)) / vector_norm(waves)
        largest = jnp.max(jnp.abs(self.inverse.values))
        factored = self.is_dense and isinstance(self.at.hessian, LeastSquaresHessian)
        return largest**2 if factored else largest

    @property
    def is_convex(self) -> bool:
        """Whether f is known to be convex, as a sum of squares that are linear in y."""
        H = self.at.hessian
        return isinstance(H, LeastSquaresHessian) and not H.curved

    def negative_curvature(self) -> Scalar:
        """How negative the most negative eigenvalue of H is where y can move, relative to
        the largest. Zero at a minimum."""
        if self.is_convex:
            return jnp.zeros((), self.y.dtype)
        factored = isinstance(self.at.hessian, LeastSquaresHessian)
        decomposed = self.is_dense and not factored
        values = self.inverse.values if decomposed else self.eigenvalues()
        return negative_share(values)

    def eigenvalues(self) -> Float[Array, " k"]:
        """Those of H where y can move; Ritz values beyond the dense size."""
        if self.spectrum is not None:
            return self.spectrum
        return eigenbasis(self.at.definite_hessian()).values

    def share_of_products(self, share: float, most: int) -> int:
        """A number of steps, each as costly as three products with H, that takes no more
        than a share of the products that are allowed."""
        if self.max_products is None:
            return most
        return max(1, min(most, int(share * self.max_products / 3)))

    def accuracy(
        self, vector: Float[Array, " n"], solution: Float[Array, " n"]
    ) -> Scalar:
        r"""How far $q = H^+ v$ is from solving $H H q = H v$, relative to the size of
        $v$ and of $H$.

        Asked of $H$ itself, and not of the solver.
        """
        H = self.at.hessian
        remainder = H.mv(solution) - vector
        # Not relative to H v alone: at an equilibrium v may lie in the null space.
        scale = self.largest_curvature * vector_norm(vector) + vector_norm(H.mv(vector))
        return vector_norm(H.mv(remainder)) / nonzero(scale)

    def moved(self, y: Float[Array, " n"]) -> "Picture":
        """The picture at another y of the same plane, where H is the same."""
        assert self.is_plane
        value, gradient = jax.value_and_grad(self.problem.inner, argnums=1)(self.x, y)
        return eqx.tree_at(
            lambda p: (p.y, p.value, p.gradient, p.at.residual, p.cross),
            self,
            (y, value, gradient, gradient, None),
            is_leaf=lambda leaf: leaf is None,
        )


def as_operator(
    product: Callable[[Float[Array, " n"]], Float[Array, " n"]],
    like: Float[Array, " n"],
    dense: bool,
    tags: Any = lx.symmetric_tag,
) -> lx.AbstractLinearOperator:
    """A linear map of vectors as an operator: a matrix if `dense`, else a function."""
    if not dense:
        return lx.FunctionLinearOperator(
            product, jax.ShapeDtypeStruct(like.shape, like.dtype), tags
        )
    columns = jax.vmap(product)(jnp.eye(like.size, dtype=like.dtype))
    return lx.MatrixLinearOperator(columns.T, tags)


def flat_picture(
    problem: AbstractBilevelProblem,
    x: PyTree[Array],
    y: Float[Array, " n"],
    linear_solver: lx.AbstractLinearSolver = Pseudoinverse(),
    *,
    differentiable: bool = False,
    computed: tuple | None = None,
    max_products: int | None = None,
    share: float = 1.0,
    anchor: Float[Array, " n"] | None = None,
) -> Picture:
    """The local picture of a problem whose inner variables are one vector.

    Products with the pseudoinverse have the derivatives of lineax's if
    `differentiable`, and none otherwise. `computed` is what `Picture.computed` of the
    same point has, without constraints. Beyond the dense size, `max_products` bounds the
    products with H that are taken in all, and `share` is how much of that goes into the
    pseudoinverse. That is then one of a Krylov space of F_y, and of the displacement from
    the `anchor` if there is one.
    """
    dense = y.size <= DENSE_SIZE and not differentiable
    is_plane = not hessian_depends_on_y(problem, x, y)
    tags = tags_for(linear_solver, not is_plane)
    if computed is None:
        *expansion, cross = _expansion(problem, x, y, dense, tags)
        computed = (*expansion, None)
    else:
        cross = None
    value, gradient, H, inverse = computed
    at = set_y(problem).stationarity(gradient, H, y, tags)
    spectrum = None
    bounded = max_products is not None and y.size > DENSE_SIZE
    if bounded and inverse is None:
        assert max_products is not None
        num_products = max(1, int(share * max_products) - _FURTHER_PRODUCTS)
        start = at.along(jax.grad(problem.outer, argnums=1)(x, y))
        if anchor is not None:
            start = _unit(start) + _unit(y - anchor)
        inverse, spectrum = krylov_inverse(
            at.definite_hessian(), start, num_products, not is_plane
        )
    if inverse is None:
        # Factorised once, for all products with the pseudoinverse. Their derivatives do
        # not go through the factors.
        dynamic, static = eqx.partition(at.hessian, eqx.is_array)
        fixed = eqx.combine(jax.lax.stop_gradient(dynamic), static)
        inverse = linear_solver.init(fixed, options={})
    return Picture(
        problem=problem,
        x=x,
        y=y,
        value=value,
        gradient=gradient,
        at=at,
        linear_solver=linear_solver,
        inverse=inverse,
        cross=cross,
        spectrum=spectrum,
        max_products=max_products if bounded else None,
        is_plane=is_plane,
        differentiable=differentiable,
    )


def _expansion(problem, x, y, dense: bool, tags):
    r"""f, f_y, H and $\mu \mapsto B^\top \mu$, from one linearisation. The last is `None`
    if H is not a matrix."""
    gradient, H = gradient_and_hessian(problem, x, y, tags)
    if not dense:
        return problem.inner(x, y), gradient, H, None

    def gradients(y):
        value, slopes = jax.value_and_grad(problem.inner, argnums=(1, 0))(x, y)
        return slopes, value

    # The value is not linearised: JAX cannot where a function has a rule for reverse mode
    # alone (`jax.custom_vjp`), and nobody asks for it.
    (gradient, _), push, value = jax.linearize(gradients, y, has_aux=True)
    matrix = as_operator(lambda v: push(v)[0], y, True, tags)
    if isinstance(H, LeastSquaresHessian):
        A = as_operator(H.residual_jacobian.mv, y, True, ())
        if not H.curved:
            factor = A.as_matrix()
            matrix = lx.MatrixLinearOperator(factor.T @ factor, tags)
        matrix = LeastSquaresHessian(matrix, A, H.curved)
    return value, gradient, matrix, lambda mu: push(mu)[1]


def picture(
    problem: AbstractBilevelProblem,
    x: PyTree[Array],
    y: PyTree[Array],
    *,
    max_products: int | None = None,
    share: float = 1.0,
    anchor: PyTree[Array] | None = None,
) -> tuple[Picture, Layout]:
    """The local picture at (x, y) by pseudoinverses, and how y is laid out in its
    vectors; the further arguments as for `flat_picture`."""
    problem, layout = flat(problem, y)
    here = flat_picture(
        problem,
        x,
        layout.ravel(y),
        max_products=max_products,
        share=share,
        anchor=None if anchor is None else layout.ravel(anchor),
    )
    return here, layout


def _unit(vector: Float[Array, " n"]) -> Float[Array, " n"]:
    return vector / nonzero(vector_norm(vector))


# What a certificate takes beside the pseudoinverse: to measure its accuracy, for one.
_FURTHER_PRODUCTS = 8


def restore(
    here: Picture, y: Float[Array, " n"]
) -> tuple[Float[Array, " n"], Scalar, Scalar]:
    r"""Brings y back to S(x) by steps $-H^+ \nabla_y f$, with the H of a picture.

    Also returns the length of the last step, which says how far off y may still be, and
    the norm of $\nabla_y f$ before it.
    """
    eps = jnp.finfo(y.dtype).eps

    def unfinished(carry):
        count, y, length, before, _ = carry
        contracts = length < 0.9 * before
        return contracts & (length > eps * vector_norm(y)) & (count < _RESTORATIONS)

    def body(carry):
        count, y, before, _, _ = carry
        gradient = inner_gradient(here.problem, here.x, y)
        step = here.pinv(gradient)
        length = vector_norm(step)
        # A step that is longer than the last leads away.
        y = jnp.where(length < before, y - step, y)
        return count + 1, y, length, before, vector_norm(gradient)

    largest = jnp.asarray(jnp.finfo(y.dtype).max, y.dtype)
    carry = jnp.array(0), y, 0.5 * largest, largest, largest
    _, y, length, _, norm = jax.lax.while_loop(unfinished, body, carry)
    return y, length, norm


_RESTORATIONS = 50
