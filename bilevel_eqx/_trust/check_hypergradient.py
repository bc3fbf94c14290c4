"""Is this hypergradient right? Held against finite differences, on the user's problem."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray, PyTree

from .._arguments import as_variables, check_count
from .._derivatives.first import inner_gradient
from .._failure.results import RESULTS
from .._hypergradient import hypergradient
from .._inner_solver.projected_gradient import ProjectedGradient
from .._inner_solver.projection import Projection
from .._linalg.eigenbasis import eigenbasis
from .._linear_solver.neumann import Neumann
from .._linear_solver.pseudoinverse import Pseudoinverse
from .._linear_solver.truncated_cg import TruncatedCG
from .._problem.base import AbstractBilevelProblem
from .._problem.checks import check_problem
from .._response.base import AbstractResponse
from .._response.implicit import Implicit
from .._response.minimum_displacement import MinimumDisplacement
from .._response.unrolled import Unrolled
from .._solution_set.stationarity import stationarity
from .._text import aligned
from .._tree import nonzero, tree_axpy, tree_dot, tree_norm, tree_sub


# Relative: what is closer than this to finite differences is right; what is farther from
# them than a part in ten is an approximation that has not got there.
_RIGHT = 1e-3


_CLOSE = 0.1


@dataclasses.dataclass(frozen=True)
class CheckedResponse:
    """One response of a [`bilevel_eqx.HypergradientCheck`][].

    **Attributes:**

    - `errors`: from what is differentiated (`"cold"`, `"warm"`) to the relative error
        of the hypergradient along all directions.
    - `cosines`: the same for the cosine of the angle between the two.
    - `inner_residual`: the norm of what the response presumes to be zero.
    - `linear_residual`: of its linear solve, relative; `nan` if there is none.
    - `cost`: its time, in units of the time of one inner gradient.
    - `right`: whether it is one of the two derivatives.
    - `verdict`: what it is, or what is wrong with it, in words.
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

    - `responses`: from names to a [`bilevel_eqx.CheckedResponse`][] each.
    - `findings`: what is wrong with the problem itself, or particular to it, in words.
    - `differences`: from what is differentiated to its finite differences, one for each
        direction.
    - `sound`: whether nothing is wrong with the problem: its derivatives are those of
        its values, x reaches F, and the inner problem has been solved.
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
    $\phi(x) = F(x, y(x))$, where the inner problem is solved anew and accurately for
    each difference,

    $$\langle g, d \rangle \quad\text{against}\quad
    \frac{\phi(x + h d) - \phi(x - h d)}{2 h},$$

    along random directions and along coordinates, in float64 whatever the precision of
    the problem. It says in words what is wrong: with a response, or with the problem.

    Where the inner problem has many minima there are two right answers, and the table
    has both: *cold*, where y starts from `y0` for each difference, and *warm*, where it
    starts from the minimum that answers x. Elsewhere they are the same.

    **Arguments:**

    - `problem`: the bilevel problem.
    - `x`: the outer variables, a pytree of floating-point arrays: where to check.
    - `y0`: the inner variables to start from, a pytree of floating-point arrays.
    - `responses`: the responses to check, by name or in a sequence. By default one of
        each kind: implicit with a pseudoinverse, conjugate gradients and a Neumann
        series, the derivative of the nearest minimum, and unrolled.
    - `num_directions`, `num_coordinates`: how many random directions, and how many
        entries of x. Keyword only arguments.
    - `key`: for drawing them. Keyword only argument.

    **Returns:**

    A [`bilevel_eqx.HypergradientCheck`][]. It does not raise for a problem that is
    faulty: that is among its findings.

    **Raises:**

    A `ValueError` if the number of directions or of coordinates is not positive.

    !!! Example

        ```python
        print(blx.check_hypergradient(problem, x, y0))
        ```
    """
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
        key = jr.key(0) if key is None else key
        directions = _directions(key, x, num_directions, num_coordinates)
        return _check(problem, x, y0, responses, directions)


def _check(problem, x, y0, responses, directions) -> HypergradientCheck:
    disagreements = _disagreements(problem, x, y0)
    findings = list(disagreements)
    y, residual = _resolve(problem, x, y0)
    solved = bool(residual <= 1e-6)
    if not solved:
        findings.append(
            "the inner problem was not solved: after many Newton steps the minimum is "
            f"still {float(residual):.1e} of the size of y away, so that the differences "
            "are not those of a minimum. There may be none within reach, as for a "
            "cross-entropy with hard labels; or a kink; or `inner` takes its arguments "
            "in another order than (x, y)."
        )
    spectrum = np.asarray(_eigenvalues(problem, x, y))
    largest = float(np.max(np.abs(spectrum), initial=0))
    rank = int(np.sum(np.abs(spectrum) > 1e-8 * largest))
    singular = rank < spectrum.size
    differences = {
        kind: _differences(problem, x, y0, y, directions, kind)
        for kind in _kinds(problem, singular)
    }
    smooth = all(rough <= _CLOSE for _, rough in differences.values())
    if not smooth:
        findings.append(
            "finite differences of two step sizes disagree: F(x, y(x)) has a kink close "
            "to this x, or the inner minimum jumps."
        )
    references = {kind: difference for kind, (difference, _) in differences.items()}
    if singular and problem.project_y is not None:
        findings.append(
            "the inner minimum is not unique in its set, and the differences are those "
            "of a warm start."
        )
    elif singular:
        apart = _relative(references["cold"], references["warm"])
        findings.append(
            f"the inner Hessian is singular (rank {rank} of {spectrum.size} eigenvalues "
            "looked at), and so there are many inner minima. Methods disagree by design: "
            f"the two derivatives are {apart:.1e} apart, relative to the first."
        )
    moves = max(float(np.linalg.norm(r)) for r in references.values())
    still = moves <= 1e-9 * max(1.0, abs(float(problem.outer(x, y))))
    if still:
        findings.append(
            "x does not reach F: moving x and solving the inner problem again leaves F "
            "as it was."
        )
    named = _named(problem, responses, largest)
    gradient_time = _time(lambda: _gradient(problem, x, y0))
    checked = {
        name: _checked(problem, x, y0, r, directions, references, gradient_time, largest)
        for name, r in named.items()
    }
    sound = solved and smooth and not still and not disagreements
    return HypergradientCheck(checked, tuple(findings), references, sound)


_gradient = eqx.filter_jit(inner_gradient)


def _kinds(problem, singular: bool) -> tuple[str, ...]:
    if not singular:
        return ("true",)
    return ("cold", "warm") if problem.project_y is None else ("warm",)


def _named(problem, responses, largest) -> dict[str, AbstractResponse]:
    if isinstance(responses, Mapping):
        return dict(responses)
    if responses is not None:
        names = [type(r).__name__ for r in responses]
        repeated = {name for name in names if names.count(name) > 1}
        return {
            f"{name} {i}" if name in repeated else name: response
            for i, (name, response) in enumerate(zip(names, responses))
        }
    safe = 1 / max(largest, 1e-12)
    free = problem.project_y is None
    solver = Projection() if free else ProjectedGradient()
    named = {
        "Implicit, Pseudoinverse": Implicit(solver, Pseudoinverse()),
        "Implicit, TruncatedCG(20)": Implicit(solver, TruncatedCG(20)),
        "Implicit, Neumann(20)": Implicit(solver, Neumann(20, safe)),
        "MinimumDisplacement": MinimumDisplacement(Projection(), Pseudoinverse()),
        "Unrolled, 100 steps": Unrolled(optax.sgd(safe), 100),
    }
    if not free:
        # The nearest of many minima in a set is not what it finds.
        del named["MinimumDisplacement"]
    return named


def _checked(
    problem, x, y0, response, directions, references, gradient_time, largest
) -> CheckedResponse:
    """One row of the table."""

    def run():
        return hypergradient(problem, x, y0, response, throw=False)

    try:
        out = run()
    except ValueError as error:
        nothing = dict.fromkeys(references, np.nan)
        return CheckedResponse(
            nothing, nothing, np.nan, np.nan, np.nan, False, f"refused. {error}"
        )
    along = _along(out.gradient, directions)
    errors = {kind: _relative(r, along) for kind, r in references.items()}
    cosines = {kind: _cosine(r, along) for kind, r in references.items()}
    inner = float(out.stats.get("inner_residual", 0.0))
    linear = float(out.stats.get("linear_residual", np.nan))
    best = min(errors, key=lambda kind: errors[kind])
    right = errors[best] <= _RIGHT
    verdict = _verdict(out, response, errors, cosines, linear, largest, references)
    return CheckedResponse(
        errors, cosines, inner, linear, _time(run) / gradient_time, right, verdict
    )


_MEANING = {
    "true": "the derivative",
    "cold": "the derivative of a cold start",
    "warm": "the derivative of a warm start",
}


def _verdict(out, response, errors, cosines, linear, largest, references) -> str:
    """What a hypergradient is, or the likeliest reason why it is not right."""
    matching = [kind for kind, error in errors.items() if error <= _RIGHT]
    if matching:
        meant = "the derivative" if len(matching) > 1 else _MEANING[matching[0]]
        return f"right: {meant}, to {min(errors.values()):.0e}."
    best = min(errors, key=lambda kind: errors[kind])
    far = f"off by {errors[best]:.1e} from {_MEANING[best]}"
    is_zero = float(tree_norm(out.gradient)) == 0
    moves = any(float(np.linalg.norm(r)) > 0 for r in references.values())
    if bool(out.result == RESULTS.zero_hypergradient) or (is_zero and moves):
        return (
            "wrong: it is exactly zero, and F moves with x. The derivative with respect "
            "to x is cut off: by a `stop_gradient`, a cast to integers, or a `Fixed` "
            "response."
        )
    if bool(out.result != RESULTS.successful):
        return f"{far}. {RESULTS[out.result]}"
    if cosines[best] < -0.9:
        return (
            f"wrong: {far}, and the angle between them is nearly straight (cosine "
            f"{cosines[best]:.2f}). A sign is wrong: J is minus H^-1 B."
        )
    solver = getattr(response, "linear_solver", None)
    if isinstance(solver, Neumann | TruncatedCG) and linear > _RIGHT:
        is_series = isinstance(solver, Neumann)
        count = np.max(solver.num_terms if is_series else solver.num_steps)
        hint = f", at a step size close to {1 / largest:.1e}" if is_series else ""
        return (
            f"{far}: {type(solver).__name__} has not converged. It stopped after "
            f"{int(count)} with a linear residual of {linear:.1e}; give it more{hint}."
        )
    if isinstance(response, Unrolled):
        return (
            f"{far}: {response.num_steps} unrolled steps have not reached the minimum. "
            "That is right for the truncated answer, and not for the minimum."
        )
    inner = float(out.stats.get("inner_residual", 0.0))
    accuracy = "close" if errors[best] <= _CLOSE else "wrong"
    return (
        f"{accuracy}: {far}, with a cosine of {cosines[best]:.4f}. Its inner residual is "
        f"{inner:.1e}: if that is small the derivative that the response makes of it is "
        "at fault, and else the inner solve."
    )


#
# Finite differences
#

_STEP = 1e-4


def _accurate(problem) -> Implicit:
    solver = Projection(max_steps=300) if problem.project_y is None else None
    return Implicit(solver or ProjectedGradient(), Pseudoinverse())


@eqx.filter_jit
def _resolve(problem, x, anchor):
    """The inner minimum next to the anchor, and how far from one it is."""
    y, _, _ = _accurate(problem).minimum(problem, x, anchor)
    at = stationarity(problem, x, y)
    gradient, hessian = at.residual, at.free_hessian
    # How far it is to the minimum along the gradient, relative to the size of y. The
    # gradient alone also vanishes on the way to a minimum that lies at infinity.
    square = tree_dot(gradient, gradient)
    curvature = jnp.abs(tree_dot(gradient, hessian.mv(gradient)))
    way = square / nonzero(curvature) * jnp.sqrt(square)
    size = tree_norm(y) + tree_norm(tree_sub(y, anchor))
    return y, jnp.where(square == 0, 0, way / nonzero(size))


@eqx.filter_jit
def _values(problem, points, anchor, selected: bool):
    """F(x, y(x)) at a batch of x, one after the other."""
    implicit = _accurate(problem)
    nearest = MinimumDisplacement(Projection(max_steps=300), selection_tolerance=None)

    def value(x):
        if selected:
            y = nearest.nearest(problem, x, anchor)[0].solutions.y
        else:
            y = implicit.minimum(problem, x, anchor)[0]
        return problem.outer(x, y)

    return jax.lax.map(value, points)


def _differences(problem, x, y0, y, directions, kind):
    """Central differences by Richardson's rule, and how much two step sizes differ."""
    h = _STEP * max(1.0, float(tree_norm(x)))
    offsets = jnp.array([h, -h, 2 * h, -2 * h])

    def moved(direction):
        return jax.vmap(lambda t: tree_axpy(t, direction, x))(offsets)

    points = jax.vmap(moved)(directions)
    flat = jtu.tree_map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), points)
    anchor = y if kind == "warm" else y0
    values = _values(problem, flat, anchor, kind == "cold").reshape(-1, 4)
    near = np.asarray(values[:, 0] - values[:, 1]) / (2 * h)
    far = np.asarray(values[:, 2] - values[:, 3]) / (4 * h)
    noise = 1e-9 * float(np.max(np.abs(values), initial=0))
    rough = np.linalg.norm(near - far) / max(np.linalg.norm(near), noise, 1e-300)
    return (4 * near - far) / 3, float(rough)


def _directions(key, x, num_directions: int, num_coordinates: int) -> PyTree[Array]:
    """Random directions of length one, and coordinates, stacked along a new axis."""
    flat, unravel = jax.flatten_util.ravel_pytree(x)
    direction_key, coordinate_key = jr.split(key)
    random = jr.normal(direction_key, (num_directions, flat.size), flat.dtype)
    random = random / jnp.linalg.norm(random, axis=1, keepdims=True)
    count = min(num_coordinates, flat.size)
    picked = jr.choice(coordinate_key, flat.size, (count,), replace=False)
    coordinates = jax.nn.one_hot(picked, flat.size, dtype=flat.dtype)
    return jax.vmap(unravel)(jnp.concatenate([random, coordinates]))


def _along(gradient, directions) -> np.ndarray:
    return np.asarray(jax.vmap(lambda d: tree_dot(gradient, d))(directions))


def _relative(reference, other) -> float:
    """At most 2; without overflow, and infinite for what is not finite."""
    largest = np.max(np.abs([reference, other]))
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
# Is the problem what its derivatives say?
#


def _disagreements(problem, x, y) -> list[str]:
    """A sentence for each derivative that is not that of the values."""
    key_x, key_y, key_at = jr.split(jr.key(1), 3)
    u, v, offset = (
        jtu.tree_map(lambda leaf: leaf[0], _directions(key, at, 1, 1))
        for key, at in ((key_x, x), (key_y, y), (key_at, y))
    )
    # Not at the start itself, where much may vanish: mostly it is zero.
    y = tree_axpy(0.1 * jnp.maximum(1, tree_norm(y)), offset, y)

    def gradient_along(x, y):
        return tree_dot(inner_gradient(problem, x, y), v)

    cut = "A `stop_gradient`, a cast to integers or a rule of one's own hides it."
    checks = [
        ("`outer` in x", lambda t: problem.outer(tree_axpy(t, u, x), y)),
        ("`outer` in y", lambda t: problem.outer(x, tree_axpy(t, v, y))),
        ("`inner` in y", lambda t: problem.inner(x, tree_axpy(t, v, y))),
        ("the inner gradient in x", lambda t: gradient_along(tree_axpy(t, u, x), y)),
        ("the inner gradient in y", lambda t: gradient_along(x, tree_axpy(t, v, y))),
    ]
    sentences = []
    for what, fn in checks:
        zero = jnp.zeros(())
        derivative = float(jax.jvp(fn, (zero,), (jnp.ones(()),))[1])
        h = 1e-5
        ahead, behind = float(fn(zero + h)), float(fn(zero - h))
        difference = (ahead - behind) / (2 * h)
        noise = 1e-8 * (abs(ahead) + abs(behind))
        allowed = 1e-4 * (abs(derivative) + abs(difference)) + noise
        if not abs(derivative - difference) <= allowed:
            sentences.append(
                f"the derivative of {what} is not that of its values: along a random "
                f"direction it is {derivative:.4g}, and differences of the values say "
                f"{difference:.4g}. {cut}"
            )
    return sentences


def _out_of_order(problem, x, y) -> str | None:
    """Whether an objective takes its arguments the other way round."""
    for name in ("outer", "inner"):
        objective = getattr(problem, name, None)
        if objective is None or not _evaluates(objective, x, y):
            if objective is not None and _evaluates(objective, y, x):
                return (
                    f"`{name}(x, y)` fails, and `{name}(y, x)` does not: the arguments "
                    "are the outer variables and then the inner ones, in this order."
                )
    return None


def _evaluates(objective, *args) -> bool:
    try:
        return eqx.filter_eval_shape(objective, *args).shape == ()
    except Exception:
        return False


#
# Odds and ends
#


def _in_float64(tree: Any) -> Any:
    """All floating-point arrays in double precision."""

    def cast(leaf):
        is_float = eqx.is_array(leaf) or isinstance(leaf, np.ndarray | np.generic)
        is_float = is_float and jnp.issubdtype(leaf.dtype, jnp.floating)
        return jnp.asarray(np.asarray(leaf), jnp.float64) if is_float else leaf

    return jtu.tree_map(cast, tree)


@eqx.filter_jit
def _eigenvalues(problem, x, y):
    return eigenbasis(stationarity(problem, x, y).stiffened()).values


def _time(fn) -> float:
    """Seconds that a call takes once it is compiled: the best of three."""
    jax.block_until_ready(eqx.filter(fn(), eqx.is_array))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(eqx.filter(fn(), eqx.is_array))
        times.append(time.perf_counter() - start)
    return min(times)
