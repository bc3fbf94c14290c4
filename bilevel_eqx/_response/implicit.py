"""Implicit differentiation."""

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import optimistix as optx

from .._arguments import check_count, check_positive, check_type
from .._depends_on import depends_on
from .._derivatives.first import inner_gradient
from .._derivatives.operators import curved_tag
from .._derivatives.second import cross_derivative_operator, HessianAt, is_curved
from .._failure.results import first_failure, RESULTS
from .._inner_solver.gradient_descent import GradientDescent
from .._inner_solver.projected_gradient import ProjectedGradient
from .._linear_solver.identity_inverse import IdentityInverse
from .._linear_solver.misc import relative
from .._linear_solver.neumann import Neumann
from .._linear_solver.pseudoinverse import Pseudoinverse
from .._linear_solver.truncated_cg import TruncatedCG
from .._problem.closure import closure_converted
from .._problem.constraints import projection_y
from .._solution_set.stationarity import stationarity
from .._tree import nonzero, tree_axpy, tree_dot, tree_norm, tree_scale, tree_sub
from .base import AbstractResponse, Response


# At a minimum the Hessian is positive semidefinite. Saying so lets `lx.CG` and
# `lx.Cholesky` take it, and makes lineax's default solver fail loudly on a singular one,
# where without the tag it would return something wrong in silence.
_tags = frozenset({lx.positive_semidefinite_tag})


class Implicit(AbstractResponse):
    r"""Solves the inner problem from the anchor, and differentiates the solution by the
    implicit function theorem:

    $$y^* \in \operatorname{argmin}_y f(x, y), \qquad
    \frac{\partial y^*}{\partial x} = -H^{-1} B.$$

    What stands for $H^{-1}$ is the linear solver's choice: a pseudoinverse, a truncated
    series, a factorisation.

    The point depends on the anchor, where the inner problem has many solutions; the
    Jacobian does not, and the derivative with respect to the anchor is zero by
    definition. Where the features move with x, $-H^+ B$ is the derivative of the warm
    response, $\Pi(y, S(x))$ from the current $y$, and not quite that of the cold one.

    Where y is confined to a set (`project_y`), the solution is that in the set, and with
    $D$ the derivative of the projection, at a step $t$ down the gradient from y,

    $$\frac{\partial y^*}{\partial x} = -D K^+ D B, \qquad
    K = D H D + \tfrac1t (D - D^2):$$

    at an active bound y does not move. $K$ is singular there: use
    [`bilevel_eqx.Pseudoinverse`][], [`bilevel_eqx.TruncatedCG`][] or
    [`bilevel_eqx.Neumann`][]. Where a bound is active and its multiplier zero, y has a
    kink, and no derivative.

    ??? cite "References"

        Bengio, *Gradient-based optimization of hyperparameters*, 2000. Pedregosa,
        *Hyperparameter optimization with approximate gradient*, 2016. Lorraine, Vicol
        and Duvenaud, *Optimizing Millions of Hyperparameters by Implicit
        Differentiation*, 2020.
    """

    solver: optx.AbstractMinimiser | None
    linear_solver: lx.AbstractLinearSolver
    tolerance: float | None = 1e-3
    max_steps: int | None = 10_000

    def __check_init__(self):
        minimiser, linear_solver = optx.AbstractMinimiser | None, lx.AbstractLinearSolver
        check_type(self.solver, minimiser, "solver", "Implicit")
        check_type(self.linear_solver, linear_solver, "linear_solver", "Implicit")
        if self.tolerance is not None:
            check_positive(self.tolerance, "tolerance", "Implicit")
        if self.max_steps is not None:
            check_count(self.max_steps, "max_steps", "Implicit")

    def init(self, problem, x, anchor):
        return None

    def __call__(self, problem, x, anchor, state=None):
        y, result, stats = self.minimum(problem, x, anchor)
        at = stationarity(problem, x, y, self._tags(problem, x, y))
        B = at.cross(cross_derivative_operator(problem, x, y))
        H, D = at.hessian, at.tangent
        jacobian = -(lx.invert(H, self.linear_solver) @ B)
        if D is not None:
            jacobian = D @ jacobian
        result = self.judge(result, anchor, y, at.residual, at.free_hessian)
        stats["inner_residual"] = tree_norm(at.residual)
        pullback = ImplicitPullback(H, B, D, self.linear_solver)
        return Response(y, jacobian, result, stats, pullback)

    def best_response(self, problem, x, anchor):
        anchor = jax.lax.stop_gradient(anchor)
        problem = closure_converted(problem, x, anchor)
        response = eqxi.nondifferentiable(
            self, name="The solvers of an `Implicit` or `Proximal` response"
        )
        y, result = _argmin(response, problem, x, anchor)
        return y, result

    def reaches(self, problem, x, anchor):
        return depends_on(lambda x: inner_gradient(problem, x, anchor), x)

    def minimum(self, problem, x, anchor):
        """The point that the inner solver ends at, whether it is finite, and `stats`."""
        if self.solver is None:
            return anchor, RESULTS.successful, {}
        if problem.project_y is not None and not isinstance(self.solver, _projecting):
            names = " or ".join(f"`{kind.__name__}`" for kind in _projecting)
            raise ValueError(
                "The inner variables of this problem are confined to a set "
                f"(`project_y`), of which `{type(self.solver).__name__}` knows nothing: "
                f"use {names}, or `Unrolled` with an optax optimiser."
            )
        # These have a number of steps of their own.
        max_steps = None if isinstance(self.solver, _projecting) else self.max_steps
        solution = optx.minimise(
            _inner_objective,
            self.solver,
            anchor,
            args=(problem, x),
            options={
                "hessian": HessianAt(problem, x),
                "projection": projection_y(problem),
            },
            max_steps=max_steps,
            throw=False,
        )
        finite = solution.result != optx.RESULTS.nonfinite
        result = RESULTS.where(finite, RESULTS.successful, RESULTS.nonfinite_step)
        stats = {"inner_steps": jnp.asarray(solution.stats["num_steps"])}
        return solution.value, result, stats

    def _tags(self, problem, x, y):
        """What the linear solver should know of H."""
        if isinstance(self.linear_solver, Pseudoinverse) and is_curved(problem, x, y):
            return _tags | {curved_tag}
        return _tags

    def judge(self, result, anchor, y, gradient, hessian):
        """Whether y is a minimum, in terms that do not depend on the scale of f."""
        if self.solver is None or self.tolerance is None:
            return result
        # The minimum along the gradient is at this distance, were f a quadratic.
        gg = tree_dot(gradient, gradient)
        curvature = jnp.abs(tree_dot(gradient, hessian.mv(gradient)))
        distance = gg / nonzero(curvature) * tree_norm(gradient)
        distance = jnp.where(curvature == 0, jnp.inf, distance)
        scale = tree_norm(y) + tree_norm(tree_sub(y, anchor))
        eps = jnp.finfo(gg.dtype).eps
        floor = eps * jnp.maximum(scale, eps)
        converged = (gg == 0) | (distance <= self.tolerance * scale + floor)
        verdict = RESULTS.where(
            converged, RESULTS.successful, RESULTS.inner_not_converged
        )
        return first_failure(result, verdict)


Implicit.__init__.__doc__ = """**Arguments:**

- `solver`: any optimistix minimiser, run on the inner objective from the anchor; for
    instance [`bilevel_eqx.GradientDescent`][] or [`bilevel_eqx.Projection`][]. `None`
    takes the anchor to be a solution already, which is then for the caller to vouch for.
- `linear_solver`: any lineax solver, for $H q = F_y$; for instance
    [`bilevel_eqx.Neumann`][], [`bilevel_eqx.TruncatedCG`][] or
    [`bilevel_eqx.Pseudoinverse`][]. $H$ is tagged as symmetric and positive
    semidefinite.
- `tolerance`: the inner solve counts as converged when the minimum along the gradient is
    nearer than this, relative to the size of y. `None` accepts any point.
- `max_steps`: the largest number of steps of the inner solver. `None` sets no bound.
"""


# The inner solvers that keep to a set.
_projecting = (ProjectedGradient, GradientDescent)


def _inner_objective(y, args):
    problem, x = args
    return problem.inner(x, y)


class ImplicitPullback(eqx.Module):
    r"""$u \mapsto J^\top u = -B^\top H^{-1} u$; with constraints,
    $-(D B)^\top K^+ D u$. H and K are symmetric."""

    hessian: lx.AbstractLinearOperator
    cross: lx.AbstractLinearOperator
    tangent: lx.AbstractLinearOperator | None
    linear_solver: lx.AbstractLinearSolver

    def __call__(self, u):
        q, result, stats = self.adjoint(u)
        return self.apply(q), result, stats

    def apply(self, q):
        return tree_scale(-1, self.cross.T.mv(q))

    def adjoint(self, u):
        """$q = H^{-1} u$, as far as the linear solver gets; whether it does; figures."""
        H = self.hessian
        if self.tangent is not None:
            u = self.tangent.mv(u)
        solve = lx.linear_solve(H, u, self.linear_solver, throw=False)
        q, stats = solve.value, solve.stats
        result = self._explain(solve.result)
        if not isinstance(self.linear_solver, _reports):
            # A factorisation of a singular matrix may well return something finite.
            # Multiplied by H once more, because u need not be in its range.
            stats = {**stats, "residual": relative(H.mv(tree_sub(H.mv(q), u)), H.mv(u))}
            sound = stats["residual"] <= _FOREIGN_TOLERANCE
            verdict = RESULTS.where(
                sound, RESULTS.successful, RESULTS.linear_not_converged
            )
            result = first_failure(result, verdict)
        # Some solvers report a bound that they do not have as `None`.
        arrays = eqx.filter(stats, eqx.is_array)
        stats = {f"linear_{k}": v for k, v in arrays.items() if v is not None}
        return q, result, stats

    def _explain(self, result: lx.RESULTS) -> RESULTS:
        """Our words for the failure of a linear solve, where we know more."""
        if isinstance(self.linear_solver, Neumann):
            breakdown = RESULTS.neumann_diverged
        elif isinstance(self.linear_solver, TruncatedCG):
            breakdown = RESULTS.negative_curvature
        else:
            breakdown = RESULTS.linear_not_converged
        ours = RESULTS.promote(result)
        ours = RESULTS.where(result == lx.RESULTS.breakdown, breakdown, ours)
        for name in (lx.RESULTS.max_steps_reached, lx.RESULTS.stagnation):
            ours = RESULTS.where(result == name, RESULTS.linear_not_converged, ours)
        return ours


# Our own solvers judge themselves, and some are meant to leave a residual.
_reports = (IdentityInverse, Neumann, Pseudoinverse, TruncatedCG)


# Generous: it is to tell a solution from nonsense, and not a good from a better one.
_FOREIGN_TOLERANCE = 1e-2


#
# The derivative rule. It is that of `optimistix.implicit_jvp`, with the Hessian of the
# problem in place of the Jacobian of a function, so that a linear solver can make use
# of the structure of the problem.
#


@eqx.filter_custom_jvp
def _argmin(response: Implicit, problem, x, anchor):
    y, result, _ = response.minimum(problem, x, anchor)
    at = stationarity(problem, x, y)
    return y, response.judge(result, anchor, y, at.residual, at.free_hessian)


@_argmin.def_jvp
def _argmin_jvp(primals, tangents):
    response, problem, x, anchor = primals
    _, t_problem, t_x, _ = tangents
    # Called again rather than computed here: y is then differentiable in its turn, and
    # second derivatives are right.
    y, result = _argmin(response, problem, x, anchor)

    at = stationarity(problem, x, y, response._tags(problem, x, y))
    t = at.step_size

    def step(problem, x):
        gradient, project = inner_gradient(problem, x, y), projection_y(problem)
        return gradient if project is None else project(tree_axpy(-t, gradient, y))

    _, moved = eqx.filter_jvp(step, (problem, x), (t_problem, t_x))

    def solve(vector):
        return lx.linear_solve(at.hessian, vector, response.linear_solver).value

    if at.tangent is None:
        t_y = tree_scale(-1, solve(moved))
    else:
        # The set may move too, with the problem's leaves, and y with it.
        left = tree_axpy(-1, at.free_hessian.mv(moved), tree_scale(1 / t, moved))
        t_y = tree_axpy(1, at.along(solve(at.along(left))), moved)
    return (y, result), (t_y, jtu.tree_map(lambda _: None, result))
