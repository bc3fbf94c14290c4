r"""A bound on the error of a hypergradient, from its two residuals."""

from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
from jaxtyping import Array, Scalar, ScalarLike

from .._arguments import as_rate, as_variables, check_positive
from .._compat import called_once, is_traced
from .._custom_types import X, Y
from .._depends_on import depends_on
from .._derivatives.first import inner_gradient
from .._derivatives.second import (
    cross_derivative_operator,
    gradient_and_hessian,
    hessian_depends_on_y,
)
from .._hypergradient import Hypergradient
from .._linalg.decompositions import eigvalsh
from .._linalg.eigenbasis import extreme_eigenvalues, lanczos
from .._linalg.precision import in_full_precision
from .._mesh import on_auto_axes
from .._problem.base import AbstractBilevelProblem
from .._problem.constraints import set_y
from .._problem.root import check_has_objective
from .._tree import nonzero, tree_axpy, tree_dtype, tree_norm, tree_struct


class ErrorBound(eqx.Module):
    r"""A bound on the error of a hypergradient; `print` it for a sentence.

    Let $q$ be what the linear solver returned for $H^{-1} F_y$, and
    $\Lambda(x, y) = F(x, y) - \langle q, \nabla_y f(x, y) \rangle$. The hypergradient is
    $\Lambda_x$ and the linear residual is $\Lambda_y$. With a lower bound $\mu$ on the
    eigenvalues of $H$

    $$\|\Lambda_x - g^*\| \le \|\Lambda_{xy}\|\, \delta + \frac{\|B\|}{\mu}
    \bigl(\|\Lambda_y\| + \|\Lambda_{yy}\|\, \delta\bigr), \qquad
    \delta = \frac{\|\nabla_y f\|}{\mu} \ge \|y - y^*\|.$$

    This follows from an identity for $g^*$ around $y$. The rounding of both residuals,
    and that of $\Lambda_x$, are added: as much as these change when each number among the
    data is moved by one unit in its last place, a few times over.

    **Attributes:**

    - `bound`: the right side, an upper bound on the norm of the error. Infinite if
        $\mu \le 0$.
    - `verified`: whether $\mu$ holds wherever the minimum may be: it comes from the
        user, or from a decomposition of H where f is quadratic in y. If not, the bound is
        *estimated*: $\mu$ is one from above by Lanczos' method, or it is extrapolated
        from two points.
    - `curvature`: $\mu$.
    - `distance`: $\delta$, a bound on the distance of y from the inner minimum.
    - `inner_residual`: $\|\nabla_y f\|$.
    - `linear_residual`: $\|F_y - H q\|$. (That in `stats` is relative to $F_y$.)
    """

    bound: Scalar
    curvature: Scalar
    distance: Scalar
    inner_residual: Scalar
    linear_residual: Scalar
    verified: bool = eqx.field(static=True)

    def __str__(self):
        if is_traced(self.bound) or jnp.ndim(self.bound) > 0:
            return f"error <= {self.bound}"
        word = "verified" if self.verified else "estimated"
        curvature = f"the smallest curvature of f is {float(self.curvature):.3g}"
        if not bool(jnp.isfinite(self.bound)):
            return (
                f"No bound ({word}): {curvature}, but the bound needs a positive one. "
                "Penalise y, or use `Proximal`."
            )
        return (
            f"error <= {float(self.bound):.3g} ({word}): {curvature}; the inner gradient "
            f"has norm {float(self.inner_residual):.3g}, so that y is within "
            f"{float(self.distance):.3g} of the minimum; the linear residual has norm "
            f"{float(self.linear_residual):.3g}"
        )


Curvature = Literal["dense", "lanczos"] | ScalarLike


@on_auto_axes
@in_full_precision
def error_bound(
    problem: AbstractBilevelProblem[X, Y],
    x: X,
    hypergradient: Hypergradient[X, Y],
    curvature: Curvature,
) -> ErrorBound:
    r"""A bound on the error of a hypergradient, from the residuals of its inner and its
    linear solve.

    It works under `jit` and `vmap`, together with the hypergradient or after it.

    **Arguments:**

    - `problem`: the bilevel problem.
    - `x`: the outer variables of the hypergradient.
    - `hypergradient`: what [`bilevel_eqx.hypergradient`][] returned for `x`, by
        [`bilevel_eqx.Implicit`][] or [`bilevel_eqx.Proximal`][].
    - `curvature`: a lower bound on the eigenvalues of the inner Hessian. A number that is
        right at every y makes the bound *verified*; so does `"dense"`, which decomposes
        that Hessian, if f is quadratic in y. `"lanczos"` *estimates* it with 64 products.

    The norms in the bound need about a hundred more products with second derivatives.

    **Returns:**

    A [`bilevel_eqx.reports.ErrorBound`][]; `print` it for a sentence.

    **Raises:**

    A `ValueError` if the response has no bound, if y is confined to a set, or if
    `curvature` is none of the above.

    !!! Example

        ```python
        out = blx.hypergradient(problem, x, y0, response)
        print(blx.error_bound(problem, x, out, "lanczos"))
        ```
    """
    check_has_objective(
        problem,
        "`error_bound`",
        "Use `check_hypergradient`, or the residuals in the `stats` of the "
        "hypergradient.",
    )
    if set_y(problem).confines:
        raise ValueError(
            "`error_bound` is for inner problems without constraints, but this one has a "
            "`project_y`: the derivative jumps where a constraint becomes active. Use "
            "`check_hypergradient`."
        )
    if hypergradient.adjoint is None or hypergradient.presumes is None:
        raise ValueError(
            "`error_bound` needs the residuals of the inner and the linear solve of an "
            "implicit hypergradient, which a response such as `Unrolled` does not have. "
            "Use `Implicit` or `Proximal`, or `check_hypergradient`, which takes any "
            "response."
        )
    x = as_variables(x, "x")
    return _error_bound(problem, x, hypergradient, _as_curvature(curvature))


def _is_named(curvature: Any, name: str) -> bool:
    return isinstance(curvature, str) and curvature == name


def _as_curvature(curvature: Any) -> Any:
    """The name of a method, or a number as data."""
    if curvature in ("dense", "lanczos"):
        return curvature
    if isinstance(curvature, str):
        raise ValueError(
            "`error_bound(curvature=...)` must be 'dense', 'lanczos', or a lower bound "
            f"on the eigenvalues of the inner Hessian; it is {curvature!r}."
        )
    check_positive(curvature, "curvature", "error_bound")
    return as_rate(curvature)


@called_once
def _error_bound(problem, x, hypergradient: Hypergradient, curvature: Any) -> ErrorBound:
    assert hypergradient.presumes is not None
    problem = hypergradient.presumes(problem)
    y, q = hypergradient.y, hypergradient.adjoint

    def gradients(x, y):
        # The gradients of the Lagrangian. Its value is not needed.
        slope, push = jax.linearize(jax.grad(problem.outer, argnums=(0, 1)), x, y)
        del push
        _, pull = jax.vjp(lambda x, y: inner_gradient(problem, x, y), x, y)
        return jax.tree.map(jnp.subtract, slope, pull(q))

    def measured(x, y):
        return *gradients(x, y), inner_gradient(problem, x, y)

    dtype = tree_dtype(y)
    _, linear, inner = measured(x, y)
    residual, slope = tree_norm(linear).astype(dtype), tree_norm(inner).astype(dtype)
    # What of these three is rounding. A residual below that says nothing.
    direct, residual_floor, slope_floor = _rounding(measured, x, y)

    here = _measure(problem, gradients, x, y, curvature)

    def distance(curvature):
        return (slope + slope_floor) / nonzero(curvature)

    if _is_quadratic(problem, gradients, x, y):
        worst = here
    else:
        # The bound needs the norms at all points where the minimum may be. They are taken
        # at y and at that distance from it, and extrapolated from their change.
        length = distance(here.curvature) / nonzero(slope)
        there = _measure(problem, gradients, x, tree_axpy(-length, inner, y), curvature)
        low, high = (jax.tree.map(f, here, there) for f in (jnp.minimum, jnp.maximum))
        change = jax.tree.map(jnp.subtract, high, low)
        worst = jax.tree.map(jnp.add, high, change)
        lowest = low.curvature - change.curvature
        worst = worst._replace(curvature=lowest)

    delta = distance(worst.curvature)
    indirect = residual + residual_floor + worst.inner * delta
    bound = worst.mixed * delta + worst.cross / nonzero(worst.curvature) * indirect
    bound = bound + direct
    return ErrorBound(
        bound=jnp.where(worst.curvature > 0, bound, jnp.inf),
        curvature=worst.curvature,
        distance=jnp.where(worst.curvature > 0, delta, jnp.inf),
        inner_residual=slope,
        linear_residual=residual,
        # A number is said to be right at every y. A decomposition is right at one.
        verified=not isinstance(curvature, str)
        or (curvature == "dense" and not hessian_depends_on_y(problem, x, y)),
    )


def _rounding(measured, x, y) -> tuple[Scalar, Scalar, Scalar]:
    """How much of each value is rounding: its change when all data are rounded anew.

    The data are x, y, and every array that the objectives contain or close over. Each
    number is moved by one unit in its last place, up or down at random. That is what a
    rounded sum amounts to: an exact sum of data that are off by so much.
    """
    values = measured(x, y)
    data = eqx.filter_closure_convert(measured, x, y), x, y
    numbers, rest = eqx.partition(data, eqx.is_inexact_array)
    leaves, treedef = jax.tree.flatten(numbers)

    def change(key):
        keys = jr.split(key, max(1, len(leaves)))
        moved = [
            u * (1 + jnp.finfo(u.dtype).eps * jr.rademacher(k, u.shape, u.dtype))
            for u, k in zip(leaves, keys)
        ]
        fn, x, y = eqx.combine(treedef.unflatten(moved), rest)
        return [
            tree_norm(jax.tree.map(jnp.subtract, new, old))
            for new, old in zip(fn(x, y), values)
        ]

    changes = jax.lax.map(change, jr.split(jr.PRNGKey(2), _ROUNDINGS))
    dtype = tree_dtype(y)
    direct, linear, inner = (_SAFETY * jnp.max(c).astype(dtype) for c in changes)
    return direct, linear, inner


# Of so many roundings of the data the largest change counts. The errors of a sum may add
# up as those of its data do not, hence the factor.
_ROUNDINGS, _SAFETY = 4, 4.0


class _Norms(NamedTuple):
    """The norms of the operators in the bound, at a point."""

    curvature: Scalar
    hessian: Scalar
    cross: Scalar
    mixed: Scalar
    inner: Scalar


def _measure(problem, gradients, x, y, curvature) -> _Norms:
    _, H = gradient_and_hessian(problem, x, y)
    B = cross_derivative_operator(problem, x, y)
    lowest, largest = _extremes(H, curvature)
    lagrangian_x = lx.FunctionLinearOperator(
        jax.linearize(lambda y: gradients(x, y)[0], y)[1], tree_struct(y)
    )
    lagrangian_y = lx.FunctionLinearOperator(
        jax.linearize(lambda y: gradients(x, y)[1], y)[1], tree_struct(y)
    )
    return _Norms(lowest, largest, _norm(B), _norm(lagrangian_x), _norm(lagrangian_y))


def _is_quadratic(problem, gradients, x, y) -> bool:
    """Whether the operators in the bound do not depend on y."""
    ones = jax.tree.map(jnp.ones_like, (x, y))

    def products(y):
        def at(z):
            return gradients(x, z), inner_gradient(problem, x, z)

        along_y = jax.linearize(at, y)[1](ones[1])
        along_x = jax.linearize(lambda x: inner_gradient(problem, x, y), x)[1](ones[0])
        return along_y, along_x

    return not depends_on(products, y)


def _extremes(H, curvature) -> tuple[Scalar, Scalar]:
    """A lower bound on the eigenvalues of H, and their largest magnitude."""
    dtype = tree_dtype(H.in_structure())
    if _is_named(curvature, "dense"):
        matrix = H.as_matrix()
        values = eigvalsh(0.5 * (matrix + matrix.T))
        largest = jnp.max(jnp.abs(values))
        rounding = float(jnp.finfo(dtype).eps) * values.size * largest
        return values[0] - rounding, largest
    num_steps = min(H.in_size(), _LANCZOS_STEPS)
    values = lanczos(H, _random(H.in_size(), dtype), num_steps)[1]
    lowest = values[0] if isinstance(curvature, str) else jnp.asarray(curvature, dtype)
    return lowest, jnp.max(jnp.abs(values))


_LANCZOS_STEPS = 64


_NORM_STEPS = 20


def _norm(operator: lx.AbstractLinearOperator) -> Scalar:
    r"""An upper bound on the spectral norm, by Lanczos' method on $A^\top A$. It fails
    with a probability of a millionth."""
    if operator.out_size() < operator.in_size():
        operator = operator.T
    _, largest, error = extreme_eigenvalues(operator.T @ operator, _NORM_STEPS)
    share = jnp.asarray(1 - error, largest.dtype)
    return jnp.sqrt(jnp.maximum(largest, 0) / share)


def _random(n: int, dtype) -> Array:
    return jr.normal(jr.PRNGKey(1), (n,), dtype)
