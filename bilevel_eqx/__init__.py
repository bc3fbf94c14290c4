import importlib.metadata

from ._check_hypergradient import (
    check_hypergradient as check_hypergradient,
    CheckedResponse as CheckedResponse,
    HypergradientCheck as HypergradientCheck,
)
from ._checkpoint import load as load, save as save
from ._compare import (
    compare as compare,
    Comparison as Comparison,
    retrain_gap as retrain_gap,
    RetrainGap as RetrainGap,
)
from ._diagnose import diagnose as diagnose, Diagnosis as Diagnosis
from ._equilibrium import (
    AbstractEquilibrium as AbstractEquilibrium,
    Certificate as Certificate,
    certify as certify,
    ColdStart as ColdStart,
    Nash as Nash,
    Optimistic as Optimistic,
    Pessimistic as Pessimistic,
    ProximalEquilibrium as ProximalEquilibrium,
    Stackelberg as Stackelberg,
    WarmStart as WarmStart,
)
from ._error_bound import ErrorBound as ErrorBound
from ._hypergradient import (
    best_response as best_response,
    Hypergradient as Hypergradient,
    hypergradient as hypergradient,
)
from ._inner_solver import (
    GradientDescent as GradientDescent,
    ProjectedGradient as ProjectedGradient,
    Projection as Projection,
)
from ._linear_solver import (
    IdentityInverse as IdentityInverse,
    Neumann as Neumann,
    Pseudoinverse as Pseudoinverse,
    TruncatedCG as TruncatedCG,
)
from ._operators import (
    cross_derivative as cross_derivative,
    inner_hessian as inner_hessian,
    response_jacobian as response_jacobian,
)
from ._pipeline import (
    AbstractPipeline as AbstractPipeline,
    GradientPipeline as GradientPipeline,
    GradientPlay as GradientPlay,
    NullSpaceAscent as NullSpaceAscent,
    NullSpaceDescent as NullSpaceDescent,
    PenaltyAscent as PenaltyAscent,
    ProximalPlay as ProximalPlay,
    ValueFunctionDescent as ValueFunctionDescent,
)
from ._problem import (
    AbstractBilevelProblem as AbstractBilevelProblem,
    AbstractLeastSquaresProblem as AbstractLeastSquaresProblem,
    BilevelProblem as BilevelProblem,
    LeastSquaresProblem as LeastSquaresProblem,
)
from ._registry import (
    default_pipeline as default_pipeline,
    register as register,
    registered as registered,
)
from ._response import (
    AbstractResponse as AbstractResponse,
    Aggregated as Aggregated,
    Fixed as Fixed,
    Implicit as Implicit,
    MinimumDisplacement as MinimumDisplacement,
    Proximal as Proximal,
    Response as Response,
    Unrolled as Unrolled,
)
from ._results import RESULTS as RESULTS
from ._solve import Solution as Solution, solve as solve
from ._spectral_projected_gradient import (
    spectral_projected_gradient as spectral_projected_gradient,
)


__version__ = importlib.metadata.version("bilevel_eqx")
