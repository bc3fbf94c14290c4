"""Comparison of hypergradients with finite differences, on the user's problem."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import optax
from jaxtyping import PRNGKeyArray, PyTree

from .._arguments import as_variables, check_count, check_key
from .._compat import called_once
from .._derivatives.first import inner_gradient
from .._derivatives.post_mortem import kink_met
from .._derivatives.reverse_only import reverse_only
from .._failure.results import is_failure, RESULTS
from .._hypergradient import hypergradient
from .._inner_solver.projected_gradient import ProjectedGradient
from .._inner_solver.projection import Projection
from .._linalg.eigenbasis import eigenbasis, singular_values
from .._linalg.precision import in_full_precision
from .._linear_solver.neumann import Neumann
from .._linear_solver.pseudoinverse import Pseudoinverse
from .._linear_solver.truncated_cg import TruncatedCG
from .._mesh import on_auto_axes
from .._problem.base import AbstractBilevelProblem
from .._problem.checks import check_problem
from .._problem.constraints import set_y
from .._problem.root import AbstractRootProblem, FixedPointProblem
from .._response.base import AbstractResponse
from .._response.implicit import Implicit
from .._response.minimum_displacement import MinimumDisplacement
from .._response.unrolled import Unrolled
from .._solution_set.stationarity import stationarity
from .._text import aligned, as_code
from .._tree import nonzero, tree_axpy, tree_dot, tree_dtype, tree_norm, tree_sub


# Relative errors: a hypergradient is right below the first, an approximation up to the
# second, and wrong above.
_RIGHT = 1e-3


_CLOSE = 0.1


@dataclasses.dataclass(frozen=True)
class CheckedResponse:
    """One response of a [`bilevel_eqx.reports.HypergradientCheck`][].

    **Attributes:**

    - `errors`: a dictionary from the kind of start (`"cold"`, `"warm"`) to the relative
        error of the hypergradient along all directions.
    - `cosines`: the same for the cosine of the angle to the finite differences.
    - `inner_residual`: the norm of the gradient that the response assumes to be zero.
    - `linear_residual`: the relative residual of its linear solve, or `nan`.
    - `cost`: its time, in units of the time of one inner gradient.
    - `right`: whether it is one of the two derivatives.
    - `verdict`: a sentence that says which derivative it is, or what is wrong.
    """

    errors: dict[str, float]
    cosines: dict[str, float]
    inner_residual: float
    linear_residual: float
    cost: float
    right: bool
    verdict: str


@dataclasses.dataclass(frozen=True)
class HypergradientCheck:
    """What [`bilevel_eqx.check_hypergradient`][] returns; `print` it for a table.

    **Attributes:**

    - `responses`: a dictionary from names to
        [`bilevel_eqx.reports.CheckedResponse`][]s.
    - `findings`: sentences about faults and properties of the problem itself.
    - `differences`: a dictionary from the kind of start to the finite differences, one
        for each direction.
    - `sound`: whether the problem has no fault: its derivatives are those of its values,
        x reaches F, and the inner problem has been solved.
    """

    responses: dict[str, CheckedResponse]
    findings: tuple[str, ...]
    differences: dict[str, np.ndarray]
    sound: bool

    def __str__(self):
        kinds = list(self.differences)
        header = ["", *(f"{kind} error" for kind in kinds)]
        header += [f"{kind} cosine" for kind in kinds]
        header += ["inner residual", "linear residual", "cost"]
        rows = [
            [
                name,
                *(f"{r.errors[kind]:.1e}" for kind in kinds),
                *(f"{r.cosines[kind]:.4f}" for kind in kinds),
                f"{r.inner_residual:.1e}",
                "-" if np.isnan(r.linear_residual) else f"{r.linear_residual:.1e}",
                f"{r.cost:.0f}",
            ]
            for name, r in self.responses.items()
        ]
        lines = aligned([header, *rows]) if rows else []
        lines += [f"{name}: {r.verdict}" for name, r in self.responses.items()]
        lines += [f"The problem: {finding}" for finding in self.findings]
        return "\n".join(lines)


@on_auto_axes
@in_full_precision
def check_hypergradient(
    problem: AbstractBilevelProblem,
    x: PyTree,
    y0: PyTree,
    responses: Mapping[str, AbstractResponse] | Sequence[AbstractResponse] | None = None,
    *,
    num_directions: int = 5,
    num_coordinates: int = 5,
    key: PRNGKeyArray | None = None,
) -> HypergradientCheck:
    r"""Compares hypergradients with finite differences of
    $\phi(x) = F(x, y(x))$, where the inner problem is solved accurately for each
    difference,

    $$\langle g, d \rangle \quad\text{against}\quad
    \frac{\phi(x + h d) - \phi(x - h d)}{2 h},$$

    along random directions and along coordinates, always in float64. It says in words
    what is wrong with a response or with the problem.

    If the inner problem has many minima, there are two right derivatives, and the table
    has both: *cold*, where y starts from `y0` for each difference, and *warm*, where y
    starts from the inner minimum at x. Otherwise they are the same.

    **Arguments:**

    - `problem`: the bilevel problem.
    - `x`: the outer variables at which to check, a pytree of floating-point arrays.
    - `y0`: the inner variables to start from, a pytree of floating-point arrays.
    - `responses`: the responses to check, as a dictionary from names or as a sequence. By
        default one of each kind: implicit at the inner minimum, with a pseudoinverse,
        conjugate gradients and a Neumann series; the nearest minimum; and unrolled. At
        a root: implicit, with a pseudoinverse and GMRES; for a fixed point also with a
        Neumann series, and unrolled.
    - `num_directions`, `num_coordinates`: the numbers of random directions and of entries
        of x. Keyword only arguments.
    - `key`: for the random choice of these. Keyword only argument.

    **Returns:**

    A [`bilevel_eqx.reports.HypergradientCheck`][]. Faults of the problem do not raise:
    they are in its findings.

    **Raises:**

    A `ValueError` if the number of directions or of coordinates is not positive.

    !!! Example

        ```python
        print(blx.check_hypergradient(problem, x, y0))
        ```
    """
    check_key(key, "check_hypergradient")
    check_count(num_directions, "num_directions", "check_hypergradient")
    check_count(num_coordinates, "num_coordinates", "check_hypergradient")
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        try:
            x, y0 = as_variables(x, "x"), as_variables(y0, "y0")
            problem, x, y0 = _in_float64((problem, x, y0))
            check_problem(problem, x, y0)
        except (TypeError, ValueError) as error:
            findings = (_out_of_order(problem, x, y0) or str(error),)
            return HypergradientCheck({}, findings, {}, False)
        directions = _directions(key, x, num_directions, num_coordinates)
        return _check(problem, x, y0, responses, directions)


def _check(problem, x, y0, responses, directions) -> HypergradientCheck:
    # What is differentiated for the check; the responses are given the problem itself.
    smooth_problem, findings = problem, []
    try:
        disagreements = _disagreements(problem, x, y0)
        y, distance, spectrum = _resolved(problem, x, y0, directions)
    except _UNDIFFERENTIABLE as error:
        if isinstance(problem, AbstractRootProblem):
            # There is no transposed Jacobian that would do instead.
            findings = [
                "the derivatives of `root` cannot be computed in forward mode. The "
                "finite differences, which solve for the root by Newton steps, and all "
                f"responses need them. {_why(error)}"
            ]
            return HypergradientCheck({}, tuple(findings), {}, False)
        smooth_problem = reverse_only(problem)
        findings.append(
            "its second derivatives cannot be computed in forward mode, and all "
            f"responses except `Unrolled` need them. {_why(error)}"
        )
        try:
            disagreements = _disagreements(smooth_problem, x, y0)
            y, distance, spectrum = _resolved(smooth_problem, x, y0, directions)
        except _UNDIFFERENTIABLE as error:
            findings[0] = (
                "its second derivatives cannot be computed. The finite differences and "
                f"all responses except `Unrolled` need them. {_why(error)}"
            )
            findings = [*_disagreements(problem, x, y0, second=False), *findings]
            return HypergradientCheck({}, tuple(findings), {}, False)
    findings += disagreements
    solved = distance <= 1e-6
    is_root = isinstance(problem, AbstractRootProblem)
    at_a_kink = False
    if not solved and not is_root:
        at_a_kink = float(kink_met(smooth_problem, x, y0, y)) > _CLOSE
    if not solved and is_root:
        findings.append(
            "the inner problem was not solved: after many Newton steps the root is still "
            f"{distance:.1e} of the size of y away, so the differences are not those of "
            "a root. There may be no root; or y0 is too far from it; or the problem may "
            "take its arguments in another order than (x, y)."
        )
    elif at_a_kink:
        findings.append(
            "the inner minimum is at a kink of `inner`, such as an L1 norm, a hinge or a "
            "ReLU has. There is no Hessian there, and neither the differences nor the "
            "responses mean anything. State the kink as a constraint (`project_y`), or "
            "smooth it."
        )
    elif not solved:
        findings.append(
            "the inner problem was not solved: after many Newton steps the minimum is "
            f"still {distance:.1e} of the size of y away, so the differences are not "
            "those of a minimum. There may be no finite minimum, as for a cross-entropy "
            "with hard labels; or the minimum may be a kink; or `inner` may take its "
            "arguments in another order than (x, y)."
        )
    largest = float(np.max(np.abs(spectrum), initial=0))
    rank = int(np.sum(np.abs(spectrum) > 1e-8 * largest))
    is_finite = bool(np.isfinite(largest))
    singular = is_finite and rank < spectrum.size
    if not is_finite:
        findings.append(
            "the inner Hessian is not finite at the inner minimum, where a kink of "
            "`inner` may be: a norm and `jnp.sqrt(y**2)` have no derivative at zero. "
            "State the kink as a constraint (`project_y`), or smooth it."
        )
    differences = {}
    for kind in _kinds(problem, singular):
        try:
            differences[kind] = _differences(smooth_problem, x, y0, y, directions, kind)
        except _UNDIFFERENTIABLE as error:
            findings.append(
                f"there are no differences of a {kind} start: its inner minimum needs "
                f"third derivatives, which cannot be computed. {_why(error)}"
            )
    smooth = all(d.roughness <= _CLOSE for d in differences.values())
    if not smooth:
        findings.append(
            "finite differences of two step sizes disagree: F(x, y(x)) has a kink close "
            "to this x, or the inner solution jumps."
        )
    references = {kind: d.slopes for kind, d in differences.items()}
    reasons = _Reasons(differences, at_a_kink, smooth, largest)
    if singular and set_y(problem).confines:
        findings.append(
            "the inner minimum is not unique in its set, and the differences are those "
            "of a warm start."
        )
    elif singular and isinstance(problem, AbstractRootProblem):
        findings.append(
            f"dr/dy is singular (rank {rank} of {spectrum.size} computed singular "
            "values), so that the root is not isolated, and the differences are those "
            "of a warm start."
        )
    elif singular:
        finding = (
            f"the inner Hessian is singular (rank {rank} of {spectrum.size} computed "
            "eigenvalues), so there are many inner minima. Methods disagree by design"
        )
        if len(references) == 2:
            apart = _relative(references["cold"], references["warm"])
            finding += (
                f": the two derivatives are {apart:.1e} apart, relative to the first"
            )
        findings.append(finding + ".")
    still = all(d.still for d in differences.values())
    if still and not at_a_kink:
        findings.append(
            "x does not reach F: F does not change by more than its rounding if x moves "
            "and the inner problem is solved again. (If F is a small number plus a large "
            "constant, leave out the constant.)"
        )
    unit = _time(lambda: _gradient(problem, x, y0))
    checked = {}
    for name, (response, anchor) in _named(problem, responses, y0, y, largest).items():
        checked[name] = _checked(problem, x, anchor, response, directions, reasons, unit)
    sound = solved and smooth and not still and not disagreements
    return HypergradientCheck(checked, tuple(findings), references, sound)


# What JAX raises if a function does not have the required kind of derivative.
_UNDIFFERENTIABLE = (TypeError, ValueError, NotImplementedError)


def _why(error: Exception) -> str:
    return (
        "The usual reason is an objective with `jax.custom_vjp`, which has no forward "
        "mode. Use `jax.custom_jvp` instead. "
        f"JAX says: {str(error).strip()}"
    )


_gradient = called_once(inner_gradient)


def _kinds(problem, singular: bool) -> tuple[str, ...]:
    if not singular:
        return ("true",)
    return ("cold", "warm") if _selects(problem) else ("warm",)


def _selects(problem) -> bool:
    """Whether the nearest of many solutions can be found."""
    return not (set_y(problem).confines or isinstance(problem, AbstractRootProblem))


# A response, and the anchor that it starts from.
_Started = tuple[AbstractResponse, PyTree]


def _named(problem, responses, y0, y, largest) -> dict[str, _Started]:
    """The responses by name."""
    if isinstance(responses, Mapping):
        return {name: (response, y0) for name, response in responses.items()}
    if responses is not None:
        codes = [as_code(response) for response in responses]
        return {
            f"{code} [{i}]" if codes.count(code) > 1 else code: (response, y0)
            for i, (code, response) in enumerate(zip(codes, responses))
        }
    safe = 1 / (largest or 1.0)
    # These start from the known minimum: another solve in each program would take most
    # of the time.
    if isinstance(problem, AbstractRootProblem):
        gmres = lx.GMRES(rtol=1e-8, atol=1e-8)
        named: dict[str, _Started] = {
            "Implicit, Pseudoinverse": (Implicit(None, Pseudoinverse()), y),
            "Implicit, GMRES": (Implicit(None, gmres), y),
        }
        if isinstance(problem, FixedPointProblem):
            series, steps = Neumann(100, 1.0), Unrolled(optax.sgd(1.0), 100)
            named["Implicit, Neumann(100, 1)"] = (Implicit(None, series), y)
            named["Unrolled, 100 steps"] = (steps, y0)
        return named
    named = {
        "Implicit, Pseudoinverse": (Implicit(None, Pseudoinverse()), y),
        "Implicit, TruncatedCG(20)": (Implicit(None, TruncatedCG(20)), y),
        "Implicit, Neumann(20)": (Implicit(None, Neumann(20, safe)), y),
    }
    if _selects(problem):
        # It does not support constraints.
        named["MinimumDisplacement"] = (MinimumDisplacement(), y0)
    named["Unrolled, 100 steps"] = (Unrolled(optax.sgd(safe), 100), y0)
    return named


class _Reasons(NamedTuple):
    """What a verdict is made of."""

    differences: dict[str, "_Differences"]
    at_a_kink: bool
    smooth: bool
    # The largest eigenvalue of H.
    largest: float


def _checked(
    problem, x, anchor, response, directions, reasons: _Reasons, unit
) -> CheckedResponse:
    """One row of the table."""
    references = reasons.differences

    def run():
        return hypergradient(problem, x, anchor, response, throw=False)

    try:
        out = run()
    except _UNDIFFERENTIABLE as error:
        # Our own errors need no explanation.
        why = str(error) if isinstance(error, ValueError) else _why(error)
        nothing = dict.fromkeys(references, np.nan)
        return CheckedResponse(
            nothing, nothing, np.nan, np.nan, np.nan, False, f"refused. {why}"
        )
    along = directions @ _flat(out.gradient)
    errors = {k: _relative(d.slopes, along, d.noise) for k, d in references.items()}
    cosines = {k: _cosine(d.slopes, along) for k, d in references.items()}
    inner = float(out.stats.get("inner_residual", 0.0))
    linear = float(out.stats.get("linear_residual", np.nan))
    best = min(errors, key=lambda kind: errors[kind])
    right = errors[best] <= _RIGHT and not reasons.at_a_kink
    verdict = _verdict(out, response, errors, cosines, linear, along, reasons)
    return CheckedResponse(
        errors, cosines, inner, linear, _time(run) / unit, right, verdict
    )


_MEANING = {
    "true": "the derivative",
    "cold": "the derivative of a cold start",
    "warm": "the derivative of a warm start",
}


def _verdict(out, response, errors, cosines, linear, along, reasons: _Reasons) -> str:
    """Which derivative a hypergradient is, or the likeliest reason why it is wrong."""
    if reasons.at_a_kink:
        return "not checked: the inner minimum is at a kink."
    matching = [kind for kind, error in errors.items() if error <= _RIGHT]
    if matching:
        meant = "the derivative" if len(matching) > 1 else _MEANING[matching[0]]
        return f"right: {meant}, to {min(errors.values()):.0e}."
    best = min(errors, key=lambda kind: errors[kind])
    far = f"off by {errors[best]:.1e} from {_MEANING[best]}"
    succeeded = not is_failure(out.result)
    if succeeded and not reasons.smooth:
        low, high = reasons.differences[best].sides
        slack = _RIGHT * np.max(np.abs([low, high]))
        between = np.all((low - slack <= along) & (along <= high + slack))
        where = "between" if between else "not between"
        return (
            f"{far}, which means nothing at a kink: on the two sides of x the slopes of "
            f"F differ. This hypergradient lies {where} them."
        )
    is_zero = not np.any(_flat(out.gradient))
    known = reasons.differences.values()
    moves = any(float(np.linalg.norm(d.slopes)) > d.noise for d in known)
    if bool(out.result == RESULTS.zero_hypergradient) or (is_zero and moves):
        return (
            "wrong: it is exactly zero, but F depends on x. The derivative with respect "
            "to x is cut off by a `stop_gradient`, a cast to integers, or a `Fixed` "
            "response."
        )
    if not succeeded:
        return f"{far}. {RESULTS[out.result]}"
    if cosines[best] < -0.9:
        return (
            f"wrong: {far}, with nearly the opposite direction (cosine "
            f"{cosines[best]:.2f}). A sign is wrong: J is minus H^-1 B."
        )
    solver = getattr(response, "linear_solver", None)
    if isinstance(solver, Neumann | TruncatedCG) and linear > _RIGHT:
        is_series = isinstance(solver, Neumann)
        count = np.max(solver.num_terms if is_series else solver.num_steps)
        unit = "terms" if is_series else "steps"
        hint = ""
        # Without curvature no step size is right.
        if is_series and reasons.largest > 0:
            hint = f", and a step size close to {1 / reasons.largest:.1e}"
        return (
            f"{far}: {as_code(solver)} has not converged. It stopped after {int(count)} "
            f"{unit} with a linear residual of {linear:.1e}. Give it more {unit}{hint}."
        )
    if isinstance(response, Unrolled):
        return (
            f"{far}: {response.num_steps} unrolled steps have not reached the minimum. "
            "The derivative is right for the last step, but not for the minimum."
        )
    inner = float(out.stats.get("inner_residual", 0.0))
    accuracy = "close" if errors[best] <= _CLOSE else "wrong"
    return (
        f"{accuracy}: {far}, with a cosine of {cosines[best]:.4f}. Its inner residual is "
        f"{inner:.1e}. If that is small, the derivative of the response is at fault; "
        "otherwise the inner solve is."
    )


#
# Finite differences
#

# Relative to the size of x.
_STEP = 1e-4


_DESCENT_STEPS = 20_000


# In units of the step. The first is x itself.
_OFFSETS = np.array([1.0, -1.0, 2.0, -2.0])


class _Differences(NamedTuple):
    """The slopes of F along each direction, and how reliable they are."""

    slopes: np.ndarray
    # The disagreement of two step sizes or of two sides, relative to the slopes.
    roughness: float
    # Whether F is the same everywhere.
    still: bool
    # The size of slopes that are zero to rounding.
    noise: float
    # The smaller and the larger one of the slopes on the two sides of x.
    sides: tuple[np.ndarray, np.ndarray]


def _minimum(problem, x, anchor):
    """An accurate inner minimum near the anchor."""
    if not set_y(problem).confines:
        solver = Projection(max_steps=300)
        anchor = Implicit(solver, Pseudoinverse()).minimum(problem, x, anchor)[0]
    # Also without constraints: Newton steps do not know of pieces with another Hessian,
    # as an objective with ReLUs has. At a minimum it takes one step.
    solver = ProjectedGradient(max_steps=_DESCENT_STEPS)
    return Implicit(solver, Pseudoinverse()).minimum(problem, x, anchor)[0]


def _nearest(problem, x, anchor):
    """The accurate inner minimum nearest to the anchor."""
    response = MinimumDisplacement(Projection(max_steps=300), selection_tolerance=None)
    displacement, layout, *_ = response.nearest(problem, x, anchor)
    return layout.unravel(displacement.picture.y)


@called_once
def _followed(problem, points, count, anchor):
    """Solves the inner problem at the first `count` of `points`.

    Returns F at each; and at the first one y, its distance from a solution, and the
    spectrum of H (the singular values of dr/dy). `count` is data, so that one program
    serves all counts.
    """
    values, y = _values_along(problem, points, count, anchor, _minimum)
    x = jtu.tree_map(lambda leaf: leaf[0], points)
    at = stationarity(problem, x, y)
    # Relative to the size of y. A small gradient is not enough: it also vanishes towards
    # a minimum at infinity.
    size = tree_norm(y) + tree_norm(tree_sub(y, anchor))
    distance = at.distance() / nonzero(size)
    if isinstance(problem, AbstractRootProblem):
        return values, y, distance, singular_values(at.free_hessian)
    return values, y, distance, eigenbasis(at.definite_hessian()).values


@called_once
def _selected(problem, points, count, anchor):
    """F at the inner minima nearest to the anchor."""
    return _values_along(problem, points, count, anchor, _nearest)[0]


def _values_along(problem, points, count, anchor, solve):
    """F at the first `count` of `points`, and y at the first one."""

    def body(i, carry):
        values, first = carry
        x = jtu.tree_map(lambda leaf: leaf[i], points)
        y = solve(problem, x, anchor)
        first = jtu.tree_map(lambda a, b: jnp.where(i == 0, a, b), y, first)
        return values.at[i].set(problem.outer(x, y).astype(values.dtype)), first

    total = jtu.tree_leaves(points)[0].shape[0]
    carry = jnp.zeros(total, tree_dtype(points)), anchor
    return jax.lax.fori_loop(0, count, body, carry)


def _points(x, directions) -> tuple[PyTree, float]:
    """x and the points around it, by direction and offset; and the step."""
    at = _flat(x)
    h = _STEP * max(1.0, float(np.linalg.norm(at)))
    moves = h * _OFFSETS[None, :, None] * directions[:, None, :]
    moved = (at + moves).reshape(-1, at.size)
    return _stacked(np.concatenate([at[None], moved]), x), h


def _resolved(problem, x, y0, directions):
    """The inner minimum at x, its distance from a true one, and the spectrum of H."""
    points, _ = _points(x, directions)
    _, y, distance, spectrum = _followed(problem, points, np.asarray(1), y0)
    return y, float(distance), np.asarray(spectrum)


def _differences(problem, x, y0, y, directions, kind) -> _Differences:
    """Central differences, by Richardson's rule."""
    points, h = _points(x, directions)
    count = np.asarray(1 + _OFFSETS.size * len(directions))
    if kind == "cold":
        values = _selected(problem, points, count, y0)
    else:
        anchor = y if kind == "warm" else y0
        values, *_ = _followed(problem, points, count, anchor)
    values = np.asarray(values)
    here, around = values[0], values[1:].reshape(-1, _OFFSETS.size)
    near = (around[:, 0] - around[:, 1]) / (2 * h)
    far = (around[:, 2] - around[:, 3]) / (4 * h)
    # A smooth second difference shrinks by four with half the step. What remains is twice
    # a jump of the slope. Central differences do not see a kink at x itself.
    close = around[:, 0] - 2 * here + around[:, 1]
    wide = around[:, 2] - 2 * here + around[:, 3]
    jump = (4 * close - wide) / (2 * h)
    # Slopes cancel where F is stationary, but changes do not.
    changes = np.linalg.norm(np.max(np.abs(around - here), axis=1)) / h
    largest = float(np.max(np.abs(values), initial=0))
    wrong = np.linalg.norm(np.concatenate([near - far, jump]))
    roughness = wrong / max(changes, 1e-9 * largest, np.finfo(float).tiny)
    sides = (around[:, 0] - here) / h, (here - around[:, 1]) / h
    # Relative, so that the units of F do not matter.
    still = np.max(np.abs(values - here)) <= 1e-9 * h * largest
    return _Differences(
        (4 * near - far) / 3,
        float(roughness),
        bool(still),
        float(1e-6 * changes),
        (np.minimum(*sides), np.maximum(*sides)),
    )


#
# In NumPy, because JAX compiles a program for each operation outside a program.
#


def _flat(tree) -> np.ndarray:
    leaves = [np.ravel(np.asarray(leaf)) for leaf in jtu.tree_leaves(tree)]
    return np.concatenate(leaves).astype(np.float64)


def _stacked(rows: np.ndarray, like: PyTree) -> PyTree:
    """Flat vectors, in rows, as one pytree like `like` with a new axis in front."""
    leaves, treedef = jtu.tree_flatten(like)
    ends = np.cumsum([np.size(leaf) for leaf in leaves])
    parts = np.split(rows, ends[:-1], axis=1)
    shaped = [p.reshape(-1, *np.shape(leaf)) for p, leaf in zip(parts, leaves)]
    return jtu.tree_unflatten(treedef, shaped)


def _directions(key, x, num_directions: int, num_coordinates: int) -> np.ndarray:
    """Random directions and coordinate directions, of length one, in rows."""
    size = _flat(x).size
    random = _generator(key).normal(size=(num_directions, size))
    random /= np.linalg.norm(random, axis=1, keepdims=True)
    picked = _generator(key).permutation(size)[:num_coordinates]
    return np.concatenate([random, np.eye(size)[picked]])


def _generator(key: PRNGKeyArray | None) -> np.random.Generator:
    if key is None:
        return np.random.default_rng(0)
    is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return np.random.default_rng(np.asarray(jr.key_data(key) if is_typed else key))


def _relative(reference, other, noise: float = 0.0) -> float:
    """The relative error: at most 2, without overflow; infinite if not finite; zero if
    both are noise."""
    largest = np.max(np.abs([reference, other]))
    if largest <= noise:
        return 0.0
    if not 0 < largest < np.inf:
        return 0.0 if largest == 0 else np.inf
    reference, other = reference / largest, other / largest
    scale = max(np.linalg.norm(reference), np.linalg.norm(other))
    return float(np.linalg.norm(reference - other) / scale)


def _cosine(reference, other) -> float:
    largest = [float(np.max(np.abs(vector))) for vector in (reference, other)]
    if not all(0 < size < np.inf for size in largest):
        return np.nan
    reference, other = reference / largest[0], other / largest[1]
    return float(reference @ other / (np.linalg.norm(reference) * np.linalg.norm(other)))


#
# Are the problem's derivatives those of its values?
#


def _names_looked_at(problem) -> tuple[str, ...]:
    """First the values, then the inner gradient."""
    outer = "`outer` in x", "`outer` in y"
    if isinstance(problem, AbstractRootProblem):
        return *outer, "the root in x", "the root in y"
    return *outer, "`inner` in y", "the inner gradient in x", "the inner gradient in y"


@called_once
def _looked_at(problem, x, y, u, v, h, second: bool):
    """Derivatives along u and v by JAX, and the values on both sides.

    Like the package, this takes first derivatives in reverse mode and differentiates them
    in forward mode, so that it also checks rules for one mode only.
    """
    zero = jnp.zeros_like(h)

    def objectives(t):
        ahead_x, ahead_y = tree_axpy(t, u, x), tree_axpy(t, v, y)
        values = [problem.outer(ahead_x, y), problem.outer(x, ahead_y)]
        if not isinstance(problem, AbstractRootProblem):
            values.append(problem.inner(x, ahead_y))
        return values

    def gradients(t):
        if not second:
            return ()
        ahead_x, ahead_y = tree_axpy(t, u, x), tree_axpy(t, v, y)
        return (
            tree_dot(inner_gradient(problem, ahead_x, y), v),
            tree_dot(inner_gradient(problem, x, ahead_y), v),
        )

    count = len(objectives(zero))
    slopes = [jax.grad(lambda t, i=i: objectives(t)[i])(zero) for i in range(count)]
    slopes += jax.jvp(gradients, (zero,), (jnp.ones_like(h),))[1]
    both = jax.lax.map(
        lambda t: jnp.stack([*objectives(t), *gradients(t)]), jnp.stack([h, -h, 0 * h])
    )
    return jnp.stack(slopes), both


def _disagreements(problem, x, y, second: bool = True) -> list[str]:
    """A sentence for each derivative that is not that of the values."""
    (u, _), (v, offset) = (_directions(None, at, 2, 1)[:2] for at in (x, y))
    # Not at the start itself: it is often zero, where many derivatives vanish.
    start = _flat(y)
    moved = start + 0.1 * max(1.0, float(np.linalg.norm(start))) * offset
    u, v, moved = (
        jtu.tree_map(lambda leaf: leaf[0], _stacked(row[None], like))
        for row, like in ((u, x), (v, y), (moved, y))
    )
    h = 1e-5
    names = _names_looked_at(problem)
    slopes, both = _looked_at(problem, x, moved, u, v, np.asarray(h), second)
    slopes, (ahead, behind, here) = np.asarray(slopes), np.asarray(both)
    differences = (ahead - behind) / (2 * h)
    noise = 1e-8 * (np.abs(ahead) + np.abs(behind))
    allowed = 1e-4 * (np.abs(slopes) + np.abs(differences)) + noise
    # Negated, so that NaN is a disagreement too.
    disagree = ~(np.abs(slopes - differences) <= allowed)
    sides = zip((here - behind) / h, (ahead - here) / h)
    return [
        _disagreement(what, slope, difference, *both)
        for what, slope, difference, both, bad in zip(
            names, slopes, differences, sides, disagree
        )
        if bad
    ]


def _disagreement(what: str, slope, difference, left, right) -> str:
    if abs(right - left) > _CLOSE * max(abs(left), abs(right)):
        return (
            f"there is no derivative of {what}: along a random direction the slope is "
            f"{left:.4g} on one side and {right:.4g} on the other, which is a kink."
        )
    return (
        f"the derivative of {what} is not that of its values: along a random direction "
        f"it is {slope:.4g}, but differences of the values give {difference:.4g}. The "
        "reason may be a `stop_gradient`, a cast to integers or a custom derivative rule."
    )


def _out_of_order(problem, x, y) -> str | None:
    """Whether an objective takes its arguments in the reverse order."""
    is_root = isinstance(problem, AbstractRootProblem)
    for name in ("outer", "root" if is_root else "inner"):
        objective = getattr(problem, name, None)
        # The root is like y, and an objective is a scalar.
        like = y if name == "root" else jnp.zeros(())
        if objective is None or not _evaluates(objective, like, x, y):
            if objective is not None and _evaluates(objective, like, y, x):
                return (
                    f"`{name}(x, y)` fails, but `{name}(y, x)` does not: the first "
                    "argument must be the outer variables, the second the inner ones."
                )
    return None


def _evaluates(objective, like, *args) -> bool:
    try:
        out = eqx.filter_eval_shape(objective, *args)
    except Exception:
        return False
    return _shapes(out) == _shapes(like)


def _shapes(tree) -> PyTree:
    return jtu.tree_map(lambda u: getattr(u, "shape", ()), tree)


#
# Helpers
#


def _in_float64(tree: Any) -> Any:
    """`tree` with its floating-point arrays in double precision."""

    def cast(leaf):
        is_float = eqx.is_array(leaf) or isinstance(leaf, np.ndarray | np.generic)
        is_float = is_float and jnp.issubdtype(leaf.dtype, jnp.floating)
        return jnp.asarray(np.asarray(leaf), jnp.float64) if is_float else leaf

    return jtu.tree_map(cast, tree)


def _time(fn) -> float:
    """The time of a compiled call in seconds: the best of three."""
    jax.block_until_ready(eqx.filter(fn(), eqx.is_array))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(eqx.filter(fn(), eqx.is_array))
        times.append(time.perf_counter() - start)
    return min(times)
