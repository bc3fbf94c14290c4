"""The eigenvalues of the inner Hessian."""

import numpy as np
from matplotlib.axes import Axes

from .._trust.diagnose import CLEAR, Diagnosis
from ._axes import drawing, on_log_axis
from ._style import CLASS_COLOURS


def spectrum(diagnosis: Diagnosis, axes: Axes | None = None) -> Axes:
    """Draws the sizes of the eigenvalues of H, the largest first, and the cut below which
    they count as zero.

    **Arguments:**

    - `diagnosis`: what [`bilevel_eqx.diagnose`][] has returned. Where it has not
        decomposed H, its Ritz values are drawn.
    - `axes`: matplotlib axes, by default those of a new figure.

    **Returns:**

    The axes.
    """
    with drawing(axes, (4.6, 2.6)) as (ax,):
        _draw(ax, diagnosis)
    return ax


def _draw(ax: Axes, diagnosis: Diagnosis) -> None:
    order = np.argsort(-np.abs(diagnosis.eigenvalues))
    values, is_zero = diagnosis.eigenvalues[order], diagnosis.is_zero[order]
    sizes, floor = on_log_axis(np.append(values, diagnosis.cut))
    places = 1 + np.arange(values.size)
    kinds = {
        "positive": (~is_zero & (values > 0), "o", CLASS_COLOURS[2]),
        "negative": (~is_zero & (values < 0), "v", CLASS_COLOURS[0]),
        "count as zero": (is_zero, "x", CLASS_COLOURS[4]),
    }
    for label, (chosen, marker, colour) in kinds.items():
        if np.any(chosen):
            options = {"color": colour, "marker": marker, "s": 18, "zorder": 3}
            ax.scatter(places[chosen], sizes[:-1][chosen], label=label, **options)
    cut = float(sizes[-1])
    label = f"cut at {diagnosis.cut:.1e}"
    ax.axhline(cut, color="0.3", ls="--", lw=0.9, label=label)
    ax.axhspan(0.3 * floor, cut, color="0.5", alpha=0.12, lw=0)
    ax.set_yscale("log")
    ax.set_ylim(0.3 * floor, 5 * float(np.max(sizes)))
    what = "eigenvalue" if diagnosis.exact else "Ritz value"
    ax.set_xlabel(f"{what} of H, the largest first")
    ax.set_ylabel(r"size  [unit of $f$ / (unit of $y$)$^2$]")
    about = "" if diagnosis.exact else "about "
    rank = f"rank {about}{diagnosis.rank:,} of {diagnosis.num_variables:,}"
    clear = "clear" if diagnosis.margin >= CLEAR else "not clear"
    ax.set_title(f"{rank}, {clear} by a factor of {diagnosis.margin:.0e}")
    ax.locator_params(axis="x", integer=True)
    ax.legend(loc="best")
