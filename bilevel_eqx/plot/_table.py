"""Several equilibria of one problem, side by side."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from .._trust.compare import Comparison
from ._axes import drawing
from ._style import CLASS_COLOURS


_FIGURES = ("F", "f", "|x|", "|y|", "|y - y0|")


def equilibrium_table(comparison: Comparison, axes: Axes | None = None) -> Axes:
    """Draws the table of a comparison: a row for each solution, with the objectives and
    the norms, and with its largest residual as an equilibrium of each kind.

    The colour is the residual: dark is far from an equilibrium of that kind. A frame is
    around that of its own kind.

    **Arguments:**

    - `comparison`: what [`bilevel_eqx.compare`][] has returned.
    - `axes`: matplotlib axes, by default those of a new figure.

    **Returns:**

    The axes.
    """
    widest = max(map(len, comparison.names))
    width = 0.075 * widest + 0.6 * len(_FIGURES) + 1.0 * len(comparison.solutions)
    with drawing(axes, (width, 0.34 * len(comparison.names) + 1.1)) as (ax,):
        _draw(ax, comparison)
    return ax


def _draw(ax: Axes, comparison: Comparison) -> None:
    rows = list(comparison.names)
    columns = [name for name in rows if name in comparison.solutions]
    # The unit of length is a column of figures. Those of residuals are wider.
    start, wide = len(_FIGURES), 1.7
    for i, name in enumerate(rows):
        if name not in comparison.solutions:
            text = "not computed: print the comparison for the reason"
            ax.text(0.1, i, text, va="center", style="italic", color="0.4")
            continue
        for j, figure in enumerate(_FIGURES):
            number = float(comparison.figures[name][figure])
            ax.text(j + 0.5, i, f"{number:.3g}", ha="center", va="center")
        for j, other in enumerate(columns):
            left = start + wide * j
            _cell(ax, left, i, wide, comparison, name, other)
    for j, figure in enumerate(_FIGURES):
        ax.text(j + 0.5, -0.72, figure, ha="center", va="center", weight="bold")
    for j, other in enumerate(columns):
        place = start + wide * (j + 0.5)
        short = other.partition("(")[0] if len(other) > 16 else other
        ax.text(place, -0.72, short, ha="center", va="center", weight="bold", size=7.5)
    if columns:
        right = start + wide * len(columns)
        title = "largest residual as an equilibrium of this kind  [no unit]"
        ax.text(right, -1.35, title, ha="right", va="center")
    ax.set(xlim=(0, start + wide * max(len(columns), 1)), ylim=(len(rows) - 0.5, -1.7))
    ax.set(xticks=[], yticks=range(len(rows)))
    ax.set_yticklabels(rows)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


# The residuals that have the palest and the darkest colour.
_PALEST, _DARKEST = 1e-8, 1.0


def _cell(
    ax: Axes,
    left: float,
    row: int,
    width: float,
    comparison: Comparison,
    name: str,
    other: str,
) -> None:
    certificate = comparison.certificates[name].get(other)
    middle = left + width / 2
    if certificate is None:
        ax.text(middle, row, "-", ha="center", va="center")
        return
    residual = float(certificate.largest)
    span = np.log(_DARKEST / _PALEST)
    # NaN is as dark as can be.
    share = np.log(max(residual, _PALEST) / _PALEST) / span
    share = float(np.clip(np.nan_to_num(share, nan=1.0), 0, 1))
    box = (left + 0.03, row - 0.44), width - 0.06, 0.88
    ax.add_patch(Rectangle(*box, color=CLASS_COLOURS[2], alpha=0.05 + 0.8 * share, lw=0))
    if name == other:
        ax.add_patch(Rectangle(*box, fill=False, ec=CLASS_COLOURS[0], lw=1.4))
    dark = share > 0.5
    text, colour = f"{residual:.0e}", "white" if dark else "black"
    ax.text(middle, row, text, ha="center", va="center", color=colour)
