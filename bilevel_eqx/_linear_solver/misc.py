"""Helpers for linear solvers. A linear solver describes itself by class attributes:

- `judges_itself` (False): its `result` can be trusted. The solutions of other solvers are
  checked: a factorisation of a singular matrix may return finite numbers.
- `breakdown`: the name of the failure that `lineax.RESULTS.breakdown` means here.
- `heeds_curved_tag` (False): it uses `curved_tag` and `CurvedHessian`.
- `splits_squares` (False): it solves with an `AugmentedHessian`.
- `takes_guess` (False, and true of the iterative ones of lineax): it starts from
    `options["y0"]`.
- `prepares` (False): it has a method `prepare(operator)`, whose value serves as
    `options["prepared"]` for operators near that one too, and a field `refresh_every`,
    for how many.
- `keeps_shapes` (False): it has to see the leaves of y as they are. For the others
    `Implicit` puts y into one vector.
- `needs_symmetry` (False, and true of those of lineax that are): it presumes that the
  operator is symmetric.
"""

import equinox as eqx
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, PyTree, Scalar

from .._arguments import says
from .._derivatives.operators import AugmentedHessian, curved_tag, LeastSquaresHessian
from .._failure.results import RESULTS
from .._linalg.decompositions import check_precision
from .._problem.base import AbstractBilevelProblem
from .._problem.root import AbstractRootProblem
from .._tree import nonzero, tree_norm, where


def check_square(operator: lx.AbstractLinearOperator, owner: str) -> None:
    """Refuses an operator between different spaces."""
    same = eqx.tree_equal(operator.in_structure(), operator.out_structure())
    if same is not True:
        raise ValueError(
            f"`{owner}` solves only square systems, but the operator maps "
            f"{operator.in_structure()} to {operator.out_structure()}."
        )


def relative(residual: PyTree[Array], vector: PyTree[Array]) -> Scalar:
    """The norm of `residual` relative to that of `vector`; zero if both are zero."""
    size, scale = tree_norm(residual), tree_norm(vector)
    return where(scale == 0, size, size / nonzero(scale))


def check_factorisable(operator: lx.AbstractLinearOperator, owner: str) -> None:
    """Refuses types that no factorisation of another library can work with."""
    dtypes = {leaf.dtype for leaf in jtu.tree_leaves(operator.in_structure())}
    if len(dtypes) > 1:
        names = ", ".join(sorted(map(str, dtypes)))
        raise ValueError(
            f"The leaves of y have several types ({names}), and `{owner}` would make one "
            "matrix of the inner Hessian. Use `Pseudoinverse`, `TruncatedCG` or "
            "`Neumann`, or cast y to one type."
        )
    for dtype in dtypes:
        check_precision(dtype, f"`{owner}`")


def check_symmetry(
    problem: AbstractBilevelProblem, solver: lx.AbstractLinearSolver
) -> None:
    """Refuses a solver for symmetric systems where the inner variables are a root."""
    conjugate = isinstance(solver, lx.CG | lx.Cholesky)
    needs_symmetry = says(solver, "needs_symmetry", conjugate)
    if needs_symmetry and isinstance(problem, AbstractRootProblem):
        raise ValueError(
            f"`{type(solver).__name__}` solves only symmetric systems, but the inner "
            "variables of this problem are a root, r(x, y) = 0, and dr/dy is not "
            "symmetric. Use `Pseudoinverse()`, `lx.LU()`, `lx.GMRES(rtol, atol)`, "
            "`lx.BiCGStab(rtol, atol)`, or `Neumann(num_terms, 1.0)` for a fixed point."
        )


def tags_for(
    problem: AbstractBilevelProblem, solver: lx.AbstractLinearSolver, is_curved: bool
) -> frozenset[object]:
    """The tags of the Hessian at a minimum. The Jacobian of a root has none.

    It is positive semidefinite there. With that tag `lx.CG` and `lx.Cholesky` accept it,
    and the default solver of lineax raises on a singular one. Without the tag that solver
    would silently return wrong numbers.
    """
    if isinstance(problem, AbstractRootProblem):
        return frozenset()
    tags: set[object] = {lx.symmetric_tag, lx.positive_semidefinite_tag}
    if is_curved and says(solver, "heeds_curved_tag", False):
        tags.add(curved_tag)
    return frozenset(tags)


def augmented(
    solver: lx.AbstractLinearSolver, hessian: lx.AbstractLinearOperator
) -> AugmentedHessian | None:
    """The augmented form of a Hessian, if that is one of a sum of squares and the solver
    takes it."""
    takes = says(solver, "splits_squares", False)
    squares = isinstance(hessian, LeastSquaresHessian)
    return AugmentedHessian(hessian) if takes and squares else None


def explain(solver: lx.AbstractLinearSolver, result: lx.RESULTS) -> RESULTS:
    """The result of a linear solver as one of ours, whose messages say more."""
    if result is lx.RESULTS.successful:
        # A solver that cannot fail. What follows would be in the program for nothing.
        return RESULTS.successful
    breakdown = says(solver, "breakdown", "linear_not_converged")
    ours = RESULTS.promote(result)
    ours = RESULTS.where(
        result == lx.RESULTS.breakdown, getattr(RESULTS, breakdown), ours
    )
    theirs = lx.RESULTS
    for name in (theirs.max_steps_reached, theirs.stagnation, theirs.singular):
        ours = RESULTS.where(result == name, RESULTS.linear_not_converged, ours)
    return ours
