"""Linear solvers whose answers are checked, and ones that raise."""

from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, PyTree

from .._arguments import says
from .._failure.results import figures_of, finite_or_not, first_failure
from .._failure.throw import throw_if_failed
from .._tree import tree_sub
from .misc import check_factorisable, explain, relative


# Large: it only has to separate a solution from a wrong one.
_TOLERANCE = 1e-2


class _Judged(lx.AbstractLinearSolver):
    r"""A linear solver of another library, whose answer is checked.

    A factorisation of a singular H may return finite numbers without a meaning. The
    answer $q = H^+ b$ is the one with $H (H q - b) = 0$ and q in the range of H. The
    former alone is not enough: b need not be in the range of H, and if it is, then q may
    still have any component in the null space.
    """

    solver: lx.AbstractLinearSolver

    judges_itself: ClassVar[bool] = True
    speaks_for: ClassVar[str] = "solver"

    def init(self, operator, options):
        if not isinstance(self.solver, lx.CG):
            check_factorisable(operator, type(self.solver).__name__)
        return operator, self.solver.init(operator, options)

    def compute(self, state, vector, options):
        H, inner = state
        q, result, stats = self.solver.compute(inner, vector, options)
        remainder = tree_sub(H.mv(q), vector)
        residual = relative(H.T.mv(remainder), H.T.mv(vector))
        # Its iterates stay in the range of H if b is in it, and otherwise it fails. A
        # second solve would double its cost.
        if not isinstance(self.solver, lx.CG):
            preimage, _, _ = self.solver.compute(inner, q, options)
            outside = relative(tree_sub(H.mv(preimage), q), q)
            # Not `jnp.fmax`: NaN is not a small residual.
            residual = jnp.maximum(residual, outside)
        sound = (residual <= _TOLERANCE) | (result != lx.RESULTS.successful)
        result = lx.RESULTS.where(sound, result, lx.RESULTS.breakdown)
        return q, result, {**stats, "residual": residual}

    def transpose(self, state, options):
        H, inner = state
        inner, options = self.solver.transpose(inner, options)
        return (H.transpose(), inner), options

    def conj(self, state, options):
        H, inner = state
        inner, options = self.solver.conj(inner, options)
        return (lx.conj(H), inner), options

    def assume_full_rank(self):
        return self.solver.assume_full_rank()


def judged(solver: lx.AbstractLinearSolver) -> lx.AbstractLinearSolver:
    """The solver; one of another library, with a check of its answers."""
    return solver if says(solver, "judges_itself", False) else _Judged(solver)


class _Throwing(lx.AbstractLinearSolver):
    """A linear solver that raises our sentence: a derivative cannot return a result."""

    solver: lx.AbstractLinearSolver

    judges_itself: ClassVar[bool] = True
    speaks_for: ClassVar[str] = "solver"

    def init(self, operator, options):
        return self.solver.init(operator, options)

    def compute(self, state, vector, options):
        q, result, stats = self.solver.compute(state, vector, options)
        ours = first_failure(
            finite_or_not(vector), explain(self.solver, result), finite_or_not(q)
        )
        q = throw_if_failed(q, ours, jtu.Partial(_figures, vector, q, stats))
        return q, lx.RESULTS.successful, stats

    def transpose(self, state, options):
        return self.solver.transpose(state, options)

    def conj(self, state, options):
        return self.solver.conj(state, options)

    def assume_full_rank(self):
        return self.solver.assume_full_rank()


def throwing(solver: lx.AbstractLinearSolver) -> lx.AbstractLinearSolver:
    """The solver, judged, for the linear solves of derivatives."""
    return _Throwing(judged(solver))


def _figures(vector: PyTree, q: PyTree, stats: dict[str, Any]) -> dict[str, Array]:
    stats = linear_stats(stats)
    return figures_of(vector, stats, x=None, solved_for=vector, solution=q)


def linear_stats(stats: dict[str, Any]) -> dict[str, Any]:
    """The statistics of a linear solve, by the names that they have in a response."""
    # Some solvers report a missing bound as `None`.
    return {f"linear_{k}": v for k, v in stats.items() if eqx.is_array(v)}
