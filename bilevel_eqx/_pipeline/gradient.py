"""Descent along a hypergradient: cold and warm start, Algorithms 1 and 3."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PRNGKeyArray, PyTree, Scalar

from .._arguments import as_pytree, check_type
from .._derivatives.first import inner_gradient
from .._failure.results import figures_of, first_failure, RESULTS, Verdict, verdict_where
from .._hypergradient import hypergradient_and_state, reaches_outer
from .._optimiser.step import first_order, optimiser_step
from .._problem.constraints import projection_x, projection_y, step_left
from .._response.base import AbstractResponse
from .._response.implicit import Implicit
from .._response.unrolled import Unrolled
from .._tree import tree_cast, tree_norm
from .base import AbstractPipeline


class GradientState(eqx.Module):
    """All that a run carries from one outer step to the next."""

    x: PyTree[Array]
    y: PyTree[Array]
    y0: PyTree[Array]
    # Where the last hypergradient was taken from: a line search must ask there too.
    anchor: PyTree[Array]
    value: Scalar
    gradient: PyTree[Array]
    verdict: Verdict
    outer_state: Any
    inner_state: Any
    key: PRNGKeyArray
    num_steps: Int[Array, ""]


# A program of its own, so that it is traced once and not wherever it is asked for: in
# each branch of a line search, for one.
_respond = eqx.filter_jit(hypergradient_and_state)


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
    descent, with momentum or without, is made for that, and so is
    [`bilevel_eqx.spectral_projected_gradient`][]. Optimisers that scale or turn the
    gradient, such as Adam or L-BFGS, come to rest elsewhere unless the set is a box, and
    L-BFGS even then; the certificate shows it.

    Where the inner update unrolls, its optimiser's state is carried along with y, and a
    response that unrolls the same optimiser looks ahead from that state.
    """

    response: AbstractResponse
    optimiser: optax.GradientTransformation = eqx.field(converter=as_pytree)
    inner_update: AbstractResponse | None = None

    def __check_init__(self):
        owner = "GradientPipeline"
        check_type(self.response, AbstractResponse, "response", owner)
        check_type(self.optimiser, optax.GradientTransformation, "optimiser", owner)
        check_type(self.inner_update, AbstractResponse | None, "inner_update", owner)

    def init(self, problem, equilibrium, x, y, key):
        mover = self.response if self.inner_update is None else self.inner_update
        state = GradientState(
            x=x,
            y=y,
            y0=y,
            anchor=y,
            value=jnp.zeros(()),
            gradient=x,
            verdict=Verdict(RESULTS.successful, figures_of(x, {})),
            outer_state=self.optimiser.init(x),
            inner_state=mover.init(problem, x, y) if equilibrium.warm else None,
            key=key,
            num_steps=jnp.array(0),
        )
        state = self._respond(problem, equilibrium, state)
        if not reaches_outer(problem, x, y, self.response):
            result = first_failure(state.verdict.result, RESULTS.zero_hypergradient)
            state = eqx.tree_at(lambda s: s.verdict.result, state, result)
        return state

    def step(self, problem, equilibrium, state):
        def value_fn(x):
            # For optimisers with a line search. The others never ask. The derivative is
            # the hypergradient, whatever approximation that is.
            # A rate in float64 does not make float32 variables float64.
            fixed = tree_cast(jax.lax.stop_gradient(x), state.x)
            at, _ = _respond(problem, fixed, state.anchor, self.response)
            return first_order(at.value, at.gradient, x, fixed)

        x, outer_state = optimiser_step(
            self.optimiser,
            state.x,
            state.outer_state,
            value=state.value,
            gradient=state.gradient,
            value_fn=value_fn,
            project=projection_x(problem),
        )
        state = eqx.tree_at(
            lambda s: (s.x, s.outer_state, s.num_steps),
            state,
            (x, outer_state, state.num_steps + 1),
        )
        if self.inner_update is not None:
            anchor = state.y if equilibrium.warm else state.y0
            answer = self.inner_update(problem, x, anchor, state.inner_state)
            inner_state = answer.state if equilibrium.warm else None
            verdict = Verdict(answer.result, figures_of(x, answer.stats))
            verdict = verdict_where(state.verdict.failed, state.verdict, verdict)
            state = eqx.tree_at(
                lambda s: (s.y, s.inner_state, s.verdict),
                state,
                (answer.y, inner_state, verdict),
                is_leaf=lambda leaf: leaf is None,
            )
        state = self._respond(problem, equilibrium, state)
        metrics = {
            "value": state.value,
            "outer_residual": tree_norm(
                step_left(state.gradient, state.x, projection_x(problem))
            ),
            "inner_residual": self._inner_residual(problem, equilibrium, state),
            "result": state.verdict,
        }
        return state, metrics

    def _respond(self, problem, equilibrium, state: GradientState) -> GradientState:
        """The hypergradient at x and, without an inner update, the move of y."""
        anchor = state.y if equilibrium.warm else state.y0
        carried = state.inner_state
        if self.inner_update is not None and not _same_optimiser(
            self.inner_update, self.response
        ):
            carried = None
        out, inner_state = _respond(problem, state.x, anchor, self.response, carried)
        parts = {"value": out.value, "gradient": out.gradient}
        verdict = Verdict(out.result, figures_of(state.x, out.stats, **parts))
        y = out.y
        if self.inner_update is not None:
            y, inner_state = state.y, state.inner_state
        elif not equilibrium.warm:
            inner_state = None
        return GradientState(
            x=state.x,
            y=y,
            y0=state.y0,
            anchor=anchor,
            value=out.value,
            gradient=out.gradient,
            verdict=verdict_where(state.verdict.failed, state.verdict, verdict),
            outer_state=state.outer_state,
            inner_state=inner_state,
            key=state.key,
            num_steps=state.num_steps,
        )

    def _inner_residual(self, problem, equilibrium, state):
        """Zero iff y stands still, given that x does."""
        lags = equilibrium.warm or self.inner_update is not None
        if not lags and not isinstance(self.response, Implicit):
            # y is a function of x, computed anew each time: it cannot lag behind, and
            # what an unrolled response leaves undone is not for it to do.
            return jnp.zeros_like(state.value)
        slope = inner_gradient(problem, state.x, state.y)
        return tree_norm(step_left(slope, state.y, projection_y(problem)))


GradientPipeline.__init__.__doc__ = """**Arguments:**

- `response`: through which the hypergradient is taken.
- `optimiser`: any optax optimiser; it moves x. Those with a line search are given the
    outer objective through the response.
- `inner_update`: a response that moves y, where that is not `response` itself.
"""


def _same_optimiser(inner_update: AbstractResponse, response: AbstractResponse) -> bool:
    if not (isinstance(inner_update, Unrolled) and isinstance(response, Unrolled)):
        return False
    return eqx.tree_equal(inner_update.optimiser, response.optimiser) is True
