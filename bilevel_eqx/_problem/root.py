"""Bilevel problems whose inner variables are a root or a fixed point."""

import abc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, Scalar

from .._custom_types import X, Y
from .base import AbstractBilevelProblem


class AbstractRootProblem(AbstractBilevelProblem[X, Y]):
    r"""A bilevel problem whose inner variables are a root and not a minimum,

    $$\min_x F(x, y) \quad\text{subject to}\quad r(x, y) = 0.$$

    The residual $r$ takes the place that $\nabla_y f$ has for a minimum, and its Jacobian
    $\partial r / \partial y$, which need not be symmetric, that of $H$. By the implicit
    function theorem

    $$\frac{\partial y^*}{\partial x} = -\Bigl(\frac{\partial r}{\partial y}\Bigr)^{-1}
    \frac{\partial r}{\partial x}, \qquad
    \frac{\mathrm d F}{\mathrm d x} = F_x - \Bigl(\frac{\partial r}{\partial x}\Bigr)^\top
    q, \qquad \Bigl(\frac{\partial r}{\partial y}\Bigr)^\top q = F_y.$$

    Subclass it, and make the data fields, as for
    [`bilevel_eqx.AbstractBilevelProblem`][]. x may be confined to a set (`project_x`);
    y may not.

    The response is [`bilevel_eqx.Implicit`][], with a root finder of optimistix or
    [`bilevel_eqx.Projection`][], or [`bilevel_eqx.Unrolled`][]. The equilibria are
    [`bilevel_eqx.Stackelberg`][] and [`bilevel_eqx.WarmStart`][]. The others, and some
    audits, compare values of an inner objective or use that H is symmetric, and are
    refused.

    ??? cite "References"

        Bai, Kolter and Koltun, *Deep equilibrium models*, NeurIPS 2019. Blondel et al.,
        *Efficient and modular implicit differentiation*, NeurIPS 2022.
    """

    @abc.abstractmethod
    def root(self, x: X, y: Y) -> Y:
        """The residual $r(x, y)$, which is zero at the inner solution.

        **Returns:**

        A pytree with the structure, the shapes and the types of y.
        """

    def inner(self, x: X, y: Y) -> Scalar:
        """There is no inner objective: this raises a `ValueError`."""
        raise _no_objective("`problem.inner`")


class RootProblem(AbstractRootProblem[X, Y]):
    """A bilevel problem whose inner variables are a root, made from two functions.

    !!! Example

        ```python
        problem = blx.RootProblem(
            outer=lambda x, y: jnp.sum((y - 1) ** 2),
            root=lambda x, y: y + y**3 - x,
        )
        ```
    """

    outer_fn: Callable[[X, Y], Scalar]
    root_fn: Callable[[X, Y], Y]
    project_x: Callable[[X], X] | None

    # `Any`, because a type checker cannot tell what x and y are in a lambda.
    def __init__(
        self,
        outer: Callable[[Any, Any], Any],
        root: Callable[[Any, Any], Any],
        *,
        project_x: Callable[[Any], Any] | None = None,
    ):
        """**Arguments:**

        - `outer`: the outer objective, a function of `(x, y)` with a scalar value.
        - `root`: the residual that is zero at the inner solution, a function of `(x, y)`
            that returns a pytree with the structure, the shapes and the types of y.
        - `project_x`: as for [`bilevel_eqx.BilevelProblem`][].
        """
        self.outer_fn = outer
        self.root_fn = root
        self.project_x = project_x

    def outer(self, x, y):
        return self.outer_fn(x, y)

    def root(self, x, y):
        return self.root_fn(x, y)


class FixedPointProblem(AbstractRootProblem[X, Y]):
    r"""A bilevel problem whose inner variables are a fixed point, made from two
    functions,

    $$\min_x F(x, y) \quad\text{subject to}\quad y = \varphi(x, y).$$

    It is the root problem of $r(x, y) = y - \varphi(x, y)$, so that
    [`bilevel_eqx.Neumann`][] with a step size of one is the series
    $\sum_k (\partial \varphi / \partial y)^k$.

    !!! Example

        A deep equilibrium layer:

        ```python
        problem = blx.FixedPointProblem(
            outer=lambda x, z: jnp.sum((z - target) ** 2),
            fixed_point=lambda x, z: jnp.tanh(x["W"] @ z + x["U"] @ inputs + x["b"]),
        )
        ```
    """

    outer_fn: Callable[[X, Y], Scalar]
    fixed_point_fn: Callable[[X, Y], Y]
    project_x: Callable[[X], X] | None

    def __init__(
        self,
        outer: Callable[[Any, Any], Any],
        fixed_point: Callable[[Any, Any], Any],
        *,
        project_x: Callable[[Any], Any] | None = None,
    ):
        r"""**Arguments:**

        - `outer`: the outer objective, a function of `(x, y)` with a scalar value.
        - `fixed_point`: $\varphi$, a function of `(x, y)` that returns a pytree with the
            structure, the shapes and the types of y.
        - `project_x`: as for [`bilevel_eqx.BilevelProblem`][].
        """
        self.outer_fn = outer
        self.fixed_point_fn = fixed_point
        self.project_x = project_x

    def outer(self, x, y):
        return self.outer_fn(x, y)

    def fixed_point(self, x: X, y: Y) -> Y:
        """The map whose fixed point is meant."""
        return self.fixed_point_fn(x, y)

    def root(self, x, y):
        return jax.tree.map(jnp.subtract, y, self.fixed_point(x, y))


def fixed_point_map(
    problem: AbstractRootProblem, x: PyTree[Array], y: PyTree[Array]
) -> PyTree[Array]:
    """y - r(x, y), whose fixed points are the roots."""
    return jax.tree.map(jnp.subtract, y, problem.root(x, y))


def check_has_objective(
    problem: AbstractBilevelProblem, owner: str, instead: str | None = None
) -> None:
    """Refuses a root problem where an inner objective is needed."""
    if isinstance(problem, AbstractRootProblem):
        raise _no_objective(owner, instead)


def _no_objective(owner: str, instead: str | None = None) -> ValueError:
    if instead is None:
        instead = (
            "Use `Implicit` with a root finder of optimistix (`optx.Newton`), with "
            "`Projection()`, or with `optx.FixedPointIteration`."
        )
    return ValueError(
        f"{owner} is for inner problems that are minima, but the inner variables of this "
        f"problem are a root, r(x, y) = 0, and it has no inner objective. {instead}"
    )
