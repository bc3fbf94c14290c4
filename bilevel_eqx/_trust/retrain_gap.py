"""The test for leakage: train the inner variables again from scratch."""

import textwrap
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from .._arguments import as_variables, check_count, check_key, check_type
from .._compat import called_once
from .._derivatives.first import inner_gradient
from .._inner_solver.projection import Projection
from .._linalg.precision import in_full_precision
from .._linear_solver.pseudoinverse import Pseudoinverse
from .._mesh import on_auto_axes
from .._problem.base import AbstractBilevelProblem
from .._problem.root import check_has_objective
from .._response.base import AbstractResponse
from .._response.implicit import Implicit
from .._solve.solution import Solution
from .._tree import tree_norm


class RetrainGap(eqx.Module):
    """What [`bilevel_eqx.retrain_gap`][] returns; `print` it for a sentence.

    **Attributes:**

    - `value`: $F(x, y)$ with the inner variables of the solution.
    - `retrained`: an array of $F(x, y')$ with inner variables trained from scratch, one
        for each initialisation.
    - `gap`: the mean of `retrained`, minus `value`: the information in the inner
        variables that is not in x.
    - `spread`: the standard deviation of `retrained`.
    - `inner_values`: $f(x, y')$ for each. Compare it with `inner_value`, that of the
        solution, to see whether training has converged.
    - `inner_residuals`: the norm of the inner gradient for each.
    - `y`: the inner variables trained from scratch, stacked.
    """

    value: Scalar
    retrained: Float[Array, " n"]
    inner_value: Scalar
    inner_values: Float[Array, " n"]
    inner_residuals: Float[Array, " n"]
    y: PyTree[Array]

    @property
    def gap(self) -> Array:
        return jnp.mean(self.retrained) - self.value

    @property
    def spread(self) -> Array:
        return jnp.std(self.retrained)

    def __str__(self):
        n = self.retrained.shape[0]
        gap = (
            f"F is {float(self.value):.4g} with the inner variables of the solution, and "
            f"{float(jnp.mean(self.retrained)):.4g} +- {float(self.spread):.2g} with "
            f"ones trained from scratch at the same x ({n} initialisation"
            f"{'s' * (n > 1)}): a gap of {float(self.gap):.4g}."
        )
        inner = (
            f"The inner objective is {float(self.inner_value):.3g} and "
            f"{float(jnp.mean(self.inner_values)):.3g}; inner gradients are at most "
            f"{float(jnp.max(self.inner_residuals)):.1e} after training."
        )
        return "\n".join(textwrap.wrap(gap, 88) + textwrap.wrap(inner, 88))


@on_auto_axes
@in_full_precision
def retrain_gap(
    problem: AbstractBilevelProblem,
    solution: Solution,
    initial: PyTree | None = None,
    *,
    init: Callable[[PRNGKeyArray], PyTree] | None = None,
    response: AbstractResponse | None = None,
    num_initialisations: int = 5,
    key: PRNGKeyArray | None = None,
) -> RetrainGap:
    r"""The paper's test for leakage: how much of the outer objective is due to the past
    of the inner variables, and not to x.

    At the x of a solution, the inner variables are trained from scratch from one or
    several initialisations, and F is compared. A cold start has no gap. After a warm
    start the inner variables may contain information that is not in x.

    **Arguments:**

    - `problem`: the bilevel problem.
    - `solution`: what [`bilevel_eqx.solve`][] returned.
    - `initial`: the start of training: inner variables; or a stack of them, along a
        leading axis. Of a model, its floating-point arrays count. By default the $y_0$ of
        the run.
    - `init`: instead of `initial`, a function from a key to inner variables, which is
        called `num_initialisations` times. Keyword only argument.
    - `response`: a response whose `y` are the trained inner variables. The default,
        `Implicit(Projection(), Pseudoinverse())`, trains to convergence. To train with
        the optimiser of the run, use `Unrolled(optimiser, num_steps)`. Keyword only
        argument.
    - `num_initialisations`, `key`: for `init`. Keyword only arguments.

    **Returns:**

    A [`bilevel_eqx.reports.RetrainGap`][].

    **Raises:**

    A `ValueError` if `initial` does not fit the inner variables, if it is missing and the
    state of the run does not contain it, or if both `initial` and `init` are given.
    """
    check_type(solution, Solution, "solution", "retrain_gap")
    check_has_objective(
        problem,
        "`retrain_gap`",
        "An isolated root has no past: solve for it anew with `best_response`.",
    )
    if response is None:
        response = Implicit(Projection(), Pseudoinverse(), tolerance=None)
    starts = _starts(solution, initial, init, num_initialisations, key)
    return _retrain_gap(problem, solution.x, solution.y, starts, response)


@called_once
def _retrain_gap(problem, x, y, starts, response: AbstractResponse) -> RetrainGap:
    def retrain(y0):
        y, _ = response.best_response(problem, x, y0)
        residual = tree_norm(inner_gradient(problem, x, y))
        return y, problem.outer(x, y), problem.inner(x, y), residual

    # One after the other: they may be large, and need different numbers of steps.
    trained, values, inner_values, residuals = jax.lax.map(retrain, starts)
    return RetrainGap(
        problem.outer(x, y), values, problem.inner(x, y), inner_values, residuals, trained
    )


def _starts(
    solution: Solution,
    initial: PyTree | None,
    init: Callable[[PRNGKeyArray], PyTree] | None,
    number: int,
    key: PRNGKeyArray | None,
) -> PyTree[Array]:
    """A stack of initial inner variables."""
    if initial is not None and init is not None:
        raise ValueError(
            "`retrain_gap` was given both `initial` and `init`. Pass inner variables as "
            "`initial`, or a function from a key to inner variables as `init`."
        )
    if init is not None:
        check_count(number, "num_initialisations", "retrain_gap")
        check_key(key, "retrain_gap")
        keys = jr.split(jr.key(0) if key is None else key, number)
        initial = eqx.filter_vmap(init)(keys)
    if initial is None:
        initial = getattr(solution.state, "y0", None)
        if initial is None:
            raise ValueError(
                "This solution does not contain the start of its inner variables. Pass "
                "inner variables as `retrain_gap(problem, solution, initial)`."
            )
    if jtu.tree_structure(initial) != jtu.tree_structure(solution.y):
        # A model has more leaves than the arrays that are optimised.
        initial = eqx.filter(initial, eqx.is_inexact_array)
        if len(jtu.tree_leaves(initial)) == 0:
            raise ValueError(
                "`initial` contains no arrays. A function from a key to inner variables "
                "is passed as `retrain_gap(..., init=...)`."
            )
    initial = as_variables(initial, "initial")
    if jtu.tree_structure(initial) != jtu.tree_structure(solution.y):
        raise ValueError(
            "`initial` must have the structure of the inner variables, "
            f"{jtu.tree_structure(solution.y)}; it has {jtu.tree_structure(initial)}."
        )
    pairs = list(zip(jtu.tree_leaves(initial), jtu.tree_leaves(solution.y)))
    if all(u.shape == v.shape for u, v in pairs):
        return jtu.tree_map(lambda u: u[None], initial)
    if all(u.shape[1:] == v.shape and u.ndim == v.ndim + 1 for u, v in pairs):
        return initial
    raise ValueError(
        "`initial` must have the shapes of the inner variables, or these shapes after a "
        f"leading axis. It has {[u.shape for u, _ in pairs]}, and the inner variables "
        f"have {[v.shape for _, v in pairs]}."
    )
