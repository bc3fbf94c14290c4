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

from .._derivatives.first import inner_gradient, outer_gradients
from .._derivatives.operators import (
    AugmentedHessian,
    curved_tag,
    LeastSquaresHessian,
    on_set_tag,
)
from .._derivatives.second import (
    curved_hessian,
    expansion,
    gradient_and_hessian,
    hessian_depends_on_y,
    less_range,
    squares_condition,
    stationary_residual,
    tells_change,
    TransposedRows,
    value_gradient_and_product,
)
from .._failure.results import RESULTS
from .._linalg.eigenbasis import eigenbasis, negative_share, singular_values
from .._linalg.power_iteration import DENSE_SIZE, typical_magnitude
from .._linalg.zero_curvature import clearance, ends, uncertainty
from .._linear_solver.judged import judged
from .._linear_solver.misc import augmented, explain, tags_for
from .._linear_solver.pseudoinverse import Augmented, krylov_inverse, Pseudoinverse
from .._mesh import check_mesh_of_solve
from .._problem.base import AbstractBilevelProblem
from .._problem.constraints import set_y, Stationarity
from .._problem.flat import flat
from .._problem.least_squares import AbstractLeastSquaresProblem
from .._problem.root import AbstractRootProblem
from .._tree import (
    Layout,
    nonzero,
    tree_axpy,
    tree_dot,
    tree_size,
    tree_sub,
    vector_norm,
    vector_norms,
    where,
)


class Outer(NamedTuple):
    r"""The outer objective in a picture, and its derivative through the inner minimum."""

    value: Scalar
    x: PyTree[Array]
    """F_x."""
    y: Float[Array, " n"]
    """F_y."""
    adjoint: Float[Array, " n"]
    r"""$q = H^{+\top} F_y$, where H is symmetric at a minimum; in a set,
    $K^+ D F_y$."""
    multiplier: Float[Array, " n"]
    r"""$\mu = -H^+ F_y$, the multiplier of $\nabla_y f = 0$."""
    hypergradient: PyTree[Array]
    r"""$F_x + B^\top \mu = F_x - B^\top H^+ F_y$."""
    result: RESULTS
    """Whether the linear solver found the multiplier."""


class Adjoint(NamedTuple):
    r"""$q = H^+ v$."""

    q: Float[Array, " n"]
    image: PyTree[Array] | None
    """For a sum of squares A q, without the rounding of that product; else `None`."""
    result: RESULTS


class NewtonStep(NamedTuple):
    r"""How far y is from an inner minimum, in two parts."""

    step: Float[Array, " n"]
    r"""$H^+ \nabla_y f$. In a set $D K^+ D r + t (r - D r)$, with the residual r of the
    condition that y is stationary. Rounding of the gradient is left out."""
    length: Scalar
    """The norm of the step."""
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
    """The inner problem at (x, y) to second order. Its vectors are flat.

    For a root, the residual r stands for f_y and dr/dy for H; there is no f.
    """

    problem: AbstractBilevelProblem
    """With the inner variables in one vector."""
    x: PyTree[Array]
    y: Float[Array, " n"]
    value: Scalar | None
    """f."""
    gradient: Float[Array, " n"]
    """f_y."""
    at: Stationarity
    """What the set of y leaves of f_y and H."""
    linear_solver: lx.AbstractLinearSolver
    cross: Callable | None
    r"""$q \mapsto B^\top q$, where B is a matrix."""
    inverse: Any
    """The state of the linear solver that stands for the pseudoinverse."""
    spectrum: Float[Array, " k"] | None
    """The singular values of a root's H; Ritz values of them beyond the dense size."""
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
        """What is costly in it."""
        H = self.at.free_hessian
        return self.value, self.gradient, H, self.cross, self.inverse

    @property
    def carried(self) -> Any:
        """The arrays of that, for a loop to carry; `None` where they are as cheap to
        compute anew."""
        return eqx.filter(self.computed, eqx.is_array) if self.is_dense else None

    def computed_as(self, carried: Any) -> tuple | None:
        """`computed` at another point of the same problem, where it is `carried`."""
        if carried is None:
            return None
        return eqx.combine(carried, eqx.filter(self.computed, eqx.is_array, inverse=True))

    @property
    def is_root(self) -> bool:
        return isinstance(self.problem, AbstractRootProblem)

    @property
    def system(self) -> lx.AbstractLinearOperator:
        """What is solved with: H, or for a sum of squares its augmented form."""
        K = augmented(self.linear_solver, self.at.hessian)
        return self.at.hessian if K is None else K

    def _solved(self, vector, transposed=False):
        system, inverse = self.system, self.inverse
        if transposed:
            system = system.T
            inverse, _ = self.linear_solver.transpose(inverse, {})
        if self.differentiable:
            out = lx.linear_solve(
                system, vector, self.linear_solver, state=inverse, throw=False
            )
            q, result = out.value, out.result
        else:
            q, result, _ = self.linear_solver.compute(inverse, vector, {})
        return q, explain(self.linear_solver, result)

    def adjoint(self, vector: Float[Array, " n"]) -> "Adjoint":
        r"""$q = H^{+\top} v$, for a sum of squares with $A q$, and whether it was found.

        H is symmetric but at a root.
        """
        K = self.system
        if isinstance(K, AugmentedHessian):
            (image, q), result = self._solved(K.right_side(vector))
            return Adjoint(q, image, result)
        q, result = self._solved(vector, transposed=self.is_root)
        return Adjoint(q, None, result)

    def solve(self, vector: Float[Array, " n"]) -> tuple[Float[Array, " n"], RESULTS]:
        r"""$H^+ v$, and whether the solver found it. In a set, $K^+ v$."""
        if self.is_root:
            return self._solved(vector)
        q, _, result = self.adjoint(vector)
        return q, result

    @property
    def condition(self) -> Callable[[Any, PyTree], PyTree[Array]]:
        r"""$\nabla_y f$ at this y, as a function of the problem and of x; for a sum of
        squares that of the augmented form."""
        if isinstance(self.system, AugmentedHessian):
            w = self._stationary_residual()
            return squares_condition(self.problem, self.x, self.y, w)
        return lambda problem, x: inner_gradient(problem, x, self.y)

    def _stationary_residual(self) -> PyTree[Array]:
        """The residual of a sum of squares without its part in the range of A; see
        `stationary_residual`."""
        problem: Any = self.problem
        r = problem.inner_residual(self.x, self.y)
        if self.max_products is not None:
            # Where products with H are counted, none are spent on it.
            return r
        across = getattr(self.inverse, "across", lambda a: None)(r)
        if across is None:
            return stationary_residual(problem, self.x, self.y, self.linear_solver)
        A = self.system.hessian.residual_jacobian  # pyright: ignore
        return less_range(r, tree_sub(r, across), A.mv(self.y))

    def step_of(self, tangent: PyTree[Array]) -> Float[Array, " n"]:
        r"""$H^+ v$ for a tangent of `condition`."""
        solution, _ = self._solved(tangent)
        return solution[1] if isinstance(self.system, AugmentedHessian) else solution

    def step_from(
        self, y: Float[Array, " n"], gradient: Float[Array, " n"]
    ) -> Float[Array, " n"]:
        r"""$H^+ \nabla_y f$ at another y, with the H of this one. For a sum of squares
        the right side is $A^\top r$, which is not formed."""
        K = self.system
        if isinstance(K, AugmentedHessian):
            problem: Any = self.problem
            r = problem.inner_residual(self.x, y)
            return self.step_of((r, jnp.zeros_like(y)))
        return self.step_of(gradient)

    def pinv(self, vector: Float[Array, " n"]) -> Float[Array, " n"]:
        r"""$H^+ v$."""
        return self.solve(vector)[0]

    def project(self, vector: Float[Array, " n"]) -> Float[Array, " n"]:
        r"""$P v = (I - H^+ H) v$, the part of a vector along S(x)."""
        if self._knows_range:
            rows = self.inverse.right
            # Not `rows.T @ ...`, which is several times slower on a CPU.
            return vector - (rows @ vector) @ rows
        K = self.system
        if isinstance(K, AugmentedHessian):
            # Not H v, which would square the condition number.
            A, C = K.hessian.residual_jacobian, K.hessian.curvature
            bent = jnp.zeros_like(vector) if C is None else C.mv(vector)
            return vector - self.step_of((A.mv(vector), bent))
        return vector - self.pinv(self.at.hessian.mv(vector))

    @property
    def _knows_range(self) -> bool:
        return not self.differentiable and getattr(self.inverse, "knows_range", False)

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
        if isinstance(self.system, AugmentedHessian):
            q = self.step_from(self.y, along)
        else:
            rounding = 10 * jnp.finfo(size.dtype).eps * terms
            q = self._solved_beyond(along, rounding)
        step, left = q, along - H.mv(q)
        if set_y(self.problem).confines:
            across = self.at.step_size.astype(size.dtype) * (residual - along)
            step = self.at.along(q) + across
        length, rest = vector_norms(step, left)
        return NewtonStep(step, length, rest, curvature)

    def _solved_beyond(self, vector: Float[Array, " n"], rounding: Scalar):
        """$H^+ v$ without those coordinates of v, in the eigenvectors of H, that may be
        rounding. A nearly singular H would turn them into a long step."""
        if not self._knows_range:
            return self.pinv(vector)
        coordinates = self.inverse.coordinates(vector)
        excess = jnp.maximum(0, jnp.abs(coordinates) - rounding)
        return self.inverse.solution(jnp.sign(coordinates) * excess)

    def cross_transposed(
        self,
        multiplier: Float[Array, " n"],
        y: Float[Array, " n"] | None = None,
        image: PyTree[Array] | None = None,
    ) -> PyTree[Array]:
        r"""$B^\top \mu = \nabla_x \langle \mu, \nabla_y f \rangle$, at another y if one
        is given. For a sum of squares, `image` is $A \mu$ where it is known better."""
        if y is None and image is None and self.cross is not None:
            return self.cross(multiplier)
        return self._constraint(self.y if y is None else y, multiplier, image)[0]

    def _constraint(self, y, multiplier, image=None):
        """The gradients of <mu, f_y> in x and y, which are B^T mu and H mu.

        They are those of f, differentiated along mu. Not `jax.jvp`: JAX takes no second
        derivative of it where an objective has a `jax.custom_vjp`.
        """
        if image is not None:
            return self._constraint_of_squares(y, multiplier, image)
        if isinstance(self.problem, AbstractRootProblem):
            _, pull = jax.vjp(self.problem.root, self.x, y)
            return pull(multiplier)

        def gradients(y):
            return jax.grad(self.problem.inner, argnums=(0, 1))(self.x, y)

        return jax.linearize(gradients, y)[1](multiplier)

    def _constraint_of_squares(self, y, multiplier, image):
        r"""The gradients of $\langle A \mu, r \rangle$, from $A \mu$ apart: those of
        $\langle A \mu, r(x, y) \rangle + \langle w, A(x, y)\, \mu \rangle$ for a fixed
        image and a fixed $w = r$."""
        problem: Any = self.problem
        residual = problem.inner_residual
        # At y itself, whatever is differentiated: along S(x), A v is zero, and what it is
        # by rounding is not to be multiplied with mu.
        w = self._stationary_residual()

        def total(x, y):
            r, A_mu = jax.jvp(lambda y: residual(x, y), (y,), (multiplier,))
            return tree_dot(image, r) + tree_dot(w, A_mu)

        return jax.grad(total, argnums=(0, 1))(self.x, y)

    def outer(self) -> Outer:
        """The outer objective and its hypergradient."""
        value, outer_x, outer_y = outer_gradients(self.problem, self.x, self.y)
        q, image, result = self.adjoint(self.at.along(outer_y))
        along = self.at.along(q)
        pulled = self.cross_transposed(along, image=image)
        hypergradient = tree_axpy(-1.0, pulled, outer_x)
        return Outer(value, outer_x, outer_y, q, -along, hypergradient, result)

    def curvature_of_set(
        self, multiplier: Float[Array, " n"], image: PyTree[Array] | None = None
    ) -> Push:
        r"""How S(x) is curved: $v \mapsto (\partial_x \langle v, H \mu \rangle,
        \partial_y (H \mu) v)$; `image` as for `cross_transposed`, where it is a plane.
        """

        def gradients(y):
            return self._constraint(y, multiplier, image)

        return jax.linearize(gradients, self.y)[1]

    def lagrangian(
        self,
        objective: Callable[[PyTree, Float[Array, " n"]], Scalar],
        multiplier: Float[Array, " n"],
        image: PyTree[Array] | None = None,
    ) -> Lagrangian:
        """The Lagrangian of an objective on S(x), linearised in y; `image` as for
        `cross_transposed`, where S(x) is a plane."""

        def gradients(y):
            slopes = jax.grad(objective, argnums=(0, 1))(self.x, y)
            return tree_axpy(1.0, self._constraint(y, multiplier, image), slopes)

        (slope_x, slope_y), push = jax.linearize(gradients, self.y)
        return Lagrangian(slope_x, slope_y, push)

    def operator(
        self, product: Callable[[Float[Array, " n"]], Float[Array, " n"]]
    ) -> lx.AbstractLinearOperator:
        """A symmetric operator on vectors like y; a matrix where the picture is dense."""
        return as_operator(product, self.y, self.is_dense)

    def parts(
        self, push: Push
    ) -> tuple[Callable[[Float[Array, " n"]], PyTree], lx.AbstractLinearOperator]:
        """The two values of a push: what is like x, as a function, and the symmetric
        operator on vectors like y. Both are matrices where they are small."""
        if not (self.is_dense and tree_size(self.x) <= DENSE_SIZE):
            return lambda v: push(v)[0], self.operator(lambda v: push(v)[1])
        in_x, in_y = jax.vmap(push)(jnp.eye(self.y.size, dtype=self.y.dtype))
        return TransposedRows(in_x), lx.MatrixLinearOperator(in_y.T, lx.symmetric_tag)

    @property
    def projects_everything(self) -> bool:
        """Whether `project` is right for all vectors, and not in a Krylov space alone."""
        return not self._knows_range or self.inverse.everywhere

    def along(self, operator: lx.AbstractLinearOperator) -> lx.AbstractLinearOperator:
        r"""$P W P$, a symmetric operator within the tangent space."""

        def product(vector):
            return self.project(operator.mv(self.project(vector)))

        return as_operator(product, self.y, dense=False)

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

        return as_operator(total, self.y, dense=False)

    def clearance(self) -> Float[Array, " k"]:
        """The eigenvalues of H, or the singular values if y is a root, in units of their
        uncertainty. Beyond the dense size only for a root.

        Those that count as zero here are those that the pseudoinverse does not invert.
        """
        if self.is_dense and not set_y(self.problem).confines:
            return self.inverse.clearance
        values, curved = self.spectrum, False
        if values is None:
            values = eigenbasis(self.at.definite_hessian()).values
            curved = not self.is_plane
        return clearance(values, uncertainty(values, self.y.size, curved=curved))

    def decisions(self) -> tuple[Float[Array, " k"], Float[Array, " k"] | None] | None:
        """`clearance`, and the eigenvalues if their uncertainty is not all rounding;
        `None` if they are not known."""
        if not self.is_dense or set_y(self.problem).confines:
            return None
        return self.inverse.clearance, getattr(self.inverse, "values", None)

    @property
    def largest_curvature(self) -> Scalar:
        """The largest eigenvalue of H; or the size of H along a vector that is nothing
        special, where eigenvalues are not known."""
        if self._knows_range:
            return self.inverse.largest
        return typical_magnitude(self.at.hessian.mv, self.y)

    @property
    def is_convex(self) -> bool:
        """Whether f is known to be convex, as a sum of squares that are linear in y."""
        H = self.at.hessian
        return isinstance(H, LeastSquaresHessian) and H.curvature is None

    def negative_curvature(self) -> Scalar:
        """How negative the most negative eigenvalue of H is where y can move, relative to
        the largest. Zero at a minimum."""
        if self.is_convex:
            return jnp.zeros((), self.y.dtype)
        values = getattr(self.inverse, "values", None)
        if values is None:
            num_steps = self.share_of_products(0.5, _LANCZOS_STEPS)
            values = eigenbasis(self.at.definite_hessian(), None, num_steps).values
        return negative_share(ends(values))

    def share_of_products(self, share: float, most: int) -> int:
        """A number of steps, each as costly as three products with H, that takes no more
        than a share of the products that are allowed."""
        return _share(self.max_products, share, most)

    def accuracy(
        self, vector: Float[Array, " n"], solution: Float[Array, " n"]
    ) -> Scalar:
        r"""How far the adjoint $q = H^{+\top} v$ is from solving $H H^\top q = H v$,
        relative to the size of $v$ and of $H$.

        Asked of $H$ itself, and not of the solver.
        """
        H = self.at.hessian
        remainder = H.T.mv(solution) - vector
        left, size, image = vector_norms(H.mv(remainder), vector, H.mv(vector))
        # Not relative to H v alone: at an equilibrium v may lie in the null space.
        return left / nonzero(self.largest_curvature * size + image)

    def accuracy_of_projection(self, *vectors: Float[Array, " n"]) -> Scalar:
        """How far `project` is from a projection on the null space of H, for the worst of
        some vectors: the part along S(x) is in the null space, and the rest in the range
        of H. Asked of H, as `accuracy` is."""
        H, size = self.at.hessian, nonzero(self.largest_curvature)

        def wrong(vector):
            along = self.project(vector)
            across = H.mv(along) / size
            if not self._knows_range:
                # What a solver of least squares finds is in the range of H by itself.
                return vector_norm(across) / nonzero(vector_norm(vector))
            outside = vector - along - H.mv(self.pinv(vector))
            across, outside, total = vector_norms(across, outside, vector)
            return (across + outside) / nonzero(total)

        return jnp.max(jax.vmap(wrong)(jnp.stack(vectors)))

    def moved(self, y: Float[Array, " n"]) -> "Picture":
        """The picture at another y of the same plane, where H is the same."""
        assert self.is_plane
        value, gradient = jax.value_and_grad(self.problem.inner, argnums=1)(self.x, y)
        return eqx.tree_at(
            lambda p: (p.y, p.value, p.gradient, p.at.residual),
            self,
            (y, value, gradient, gradient),
        )


def _share(max_products: int | None, share: float, most: int) -> int:
    if max_products is None:
        return most
    return max(1, min(most, int(share * max_products / 3)))


def _way_to_minimum(at: Stationarity, y: Float[Array, " n"]) -> Float[Array, " n"]:
    r"""A vector whose Krylov space has the step from y to a minimum: the residual r that
    vanishes there, or for a root $H^\top r$.

    Zero where r is so small that the step is, too, but for curvatures that no number of
    products would find.
    """
    H = at.definite_hessian()
    residual = at.along(at.residual)
    size, left = vector_norms(y, residual)
    way = residual if lx.is_symmetric(H) else H.T.mv(residual)
    eps = float(jnp.finfo(y.dtype).eps)
    return where(left > eps**0.75 * typical_magnitude(H.mv, y) * size, way, 0)


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
    on_set: bool = False,
) -> Picture:
    """The local picture of a problem whose inner variables are one vector.

    Products with the pseudoinverse have the derivatives of lineax's if
    `differentiable`, and none otherwise. `computed` is what `Picture.computed` of the
    same point has, without constraints. Beyond the dense size, `max_products` bounds the
    products with H that are taken in all, and `share` is how much of that goes into the
    pseudoinverse: all, if there is an `anchor` and S(x) is a plane. That is then one of a
    Krylov space: see `_bounded_inverse`. `on_set` says that y is on S(x) but for
    rounding.
    """
    check_mesh_of_solve((problem, x, y))
    dense = y.size <= DENSE_SIZE and not differentiable
    is_plane = not hessian_depends_on_y(problem, x, y)
    linear_solver = judged(linear_solver)
    tags = tags_for(problem, linear_solver, not is_plane)
    if on_set and curved_tag in tags:
        tags = tags | {on_set_tag}
    bounded = max_products is not None and y.size > DENSE_SIZE
    if computed is None:
        projector = None if bounded else linear_solver
        computed = (*_expansion(problem, x, y, dense, tags, projector), None)
    value, gradient, H, cross, inverse = computed
    at = set_y(problem).stationarity(gradient, H, y, tags)
    spectrum = None
    if bounded and inverse is None:
        assert max_products is not None
        if anchor is not None and is_plane:
            # Nothing is needed for the curvature of S(x).
            share = 1.0
        num_products = int(share * max_products) - _FURTHER_PRODUCTS
        if isinstance(problem, AbstractRootProblem):
            # Each step is a product with H and one with its transpose.
            num_steps = max(2, num_products // 8)
            spectrum = singular_values(at.hessian, num_steps)
            num_products = num_products - 2 * num_steps
        slope = jax.grad(problem.outer, argnums=1)(x, y)
        inverse = _bounded_inverse(
            at, y, slope, anchor, max_products, num_products, not is_plane
        )
    if inverse is None:
        # Factorised once, for all products with the pseudoinverse. Their derivatives do
        # not go through the factors.
        dynamic, static = eqx.partition(at.hessian, eqx.is_array)
        fixed = eqx.combine(jax.lax.stop_gradient(dynamic), static)
        K = augmented(linear_solver, fixed)
        inverse: Any = linear_solver.init(fixed if K is None else K, options={})
    if isinstance(problem, AbstractRootProblem) and spectrum is None:
        spectrum = inverse.values if dense else singular_values(at.hessian)
    return Picture(
        problem=problem,
        x=x,
        y=y,
        value=value,
        gradient=gradient,
        at=at,
        cross=cross,
        linear_solver=linear_solver,
        inverse=inverse,
        spectrum=spectrum,
        max_products=max_products if bounded else None,
        is_plane=is_plane,
        differentiable=differentiable,
    )


def _bounded_inverse(
    at: Stationarity, y, slope, anchor, max_products: int, num_products: int, curved: bool
):
    """The pseudoinverse in a Krylov space of F_y, of the way to a minimum, and of the
    displacement from an anchor."""
    # Not their sum: its space contains none of them.
    starts = [at.along(slope)]
    if anchor is not None:
        starts.append(y - anchor)
        num_products = num_products - _PRODUCTS_OF_PROJECTIONS
    starts.append(_way_to_minimum(at, y))
    H = at.definite_hessian()
    squares = isinstance(H, LeastSquaresHessian)
    if squares and H.curvature is not None:
        # Those of `negative_curvature`.
        num_products = num_products - _share(max_products, 0.5, _LANCZOS_STEPS)
    inverse = krylov_inverse(H, jnp.stack(starts), max(1, num_products), curved)
    return Augmented(inverse) if squares else inverse


def _expansion(problem, x, y, dense: bool, tags, projector):
    """f, f_y and H, from one linearisation, and B if it comes with them."""
    if isinstance(problem, AbstractRootProblem):
        residual, jacobian = gradient_and_hessian(problem, x, y, tags)
        jacobian = as_operator(jacobian.mv, y, True, tags) if dense else jacobian
        return None, residual, jacobian, None
    if tells_change(problem, y, tags):
        return curved_hessian(problem, x, y, tags)
    if not dense:
        gradient, H, _ = expansion(problem, x, y, tags, projector)
        return problem.inner(x, y), gradient, H, None
    if isinstance(problem, AbstractLeastSquaresProblem):
        gradient, H, _ = expansion(problem, x, y, tags, projector)
        assert isinstance(H, LeastSquaresHessian)
        A = as_operator(H.residual_jacobian.mv, y, True, ())
        C = None if H.curvature is None else as_operator(H.curvature.mv, y, True)
        return problem.inner(x, y), gradient, LeastSquaresHessian(A, C, H.tags), None
    value, gradient, product = value_gradient_and_product(
        lambda y: problem.inner(x, y), y
    )
    return value, gradient, as_operator(product, y, True, tags), None


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


# What a certificate takes beside the pseudoinverse: to measure its accuracy, for one.
_FURTHER_PRODUCTS = 9
# What `accuracy_of_projection` takes for two vectors.
_PRODUCTS_OF_PROJECTIONS = 4


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
        step = here.step_from(y, gradient)
        length = vector_norm(step)
        # A step that is longer than the last leads away.
        y = where(length < before, y - step, y)
        return count + 1, y, length, before, vector_norm(gradient)

    largest = jnp.asarray(jnp.finfo(y.dtype).max, y.dtype)
    carry = jnp.array(0), y, 0.5 * largest, largest, largest
    _, y, length, _, norm = jax.lax.while_loop(unfinished, body, carry)
    return y, length, norm


_RESTORATIONS = 50


_LANCZOS_STEPS = 64
