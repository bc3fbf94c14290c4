"""Pictures with matplotlib, which only this package imports."""

try:
    import matplotlib as _matplotlib  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "`bilevel_eqx.plot` draws with matplotlib, which is not installed: "
        "`pip install matplotlib`, or install this package with its extra `plot`.",
        name="matplotlib",
    ) from error

from ._certificate import residuals as residuals
from ._gif import distillation_gif as distillation_gif
from ._history import history as history
from ._planar import (
    classifier as classifier,
    data_points as data_points,
    decision_regions as decision_regions,
    legend_handles as legend_handles,
    trajectory as trajectory,
)
from ._plot import plot as plot
from ._spectrum import spectrum as spectrum
from ._style import CLASS_COLOURS as CLASS_COLOURS, house_style as house_style
from ._table import equilibrium_table as equilibrium_table
