"""One call for each object that this package returns."""

import functools as ft
from typing import Any

from .._equilibrium.base import Certificate
from .._solve.solution import Solution
from .._trust.compare import Comparison
from .._trust.diagnose import Diagnosis
from ._certificate import residuals
from ._history import history
from ._spectrum import spectrum
from ._table import equilibrium_table


@ft.singledispatch
def plot(result: Any, axes: Any = None) -> Any:
    """Draws the picture of what this package has returned.

    **Arguments:**

    - `result`: a [`bilevel_eqx.Solution`][] ([`bilevel_eqx.plot.history`][]), a
        [`bilevel_eqx.Certificate`][] ([`bilevel_eqx.plot.residuals`][]), a
        [`bilevel_eqx.reports.Comparison`][] ([`bilevel_eqx.plot.equilibrium_table`][]) or
        a [`bilevel_eqx.reports.Diagnosis`][] ([`bilevel_eqx.plot.spectrum`][]).
    - `axes`: matplotlib axes to draw in, by default those of a new figure. The picture of
        a solution takes two.

    **Returns:**

    The axes. `axes.figure.savefig("picture.png")` saves the picture.

    **Raises:**

    A `ValueError` for any other object. It is a `functools.singledispatch`: register a
    function for a class of your own by `plot.register`.
    """
    known = ", ".join(f"`{kind.__name__}`" for kind in _PICTURES)
    raise ValueError(
        f"`bilevel_eqx.plot.plot` has no picture of a `{type(result).__name__}`. It "
        f"draws {known}. For the regions of a classifier: `bilevel_eqx.plot.classifier`."
    )


_PICTURES: dict[type, Any] = {
    Solution: history,
    Certificate: residuals,
    Comparison: equilibrium_table,
    Diagnosis: spectrum,
}
for _kind, _picture in _PICTURES.items():
    plot.register(_kind, _picture)
