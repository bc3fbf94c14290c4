"""The proximal equilibrium of a zero-sum problem."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import lineax as lx
import numpy as np
from jaxtyping import Array, PyTree, Scalar, ScalarLike

from .._arguments import as_rate, check_positive
from .._compat import is_traced
from .._derivatives.second import cross_derivative_operator
from .._inner_solver.minimum import minimise_inner
from .._inner_solver.projection import Projection
from .._problem.constraints import set_x
from .._problem.proximal import proximal
from .._solution_set.picture import picture
from .._tree import nonzero, tree_axpy, tree_norm, tree_struct
from .base import AbstractEquilibrium, Certificate, inner_residual, outer_residual
from .nash import gap


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

    def certify(self, problem, x, y, y0):
        reply = self.reply(problem, x, y)
        inner, inner_y = jax.value_and_grad(problem.inner, argnums=1)(x, y)
        value, outer_x = jax.value_and_grad(problem.outer)(x, reply)
        _, product = jax.linearize(lambda x: jax.grad(problem.outer)(x, reply), x)
        accuracy = None
        if not self.plays_nash:
            here, layout = picture(self.replying(problem, y), x, reply)
            B = cross_derivative_operator(problem, x, reply)
            image = layout.ravel(B.mv(outer_x))
            accuracy = here.accuracy(image, here.pinv(image))
            direct = product

            def product(v):
                q = here.pinv(layout.ravel(B.mv(v)))
                return tree_axpy(1.0, here.cross_transposed(q), direct(v))

        hessian = lx.FunctionLinearOperator(product, tree_struct(x), lx.symmetric_tag)
        return Certificate(
            "a proximal equilibrium",
            {
                "zero sum": (
                    _defect_of_zero_sum(problem, x, y),
                    "the inner objective is minus the outer one",
                ),
                **inner_residual(problem, x, y, inner, inner_y, "y is its own reply"),
                "inner gap": (
                    gap(lambda y: problem.inner(x, y), y),
                    "y gains nothing by moving, to second order",
                ),
                **outer_residual(
                    problem,
                    x,
                    outer_x,
                    value,
                    "x is stationary given the reply: F_x = 0",
                ),
                "outer gap": (
                    gap(
                        lambda x: problem.outer(x, reply),
                        x,
                        set_x(problem),
                        hessian,
                    ),
                    "x gains nothing by moving, with the reply, to second order",
                ),
            },
            accuracy=accuracy,
        )


@eqx.filter_jit
def _defect_of_zero_sum(problem, x: PyTree[Array], y: PyTree[Array]) -> Scalar:
    """How large the gradients of F + f are, relative to those of F, around (x, y)."""

    def total(variables):
        return problem.outer(*variables) + problem.inner(*variables)

    defect = scale = jnp.zeros((), tree_norm((x, y)).dtype)
    for key in jr.split(jr.PRNGKey(0), 3):
        flat, treedef = jtu.tree_flatten((x, y))
        keys = jr.split(key, len(flat))
        # Not only at (x, y): at an equilibrium both gradients vanish.
        moved = [u + jr.normal(k, u.shape, u.dtype) for u, k in zip(flat, keys)]
        at = jtu.tree_unflatten(treedef, moved)
        defect = defect + tree_norm(jax.grad(total)(at))
        scale = scale + tree_norm(jax.grad(lambda v: problem.outer(*v))(at))
    return defect / nonzero(scale)


def _is(weight: Any, limit: float) -> bool:
    """Whether the weight is known to be this limit. A traced weight is not."""
    return isinstance(weight, float) and weight == limit
