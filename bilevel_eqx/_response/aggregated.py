"""Unrolled descent on both objectives at once."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import ScalarLike

from .._arguments import as_rate, check_count, check_positive
from .._depends_on import depends_on
from .._derivatives.first import inner_gradient, outer_gradients
from .._failure.results import RESULTS
from .._linalg.power_iteration import largest_curvature
from .._problem.constraints import set_y
from .._problem.root import check_has_objective
from .._tree import nonzero, tree_axpy, tree_dtype
from .base import AbstractResponse
from .repeated import repeat
from .unrolled import differentiated


def _rate(value):
    return None if value is None else as_rate(value)


class Aggregated(AbstractResponse):
    r"""Takes $K$ steps from the anchor that descend f and, with a decreasing weight, F,
    and differentiates through them:

    $$y_{k+1} = y_k - \bigl((1 - \alpha)\, t\, \nabla_y f + \alpha\, \gamma_k\, s\,
    \nabla_y F\bigr), \qquad \gamma_k = \frac{1}{k + 1}.$$

    Along the inner minima only F acts, so that y converges to the best of them. This is
    the response of [`bilevel_eqx.Optimistic`][] without a linear solve. Its error is of
    order $\gamma_K$.

    ??? cite "Reference"

        Liu, Mu, Yuan, Zeng and Zhang, *A generic first-order algorithmic framework for
        bi-level programming beyond lower-level singleton*, ICML 2020 (BDA).
    """

    num_steps: int
    inner_step_size: ScalarLike | None = eqx.field(converter=_rate, default=None)
    outer_step_size: ScalarLike | None = eqx.field(converter=_rate, default=None)
    mixing: ScalarLike = eqx.field(converter=as_rate, default=0.5)

    def __check_init__(self):
        for name in ("inner_step_size", "outer_step_size"):
            if getattr(self, name) is not None:
                check_positive(getattr(self, name), name, "Aggregated")
        check_positive(self.mixing, "mixing", "Aggregated")
        check_count(self.num_steps, "num_steps", "Aggregated")

    def init(self, problem, x, anchor):
        return None

    def __call__(self, problem, x, anchor, state=None):
        def unroll(x):
            return self._unroll(problem, x, anchor), (None, None)

        return differentiated(unroll, x)

    def best_response(self, problem, x, anchor):
        return self._unroll(problem, x, anchor), RESULTS.successful

    def reaches(self, problem, x, anchor):
        through_inner = depends_on(lambda x: inner_gradient(problem, x, anchor), x)
        through_outer = depends_on(lambda x: outer_gradients(problem, x, anchor)[2], x)
        return through_inner or through_outer

    def _unroll(self, problem, x, anchor):
        check_has_objective(problem, "`Aggregated`")
        project = set_y(problem).project
        # The estimated step sizes depend on x, and so the derivative goes through them.
        inner_step, outer_step = self.inner_step_size, self.outer_step_size
        if inner_step is None:
            inner_step = _safe_step(lambda y: problem.inner(x, y), anchor)
        if outer_step is None:
            outer_step = _safe_step(lambda y: problem.outer(x, y), anchor)

        def step(carry, _):
            y, count = carry
            outer_y = outer_gradients(problem, x, y)[2]
            dtype = count.dtype
            mixing = jnp.asarray(self.mixing, dtype)
            by_outer = mixing * jnp.asarray(outer_step, dtype) / (count + 1)
            by_inner = (1 - mixing) * jnp.asarray(inner_step, dtype)
            y = tree_axpy(-by_inner, inner_gradient(problem, x, y), y)
            y = tree_axpy(-by_outer, outer_y, y)
            return (project(y), count + 1), None

        zero = jnp.zeros((), tree_dtype(anchor))
        return repeat(step, (anchor, zero), self.num_steps, "checkpointed")[0]


def _safe_step(objective, anchor):
    """Less than one over the largest curvature, because that is estimated from below."""
    largest = largest_curvature(objective, anchor)
    return 0.9 / nonzero(largest)


Aggregated.__init__.__doc__ = r"""**Arguments:**

- `num_steps`: $K$, the number of steps.
- `inner_step_size`: $t$, below two over the largest curvature of f in y. `None`, the
    default, estimates that curvature at the anchor with 20 Hessian-vector products. The
    estimate depends on x, and the derivative includes that. A number is cheaper to
    differentiate.
- `outer_step_size`: $s$, the same for F.
- `mixing`: $\alpha$, between 0 and 1.
"""
