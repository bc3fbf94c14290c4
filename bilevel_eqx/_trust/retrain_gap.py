"""The test for leakage: train the inner variables anew."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from .._arguments import as_variables, check_count, check_type
from .._derivatives.first import inner_gradient
from .._inner_solver.projection import Projection
from .._linear_solver.pseudoinverse import Pseudoinverse
from .._problem.base import AbstractBilevelProblem
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
    - `gap`: the mean of `retrained`, minus `value`: what the inner variables knew that
        x does not say.
    - `spread`: the standard deviation of `retrained`.
    - `inner_values`: $f(x, y')$ for each; compare with `inner_value`, that of the
        solution, to see whether they are trained.
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
        return (
            f"F is {float(self.value):.4g} with the inner variables of the solution, and "
            f"{float(jnp.mean(self.retrained)):.4g} +- {float(self.spread):.2g} with "
            f"ones trained from scratch at the same x ({n} initialisation"
            f"{'s' * (n > 1)}): a gap of {float(self.gap):.4g}.\nThe inner objective is "
            f"{float(self.inner_value):.3g} and "
            f"{float(jnp.mean(self.inner_values)):.3g}; inner gradients are at most "
            f"{float(jnp.max(self.inner_residuals)):.1e} after training."
        )


def retrain_gap(
    problem: AbstractBilevelProblem,
    solution: Solution,
    initial: PyTree | Callable[[PRNGKeyArray], PyTree] | None = None,
    *,
    response: AbstractResponse | None = None,
    num_initialisations: int = 5,
    key: PRNGKeyArray | None = None,
) -> RetrainGap:
    r"""The paper's test for leakage: how much of the outer objective is due to what the
    inner variables went through, and not to x.

    At the x of a solution the inner variables are trained anew, from one or several
    initialisations, and F is compared. After a cold start there is no gap; after a warm
    start the inner variables may know what x does not say.

    **Arguments:**

    - `problem`: the bilevel problem.
    - `solution`: what [`bilevel_eqx.solve`][] returned.
    - `initial`: where training starts: inner variables; or a stack of them, along a
        leading axis; or a function from a key to them, which is called
        `num_initialisations` times. By default the $y_0$ of the run.
    - `response`: how the inner variables are trained: the `y` of any response. By
        default `Implicit(Projection(), Pseudoinverse())`, to convergence. To train with
        the optimiser of the run give `Unrolled(optimiser, num_steps)`. Keyword only
        argument.
    - `num_initialisations`, `key`: for an `initial` that is a function. Keyword only
        arguments.

    **Returns:**

    A [`bilevel_eqx.RetrainGap`][].

    **Raises:**

    A `ValueError` if `initial` does not fit the inner variables, or is missing and the
    state of the run does not have it.
    """
    check_type(solution, Solution, "solution", "retrain_gap")
    if response is None:
        response = Implicit(Projection(), Pseudoinverse(), tolerance=None)
    starts = _starts(solution, initial, num_initialisations, key)
    return _retrain_gap(problem, solution.x, solution.y, starts, response)


@eqx.filter_jit
def _retrain_gap(problem, x, y, starts, response: AbstractResponse) -> RetrainGap:
    def retrain(y0):
        y, _ = response.best_response(problem, x, y0)
        residual = tree_norm(inner_gradient(problem, x, y))
        return y, problem.outer(x, y), problem.inner(x, y), residual

    # One after the other: they may be large, and need differently many steps.
    trained, values, inner_values, residuals = jax.lax.map(retrain, starts)
    return RetrainGap(
        problem.outer(x, y), values, problem.inner(x, y), inner_values, residuals, trained
    )


def _starts(solution: Solution, initial: Any, number: int, key) -> PyTree[Array]:
    """A stack of initial inner variables."""
    if initial is None:
        initial = getattr(solution.state, "y0", None)
        if initial is None:
            raise ValueError(
                "This solution does not say where its inner variables started: give "
                "`retrain_gap(problem, solution, initial)` inner variables to train."
            )
    if callable(initial):
        check_count(number, "num_initialisations", "retrain_gap")
        keys = jr.split(jr.key(0) if key is None else key, number)
        initial = jax.vmap(initial)(keys)
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
        "`initial` must have the shapes of the inner variables, or those after a leading "
        f"axis; it has {[u.shape for u, _ in pairs]} for {[v.shape for _, v in pairs]}."
    )
