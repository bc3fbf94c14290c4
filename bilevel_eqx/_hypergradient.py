"""The hypergradient, and the best response as a differentiable function."""

from collections.abc import Callable
from typing import Any, Generic

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, PyTree, Scalar

from ._arguments import as_variables, check_type
from ._compat import called_once, is_traced, looping
from ._custom_types import typechecked, X, Y
from ._depends_on import depends_on
from ._derivatives.first import inner_gradient, outer_gradients
from ._derivatives.post_mortem import (
    has_grown,
    kink_met,
    post_mortem,
    rests_at_kink,
    runs_off,
    TRAIL,
)
from ._failure.results import (
    figures_of,
    finite_or_not,
    first_failure,
    RESULTS,
)
from ._failure.throw import throw_if_failed
from ._linalg.precision import in_full_precision_if_small
from ._mesh import on_auto_axes
from ._problem.base import AbstractBilevelProblem
from ._problem.checks import check_problem
from ._problem.proximal import proximal
from ._response.base import AbstractResponse
from ._response.proximal import Proximal
from ._tree import tree_norm


class Hypergradient(eqx.Module, Generic[X, Y]):
    r"""The derivative of $x \mapsto F(x, y(x))$.

    **Attributes:**

    - `value`: $F(x, y)$.
    - `gradient`: $F_x + J^\top F_y$, a pytree like x.
    - `y`: the inner variables of the response.
    - `result`: one of `bilevel_eqx.RESULTS`.
    - `stats`: `inner_residual`, the norm of the gradient that the response assumes to be
        zero; further statistics of the inner solve as `inner_...`, and of the linear
        solve as `linear_...`.
    - `adjoint`: the $q$ that the linear solver returned for $H^{-1} F_y$, a pytree like
        y; or `None` if the response has no linear solve.
    - `presumes`: a map from the problem to the problem whose inner minimum `y` is assumed
        to be; or `None`. [`bilevel_eqx.error_bound`][] needs this and `adjoint`.
    """

    value: Scalar
    gradient: X
    y: Y
    result: RESULTS
    stats: dict[str, Any]
    adjoint: Y | None = None
    presumes: Callable[[AbstractBilevelProblem], AbstractBilevelProblem] | None = None


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


def answered(
    problem: AbstractBilevelProblem,
    x: PyTree,
    anchor: PyTree,
    response: AbstractResponse,
    state: Any = None,
) -> tuple[Hypergradient, Any, Scalar | None]:
    """The hypergradient without checks; the `state` and `slope` of the response."""
    answer = response.answer(problem, x, anchor, state)
    value, outer_x, outer_y = outer_gradients(problem, x, answer.y)
    pulled = answer.pullback(outer_y)
    gradient = jtu.tree_map(jnp.add, outer_x, pulled.cotangent)
    result = first_failure(answer.result, pulled.result, finite_or_not((value, gradient)))
    stats = {**answer.stats, **pulled.stats}
    out = Hypergradient(
        value, gradient, answer.y, result, stats, pulled.adjoint, answer.presumes
    )
    state = answer.state if pulled.state is None else pulled.state
    return out, state, answer.slope


@looping
@typechecked
def _hypergradient(
    problem: AbstractBilevelProblem,
    x: PyTree,
    anchor: PyTree,
    response: AbstractResponse,
) -> tuple[Hypergradient, bool, Bool[Array, ""]]:
    """The hypergradient; whether it can be other than zero; and whether y has grown so
    much that the inner solve may have diverged."""
    x, anchor = as_variables(x, "x"), as_variables(anchor, "anchor")
    check_problem(problem, x, anchor)
    out, state, _ = answered(problem, x, anchor, response)
    result = first_failure(out.result, finite_or_not(out.y))
    trail = response.trail(problem, x, out.y, state, least=_FOLLOWED)
    grown = has_grown(anchor, out.y)
    if trail is not None:
        for found, name in (
            (grown & runs_off(problem, x, anchor, trail), RESULTS.inner_diverged),
            (rests_at_kink(problem, x, trail), RESULTS.at_kink),
        ):
            failure = RESULTS.where(found, name, RESULTS.successful)
            result = first_failure(result, failure)
    reaches = reaches_outer(problem, x, anchor, response)
    if not reaches:
        result = first_failure(result, RESULTS.zero_hypergradient)
    out = eqx.tree_at(lambda h: h.result, out, result)
    return out, reaches, grown


# From how many inner steps on the next ones are looked at in the program itself, of which
# they are then a small part.
_FOLLOWED = 4 * TRAIL


def _has_diverged(problem, x, anchor, response, y, result, grown) -> bool:
    """Whether the inner steps that led to y diverge, if that can be asked."""
    if is_traced(grown):
        return False
    # First what needs no number from the device.
    if not response.may_run_off(result, _FOLLOWED) or not grown:
        return False
    # In a program of its own, since mostly it is not needed.
    return bool(_diverges(problem, x, anchor, response, y))


@called_once
def _diverges(problem, x, anchor, response, y) -> Bool[Array, ""]:
    """Whether the next inner steps from y run off."""
    x, anchor = as_variables(x, "x"), as_variables(anchor, "anchor")

    def trail():
        return response.trail(problem, x, y, None)

    if jax.eval_shape(trail) is None:
        return jnp.asarray(False)
    # Most of what has grown has led downhill, and then no step is taken. Not <=, so that
    # infinity is not downhill.
    downhill = problem.inner(x, y) < problem.inner(x, anchor)
    return jax.lax.cond(
        downhill,
        lambda: jnp.asarray(False),
        lambda: runs_off(problem, x, anchor, trail()),
    )


@on_auto_axes
@in_full_precision_if_small("anchor")
def hypergradient(
    problem: AbstractBilevelProblem[X, Y],
    x: X,
    anchor: Y,
    response: AbstractResponse,
    *,
    throw: bool = True,
) -> Hypergradient[X, Y]:
    r"""The hypergradient: the derivative of the outer objective, with the response of the
    inner variables,

    $$\frac{\mathrm d F(x, y(x))}{\mathrm d x} = F_x + J^\top F_y, \qquad
    J = \frac{\partial y}{\partial x}.$$

    (The paper's Table 1 omits the first term.)

    **Arguments:**

    - `problem`: the bilevel problem.
    - `x`: the outer variables, a pytree of floating-point arrays.
    - `anchor`: the inner variables that the response starts from, a pytree of
        floating-point arrays.
    - `response`: how the inner variables respond to x: [`bilevel_eqx.Implicit`][],
        [`bilevel_eqx.Proximal`][], [`bilevel_eqx.Unrolled`][], ...
    - `throw`: whether a failure raises (the default) or is returned as `result`. Keyword
        only argument.

    **Returns:**

    A [`bilevel_eqx.reports.Hypergradient`][]. [`bilevel_eqx.error_bound`][] bounds its
    error.

    **Raises:**

    A `ValueError` if an objective is not a scalar, if the inner one does not depend on
    y, if a leaf of `x` or `anchor` is not a floating-point array, or if the hypergradient
    is zero for all x and y. If `throw` is `True`, an `eqx.EquinoxRuntimeError` if the
    inner or the linear solve fails, or if a number is not finite. That fewer than 64
    unrolled steps diverge is found out outside of transformations only, and not where
    their rates depend on x.
    """
    check_type(throw, bool, "throw", "hypergradient")
    # One program, whether it throws or not.
    out, reaches, grown = _hypergradient(problem, x, anchor, response)
    if _has_diverged(problem, x, anchor, response, out.y, out.result, grown):
        out = eqx.tree_at(lambda h: h.result, out, RESULTS.inner_diverged)
    if throw:
        if not reaches:
            raise ValueError(RESULTS[RESULTS.zero_hypergradient])
        return throw_if_failed(
            out,
            out.result,
            jtu.Partial(_figures, x, out),
            lambda: _post_mortem(problem, x, anchor, response, out.y),
        )
    return out


def _post_mortem(problem, x, anchor, response, y) -> dict[str, Array]:
    x, anchor = as_variables(x, "x"), as_variables(anchor, "anchor")
    if isinstance(response, Proximal):
        problem = proximal(problem, anchor, response.epsilon)
    return post_mortem(problem, x, anchor, y) | {"kink": kink_met(problem, x, anchor, y)}


def _figures(x: PyTree, out: Hypergradient) -> dict[str, Array]:
    parts = {"y": out.y, "value": out.value, "gradient": out.gradient}
    return figures_of(as_variables(x, "x"), out.stats, **parts)


@looping
@typechecked
def _best_response(
    problem: AbstractBilevelProblem,
    x: PyTree,
    anchor: PyTree,
    response: AbstractResponse,
) -> tuple[PyTree, RESULTS, Bool[Array, ""]]:
    """The response, its result, and whether y has grown."""
    x, anchor = as_variables(x, "x"), as_variables(anchor, "anchor")
    check_problem(problem, x, anchor)
    y, result = response.best_response(problem, x, anchor)
    return y, first_failure(result, finite_or_not(y)), has_grown(anchor, y)


@on_auto_axes
@in_full_precision_if_small("anchor")
def best_response(
    problem: AbstractBilevelProblem[X, Y],
    x: X,
    anchor: Y,
    response: AbstractResponse,
    *,
    throw: bool = True,
) -> Y:
    r"""The inner variables that respond to x, as a differentiable function.

    Use it inside other JAX code. The result is differentiable with respect to `x`, to the
    arrays in `problem` (its data and hyperparameters, for influence functions), and to
    the arrays that its objectives close over, in forward and in reverse mode. It is
    differentiable more than once if the linear solver of the response is exact. Inside
    the objective of another problem it makes that problem trilevel.

    $$\mathrm d y = -H^{-1} \, \mathrm d (\nabla_y f) \quad\text{(implicit)}, \qquad
    \mathrm d y = \mathrm d \Phi_K \quad\text{(unrolled)}.$$

    **Arguments:** as for [`bilevel_eqx.hypergradient`][]. The derivative with respect to
    `anchor` is that of the response: zero by definition for
    [`bilevel_eqx.Implicit`][], the true one for the others.

    **Returns:**

    The inner variables, a pytree like `anchor`.

    **Raises:** as [`bilevel_eqx.hypergradient`][], but for kinks: steps that go to and
    fro across one (`RESULTS.at_kink`) are not looked for here. That unrolled steps
    diverge is found out outside of transformations only. The linear solves of a
    derivative always raise if they fail: a derivative cannot return their result.
    """
    y, result, grown = _best_response(problem, x, anchor, response)
    if throw:
        if _has_diverged(problem, x, anchor, response, y, result, grown):
            result = RESULTS.inner_diverged
        figures = jtu.Partial(_figures_of_response, problem, x, anchor, response, y)
        return throw_if_failed(
            y, result, figures, lambda: _post_mortem(problem, x, anchor, response, y)
        )
    return y


def _figures_of_response(problem, x, anchor, response, y) -> dict[str, Array]:
    x, anchor = as_variables(x, "x"), as_variables(anchor, "anchor")
    if isinstance(response, Proximal):
        problem = proximal(problem, anchor, response.epsilon)
    stats = {"inner_residual": tree_norm(inner_gradient(problem, x, y))}
    return figures_of(x, stats, y=y)
