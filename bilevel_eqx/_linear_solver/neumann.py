"""The truncated Neumann series."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, Float, ScalarLike

from .._arguments import as_rate, check_count, check_positive
from .._compat import is_traced
from .._linalg.decompositions import eigh
from .._linalg.precision import in_full_precision
from .._tree import nonzero, tree_axpy, tree_dot, tree_dtype, tree_scale
from .misc import check_square, relative


# With more terms than this, it is cheaper to diagonalise a matrix of this size.
_MANY_TERMS = 1000


_SMALL = 256


class _Spectrum(eqx.Module):
    eigenvalues: Float[Array, " n"]
    vectors: Float[Array, "n n"]


def _converges(residual):
    # The slack is for rounding: on the null space the terms do not shrink. Negated, so
    # that NaN counts as divergence.
    diverges = ~(residual <= 1.001)
    return lx.RESULTS.where(diverges, lx.RESULTS.breakdown, lx.RESULTS.successful)


class Neumann(lx.AbstractLinearSolver):
    r"""The first $K$ terms of the Neumann series,

    $$H^{-1} \approx \alpha \sum_{j=0}^{K-1} (I - \alpha H)^j.$$

    It takes exactly $K$ products with $H$. If $K$ is above a thousand or known only at
    run time, a small $H$ is diagonalised with $n$ products instead, and the sum is the
    spectral filter $m_K(s) = (1 - (1 - \alpha s)^K) / s$. On a fixed quadratic, $K$ terms
    are the derivative of exactly $K$ steps of gradient descent with step size $\alpha$.
    The series converges iff $0 < \alpha < 2 / \lambda_{\max}(H)$. (The paper sums to
    $K$, one term more, and drops $\alpha$.)

    On the null space of $H$ each term adds $\alpha$ to the sum, which therefore grows
    as $\alpha K$. $B^\top$ removes that part if the range of $B$ is within that of $H$,
    as it is at an interpolating solution.

    The last product gives the residual $b - H q = (I - \alpha H)^K b$ for free:
    `stats["residual"]` is its norm relative to that of $b$. If it exceeds one, the
    series diverges and the result is `RESULTS.breakdown`. `stats["curvature"]` is then
    close to the eigenvalue on which it diverges. If that is positive, a step size below
    `2 / stats["curvature"]` does not diverge on it; if it is negative, no step size
    converges. (Where the operator is not symmetric, there is no such figure.)

    For a fixed point $y = \varphi(x, y)$ take a step size of one: $H$ is then
    $I - \partial \varphi / \partial y$, and the series is
    $\sum_j (\partial \varphi / \partial y)^j$.

    ??? cite "Reference"

        Lorraine, Vicol and Duvenaud, *Optimizing Millions of Hyperparameters by Implicit
        Differentiation*, AISTATS 2020.
    """

    num_terms: int
    step_size: ScalarLike = eqx.field(converter=as_rate)

    judges_itself: ClassVar[bool] = True
    breakdown: ClassVar[str] = "neumann_diverged"

    def __check_init__(self):
        check_count(self.num_terms, "num_terms", "Neumann")
        check_positive(self.step_size, "step_size", "Neumann")

    def init(self, operator: lx.AbstractLinearOperator, options: dict[str, Any]):
        del options
        check_square(operator, "Neumann")
        many = is_traced(self.num_terms) or self.num_terms > _MANY_TERMS
        small = operator.in_size() <= _SMALL
        if many and small and lx.is_symmetric(operator):
            eigenvalues, vectors = eigh(operator.as_matrix())
            return _Spectrum(eigenvalues, vectors)
        return lx.linearise(operator)

    def compute(self, state, vector, options):
        del options
        if isinstance(state, _Spectrum):
            return self._filter(state, vector)
        return self._sum(state, vector)

    @in_full_precision
    def _filter(self, spectrum, vector):
        b, unravel = jax.flatten_util.ravel_pytree(vector)
        s = spectrum.eigenvalues
        step_size = jnp.asarray(self.step_size, s.dtype)
        num_terms = jnp.asarray(self.num_terms, s.dtype)
        # (1 - step_size s)^K, by a logarithm that is accurate if step_size s is small. At
        # step_size s = 1 the logarithm is minus infinity, and the power zero.
        t = step_size * s
        over = t > 1
        logarithm = jnp.where(
            over, jnp.log(jnp.where(over, t - 1, 1)), jnp.log1p(-jnp.where(over, 0, t))
        )
        sign = jnp.where(over & (self.num_terms % 2 == 1), -1, 1).astype(s.dtype)
        power = sign * jnp.exp(num_terms * logarithm)
        difference = jnp.where(over, 1 - power, -jnp.expm1(num_terms * logarithm))
        safe = nonzero(s)
        total = jnp.where(s == 0, num_terms * step_size, difference / safe)
        coordinates = spectrum.vectors.T @ b
        curvature = s[jnp.argmax(jnp.where(coordinates == 0, -jnp.inf, logarithm))]
        residual = relative(power * coordinates, b)
        return (
            unravel(spectrum.vectors @ (total * coordinates)),
            _converges(residual),
            {"residual": residual, "curvature": curvature},
        )

    def _sum(self, operator, vector):
        step_size = jnp.asarray(self.step_size)

        def add_term(_, carry):
            term, total, curvature = carry
            total = tree_axpy(1.0, term, total)
            product = operator.mv(term)
            # The terms of a diverging series tend to the eigenvector on which it
            # diverges. The last finite Rayleigh quotient estimates the eigenvalue.
            quotient = tree_dot(term, product) / tree_dot(term, term)
            curvature = jnp.where(jnp.isfinite(quotient), quotient, curvature)
            return tree_axpy(-step_size, product, term), total, curvature

        zeros = jtu.tree_map(jnp.zeros_like, vector)
        carry = vector, zeros, jnp.zeros((), tree_dtype(vector))
        last, total, curvature = jax.lax.fori_loop(0, self.num_terms, add_term, carry)
        residual = relative(last, vector)
        stats = {"residual": residual}
        if lx.is_symmetric(operator):
            # Otherwise the quotient is no eigenvalue.
            stats["curvature"] = curvature
        return tree_scale(self.step_size, total), _converges(residual), stats

    def transpose(self, state, options):
        is_spectrum = isinstance(state, _Spectrum)
        return (state if is_spectrum else state.transpose()), options

    def conj(self, state, options):
        is_spectrum = isinstance(state, _Spectrum)
        return (state if is_spectrum else lx.conj(state)), options

    def assume_full_rank(self):
        return False


Neumann.__init__.__doc__ = r"""**Arguments:**

- `num_terms`: the number $K$ of terms, which is the number of products with $H$.
- `step_size`: $\alpha$, in $(0, 2 / \lambda_{\max}(H))$.
"""
