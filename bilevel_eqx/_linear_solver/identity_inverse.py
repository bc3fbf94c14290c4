"""The inverse Hessian taken as a multiple of the identity."""

from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import lineax as lx
from jaxtyping import ScalarLike

from .._arguments import as_rate, check_positive
from .._tree import tree_scale
from .misc import check_square


class IdentityInverse(lx.AbstractLinearSolver):
    r"""Approximates $H^{-1} \approx c I$, at the cost of no product with $H$.

    With $c$ the inner step size this is the hypergradient of one unrolled step
    ("T1-T2", one-step differentiation). It is one Neumann term.

    ??? cite "Reference"

        Luketina, Berglund, Greff and Raiko, *Scalable gradient-based tuning of
        continuous regularization hyperparameters*, ICML 2016.
    """

    scale: ScalarLike = eqx.field(converter=as_rate, default=1.0)

    def __check_init__(self):
        check_positive(self.scale, "scale", "IdentityInverse")

    def init(self, operator: lx.AbstractLinearOperator, options: dict[str, Any]):
        del options
        check_square(operator, "IdentityInverse")
        return eqxi.Static(None)

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

- `scale`: the multiple $c$ of the identity that stands for the inverse. Positive.
"""
