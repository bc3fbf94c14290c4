"""The constant response."""

from typing import ClassVar

import jax.numpy as jnp
import lineax as lx

from .._failure.results import RESULTS
from .._tree import tree_dtype, tree_struct, tree_zeros_like
from .base import AbstractResponse, Response, TransposedJacobian


class Fixed(AbstractResponse):
    r"""$y$ is the anchor, with Jacobian 0: the inner variables do not depend on x.

    The hypergradient is then $F_x$ alone, that of simultaneous play.
    """

    answers_itself: ClassVar[bool] = True

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
