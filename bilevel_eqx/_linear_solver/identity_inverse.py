"""The inverse Hessian taken as a multiple of the identity."""

from typing import Any, ClassVar

import equinox as eqx
import lineax as lx
from jaxtyping import ScalarLike

from .._arguments import as_rate, check_positive
from .._compat import static
from .._tree import tree_scale
from .misc import check_square


class IdentityInverse(lx.AbstractLinearSolver):
    r"""Approximates $H^{-1} \approx c I$, without any product with $H$.

    If $c$ is the inner step size, this is the hypergradient of one unrolled step
    ("T1-T2", one-step differentiation), which is one Neumann term.

    ??? cite "Reference"

        Luketina, Berglund, Greff and Raiko, *Scalable gradient-based tuning of
        continuous regularization hyperparameters*, ICML 2016.
    """

    scale: ScalarLike = eqx.field(converter=as_rate, default=1.0)

    judges_itself: ClassVar[bool] = True

    def __check_init__(self):
        check_positive(self.scale, "scale", "IdentityInverse")

    def init(self, operator: lx.AbstractLinearOperator, options: dict[str, Any]):
        del options
        check_square(operator, "IdentityInverse")
        return static(None)

    def compute(self, state, vector, options):
        del state, options
        return tree_scale(self.scale, vector), lx.RESULTS.successful, {}

    def transpose(self, state, options):
        return state, options

    def conj(self, state, options):
        return state, options

    def assume_full_rank(self):
        return True


IdentityInverse.__init__.__doc__ = """**Arguments:**

- `scale`: the factor $c$, positive.
"""
