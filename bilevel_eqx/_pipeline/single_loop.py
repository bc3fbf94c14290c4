"""Single loops: y, its adjoint v and x take a step each, on batches."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PRNGKeyArray, PyTree, Scalar, ScalarLike

from .._arguments import (
    as_count,
    as_pytree,
    as_rate,
    check_count,
    check_positive,
    check_type,
)
from .._depends_on import depends_on
from .._derivatives.first import inner_gradient, outer_gradients
from .._equilibrium.stackelberg import Stackelberg
from .._equilibrium.warm_start import WarmStart
from .._failure.results import (
    figures_of,
    finite_or_not,
    first_failure,
    RESULTS,
    Verdict,
)
from .._linalg.power_iteration import largest_curvature
from .._optimiser.descent import OptaxDescent
from .._optimiser.step import optimiser_step
from .._problem.base import AbstractBilevelProblem
from .._problem.batches import Batches, check_batch_argument
from .._problem.constraints import set_x, set_y
from .._problem.root import check_has_objective
from .._tree import (
    all_finite,
    nonzero,
    tree_axpy,
    tree_cast,
    tree_dot,
    tree_eps,
    tree_norm,
    tree_zeros_like,
)
from .adjoint_growth import AdjointGrowth, no_growth, watched
from .base import AbstractPipeline
from .estimators import AbstractEstimator, MiniBatch
from .noise import after_step, no_noise, Noise, with_noise
from .oracles import LoopPoint, Oracle, terms_of


class SingleLoopState(eqx.Module):
    """All that a run carries from one outer step to the next."""

    x: PyTree[Array]
    y: PyTree[Array]
    v: PyTree[Array]
    inner_state: Any
    adjoint_state: Any
    outer_state: Any
    estimator_state: Any
    growth: AdjointGrowth
    noise: Noise | None
    # Half of one over the largest curvature of f at the start, for default optimisers;
    # `None` if there are none.
    rate: Scalar | None
    count: Int[Array, ""]
    key: PRNGKeyArray

    @property
    def point(self) -> LoopPoint:
        return LoopPoint(self.x, self.y, self.v)


class SingleLoop(AbstractPipeline[SingleLoopState]):
    r"""Moves y, the adjoint v and x by a step each, on a batch of the inner and a batch
    of the outer data:

    $$D_y = f_y, \qquad D_v = f_{yy} v + \epsilon v + F_y, \qquad D_x = f_{xy} v + F_x,$$

    all taken at the old $(x, y, v)$, on the same batches. v follows
    $-(H + \epsilon I)^{-1} F_y$, so that $D_x$ follows the hypergradient. No linear
    system is solved.

    This is a family of methods of the literature:

    - SOBA: three `optax.sgd`;
    - SABA: that with [`bilevel_eqx.pipelines.SAGA`][];
    - SRBA: that with [`bilevel_eqx.pipelines.SARAH`][];
    - MA-SOBA: that with [`bilevel_eqx.pipelines.Momentum`][];
    - AmIGO: `inner_steps=10, adjoint_steps=10`;
    - stocBiO: that with `warm_adjoint=False`. With `optax.sgd(a)` for v its M steps from
        zero are the Neumann series $v = -a \sum_{j < M} \prod (I - a f_{yy}) F_y$ with a
        fresh batch in each factor.

    **More than one step.** If there is more than one step of y or of v, or if the adjoint
    is cold, the three move in turn: y, then v at the new y, then x at both. Each step
    has a fresh inner batch; $F_y$ and $F_x$ are on one outer batch.

    **Damping.** A single loop is a partial warm start, and `damping` is the $\epsilon$ of
    [`bilevel_eqx.WarmStart`][]: on a linear inner problem, from zero and with full
    batches, three gradient descents end at the fixed point of that concept, whatever
    their rates are. If the inner minimum is not unique and there is no damping, v grows
    without bound along the null space of H. x does not notice, until v is so large that
    its product with H is lost in rounding, which is a failure
    (`RESULTS.adjoint_unbounded`). In the history, `adjoint_norm` grows meanwhile, and
    `adjoint_curvature`, $\|f_{yy} v\| / \|v\|$, tends to zero.

    Its problem is a [`bilevel_eqx.AbstractFiniteSumProblem`][], or any other if both
    batches are `None`. If x is confined to a set (`project_x`) each step of x is
    projected on it; y may not be confined.

    The metrics are of the step: $F$ on the batch, and the norms of the directions
    (`inner_residual`, `adjoint_residual`, `outer_residual`). With batches that is a noisy
    measure; a tolerance is for full batches and for estimators whose noise vanishes.
    `outer_noise` is the share of noise in the mean square of the directions of x, over
    about two hundred steps: if it is near one, the steps of x are noise.

    ??? cite "References"

        Dagréou, Ablin, Vaiter and Moreau, *A framework for bilevel optimization that
        enables stochastic and global variance reduction algorithms*, NeurIPS 2022 (SOBA,
        SABA). Dagréou, Moreau, Vaiter and Ablin, *A lower bound and a near-optimal
        algorithm for bilevel empirical risk minimization*, AISTATS 2024 (SRBA). Chen,
        Xiao and Balasubramanian, *Optimal algorithms for stochastic bilevel optimization
        under relaxed smoothness conditions*, 2023 (MA-SOBA). Arbel and Mairal, *Amortized
        implicit differentiation for stochastic bilevel optimization*, ICLR 2022 (AmIGO).
        Ji, Yang and Liang, *Bilevel optimization: convergence analysis and enhanced
        design*, ICML 2021 (stocBiO).
    """

    aims_at: ClassVar = (WarmStart, Stackelberg)
    inner_optimiser: optax.GradientTransformation | None
    adjoint_optimiser: optax.GradientTransformation | None
    outer_optimiser: optax.GradientTransformation | None
    inner_batch: int | None
    outer_batch: int | None
    inner_steps: int
    adjoint_steps: int
    warm_adjoint: bool
    damping: ScalarLike
    estimator: AbstractEstimator

    def __init__(
        self,
        inner_optimiser: optax.GradientTransformation | None = None,
        adjoint_optimiser: optax.GradientTransformation | None = None,
        outer_optimiser: optax.GradientTransformation | None = None,
        *,
        inner_batch: int | None = None,
        outer_batch: int | None = None,
        inner_steps: int = 1,
        adjoint_steps: int = 1,
        warm_adjoint: bool = True,
        damping: ScalarLike = 0.0,
        estimator: AbstractEstimator = MiniBatch(),
    ):
        r"""**Arguments:**

        - `inner_optimiser`, `adjoint_optimiser`, `outer_optimiser`: optax optimisers
            that do not search, schedules included; they move y, v and x. By default
            y and v descend at half of one over the largest curvature of f, estimated on
            the first batch, and x moves by Adam at a rate of 0.01, which decays as
            $1 / \sqrt{1 + k / 100}$ in outer step k. The other two decay as well, unless
            the estimator makes the noise of the batches vanish. A rate of yours will do
            better.
        - `inner_batch`, `outer_batch`: how many samples are drawn; `None`, the default,
            is all. Keyword only arguments.
        - `inner_steps`, `adjoint_steps`: how many steps y and v take in an outer step.
            Keyword only arguments.
        - `warm_adjoint`: whether v goes on from its last value, or starts from zero in
            each outer step, with a new state of its optimiser. Keyword only argument.
        - `damping`: $\epsilon$, at least zero. Keyword only argument.
        - `estimator`: how the directions are estimated:
            [`bilevel_eqx.pipelines.MiniBatch`][], [`bilevel_eqx.pipelines.SAGA`][],
            [`bilevel_eqx.pipelines.SARAH`][] or [`bilevel_eqx.pipelines.Momentum`][].
            Keyword only argument.

        **Raises:**

        A `ValueError` for an estimator that serves only single steps, if there are more.
        When the run begins, a `ValueError` for a problem without samples or with fewer
        than a batch, for one whose y is confined or is a root, for an optimiser with a
        line search, and for tables that do not fit into memory.
        """
        self.inner_optimiser = _converted(inner_optimiser)
        self.adjoint_optimiser = _converted(adjoint_optimiser)
        self.outer_optimiser = _converted(outer_optimiser)
        self.inner_batch = as_count(inner_batch)
        self.outer_batch = as_count(outer_batch)
        self.inner_steps = as_count(inner_steps)
        self.adjoint_steps = as_count(adjoint_steps)
        self.warm_adjoint = warm_adjoint
        self.damping = as_rate(damping)
        self.estimator = estimator

    def __check_init__(self):
        owner, kind = "SingleLoop", optax.GradientTransformation | None
        for name in ("inner_optimiser", "adjoint_optimiser", "outer_optimiser"):
            check_type(getattr(self, name), kind, name, owner)
        check_type(self.estimator, AbstractEstimator, "estimator", owner)
        check_type(self.warm_adjoint, bool, "warm_adjoint", owner)
        check_batch_argument(self.inner_batch, "inner_batch", owner)
        check_batch_argument(self.outer_batch, "outer_batch", owner)
        check_count(self.inner_steps, "inner_steps", owner)
        check_count(self.adjoint_steps, "adjoint_steps", owner)
        check_positive(self.damping, "damping", owner, or_zero=True)
        if self.estimator.at_once and not self._at_once:
            name = type(self.estimator).__name__
            raise ValueError(
                f"`{name}` compares what it computes on one batch at the points of "
                "several outer steps, so it needs one step of y, of v and of x on the "
                f"same batches, but `SingleLoop(inner_steps={self.inner_steps}, "
                f"adjoint_steps={self.adjoint_steps}, warm_adjoint={self.warm_adjoint})` "
                "moves them in turn. Leave these out, or use `MiniBatch` or `Momentum`."
            )

    @property
    def admits_batches(self) -> bool:  # pyright: ignore
        # One batch of each level a step, which no other step needs again.
        return self._at_once and not self.estimator.vanishing_noise

    def init(self, problem, equilibrium, x, y, key):
        del equilibrium
        self._check(problem, x, y, key)
        point = LoopPoint(x, y, tree_zeros_like(y))
        first = jnp.zeros((), jnp.int32)
        oracle = self._oracle(problem, key, first, first)
        rate = None
        if self.inner_optimiser is None or self.adjoint_optimiser is None:
            on_batch = oracle.on_inner_batch()
            curvature = largest_curvature(lambda y: on_batch.inner(x, y), y)
            rate = 0.5 / nonzero(curvature + jnp.asarray(self.damping, curvature.dtype))
        optimisers = self._optimisers(rate)
        states = [
            _checked_start(name, optimiser, at)
            for name, optimiser, at in zip(_NAMES, optimisers, (y, y, x))
        ]
        return SingleLoopState(
            *point,
            *states,
            estimator_state=self.estimator.init(oracle, point),
            growth=no_growth(y),
            noise=no_noise(problem, oracle.batches, x),
            rate=rate,
            count=first,
            key=key,
        )

    def step(self, problem, equilibrium, state):
        del equilibrium
        take = self._all_at_once if self._at_once else self._in_turn
        new, v, directions, terms = take(problem, state)
        product, outer_y = terms.inner.product, terms.outer.y
        growth = watched(state.growth, state.count, v, product, outer_y)
        noise = after_step(state.noise, directions.x)
        new = dataclasses.replace(new, growth=growth, noise=noise, count=state.count + 1)
        remaining = set_x(problem).remaining_step(directions.x, state.x)
        metrics = {
            "value": terms.outer_value,
            "outer_residual": tree_norm(remaining),
            "inner_residual": tree_norm(directions.y),
            "adjoint_residual": tree_norm(directions.v),
            "adjoint_norm": tree_norm(new.v),
            "adjoint_curvature": growth.curvature,
            "result": _verdict(new),
        }
        return new, with_noise(metrics, noise)

    def _all_at_once(self, problem, state: SingleLoopState):
        """All directions are those at the old point, on the same batches."""
        oracle = self._oracle(problem, state.key, state.count, state.count)
        on_batch, point = oracle.on_batch(), state.point
        terms = terms_of(on_batch, point)
        directions, estimator_state = self.estimator(
            oracle, on_batch, point, terms, state.estimator_state
        )
        inner, adjoint, outer = self._optimisers(state.rate)
        value = _adjoint_value(point.v, directions.v, terms.outer.y)
        y, inner_state = _move(
            inner, point.y, state.inner_state, directions.y, terms.inner_value
        )
        v, adjoint_state = _move(
            adjoint, point.v, state.adjoint_state, directions.v, value
        )
        new = dataclasses.replace(
            state,
            y=y,
            v=v,
            inner_state=inner_state,
            adjoint_state=adjoint_state,
            estimator_state=estimator_state,
        )
        new = _with_x_moved(problem, outer, new, directions, terms)
        return new, point.v, directions, terms

    def _in_turn(self, problem, state: SingleLoopState):
        """y, then v, then x, each at what the ones before have come to, and each step
        on an inner batch of its own."""
        inner, adjoint, outer = self._optimisers(state.rate)
        num_batches = self.inner_steps + self.adjoint_steps + 1
        first_batch = state.count * num_batches

        def oracle(offset):
            return self._oracle(problem, state.key, first_batch + offset, state.count)

        def step_y(y, inner_state, i):
            on_batch = oracle(i).on_inner_batch()
            value, slope = jax.value_and_grad(on_batch.inner, argnums=1)(state.x, y)
            return _move(inner, y, inner_state, slope, value)

        y, inner_state = _repeat(step_y, state.y, state.inner_state, self.inner_steps)

        v, adjoint_state = state.v, state.adjoint_state
        if not self.warm_adjoint:
            v = tree_zeros_like(y)
            adjoint_state = adjoint.init(v)
        last = oracle(num_batches - 1)
        last_batch = last.on_batch()
        outer_y = outer_gradients(last_batch, state.x, y)[2]

        def step_v(v, adjoint_state, i):
            on_batch = oracle(self.inner_steps + i).on_inner_batch()
            direction = self._adjoint_direction(on_batch, state.x, y, v, outer_y)
            value = _adjoint_value(v, direction, outer_y)
            return _move(adjoint, v, adjoint_state, direction, value)

        v, adjoint_state = _repeat(step_v, v, adjoint_state, self.adjoint_steps)

        point = LoopPoint(state.x, y, v)
        terms = terms_of(last_batch, point)
        directions, estimator_state = self.estimator(
            last, last_batch, point, terms, state.estimator_state
        )
        new = dataclasses.replace(
            state,
            y=y,
            v=v,
            inner_state=inner_state,
            adjoint_state=adjoint_state,
            estimator_state=estimator_state,
        )
        new = _with_x_moved(problem, outer, new, directions, terms)
        return new, v, directions, terms

    def _adjoint_direction(self, problem, x, y, v, outer_y):
        _, product = jax.jvp(lambda y: inner_gradient(problem, x, y), (y,), (v,))
        return tree_axpy(self.damping, v, tree_axpy(1, product, outer_y))

    @property
    def _at_once(self) -> bool:
        return self.inner_steps == 1 and self.adjoint_steps == 1 and self.warm_adjoint

    def _oracle(self, problem, key, inner_count, outer_count) -> Oracle:
        fixed = self.estimator.fixed_batches
        batches = Batches(self.inner_batch, self.outer_batch, fixed)
        return Oracle(problem, batches, self.damping, key, inner_count, outer_count)

    def _optimisers(self, rate: Scalar | None) -> tuple:
        """Those of y, v and x: the user's, or the default ones."""

        def falling(rate: Any, steps: int) -> Any:
            # In outer steps, of which each has several steps of y or v.
            return lambda count: rate / jnp.sqrt(1 + (count // steps) / 100)

        def decaying(rate: Any, steps: int) -> Any:
            return rate if self.estimator.vanishing_noise else falling(rate, steps)

        inner, adjoint = self.inner_optimiser, self.adjoint_optimiser
        outer = self.outer_optimiser
        if inner is None:
            inner = optax.sgd(decaying(rate, self.inner_steps))
        if adjoint is None:
            adjoint = optax.sgd(decaying(rate, self.adjoint_steps))
        if outer is None:
            # At a constant rate Adam does not come to rest, noise or not.
            outer = optax.adam(falling(0.01, 1))
        return inner, adjoint, outer

    def _check(self, problem: AbstractBilevelProblem, x, y, key) -> None:
        check_has_objective(problem, "`SingleLoop`")
        if set_y(problem).confines:
            raise ValueError(
                "`SingleLoop` is for inner variables without constraints, but this "
                "problem has a `project_y`, and its adjoint would ignore it. Use a "
                "`GradientPipeline` with `Unrolled`, or with "
                "`Implicit(ProjectedGradient(), Pseudoinverse())`."
            )
        batches = Batches(self.inner_batch, self.outer_batch)
        batches.check(problem, "SingleLoop")

        def first_derivatives(x):
            # On a batch: x may be in what is random alone, which rests on all data.
            first = jnp.zeros((), jnp.int32)
            on_batch = batches(problem, key, first, first)
            return on_batch.outer(x, y), inner_gradient(on_batch, x, y)

        reaches = depends_on(first_derivatives, x)
        if not reaches:
            raise ValueError(RESULTS[RESULTS.zero_hypergradient])


_NAMES = ("inner_optimiser", "adjoint_optimiser", "outer_optimiser")


def _checked_start(name: str, optimiser: Any, at: PyTree[Array]) -> Any:
    """The first state of an optimiser, which may not ask for values elsewhere."""
    if OptaxDescent(optimiser).asks_for_values(at):
        raise ValueError(
            f"`SingleLoop({name}=...)` asks for values at other points than the current "
            "one, as a line search does. But here each step has other batches, and v and "
            "x move against directions that are not the gradient of one objective, so "
            "there is nothing to search on. Use an optimiser without a search, such as "
            "`optax.sgd` or `optax.adam`, or a `GradientPipeline`, which may search."
        )
    return optimiser.init(at)


def _converted(optimiser: Any) -> Any:
    is_optax = isinstance(optimiser, optax.GradientTransformation)
    return as_pytree(optimiser) if is_optax else optimiser


def _with_x_moved(
    problem, optimiser, state: SingleLoopState, directions, terms
) -> SingleLoopState:
    """The state after the step of x, which is the last of an outer step."""
    x, outer_state = _move(
        optimiser,
        state.x,
        state.outer_state,
        directions.x,
        terms.outer_value,
        set_x(problem).project,
    )
    return dataclasses.replace(state, x=x, outer_state=outer_state)


def _move(
    optimiser: Any,
    variables: PyTree[Array],
    state: Any,
    direction: PyTree[Array],
    value: Scalar,
    project: Callable[[PyTree], PyTree] = lambda variables: variables,
) -> tuple[PyTree[Array], Any]:
    """A step against a direction. `value` is that of an objective which has it as its
    gradient, for the few optimisers that look at it."""
    variables, new = optimiser_step(
        optimiser,
        variables,
        state,
        value=value,
        gradient=direction,
        value_fn=_no_values,
        project=project,
    )
    # A rate in float64 must not make a state in float32 one of float64.
    arrays, rest = eqx.partition(new, eqx.is_array)
    arrays = tree_cast(arrays, eqx.filter(state, eqx.is_array))
    return variables, eqx.combine(arrays, rest)


def _no_values(variables: PyTree[Array]) -> Scalar:
    raise AssertionError("An optimiser that asks for values is refused at the start.")


def _repeat(step: Callable, variables: PyTree[Array], state: Any, num_steps: int):
    """`num_steps` of `variables, state = step(variables, state, i)`."""
    arrays, rest = eqx.partition(state, eqx.is_array)

    def body(carry, i):
        variables, state = step(carry[0], eqx.combine(carry[1], rest), i)
        return (variables, eqx.filter(state, eqx.is_array)), None

    counts = jnp.arange(num_steps, dtype=jnp.int32)
    (variables, arrays), _ = jax.lax.scan(body, (variables, arrays), counts)
    return variables, eqx.combine(arrays, rest)


def _adjoint_value(v, direction, outer_y) -> Scalar:
    r"""$\frac12 \langle v, (H + \epsilon I) v \rangle + \langle F_y, v \rangle$."""
    return tree_dot(v, tree_axpy(1, outer_y, direction)) / 2


def _verdict(state: SingleLoopState) -> Verdict:
    """A failure of v is told apart from one of x and y."""
    result = state.growth.verdict(tree_eps(state.v))
    result = RESULTS.where(all_finite(state.v), result, RESULTS.adjoint_diverged)
    # Which may be the reason of that one.
    result = first_failure(finite_or_not((state.x, state.y)), result)
    return Verdict(result, figures_of(state.x, {}))
