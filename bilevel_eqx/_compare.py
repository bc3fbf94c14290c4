"""Several equilibria of one problem beside each other, and the test for leakage."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar, ScalarLike

from ._equilibrium import (
    AbstractEquilibrium,
    Certificate,
    certify,
    ColdStart,
    Optimistic,
    WarmStart,
)
from ._inner_solver import Projection
from ._linear_solver import Pseudoinverse
from ._misc import aligned, as_variables, check_count, check_type, tree_norm, tree_sub
from ._pipeline import AbstractPipeline
from ._problem import AbstractBilevelProblem, check_problem, inner_gradient
from ._response import AbstractResponse, Implicit
from ._results import RESULTS
from ._solution import Solution
from ._solve import solve


class Comparison(eqx.Module):
    """What [`bilevel_eqx.compare`][] returns; `print` it for a table.

    **Attributes:**

    - `names`: what the equilibria are called in the table.
    - `solutions`: a dictionary from names to [`bilevel_eqx.Solution`][]s.
    - `figures`: a dictionary from names to dictionaries: `F` and `f`, the objectives;
        `|x|` and `|y|`; `|y - y0|`, how far y went.
    - `certificates`: `certificates[a][b]` is how far the answer of a is from being an
        equilibrium of kind b.
    - `refused`: a dictionary from the names of the equilibria that the problem cannot
        have, or whose run failed, to the reason.
    """

    names: tuple[str, ...] = eqx.field(static=True)
    solutions: dict[str, Solution]
    figures: dict[str, dict[str, Scalar]]
    certificates: dict[str, dict[str, Certificate]]
    refused: dict[str, str] = eqx.field(static=True)

    def __str__(self):
        answered = [name for name in self.names if name in self.solutions]
        columns = ("F", "f", "|x|", "|y|", "|y - y0|")
        certified = [
            n for n in self.names if any(n in c for c in self.certificates.values())
        ]
        header = ["", *columns, *certified]
        rows = []
        for name in answered:
            figures = [_short(self.figures[name][column]) for column in columns]
            residuals = [
                f"{float(self.certificates[name][other].largest):.0e}"
                if other in self.certificates[name]
                else "-"
                for other in certified
            ]
            rows.append([name, *figures, *residuals])
        figures = [row[: 1 + len(columns)] for row in [header, *rows]]
        split = len(aligned(figures)[0])
        title = " " * (split + 2) + "largest residual of a certificate for"
        lines = [title, *aligned([header, *rows])]
        lines += [f"{name}: {reason}" for name, reason in self.refused.items()]
        return "\n".join(lines)


def _short(value) -> str:
    return f"{float(value):.4g}"


def compare(
    problem: AbstractBilevelProblem,
    x0: PyTree,
    y0: PyTree,
    equilibria: Sequence[AbstractEquilibrium] | None = None,
    *,
    num_steps: int = 200,
    pipelines: Mapping[str, AbstractPipeline | str] | None = None,
    tolerance: ScalarLike | None = None,
    key: PRNGKeyArray | None = None,
) -> Comparison:
    """Computes several equilibria of one problem from the same start, and checks each
    answer against all of the definitions.

    **Arguments:**

    - `problem`: the bilevel problem.
    - `x0`, `y0`: the initial variables, as for [`bilevel_eqx.solve`][].
    - `equilibria`: which ones. By default `Optimistic()`, `WarmStart()` and
        `ColdStart()`.
    - `num_steps`: the number of outer steps of each. Keyword only argument.
    - `pipelines`: for some of the equilibria, by their names in the table (such as
        `"WarmStart()"`), a pipeline or the name of one; the others take their default.
        Keyword only argument.
    - `tolerance`, `key`: as for [`bilevel_eqx.solve`][]. Keyword only arguments.

    **Returns:**

    A [`bilevel_eqx.Comparison`][]. An equilibrium that the problem cannot have, or whose
    run fails, is listed with the reason and does not stop the others.

    **Raises:**

    A `ValueError` for a problem that cannot be right, or a key of `pipelines` that is
    none of the equilibria.
    """
    if equilibria is None:
        equilibria = (Optimistic(), WarmStart(), ColdStart())
    x0, y0 = as_variables(x0, "x0"), as_variables(y0, "y0")
    check_problem(problem, x0, y0)
    concepts = {describe(equilibrium): equilibrium for equilibrium in equilibria}
    pipelines = {} if pipelines is None else dict(pipelines)
    unknown = [name for name in pipelines if name not in concepts]
    if unknown:
        raise ValueError(
            f"`compare(pipelines=...)` names {unknown}, but the equilibria are "
            f"{list(concepts)}."
        )
    solutions, figures, certificates, refused = {}, {}, {}, {}
    for name, equilibrium in concepts.items():
        try:
            solution = solve(
                problem,
                equilibrium,
                x0,
                y0,
                pipeline=pipelines.get(name),
                num_steps=num_steps,
                tolerance=tolerance,
                key=key,
                throw=False,
            )
        except ValueError as error:
            refused[name] = str(error)
            continue
        if bool(solution.result != RESULTS.successful):
            step = int(solution.stats["num_steps"])
            refused[name] = f"stopped after step {step}. {RESULTS[solution.result]}"
        x, y = solution.x, solution.y
        solutions[name] = solution
        figures[name] = {
            "F": problem.outer(x, y),
            "f": problem.inner(x, y),
            "|x|": tree_norm(x),
            "|y|": tree_norm(y),
            "|y - y0|": tree_norm(tree_sub(y, y0)),
        }
    # One that the problem cannot have, it cannot be certified for.
    for name, solution in solutions.items():
        certificates[name] = {
            asked: certify(problem, concepts[asked], solution.x, solution.y, y0=y0)
            for asked in solutions
        }
    return Comparison(tuple(concepts), solutions, figures, certificates, refused)


def describe(equilibrium: AbstractEquilibrium) -> str:
    """An equilibrium as one would write it: `WarmStart(0.1)`."""
    values = []
    for field in dataclasses.fields(equilibrium):
        value = getattr(equilibrium, field.name)
        no_epsilon = field.name == "epsilon" and isinstance(value, float) and value == 0
        if value is None or no_epsilon:
            continue
        is_number = isinstance(value, float | int | np.ndarray | jax.Array)
        values.append(
            f"{float(value):.3g}" if is_number and np.ndim(value) == 0 else repr(value)
        )
    return f"{type(equilibrium).__name__}({', '.join(values)})"


#
# Leakage
#


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
