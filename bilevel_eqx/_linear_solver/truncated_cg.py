"""Truncated conjugate gradients."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, PyTree

from .._arguments import as_count, check_count, check_type
from .._linalg.zero_curvature import is_flat, rounding_of
from .._tree import (
    nonzero,
    tree_axpy,
    tree_dot,
    tree_dtype,
    tree_eps,
    tree_max,
    tree_norm,
    tree_scale,
    tree_size,
    tree_where,
    tree_zeros_like,
    where,
)
from .misc import check_square, relative
from .preconditioner import AbstractPreconditioner


_GROWTH = 10


class TruncatedCG(lx.AbstractLinearSolver):
    r"""At most $K$ steps of conjugate gradients on $H q = b$, from $q = 0$.

    Each step is one product with $H$, and there are no other products. It stops early,
    with the current $q$ as its answer,

    - if the residual is as small as rounding error (convergence);
    - at a direction of negative curvature. If that is the first direction, there is no
      answer, and the result is `RESULTS.breakdown`.

    In an overparameterised problem $H$ is usually singular and $b$ is not in its range.
    CG then reaches a direction without curvature, where the textbook method divides zero
    by zero. That direction is the part of $b$ in the null space. It is removed from the
    residual, and the iteration continues: in exact arithmetic $B^\top q$ is exact after
    at most $2 r + 1$ steps, where $r$ is the rank.

    A truncated answer is an approximation, and it is a success only if it is better than
    none: if the residual $|b - H q|$ is smaller than that of $q = 0$. With a singular or
    ill-conditioned H and few steps it may have grown, since conjugate gradients reduce
    the error in the norm of H. The result is then `RESULTS.stagnation`.

    It supports the option `rtol` of `lineax.linear_solve`: the relative residual at which
    it stops, if that is above rounding error.

    It also supports `y0`, a vector to start from: the best multiple of it is taken, which
    takes one more product. [`bilevel_eqx.Implicit`][]`(carry_adjoint=True)` passes the
    adjoint of the last outer step.

    With a `preconditioner` $P \approx H$, the steps are those of the preconditioned
    method. Where an adjoint is carried, so is P, and it is computed anew every
    `refresh_every` solves; elsewhere it is computed for each solve. It does not change
    the solution.

    All tests are relative, so that scaling $H$ or $b$ changes nothing. `stats` contains
    `num_steps`; the relative `residual`, including possible rounding error;
    `negative_curvature`; and the `curvature` along the last direction.

    !!! warning

        The truncated method is nonlinear in $b$, so that the derivative with respect
        to $b$ differs slightly from its transpose. If both matter, use
        [`bilevel_eqx.Neumann`][] or [`bilevel_eqx.Pseudoinverse`][].

    ??? cite "Reference"

        Pedregosa, *Hyperparameter optimization with approximate gradient*, ICML 2016.
    """

    num_steps: int
    preconditioner: AbstractPreconditioner | None = eqx.field(default=None, kw_only=True)
    refresh_every: int = eqx.field(default=20, converter=as_count, kw_only=True)

    judges_itself: ClassVar[bool] = True
    breakdown: ClassVar[str] = "negative_curvature"
    needs_symmetry: ClassVar[bool] = True
    takes_guess: ClassVar[bool] = True
    prepares: ClassVar[bool] = True
    # The shapes that the preconditioner has to see.
    speaks_for: ClassVar[str] = "preconditioner"

    def __check_init__(self):
        owner, kinds = "TruncatedCG", AbstractPreconditioner | None
        check_count(self.num_steps, "num_steps", owner)
        check_count(self.refresh_every, "refresh_every", owner)
        check_type(self.preconditioner, kinds, "preconditioner", owner)

    def prepare(self, operator: lx.AbstractLinearOperator) -> PyTree[Array]:
        """What may be kept for several solves: `options["prepared"]`."""
        preconditioner = self.preconditioner
        return None if preconditioner is None else preconditioner.prepare(operator)

    def init(self, operator: lx.AbstractLinearOperator, options: dict[str, Any]):
        check_square(operator, "TruncatedCG")
        operator = lx.linearise(operator)
        if "prepared" in options:
            return operator, options["prepared"]
        return operator, self.prepare(operator)

    def _preconditioned(self, prepared, r):
        preconditioner = self.preconditioner
        return r if preconditioner is None else preconditioner.precondition(prepared, r)

    def compute(self, state, vector, options):
        operator, prepared = state
        dtype = tree_dtype(vector)
        eps = tree_eps(vector)
        size = tree_size(vector)
        rtol = jnp.maximum(jnp.asarray(options.get("rtol", 0), dtype), eps)
        # b scaled to order one, so that no square below overflows or underflows.
        scale = tree_max(vector)
        b = tree_scale(1 / nonzero(scale), vector)
        rr0 = tree_dot(b, b)

        def unfinished(carry):
            num_steps, *_, stop = carry
            return ~stop & (num_steps < self.num_steps)

        def step(carry):
            # `rz` is the product of r with P^-1 r, and of r with itself without a P.
            num_steps, q, r, p, rz, largest, longest, _, _ = carry
            Hp = operator.mv(p)
            pp = tree_dot(p, p)
            curvature = tree_dot(p, Hp) / pp
            largest = jnp.maximum(largest, jnp.abs(curvature))
            image = jnp.sqrt(tree_dot(Hp, Hp) / pp)
            flat = is_flat(curvature, image, largest, size)
            # Negated, so that NaN is bad too.
            bad = ~flat & ~(curvature > 0)
            step_size = where(flat | bad, 0, rz / (pp * curvature))
            q = tree_axpy(step_size, p, q)
            longest = jnp.maximum(longest, step_size * jnp.sqrt(pp))
            # Along a flat direction no step is taken. The residual loses that component.
            share = where(flat, tree_dot(r, p) / pp, 0)
            r = tree_axpy(-step_size, Hp, r)
            r = tree_where(flat, tree_axpy(-share, p, r), r)
            z = self._preconditioned(prepared, r)
            new_rz = tree_dot(r, z)
            new_rr = new_rz if z is r else tree_dot(r, r)
            p = tree_axpy(where(flat, 0, new_rz / rz), p, z)
            converged = new_rr <= rtol**2 * rr0
            stop = bad | converged
            figures = largest, longest, curvature
            return num_steps + 1, q, r, p, new_rz, *figures, stop

        zero = jnp.zeros((), dtype)
        q, r = tree_zeros_like(b), b
        stop = rr0 == 0
        if "y0" in options:
            q, r = _from_guess(operator, options["y0"], b)
            stop = tree_dot(r, r) <= rtol**2 * rr0
        z = self._preconditioned(prepared, r)
        rz = rr0 if z is b else tree_dot(r, z)
        carry = jnp.array(0), q, r, z, rz, zero, zero, zero, stop
        out = jax.lax.while_loop(unfinished, step, carry)
        num_steps, q, r, _, _, largest, longest, curvature, _ = out
        bad = ~(curvature >= -rounding_of(largest, size))
        # Rounding error of a long step, which the recursion of the residual does not see.
        rounding = eps * largest * longest / nonzero(tree_norm(b))
        residual = jnp.maximum(relative(r, b), rounding)
        stats = {
            "num_steps": num_steps,
            "residual": residual,
            "curvature": curvature,
            "negative_curvature": bad,
        }
        # At negative curvature the answer minimises as far as there is a minimum, and its
        # residual says little. Negated, so that NaN fails too.
        worse = ~(residual < where(bad, _GROWTH, 1)) & (rr0 > 0)
        result = lx.RESULTS.where(worse, lx.RESULTS.stagnation, lx.RESULTS.successful)
        result = lx.RESULTS.where(bad & (num_steps == 1), lx.RESULTS.breakdown, result)
        q = jtu.tree_map(lambda u: scale.astype(u.dtype) * u, q)
        return q, result, stats

    def transpose(self, state, options):
        operator, prepared = state
        return (operator.transpose(), prepared), options

    def conj(self, state, options):
        operator, prepared = state
        return (lx.conj(operator), prepared), options

    def assume_full_rank(self):
        return False


def _from_guess(operator, guess, b):
    """The multiple of the guess that is nearest to the solution in the norm of H, and its
    residual."""
    # Scaled, so that no square overflows or underflows.
    guess = tree_scale(1 / nonzero(tree_max(guess)), guess)
    image = operator.mv(guess)
    curvature = tree_dot(guess, image)
    usable = (curvature > 0) & jnp.isfinite(tree_dot(image, image))
    share = where(usable, tree_dot(b, guess) / where(usable, curvature, 1), 0)
    q, r = tree_scale(share, guess), tree_axpy(-share, image, b)
    # In the norm of residuals it may be worse than none.
    better = usable & (tree_dot(r, r) < tree_dot(b, b))
    return tree_where(better, (q, r), (tree_zeros_like(b), b))


TruncatedCG.__init__.__doc__ = r"""**Arguments:**

- `num_steps`: the largest number $K$ of steps, each of which is one product with $H$.
- `preconditioner`: a [`bilevel_eqx.pipelines.Nystrom`][],
    [`bilevel_eqx.pipelines.Diagonal`][] or [`bilevel_eqx.pipelines.Kronecker`][]. Each
    time that it is computed takes as many products more as its rank or its number of
    probes. Its damping should be of the order of the small eigenvalues of $H$. `None`,
    the default, is none. Keyword only argument.
- `refresh_every`: for how many solves a carried preconditioner serves; 20 by default.
    Under `vmap` it is computed for each. Keyword only argument.
"""
