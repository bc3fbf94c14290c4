"""The registered pipelines."""

import optax

from .._equilibrium.cold_start import ColdStart
from .._equilibrium.nash import Nash
from .._equilibrium.optimistic import Optimistic
from .._equilibrium.pessimistic import Pessimistic
from .._equilibrium.proximal_equilibrium import ProximalEquilibrium
from .._equilibrium.stackelberg import Stackelberg
from .._equilibrium.warm_start import WarmStart
from .._inner_solver.projected_gradient import ProjectedGradient
from .._inner_solver.projection import Projection
from .._linear_solver.pseudoinverse import Pseudoinverse
from .._optimiser.lbfgs import LBFGS
from .._optimiser.projected_quasi_newton import ProjectedQuasiNewton
from .._problem.constraints import set_x, set_y
from .._problem.finite_sum import AbstractFiniteSumProblem, Level, num_samples
from .._response.aggregated import Aggregated
from .._response.implicit import Implicit
from .._response.minimum_displacement import MinimumDisplacement
from .._response.proximal import Proximal
from .estimators import MiniBatch, Momentum, SAGA, SARAH
from .gradient import GradientPipeline
from .null_space import NullSpaceAscent, NullSpaceDescent
from .penalty import PenaltyAscent
from .penalty_descent import PenaltyDescent
from .play import GradientPlay, ProximalPlay
from .registry import register
from .single_loop import SingleLoop
from .value_function import ValueFunctionDescent
from .zeroth_order import ZerothOrder


# L-BFGS has no rate to choose, and like gradient descent it moves x only within the
# span of the gradients, which is what selects among many outer solutions. It presumes
# that the gradient is that of the value: where that is only nearly so there is Adam.
# Where x is confined to a set a projection would spoil its steps.


def _optimiser(problem):
    return ProjectedQuasiNewton() if set_x(problem).confines else LBFGS()


def _solver(problem):
    return ProjectedGradient() if set_y(problem).confines else Projection()


def _implicit(equilibrium, problem):
    del equilibrium
    response = Implicit(_solver(problem), Pseudoinverse())
    return GradientPipeline(response, _optimiser(problem))


def _cold_start(equilibrium, problem):
    del equilibrium
    # `solve` certifies how near to the nearest minimum its answer is.
    response = MinimumDisplacement(selection_tolerance=None)
    return GradientPipeline(response, _optimiser(problem))


def _null_space_ascent(equilibrium, problem):
    # Which needs a ball. In any other set there is only the penalty.
    if equilibrium.radius is None:
        return PenaltyAscent()
    if set_x(problem).confines:
        return NullSpaceAscent(_optimiser(problem))
    return NullSpaceAscent()


def _warm_start(equilibrium, problem):
    if not equilibrium.partial:
        return _implicit(equilibrium, problem)
    response = Proximal(equilibrium.epsilon, _solver(problem), Pseudoinverse())
    return GradientPipeline(response, _optimiser(problem))


_newton = "1-2 Newton solves"


_vicol = "Vicol et al. 2021"


register(
    ColdStart,
    "minimum displacement",
    _cold_start,
    reference=f"{_vicol}, Def. 3.1",
    cost=f"{_newton}; +1 and 100 Hv a step along a curved S(x); n^2 or 70 n",
    demands="an inner minimum",
    default=True,
)


register(
    ColdStart,
    "implicit",
    _implicit,
    reference=f"{_vicol}, Table 1",
    cost=f"{_newton}; n^2 or 10 n",
    demands="an inner minimum; H independent of x",
)


register(
    WarmStart,
    "implicit",
    _warm_start,
    reference=f"{_vicol}, Algorithm 3",
    cost=f"{_newton}; n^2 or 10 n",
    demands="an inner minimum",
)


register(
    Optimistic,
    "null-space descent",
    lambda equilibrium, problem: NullSpaceDescent(_optimiser(problem)),
    reference="exact if linear-quadratic",
    cost=f"{_newton}; +1 and 100 Hv a step along S(x); n^2 or 10 n",
    demands="an inner minimum; F bounded on S(x)",
    default=True,
)


register(
    Optimistic,
    "value function",
    lambda equilibrium, problem: ValueFunctionDescent(),
    reference="BOME (Liu et al. 2022)",
    cost="13 gradients of f, 1 of F, 10 Hv; 5 n",
    demands="F bounded on S(x)",
)


register(
    Optimistic,
    "aggregation",
    lambda equilibrium, problem: GradientPipeline(Aggregated(50), optax.adam(0.05)),
    reference="BDA (Liu et al. 2020)",
    cost="50 gradients of f and F, and adjoints; 50 n",
    demands="F bounded on S(x)",
)


register(
    Pessimistic,
    "null-space ascent",
    _null_space_ascent,
    reference="Moré & Sorensen 1983",
    cost=f"{_newton}; +1 and 64-1024 Hv a step along S(x); n^2 or 130 n",
    demands="an inner minimum",
    default=True,
)


register(
    Pessimistic,
    "penalty",
    lambda equilibrium, problem: PenaltyAscent(),
    reference="SiPBA (2025)",
    cost="6 gradients of f, 2 of F; 8 n",
    demands="H independent of x, in a ball",
)


register(
    Stackelberg,
    "implicit",
    _implicit,
    reference="Bengio 2000; Pedregosa 2016",
    cost=f"{_newton}; n^2 or 10 n",
    demands="a positive definite H, or an isolated root",
    default=True,
)


#
# Single loops. The rates are defaults that do not diverge, and no more.
#


_BATCH = 64


def _batch_size(problem, level: Level) -> int | None:
    if not isinstance(problem, AbstractFiniteSumProblem):
        return None
    return min(_BATCH, num_samples(problem, level))


def _period(problem) -> int:
    """An epoch, so that all data cost as much as the batches in between."""
    batch_size = _batch_size(problem, "inner")
    return 1 if batch_size is None else -(-num_samples(problem, "inner") // batch_size)


def _register_single_loop(name, estimator, settings, reference, cost):
    def make(problem, damping):
        return SingleLoop(
            inner_batch=_batch_size(problem, "inner"),
            outer_batch=_batch_size(problem, "outer"),
            damping=damping,
            estimator=estimator(problem),
            **settings,
        )

    def damped(equilibrium, problem):
        return make(problem, equilibrium.epsilon)

    def undamped(equilibrium, problem):
        del equilibrium
        return make(problem, 0.0)

    told = {"reference": reference, "cost": cost}
    demands = "no project_y; its damping is epsilon"
    register(WarmStart, name, damped, demands=demands, **told)
    demands = "a positive definite H; no project_y"
    register(Stackelberg, name, undamped, demands=demands, **told)


_once = "1 gradient of f, 1 of F, 1 Hv, on batches"
_twice = "2 gradients of f, 2 of F, 2 Hv, on batches, and on all data once an epoch"
_ten_times = "11 gradients of f, 1 of F, 11 Hv, on batches; 6 n"


_ten_steps = {"inner_steps": 10, "adjoint_steps": 10}
_cold = {**_ten_steps, "warm_adjoint": False}


for _arguments in (
    ("SOBA", lambda p: MiniBatch(), {}, "Dagréou et al. 2022", f"{_once}; 6 n"),
    ("SABA", lambda p: SAGA(), {}, "Dagréou et al. 2022", f"{_once}; 4 n a batch"),
    ("SRBA", lambda p: SARAH(_period(p)), {}, "Dagréou et al. 2024", f"{_twice}; 11 n"),
    ("MA-SOBA", lambda p: Momentum(0.1), {}, "Chen et al. 2023", f"{_once}; 6 n"),
    ("AmIGO", lambda p: MiniBatch(), _ten_steps, "Arbel & Mairal 2022", _ten_times),
    ("stocBiO", lambda p: MiniBatch(), _cold, "Ji et al. 2021", _ten_times),
):
    _register_single_loop(*_arguments)


for _concept, _demands in (
    (Optimistic, "F bounded on S(x)"),
    (Stackelberg, "a positive definite H"),
):
    register(
        _concept,
        "F2SA",
        lambda equilibrium, problem: PenaltyDescent(),
        reference="F2SA (Kwon et al. 2023)",
        cost="22 gradients of f, 11 of F; 6 n",
        demands=_demands,
    )
    register(
        _concept,
        "PBGD",
        lambda equilibrium, problem: PenaltyDescent(penalty=10.0, growth=0.0, joint=True),
        reference="PBGD (Shen & Chen 2023)",
        cost="12 gradients of f, 1 of F; 6 n",
        demands=_demands,
    )


for _concept, _demands in (
    (WarmStart, "few outer variables"),
    (Stackelberg, "few outer variables; a positive definite H"),
):
    register(
        _concept,
        "PZOBO",
        lambda equilibrium, problem: ZerothOrder(),
        reference="PZOBO (Sow et al. 2022)",
        cost="110 gradients of f, 1 of F; 22 n",
        demands=_demands,
    )


register(
    Nash,
    "simultaneous",
    lambda equilibrium, problem: GradientPlay(),
    reference="Malitsky 2020",
    cost="2 gradients of f, 2 of F; 6 n",
    demands="a monotone game",
    default=True,
)


register(
    Nash,
    "alternating",
    lambda equilibrium, problem: GradientPlay(alternating=True),
    reference="after Malitsky 2020",
    cost="3 gradients of f, 3 of F; 6 n",
    demands="a monotone game",
)


register(
    ProximalEquilibrium,
    "proximal play",
    lambda equilibrium, problem: ProximalPlay(),
    reference="Farnia & Ozdaglar 2020",
    cost=f"{_newton}; n^2 or 10 n",
    demands="f = -F",
)
