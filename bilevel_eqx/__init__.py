"""Bilevel optimisation in JAX where you name the equilibrium."""

from importlib import import_module as _import_module
from importlib.metadata import version as _version
from typing import Any as _Any

from . import pipelines as pipelines, reports as reports
from ._derivatives.public import (
    cross_derivative as cross_derivative,
    inner_hessian as inner_hessian,
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
    hypergradient as hypergradient,
)
from ._inner_solver.gradient_descent import GradientDescent as GradientDescent
from ._inner_solver.projected_gradient import ProjectedGradient as ProjectedGradient
from ._inner_solver.projection import Projection as Projection
from ._linear_solver.identity_inverse import IdentityInverse as IdentityInverse
from ._linear_solver.neumann import Neumann as Neumann
from ._linear_solver.pseudoinverse import Pseudoinverse as Pseudoinverse
from ._linear_solver.truncated_cg import TruncatedCG as TruncatedCG

# Imported for its effect: it fills the registry.
from ._pipeline import catalogue as _catalogue  # noqa: F401
from ._pipeline.base import AbstractPipeline as AbstractPipeline
from ._pipeline.gradient import GradientPipeline as GradientPipeline
from ._pipeline.registry import (
    default_pipeline as default_pipeline,
    register as register,
    registered as registered,
)
from ._problem.base import (
    AbstractBilevelProblem as AbstractBilevelProblem,
    BilevelProblem as BilevelProblem,
)
from ._problem.finite_sum import (
    AbstractFiniteSumProblem as AbstractFiniteSumProblem,
    FiniteSumProblem as FiniteSumProblem,
)
from ._problem.least_squares import (
    AbstractLeastSquaresProblem as AbstractLeastSquaresProblem,
    LeastSquaresProblem as LeastSquaresProblem,
)
from ._problem.root import (
    AbstractRootProblem as AbstractRootProblem,
    FixedPointProblem as FixedPointProblem,
    RootProblem as RootProblem,
)
from ._response.base import AbstractResponse as AbstractResponse, Response as Response
from ._response.fixed import Fixed as Fixed
from ._response.implicit import Implicit as Implicit
from ._response.jacobian import response_jacobian as response_jacobian
from ._response.minimum_displacement import MinimumDisplacement as MinimumDisplacement
from ._response.proximal import Proximal as Proximal
from ._response.unrolled import Unrolled as Unrolled
from ._solve.save import load as load, save as save
from ._solve.solution import Solution as Solution
from ._solve.solve import solve as solve
from ._trust.check_hypergradient import check_hypergradient as check_hypergradient
from ._trust.compare import compare as compare
from ._trust.diagnose import diagnose as diagnose
from ._trust.error_bound import error_bound as error_bound
from ._trust.retrain_gap import retrain_gap as retrain_gap


__version__ = _version("bilevel_eqx")


# Now, and not when it is asked for: `tasks` and `plot` come only on request.
_names = sorted(name for name in globals() if not name.startswith("_"))


def __dir__() -> list[str]:
    return list(_names)


def __getattr__(name: str) -> _Any:
    # On request, for the sake of matplotlib and of the data.
    if name in ("plot", "tasks"):
        return _import_module(f"{__name__}.{name}")
    # What lives in a submodule is found here too, so that `blx.SingleLoop` works.
    for home in (pipelines, reports):
        if not name.startswith("_") and hasattr(home, name):
            return getattr(home, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
