"""The look of the figures."""

import contextlib
from collections.abc import Iterator
from typing import Any

import matplotlib as mpl
from cycler import cycler


# Their lightness differs clearly, so that they differ in greyscale too.
CLASS_COLOURS = ("#c2185b", "#3fa796", "#1f3b73", "#e3a53b", "#7a7a7a")


"""One colour for each class."""


@contextlib.contextmanager
def house_style() -> Iterator[None]:
    """A context in which figures look like those of a paper."""
    style: dict[Any, Any] = {
        "font.family": "serif",
        "mathtext.fontset": "dejavuserif",
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.labelsize": 9,
        "legend.fontsize": 7.5,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "axes.linewidth": 0.6,
        "axes.prop_cycle": cycler(color=(*CLASS_COLOURS, "black")),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "legend.frameon": False,
        "lines.linewidth": 1.3,
        "figure.dpi": 120,
        "savefig.dpi": 200,
        "savefig.bbox": "tight",
    }
    with mpl.rc_context(style):
        yield
