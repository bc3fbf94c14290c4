"""Projection on the set of inner minima, by Newton steps with a pseudoinverse."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import optimistix as optx
from jaxtyping import Array, Bool, PyTree, Scalar

from .._arguments import check_count
from .._depends_on import depends_on
from .._derivatives.operators import LeastSquaresHessian
from .._linear_solver.pseudoinverse import Pseudoinverse
from .._linear_solver.truncated_cg import newton_direction
from .._tree import tree_axpy, tree_dot, tree_dtype, tree_norm, tree_scale, tree_struct


class _ProjectionState(eqx.Module):
    num_steps: Scalar
    first_norm: Scalar
    terminate: Bool[Array, ""]


class Projection(optx.AbstractMinimiser[Any, Any, _ProjectionState]):
    r"""Newton steps with a pseudoinverse, $y \leftarrow y - t H^+ \nabla_y f(x, y)$.

    On a quadratic the first step, with $t = 1$, is the exact projection on the set of
    minima, $\Pi(y, S(x)) = y - H^+ \nabla_y f$: what gradient descent would tend to.
    For a linear least-squares problem with one row this is Kaczmarz' step. Elsewhere
    the steps are damped by a backtracking line search on $f$, and least-squares
    problems take Gauss–Newton steps, which always descend.

    On the way to minima that are not isolated, the Hessian of a nonlinear problem has
    small eigenvalues of either sign that vanish only when one is reached. Inverting
    those leads astray, and so there the Newton system is solved by conjugate gradients,
    the more exactly the smaller the gradient is; this still converges superlinearly.

    It supports the following `options` of `optimistix.minimise`:

    - `hessian`: a function of `y` with the Hessian as a lineax operator. The responses
        of this package pass one, so that the structure of the problem is made use of.

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

    def __init__(
        self,
        linear_solver: lx.AbstractLinearSolver | None = None,
        max_steps: int = 50,
        rtol: float | None = None,
        atol: float = 0.0,
    ):
        """**Arguments:**

        - `linear_solver`: the lineax solver of the Newton system. By default
            [`bilevel_eqx.Pseudoinverse`][] for quadratics and least squares, whose steps
            are orthogonal to the set of minima, and truncated conjugate gradients
            elsewhere.
        - `max_steps`: the largest number of Newton steps.
        - `rtol`: it stops once a step is below `rtol` times the norm of y, or the
            gradient below `rtol` times what it was. `None`, the default, is a hundred
            times machine precision.
        - `atol`: an absolute tolerance for the step, added to that.
        """
        self.linear_solver = linear_solver
        self.max_steps = max_steps
        self.rtol = rtol
        self.atol = atol
        self.norm = optx.two_norm

    def __check_init__(self):
        check_count(self.max_steps, "max_steps", "Projection")

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        gradient, _ = jax.grad(fn, has_aux=True)(y, args)
        norm = tree_norm(gradient)
        return _ProjectionState(jnp.array(0), norm, norm == 0)

    def step(self, fn, y, args, options, state, tags):
        def objective(y):
            return fn(y, args)[0]

        value, gradient = jax.value_and_grad(objective)(y)
        hessian_at = options.get("hessian")
        if hessian_at is None:
            _, product = jax.linearize(jax.grad(objective), y)
            hessian = lx.FunctionLinearOperator(
                product, tree_struct(y), {lx.symmetric_tag}
            )
        else:
            hessian = hessian_at(y)
        if self.linear_solver is None and _is_curved(hessian, objective, y):
            shrunk = tree_norm(gradient) / state.first_norm
            rtol = jnp.minimum(0.1, jnp.sqrt(shrunk))
            newton = newton_direction(hessian, gradient, rtol)
        else:
            solver = Pseudoinverse() if self.linear_solver is None else self.linear_solver
            newton = lx.linear_solve(hessian, gradient, solver, throw=False).value
        slope = tree_dot(gradient, newton)
        # Where the curvature is negative the Newton step climbs: take its opposite.
        sign = jnp.where(slope < 0, 1, -1).astype(slope.dtype)
        direction = tree_scale(sign, newton)
        t = _backtrack(objective, y, value, direction, -jnp.abs(slope))
        new_y = tree_axpy(t, direction, y)
        (_, aux), new_gradient = jax.value_and_grad(fn, has_aux=True)(new_y, args)

        eps = float(jnp.finfo(tree_dtype(y)).eps)
        rtol = 100 * eps if self.rtol is None else self.rtol
        small_step = t * tree_norm(direction) <= self.atol + rtol * tree_norm(new_y)
        solved = tree_norm(new_gradient) <= rtol * state.first_norm
        num_steps = state.num_steps + 1
        terminate = small_step | solved | (num_steps >= self.max_steps)
        return new_y, _ProjectionState(num_steps, state.first_norm, terminate), aux

    def terminate(self, fn, y, args, options, state, tags):
        # How good the point is, the response that asked for it checks.
        return state.terminate, optx.RESULTS.successful

    def postprocess(self, fn, y, aux, args, options, state, tags, result):
        return y, aux, {}


def _is_curved(hessian, objective, y) -> bool:
    """Whether the Hessian depends on y, and is not Gauss and Newton's."""
    ones = jax.tree.map(jnp.ones_like, y)
    return not isinstance(hessian, LeastSquaresHessian) and depends_on(
        lambda y: jax.jvp(jax.grad(objective), (y,), (ones,))[1], y
    )


_MAX_HALVINGS = 30


def _backtrack(objective, y, value, direction, slope):
    """The first of 1, 1/2, 1/4, ... that decreases the objective; 0 if none does."""
    # At the minimum rounding decides between two equal values, hence the slack.
    slack = 10 * jnp.finfo(value.dtype).eps * jnp.abs(value)

    def insufficient(t):
        new_value = objective(tree_axpy(t, direction, y))
        bound = value + 1e-4 * t.astype(value.dtype) * slope.astype(value.dtype)
        # Negated, so that NaN is insufficient too.
        return ~(new_value <= bound + slack)

    def unfinished(carry):
        count, t, rejected = carry
        return rejected & (count < _MAX_HALVINGS)

    def halve(carry):
        count, t, _ = carry
        t = 0.5 * t
        return count + 1, t, insufficient(t)

    one = jnp.ones((), tree_dtype(y))
    carry = jnp.array(0), one, insufficient(one)
    _, t, rejected = jax.lax.while_loop(unfinished, halve, carry)
    return jnp.where(rejected, 0, t)
