"""Bilevel problems: two objectives of the same outer and inner variables."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, Generic

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree, Scalar, ScalarLike

from ._custom_types import X, Y
from ._misc import (
    DENSE_SIZE,
    depends_on,
    tree_cast,
    tree_dot,
    tree_size,
    tree_struct,
    tree_sub,
)


class AbstractBilevelProblem(eqx.Module, Generic[X, Y]):
    r"""A bilevel problem, in outer variables $x$ and inner variables $y$:

    $$\min_x F(x, y) \quad\text{subject to}\quad
    y \in S(x) = \operatorname{argmin}_y f(x, y).$$

    Subclass it, and keep the data and the hyperparameters as fields: a problem is a
    pytree, so that these can be vmapped over, sharded, and differentiated with respect
    to. Where $S(x)$ has more than one element, which of them is meant is not said here
    but by an equilibrium; see [`bilevel_eqx.solve`][].

    **Constraints.** x, y or both may be confined to closed convex sets, each known by the
    Euclidean projection on it: define the methods `project_x(self, x)` and
    `project_y(self, y)`. `optax.projections` has them for boxes, balls, the simplex and
    others. A set may depend on the problem's fields, and not on the other variables.

    !!! Example

        ```python
        class Ridge(blx.AbstractBilevelProblem):
            train: tuple[Array, Array]
            validation: tuple[Array, Array]

            def outer(self, x, y):
                features, targets = self.validation
                return jnp.mean((features @ y - targets) ** 2)

            def inner(self, x, y):
                features, targets = self.train
                fit = jnp.mean((features @ y - targets) ** 2)
                return fit + jnp.sum(jnp.exp(x) * y**2)

            def project_y(self, y):  # only where there is a constraint
                return optax.projections.projection_non_negative(y)
        ```
    """

    project_x: ClassVar[Callable[[Any], Any] | None] = None
    project_y: ClassVar[Callable[[Any], Any] | None] = None

    @abc.abstractmethod
    def outer(self, x: X, y: Y) -> Scalar:
        """The outer objective $F(x, y)$.

        **Arguments:**

        - `x`: the outer variables, a pytree of floating-point arrays.
        - `y`: the inner variables, a pytree of floating-point arrays.

        **Returns:**

        A floating-point scalar.
        """

    @abc.abstractmethod
    def inner(self, x: X, y: Y) -> Scalar:
        """The inner objective $f(x, y)$, with arguments as for `outer`.

        **Returns:**

        A floating-point scalar.
        """


class BilevelProblem(AbstractBilevelProblem[X, Y]):
    """A bilevel problem made from two functions.

    !!! Example

        ```python
        problem = blx.BilevelProblem(
            outer=lambda x, y: jnp.sum((y - 1) ** 2),
            inner=lambda x, y: jnp.sum((y - x) ** 2),
        )
        ```
    """

    outer_fn: Callable[[X, Y], Scalar]
    inner_fn: Callable[[X, Y], Scalar]
    project_x: Callable[[X], X] | None
    project_y: Callable[[Y], Y] | None

    # `Any`, because a type checker cannot tell what x and y are in a lambda.
    def __init__(
        self,
        outer: Callable[[Any, Any], Any],
        inner: Callable[[Any, Any], Any],
        *,
        project_x: Callable[[Any], Any] | None = None,
        project_y: Callable[[Any], Any] | None = None,
    ):
        """**Arguments:**

        - `outer`: the outer objective, a function of `(x, y)` with a scalar value.
        - `inner`: the inner objective, a function of `(x, y)` with a scalar value.
        - `project_x`, `project_y`: the Euclidean projections on the convex sets that x
            and y are confined to, if they are. Keyword only arguments.

        Arrays that the functions close over are constants of the program. To change
        them without compiling anew, pass Equinox modules, or subclass
        [`bilevel_eqx.AbstractBilevelProblem`][] and make them fields.
        """
        self.outer_fn = outer
        self.inner_fn = inner
        self.project_x = project_x
        self.project_y = project_y

    def outer(self, x, y):
        return self.outer_fn(x, y)

    def inner(self, x, y):
        return self.inner_fn(x, y)


class AbstractLeastSquaresProblem(AbstractBilevelProblem[X, Y]):
    r"""A bilevel problem whose inner objective is a sum of squares,

    $$f(x, y) = \tfrac12 \|r(x, y)\|^2.$$

    Saying so pays: pseudoinverses then work on the Jacobian of the residual $r$ and
    never on the inner Hessian, whose condition number is the square of the Jacobian's.
    """

    @abc.abstractmethod
    def inner_residual(self, x: X, y: Y) -> PyTree[Array]:
        """The residual $r(x, y)$ whose squares are summed.

        **Returns:**

        A pytree of floating-point arrays.
        """

    def inner(self, x: X, y: Y) -> Scalar:
        residual = self.inner_residual(x, y)
        return 0.5 * tree_dot(residual, residual)


class LeastSquaresProblem(AbstractLeastSquaresProblem[X, Y]):
    """A bilevel problem with a sum of squares inside, made from two functions."""

    outer_fn: Callable[[X, Y], Scalar]
    inner_residual_fn: Callable[[X, Y], PyTree[Array]]
    project_x: Callable[[X], X] | None
    project_y: Callable[[Y], Y] | None

    def __init__(
        self,
        outer: Callable[[Any, Any], Any],
        inner_residual: Callable[[Any, Any], Any],
        *,
        project_x: Callable[[Any], Any] | None = None,
        project_y: Callable[[Any], Any] | None = None,
    ):
        """**Arguments:**

        - `outer`: the outer objective, a function of `(x, y)` with a scalar value.
        - `inner_residual`: a function of `(x, y)`, with a pytree of floating-point
            arrays as its value; half the sum of their squares is the inner objective.
        - `project_x`, `project_y`: as for [`bilevel_eqx.BilevelProblem`][].
        """
        self.outer_fn = outer
        self.inner_residual_fn = inner_residual
        self.project_x = project_x
        self.project_y = project_y

    def outer(self, x, y):
        return self.outer_fn(x, y)

    def inner_residual(self, x, y):
        return self.inner_residual_fn(x, y)


#
# Problems made from problems
#


class _ProximalProblem(AbstractBilevelProblem):
    problem: AbstractBilevelProblem
    anchor: PyTree[Array]
    epsilon: ScalarLike

    @property
    def project_x(self):
        return self.problem.project_x

    @property
    def project_y(self):
        return self.problem.project_y

    def outer(self, x, y):
        return self.problem.outer(x, y)

    def inner(self, x, y):
        displacement = tree_sub(y, self.anchor)
        square = tree_dot(displacement, displacement)
        inner = self.problem.inner(x, y)
        epsilon = jnp.asarray(self.epsilon, inner.dtype)
        return inner + 0.5 * epsilon * square.astype(inner.dtype)


class _ProximalLeastSquaresProblem(AbstractLeastSquaresProblem):
    problem: AbstractLeastSquaresProblem
    anchor: PyTree[Array]
    epsilon: ScalarLike

    @property
    def project_x(self):
        return self.problem.project_x

    @property
    def project_y(self):
        return self.problem.project_y

    def outer(self, x, y):
        return self.problem.outer(x, y)

    def inner_residual(self, x, y):
        root = jnp.sqrt(jnp.asarray(self.epsilon))
        displacement = tree_sub(y, self.anchor)
        pull = jtu.tree_map(lambda d: root.astype(d.dtype) * d, displacement)
        return self.problem.inner_residual(x, y), pull


def proximal(
    problem: AbstractBilevelProblem, anchor: PyTree[Array], epsilon: ScalarLike
) -> AbstractBilevelProblem:
    r"""`problem` with the inner objective $f(x, y) + \frac\epsilon2 \|y - a\|^2$.

    (Equation 3 of the paper. A sum of squares stays one, if it is small.)
    """
    # The pull adds as many squares as there are variables. Where those are too many for
    # a dense factor nothing is gained by them: the damped Hessian is well conditioned.
    is_small = tree_size(anchor) <= DENSE_SIZE
    if isinstance(problem, AbstractLeastSquaresProblem) and is_small:
        return _ProximalLeastSquaresProblem(problem, anchor, epsilon)
    return _ProximalProblem(problem, anchor, epsilon)


def _no_outer(x, y):
    raise RuntimeError("The inner problem alone was kept; it has no outer objective.")


def closure_converted(
    problem: AbstractBilevelProblem, x: PyTree[Array], y: PyTree[Array]
) -> AbstractBilevelProblem:
    """The inner problem of `problem`, with all that its functions close over as leaves.

    A derivative rule sees only its arguments. Without this, a value that the inner
    objective closes over would have a derivative of zero, without a word.
    """
    project_y = projection_y(problem)
    if project_y is not None:
        project_y = eqx.filter_closure_convert(project_y, y)
    if isinstance(problem, AbstractLeastSquaresProblem):
        residual = eqx.filter_closure_convert(problem.inner_residual, x, y)
        return LeastSquaresProblem(_no_outer, residual, project_y=project_y)
    inner = eqx.filter_closure_convert(problem.inner, x, y)
    return BilevelProblem(_no_outer, inner, project_y=project_y)


#
# Checks, all made from shapes alone: they cost nothing in a compiled program.
#


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
    struct, wanted = jax.eval_shape(_Projection(fn).raw, at), tree_struct(at)
    shapes, wanted_shapes = (jtu.tree_map(lambda u: u.shape, s) for s in (struct, wanted))
    if shapes != wanted_shapes:
        raise ValueError(
            f"`problem.project_{name}({name})` must return the nearest point of a set, "
            f"of the structure and shapes of {name}: {wanted}. It returns {struct}."
        )


def check_problem(problem: AbstractBilevelProblem, x: PyTree, y: PyTree) -> None:
    """Refuses objectives that are not scalars, an inner one that ignores y, and
    projections to other spaces."""
    _check_projection(problem.project_x, "x", x)
    _check_projection(problem.project_y, "y", y)
    _check_scalar(problem.outer, "outer", x, y)
    _check_scalar(problem.inner, "inner", x, y)
    if not depends_on(lambda y: problem.inner(x, y), y):
        raise ValueError(
            "The inner objective does not depend on y: the derivative of "
            "`problem.inner(x, y)` with respect to y is zero whatever x and y are. "
            "Check the order of its arguments, which is (x, y), and look for a "
            "`stop_gradient` or a cast to integers on the way from y."
        )


def outer_gradients(
    problem: AbstractBilevelProblem, x: PyTree[Array], y: PyTree[Array]
) -> tuple[Scalar, PyTree[Array], PyTree[Array]]:
    """The outer objective with both of its partial gradients: F, F_x, F_y."""
    value, (outer_x, outer_y) = jax.value_and_grad(problem.outer, argnums=(0, 1))(x, y)
    return value, outer_x, outer_y


#
# Constraints
#


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


def inner_gradient(
    problem: AbstractBilevelProblem, x: PyTree[Array], y: PyTree[Array]
) -> PyTree[Array]:
    """The gradient of the inner objective in the inner variables, f_y."""
    return jax.grad(problem.inner, argnums=1)(x, y)
