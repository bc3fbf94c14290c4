"""What `solve` returns."""

from typing import Any, Generic

import equinox as eqx
from jaxtyping import PyTree, Scalar

from .._custom_types import X, Y
from .._equilibrium.base import Certificate
from .._failure.results import RESULTS


class Solution(eqx.Module, Generic[X, Y]):
    """The answer of [`bilevel_eqx.solve`][].

    **Attributes:**

    - `x`: the outer variables.
    - `y`: the inner variables.
    - `value`: the outer objective at `(x, y)`.
    - `result`: one of [`bilevel_eqx.RESULTS`][].
    - `certificate`: how far `(x, y)` is from the equilibrium asked for, a
        [`bilevel_eqx.Certificate`][]. This is not whether the algorithm has converged:
        an algorithm that truncates converges to another point.
    - `history`: what `record` returned, stacked along a leading axis with one entry for
        every `save_every` steps. Under `vmap`, where the number of entries cannot depend
        on the run, those that were never reached are NaN, or zero for integers.
    - `stats`: `num_steps`, the steps taken; and the last `outer_residual` and
        `inner_residual` of the algorithm, which say whether it has come to rest.
    - `state`: all that is needed to go on: pass it as `solve(..., state=...)`.
    """

    x: X
    y: Y
    value: Scalar
    result: RESULTS
    certificate: Certificate
    history: PyTree
    stats: dict[str, Any]
    state: Any
