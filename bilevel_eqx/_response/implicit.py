"""Implicit differentiation."""

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import optimistix as optx

from .._arguments import as_count, check_count, check_positive, check_type, says
from .._compat import batched_as, nondifferentiable
from .._depends_on import depends_on
from .._derivatives.first import inner_gradient
from .._derivatives.post_mortem import TRAIL
from .._derivatives.second import (
    cross_derivative_operator,
    derivative_in_x,
    expansion,
    hessian_depends_on_y,
    squares_condition,
    stationary_residual,
)
from .._failure.results import finite_or_not, first_failure, RESULTS
from .._inner_solver.minimum import InnerSolver, minimise_inner
from .._inner_solver.root import find_root, why_no_root
from .._linear_solver.judged import judged, linear_stats, throwing
from .._linear_solver.misc import augmented, check_symmetry, explain, tags_for
from .._mesh import check_mesh_of_solve
from .._problem.closure import closure_converted
from .._problem.constraints import set_y, Stationarity
from .._problem.flat import AsItIs, flat_if_uniform
from .._problem.root import AbstractRootProblem
from .._tree import (
    Layout,
    tree_axpy,
    tree_cast,
    tree_dot,
    tree_eps,
    tree_materialised,
    tree_norm,
    tree_scale,
    tree_sub,
)
from .base import AbstractSolvedResponse, NOT_ASKED_FOR, Pulled, Response
from .carried import Carried, check_takes_guess, nothing_carried, options_from


class Implicit(AbstractSolvedResponse):
    r"""Solves the inner problem from the anchor, and differentiates the solution by the
    implicit function theorem:

    $$y^* \in \operatorname{argmin}_y f(x, y), \qquad
    \frac{\partial y^*}{\partial x} = -H^{-1} B.$$

    The linear solver determines $H^{-1}$: a pseudoinverse, a truncated series, or a
    factorisation.

    If the inner problem has many solutions, y depends on the anchor. The Jacobian at y
    does not, and the derivative with respect to the anchor is zero by definition. If H
    depends on x, $-H^+ B$ is the derivative of the warm response, $\Pi(y, S(x))$ from the
    current $y$. That of the cold response has one more term; see
    [`bilevel_eqx.MinimumDisplacement`][].

    If y is confined to a set (`project_y`), so is the solution. Let $D$ be the derivative
    of the projection at $y - t \nabla_y f$. Then

    $$\frac{\partial y^*}{\partial x} = -D K^+ D B, \qquad
    K = D H D + \tfrac1t (D - D^2):$$

    so that y does not move at an active bound. $K$ is singular there: use
    [`bilevel_eqx.Pseudoinverse`][], [`bilevel_eqx.TruncatedCG`][] or
    [`bilevel_eqx.Neumann`][]. If a bound is active and its multiplier is zero, y has a
    kink and no derivative.

    If y is a root ([`bilevel_eqx.AbstractRootProblem`][]), $H$ stands for
    $\partial r / \partial y$ and $B$ for $\partial r / \partial x$. $H$ is then not
    symmetric: linear solvers for symmetric systems (`lx.CG`, `lx.Cholesky`,
    [`bilevel_eqx.TruncatedCG`][]) are refused, and the adjoint is
    $q = H^{-\top} F_y$.

    ??? cite "References"

        Bengio, *Gradient-based optimization of hyperparameters*, 2000. Pedregosa,
        *Hyperparameter optimization with approximate gradient*, 2016. Lorraine, Vicol
        and Duvenaud, *Optimizing Millions of Hyperparameters by Implicit
        Differentiation*, 2020.
    """

    solver: InnerSolver
    linear_solver: lx.AbstractLinearSolver
    tolerance: float | None = 1e-3
    max_steps: int | None = eqx.field(default=10_000, converter=as_count)
    carry_adjoint: bool = eqx.field(default=False, kw_only=True)

    solves: ClassVar[bool] = True
    answers_itself: ClassVar[bool] = True
    state_is_guess: ClassVar[bool] = True

    def __check_init__(self):
        linear_solver = lx.AbstractLinearSolver
        check_type(self.solver, InnerSolver, "solver", "Implicit")
        check_type(self.linear_solver, linear_solver, "linear_solver", "Implicit")
        if self.tolerance is not None:
            check_positive(self.tolerance, "tolerance", "Implicit")
        if self.max_steps is not None:
            check_count(self.max_steps, "max_steps", "Implicit")
        check_type(self.carry_adjoint, bool, "carry_adjoint", "Implicit")
        if self.carry_adjoint:
            check_takes_guess(self.linear_solver, "Implicit")

    def init(self, problem, x, anchor):
        if not self.carry_adjoint:
            return None
        return nothing_carried(self.linear_solver, problem, anchor)

    def _answer(self, problem, x, anchor, state):
        # In one vector, which makes the program shorter.
        shaped = says(self.linear_solver, "keeps_shapes", False)
        problem, layout = flat_if_uniform(problem, anchor, shaped)
        anchor = layout.ravel(anchor)
        curved = hessian_depends_on_y(problem, x, anchor)
        v, result, stats = self.minimum(problem, x, anchor, curved)
        at, cross_transposed = self._expansion(problem, x, v, curved)
        failure = self._failure(problem, x, anchor, at)
        result, stats["inner_residual"] = self.judge(result, anchor, v, at, failure)

        def push(tangent):
            solver = throwing(self.linear_solver)
            K = augmented(self.linear_solver, at.hessian)
            if K is not None:
                w = stationary_residual(problem, x, v, self.linear_solver)
                gradient = squares_condition(problem, x, v, w)
                B = derivative_in_x(lambda x: gradient(problem, x), x)
                z = lx.linear_solve(K, B.mv(tangent), solver, throw=False).value
                return layout.unravel(tree_scale(-1, z[1]))
            B = at.applied_to(cross_derivative_operator(problem, x, v))
            J = at.applied_to(-(lx.invert(at.hessian, solver) @ B))
            return layout.unravel(J.mv(tangent))

        if not self.carry_adjoint:
            state = None
        pullback = _Pullback(at, cross_transposed, self.linear_solver, layout, state)
        y = layout.unravel(v)
        response = Response(y, NOT_ASKED_FOR, result, stats, pullback, presumes=_Itself())
        return response, push

    def best_response(self, problem, x, anchor):
        # In one vector, as where the hypergradient is computed: H is then the same.
        shaped = says(self.linear_solver, "keeps_shapes", False)
        problem, layout = flat_if_uniform(problem, anchor, shaped)
        anchor = jax.lax.stop_gradient(layout.ravel(anchor))
        problem = closure_converted(problem, x, anchor)
        response = nondifferentiable(
            self, name="The solvers of an `Implicit` or `Proximal` response"
        )
        y, result = _argmin(response, problem, x, anchor)
        return layout.unravel(y), result

    def reaches(self, problem, x, anchor):
        return depends_on(lambda x: inner_gradient(problem, x, anchor), x)

    def trail(self, problem, x, y, state, *, least=0):
        """Where y is not judged, and the solver takes steps of a known size."""
        size = getattr(self.solver, "step_size", None)
        count = getattr(self.solver, "num_steps", 0)
        known = size is not None and isinstance(count, int) and count >= least
        is_root = isinstance(problem, AbstractRootProblem)
        if self.tolerance is not None or not known or is_root:
            return None
        project = set_y(problem).project

        def step(y, _):
            gradient = inner_gradient(problem, x, y)
            new = tree_axpy(-jnp.asarray(size), gradient, y)
            return tree_cast(project(new), y), y

        return jax.lax.scan(step, y, length=TRAIL)[1]

    def minimum(self, problem, x, anchor, curved=None):
        """The last point of the inner solver, whether it is finite, and `stats`; `curved`
        as for `minimise_inner`."""
        check_mesh_of_solve((problem, x, anchor))
        if self.solver is None:
            return anchor, RESULTS.successful, {}
        if isinstance(problem, AbstractRootProblem):
            # `judge` says what is wrong with the point.
            solution = find_root(problem, x, anchor, self.solver, self.max_steps)
            return solution.value, RESULTS.successful, _steps(solution)
        if not isinstance(self.solver, _MINIMISERS):
            raise ValueError(
                f"`{type(self.solver).__name__}` finds a root, but the inner level of "
                "this problem is a minimum, and a root of the inner gradient may be a "
                "saddle. Use a minimiser, such as `Projection()` or `optx.BFGS(rtol, "
                "atol)`, or state the problem as a `RootProblem`."
            )
        if set_y(problem).confines and not says(self.solver, "projects", False):
            raise ValueError(
                "The inner variables of this problem are confined to a set "
                f"(`project_y`), but `{type(self.solver).__name__}` does not project. "
                "Use `ProjectedGradient` or `GradientDescent`, or `Unrolled` with an "
                "optax optimiser. If a minimiser of your own uses "
                '`options["projection"]`, give it the class attribute `projects = True`.'
            )
        solution = minimise_inner(problem, x, anchor, self.solver, self.max_steps, curved)
        result = RESULTS.successful
        for theirs, ours in (
            (optx.RESULTS.nonfinite, RESULTS.nonfinite_step),
            (optx.RESULTS.nonlinear_divergence, RESULTS.inner_diverged),
        ):
            result = RESULTS.where(solution.result == theirs, ours, result)
        return solution.value, result, _steps(solution)

    def _expansion(self, problem, x, y, curved) -> tuple[Stationarity, Callable]:
        """The first-order condition of the inner problem at (x, y), and B^T; `curved`
        says whether H depends on y."""
        check_symmetry(problem, self.linear_solver)
        tags = tags_for(problem, self.linear_solver, curved)
        gradient, H, cross_transposed = expansion(problem, x, y, tags, self.linear_solver)
        return set_y(problem).stationarity(gradient, H, y, tags), cross_transposed

    def _failure(self, problem, x, anchor, at):
        """What it is called if y is not the root that it should be; for a minimum,
        `judge` knows."""
        if isinstance(problem, AbstractRootProblem):
            return why_no_root(problem, x, anchor, at.residual)
        return None

    def judge(self, result, anchor, y, at, failure=None):
        """Whether y is an inner solution, and the norm of the residual. The test does not
        depend on the scale of f."""
        norm = tree_norm(at.residual)
        # Not `finite_or_not`, which takes more operations.
        finite = jnp.isfinite(norm)
        if failure is None:
            failure = RESULTS.where(
                finite, RESULTS.inner_not_converged, RESULTS.nonfinite_step
            )
        if self.solver is None or self.tolerance is None:
            verdict = RESULTS.where(finite, RESULTS.successful, RESULTS.nonfinite_step)
            return first_failure(result, verdict), norm
        distance = at.distance()
        # Not `tree_norm`, which takes care of a derivative that is not asked for here.
        displacement = tree_sub(y, anchor)
        scale = jnp.sqrt(tree_dot(y, y)) + jnp.sqrt(tree_dot(displacement, displacement))
        eps = tree_eps(y)
        floor = eps * jnp.maximum(scale, eps)
        # Not <=, because at an infinite y both sides may be infinite.
        converged = distance < self.tolerance * scale + floor
        verdict = RESULTS.where(converged, RESULTS.successful, failure)
        return first_failure(result, verdict), norm


_MINIMISERS = optx.AbstractMinimiser, optx.AbstractLeastSquaresSolver


Implicit.__init__.__doc__ = """**Arguments:**

- `solver`: any optimistix minimiser, run on the inner objective from the anchor; for
    instance [`bilevel_eqx.GradientDescent`][] or [`bilevel_eqx.Projection`][]. For a sum
    of squares also a least-squares solver, such as `optx.LevenbergMarquardt`. With
    `None`, the anchor must already be a solution. If y is a root: any root finder,
    fixed-point iteration or least-squares solver of optimistix; or a minimiser, which
    gets half the sum of squares of r. `Projection()` then takes Newton steps with the
    pseudoinverse of the Jacobian, damped by a line search.
- `linear_solver`: any lineax solver, for $H q = F_y$; for instance
    [`bilevel_eqx.Neumann`][], [`bilevel_eqx.TruncatedCG`][] or
    [`bilevel_eqx.Pseudoinverse`][]. $H$ is tagged as symmetric and positive
    semidefinite. The Jacobian of a root has no tags.
- `tolerance`: the inner solve counts as converged if the distance of the minimum along
    the gradient, relative to the size of y, is below this. `None` accepts any point,
    also one at a kink of f (an L1 norm, a hinge, a ReLU at zero). There is no Hessian
    there, and the hypergradient means nothing. `hypergradient` finds that out
    (`RESULTS.at_kink`) if the solver takes at least 64 steps of a known size, as
    [`bilevel_eqx.GradientDescent`][] does, also under `jax.jit`, and `solve` at its end
    says it in a note of the certificate; for other solvers
    [`bilevel_eqx.check_hypergradient`][] does. A failure by a `tolerance` at a kink is
    named as one, but under `jax.jit` the error only mentions kinks as a possible reason.
- `max_steps`: the largest number of steps of the inner solver. `None` sets no bound.
- `carry_adjoint`: whether a linear solve within a run starts from the adjoint of the
    last outer step, for solvers that start from a guess ([`bilevel_eqx.TruncatedCG`][]
    and the iterative ones of lineax). With a fixed number of steps the error then falls
    from one outer step to the next, as long as x moves less than that. The hypergradient
    is no function of x alone, so do not let a line search compare its values. By
    default each solve is by itself. Keyword only argument.
"""


def _steps(solution: optx.Solution) -> dict[str, Any]:
    return {"inner_steps": jnp.asarray(solution.stats["num_steps"])}


class _Itself(eqx.Module):
    """The assumption that y is a minimum of the problem's own inner objective."""

    def __call__(self, problem):
        return problem


class _Pullback(eqx.Module):
    r"""$u \mapsto J^\top u = -B^\top H^{-\top} u$; with constraints,
    $-(D B)^\top K^+ D u$. H and K are symmetric at a minimum, and not at a root."""

    at: Stationarity
    cross_transposed: Callable
    linear_solver: lx.AbstractLinearSolver
    layout: Layout | AsItIs = eqx.field(static=True)
    carried: Carried | None = None

    def __call__(self, u):
        q, pulled, result, stats, carried = self._adjoint(self.layout.ravel(u))
        pulled = tree_scale(-1, pulled)
        return Pulled(pulled, result, stats, self.layout.unravel(q), carried)

    def _adjoint(self, u):
        r"""The linear solver's $q = H^{-\top} u$, $B^\top q$, whether q is right,
        statistics, and what the next solve may start from."""
        # H itself at a minimum, where it is symmetric.
        H, u = self.at.hessian.T, self.at.along(u)
        solver = judged(self.linear_solver)
        K = augmented(self.linear_solver, H)
        carried = self.carried
        if K is not None:
            solve = lx.linear_solve(K, K.right_side(u), solver, throw=False)
            image, q = solve.value
            pulled = self.cross_transposed(q, image)
        else:
            options = None
            if carried is not None:
                options = options_from(carried, self.linear_solver, H)
            solve = lx.linear_solve(H, u, solver, options=options, throw=False)
            q = solve.value
            if carried is not None:
                assert options is not None
                carried = Carried(q, options.get("prepared"), carried.age + 1)
            pulled = self.cross_transposed(self.at.along(q))
        # The solver is not to be blamed for what it is given.
        result = first_failure(finite_or_not(u), explain(solver, solve.result))
        return q, pulled, result, linear_stats(solve.stats), carried


#
# The derivative rule. It is that of `optimistix.implicit_jvp`, but with the Hessian of
# the problem, so that a linear solver can use the structure of the problem.
#


@eqx.filter_custom_jvp
def _argmin(response: Implicit, problem, x, anchor):
    curved = hessian_depends_on_y(problem, x, anchor)
    y, result, _ = response.minimum(problem, x, anchor, curved)
    at, _ = response._expansion(problem, x, y, curved)
    failure = response._failure(problem, x, anchor, at)
    return y, response.judge(result, anchor, y, at, failure)[0]


@_argmin.def_jvp
def _argmin_jvp(primals, tangents):
    response, problem, x, anchor = primals
    _, t_problem, t_x, _ = tangents
    # Called again, not computed here: y is then differentiable too, and second
    # derivatives are right.
    y, result = _argmin(response, problem, x, anchor)
    at, _ = response._expansion(problem, x, y, hessian_depends_on_y(problem, x, y))

    K = augmented(response.linear_solver, at.hessian)
    solver = throwing(response.linear_solver)

    def plain(problem, x):
        return inner_gradient(problem, x, y)

    def solve(vector):
        structure = (at.hessian if K is None else K).in_structure()
        vector = batched_as(tree_materialised(vector, structure), at.residual)
        if K is None:
            return lx.linear_solve(at.hessian, vector, solver, throw=False).value
        return lx.linear_solve(K, vector, solver, throw=False).value[1]

    gradient = plain
    if K is not None:
        w = stationary_residual(problem, x, y, response.linear_solver)
        gradient = squares_condition(problem, x, y, w)
    t_y = set_y(problem).minimum_tangent(
        at, y, gradient, (problem, x), (t_problem, t_x), solve
    )
    return (y, result), (t_y, jtu.tree_map(lambda _: None, result))
