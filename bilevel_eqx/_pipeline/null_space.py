"""Descent along the best, or the worst, value of the inner minima."""

import abc
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import optax
import optimistix as optx
from jaxtyping import Array, Int, PyTree, Scalar

from .._arguments import as_pytree, check_count, check_type
from .._derivatives.first import outer_gradients
from .._derivatives.second import cross_derivative_operator
from .._equilibrium.base import AbstractEquilibrium
from .._equilibrium.optimistic import Optimistic
from .._equilibrium.pessimistic import Pessimistic
from .._failure.results import (
    figures_of,
    finite_or_not,
    first_failure,
    Verdict,
    verdict_where,
)
from .._inner_solver.projection import Projection
from .._linear_solver.pseudoinverse import Pseudoinverse
from .._optimiser.step import first_order, optimiser_step
from .._problem.base import AbstractBilevelProblem
from .._problem.constraints import projection_x, step_left
from .._response.implicit import Implicit
from .._response.minimum_displacement import MinimumDisplacement
from .._solution_set.search import select
from .._solution_set.tangent import SolutionSet
from .._solution_set.worst_in_ball import find_worst
from .._tree import tree_cast, tree_dtype, tree_norm, tree_sub
from .base import AbstractPipeline


class SelectedValue(eqx.Module):
    r"""The value $\phi(x)$ of the inner minimum selected at x, and its derivative."""

    y: PyTree[Array]
    value: Scalar
    gradient: PyTree[Array]
    verdict: Verdict
    # Zero iff y is an inner minimum, and the one that was to be selected.
    residual: Scalar


class NullSpaceState(eqx.Module):
    """All that a run carries from one outer step to the next."""

    x: PyTree[Array]
    y: PyTree[Array]
    y0: PyTree[Array]
    # Where the selection began: a line search must begin there too.
    anchor: PyTree[Array]
    selected: SelectedValue
    outer_state: Any
    num_steps: Int[Array, ""]


class _AbstractValueDescent(AbstractPipeline[NullSpaceState]):
    r"""$x \leftarrow x - \alpha \nabla \phi(x)$, for the value $\phi$ of a selection."""

    optimiser: optax.GradientTransformation = eqx.field(
        default=optax.lbfgs(), converter=as_pytree
    )
    solver: optx.AbstractMinimiser = Projection()
    linear_solver: lx.AbstractLinearSolver = Pseudoinverse()
    selection_steps: int = 10

    def __check_init__(self):
        owner = type(self).__name__
        check_type(self.optimiser, optax.GradientTransformation, "optimiser", owner)
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
        selected = _select(self, problem, equilibrium, x, y, y)
        outer_state = self.optimiser.init(x)
        zero = jnp.array(0)
        return NullSpaceState(x, selected.y, y, y, selected, outer_state, zero)

    def step(self, problem, equilibrium, state):
        def value_fn(x):
            # For line searches. By the envelope theorem the derivative is known, and
            # need not be had by differentiating the search.
            fixed = tree_cast(jax.lax.stop_gradient(x), state.x)
            at = _select(self, problem, equilibrium, fixed, state.anchor, state.y0)
            return first_order(at.value, at.gradient, x, fixed)

        x, outer_state = optimiser_step(
            self.optimiser,
            state.x,
            state.outer_state,
            value=state.selected.value,
            gradient=state.selected.gradient,
            value_fn=value_fn,
            project=projection_x(problem),
        )
        selected = _select(self, problem, equilibrium, x, state.y, state.y0)
        before = state.selected.verdict
        metrics = {
            "value": selected.value,
            "outer_residual": tree_norm(
                step_left(selected.gradient, x, projection_x(problem))
            ),
            "inner_residual": selected.residual,
            "result": verdict_where(before.failed, before, selected.verdict),
        }
        num_steps = state.num_steps + 1
        state = NullSpaceState(
            x, selected.y, state.y0, state.y, selected, outer_state, num_steps
        )
        return state, metrics


# A program of its own, so that it is traced once and not wherever it is asked for: in
# each branch of a line search, for one.
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
        anchor = y
        implicit = Implicit(self.solver, self.linear_solver)
        y, result, _ = implicit.minimum(problem, x, anchor)
        y, _ = select(
            problem,
            x,
            y,
            lambda y: problem.outer(x, y),
            self.linear_solver,
            self.selection_steps,
        )
        S = SolutionSet(problem, x, y, self.linear_solver)
        result = implicit.judge(result, anchor, y, S.gradient, S.hessian)
        value, outer_x, outer_y = outer_gradients(problem, x, y)
        q, q_result = S.solve(outer_y)
        gradient = tree_sub(outer_x, cross_derivative_operator(problem, x, y).T.mv(q))
        result = first_failure(result, q_result, finite_or_not((value, gradient, y)))
        inner = tree_norm(S.gradient)
        stats = {"inner_residual": inner}
        figures = figures_of(x, stats, value=value, gradient=gradient)
        residual = jnp.hypot(inner, tree_norm(S.project(outer_y)))
        return SelectedValue(y, value, gradient, Verdict(result, figures), residual)


class NullSpaceAscent(_AbstractValueDescent):
    r"""Aims at [`bilevel_eqx.Pessimistic`][] by descending
    $\phi(x) = \max \{F(x, y) : y \in S(x), \|y - c\| \le R\}$:

    1. the center $c = \Pi(y_0, S(x))$ is found, and y moved along $S(x)$ to where F is
       largest in the ball, by trust-region steps. One step finds the worst point of all
       where $S(x)$ is a plane and F quadratic, and a local one elsewhere.
    2. There, by Danskin's theorem,
       $\nabla \phi = F_x + B^\top \mu + \nu J_c^\top (y - c)$.

    Where two points are equally bad $\phi$ has a kink, and a descent that heeds only one
    of them zigzags. In the quadratic case the kinks are rounded off by a logarithmic
    barrier, far below any tolerance.
    """

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
        center, result, stats = nearest.nearest(problem, x, y0)
        rounding = float(jnp.finfo(tree_dtype(y)).eps) ** 0.8
        worst = find_worst(
            problem,
            x,
            y,
            center,
            equilibrium.radius,
            self.selection_steps,
            rounding,
        )
        finite = finite_or_not((worst.value, worst.gradient, worst.y))
        value, gradient = worst.value, worst.gradient
        figures = figures_of(x, stats, value=value, gradient=gradient)
        verdict = Verdict(first_failure(result, finite), figures)
        return SelectedValue(worst.y, value, gradient, verdict, worst.residual)


NullSpaceDescent.__init__.__doc__ = """**Arguments:**

- `optimiser`: any optax optimiser; it moves x. L-BFGS by default.
- `solver`: an optimistix minimiser that brings y to $S(x)$.
- `linear_solver`: the lineax solver that stands for $H^+$.
- `selection_steps`: the largest number of Newton steps along $S(x)$ in an outer step.
    The search goes on from where it was.
"""


NullSpaceAscent.__init__.__doc__ = """**Arguments:** as for
[`bilevel_eqx.NullSpaceDescent`][].
"""
