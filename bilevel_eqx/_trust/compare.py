"""A comparison of several equilibria of one problem."""

from collections.abc import Mapping, Sequence

import equinox as eqx
from jaxtyping import PRNGKeyArray, PyTree, Scalar, ScalarLike

from .._arguments import as_variables, check_key
from .._compat import called_once
from .._equilibrium.base import AbstractEquilibrium, Certificate, certify
from .._equilibrium.cold_start import ColdStart
from .._equilibrium.optimistic import Optimistic
from .._equilibrium.warm_start import WarmStart
from .._failure.results import is_failure, RESULTS
from .._mesh import on_auto_axes
from .._pipeline.base import AbstractPipeline
from .._problem.base import AbstractBilevelProblem
from .._problem.checks import check_problem
from .._problem.root import check_has_objective
from .._solve.solution import Solution
from .._solve.solve import solve
from .._text import aligned, as_code
from .._tree import tree_norm, tree_sub


class Comparison(eqx.Module):
    """What [`bilevel_eqx.compare`][] returns; `print` it for a table.

    **Attributes:**

    - `names`: the names of the equilibria in the table.
    - `solutions`: a dictionary from names to [`bilevel_eqx.Solution`][]s.
    - `figures`: a dictionary from names to dictionaries: `F` and `f`, the objectives;
        `|x|`, `|y|` and `|y - y0|`, the norms.
    - `certificates`: `certificates[a][b]` is the largest residual of the solution of a as
        an equilibrium of kind b.
    - `refused`: a dictionary from names to reasons, for the equilibria that the problem
        does not support or whose run failed.
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
        figures, residuals = [["", *columns]], [["", *certified]]
        for name in answered:
            own, checks = self.figures[name], self.certificates[name]
            figures.append([name, *(_short(own[column]) for column in columns)])
            largest = (checks[c].largest if c in checks else None for c in certified)
            cells = ("-" if r is None else f"{float(r):.0e}" for r in largest)
            residuals.append([name, *cells])
        # Two tables: one beside the other is wider than a terminal.
        lines = [*aligned(figures), "", "largest residual of a certificate for"]
        lines += aligned(residuals)
        lines += [f"{name}: {reason}" for name, reason in self.refused.items()]
        return "\n".join(lines)


def _short(value) -> str:
    return f"{float(value):.4g}"


@on_auto_axes
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
    solution against all definitions.

    **Arguments:**

    - `problem`: the bilevel problem.
    - `x0`, `y0`: the initial variables, as for [`bilevel_eqx.solve`][].
    - `equilibria`: the equilibria. By default `Optimistic()`, `WarmStart()` and
        `ColdStart()`.
    - `num_steps`: the number of outer steps of each. Keyword only argument.
    - `pipelines`: a dictionary from names in the table (such as `"WarmStart()"`) to a
        pipeline or the name of one. The other equilibria use their default. Keyword only
        argument.
    - `tolerance`, `key`: as for [`bilevel_eqx.solve`][]. Keyword only arguments.

    **Returns:**

    A [`bilevel_eqx.reports.Comparison`][]. An equilibrium that the problem does not
    support, or whose run fails, is listed with the reason and does not stop the others.

    **Raises:**

    A `ValueError` for an invalid problem, or for a key of `pipelines` that is none of the
    equilibria. A `KeyboardInterrupt` after Ctrl-C, which ends the whole comparison.
    """
    check_key(key, "compare")
    if equilibria is None:
        equilibria = (Optimistic(), WarmStart(), ColdStart())
    x0, y0 = as_variables(x0, "x0"), as_variables(y0, "y0")
    check_problem(problem, x0, y0)
    check_has_objective(
        problem,
        "`compare`",
        "Its only equilibria are `Stackelberg()` and `WarmStart()`, which are the same "
        "at an isolated root.",
    )
    concepts = {as_code(equilibrium): equilibrium for equilibrium in equilibria}
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
        if bool(solution.result == RESULTS.interrupted):
            raise KeyboardInterrupt(f"`compare` was interrupted at `{name}`.")
        if is_failure(solution.result):
            step = int(solution.stats["num_steps"])
            refused[name] = f"stopped after step {step}. {RESULTS[solution.result]}"
        x, y = solution.x, solution.y
        solutions[name] = solution
        figures[name] = _figures(problem, x, y, y0)
    # A refused equilibrium cannot be certified either.
    for name, solution in solutions.items():
        certificates[name] = {
            asked: certify(problem, concepts[asked], solution.x, solution.y, y0=y0, x0=x0)
            for asked in solutions
        }
    return Comparison(tuple(concepts), solutions, figures, certificates, refused)


@called_once
def _figures(problem, x, y, y0) -> dict[str, Scalar]:
    return {
        "F": problem.outer(x, y),
        "f": problem.inner(x, y),
        "|x|": tree_norm(x),
        "|y|": tree_norm(y),
        "|y - y0|": tree_norm(tree_sub(y, y0)),
    }
