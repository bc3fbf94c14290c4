"""Differentiation through unrolled optimisation."""

import math
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import lineax as lx
import optax
from jaxtyping import Array, Int, PRNGKeyArray

from .._arguments import as_pytree, check_count, check_type
from .._compat import checkpointed_while_loop, is_traced
from .._depends_on import depends_on
from .._derivatives.first import inner_gradient
from .._failure.results import RESULTS
from .._optimiser.step import optimiser_step, searches
from .._problem.batches import check_batch_argument, on_inner_batch
from .._problem.constraints import set_y
from .._problem.root import AbstractRootProblem
from .._tree import Layout, tree_dtype, tree_norm, tree_struct
from .base import AbstractResponse, Response, TransposedJacobian


class _SampledState(eqx.Module):
    """What a warm start carries if each step has a batch."""

    optimiser: Any
    key: PRNGKeyArray
    # Of the batches drawn so far.
    count: Int[Array, ""]


class Unrolled(AbstractResponse):
    r"""Takes $K$ steps of an optimiser on the inner objective from the anchor, and
    differentiates through them:

    $$y = \Phi_K(a, x), \qquad \frac{\partial y}{\partial x} =
    \frac{\partial \Phi_K(a, x)}{\partial x}.$$

    The derivative includes the state of the optimiser (momentum, second moments, the
    count of a schedule). A warm start carries that state from one outer step to the next;
    a cold start initialises it again.

    If y is confined to a set (`project_y`), each step is projected on it.

    $y$ need not be a minimum. With gradient descent on a fixed quadratic, $K$ steps have
    the Jacobian of exactly $K$ Neumann terms.

    If y is a root ([`bilevel_eqx.AbstractRootProblem`][]), $r$ takes the place of
    $\nabla_y f$. For a fixed point, `Unrolled(optax.sgd(1.0), num_steps)` takes
    fixed-point steps, $y \leftarrow \varphi(x, y)$, and a smaller rate damps them. An
    optimiser with a line search needs an objective, and is refused.

    With a `batch_size`, each step is on a fresh mini-batch of the inner data of an
    [`bilevel_eqx.AbstractFiniteSumProblem`][], with a fresh key for what is random in its
    losses. The derivative is that of these very steps. A warm start goes on with the next
    batches. A cold start has the same ones each time, so that y is a function of x.

    The outer variables may be what the optimiser is made of, such as the rate of each
    step: pass a function from x to an optimiser.

    !!! Example

        ```python
        def with_rates(x):  # x is an array of K rates
            return optax.sgd(lambda count: x[count])

        response = blx.Unrolled(with_rates, K)
        ```

    ??? cite "References"

        Domke, *Generic methods for optimization-based modeling*, 2012. Maclaurin,
        Duvenaud and Adams, *Gradient-based hyperparameter optimization through reversible
        learning*, 2015. Franceschi, Donini, Frasconi and Pontil, *Forward and reverse
        gradient-based hyperparameter optimization*, 2017. The paper's Algorithm 2.
    """

    optimiser: optax.GradientTransformation | Callable = eqx.field(converter=as_pytree)
    num_steps: int
    mode: Literal["checkpointed", "reverse", "forward"] = "checkpointed"
    batch_size: int | None = eqx.field(default=None, kw_only=True, static=True)
    key: PRNGKeyArray | None = eqx.field(default=None, kw_only=True)

    def __check_init__(self):
        if not callable(self.optimiser):
            kind = optax.GradientTransformation
            check_type(self.optimiser, kind, "optimiser", "Unrolled")
        check_count(self.num_steps, "num_steps", "Unrolled")
        modes = ("checkpointed", "reverse", "forward")
        if self.mode not in modes:
            raise ValueError(
                f"`Unrolled(mode=...)` must be one of {modes}; it is {self.mode!r}."
            )
        check_batch_argument(self.batch_size, "batch_size", "Unrolled")
        if self.key is not None and self.batch_size is None:
            raise ValueError(
                "`Unrolled(key=...)` is for the batches, and there are none: where all "
                "data are used, nothing is random. Give it a `batch_size`."
            )

    @property
    def inner_optimiser(self):
        # What is carried has another form if there are batches. It brings its key along.
        return self.optimiser, self.batch_size

    def init(self, problem, x, anchor):
        state = self._optimiser(x).init(anchor)
        if self.batch_size is None:
            return state
        key = jr.key(0) if self.key is None else self.key
        return _SampledState(state, key, jnp.array(0))

    def __call__(self, problem, x, anchor, state=None):
        def unroll(x, mode=self.mode):
            y, *kept = self._unroll(problem, x, anchor, state, mode)
            return y, kept

        return differentiated(unroll, x, self.mode, isinstance(self.num_steps, int))

    def best_response(self, problem, x, anchor):
        return self._unroll(problem, x, anchor, None, self.mode)[0], RESULTS.successful

    def reaches(self, problem, x, anchor):
        if callable(self.optimiser):
            return depends_on(
                lambda x: self._unroll(problem, x, anchor, None, "forward")[0], x
            )

        def gradient(x):
            if self.batch_size is None:
                return inner_gradient(problem, x, anchor)
            # x may be in what is random alone, which rests where all data are used.
            key, count = jr.key(0), jnp.array(0)
            on = on_inner_batch(problem, self.batch_size, key, count, "Unrolled")
            return inner_gradient(on, x, anchor)

        return depends_on(gradient, x)

    def _optimiser(self, x) -> Any:
        if not callable(self.optimiser):
            return self.optimiser
        optimiser = self.optimiser(x)
        name = "optimiser(x)"
        check_type(optimiser, optax.GradientTransformation, name, "Unrolled")
        return optimiser

    def _unroll(self, problem, x, anchor, state, mode):
        if state is None:
            state = self.init(problem, x, anchor)
        optimiser, sampled = self._optimiser(x), None
        if self.batch_size is not None:
            state, sampled = state.optimiser, state
        if searches(optimiser, anchor, state):
            raise ValueError(
                "`Unrolled` cannot differentiate this optimiser: it has a line search "
                "or another loop whose length depends on the values. Reverse mode "
                "cannot store such a loop, and forward mode is wrong once the search "
                "has converged, because it then stops before its result depends on x. "
                "Use an optimiser without a search (`optax.sgd`, `optax.adam`, "
                "`optax.lbfgs(linesearch=None)`), or differentiate the minimum instead "
                "of the steps: `Implicit(Projection(), Pseudoinverse())`."
            )
        # A rate in float64 must not make float32 data or state float64.
        structure = tree_struct(eqx.filter(state, eqx.is_array))
        y_set = set_y(problem)

        def draw(count):
            if sampled is None or self.batch_size is None:
                return problem
            size, key = self.batch_size, sampled.key
            return on_inner_batch(problem, size, key, count, "Unrolled")

        def step(carry, _):
            y, state, count, _ = carry
            on = draw(count)
            value, gradient = _value_and_gradient(on, x, y)
            slope = tree_norm(y_set.remaining_step(gradient, y))
            y, state = optimiser_step(
                optimiser,
                y,
                state,
                value=value,
                gradient=gradient,
                value_fn=lambda y: on.inner(x, y),
                project=y_set.project,
            )
            count = None if count is None else count + 1
            return (y, _cast(state, structure), count, jax.lax.stop_gradient(slope)), None

        count = None if sampled is None else sampled.count
        carry = anchor, state, count, jnp.zeros((), tree_dtype(anchor))
        y, state, count, slope = repeat(step, carry, self.num_steps, mode)
        if sampled is not None:
            assert count is not None
            state = _SampledState(state, sampled.key, count)
        return y, state, slope


def _value_and_gradient(problem, x, y):
    """f and f_y. A root has no f, and r takes the place of f_y."""
    if isinstance(problem, AbstractRootProblem):
        # NaN, so that an optimiser that does ask for the value cannot do so silently.
        return jnp.full((), jnp.nan, tree_dtype(y)), problem.root(x, y)
    return jax.value_and_grad(problem.inner, argnums=1)(x, y)


Unrolled.__init__.__doc__ = """**Arguments:**

- `optimiser`: any optax optimiser without a line search; or a function of x that returns
    one. Those with a line search (`optax.lbfgs()`, `optax.scale_by_zoom_linesearch`)
    cannot be differentiated, and are refused when the response is called.
- `num_steps`: the number $K$ of steps, at least one. It may be known only at run time
    (to vmap over it, for instance); the mode must then be `"checkpointed"` or
    `"forward"`.
- `mode`: how $J^\\top F_y$ is computed.
    `"checkpointed"`, the default, stores only some of the steps and recomputes the
    others: memory grows as $\\sqrt K$, and it takes about a third more time.
    `"reverse"` stores all intermediate values of all steps. `"forward"` pushes a basis
    of x forward: memory does not grow with $K$, but time grows with the size of x.
- `batch_size`: the number of samples in the batch of a step; `None`, the default, takes
    all data. Keyword only argument.
- `key`: for the batches. By default always the same one. Keyword only argument.
"""


def differentiated(unroll, x, mode="checkpointed", known_length=True) -> Response:
    """A response made from `unroll(x)`, which returns y, and its state and `slope`."""
    if mode == "forward":
        y, kept, jacobian = _forward_jacobian(unroll, x)
        transpose = jacobian.T.mv
    else:
        y, vjp, kept = jax.vjp(unroll, x, has_aux=True)
        if known_length:
            jacobian = lx.JacobianLinearOperator(lambda x, _: unroll(x)[0], x)
        else:
            # The checkpointed loop of unknown length has no forward mode. The Jacobian is
            # computed only if it is used.
            _, _, jacobian = _forward_jacobian(lambda x: unroll(x, "forward"), x)
        # This has taken the steps already; `jacobian.T` would take them again.
        transpose = _First(vjp)
    stats = {"inner_residual": jnp.zeros((), tree_dtype(y))}
    pullback = TransposedJacobian(transpose)
    state, slope = kept
    return Response(y, jacobian, RESULTS.successful, stats, pullback, state, slope=slope)


class _First(eqx.Module):
    """The only element of the tuple that a function returns."""

    fn: Callable

    def __call__(self, *args):
        (out,) = self.fn(*args)
        return out


# With more steps than this, the iterates are checkpointed too.
_MANY_STEPS = 64


def repeat(step, carry, num_steps, mode):
    """`step`, `num_steps` times, in a form for this mode of differentiation."""
    if is_traced(num_steps) or not isinstance(num_steps, int):
        return _repeat_dynamic(step, carry, num_steps, mode)
    if num_steps == 1:
        # Without a loop, the compiler can share the first gradient.
        return step(carry, None)[0]
    if mode != "checkpointed":
        return jax.lax.scan(step, carry, None, length=num_steps)[0]
    # Store only the iterates, and recompute the inside of each step.
    step = jax.checkpoint(step, prevent_cse=False)  # pyright: ignore
    if num_steps <= _MANY_STEPS:
        return jax.lax.scan(step, carry, None, length=num_steps)[0]
    # Store only the iterates at the ends of sqrt(K) chunks of sqrt(K) steps.
    size = math.isqrt(num_steps)
    num_chunks, rest = divmod(num_steps, size)

    def chunk(carry, _):
        return jax.lax.scan(step, carry, None, length=size)

    chunk = jax.checkpoint(chunk, prevent_cse=False)  # pyright: ignore
    carry = jax.lax.scan(chunk, carry, None, length=num_chunks)[0]
    return jax.lax.scan(step, carry, None, length=rest)[0]


def _repeat_dynamic(step, carry, num_steps, mode):
    if mode == "reverse":
        raise ValueError(
            "`Unrolled(num_steps=...)` is known only at run time, but reverse mode "
            "cannot store an unknown number of steps. Use `mode='checkpointed'`."
        )
    dynamic, static = eqx.partition(carry, eqx.is_array)

    def unfinished(carry):
        return carry[0] < num_steps

    def body(carry):
        count, dynamic = carry
        new, _ = step(eqx.combine(dynamic, static), None)
        return count + 1, eqx.filter(new, eqx.is_array)

    carry = jnp.zeros_like(jnp.asarray(num_steps)), dynamic
    if mode == "forward":
        _, dynamic = jax.lax.while_loop(unfinished, body, carry)
    else:
        _, dynamic = checkpointed_while_loop(
            unfinished, body, carry, checkpoints=_MANY_STEPS
        )
    return eqx.combine(dynamic, static)


def _cast(state, structure):
    arrays, rest = eqx.partition(state, eqx.is_array)
    arrays = jtu.tree_map(lambda u, s: u.astype(s.dtype), arrays, structure)
    return eqx.combine(arrays, rest)


def _forward_jacobian(unroll, x) -> tuple[Any, Any, lx.AbstractLinearOperator]:
    """One K-step run that also carries the tangents of x."""
    layout = Layout(x)
    basis = jnp.eye(layout.size, dtype=layout.dtype)

    def push(tangent):
        tangent = layout.unravel(tangent)
        y, t_y, state = jax.jvp(unroll, (x,), (tangent,), has_aux=True)
        return y, Layout(t_y).ravel(t_y), state

    y, columns, state = jax.vmap(push, out_axes=(None, 0, None))(basis)

    def mv(tangent):
        # In one type, since the user may have forbidden promotion.
        flat = layout.ravel(tangent).astype(columns.dtype)
        return Layout(y).unravel(flat @ columns)

    return y, state, lx.FunctionLinearOperator(mv, tree_struct(x))
