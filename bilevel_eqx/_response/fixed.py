"""The response that does not respond."""

import jax.numpy as jnp
import lineax as lx

from .._failure.results import RESULTS
from .._tree import tree_dtype, tree_struct, tree_zeros_like
from .base import AbstractResponse, Response, TransposedJacobian


class Fixed(AbstractResponse):
    r"""$y = $ the anchor, with Jacobian 0: the inner variables are taken as given.

    The hypergradient is then $F_x$ alone, that of simultaneous play.
    """

    def init(self, problem, x, anchor):
        return None

    def __call__(self, problem, x, anchor, state=None):
        def zero(_):
            return tree_zeros_like(anchor)

        jacobian = lx.FunctionLinearOperator(zero, tree_struct(x))
        pullback = TransposedJacobian(jacobian.T.mv)
        stats = {"inner_residual": jnp.zeros((), tree_dtype(anchor))}
        return Response(anchor, jacobian, RESULTS.successful, stats, pullback)

    def best_response(self, problem, x, anchor):
        return anchor, RESULTS.successful

    def reaches(self, problem, x, anchor):
        return False
