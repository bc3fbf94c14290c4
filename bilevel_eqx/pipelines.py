"""Pipelines that serve one concept each, the optimiser that they share, and parts.

[`bilevel_eqx.solve`][] finds them in the registry. They are here for users who need other
settings. [`bilevel_eqx.GradientPipeline`][], which serves most concepts, is in the
top-level package.
"""

from ._linear_solver.diagonal import Diagonal as Diagonal
from ._linear_solver.kronecker import Kronecker as Kronecker
from ._linear_solver.nystrom import Nystrom as Nystrom
from ._linear_solver.preconditioner import (
    AbstractPreconditioner as AbstractPreconditioner,
)
from ._optimiser.lbfgs import LBFGS as LBFGS
from ._optimiser.projected_quasi_newton import (
    ProjectedQuasiNewton as ProjectedQuasiNewton,
)
from ._optimiser.spectral_projected_gradient import (
    SpectralProjectedGradient as SpectralProjectedGradient,
)
from ._pipeline.estimators import (
    MiniBatch as MiniBatch,
    Momentum as Momentum,
    SAGA as SAGA,
    SARAH as SARAH,
)
from ._pipeline.null_space import (
    NullSpaceAscent as NullSpaceAscent,
    NullSpaceDescent as NullSpaceDescent,
)
from ._pipeline.penalty import PenaltyAscent as PenaltyAscent
from ._pipeline.penalty_descent import PenaltyDescent as PenaltyDescent
from ._pipeline.play import GradientPlay as GradientPlay, ProximalPlay as ProximalPlay
from ._pipeline.single_loop import SingleLoop as SingleLoop
from ._pipeline.value_function import ValueFunctionDescent as ValueFunctionDescent
from ._pipeline.zeroth_order import ZerothOrder as ZerothOrder
from ._response.aggregated import Aggregated as Aggregated
