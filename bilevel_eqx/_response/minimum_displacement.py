"""The response of a cold start: the inner minimum nearest to the anchor."""

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import optimistix as optx

from .._arguments import check_count, check_positive
from .._derivatives.first import inner_gradient
from .._derivatives.second import cross_derivative_operator
from .._failure.results import first_failure, RESULTS
from .._inner_solver.projection import Projection
from .._linear_solver.pseudoinverse import Pseudoinverse
from .._problem.closure import closure_converted
from .._solution_set.nearest import Displacement, nearest_to
from .._solution_set.tangent import SolutionSet
from .._tree import tree_norm, tree_struct
from .base import AbstractResponse, Response
from .implicit import Implicit


class MinimumDisplacement(AbstractResponse):
    r"""The inner minimum nearest to the anchor, with its true derivative:

    $$y^* = \Pi(a, S(x)) = \operatorname{argmin}_{y \in S(x)} \|y - a\|, \qquad
    \frac{\partial y^*}{\partial x} = -H^+ B + (\text{a term in the null space of } H).$$

    That second term is there wherever the inner Hessian moves with x: wherever $x$ are
    data and not targets. [`bilevel_eqx.Implicit`][] lacks it, since $-H^+ B$ is the
    derivative of a *warm* start. For a single row $\phi(x)^\top y = t$ it is
    $P \phi' (t - \phi^\top a) / \|\phi\|^2$.

    Both terms come from the conditions of the projection,
    $y - a + H \mu = 0$ and $\nabla_y f(x, y) = 0$: with $W = I + \partial_y(H \mu)$
    and $P$ the projection on the null space of $H$,

    $$\mathrm d y = n - (P W P)^+ P \bigl(W n + \partial_x(H \mu)\, \mathrm d x
    - \mathrm d a\bigr), \qquad n = -H^+ B\, \mathrm d x.$$

    Where $S(x)$ is a plane (linear least squares; any quadratic) then $W = I$, and
    neither the point nor its derivative needs a solve beyond that of $H^+$. Where it is
    curved the nearest point is found by Newton's method along it. It is differentiable
    in the anchor too.

    Where the inner minimum is unique this is [`bilevel_eqx.Implicit`][].

    ??? cite "Reference"

        Golub and Pereyra, *The differentiation of pseudo-inverses and nonlinear least
        squares problems whose variables separate*, 1973, for the linear case.
    """

    solver: optx.AbstractMinimiser | None
    linear_solver: lx.AbstractLinearSolver
    tolerance: float | None
    max_steps: int | None
    selection_steps: int
    selection_tolerance: float | None

    def __init__(
        self,
        solver: optx.AbstractMinimiser | None = Projection(),
        linear_solver: lx.AbstractLinearSolver = Pseudoinverse(),
        tolerance: float | None = 1e-3,
        max_steps: int | None = 10_000,
        selection_steps: int = 50,
        selection_tolerance: float | None = 1e-3,
    ):
        """**Arguments:**

        - `solver`: any optimistix minimiser, run on the inner objective from the anchor
            to find a point of $S(x)$. `None` takes the anchor to be one already.
        - `linear_solver`: the lineax solver that stands for $H^+$. It must be right on a
            singular $H$: [`bilevel_eqx.Pseudoinverse`][].
        - `tolerance`, `max_steps`: how well the inner problem must be solved, as for
            [`bilevel_eqx.Implicit`][].
        - `selection_steps`: the largest number of Newton steps along $S(x)$, where that
            is curved.
        - `selection_tolerance`: how much of the way from the anchor to y may lead along
            $S(x)$, relative to its length. Where $S(x)$ has kinks (a network of ReLUs)
            the nearest point may lie on one, and is not reached to any tolerance. `None`
            accepts any point. It is in the `stats` as `displacement_residual`.
        """
        self.solver = solver
        self.linear_solver = linear_solver
        self.tolerance = tolerance
        self.max_steps = max_steps
        self.selection_steps = selection_steps
        self.selection_tolerance = selection_tolerance

    def __check_init__(self):
        self._implicit()
        owner = "MinimumDisplacement"
        check_count(self.selection_steps, "selection_steps", owner)
        if self.selection_tolerance is not None:
            check_positive(self.selection_tolerance, "selection_tolerance", owner)

    def _implicit(self):
        return Implicit(self.solver, self.linear_solver, self.tolerance, self.max_steps)

    def init(self, problem, x, anchor):
        return None

    def __call__(self, problem, x, anchor, state=None):
        displacement, result, stats = self.nearest(problem, x, anchor)
        solutions = displacement.solutions
        y, mu = solutions.y, displacement.multiplier

        def push(x_tangent):
            def along_x(fn):
                return jax.jvp(lambda x: fn(x, y), (x,), (x_tangent,))[1]

            gradient_tangent = cross_derivative_operator(problem, x, y).mv(x_tangent)
            return displacement.push(gradient_tangent, along_x(solutions.pulled(mu)))

        def pullback(u):
            cotangent, result = displacement.pull(u)
            return cotangent, result, {}

        jacobian = lx.FunctionLinearOperator(push, tree_struct(x))
        return Response(y, jacobian, result, stats, pullback)

    def best_response(self, problem, x, anchor):
        problem = closure_converted(problem, x, anchor)
        response = eqxi.nondifferentiable(
            self, name="The solvers of a `MinimumDisplacement` response"
        )
        return _nearest_point(response, problem, x, anchor)

    def reaches(self, problem, x, anchor):
        return self._implicit().reaches(problem, x, anchor)

    def nearest(self, problem, x, anchor):
        """The nearest point, what is known around it, and whether it is one."""
        if problem.project_y is not None:
            raise ValueError(
                "`MinimumDisplacement` looks for the nearest inner minimum along the "
                "null space of H, and where y is confined to a set (`project_y`) that "
                "does not lead there. Use `Implicit` with `ProjectedGradient`, or "
                "`Unrolled`."
            )
        implicit = self._implicit()
        y, result, stats = implicit.minimum(problem, x, anchor)
        displacement, num_steps = nearest_to(
            problem, x, y, anchor, self.linear_solver, self.selection_steps
        )
        stats["selection_steps"] = num_steps
        solutions = displacement.solutions
        y = solutions.y
        gradient = solutions.gradient
        result = implicit.judge(result, anchor, y, gradient, solutions.hessian)
        stats["displacement_residual"] = astray = displacement.astray
        if self.selection_tolerance is not None:
            near = astray <= self.selection_tolerance
            verdict = RESULTS.where(near, RESULTS.successful, RESULTS.not_selected)
            result = first_failure(result, verdict)
        stats["inner_residual"] = tree_norm(gradient)
        return displacement, result, stats


#
# The derivative rule
#


@eqx.filter_custom_jvp
def _nearest_point(response: MinimumDisplacement, problem, x, anchor):
    displacement, result, _ = response.nearest(problem, x, anchor)
    return displacement.solutions.y, result


@_nearest_point.def_jvp
def _nearest_point_jvp(primals, tangents):
    response, problem, x, anchor = primals
    _, t_problem, t_x, t_anchor = tangents
    # Called again rather than computed here: y is then differentiable in its turn, and
    # second derivatives are right.
    y, result = _nearest_point(response, problem, x, anchor)
    solutions = SolutionSet(problem, x, y, response.linear_solver)
    displacement = Displacement(solutions, anchor)
    mu = displacement.multiplier

    def constraint(problem, x):
        return inner_gradient(problem, x, y)

    def stationarity(problem, x, anchor):
        moved = eqx.tree_at(lambda s: s.problem, solutions, problem)
        return jtu.tree_map(jnp.subtract, moved.pulled(mu)(x, y), anchor)

    _, t_gradient = eqx.filter_jvp(constraint, (problem, x), (t_problem, t_x))
    primals, tangents = (problem, x, anchor), (t_problem, t_x, t_anchor)
    _, t_pull = eqx.filter_jvp(stationarity, primals, tangents)
    t_y = displacement.push(_materialised(t_gradient, y), _materialised(t_pull, y))
    return (y, result), (t_y, jtu.tree_map(lambda _: None, result))


def _materialised(tangent, y):
    """Equinox writes a tangent that is zero as `None`."""
    return jtu.tree_map(
        lambda u, t: jnp.zeros_like(u) if t is None else t,
        y,
        tangent,
        is_leaf=lambda t: t is None,
    )
