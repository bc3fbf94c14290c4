"""The response of a cold start: the inner minimum nearest to the anchor."""

from typing import ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, Float, PyTree

from .._arguments import as_count, check_count, check_positive, says
from .._compat import batched_as, nondifferentiable
from .._derivatives.first import inner_gradient
from .._derivatives.second import hessian_depends_on_y
from .._failure.results import first_failure, RESULTS
from .._inner_solver.minimum import InnerSolver
from .._inner_solver.projection import Projection
from .._inner_solver.proximal_path import has_path, path_not_known, start_of_search
from .._linear_solver.judged import throwing
from .._linear_solver.pseudoinverse import Pseudoinverse
from .._problem.closure import closure_converted
from .._problem.constraints import set_y
from .._problem.flat import flat
from .._problem.root import check_has_objective
from .._solution_set.nearest import Displacement, nearest_to
from .._solution_set.picture import flat_picture
from .._tree import tree_materialised
from .base import AbstractSolvedResponse, NOT_ASKED_FOR, Pulled, Response
from .implicit import Implicit


class _Guess(NamedTuple):
    """The answer at another x, which is close to the next one; and the path that led to
    it, if one was followed."""

    y: PyTree[Array]
    path: Float[Array, "k n"] | None


class MinimumDisplacement(AbstractSolvedResponse):
    r"""The inner minimum nearest to the anchor, with its true derivative:

    $$y^* = \Pi(a, S(x)) = \operatorname{argmin}_{y \in S(x)} \|y - a\|, \qquad
    \frac{\partial y^*}{\partial x} = -H^+ B + (\text{a term in the null space of } H).$$

    The second term is nonzero only if the inner Hessian depends on x, that is, if $x$ are
    data and not targets. [`bilevel_eqx.Implicit`][] lacks it: $-H^+ B$ is the derivative
    of a *warm* start. For a single row $\phi(x)^\top y = t$ it is
    $P \phi' (t - \phi^\top a) / \|\phi\|^2$.

    Both terms follow from the conditions of the projection,
    $y - a + H \mu = 0$ and $\nabla_y f(x, y) = 0$. With $W = I + \partial_y(H \mu)$
    and the projection $P$ on the null space of $H$,

    $$\mathrm d y = n - (P W P)^+ P \bigl(W n + \partial_x(H \mu)\, \mathrm d x
    - \mathrm d a\bigr), \qquad n = -H^+ B\, \mathrm d x.$$

    If $S(x)$ is a plane (linear least squares; any quadratic), then $W = I$, and the
    point and its derivative need no solve beyond that of $H^+$. If $S(x)$ is curved,
    Newton's method along it finds a point that is nearest among its neighbours. Such
    points may be many. So up to 1,024 variables, if f is no sum of squares and `solver`
    is the default, the search begins at the end of the path of the minima of
    $f(x, y) + \frac\delta2 \|y - a\|^2$ for $\delta \to 0$ (Tikhonov), where that is
    nearer than the minimum of f that the solver finds. The point is differentiable with
    respect to the anchor too.

    If the inner minimum is unique, this is [`bilevel_eqx.Implicit`][].

    ??? cite "Reference"

        Golub and Pereyra, *The differentiation of pseudo-inverses and nonlinear least
        squares problems whose variables separate*, 1973, for the linear case.
    """

    solver: InnerSolver
    linear_solver: lx.AbstractLinearSolver
    tolerance: float | None
    max_steps: int | None
    selection_steps: int
    selection_tolerance: float | None

    answers_itself: ClassVar[bool] = True
    state_is_guess: ClassVar[bool] = True

    def __init__(
        self,
        solver: InnerSolver = Projection(),
        linear_solver: lx.AbstractLinearSolver = Pseudoinverse(),
        tolerance: float | None = 1e-3,
        max_steps: int | None = 10_000,
        selection_steps: int = 50,
        selection_tolerance: float | None = 1e-3,
    ):
        """**Arguments:**

        - `solver`: any optimistix minimiser, run on the inner objective from the anchor
            to find a point of $S(x)$. With `None`, the anchor must be such a point.
        - `linear_solver`: the lineax solver for $H^+$. It must be right on a singular
            $H$, as [`bilevel_eqx.Pseudoinverse`][] is.
        - `tolerance`, `max_steps`: how well the inner problem must be solved, as for
            [`bilevel_eqx.Implicit`][].
        - `selection_steps`: the largest number of Newton steps along $S(x)$, if that is
            curved.
        - `selection_tolerance`: the largest accepted tangential residual: the part of
            the displacement from the anchor to y that is tangential to $S(x)$, relative
            to its length. It is `displacement_residual` in the `stats`. If $S(x)$ has
            kinks (a network of ReLUs), the nearest point may lie on one, and the residual
            then stays large. `None` accepts any point.
        """
        self.solver = solver
        self.linear_solver = linear_solver
        self.tolerance = tolerance
        self.max_steps = as_count(max_steps)
        self.selection_steps = as_count(selection_steps)
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
        flat_problem, layout = flat(problem, anchor)
        vector = layout.ravel(anchor)
        follows = self._follows_path(flat_problem, vector)
        return _Guess(anchor, path_not_known(vector) if follows else None)

    def _follows_path(self, problem, anchor):
        """Whether a search begins at the end of a path, if S(x) is curved."""
        return says(self.solver, "is_default", False) and has_path(problem, anchor)

    def _answer(self, problem, x, anchor, state):
        found = self.nearest(problem, x, anchor, state)
        displacement, layout, result, stats, path = found
        here = displacement.picture

        def push(x_tangent):
            def condition(x):
                return here.condition(here.problem, x)

            def pulled(x):
                return _pull_of_constraint(here.problem, x, here.y, mu, image)

            mu, image, _ = displacement.multiplier
            condition_tangent = jax.jvp(condition, (x,), (x_tangent,))[1]
            pull_tangent = jax.jvp(pulled, (x,), (x_tangent,))[1]
            return layout.unravel(displacement.push(condition_tangent, pull_tangent))

        def pullback(u):
            cotangent, result = displacement.pull(layout.ravel(u))
            return Pulled(cotangent, result, {})

        y = layout.unravel(here.y)
        state = _Guess(y, path)
        return Response(y, NOT_ASKED_FOR, result, stats, pullback, state=state), push

    def best_response(self, problem, x, anchor):
        problem = closure_converted(problem, x, anchor)
        response = nondifferentiable(
            self, name="The solvers of a `MinimumDisplacement` response"
        )
        return _nearest_point(response, problem, x, anchor)

    def reaches(self, problem, x, anchor):
        return self._implicit().reaches(problem, x, anchor)

    def nearest(self, problem, x, anchor, guess=None):
        """The nearest point with its local picture, the layout of y, the result,
        statistics of the search, which starts at the guess or at the anchor, and the path
        that it followed."""
        if set_y(problem).confines:
            raise ValueError(
                "`MinimumDisplacement` searches for the nearest inner minimum along the "
                "null space of H, which does not work if y is confined to a set "
                "(`project_y`). Use `Implicit` with `ProjectedGradient`, or `Unrolled`."
            )
        check_has_objective(problem, "`MinimumDisplacement`")
        problem, layout = flat(problem, anchor)
        anchor = layout.ravel(anchor)
        implicit = self._implicit()
        start = anchor if guess is None else layout.ravel(guess.y)
        path = None if guess is None else guess.path
        curved = hessian_depends_on_y(problem, x, anchor)
        if curved and self._follows_path(problem, anchor):
            # `judge` says whether it is finite.
            y, num_steps, path = start_of_search(problem, x, start, anchor, path)
            result, stats = RESULTS.successful, {"inner_steps": num_steps}
        else:
            y, result, stats = implicit.minimum(problem, x, start, curved)
        displacement, num_steps = nearest_to(
            problem, x, y, anchor, self.linear_solver, self.selection_steps
        )
        here = displacement.picture
        stats["selection_steps"] = num_steps
        judged = implicit.judge(result, anchor, here.y, here.at)
        result, stats["inner_residual"] = judged
        tangential = displacement.tangential_residual
        stats["displacement_residual"] = tangential
        if self.selection_tolerance is not None:
            near = tangential <= self.selection_tolerance
            verdict = RESULTS.where(near, RESULTS.successful, RESULTS.not_selected)
            result = first_failure(result, verdict)
        return displacement, layout, result, stats, path


def _pull_of_constraint(problem, x, y, multiplier, image):
    r"""$H(x, y)\, \mu$; for a linear residual $A(x)^\top$ times that image $A \mu$. Their
    derivatives in x differ by what is orthogonal to S(x), which does not matter."""
    if image is not None:
        _, pull = jax.vjp(lambda y: problem.inner_residual(x, y), y)
        return pull(image)[0]
    return jax.jvp(lambda y: inner_gradient(problem, x, y), (y,), (multiplier,))[1]


#
# The derivative rule
#


@eqx.filter_custom_jvp
def _nearest_point(response: MinimumDisplacement, problem, x, anchor):
    displacement, layout, result, *_ = response.nearest(problem, x, anchor)
    return layout.unravel(displacement.picture.y), result


@_nearest_point.def_jvp
def _nearest_point_jvp(primals, tangents):
    response, problem, x, anchor = primals
    _, t_problem, t_x, t_anchor = tangents
    # Called again, not computed here: y is then differentiable too, and second
    # derivatives are right.
    y, result = _nearest_point(response, problem, x, anchor)
    flat_problem, layout = flat(problem, y)
    v = layout.ravel(y)
    solver = throwing(response.linear_solver)
    here = flat_picture(flat_problem, x, v, solver, differentiable=True)
    displacement = Displacement(here, layout.ravel(anchor))
    mu, image, _ = displacement.multiplier

    def condition(problem, x):
        return here.condition(flat(problem, y)[0], x)

    def stationarity(problem, x, anchor):
        pulled = _pull_of_constraint(flat(problem, y)[0], x, v, mu, image)
        return pulled - layout.ravel(anchor)

    like, t_condition = eqx.filter_jvp(condition, (problem, x), (t_problem, t_x))
    primals, tangents = (problem, x, anchor), (t_problem, t_x, t_anchor)
    _, t_pull = eqx.filter_jvp(stationarity, primals, tangents)
    t_condition, t_pull = batched_as(
        (tree_materialised(t_condition, like), tree_materialised(t_pull, v)), like
    )
    t_v = displacement.push(t_condition, t_pull)
    return (y, result), (layout.unravel(t_v), jtu.tree_map(lambda _: None, result))
