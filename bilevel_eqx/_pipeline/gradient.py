"""Descent along a hypergradient: cold and warm start, Algorithms 1 and 3."""

import functools as ft
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jaxtyping import Array, Bool, Int, PRNGKeyArray, PyTree, Scalar

from .._arguments import as_count, check_type
from .._derivatives.first import inner_gradient
from .._failure.results import (
    figures_of,
    is_failure,
    no_figures,
    RESULTS,
    Verdict,
    verdict_where,
)
from .._hypergradient import answered, Hypergradient, reaches_outer
from .._optimiser.descent import (
    AbstractDescent,
    advance,
    as_descent,
    as_optimiser,
    OptaxDescent,
    Point,
)
from .._optimiser.step import first_order, searches
from .._problem.batches import Batches, check_batch_argument
from .._problem.constraints import set_x, set_y
from .._problem.finite_sum import OnBatches
from .._response.base import AbstractResponse
from .._tree import tree_cast, tree_norm, tree_where, tree_zeros_like, where
from .base import AbstractPipeline
from .noise import after_step, no_noise, Noise, with_noise


# A program of its own, so that it is traced once and not in each branch of a line search
# of optax.
_respond = eqx.filter_jit(answered)


class GradientState(eqx.Module):
    """All that a run carries from one outer step to the next."""

    x: PyTree[Array]
    y: PyTree[Array]
    y0: PyTree[Array]
    # Where the last hypergradient was taken from: a line search must ask there too.
    # `None` if there is none.
    anchor: PyTree[Array] | None
    value: Scalar
    gradient: PyTree[Array]
    verdict: Verdict
    outer_state: Any
    inner_state: Any
    # What the response carries of its own, where an inner update moves y.
    guess: Any
    # For the batches, and for subclasses that draw random numbers.
    key: PRNGKeyArray
    # Of the batches drawn so far; `None` if all data are used.
    count: Int[Array, ""] | None
    # Of the hypergradients on them; `None` if all data are used.
    noise: Noise | None
    # Whether x has been answered: the first step only does that.
    started: Bool[Array, ""]


class _Answer(NamedTuple):
    """What an evaluation finds beyond the value and the gradient."""

    y: PyTree[Array]
    inner_state: Any
    guess: Any
    verdict: Verdict
    # The inner gradient where the last inner step began, if it is at hand.
    slope: Scalar | None


class GradientPipeline(AbstractPipeline[GradientState]):
    r"""Moves x along the hypergradient of a response, and lets y answer:

    1. $x \leftarrow x - \alpha\, (F_x + J^\top F_y)$, or what the optimiser makes of it;
    2. $y \leftarrow$ the inner update's answer to the new x, if there is an inner update;
    3. the response answers x: this yields the next hypergradient and, if there is no
       inner_update, y.

    Both start from the last y under a warm start, and from $y_0$ under a cold one.

    The paper's algorithms are settings of this:

    - Algorithm 1, which looks ahead by K steps and moves by one:
        `GradientPipeline(Unrolled(optax.sgd(eta), K), optax.sgd(alpha),
        inner_update=Unrolled(optax.sgd(eta), 1))` with [`bilevel_eqx.WarmStart`][];
    - Algorithm 3: `GradientPipeline(Proximal(epsilon, ...), optax.sgd(alpha))` with
        [`bilevel_eqx.WarmStart`][];
    - cold start: `GradientPipeline(Implicit(...), optax.sgd(alpha))` with
        [`bilevel_eqx.ColdStart`][].

    Where x is confined to a set (`project_x`) each step is projected on it. Gradient
    descent, with momentum or without, is made for that, and so are
    [`bilevel_eqx.pipelines.ProjectedQuasiNewton`][] and
    [`bilevel_eqx.pipelines.SpectralProjectedGradient`][]. Optimisers that scale or turn
    the gradient, such as Adam or L-BFGS, come to rest elsewhere unless the set is a box,
    and L-BFGS even then; the certificate shows it.

    Where the inner update unrolls, its optimiser's state is carried along with y, and a
    response that unrolls the same optimiser looks ahead from that state. So is the
    adjoint of a response that carries it (`carry_adjoint`).

    With batches, each outer step is on fresh ones: one of each level, with one key each
    for what is random in the losses, for all that the step computes. Where the response
    unrolls and each of its inner steps should have a batch of its own, give the response
    a `batch_size`, and the pipeline only an `outer_batch`.
    """

    admits_batches: ClassVar[bool] = True
    response: AbstractResponse
    optimiser: optax.GradientTransformation | AbstractDescent = eqx.field(
        converter=as_optimiser
    )
    inner_update: AbstractResponse | None = None
    inner_batch: int | None = eqx.field(default=None, converter=as_count, kw_only=True)
    outer_batch: int | None = eqx.field(default=None, converter=as_count, kw_only=True)

    def __check_init__(self):
        owner = "GradientPipeline"
        kinds = optax.GradientTransformation | AbstractDescent
        check_type(self.response, AbstractResponse, "response", owner)
        check_type(self.optimiser, kinds, "optimiser", owner)
        check_type(self.inner_update, AbstractResponse | None, "inner_update", owner)
        for name in ("inner_batch", "outer_batch"):
            check_batch_argument(getattr(self, name), name, owner)

    @property
    def _batches(self) -> Batches:
        return Batches(self.inner_batch, self.outer_batch)

    @property
    def _is_sampled(self) -> bool:
        return self.inner_batch is not None or self.outer_batch is not None

    def init(self, problem, equilibrium, x, y, key):
        self._batches.check(problem, "GradientPipeline")
        if self._is_sampled or isinstance(problem, OnBatches):
            _check_compares_nothing(as_descent(self.optimiser), x)
        mover = self._mover
        result = RESULTS.successful
        # On a batch: x may be in what is random alone, which rests on all data.
        first = jnp.array(0)
        on_batch = self._batches(problem, key, first, first)
        if not reaches_outer(on_batch, x, y, self.response):
            result = RESULTS.zero_hypergradient
        value = jax.eval_shape(problem.outer, x, y)
        return GradientState(
            x=x,
            y=y,
            y0=y,
            anchor=y if self._asks_again(equilibrium, x) else None,
            value=jnp.zeros((), value.dtype),
            gradient=tree_zeros_like(x),
            verdict=Verdict(result, no_figures(x)),
            outer_state=as_descent(self.optimiser).init(x),
            inner_state=mover.init(problem, x, y) if self._carries(equilibrium) else None,
            guess=self.response.init(problem, x, y) if self._has_guess else None,
            key=key,
            count=jnp.array(0) if self._is_sampled else None,
            noise=no_noise(problem, self._batches, x),
            started=jnp.array(False),
        )

    def step(self, problem, equilibrium, state):
        if state.count is not None:
            problem = self._batches(problem, state.key, state.count, state.count)
        descent = as_descent(self.optimiser)
        one_way = self._is_one_way(equilibrium)

        def value_fn(x):
            # For optax optimisers with a line search. The others never ask. The
            # derivative is the hypergradient, whatever approximation that is.
            # A rate in float64 does not make float32 variables float64.
            fixed = tree_cast(jax.lax.stop_gradient(x), state.x)
            at, *_ = _respond(problem, fixed, state.anchor, self.response)
            # A search comes back from where the inner or the linear solve fails.
            failed = is_failure(at.result)
            return first_order(where(failed, jnp.inf, at.value), at.gradient, x, fixed)

        def search(x):
            at, *_ = answered(problem, x, state.anchor, self.response)
            kept = state.y, state.inner_state, state.guess
            return _point(x, at, state.verdict, kept, None)

        def answer(x):
            return self._answer(problem, equilibrium, state, x)

        base = Point(
            state.x,
            state.value,
            state.gradient,
            state.verdict.failed,
            _Answer(state.y, state.inner_state, state.guess, state.verdict, None),
        )
        moving = ft.partial(
            advance,
            descent,
            state.outer_state,
            base,
            project=set_x(problem).project,
            value_fn=value_fn,
            started=state.started,
        )
        if one_way:
            outer_state, point = moving(evaluate=answer)
        else:
            outer_state, point = moving(evaluate=search)
            point = answer(point.x)
        found: _Answer = point.answer
        anchor = state.y if equilibrium.warm else state.y0
        if self.inner_update is not None and equilibrium.warm:
            anchor = found.y
        state = GradientState(
            x=point.x,
            y=found.y,
            y0=state.y0,
            anchor=None if state.anchor is None else anchor,
            value=point.value,
            gradient=point.gradient,
            verdict=found.verdict,
            outer_state=outer_state,
            inner_state=found.inner_state,
            guess=found.guess,
            key=state.key,
            count=None if state.count is None else state.count + 1,
            noise=after_step(state.noise, point.gradient),
            started=jnp.array(True),
        )
        left = set_x(problem).remaining_step(state.gradient, state.x)
        metrics = {
            "value": state.value,
            "outer_residual": tree_norm(left),
            "inner_residual": self._inner_residual(
                problem, equilibrium, state, found.slope
            ),
            "result": state.verdict,
        }
        return state, with_noise(metrics, state.noise)

    def trail(self, problem, equilibrium, state):
        """Where all data are used: batches go to and fro in any case."""
        if state.count is not None:
            return None
        own = state.inner_state if self._looks_ahead else state.guess
        return self.response.trail(problem, state.x, state.y, own)

    @property
    def _looks_ahead(self) -> bool:
        """Whether the response goes on from the state of what moves y."""
        update = self.inner_update
        return update is None or _same_optimiser(update, self.response)

    @property
    def _mover(self) -> AbstractResponse:
        """What moves y."""
        return self.response if self.inner_update is None else self.inner_update

    def _is_one_way(self, equilibrium) -> bool:
        """Whether each x that is evaluated is answered at once. A search must begin from
        where the answer will: then the point accepted is the answer."""
        stays = not equilibrium.warm or self.response.answers_itself
        searches = as_descent(self.optimiser).searches
        return not searches or (stays and self.inner_update is None)

    def _asks_again(self, equilibrium, x) -> bool:
        """Whether x is evaluated where y was before."""
        descent = as_descent(self.optimiser)
        return not self._is_one_way(equilibrium) or descent.asks_for_values(x)

    def _carries(self, equilibrium) -> bool:
        """Whether the state of what moves y is carried to the next step."""
        return equilibrium.warm or self._mover.state_is_guess

    @property
    def _has_guess(self) -> bool:
        return self.inner_update is not None and self.response.state_is_guess

    def _answer(self, problem, equilibrium, state: GradientState, x) -> Point:
        """y moves, and the response answers x."""
        verdict, y, carried = state.verdict, state.y, state.inner_state
        slope = None
        if self.inner_update is not None:
            y, carried, verdict, slope = self._updated(problem, equilibrium, state, x)
        anchor = y if equilibrium.warm else state.y0
        own = carried if self._looks_ahead else state.guess
        out, inner_state, own_slope = answered(problem, x, anchor, self.response, own)
        guess = inner_state if self._has_guess else None
        if self.inner_update is None:
            slope, y = own_slope, out.y
            carried = inner_state if self._carries(equilibrium) else None
        if as_descent(self.optimiser).searches:
            # A search is costly in any case, and the loop of one need not carry it.
            slope = None
        return _point(x, out, verdict, (y, carried, guess), slope)

    def _updated(self, problem, equilibrium, state: GradientState, x):
        """The inner update, which the first answer goes without."""
        assert self.inner_update is not None
        anchor = state.y if equilibrium.warm else state.y0
        answer = self.inner_update.answer(problem, x, anchor, state.inner_state)
        inner_state = answer.state if self._carries(equilibrium) else None
        verdict = Verdict(answer.result, figures_of(x, answer.stats))
        verdict = verdict_where(state.verdict.failed, state.verdict, verdict)
        updated = answer.y, inner_state, verdict
        before = state.y, state.inner_state, state.verdict
        return *tree_where(state.started, updated, before), answer.slope

    def _inner_residual(self, problem, equilibrium, state, slope):
        """Zero iff y stands still, given that x does."""
        lags = equilibrium.warm or self.inner_update is not None
        if not lags and not self.response.solves:
            # y is a function of x, computed anew each time: it cannot lag behind, and
            # what an unrolled response leaves undone is not for it to do.
            return jnp.zeros_like(state.value)
        if slope is not None:
            return slope
        slope = inner_gradient(problem, state.x, state.y)
        return tree_norm(set_y(problem).remaining_step(slope, state.y))


GradientPipeline.__init__.__doc__ = """**Arguments:**

- `response`: through which the hypergradient is taken.
- `optimiser`: any optax optimiser, or [`bilevel_eqx.pipelines.LBFGS`][]; it moves x.
    Optimisers of optax with a line search are given the outer objective through the
    response.
- `inner_update`: a response that moves y, where that is not `response` itself.
- `inner_batch`, `outer_batch`: the numbers of samples in the batches of an outer step,
    for an [`bilevel_eqx.AbstractFiniteSumProblem`][]; `None`, the default, takes all
    data. Optimisers that compare values or gradients of several points are refused with
    them. Keyword only arguments.
"""


def _check_compares_nothing(descent: AbstractDescent, x) -> None:
    """Refuses, for batches, what compares values or gradients of several points."""
    state = descent.init(x)
    if isinstance(descent, OptaxDescent):
        searches_itself = searches(descent.optimiser, x, state)
        compares = descent.asks_for_values(x) or searches_itself or _is_lbfgs(state)
    else:
        compares = descent.searches
    if compares:
        raise ValueError(
            "`GradientPipeline` cannot have this optimiser with mini-batches: L-BFGS and "
            "line searches compare values or gradients at several points, and with "
            "another batch at each point they would compare the batches. Use "
            "`optax.adam`, or `optax.sgd` with a rate that falls, or leave the batches "
            "out."
        )


def _is_lbfgs(state: Any) -> bool:
    """Whether an optimiser of optax keeps differences of gradients."""

    def keeps(part):
        return isinstance(part, optax.ScaleByLBFGSState)

    return any(map(keeps, jtu.tree_leaves(state, is_leaf=keeps)))


def _same_optimiser(inner_update: AbstractResponse, response: AbstractResponse) -> bool:
    """Whether the response can look ahead from the optimiser state of the update."""
    own = response.inner_optimiser
    return own is not None and eqx.tree_equal(inner_update.inner_optimiser, own) is True


def _point(
    x, out: Hypergradient, before: Verdict, kept: tuple[Any, Any, Any], slope
) -> Point:
    """An evaluated point. The first failure of a run is the one that counts."""
    parts = {"value": out.value, "gradient": out.gradient}
    verdict = Verdict(out.result, figures_of(x, out.stats, **parts))
    failed = verdict.failed
    verdict = verdict_where(before.failed, before, verdict)
    return Point(x, out.value, out.gradient, failed, _Answer(*kept, verdict, slope))
