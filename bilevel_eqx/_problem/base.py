"""Bilevel problems: two objectives of the same outer and inner variables."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, Generic

import equinox as eqx
from jaxtyping import Scalar

from .._custom_types import X, Y


class AbstractBilevelProblem(eqx.Module, Generic[X, Y]):
    r"""A bilevel problem, in outer variables $x$ and inner variables $y$:

    $$\min_x F(x, y) \quad\text{subject to}\quad
    y \in S(x) = \operatorname{argmin}_y f(x, y).$$

    Subclass it, and make the data and the hyperparameters fields. A problem is a pytree,
    so that one can vmap over them, shard them, and differentiate with respect to them. If
    $S(x)$ has more than one element, an equilibrium says which one is meant; see
    [`bilevel_eqx.solve`][].

    **Constraints.** x, y or both may be confined to closed convex sets. The Euclidean
    projections on these sets are the methods `project_x(self, x)` and
    `project_y(self, y)`. `optax.projections` has projections on boxes, balls, the simplex
    and others. A set may depend on the fields of the problem, but not on the other
    variables.

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
            and y are confined to. `None`, the default, is no constraint. Keyword only
            arguments.

        Arrays that the functions close over are constants of the program. To change
        them without a new compilation, pass Equinox modules, or subclass
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
