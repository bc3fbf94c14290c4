"""Plots with matplotlib, which only this module imports."""

from ._planar import (
    data_points as data_points,
    decision_regions as decision_regions,
    trajectory as trajectory,
)
from ._style import CLASS_COLOURS as CLASS_COLOURS, house_style as house_style
