"""Differentiation through unrolled optimisation."""

from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import optax
from jaxtyping import Array, Int, PRNGKeyArray

from .._arguments import as_count, as_pytree, check_count, check_key, check_type
from .._compat import is_traced
from .._depends_on import depends_on
from .._derivatives.first import inner_gradient
from .._derivatives.post_mortem import TRAIL
from .._failure.results import is_failure, RESULTS
from .._optimiser.step import optimiser_step, searches
from .._problem.batches import check_batch_argument, on_inner_batch
from .._problem.constraints import set_y
from .._problem.root import AbstractRootProblem
from .._tree import (
    Layout,
    tree_bytes,
    tree_cast,
    tree_dtype,
    tree_norm,
    tree_struct,
)
from .base import AbstractResponse, Response, TransposedJacobian
from .repeated import MEMORY, repeat
from .rounded_trail import Carry, has_half, rounded_trail


class _SampledState(eqx.Module):
    """What a warm start carries if each step has a batch."""

    optimiser: Any
    key: PRNGKeyArray
    # Of the batches drawn so far.
    count: Int[Array, ""]


def _as_known(value: Any) -> Any:
    """A JAX array may be meant as data; a NumPy integer is just a number."""
    return as_count(value) if isinstance(value, np.generic) else value


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

    !!! warning "Kinks"

        Where steps go to and fro across a kink of f (an L1 norm, a hinge), their
        derivative depends on the side on which the last one ends, and is wrong.
        [`bilevel_eqx.hypergradient`][] finds that out (`RESULTS.at_kink`) by 16 more
        steps, if there are at least 64 and no batches. [`bilevel_eqx.solve`][] takes them
        once, at its end, however few steps there are, and says it in a note of the
        certificate. [`bilevel_eqx.best_response`][] does not look for kinks.

    !!! warning "Rates that are too large"

        Above twice one over the largest curvature of f, gradient descent diverges, and
        the derivative grows along with it. `hypergradient` and `solve` say so
        (`RESULTS.inner_diverged`), and which rate would not diverge. They look once y has
        an entry above 4 that is 4 times the largest one of the anchor. If f is larger
        there than at the anchor, and 16 more steps become longer and lead further uphill,
        it diverges. For fewer than 64 steps, in `best_response`, and at the end of
        `solve`, this is outside of transformations only. Batches are not judged, and
        fewer than 64 steps whose optimiser depends on x only at the end of `solve`: their
        rates may still be learned.

    !!! warning "Adam"

        `optax.adam` takes the square root of its second moments. Where the gradient has
        been zero in every step (a unit that never fires, a pixel that is always black) it
        has no finite derivative, and the hypergradient is NaN. Give it an `eps_root`:
        `optax.adam(rate, eps_root=1e-8)`.

    ??? cite "References"

        Domke, *Generic methods for optimization-based modeling*, 2012. Maclaurin,
        Duvenaud and Adams, *Gradient-based hyperparameter optimization through reversible
        learning*, 2015. Franceschi, Donini, Frasconi and Pontil, *Forward and reverse
        gradient-based hyperparameter optimization*, 2017. The paper's Algorithm 2.
    """

    optimiser: optax.GradientTransformation | Callable = eqx.field(converter=as_pytree)
    num_steps: int = eqx.field(converter=_as_known)
    mode: Literal["checkpointed", "reverse", "forward"] = "checkpointed"
    memory: int | None = eqx.field(
        default=None, converter=as_count, kw_only=True, static=True
    )
    batch_size: int | None = eqx.field(
        default=None, converter=as_count, kw_only=True, static=True
    )
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
        if self.memory is not None:
            check_count(self.memory, "memory", "Unrolled")
        check_batch_argument(self.batch_size, "batch_size", "Unrolled")
        check_key(self.key, "Unrolled")
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
        begin, step = self._steps(problem, anchor, state)

        def kept(end):
            own, count, slope = end.rest
            if self.batch_size is not None:
                own = _SampledState(own, self._key(state), count)
            return own, slope

        def unroll(x, mode=self.mode):
            end = self._repeat(begin, step, x, mode)
            return end.y, kept(end)

        if not self._is_rounded(problem, begin, x):
            known_length = isinstance(self.num_steps, int)
            return differentiated(unroll, x, self.mode, known_length)
        end, pull = rounded_trail(begin, step, x, self.num_steps)
        jacobian = lx.JacobianLinearOperator(lambda x, _: unroll(x)[0], x)
        return _responded(end.y, kept(end), jacobian, pull)

    def best_response(self, problem, x, anchor):
        end = self._repeat(*self._steps(problem, anchor), x, self.mode)
        return end.y, RESULTS.successful

    def reaches(self, problem, x, anchor):
        if callable(self.optimiser):
            steps = self._steps(problem, anchor)
            return depends_on(lambda x: self._repeat(*steps, x, "forward").y, x)

        def gradient(x):
            if self.batch_size is None:
                return inner_gradient(problem, x, anchor)
            # x may be in what is random alone, which rests where all data are used.
            key, count = jr.key(0), jnp.array(0)
            on = on_inner_batch(problem, self.batch_size, key, count, "Unrolled")
            return inner_gradient(on, x, anchor)

        return depends_on(gradient, x)

    def may_run_off(self, result, least):
        """Where the optimiser depends on x, its rates may be what is learned."""
        few = isinstance(self.num_steps, int) and self.num_steps < least
        return (few and not callable(self.optimiser)) or bool(is_failure(result))

    def trail(self, problem, x, y, state, *, least=0):
        """At a minimum of something smooth they stay where they are."""
        known = isinstance(self.num_steps, int) and not is_traced(self.num_steps)
        few = not known or self.num_steps < least
        if few or self.batch_size is not None or isinstance(problem, AbstractRootProblem):
            return None
        begin, step = self._steps(problem, y, state)

        def stepped(carry, _):
            return step(x, carry), carry.y

        return jax.lax.scan(stepped, begin(x), length=TRAIL)[1]

    def _key(self, state):
        if state is not None:
            return state.key
        return jr.key(0) if self.key is None else self.key

    def _repeat(self, begin, step, x, mode):
        def stepped(carry, _):
            return step(x, carry), None

        memory = MEMORY if self.memory is None else self.memory
        return repeat(stepped, begin(x), self.num_steps, mode, memory)

    def _is_rounded(self, problem, begin, x) -> bool:
        """Whether what is kept of a step is rounded: if all steps then fit in the memory
        that the user allows, and do not without. Where y is confined to a set, what is
        slightly outside may be where f is not defined."""
        memory, num_steps = self.memory, self.num_steps
        if memory is None or not isinstance(num_steps, int):
            return False
        y, rest = jax.eval_shape(begin, x)
        if self.mode != "checkpointed" or set_y(problem).confines or not has_half(y):
            return False
        whole, others = tree_bytes(y), tree_bytes(rest)
        return num_steps * (whole // 2 + others) <= memory < num_steps * (whole + others)

    def _optimiser(self, x) -> Any:
        if not callable(self.optimiser):
            return self.optimiser
        optimiser = self.optimiser(x)
        name = "optimiser(x)"
        check_type(optimiser, optax.GradientTransformation, name, "Unrolled")
        return optimiser

    def _steps(self, problem, anchor, state=None):
        """The first carry as a function of x, and the step as one of x and a carry."""
        y_set = set_y(problem)

        def begin(x):
            own = self.init(problem, x, anchor) if state is None else state
            count = None
            if self.batch_size is not None:
                own, count = own.optimiser, own.count
            if searches(self._optimiser(x), anchor, own):
                raise ValueError(_SEARCHES)
            return Carry(anchor, (own, count, jnp.zeros((), tree_dtype(anchor))))

        def step(x, carry):
            y, (own, count, _) = carry
            on = problem
            if self.batch_size is not None:
                size, key = self.batch_size, self._key(state)
                on = on_inner_batch(problem, size, key, count, "Unrolled")
            value, gradient = _value_and_gradient(on, x, y)
            slope = tree_norm(y_set.remaining_step(gradient, y))
            y, new = optimiser_step(
                self._optimiser(x),
                y,
                own,
                value=value,
                gradient=gradient,
                value_fn=lambda y: on.inner(x, y),
                project=y_set.project,
            )
            count = None if count is None else count + 1
            # A rate in float64 must not make float32 data or state float64.
            own = _cast(new, own)
            return Carry(y, (own, count, jax.lax.stop_gradient(slope)))

        return begin, step


_SEARCHES = (
    "`Unrolled` cannot differentiate this optimiser: it has a line search or another "
    "loop whose length depends on the values. Reverse mode cannot store such a loop, and "
    "forward mode is wrong once the search has converged, because it then stops before "
    "its result depends on x. Use an optimiser without a search (`optax.sgd`, "
    "`optax.adam`, `optax.lbfgs(linesearch=None)`), or differentiate the minimum instead "
    "of the steps: `Implicit(Projection(), Pseudoinverse())`."
)


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
    `"checkpointed"`, the default, keeps of each step only where it began, as far as the
    `memory` allows, and computes the rest again. `"reverse"` keeps all intermediate
    values of all steps. `"forward"` pushes a basis of x forward: memory does not grow
    with $K$, but time grows with the size of x.
- `memory`: how many bytes of the steps the mode `"checkpointed"` may keep for the way
    back. Let $s$ be the bytes of y and of the optimiser's state. If $K s$ fit, each step
    is kept. If they do not, the last steps are, as far as they fit, and of the others one
    in $\\sqrt K$, which takes one more gradient for each of them. The least is
    $2 \\sqrt K s$, which is taken where less is allowed. `None`, the default, allows
    $2^{26}$.
    If the memory is given, and enough for half of each y, the pullback (that of a
    hypergradient) keeps increments, rounded to half as many bits, and no gradient is
    computed once more. The steps are the same. But it linearises each at a point that is
    wrong by up to $2^{-12}$ of the last increment in float32, and $2^{-24}$ in float64.
    Where $K$ is known only at run time, 64 steps are kept. Keyword only argument.
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
    return _responded(y, kept, jacobian, transpose)


def _responded(y, kept, jacobian, transpose):
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


def _cast(state, like):
    arrays, rest = eqx.partition(state, eqx.is_array)
    return eqx.combine(tree_cast(arrays, eqx.filter(like, eqx.is_array)), rest)


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
