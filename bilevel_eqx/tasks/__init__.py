"""The tasks of the paper, as problems with their starting points."""

from ._anti_distillation import (
    anti_distillation as anti_distillation,
    anti_distillation_network as anti_distillation_network,
    AntiDistillation as AntiDistillation,
    AntiDistillationNetwork as AntiDistillationNetwork,
    fixed_point as fixed_point,
    fourier_features as fourier_features,
    neumann_filter as neumann_filter,
    proximal_filter as proximal_filter,
    pseudoinverse_filter as pseudoinverse_filter,
)
from ._images import (
    image_distillation as image_distillation,
    ImageDistillation as ImageDistillation,
)
from ._line import (
    kaczmarz_step as kaczmarz_step,
    line as line,
    meeting_point as meeting_point,
    MovingDatapoint as MovingDatapoint,
)
from ._rings import (
    ConcentricRings as ConcentricRings,
    rings as rings,
    SquaredRings as SquaredRings,
)
