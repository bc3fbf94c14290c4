import importlib.metadata

from ._derivatives.public import (
    cross_derivative as cross_derivative,
    inner_hessian as inner_hessian,
    response_jacobian as response_jacobian,
)
from ._equilibrium.base import (
    AbstractEquilibrium as AbstractEquilibrium,
    Certificate as Certificate,
    certify as certify,
)
from ._equilibrium.cold_start import ColdStart as ColdStart
from ._equilibrium.nash import Nash as Nash
from ._equilibrium.optimistic import Optimistic as Optimistic
from ._equilibrium.pessimistic import Pessimistic as Pessimistic
from ._equilibrium.proximal_equilibrium import ProximalEquilibrium as ProximalEquilibrium
from ._equilibrium.stackelberg import Stackelberg as Stackelberg
from ._equilibrium.warm_start import WarmStart as WarmStart
from ._failure.results import RESULTS as RESULTS
from ._hypergradient import (
    best_response as best_response,
    Hypergradient as Hypergradient,
    hypergradient as hypergradient,
)
from ._inner_solver.gradient_descent import GradientDescent as GradientDescent
from ._inner_solver.projected_gradient import ProjectedGradient as ProjectedGradient
from ._inner_solver.projection import Projection as Projection
from ._linear_solver.identity_inverse import IdentityInverse as IdentityInverse
from ._linear_solver.neumann import Neumann as Neumann
from ._linear_solver.pseudoinverse import Pseudoinverse as Pseudoinverse
from ._linear_solver.truncated_cg import TruncatedCG as TruncatedCG
from ._optimiser.spectral_projected_gradient import (
    spectral_projected_gradient as spectral_projected_gradient,
)

# Imported for what it does: it fills the registry.
from ._pipeline import catalogue as _catalogue  # noqa: F401
from ._pipeline.base import AbstractPipeline as AbstractPipeline
from ._pipeline.gradient import GradientPipeline as GradientPipeline
from ._pipeline.null_space import (
    NullSpaceAscent as NullSpaceAscent,
    NullSpaceDescent as NullSpaceDescent,
)
from ._pipeline.penalty import PenaltyAscent as PenaltyAscent
from ._pipeline.play import GradientPlay as GradientPlay, ProximalPlay as ProximalPlay
from ._pipeline.registry import (
    default_pipeline as default_pipeline,
    register as register,
    registered as registered,
)
from ._pipeline.value_function import ValueFunctionDescent as ValueFunctionDescent
from ._problem.base import (
    AbstractBilevelProblem as AbstractBilevelProblem,
    BilevelProblem as BilevelProblem,
)
from ._problem.least_squares import (
    AbstractLeastSquaresProblem as AbstractLeastSquaresProblem,
    LeastSquaresProblem as LeastSquaresProblem,
)
from ._response.aggregated import Aggregated as Aggregated
from ._response.base import AbstractResponse as AbstractResponse, Response as Response
from ._response.fixed import Fixed as Fixed
from ._response.implicit import Implicit as Implicit
from ._response.minimum_displacement import MinimumDisplacement as MinimumDisplacement
from ._response.proximal import Proximal as Proximal
from ._response.unrolled import Unrolled as Unrolled
from ._solve.checkpoint import load as load, save as save
from ._solve.solution import Solution as Solution
from ._solve.solve import solve as solve
from ._trust.check_hypergradient import (
    check_hypergradient as check_hypergradient,
    CheckedResponse as CheckedResponse,
    HypergradientCheck as HypergradientCheck,
)
from ._trust.compare import compare as compare, Comparison as Comparison
from ._trust.diagnose import diagnose as diagnose, Diagnosis as Diagnosis
from ._trust.error_bound import ErrorBound as ErrorBound
from ._trust.retrain_gap import retrain_gap as retrain_gap, RetrainGap as RetrainGap


__version__ = importlib.metadata.version("bilevel_eqx")
