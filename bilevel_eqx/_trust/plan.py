"""The cheapest response that is accurate enough, by measurement."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import PyTree

from .._arguments import as_variables, check_count, check_positive
from .._compat import is_traced
from .._failure.results import is_failure
from .._hypergradient import answered
from .._inner_solver.projection import Projection
from .._linalg.power_iteration import DENSE_SIZE
from .._linalg.precision import in_full_precision_if_small
from .._linear_solver.diagonal import Diagonal
from .._linear_solver.neumann import Neumann
from .._linear_solver.nystrom import Nystrom
from .._linear_solver.pseudoinverse import Pseudoinverse
from .._linear_solver.truncated_cg import TruncatedCG
from .._problem.base import AbstractBilevelProblem
from .._problem.checks import check_problem
from .._problem.constraints import set_y
from .._problem.least_squares import AbstractLeastSquaresProblem
from .._problem.root import AbstractRootProblem
from .._response.base import AbstractResponse
from .._response.implicit import Implicit
from .._response.unrolled import Unrolled
from .._text import aligned, as_code
from .diagnose import diagnose


# The largest number of products or steps that is tried.
_MOST = 1024


# A method that takes so many times as long as the best one so far is left, unless that is
# a time of so many seconds, in which there is noise.
_PATIENCE, _SHORT = 4, 0.05


class Planned(NamedTuple):
    """A response that was measured.

    - `response`: the response, as an object.
    - `code`: the code that makes it.
    - `error`: of its hypergradient, relative to the reference.
    - `seconds`: the time of the fastest of some calls: others may use the processor.
    - `bytes`: its temporary memory, where the compiler says, and `None` elsewhere.
    - `verdict`: why it was not taken, or an empty text.
    """

    response: AbstractResponse
    code: str
    error: float
    seconds: float
    bytes: int | None
    verdict: str


class Plan(eqx.Module):
    """What [`bilevel_eqx.reports.plan`][] returns. Print it.

    **Attributes:**

    - `response`: the cheapest response that is accurate enough and fits in the memory, as
        an object: give it to [`bilevel_eqx.hypergradient`][] or to
        [`bilevel_eqx.GradientPipeline`][].
    - `reason`: the reason, in a sentence.
    - `measured`: all that was measured, each with `response`, `code`, `error`, `seconds`,
        `bytes`, and the `verdict` on it.
    - `reference`: the code of the response that the errors are relative to.
    """

    response: AbstractResponse
    reason: str = eqx.field(static=True)
    measured: tuple[Planned, ...]
    reference: str = eqx.field(static=True)

    def __str__(self):
        header = ["", "error", "seconds", "MiB", ""]
        rows = [
            [
                m.code,
                f"{m.error:.1e}",
                f"{m.seconds:.2g}",
                "" if m.bytes is None else f"{m.bytes / 2**20:.1f}",
                m.verdict or "<- the plan",
            ]
            for m in sorted(self.measured, key=lambda m: m.seconds)
        ]
        table = aligned([header, *rows], "<>>><", ruled=True)
        return "\n".join([self.reason, "", *table])


@in_full_precision_if_small("y")
def plan(
    problem: AbstractBilevelProblem,
    x: PyTree,
    y: PyTree,
    *,
    error: float,
    memory: int | None = None,
) -> Plan:
    r"""The response whose hypergradient has at most this error, at the least measured
    cost.

    At an inner minimum the candidates are implicit: a decomposition (for a sum of
    squares, of the Jacobian of its residual), conjugate gradients without and with a
    preconditioner ([`bilevel_eqx.pipelines.Diagonal`][],
    [`bilevel_eqx.pipelines.Nystrom`][]), and a Neumann series. Elsewhere they solve the
    inner problem first, and unrolled gradient descent is one more. Of each the smallest
    number of products or steps is searched that has the error, and then its time is
    measured, on this device.

    The error is relative to a reference: the decomposition if the inner problem is small
    or a sum of squares, and otherwise preconditioned conjugate gradients with up to 1024
    products, whose own error is then estimated by that of half as many.

    This compiles about two programs for each candidate, and runs each some 20 times. The
    plan is one for this point. At another one the error is another one, and
    [`bilevel_eqx.error_bound`][] bounds it.

    **Arguments:**

    - `problem`: the bilevel problem.
    - `x`: the outer variables, a pytree of floating-point arrays.
    - `y`: the inner variables, a pytree of floating-point arrays. An inner minimum, if
        it should be used as one.
    - `error`: the relative error of the hypergradient in the two-norm that is accepted.
        Keyword only argument.
    - `memory`: how many bytes of temporary memory a call may take; `None`, the default,
        is no bound. Keyword only argument.

    **Returns:**

    A [`bilevel_eqx.reports.Plan`][].

    **Raises:**

    A `ValueError` if an argument is not as above, if y is confined to a set or is a root,
    inside of `jax.jit` and other transformations, where no time can be measured, or if no
    candidate has the error.
    """
    _check(problem, x, y, error, memory)
    x, y = as_variables(x, "x"), as_variables(y, "y")
    check_problem(problem, x, y)
    at = problem, x, y
    diagnosis = diagnose(problem, x, y)
    solver = None if diagnosis.at_minimum else Projection()
    exact = _exact(problem, y, solver, diagnosis)
    reference = _Program(exact, at)
    target, right = reference()
    if not right:
        raise ValueError(
            f"`plan` has nothing to compare with: `{as_code(exact)}` fails here. Call "
            "`hypergradient` with it to see how, or `print(diagnose(problem, x, y))`."
        )
    own = _own_error(exact, target, at)
    if own > error:
        raise ValueError(
            f"`plan(error={error:g})` asks for more than its reference can tell: the "
            f"error of `{as_code(exact)}` is about {own:.1e}. Ask for a larger error, or "
            "pass float64 arrays."
        )
    measured: list[Planned] = []
    for family in _families(diagnosis, solver, exact, memory):
        best = min((m.seconds for m in measured if not m.verdict), default=np.inf)
        measured.append(_measure(family, at, target, error, memory, best))
    good = [m for m in measured if not m.verdict]
    if not good:
        lines = "; ".join(f"`{m.code}` {m.verdict}" for m in measured)
        raise ValueError(
            f"`plan` found no response with an error of at most {error:g}"
            f"{'' if memory is None else f' in {memory:,} bytes'}: {lines}. Allow a "
            "larger error or more memory."
        )
    chosen = min(good, key=lambda m: m.seconds)
    # Only one of them is the plan.
    measured = [
        m if m is chosen or m.verdict else m._replace(verdict="slower") for m in measured
    ]
    place = "at this inner minimum"
    if not diagnosis.at_minimum:
        place = "from this y, which is not an inner minimum"
    reason = (
        f"{chosen.code} has an error of {chosen.error:.1e} {place}, in "
        f"{chosen.seconds:.2g} s a call. It is the fastest of {len(measured)} methods "
        f"for an error of {error:g}."
    )
    return Plan(chosen.response, reason, tuple(measured), as_code(exact))


def _check(problem, x, y, error, memory) -> None:
    if any(map(is_traced, jtu.tree_leaves((problem, x, y, error)))):
        raise ValueError(
            "`plan` measures times, which it cannot inside of `jax.jit`, `jax.vmap` or a "
            "derivative. Call it outside, and use its `response` inside."
        )
    check_positive(error, "error", "plan")
    if memory is not None:
        check_count(memory, "memory", "plan")
    if isinstance(problem, AbstractRootProblem) or set_y(problem).confines:
        raise ValueError(
            "`plan` is for inner minima without constraints: conjugate gradients and its "
            "preconditioner need a positive semidefinite Hessian."
        )


#
# Candidates
#


class _Family(NamedTuple):
    """Responses, by a number of products or steps; or one."""

    make: Callable[[Any], AbstractResponse]
    counted: bool
    # Whether one program serves for all numbers.
    one_program: bool = True
    written: str = ""


def _exact(problem, y, solver, diagnosis) -> AbstractResponse:
    size = sum(leaf.size for leaf in jtu.tree_leaves(y))
    if size <= DENSE_SIZE or isinstance(problem, AbstractLeastSquaresProblem):
        return Implicit(solver, Pseudoinverse())
    return Implicit(solver, TruncatedCG(_MOST, preconditioner=_low_rank(diagnosis)))


def _least(diagnosis) -> float:
    """The smallest curvature that matters."""
    return max(float(diagnosis.smallest_nonzero), 1e-6 * float(diagnosis.largest)) or 1.0


def _low_rank(diagnosis) -> Nystrom:
    # What is left of H without its largest eigenvalues is about as large as the rest.
    rank = max(1, min(40, diagnosis.num_variables // 4))
    return Nystrom(rank, float(f"{_least(diagnosis):.1g}"))


def _diagonal(diagnosis) -> Diagonal:
    # Between the smallest curvature and the noise of so few probes, which is a few
    # hundredths of the largest.
    noise = 0.03 * float(diagnosis.largest) or 1.0
    return Diagonal(5, float(f"{(noise * _least(diagnosis)) ** 0.5:.1g}"))


def _families(diagnosis, solver, exact, memory) -> list[_Family]:
    step_size = float(f"{diagnosis.step_size:.2g}")

    def conjugate_gradients(preconditioner):
        return lambda count: Implicit(
            solver, TruncatedCG(count, preconditioner=preconditioner)
        )

    def series(count):
        return Implicit(solver, Neumann(count, step_size))

    def unrolled(count):
        return Unrolled(optax.sgd(step_size), count, memory=memory)

    preconditioners = None, _diagonal(diagnosis), _low_rank(diagnosis)
    families = [_Family(conjugate_gradients(p), True) for p in preconditioners]
    # What a traced number of terms would decompose is summed with a known one.
    families.append(_Family(series, True, one_program=False))
    if isinstance(exact.linear_solver, Pseudoinverse):
        families.insert(0, _Family(lambda _: exact, False))
    if solver is not None:
        written = f"optax.sgd({step_size:g})"
        families.append(_Family(unrolled, True, False, written))
    return families


#
# Measurement
#


class _Program:
    """A compiled hypergradient, whose numbers may change."""

    def __init__(self, response: AbstractResponse, at: tuple):
        arrays, static = eqx.partition((at, response), eqx.is_array)

        def run(arrays):
            (problem, x, y), response = eqx.combine(arrays, static)
            out, *_ = answered(problem, x, y, response)
            return out.gradient, ~is_failure(out.result)

        self._arrays = arrays
        self._compiled = jax.jit(run).lower(arrays).compile()

    def __call__(self, response: AbstractResponse | None = None):
        arrays = self._arrays
        if response is not None:
            arrays = arrays[0], eqx.filter(response, eqx.is_array)
        gradient, right = jax.block_until_ready(self._compiled(arrays))
        return _flat(gradient), bool(right)

    @property
    def bytes(self) -> int | None:
        """Its temporary memory."""
        return getattr(self._compiled.memory_analysis(), "temp_size_in_bytes", None)

    def seconds(self, response: AbstractResponse | None = None) -> float:
        """The time of the fastest of some calls."""
        times = []
        while len(times) < 3 or (sum(times) < 0.05 and len(times) < 50):
            start = time.perf_counter()
            self(response)
            times.append(time.perf_counter() - start)
        return min(times)


def _flat(gradient: PyTree) -> np.ndarray:
    leaves = [np.asarray(u, np.float64).ravel() for u in jtu.tree_leaves(gradient)]
    return np.concatenate(leaves)


def _distance(found: np.ndarray, target: np.ndarray) -> float:
    size = np.linalg.norm(target)
    distance = np.linalg.norm(found - target)
    # Not a quotient of two zeros.
    relative = distance if size == 0 else distance / size
    return float(relative) if np.isfinite(relative) else np.inf


def _own_error(exact, target, at) -> float:
    if isinstance(exact.linear_solver, Pseudoinverse):
        return 0.0
    number = lambda response: response.linear_solver.num_steps  # noqa: E731
    half = eqx.tree_at(number, exact, _MOST // 2)
    return _distance(_Program(half, at)()[0], target)


def _measure(family: _Family, at, target, error, memory, best) -> Planned:
    count, verdict = 1, ""
    if family.counted:
        count, verdict = _fewest(family, at, target, error, best)
    response = family.make(count)
    code = as_code(response, optimiser=family.written)
    if verdict:
        return Planned(response, code, np.inf, np.inf, None, verdict)
    program = _Program(response, at)
    found, right = program()
    reached, size = _distance(found, target), program.bytes
    if not right:
        verdict = "fails"
    elif reached > error:
        verdict = "not accurate enough"
    elif memory is not None and size is not None and size > memory:
        verdict = "too much memory"
    return Planned(response, code, reached, program.seconds(), size, verdict)


def _fewest(family: _Family, at, target, error, best) -> tuple[int, str]:
    """The smallest number with which the error is reached; or the last one that was
    tried, and why no larger one was."""
    program = _Program(family.make(jnp.array(1)), at) if family.one_program else None

    def at_count(count: int) -> tuple[_Program, AbstractResponse | None]:
        if program is None:
            return _Program(family.make(count), at), None
        return program, family.make(jnp.array(count))

    def reaches(run: _Program, response: AbstractResponse | None) -> bool:
        found, right = run(response)
        return right and _distance(found, target) <= error

    high, limit = 1, max(_PATIENCE * best, _SHORT)
    while not reaches(*(tried := at_count(high))):
        if high >= _MOST:
            return high, "not accurate enough"
        run, response = tried
        if run.seconds(response) > limit:
            return high, "too slow before it was accurate enough"
        # A program for each number takes longer to compile than to run.
        high = min(_MOST, high * (2 if family.one_program else 4))
    low = high // (2 if family.one_program else 4)
    # To a tenth: what is left is less than what times vary by.
    while program is not None and high - low > max(1, high // 10):
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(*at_count(middle)) else (middle, high)
    return high, ""
