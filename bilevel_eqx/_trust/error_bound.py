r"""How far a hypergradient is from the exact one: a bound, from its two residuals."""

import math
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
from jaxtyping import Array, PyTree, Scalar, ScalarLike

from .._arguments import as_rate, check_positive, is_traced
from .._depends_on import depends_on
from .._derivatives.first import inner_gradient
from .._derivatives.second import cross_derivative_operator, gradient_and_hessian
from .._linalg.decompositions import eigvalsh
from .._linalg.eigenbasis import lanczos
from .._problem.base import AbstractBilevelProblem
from .._problem.proximal import proximal
from .._response.base import AbstractResponse
from .._response.implicit import Implicit
from .._response.proximal import Proximal
from .._tree import nonzero, tree_axpy, tree_dtype, tree_norm, tree_struct


class ErrorBound(eqx.Module):
    r"""How far a hypergradient can be from the exact one; `print` it for a sentence.

    Let $q$ be what the linear solver returned for $H^{-1} F_y$, and
    $\Lambda(x, y) = F(x, y) - \langle q, \nabla_y f(x, y) \rangle$. The hypergradient is
    $\Lambda_x$ and the linear residual $\Lambda_y$, and with $\mu$ a lower bound on the
    eigenvalues of $H$

    $$\|\Lambda_x - g^*\| \le \|\Lambda_{xy}\|\, \delta + \frac{\|B\|}{\mu}
    \bigl(\|\Lambda_y\| + \|\Lambda_{yy}\|\, \delta\bigr), \qquad
    \delta = \frac{\|\nabla_y f\|}{\mu} \ge \|y - y^*\|.$$

    This is an identity for $g^*$ around $y$, with norms in it. Rounding is part of both
    residuals.

    **Attributes:**

    - `bound`: the right side, an upper bound on the norm of the error. Infinite if
        $\mu \le 0$.
    - `verified`: whether $\mu$ is established, by a decomposition of H or by the caller's
        word; otherwise it is an *estimate*, from above, by Lanczos' method.
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
                f"No bound ({word}): {curvature}, and only where it is positive is there "
                "one inner minimum to be close to. Penalise y, or use `Proximal`."
            )
        return (
            f"error <= {float(self.bound):.3g} ({word}): {curvature}; the inner gradient "
            f"has norm {float(self.inner_residual):.3g}, so that y is within "
            f"{float(self.distance):.3g} of the minimum; the linear residual has norm "
            f"{float(self.linear_residual):.3g}"
        )


Curvature = Literal["dense", "lanczos"] | ScalarLike


def as_curvature(curvature: Any) -> Any:
    """The argument of `hypergradient`, checked: a method, or a constant as data."""
    if curvature is None or curvature in ("dense", "lanczos"):
        return curvature
    if isinstance(curvature, str):
        raise ValueError(
            "`hypergradient(curvature=...)` is 'dense', 'lanczos', or a number that the "
            f"inner Hessian's eigenvalues are not below; it is {curvature!r}."
        )
    check_positive(curvature, "curvature", "hypergradient")
    return as_rate(curvature)


def answered(
    problem: AbstractBilevelProblem, anchor: PyTree[Array], response: AbstractResponse
) -> AbstractBilevelProblem:
    """The problem whose inner minimum the response presumes y to be."""
    if problem.project_y is not None:
        raise ValueError(
            "`hypergradient(curvature=...)` has a bound for inner problems without "
            "constraints, and this one has a `project_y`: near a bound that is about to "
            "become active the derivative jumps. Use `check_hypergradient`."
        )
    if isinstance(response, Implicit):
        return problem
    if isinstance(response, Proximal):
        return proximal(problem, anchor, response.epsilon)
    raise ValueError(
        "`hypergradient(curvature=...)` bounds the error of an implicit hypergradient, "
        "by the residuals of its inner and its linear solve; "
        f"`{type(response).__name__}` has no such residuals. Use `Implicit` or "
        "`Proximal`, or `check_hypergradient`, which takes any response."
    )


def error_bound(
    problem: AbstractBilevelProblem,
    x: PyTree[Array],
    y: PyTree[Array],
    q: PyTree[Array],
    curvature: Any,
) -> ErrorBound:
    """The bound of a hypergradient whose linear solve returned q."""

    def gradients(x, y):
        # Of the Lagrangian: its value is never needed.
        slope, push = jax.linearize(jax.grad(problem.outer, argnums=(0, 1)), x, y)
        del push
        _, pull = jax.vjp(lambda x, y: inner_gradient(problem, x, y), x, y)
        return jax.tree.map(jnp.subtract, slope, pull(q))

    dtype = tree_dtype(y)
    residual = tree_norm(gradients(x, y)[1]).astype(dtype)
    slope = tree_norm(inner_gradient(problem, x, y)).astype(dtype)

    here = _measure(problem, gradients, x, y, curvature)
    # What rounding leaves of a residual that vanishes.
    rounding = float(jnp.finfo(dtype).eps) * math.sqrt(
        sum(u.size for u in jax.tree.leaves(y))
    )
    outer_y = jax.grad(problem.outer, argnums=1)(x, y)
    slope_floor = rounding * here.hessian * jnp.maximum(tree_norm(y), 1)
    residual_floor = rounding * (tree_norm(outer_y) + here.hessian * tree_norm(q))

    def distance(curvature):
        return (slope + slope_floor) / nonzero(curvature)

    if _is_quadratic(problem, gradients, x, y):
        worst = here
    else:
        # The norms belong to all points that the minimum may be at. They are taken at y
        # and at that distance from it, and go on changing as they change in between.
        gradient = inner_gradient(problem, x, y)
        length = distance(here.curvature) / nonzero(tree_norm(gradient))
        there = _measure(
            problem, gradients, x, tree_axpy(-length, gradient, y), curvature
        )
        low, high = (jax.tree.map(f, here, there) for f in (jnp.minimum, jnp.maximum))
        change = jax.tree.map(jnp.subtract, high, low)
        worst = jax.tree.map(jnp.add, high, change)
        lowest = low.curvature - change.curvature
        worst = worst._replace(curvature=lowest)

    delta = distance(worst.curvature)
    indirect = residual + residual_floor + worst.inner * delta
    bound = worst.mixed * delta + worst.cross / nonzero(worst.curvature) * indirect
    return ErrorBound(
        bound=jnp.where(worst.curvature > 0, bound, jnp.inf),
        curvature=worst.curvature,
        distance=jnp.where(worst.curvature > 0, delta, jnp.inf),
        inner_residual=slope,
        linear_residual=residual,
        verified=not (isinstance(curvature, str) and curvature == "lanczos"),
    )


class _Norms(NamedTuple):
    """Of the operators in the bound, at a point."""

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
    """Whether all operators in the bound are the same at every y."""
    ones = jax.tree.map(jnp.ones_like, (x, y))

    def products(y):
        def at(z):
            return gradients(x, z), inner_gradient(problem, x, z)

        along_y = jax.jvp(at, (y,), (ones[1],))[1]
        along_x = jax.jvp(lambda x: inner_gradient(problem, x, y), (x,), (ones[0],))[1]
        return along_y, along_x

    return not depends_on(products, y)


def _extremes(H, curvature) -> tuple[Scalar, Scalar]:
    """A lower bound on the eigenvalues of H, and their largest magnitude."""
    dtype = tree_dtype(H.in_structure())
    if isinstance(curvature, str) and curvature == "dense":
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


_FAILURE = 1e-6


def _norm(operator: lx.AbstractLinearOperator) -> Scalar:
    r"""The spectral norm, from above, except with a probability of a millionth.

    Lanczos' method on $A^\top A$ comes from below. From a random vector it is short of
    the largest of n eigenvalues by a share $\epsilon$ after k steps with a probability of
    at most $1.648 \sqrt n\, e^{-\sqrt\epsilon (2 k - 1)}$ (Kuczyński and Woźniakowski,
    1992).
    """
    if operator.out_size() < operator.in_size():
        operator = operator.T
    n = operator.in_size()
    num_steps = min(n, _NORM_STEPS)
    dtype = tree_dtype(operator.in_structure())
    square = operator.T @ operator
    values = lanczos(square, _random(n, dtype), num_steps)[1]
    root = math.log(1.648 * math.sqrt(n) / _FAILURE) / (2 * num_steps - 1)
    # After n steps there is nothing left to see.
    share = 0.0 if num_steps == n else min(root**2, 0.9)
    return jnp.sqrt(jnp.maximum(values[-1], 0) / jnp.asarray(1 - share, dtype))


def _random(n: int, dtype) -> Array:
    return jr.normal(jr.PRNGKey(1), (n,), dtype)
