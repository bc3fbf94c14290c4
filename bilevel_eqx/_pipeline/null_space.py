"""Descent along the best, or the worst, value of the inner minima."""

import abc
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import optax
import optimistix as optx
from jaxtyping import Array, Bool, PyTree, Scalar

from .._arguments import as_count, check_count, check_type
from .._equilibrium.base import AbstractEquilibrium
from .._equilibrium.optimistic import Optimistic
from .._equilibrium.pessimistic import Pessimistic
from .._failure.results import (
    figures_of,
    finite_or_not,
    first_failure,
    no_figures,
    RESULTS,
    Verdict,
    verdict_where,
)
from .._inner_solver.projection import Projection
from .._linear_solver.pseudoinverse import Pseudoinverse
from .._optimiser.descent import AbstractDescent, advance, as_descent, as_optimiser, Point
from .._optimiser.lbfgs import LBFGS
from .._optimiser.step import first_order
from .._problem.base import AbstractBilevelProblem
from .._problem.constraints import set_x
from .._problem.flat import flat
from .._response.implicit import Implicit
from .._response.minimum_displacement import MinimumDisplacement
from .._solution_set.search import select
from .._solution_set.worst_in_ball import find_worst
from .._tree import tree_cast, tree_dtype, tree_norm, tree_zeros_like
from .base import AbstractPipeline


class SelectedValue(eqx.Module):
    r"""The value $\phi(x)$ of the inner minimum selected at x, and its derivative."""

    y: PyTree[Array]
    value: Scalar
    gradient: PyTree[Array]
    verdict: Verdict
    # Zero iff y is an inner minimum, and the one that was to be selected.
    residual: Scalar


class _Answer(NamedTuple):
    """What an evaluation finds beyond the value and the gradient."""

    y: PyTree[Array]
    verdict: Verdict
    residual: Scalar


class NullSpaceState(eqx.Module):
    """All that a run carries from one outer step to the next."""

    x: PyTree[Array]
    y: PyTree[Array]
    y0: PyTree[Array]
    value: Scalar
    gradient: PyTree[Array]
    residual: Scalar
    verdict: Verdict
    outer_state: Any
    # Whether x has been answered: the first step only does that.
    started: Bool[Array, ""]


class _AbstractValueDescent(AbstractPipeline[NullSpaceState]):
    r"""$x \leftarrow x - \alpha \nabla \phi(x)$, for the value $\phi$ of a selection."""

    optimiser: optax.GradientTransformation | AbstractDescent = eqx.field(
        default=LBFGS(), converter=as_optimiser
    )
    solver: optx.AbstractMinimiser = Projection()
    linear_solver: lx.AbstractLinearSolver = Pseudoinverse()
    selection_steps: int = eqx.field(default=10, converter=as_count)

    def __check_init__(self):
        owner = type(self).__name__
        kinds = optax.GradientTransformation | AbstractDescent
        check_type(self.optimiser, kinds, "optimiser", owner)
        check_type(self.solver, optx.AbstractMinimiser, "solver", owner)
        check_type(self.linear_solver, lx.AbstractLinearSolver, "linear_solver", owner)
        check_count(self.selection_steps, "selection_steps", owner)

    @abc.abstractmethod
    def select(
        self,
        problem: AbstractBilevelProblem,
        equilibrium: AbstractEquilibrium,
        x: PyTree[Array],
        y: PyTree[Array],
        y0: PyTree[Array],
    ) -> SelectedValue:
        """The selected point at x, searched from y."""

    def init(self, problem, equilibrium, x, y, key):
        del key
        value = jax.eval_shape(problem.outer, x, y)
        return NullSpaceState(
            x=x,
            y=y,
            y0=y,
            value=jnp.zeros((), value.dtype),
            gradient=tree_zeros_like(x),
            residual=jnp.zeros((), tree_dtype(y)),
            verdict=Verdict(RESULTS.successful, no_figures(x)),
            outer_state=as_descent(self.optimiser).init(x),
            started=jnp.array(False),
        )

    def step(self, problem, equilibrium, state):
        def evaluate(x):
            # From the y of the last accepted point, for all points of a search.
            at = self.select(problem, equilibrium, x, state.y, state.y0)
            verdict = verdict_where(state.verdict.failed, state.verdict, at.verdict)
            found = _Answer(at.y, verdict, at.residual)
            return Point(x, at.value, at.gradient, at.verdict.failed, found)

        def value_fn(x):
            # For line searches of optax. By the envelope theorem the derivative is
            # known, and need not be had by differentiating the search.
            fixed = tree_cast(jax.lax.stop_gradient(x), state.x)
            at = _select(self, problem, equilibrium, fixed, state.y, state.y0)
            return first_order(at.value, at.gradient, x, fixed)

        found = _Answer(state.y, state.verdict, state.residual)
        base = Point(state.x, state.value, state.gradient, state.verdict.failed, found)
        outer_state, point = advance(
            as_descent(self.optimiser),
            state.outer_state,
            base,
            evaluate,
            set_x(problem).project,
            value_fn,
            state.started,
        )
        found = point.answer
        left = set_x(problem).remaining_step(point.gradient, point.x)
        metrics = {
            "value": point.value,
            "outer_residual": tree_norm(left),
            "inner_residual": found.residual,
            "result": found.verdict,
        }
        state = NullSpaceState(
            x=point.x,
            y=found.y,
            y0=state.y0,
            value=point.value,
            gradient=point.gradient,
            residual=found.residual,
            verdict=found.verdict,
            outer_state=outer_state,
            started=jnp.array(True),
        )
        return state, metrics


# A program of its own, so that it is traced once and not in each branch of a line search
# of optax.
@eqx.filter_jit
def _select(pipeline: _AbstractValueDescent, *args) -> SelectedValue:
    return pipeline.select(*args)


class NullSpaceDescent(_AbstractValueDescent):
    r"""Aims at [`bilevel_eqx.Optimistic`][] by descending
    $\phi(x) = \min_{y \in S(x)} F(x, y)$:

    1. y is projected on $S(x)$, and moved along it, in the null space of H, to where F
       is least: $P F_y = 0$. This is Newton's method with conjugate gradients, and one
       step where $S(x)$ is a plane and F quadratic.
    2. There $\nabla \phi = F_x - B^\top H^+ F_y$, exactly.
    """

    aims_at: ClassVar = (Optimistic,)

    def select(self, problem, equilibrium, x, y, y0):
        del equilibrium, y0
        problem, layout = flat(problem, y)
        anchor = layout.ravel(y)
        implicit = Implicit(self.solver, self.linear_solver)
        y, result, _ = implicit.minimum(problem, x, anchor)
        here, _ = select(
            problem,
            x,
            y,
            lambda y: problem.outer(x, y),
            self.linear_solver,
            self.selection_steps,
        )
        result, inner = implicit.judge(result, anchor, here.y, here.at)
        outer = here.outer()
        value, gradient = outer.value, outer.hypergradient
        result = first_failure(
            result, outer.result, finite_or_not((value, gradient, here.y))
        )
        figures = figures_of(x, {"inner_residual": inner}, value=value, gradient=gradient)
        residual = jnp.hypot(inner, tree_norm(here.project(outer.y)))
        y = layout.unravel(here.y)
        return SelectedValue(y, value, gradient, Verdict(result, figures), residual)


class NullSpaceAscent(_AbstractValueDescent):
    r"""Aims at [`bilevel_eqx.Pessimistic`][] by descending
    $\phi(x) = \max \{F(x, y) : y \in S(x), \|y - c\| \le R\}$:

    1. the centre $c = \Pi(y_0, S(x))$ is found, and y moved along $S(x)$ to where F is
       largest in the ball, by trust-region steps. One step finds the worst point of all
       where $S(x)$ is a plane and F quadratic, and a local one elsewhere.
    2. There, by Danskin's theorem,
       $\nabla \phi = F_x + B^\top \mu + \nu J_c^\top (y - c)$.

    Where two points are equally bad $\phi$ has a kink, and a descent that heeds only one
    of them zigzags. In the quadratic case the kinks are rounded off by a logarithmic
    barrier, far below any tolerance.
    """

    # At a kink the search has to come very close.
    optimiser: optax.GradientTransformation | AbstractDescent = eqx.field(
        default=LBFGS(max_trials=20), converter=as_optimiser
    )

    aims_at: ClassVar = (Pessimistic,)

    def select(self, problem, equilibrium, x, y, y0):
        assert isinstance(equilibrium, Pessimistic)
        if equilibrium.radius is None:
            raise ValueError(
                "`NullSpaceAscent` searches a ball: give `Pessimistic` a radius, or use "
                "`PenaltyAscent` for a set that is known by its projection."
            )
        nearest = MinimumDisplacement(
            self.solver, self.linear_solver, selection_tolerance=None
        )
        center, layout, result, stats, _ = nearest.nearest(problem, x, y0)
        anchor = layout.ravel(y0)
        # On a plane the center knows all of the ball.
        start = center.picture.y if center.picture.is_plane else layout.ravel(y)
        worst = find_worst(
            center.picture.problem,
            x,
            start,
            center,
            equilibrium.radius,
            self.selection_steps,
            rounding=float(jnp.finfo(anchor.dtype).eps) ** 0.8,
        )
        here, value, gradient = worst.picture, worst.value, worst.gradient
        implicit = Implicit(self.solver, self.linear_solver)
        result, _ = implicit.judge(result, anchor, here.y, here.at)
        finite = finite_or_not((value, gradient, here.y))
        figures = figures_of(x, stats, value=value, gradient=gradient)
        verdict = Verdict(first_failure(result, finite), figures)
        y = layout.unravel(here.y)
        return SelectedValue(y, value, gradient, verdict, worst.residual)


NullSpaceDescent.__init__.__doc__ = """**Arguments:**

- `optimiser`: any optax optimiser, or [`bilevel_eqx.pipelines.LBFGS`][], the default;
    it moves x.
- `solver`: an optimistix minimiser that brings y to $S(x)$.
- `linear_solver`: the lineax solver that stands for $H^+$.
- `selection_steps`: the largest number of Newton steps along $S(x)$ in an outer step.
    The search goes on from where it was.
"""


NullSpaceAscent.__init__.__doc__ = """**Arguments:** as for
[`bilevel_eqx.pipelines.NullSpaceDescent`][].
"""
