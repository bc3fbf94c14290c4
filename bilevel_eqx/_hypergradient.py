"""The hypergradient, and the best response as a differentiable function."""

from typing import Any, Generic

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree, Scalar

from ._arguments import as_variables
from ._custom_types import typechecked, X, Y
from ._depends_on import depends_on
from ._derivatives.first import inner_gradient, outer_gradients
from ._failure.results import figures_of, finite_or_not, first_failure, RESULTS
from ._failure.throw import throw_if_failed
from ._problem.base import AbstractBilevelProblem
from ._problem.checks import check_problem
from ._problem.proximal import proximal
from ._response.base import AbstractResponse
from ._response.implicit import ImplicitPullback
from ._response.proximal import Proximal
from ._tree import tree_norm
from ._trust.error_bound import answered, as_curvature, Curvature, error_bound, ErrorBound


class Hypergradient(eqx.Module, Generic[X, Y]):
    r"""The derivative of $x \mapsto F(x, y(x))$, and where it was taken.

    **Attributes:**

    - `value`: $F(x, y)$.
    - `gradient`: $F_x + J^\top F_y$, a pytree like x.
    - `y`: the inner variables that answered x.
    - `result`: one of `bilevel_eqx.RESULTS`.
    - `stats`: `inner_residual`, the norm of what the response presumes to be zero;
        further figures of the inner solve as `inner_...`, and of the linear solve as
        `linear_...`.
    - `error`: a [`bilevel_eqx.ErrorBound`][], if a curvature was asked for.
    """

    value: Scalar
    gradient: X
    y: Y
    result: RESULTS
    stats: dict[str, Any]
    error: ErrorBound | None = None


def reaches_outer(
    problem: AbstractBilevelProblem,
    x: PyTree,
    anchor: PyTree,
    response: AbstractResponse,
) -> bool:
    """Whether x can reach the outer objective, directly or through y."""
    if depends_on(lambda x: problem.outer(x, anchor), x):
        return True
    through_y = depends_on(lambda y: problem.outer(x, y), anchor)
    return through_y and response.reaches(problem, x, anchor)


def hypergradient_and_state(
    problem: AbstractBilevelProblem,
    x: PyTree,
    anchor: PyTree,
    response: AbstractResponse,
    state: Any = None,
    curvature: Any = None,
) -> tuple[Hypergradient, Any]:
    """The hypergradient, without checks, and what the response carries on."""
    answer = response(problem, x, anchor, state)
    y, pullback = answer.y, answer.pullback
    value, outer_x, outer_y = outer_gradients(problem, x, y)
    error = None
    if curvature is None:
        indirect, linear_result, linear_stats = pullback(outer_y)
    else:
        presumed = answered(problem, anchor, response)
        assert isinstance(pullback, ImplicitPullback)
        q, linear_result, linear_stats = pullback.adjoint(outer_y)
        indirect = pullback.apply(q)
        error = error_bound(presumed, x, y, q, curvature)
    gradient = jtu.tree_map(jnp.add, outer_x, indirect)
    result = first_failure(answer.result, linear_result, finite_or_not((value, gradient)))
    stats = {**answer.stats, **linear_stats}
    return Hypergradient(value, gradient, y, result, stats, error), answer.state


@eqx.filter_jit
@typechecked
def _hypergradient(
    problem: AbstractBilevelProblem,
    x: PyTree,
    anchor: PyTree,
    response: AbstractResponse,
    curvature: Curvature | None,
    throw: bool,
) -> Hypergradient:
    x, anchor = as_variables(x, "x"), as_variables(anchor, "anchor")
    check_problem(problem, x, anchor)
    out, _ = hypergradient_and_state(problem, x, anchor, response, curvature=curvature)
    result = first_failure(out.result, finite_or_not(out.y))
    if not reaches_outer(problem, x, anchor, response):
        if throw:
            raise ValueError(RESULTS[RESULTS.zero_hypergradient])
        result = first_failure(result, RESULTS.zero_hypergradient)
    return eqx.tree_at(lambda h: h.result, out, result)


def hypergradient(
    problem: AbstractBilevelProblem[X, Y],
    x: X,
    anchor: Y,
    response: AbstractResponse,
    *,
    curvature: Curvature | None = None,
    throw: bool = True,
) -> Hypergradient[X, Y]:
    r"""The hypergradient: the derivative of the outer objective through the inner
    variables' response,

    $$\frac{\mathrm d F(x, y(x))}{\mathrm d x} = F_x + J^\top F_y, \qquad
    J = \frac{\partial y}{\partial x}.$$

    Both terms are there; the paper's Table 1 leaves the first out.

    **Arguments:**

    - `problem`: the bilevel problem.
    - `x`: the outer variables, a pytree of floating-point arrays.
    - `anchor`: the inner variables that the response starts from, a pytree of
        floating-point arrays.
    - `response`: how the inner variables answer: [`bilevel_eqx.Implicit`][],
        [`bilevel_eqx.Proximal`][], [`bilevel_eqx.Unrolled`][], ...
    - `curvature`: if given, `error` is a bound on the error of the gradient, for
        [`bilevel_eqx.Implicit`][] and [`bilevel_eqx.Proximal`][]. It needs a lower bound
        on the eigenvalues of the inner Hessian: a number that you vouch for at every y,
        or `"dense"`, which decomposes that Hessian, both of which make the error
        *verified*; or `"lanczos"`, which *estimates* it by 64 products. The norms in the
        bound take some hundred products more; without a curvature there are none. Keyword
        only argument.
    - `throw`: whether a failure raises, or is returned as `result`. Keyword only
        argument.

    **Returns:**

    A [`bilevel_eqx.Hypergradient`][], with `value`, `gradient`, `y`, `result`, `stats`,
    `error`.

    **Raises:**

    A `ValueError` if an objective is not a scalar, if the inner one does not depend on
    y, if a leaf of `x` or `anchor` is not a floating-point array, if the hypergradient
    can only be zero, or if an error bound is asked of a response that has none. An
    `eqx.EquinoxRuntimeError`, unless `throw` is `False`, if the inner or the linear solve
    fails, or something is not finite.
    """
    curvature = as_curvature(curvature)
    out = _hypergradient(problem, x, anchor, response, curvature, throw)
    if throw:

        def figures():
            parts = {"y": out.y, "value": out.value, "gradient": out.gradient}
            return figures_of(as_variables(x, "x"), out.stats, **parts)

        return throw_if_failed(out, out.result, figures)
    return out


@eqx.filter_jit
@typechecked
def _best_response(
    problem: AbstractBilevelProblem,
    x: PyTree,
    anchor: PyTree,
    response: AbstractResponse,
) -> tuple[PyTree, RESULTS]:
    x, anchor = as_variables(x, "x"), as_variables(anchor, "anchor")
    check_problem(problem, x, anchor)
    y, result = response.best_response(problem, x, anchor)
    return y, first_failure(result, finite_or_not(y))


def best_response(
    problem: AbstractBilevelProblem[X, Y],
    x: X,
    anchor: Y,
    response: AbstractResponse,
    *,
    throw: bool = True,
) -> Y:
    r"""The inner variables that answer x, as a function to differentiate.

    For use inside other JAX code. The result is differentiable with respect to `x`, with
    respect to the arrays in `problem` (its data, its hyperparameters: influence
    functions), and with respect to whatever its objectives close over; in forward and
    in reverse mode; and more than once where the linear solver of the response is exact.
    It can stand inside the objective of another problem, which makes that one trilevel.

    $$\mathrm d y = -H^{-1} \, \mathrm d (\nabla_y f) \quad\text{(implicit)}, \qquad
    \mathrm d y = \mathrm d \Phi_K \quad\text{(unrolled)}.$$

    **Arguments:** as for [`bilevel_eqx.hypergradient`][]. The derivative with respect to
    `anchor` is that of the response: zero by definition for
    [`bilevel_eqx.Implicit`][], the true one for the others.

    **Returns:**

    The inner variables, a pytree like `anchor`.

    **Raises:** as [`bilevel_eqx.hypergradient`][]. The linear solves of a derivative
    always raise if they fail: there is nowhere to return their result to.
    """
    y, result = _best_response(problem, x, anchor, response)
    if throw:

        def figures():
            at, start = as_variables(x, "x"), as_variables(anchor, "anchor")
            presumed = problem
            if isinstance(response, Proximal):
                presumed = proximal(problem, start, response.epsilon)
            stats = {"inner_residual": tree_norm(inner_gradient(presumed, at, y))}
            return figures_of(at, stats, y=y)

        return throw_if_failed(y, result, figures)
    return y
