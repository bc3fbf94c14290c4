"""The proximal equilibrium of a zero-sum problem."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree, Scalar, ScalarLike

from .._arguments import as_rate, check_positive
from .._compat import called_once, is_traced
from .._derivatives.second import cross_derivative_operator
from .._inner_solver.minimum import minimise_inner
from .._inner_solver.projection import Projection
from .._linalg.power_iteration import typical_magnitude
from .._problem.proximal import proximal
from .._solution_set.picture import picture
from .._tree import nonzero, tree_axpy, tree_norm, where
from .base import AbstractEquilibrium, Certificate
from .outer_curvature import outer_curvature
from .residuals import measure, outer_residual, outer_slopes, share, slopes_of


def _known_limit_or_rate(weight: Any) -> Any:
    """The limits are different programs, so that they must be known when tracing."""
    if is_traced(weight) or np.ndim(weight) > 0:
        return weight
    return float(weight) if weight == 0 or np.isinf(weight) else as_rate(weight)


class ProximalEquilibrium(AbstractEquilibrium):
    r"""The proximal equilibrium of a zero-sum problem, $f = -F$: a Nash equilibrium in
    which the inner player may reply near its y,

    $$V(x, y) = \max_{y'} F(x, y') - \tfrac\lambda2 \|y' - y\|^2, \qquad
    V(x^*, y) \le V(x^*, y^*) \le V(x, y^*) \text{ for all } x, y.$$

    With $\lambda = 0$ the reply is free, and this is a Stackelberg equilibrium. With
    $\lambda \to \infty$ there is no reply, and it is a Nash equilibrium. Some games have
    a proximal equilibrium but no Nash equilibrium. To first order all of them need
    $F_x = F_y = 0$. They differ in the second-order condition on x:
    $F_{xx} + B^\top (H + \lambda I)^{-1} B \succeq 0$.

    ??? cite "Reference"

        Farnia and Ozdaglar, *Do GANs always have Nash equilibria?*, ICML 2020.
    """

    heeds_x0: ClassVar[bool] = True
    warm: ClassVar[bool] = True
    weight: ScalarLike

    def __init__(self, weight: ScalarLike):
        r"""**Arguments:**

        - `weight`: $\lambda$, at least zero, in units of the curvature of F in y. Zero
            is Stackelberg, and `jnp.inf` is Nash.
        """
        self.weight = _known_limit_or_rate(weight)

    def __check_init__(self):
        check_positive(self.weight, "weight", "ProximalEquilibrium", or_zero=True)

    def check(self, problem, x, y):
        defect = _defect_of_zero_sum(problem, x, y)
        if not is_traced(defect) and jnp.isnan(defect):
            raise ValueError(
                "A `ProximalEquilibrium` is defined only for zero-sum problems, and "
                "whether this is one cannot be told: the gradients of the objectives are "
                "not finite at (x0, y0), nor at points around it. Start from another "
                "point."
            )
        if not is_traced(defect) and not defect <= 1e-3:
            raise ValueError(
                "A `ProximalEquilibrium` is defined only for zero-sum problems, whose "
                "inner objective is minus the outer one, but here the gradients of F + f "
                f"are {float(defect):.2g} times those of F. For other problems use "
                "`Stackelberg()`, `Nash()` or `Optimistic()`."
            )

    @property
    def plays_nash(self) -> bool:
        r"""Whether $\lambda$ is known to be infinite, so that there is no reply."""
        return _is(self.weight, np.inf)

    def reply(self, problem, x: PyTree[Array], y: PyTree[Array]) -> PyTree[Array]:
        r"""The reply $y'$ of the inner player."""
        if self.plays_nash:
            return y
        replying = self.replying(problem, y)
        return minimise_inner(replying, x, y, Projection(), 256).value

    def replying(self, problem, y: PyTree[Array]):
        """The problem whose inner minimum is the reply."""
        return problem if _is(self.weight, 0) else proximal(problem, y, self.weight)

    def certify(self, problem, x, y, y0, x0=None):
        here, layout = picture(problem, x, y)
        start = None if y0 is None else layout.ravel(y0)
        at = measure(here, slopes_of(here, x0, start))
        reply = self.reply(problem, x, y)
        outer = outer_slopes(here.problem, x, layout.ravel(reply), x0, start)
        _, direct = jax.linearize(lambda x: jax.grad(problem.outer)(x, reply), x)
        accuracy, product, scale = at.accuracy, direct, typical_magnitude(direct, x)
        if not self.plays_nash:
            there, _ = picture(self.replying(problem, y), x, reply)
            B = cross_derivative_operator(problem, x, reply)
            image = layout.ravel(B.mv(outer.x))
            accuracy = there.accuracy(image, there.pinv(image))

            def through_reply(v):
                q = there.pinv(layout.ravel(B.mv(v)))
                return there.cross_transposed(q)

            def product(v):
                return tree_axpy(1.0, through_reply(v), direct(v))

            scale = scale + typical_magnitude(through_reply, x)
        return Certificate(
            "a proximal equilibrium",
            {
                "zero sum": (
                    _defect_of_zero_sum(problem, x, y),
                    "the inner objective is minus the outer one",
                ),
                **at.inner("y is its own reply"),
                **outer_residual(
                    problem,
                    x,
                    outer.x,
                    tree_norm(outer.change_x),
                    "x is stationary given the reply: F_x = 0",
                ),
                **outer_curvature(
                    problem,
                    x,
                    outer.x,
                    product,
                    "the same to second order, with the reply",
                    scale,
                ),
            },
            accuracy=accuracy,
            notes=at.notes,
        )


@called_once
def _defect_of_zero_sum(problem, x: PyTree[Array], y: PyTree[Array]) -> Scalar:
    """The size of the gradients of F + f around (x, y), as a share with those of F."""

    def total(variables):
        return problem.outer(*variables) + problem.inner(*variables)

    def around(i):
        """A point around (x, y), and (x, y) itself for zero."""

        def moved(u):
            count = jnp.arange(u.size, dtype=u.dtype).reshape(u.shape)
            waves = jnp.cos((1 + i.astype(u.dtype)) * (1 + count))
            size = nonzero(tree_norm(u)) * jnp.minimum(i, 1).astype(u.dtype)
            return u + size * waves

        at = jtu.tree_map(moved, (x, y))
        wrong = tree_norm(jax.grad(total)(at))
        right = tree_norm(jax.grad(lambda v: problem.outer(*v))(at))
        return wrong, right

    # Not only at (x, y): at an equilibrium both gradients vanish. But also there: the
    # other points may lie where an objective is not defined.
    wrong, right = jax.vmap(around)(jnp.arange(4))
    finite = jnp.isfinite(wrong + right)
    defect, scale = (jnp.sum(where(finite, u, 0)) for u in (wrong, right))
    return where(jnp.any(finite), share(defect, scale), jnp.nan)


def _is(weight: Any, limit: float) -> bool:
    """Whether the weight is known to be this limit. A traced weight is not."""
    return isinstance(weight, float) and weight == limit
