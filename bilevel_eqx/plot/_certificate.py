"""How far a point is from an equilibrium."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from .._equilibrium.base import Certificate
from ._axes import check_known, drawing, legend_below, on_log_axis
from ._style import CLASS_COLOURS


def residuals(certificate: Certificate, axes: Axes | None = None) -> Axes:
    """Draws the residuals of a certificate, with what each of them measures.

    They have no units, and are zero at an equilibrium. A residual that is exactly zero is
    drawn as a ring, at the left end. If they were estimated on some of the data, a line
    shows twice the standard error to both sides.

    **Arguments:**

    - `certificate`: a [`bilevel_eqx.Certificate`][].
    - `axes`: matplotlib axes, by default those of a new figure.

    **Returns:**

    The axes.

    **Raises:**

    A `ValueError` for the certificate of a batch.
    """
    check_known(certificate, "plot.residuals")
    if any(np.ndim(value) > 0 for value in certificate.residuals.values()):
        raise ValueError(
            "`plot.residuals` draws one certificate, and this one is of a batch. Take an "
            "element: `jax.tree.map(lambda leaf: leaf[0], certificate)`."
        )
    with drawing(axes, (5.2, 0.45 * len(certificate.meanings) + 0.9)) as (ax,):
        _draw(ax, certificate)
    return ax


def _draw(ax: Axes, certificate: Certificate) -> None:
    # In the order of the printed table.
    names = list(certificate.meanings)
    values = np.array([float(certificate.residuals[name]) for name in names])
    sizes, floor = on_log_axis(values)
    rows = np.arange(len(names))[::-1]
    left = min(0.3 * floor, 1e-10)
    colour = CLASS_COLOURS[2]
    ax.hlines(rows, left, sizes, color=colour, lw=1.3)
    fills = [colour if value > 0 else "white" for value in values]
    ax.scatter(sizes, rows, s=26, c=fills, edgecolors=colour, zorder=3)
    if certificate.standard_errors is not None:
        errors = [2 * float(certificate.standard_errors[name]) for name in names]
        low = np.maximum(values - errors, left)
        ax.hlines(rows, low, values + errors, color=CLASS_COLOURS[0], lw=3, alpha=0.6)
    for row, name, value in zip(rows, names, values):
        meaning = certificate.meanings[name]
        ax.text(left, row + 0.18, f" {meaning}", va="bottom", size=6.5, color="0.35")
        ax.text(1.5, row, f" {value:.0e}" if value > 0 else f" {value:g}", va="center")
    ax.set_xscale("log")
    ax.set(xlim=(left, 1.5), ylim=(-0.5, len(names) - 0.2), yticks=rows)
    ax.set_yticklabels(names)
    ax.set_xlabel("residual  [no unit: a share between 0 and 1]")
    ax.set_title(f"Certificate for {certificate.concept}")
    handles = [_marker(colour, colour, "residual")]
    if np.any(values == 0):
        handles.append(_marker("white", colour, "exactly zero"))
    if certificate.standard_errors is not None:
        label = "± 2 standard errors"
        handles.append(Line2D([], [], color=CLASS_COLOURS[0], lw=3, label=label))
    legend_below(ax, 32, handles=handles, ncols=3)


def _marker(fill: str, edge: str, label: str) -> Line2D:
    options = {"marker": "o", "ls": "", "ms": 5, "mfc": fill, "mec": edge}
    return Line2D([], [], label=label, **options)
