"""What one linear solve leaves to the next."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Int, PyTree

from .._arguments import says
from .._problem.flat import flat_if_uniform
from .._tree import tree_struct, tree_zeros_like


class Carried(eqx.Module):
    """The solution of the last solve, as the solver had it; what the linear solver had
    prepared for it, and how many solves ago."""

    adjoint: PyTree[Array]
    prepared: Any
    age: Int[Array, ""]


def check_takes_guess(solver: lx.AbstractLinearSolver, owner: str) -> None:
    """Refuses to carry an adjoint to a solver that would not look at it."""
    iterative = isinstance(solver, lx.CG | lx.GMRES | lx.BiCGStab)
    if not says(solver, "takes_guess", iterative):
        raise ValueError(
            f"`{owner}(carry_adjoint=True)` starts each linear solve from the last "
            f"adjoint, but `{type(solver).__name__}` does not start from a guess: a "
            "factorisation needs none, and a truncated series would be another one. Use "
            "`TruncatedCG`, or leave `carry_adjoint` out. If a solver of your own uses "
            '`options["y0"]`, give it the class attribute `takes_guess = True`.'
        )


def nothing_carried(solver: Any, problem, y: PyTree[Array]) -> Carried:
    """That of a first solve."""
    _, layout = flat_if_uniform(problem, y, says(solver, "keeps_shapes", False))
    flat = layout.ravel(y)
    prepared = None
    if says(solver, "prepares", False):
        identity = lx.FunctionLinearOperator(
            lambda v: v, tree_struct(flat), lx.positive_semidefinite_tag
        )
        prepared = jax.eval_shape(lambda: solver.prepare(identity))
        prepared = tree_zeros_like(prepared)
    return Carried(tree_zeros_like(flat), prepared, jnp.array(0))


def options_from(
    carried: Carried, solver: Any, operator: lx.AbstractLinearOperator
) -> dict[str, Any]:
    """The options of a solve that starts from the last one."""
    options: dict[str, Any] = {"y0": carried.adjoint}
    if says(solver, "prepares", False):
        dynamic, static = eqx.partition(lx.linearise(operator), eqx.is_array)

        def prepare(dynamic):
            return solver.prepare(eqx.combine(dynamic, static))

        options["prepared"] = jax.lax.cond(
            carried.age % solver.refresh_every == 0,
            prepare,
            lambda _: carried.prepared,
            dynamic,
        )
    return options
