"""Projection on the set of inner minima, by Newton steps with a pseudoinverse."""

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import optimistix as optx
from jaxtyping import Array, Bool, Float, PyTree, Scalar

from .._arguments import check_count
from .._depends_on import depends_on
from .._derivatives.second import value_gradient_and_product
from .._linalg.newton_direction import newton_direction
from .._linear_solver.pseudoinverse import Pseudoinverse
from .._optimiser.backtracking import backtrack
from .._tree import (
    Layout,
    nonzero,
    tree_dtype,
    tree_eps,
    tree_struct,
    vector_norm,
    where,
)


class _ProjectionState(eqx.Module):
    num_steps: Scalar
    first_norm: Scalar
    # Of the last step: its length; and where it began, with the value and the norm of
    # the gradient there.
    length: Scalar
    last: Float[Array, " n"]
    last_value: Scalar
    last_norm: Scalar
    # Whether the gradient has yet to judge that step, and whether it refused one.
    is_trial: Bool[Array, ""]
    by_values: Bool[Array, ""]
    terminate: Bool[Array, ""]
    # The structure of what the objective returns beside its value.
    aux: Any = eqx.field(static=True)


_NUM_STEPS = 50


class Projection(optx.AbstractMinimiser[Any, Any, _ProjectionState]):
    r"""Newton steps with a pseudoinverse, $y \leftarrow y - t H^+ \nabla_y f(x, y)$.

    On a quadratic the first step, with $t = 1$, is the exact projection on the set of
    minima, $\Pi(y, S(x)) = y - H^+ \nabla_y f$, to which gradient descent converges. For
    a linear least-squares problem with one row this is Kaczmarz' step. On other problems
    a backtracking line search on $f$ damps the steps, and least-squares problems take
    Gauss–Newton steps, which always descend. Near a minimum rounding of f hides what is
    left of the descent. There a full step is taken, if it halves the gradient.

    The gradient at the end of a step is always computed, also on a quadratic: an
    objective that is quadratic in pieces (with ReLUs, or squared hinges) looks like one.

    Near minima that are not isolated, the Hessian of a nonlinear problem has small
    eigenvalues of either sign, which vanish only at a minimum. Their inverses would give
    large wrong steps. So conjugate gradients solve the Newton system, with a tolerance
    that shrinks with the gradient. This still converges superlinearly.

    It supports the following `options` of `optimistix.minimise`:

    - `hessian`: a function of `y` that returns the Hessian as a lineax operator, for the
        user's `linear_solver`.
    - `residual`: a function of `y` that returns the residual of a sum of squares. The
        steps are then $-A^+ r$, where A is its Jacobian.
    - `curved`: whether the Hessian depends on y. Otherwise it is found out.

    The responses of this package pass all.

    ??? cite "Reference"

        Vicol, Lorraine, Duvenaud and Grosse, *Implicit Regularization in
        Overparameterized Bilevel Optimization*, 2021: Appendices C and E. Rebjock and
        Boumal, *Fast convergence to non-isolated minima: four equivalent conditions for
        C2 functions*, 2024, for the last point.
    """

    linear_solver: lx.AbstractLinearSolver | None
    max_steps: int
    rtol: float | None
    atol: float
    norm: Callable[[PyTree], Scalar]

    counts_its_steps: ClassVar[bool] = True

    @property
    def is_default(self) -> bool:
        """Whether it may be run as by default, or with more steps."""
        exact = self.rtol is None and self.atol == 0
        return exact and self.linear_solver is None and self.max_steps >= _NUM_STEPS

    def __init__(
        self,
        linear_solver: lx.AbstractLinearSolver | None = None,
        max_steps: int = _NUM_STEPS,
        rtol: float | None = None,
        atol: float = 0.0,
    ):
        """**Arguments:**

        - `linear_solver`: the lineax solver of the Newton system. By default
            [`bilevel_eqx.Pseudoinverse`][] for quadratics and least squares, whose steps
            are orthogonal to the set of minima, and truncated conjugate gradients for
            other problems.
        - `max_steps`: the largest number of Newton steps.
        - `rtol`, `atol`: it stops if a step is shorter than `atol` plus `rtol` times the
            norm of y, or if the gradient is below `rtol` times its first value and, where
            f is no quadratic, the last step was shorter than a thousandth of y. By
            default `rtol` is a hundred times machine precision.
        """
        self.linear_solver = linear_solver
        self.max_steps = max_steps
        self.rtol = rtol
        self.atol = atol
        self.norm = optx.two_norm

    def __check_init__(self):
        check_count(self.max_steps, "max_steps", "Projection")

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        zero, no = jnp.zeros((), tree_dtype(y)), jnp.array(False)
        start = Layout(y).ravel(y), jnp.zeros((), f_struct.dtype), zero
        aux = jtu.tree_structure(aux_struct)
        return _ProjectionState(jnp.array(0), zero, zero, *start, no, no, no, aux)

    def step(self, fn, y, args, options, state, tags):
        # In one vector, which makes the program shorter.
        layout = Layout(y)
        v = layout.ravel(y)

        def objective(v):
            return fn(layout.unravel(v), args)[0]

        def hidden(value):
            # Terms that cancel in f may be much larger than f.
            return tree_eps(y) ** 0.5 * jnp.abs(value)

        value, gradient, product = value_gradient_and_product(objective, v)
        norm = vector_norm(gradient)
        first_norm = where(state.num_steps == 0, norm, state.first_norm)
        eps = tree_eps(y)
        rtol = 100 * eps if self.rtol is None else self.rtol
        # Negated, so that NaN is worse. The values must agree but for rounding: the
        # gradient of a dead ReLU is zero, too.
        rise = value - state.last_value
        is_better = (norm <= 0.5 * state.last_norm) & (rise <= hidden(state.last_value))
        is_worse = state.is_trial & ~is_better

        def move():
            symmetric = lx.symmetric_tag
            hessian = lx.FunctionLinearOperator(product, tree_struct(v), symmetric)
            here = layout, v, gradient, norm, hessian
            newton = self._newton(*here, options, curved, norm / nonzero(first_norm))
            slope = jnp.vdot(gradient, newton)
            # With negative curvature the Newton step may climb; then take its opposite.
            direction = where(slope < 0, newton, -newton)

            # Its gradient comes with the next step, and then it is judged.
            is_trial = ~state.by_values & (jnp.abs(slope) <= hidden(value))

            def trial(t):
                point = v + t.astype(v.dtype) * direction
                return point, objective(point), jnp.array(True)

            t, new_v, _ = backtrack(
                trial,
                v,
                value,
                -jnp.abs(slope),
                highest=where(is_trial, jnp.inf, value),
                max_trials=_MAX_TRIALS,
            )
            length = t.astype(v.dtype) * vector_norm(newton)
            small = length <= self.atol + rtol * vector_norm(v)
            return new_v, length, small | (t == 0), is_trial

        curved = options.get("curved")
        if curved is None:
            curved = _hessian_depends_on_y(objective, v)
        solved = norm <= rtol * first_norm
        if curved:
            # Small beside the first one is not enough where f flattens, as a logistic
            # loss does: the last step must have been short, too.
            solved = solved & (state.length <= _SHORT * vector_norm(v))
        stay = where(is_worse, state.last, v), state.length, ~is_worse, jnp.array(False)
        new_v, length, done, is_trial = jax.lax.cond(
            solved | is_worse, lambda: stay, move
        )
        num_steps = state.num_steps + 1
        # The last trial is judged in any case.
        terminate = done | (~is_trial & (num_steps >= self.max_steps))
        new_y = layout.unravel(new_v)
        # Computed only if there is something to compute.
        has_aux = state.aux.num_leaves > 0
        aux = fn(new_y, args)[1] if has_aux else jtu.tree_unflatten(state.aux, [])
        here = v, value, norm
        state = _ProjectionState(
            num_steps,
            first_norm,
            length,
            *here,
            is_trial,
            state.by_values | is_worse,
            terminate,
            state.aux,
        )
        return new_y, state, aux

    def _newton(self, layout, v, gradient, norm, hessian, options, curved, shrunk):
        """The Newton step, up to its sign."""
        residual, hessian_at = options.get("residual"), options.get("hessian")
        if self.linear_solver is not None:
            # In the structure of the variables, which the solver may need.
            y = layout.unravel(v)
            H = _unflattened(hessian, layout) if hessian_at is None else hessian_at(y)
            g = layout.unravel(gradient)
            newton = lx.linear_solve(H, g, self.linear_solver, throw=False).value
            return layout.ravel(newton)
        if residual is not None:
            # Gauss-Newton: A^+ r, not H^+ A^T r, which squares the condition number.
            r, push = jax.linearize(lambda v: residual(layout.unravel(v)), v)
            A = lx.FunctionLinearOperator(push, tree_struct(v))
            return lx.linear_solve(A, r, Pseudoinverse(), throw=False).value
        if curved:
            rtol = jnp.minimum(0.1, jnp.sqrt(shrunk))
            return newton_direction(hessian, gradient, rtol, size=norm)
        return lx.linear_solve(hessian, gradient, Pseudoinverse(), throw=False).value

    def terminate(self, fn, y, args, options, state, tags):
        # The response that uses this solver checks the point.
        return state.terminate, optx.RESULTS.successful

    def postprocess(self, fn, y, aux, args, options, state, tags, result):
        return y, aux, {}


def _unflattened(operator, layout: Layout) -> lx.AbstractLinearOperator:
    def product(vector):
        return layout.unravel(operator.mv(layout.ravel(vector)))

    structure = jtu.tree_unflatten(layout.treedef, layout.leaves)
    return lx.FunctionLinearOperator(product, structure, {lx.symmetric_tag})


def _hessian_depends_on_y(objective, y) -> bool:
    """Whether the Hessian depends on y."""
    ones = jax.tree.map(jnp.ones_like, y)
    # Not `jax.jvp`, because of `jax.custom_vjp`, as in `_derivatives/second.py`.
    return depends_on(lambda y: jax.linearize(jax.grad(objective), y)[1](ones), y)


_MAX_TRIALS = 30


_SHORT = 1e-3
