from ._anti_distillation import (
    anti_distillation as anti_distillation,
    AntiDistillation as AntiDistillation,
    fixed_point as fixed_point,
    fourier_features as fourier_features,
    neumann_filter as neumann_filter,
    proximal_filter as proximal_filter,
    pseudoinverse_filter as pseudoinverse_filter,
)
from ._rings import (
    ConcentricRings as ConcentricRings,
    rings as rings,
    SquaredRings as SquaredRings,
)
