"""The proximal equilibrium of a zero-sum problem."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import optimistix as optx
from jaxtyping import Array, PyTree, Scalar, ScalarLike

from .._arguments import as_rate, check_positive, is_traced
from .._derivatives.second import cross_derivative_operator, HessianAt
from .._inner_solver.projection import Projection
from .._problem.constraints import projection_x
from .._problem.proximal import proximal
from .._solution_set.tangent import SolutionSet
from .._tree import nonzero, tree_axpy, tree_norm, tree_struct
from .base import AbstractEquilibrium, Certificate, inner_residual, outer_residual
from .nash import gap


def _known_limit_or_rate(weight: Any) -> Any:
    """The limits are other programs, so that they must be known to be so."""
    if is_traced(weight) or np.ndim(weight) > 0:
        return weight
    return float(weight) if weight == 0 or np.isinf(weight) else as_rate(weight)


class ProximalEquilibrium(AbstractEquilibrium):
    r"""The proximal equilibrium of a zero-sum problem, $f = -F$: a Nash equilibrium in
    which the inner player is granted a small reply,

    $$V(x, y) = \max_{y'} F(x, y') - \tfrac\lambda2 \|y' - y\|^2, \qquad
    V(x^*, y) \le V(x^*, y^*) \le V(x, y^*) \text{ for all } x, y.$$

    With $\lambda = 0$ the reply is free, and this is a Stackelberg equilibrium; with
    $\lambda \to \infty$ there is none, and it is a Nash equilibrium. In between there
    are games that have no Nash equilibrium but a proximal one. To first order all of
    them ask for $F_x = F_y = 0$; they differ to second order, in what x could gain:
    $F_{xx} + B^\top (H + \lambda I)^{-1} B \succeq 0$.

    ??? cite "Reference"

        Farnia and Ozdaglar, *Do GANs always have Nash equilibria?*, ICML 2020.
    """

    warm: ClassVar[bool] = True
    weight: ScalarLike

    def __init__(self, weight: ScalarLike):
        r"""**Arguments:**

        - `weight`: $\lambda$, at least zero, in units of the curvature of F in y. Zero
            is Stackelberg, and `jnp.inf` Nash.
        """
        self.weight = _known_limit_or_rate(weight)

    def __check_init__(self):
        check_positive(self.weight, "weight", "ProximalEquilibrium", or_zero=True)

    def check(self, problem, x, y):
        defect = _defect_of_zero_sum(problem, x, y)
        if not is_traced(defect) and not defect <= 1e-3:
            raise ValueError(
                "A `ProximalEquilibrium` is defined for zero-sum problems, whose inner "
                "objective is minus the outer one, but here the gradients of F + f are "
                f"{float(defect):.2g} times those of F. For objectives of another kind "
                "there are `Stackelberg()`, `Nash()` and `Optimistic()`."
            )

    @property
    def plays_nash(self) -> bool:
        r"""Whether $\lambda$ is known to be infinite, so that there is no reply."""
        return _is(self.weight, np.inf)

    def reply(self, problem, x: PyTree[Array], y: PyTree[Array]) -> PyTree[Array]:
        r"""The reply $y'$ that the inner player is granted."""
        if self.plays_nash:
            return y
        replying = self.replying(problem, y)
        return optx.minimise(
            lambda y, args: replying.inner(x, y),
            Projection(),
            y,
            options={"hessian": HessianAt(replying, x)},
            throw=False,
        ).value

    def replying(self, problem, y: PyTree[Array]):
        """The problem whose inner minimum is the reply."""
        return problem if _is(self.weight, 0) else proximal(problem, y, self.weight)

    def certify(self, problem, x, y, y0):
        reply = self.reply(problem, x, y)
        value, outer_x = jax.value_and_grad(problem.outer)(x, reply)
        _, product = jax.linearize(lambda x: jax.grad(problem.outer)(x, reply), x)
        accuracy = None
        if not self.plays_nash:
            S = SolutionSet(self.replying(problem, y), x, reply)
            B = cross_derivative_operator(problem, x, reply)
            accuracy = S.accuracy(B.mv(outer_x))
            direct = product

            def product(v):
                return tree_axpy(1.0, B.T.mv(S.pinv(B.mv(v))), direct(v))

        hessian = lx.FunctionLinearOperator(product, tree_struct(x), lx.symmetric_tag)
        return Certificate(
            "a proximal equilibrium",
            {
                "zero sum": (
                    _defect_of_zero_sum(problem, x, y),
                    "the inner objective is minus the outer one",
                ),
                **inner_residual(problem, x, y, "y is its own reply"),
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
                        projection_x(problem),
                        hessian,
                    ),
                    "x gains nothing by moving, reply included, to second order",
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
        # Not at (x, y) alone: at an equilibrium both gradients vanish.
        moved = [u + jr.normal(k, u.shape, u.dtype) for u, k in zip(flat, keys)]
        at = jtu.tree_unflatten(treedef, moved)
        defect = defect + tree_norm(jax.grad(total)(at))
        scale = scale + tree_norm(jax.grad(lambda v: problem.outer(*v))(at))
    return defect / nonzero(scale)


def _is(weight: Any, limit: float) -> bool:
    """Whether the weight is known to be this limit. One known only at run time is not."""
    return isinstance(weight, float) and weight == limit
