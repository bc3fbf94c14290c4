"""The overparameterisation doctor: the spectrum of H, its effect on F, and what to do."""

import dataclasses
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
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from .._arguments import as_count, as_variables, check_count, check_key
from .._compat import called_once
from .._derivatives.first import outer_gradients
from .._derivatives.second import (
    cross_derivative_operator,
    gradient_and_hessian,
    hessian_depends_on_x,
    hessian_depends_on_y,
)
from .._equilibrium.base import AbstractEquilibrium
from .._equilibrium.cold_start import ColdStart
from .._equilibrium.stackelberg import Stackelberg
from .._equilibrium.warm_start import WarmStart
from .._inner_solver.projection import Projection
from .._linalg.decompositions import eigh
from .._linalg.eigenbasis import lanczos
from .._linalg.power_iteration import DENSE_SIZE
from .._linalg.precision import in_full_precision
from .._linalg.zero_curvature import margin, uncertainty
from .._linear_solver.pseudoinverse import Pseudoinverse
from .._linear_solver.truncated_cg import TruncatedCG
from .._mesh import on_auto_axes
from .._problem.base import AbstractBilevelProblem
from .._problem.checks import check_problem
from .._problem.constraints import set_y
from .._problem.least_squares import AbstractLeastSquaresProblem
from .._problem.root import check_has_objective
from .._response.base import AbstractResponse
from .._response.implicit import Implicit
from .._response.minimum_displacement import MinimumDisplacement
from .._response.proximal import Proximal
from .._response.unrolled import Unrolled
from .._solution_set.picture import picture
from .._text import as_code
from .._tree import nonzero, tree_dot, tree_dtype, tree_norm, tree_size
from .squares import num_squares


_PRODUCTS = 60


_FEWEST_PRODUCTS = 10


_PROBE_STEPS = 10


# The relative errors and the numbers of Neumann terms in the report.
_ERRORS = (1.0, 0.1, 0.01)


_TERMS = (1, 10, 100)


_MOST_TERMS = 2**40


# If the null space has less than this share of F_y, the choice of the minimum does not
# matter to F.
_SMALL_SHARE = 1e-3


# A decision between zero and nonzero is clear if it is by more than this factor.
CLEAR = 100


# y counts as a minimum if its distance from one, relative to its size, is below this.
_NEAR = 1e-3


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    r"""What [`bilevel_eqx.diagnose`][] returns; `print` it for the findings in words.

    **Attributes:**

    - `response`, `equilibrium`: the recommended response and equilibrium, for
        [`bilevel_eqx.hypergradient`][] and [`bilevel_eqx.solve`][]. `equilibrium` is
        `None` if y is not an inner minimum.
    - `optimiser`: the code of the response's optax optimiser, for printing; empty if
        there is none.
    - `reason`: why these are recommended.
    - `smallest`, `largest`: the extreme eigenvalues of $H$ that were found.
    - `smallest_nonzero`: the smallest absolute eigenvalue that does not count as zero;
        `inf` if all count as zero.
    - `rank`: the number of eigenvalues that do not count as zero.
    - `margin`: by which factor the closest decision between zero and nonzero was clear.
        Below a hundred it is not: rounding, or the error of y, may have made it.
    - `eigenvalues`: those of $H$ that were found, in ascending order; without a
        decomposition, Ritz values.
    - `is_zero`: for each of them, whether it counts as zero.
    - `cut`: what lies between the two kinds, for a picture
        ([`bilevel_eqx.plot.spectrum`][]): the uncertainty of the eigenvalues where it
        does, and otherwise the geometric mean of their neighbours.
    - `singular`: whether some eigenvalues count as zero: $H$ is singular, or numerically
        so.
    - `null_share`: $\|P F_y\|^2 / \|F_y\|^2$, with the projection $P$ on the null space
        of $H$: the share of $F_y$ that depends on *which* minimum y is.
    - `gaps`: for each approximation, the distance of its hypergradient from that of the
        pseudoinverse, relative to the larger of the latter and its part through y.
        Damping is by $\epsilon = 1 / (\alpha K)$, which matches $K$ terms.
    - `terms`: for each relative error, the number $K$ of Neumann terms that reaches it,
        or `None` if no number does.
    - `step_size`: a safe $\alpha$, $1 / \lambda_{\max}$. The limit is twice as large.
    - `epsilon`: a safe damping. With negative curvature, twice the $\epsilon$ that makes
        $H + \epsilon I$ definite. Otherwise the largest one with an error of at most
        10 %; `nan` if there is none.
    - `gradient_norm`: $\|\nabla_y f\|$.
    - `distance`: the distance of the minimum along that gradient, relative to the size of
        y.
    - `at_minimum`: whether y is close enough to a minimum for implicit differentiation.
    - `residual`: $\|H q - (I - P) F_y\| / \|F_y\|$: the error of the reference in `gaps`
        because of the limited number of products.
    - `exact`: whether $H$ was decomposed. If not, all figures hold within Krylov spaces,
        and the rank is an estimate.
    - `num_variables`: the size of y.
    - `num_products`: the number of products with $H$.
    - `num_cross_products`: the number of products with $B^\top$.
    - `num_squares`: if the inner objective is a sum of squares at this x, but not stated
        as one, the number of squares; else `None`. It is read from the program of the
        inner objective, and a sum of squares that is not written as such is not found.
    """

    response: AbstractResponse
    equilibrium: AbstractEquilibrium | None
    optimiser: str
    reason: str
    smallest: float
    largest: float
    smallest_nonzero: float
    rank: int
    margin: float
    # Compared and printed by what is read off them.
    eigenvalues: np.ndarray = dataclasses.field(repr=False, compare=False)
    is_zero: np.ndarray = dataclasses.field(repr=False, compare=False)
    cut: float
    singular: bool
    null_share: float
    gaps: dict[str, float]
    terms: dict[float, int | None]
    step_size: float
    epsilon: float
    gradient_norm: float
    distance: float
    at_minimum: bool
    residual: float
    exact: bool
    num_variables: int
    num_products: int
    num_cross_products: int
    num_squares: int | None

    def __str__(self):
        about = "" if self.exact else "about "
        definite = "some count as zero" if self.singular else "none count as zero"
        if self.margin < CLEAR:
            definite += (
                f", and the closest of these decisions is not clear: it is by a factor "
                f"of {self.margin:.2g}"
            )
        minimum = "an inner minimum" if self.at_minimum else "not an inner minimum"
        gaps = ", ".join(f"{name}: {gap:.1e}" for name, gap in self.gaps.items())
        errors = ", ".join(f"{error:g}" for error in self.terms)
        terms = ", ".join("none" if k is None else f"{k:,}" for k in self.terms.values())
        how = "exact" if self.exact else "matrix-free"
        response = as_code(self.response, optimiser=self.optimiser)
        equilibrium = "none; ask again at a minimum"
        if self.equilibrium is not None:
            equilibrium = as_code(self.equilibrium)
        return "\n".join(
            [
                f"H: {self.num_variables:,} inner variables, rank {about}{self.rank:,}; "
                f"eigenvalues from {self.smallest:.3g} to {self.largest:.3g}, the "
                f"smallest nonzero one {self.smallest_nonzero:.3g}; {definite}.",
                f"y: {minimum}; the inner gradient has norm {self.gradient_norm:.1e}, "
                f"and the minimum along it is {self.distance:.1e} of the size of y away.",
                f"F_y: {self.null_share:.1%} of it is in the null space of H.",
                f"Distance of hypergradients from that of the pseudoinverse: {gaps}."
                if any(self.gaps.values())
                else "Hypergradients: their part through y is zero, since B^T q = 0 for "
                "all q that were tried. Either the inner gradient does not depend on x, "
                "or F does not depend on y, or F_y vanishes here. `check_hypergradient` "
                "tells which.",
                f"Neumann terms for a relative error of {errors}: {terms}.",
                f"Safe: a step size of {self.step_size:.3g} (the limit is "
                f"{2 * self.step_size:.3g}); an epsilon of {self.epsilon:.3g}.",
                f"Cost: {self.num_products} products with H and "
                f"{self.num_cross_products} with B^T, {how}; relative residual "
                f"{self.residual:.1e}.",
                f"Response: {response}. Equilibrium: {equilibrium}.",
                self.reason,
                *self._on_squares(),
            ]
        )

    def _on_squares(self) -> list[str]:
        if self.num_squares is None:
            return []
        squares = f"{self.num_squares:,} square{'s' * (self.num_squares > 1)}"
        condition = self.largest / self.smallest_nonzero
        gain = (
            f": here about {np.sqrt(condition):.1e} in place of {condition:.1e}, and the "
            "rounding error of hypergradients is in proportion to it"
            if condition > 0
            else ""
        )
        return [
            f"The inner objective is a sum of {squares}, stated plainly. If it is stated "
            "as `LeastSquaresProblem(outer, residual)`, solvers work on the Jacobian of "
            "the residual. Where the residual is small, or linear in y, the condition "
            f"number of that is the square root of the one of H{gain}."
        ]


@on_auto_axes
@in_full_precision
def diagnose(
    problem: AbstractBilevelProblem,
    x: PyTree,
    y: PyTree,
    *,
    num_products: int | None = None,
    key: PRNGKeyArray | None = None,
) -> Diagnosis:
    r"""The overparameterisation doctor: how singular the inner Hessian $H$ is, how much
    this matters to the outer objective, the errors of approximate inverses, and which
    response and equilibrium to use.

    An approximate inverse is a filter $m$ of the eigenvalues $s$ of $H$, and its
    hypergradient is $F_x - B^\top m(H) F_y$:

    $$m(s) = \frac{1 - (1 - \alpha s)^K}{s} \;\text{(Neumann)}, \qquad
    \frac{1}{s + \epsilon} \;\text{(damped)}, \qquad
    \frac{1}{s} \text{ or } 0 \;\text{(pseudoinverse)}.$$

    A small $H$ is decomposed. For a large one, a single Lanczos run from $F_y$ gives all
    of them, $m(H) F_y \approx V m(T) V^\top F_y$. A second, short run from a random
    vector estimates the rank by stochastic quadrature. A Ritz value counts as zero if
    zero is within its error bound.

    **Arguments:**

    - `problem`: the bilevel problem.
    - `x`: the outer variables, a pytree of floating-point arrays.
    - `y`: the inner variables, a pytree of floating-point arrays, which should be an
        inner minimum. The report says whether they are.
    - `num_products`: the largest number of products with $H$, and also with $B^\top$. By
        default, a decomposition if y has at most 1,024 entries, and 60 products if it has
        more. Keyword only argument.
    - `key`: for the random vector. Keyword only argument.

    **Returns:**

    A [`bilevel_eqx.reports.Diagnosis`][].

    **Raises:**

    A `ValueError` for an invalid problem, if a derivative at (x, y) is not finite, or if
    `num_products` is less than ten.

    !!! Example

        ```python
        print(blx.diagnose(problem, x, y))
        ```

    ??? cite "Reference"

        Golub and Meurant, *Matrices, Moments and Quadrature with Applications*, 2010,
        for what Lanczos says of $m(H) F_y$. Ubaru, Chen and Saad, *Fast estimation of
        tr(f(A)) via stochastic Lanczos quadrature*, 2017, for the rank.
    """
    x, y = as_variables(x, "x"), as_variables(y, "y")
    check_problem(problem, x, y)
    check_has_objective(
        problem,
        "`diagnose`",
        "`check_hypergradient` examines such a problem, and `certify(problem, "
        "Stackelberg(), x, y)` says whether the root is isolated.",
    )
    if set_y(problem).confines:
        raise ValueError(
            "`diagnose` is for inner problems without constraints: if y is confined to a "
            "set (`project_y`), the null space of H says little about its minima. "
            "`check_hypergradient` supports constraints."
        )
    num_steps, num_probes = _budget(tree_size(y), num_products)
    check_key(key, "diagnose")
    key = jr.key(0) if key is None else key
    measured = _measure(problem, x, y, key, num_steps, num_probes)
    measured = jtu.tree_map(lambda u: np.asarray(u, np.float64), measured)
    if not all(np.all(np.isfinite(u)) for u in jtu.tree_leaves(measured)):
        raise ValueError("`diagnose` needs finite derivatives at (x, y).")
    return _interpret(problem, x, y, measured, num_steps is None)


def _budget(size: int, num_products: int | None) -> tuple[int | None, int]:
    """The numbers of Lanczos steps; `None` if a decomposition is affordable.

    One product is kept for the curvature along the inner gradient.
    """
    if num_products is None:
        num_products = size + 1 if size <= DENSE_SIZE else _PRODUCTS
    else:
        num_products = as_count(num_products)
        check_count(num_products, "num_products", "diagnose")
        if num_products < _FEWEST_PRODUCTS:
            raise ValueError(
                f"`diagnose(num_products=...)` must be at least {_FEWEST_PRODUCTS}; "
                f"it is {num_products}."
            )
    if size <= min(DENSE_SIZE, num_products - 1):
        return None, 0
    num_probes = min(_PROBE_STEPS, num_products // 4)
    return min(num_products - 1 - num_probes, size), num_probes


#
# The products with H
#


class _Nodes(eqx.Module):
    """Eigenvalues or Ritz values, in ascending order, and the coordinates of a vector.

    `ends` are the residuals of the Ritz vectors: H v - value v is `end` times a unit
    vector that is the same for all.
    """

    values: Float[Array, " k"]
    ends: Float[Array, " k"]
    coordinates: Float[Array, " k"]


class _Measured(eqx.Module):
    nodes: _Nodes
    probe: _Nodes | None
    # The eigenvalues in units of their uncertainty, where all are known.
    clearance: Float[Array, " n"] | None
    # B^T times each vector of the nodes.
    images: Float[Array, "k m"]
    outer_x: Float[Array, " m"]
    gradient_norm: Scalar
    # The Rayleigh quotient of the inner gradient g: g^T H g / g^T g.
    quotient: Scalar
    size: Scalar


@called_once
def _measure(problem, x, y, key, num_steps: int | None, num_probes: int) -> _Measured:
    gradient, H = gradient_and_hessian(problem, x, y)
    _, outer_x, outer_y = outer_gradients(problem, x, y)
    outer_y, unravel = jax.flatten_util.ravel_pytree(outer_y)
    if num_steps is None:
        nodes, rows, rotation = _decomposed(H, outer_y)
        probe, clearance = None, picture(problem, x, y)[0].clearance()
    else:
        clearance = None
        nodes, rows, rotation = _krylov(H, outer_y, num_steps)
        noise = jr.normal(key, outer_y.shape, outer_y.dtype)
        probe, _, _ = _krylov(H, noise, num_probes)
    B = cross_derivative_operator(problem, x, y)

    def image(row):
        return jax.flatten_util.ravel_pytree(B.T.mv(unravel(row)))[0]

    # One after the other: together they would need the memory of many networks.
    images = jax.lax.map(image, rows)
    square = tree_dot(gradient, gradient)
    quotient = tree_dot(gradient, H.mv(gradient)) / nonzero(square)
    return _Measured(
        nodes,
        probe,
        clearance,
        rotation.T.astype(images.dtype) @ images,
        jax.flatten_util.ravel_pytree(outer_x)[0],
        tree_norm(gradient),
        quotient,
        tree_norm(y),
    )


def _decomposed(operator: lx.AbstractLinearOperator, vector: Float[Array, " n"]):
    """All eigenvalues, and the eigenvectors in rows."""
    matrix = operator.as_matrix()
    values, vectors = eigh(0.5 * (matrix + matrix.T))
    nodes = _Nodes(values, jnp.zeros_like(values), vectors.T @ vector)
    return nodes, vectors.T, jnp.eye(values.size, dtype=values.dtype)


def _krylov(
    operator: lx.AbstractLinearOperator, vector: Float[Array, " n"], num_steps: int
):
    """Lanczos from a vector: Ritz values, the basis in rows, and its rotation to the
    Ritz vectors. The first row of the basis is parallel to the vector."""
    size = jnp.linalg.norm(vector)
    # If F_y is zero, the eigenvalues of H still matter.
    first = jnp.where(size == 0, 1 / jnp.sqrt(vector.size), vector / nonzero(size))
    basis, values, rotation, last = lanczos(
        operator, first.astype(vector.dtype), num_steps
    )
    return _Nodes(values, last * rotation[-1], size * rotation[0]), basis, rotation


#
# The interpretation, in NumPy and double precision: no array here has the size of y.
#


def _interpret(problem, x, y, measured: _Measured, exact: bool) -> Diagnosis:
    nodes = measured.nodes
    spectrum = _Spectrum(problem, x, y, measured)
    ascending = np.argsort(spectrum.values)
    # Without any curvature, every step size works.
    step_size = 1 / (spectrum.size_of_H or 1.0)
    filters = _Filters(measured, spectrum.is_zero[: nodes.values.size], step_size)
    distance = _distance(measured)
    rounding = 100 * spectrum.eps * spectrum.size_of_H * float(measured.size)
    figures: dict[str, Any] = dict(
        smallest=spectrum.smallest,
        largest=spectrum.largest,
        smallest_nonzero=spectrum.smallest_nonzero,
        rank=spectrum.rank,
        margin=spectrum.margin,
        eigenvalues=spectrum.values[ascending],
        is_zero=spectrum.is_zero[ascending],
        cut=_cut(np.abs(spectrum.values), spectrum.is_zero, spectrum.threshold),
        singular=spectrum.singular,
        null_share=filters.null_share,
        gaps=_gaps(filters),
        terms={error: _fewest_terms(filters, error) for error in _ERRORS},
        step_size=step_size,
        epsilon=spectrum.convexifying or _largest_damping(filters, 1 / step_size),
        gradient_norm=float(measured.gradient_norm),
        distance=distance,
        at_minimum=distance <= _NEAR or float(measured.gradient_norm) <= rounding,
        residual=filters.residual,
        exact=exact,
        num_variables=tree_size(y),
        num_products=spectrum.values.size + 1,
        num_cross_products=nodes.values.size,
        num_squares=_unstated_squares(problem, x, y),
    )
    negative = spectrum.convexifying > 0
    depends_on_x = hessian_depends_on_x(problem, x, y)
    return Diagnosis(**_recommend(figures, negative, depends_on_x)._asdict(), **figures)


# One program each.
_uncertainty, _margin = called_once(uncertainty), called_once(margin)


class _Spectrum:
    """All eigenvalues of H that were found, and which of them count as zero."""

    def __init__(self, problem, x, y, measured: "_Measured"):
        nodes, probe, clearance = measured.nodes, measured.probe, measured.clearance
        n, curved = tree_size(y), hessian_depends_on_y(problem, x, y)
        seen = [nodes] if probe is None else [nodes, probe]
        values = np.concatenate([np.asarray(part.values) for part in seen])
        bounds = np.concatenate([_bounds(part) for part in seen])
        lowest, highest = np.argmin(values), np.argmax(np.abs(values))
        self.values, self.eps = values, float(jnp.finfo(tree_dtype(y)).eps)
        self.smallest, self.largest = float(values[lowest]), float(np.max(values))
        self.size_of_H = float(np.abs(values[highest]) + bounds[highest])
        dtype = tree_dtype(y)
        uncertain = _uncertainty(jnp.asarray(values, dtype), n, curved=curved)
        uncertain = np.maximum(np.asarray(uncertain, np.float64), bounds)
        self.threshold = threshold = float(uncertain[highest])
        clear = values / np.where(uncertain == 0, np.inf, uncertain)
        self.is_zero = np.abs(clear) <= 1
        # The rank of a sum of squares is at most their number.
        most = n if curved else min(n, _num_squares(problem, x, y))
        if clearance is not None:
            # All of them are known: as many as the pseudoinverse inverts.
            clear = clearance
            self.is_zero[:] = False
            num_zero = int(np.sum(np.abs(clear) <= 1))
            self.is_zero[np.argsort(np.abs(values))[:num_zero]] = True
        self.margin = float(_margin(jnp.asarray(clear, dtype)))
        rank = self._seen(nodes) if probe is None else self._estimated(nodes, probe, n)
        self.rank = min(most, rank)
        self.singular = self.rank < n or bool(np.any(self.is_zero))
        nonzero_values = np.abs(values[~self.is_zero])
        self.smallest_nonzero = float(np.min(nonzero_values, initial=np.inf))
        is_negative = bool(values[lowest] < -threshold)
        # Twice the epsilon that makes H definite, or zero.
        twice = 2 * float(bounds[lowest] - values[lowest])
        self.convexifying = twice if is_negative else 0.0

    def _seen(self, nodes: _Nodes) -> int:
        return int(np.sum(~self.is_zero[: nodes.values.size]))

    def _estimated(self, nodes: _Nodes, probe: _Nodes, n: int) -> int:
        # For a random vector, the weights estimate the density of eigenvalues.
        weights = np.asarray(probe.coordinates) ** 2
        nonzero_weights = weights[~self.is_zero[nodes.values.size :]]
        estimate = round(n * float(np.sum(nonzero_weights) / np.sum(weights)))
        # The rank of a compression of H is at most that of H. Nodes without weight may
        # come from an exhausted Krylov space.
        sizes = np.abs(np.asarray(nodes.coordinates))
        is_filling = sizes <= self.eps * np.linalg.norm(sizes)
        filling = int(np.sum(is_filling & ~self.is_zero[: sizes.size]))
        return max(estimate, self._seen(nodes) - filling)


def _cut(sizes: np.ndarray, is_zero: np.ndarray, threshold: float) -> float:
    """Where a line between the eigenvalues that count and those that do not can be."""
    below = float(np.max(sizes[is_zero], initial=0))
    above = float(np.min(sizes[~is_zero], initial=np.inf))
    # For a sum of squares the singular values of its Jacobian decide, and these are not.
    return threshold if below <= threshold < above else float(np.sqrt(below * above))


def _bounds(nodes: _Nodes) -> np.ndarray:
    """Bounds on the distance of Ritz values from eigenvalues: the residual, or its square
    over the gap, which is smaller for an isolated eigenvalue."""
    residuals = np.abs(np.asarray(nodes.ends))
    gaps = np.diff(np.asarray(nodes.values), prepend=-np.inf, append=np.inf)
    gap = np.minimum(gaps[1:], gaps[:-1])
    return residuals * np.minimum(1, residuals / np.where(gap > 0, gap, np.inf))


def _unstated_squares(problem, x, y) -> int | None:
    if isinstance(problem, AbstractLeastSquaresProblem):
        return None
    return num_squares(lambda y: problem.inner(x, y), y)


def _num_squares(problem, x, y) -> float:
    if not isinstance(problem, AbstractLeastSquaresProblem):
        return np.inf
    return tree_size(jax.eval_shape(problem.inner_residual, x, y))


def _distance(measured: _Measured) -> float:
    """The distance to the minimum along the gradient, relative to the size of y."""
    norm, size = float(measured.gradient_norm), float(measured.size)
    curvature = abs(float(measured.quotient))
    if norm == 0:
        return 0.0
    return norm / (curvature * (size or 1.0)) if curvature > 0 else np.inf


class _Filters:
    """The hypergradients of all approximate inverses, computed from the nodes."""

    def __init__(self, measured: _Measured, at_zero, step_size: float):
        nodes = measured.nodes
        self.values, self.step_size = np.asarray(nodes.values), step_size
        # Only lengths are needed, and the triangular factor preserves them.
        through = -measured.images.T * nodes.coordinates
        columns = np.column_stack([measured.outer_x, through])
        self.factor = np.asarray(np.linalg.qr(columns, mode="r"))
        inverse = np.where(at_zero, 0, 1 / np.where(at_zero, 1, nodes.values))
        self.exact = inverse
        through_y = self.length(inverse)
        both = float(np.linalg.norm(self.factor @ np.append(1.0, inverse)))
        self.scale = max(through_y, both)
        square = float(np.sum(nodes.coordinates**2)) or 1.0
        self.null_share = float(np.sum(nodes.coordinates[at_zero] ** 2)) / square
        rest = np.sum(nodes.ends * inverse * nodes.coordinates)
        self.residual = abs(float(rest)) / np.sqrt(square)

    def length(self, multipliers) -> float:
        """The length of B^T m(H) F_y."""
        return float(np.linalg.norm(self.factor[:, 1:] @ multipliers))

    def error(self, multipliers) -> float:
        with np.errstate(invalid="ignore"):
            error = self.length(multipliers - self.exact)
        # Not `error > 0`, which is false for NaN, and so would hide an overflow.
        return error if error == 0 else error / self.scale

    def neumann(self, num_terms: int) -> float:
        """The error of a Neumann series."""
        s = self.values
        # Rounding must not make it larger than one: the logarithm would be NaN.
        t = np.minimum(self.step_size * s, 1)
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            total = -np.expm1(num_terms * np.log1p(-t)) / np.where(s == 0, 1, s)
            return self.error(np.where(s == 0, self.step_size * num_terms, total))

    def damped(self, epsilon: float) -> float:
        """The error of a damped inverse."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.error(1 / (self.values + epsilon))


def _gaps(filters: _Filters) -> dict[str, float]:
    gaps = {f"{k} Neumann term{'s' * (k > 1)}": filters.neumann(k) for k in _TERMS}
    for k in _TERMS:
        epsilon = 1 / (filters.step_size * k)
        gaps[f"damped by {epsilon:.1e}"] = filters.damped(epsilon)
    return gaps


def _fewest_terms(filters: _Filters, error: float) -> int | None:
    """The number of terms at which a Neumann series first has this error."""
    high = 1
    # Negated, so that NaN is bad too.
    while not filters.neumann(high) <= error:
        high *= 2
        if high > _MOST_TERMS:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        if filters.neumann(middle) <= error:
            high = middle
        else:
            low = middle
    return high


def _largest_damping(filters: _Filters, largest: float, error: float = 0.1) -> float:
    """The largest epsilon, up to the size of H, whose error is at most this."""
    logarithms = np.log10(largest) + np.linspace(-12, 0, 49)
    good = [i for i, e in enumerate(logarithms) if filters.damped(10**e) <= error]
    if not good:
        return np.nan
    if good[-1] == logarithms.size - 1:
        return float(10 ** logarithms[-1])
    low, high = logarithms[good[-1]], logarithms[good[-1] + 1]
    for _ in range(30):
        middle = 0.5 * (low + high)
        if filters.damped(10**middle) <= error:
            low = middle
        else:
            high = middle
    return float(10**low)


#
# What to do
#


class _Recommended(NamedTuple):
    response: AbstractResponse
    equilibrium: AbstractEquilibrium | None
    reason: str
    optimiser: str = ""


def _recommend(figures: dict, negative: bool, depends_on_x: bool) -> _Recommended:
    """A response, an equilibrium, and the reason for both."""
    if not figures["at_minimum"]:
        return _away_from_a_minimum(figures)
    if negative:
        return _at_a_saddle(figures)
    if not figures["singular"]:
        return _definite(figures)
    implicit = Implicit(Projection(), Pseudoinverse())
    share = figures["null_share"]
    where = f"H {_how_singular(figures)}"
    if share <= _SMALL_SHARE:
        reason = (
            f"{where}, but only {share:.1e} of F_y is in its null space: to first order "
            "the choice of the inner minimum does not matter to F. A full warm start is "
            "the cheapest."
        )
        return _Recommended(implicit, WarmStart(), reason)
    matters = (
        f"{where}, and {share:.0%} of F_y is tangential to the set of inner minima: the "
        "choice of the minimum matters. Use ColdStart() if you will use x alone. If you "
        "will use x and y, use WarmStart(), or Optimistic() for the best y, or "
        "Pessimistic(radius) for a guarantee."
    )
    if depends_on_x:
        matters += (
            " H depends on x, so that the derivative of a cold start has a term in the "
            "null space, which -H^+ B lacks."
        )
        return _Recommended(MinimumDisplacement(), ColdStart(), matters)
    matters += " H does not depend on x: -H^+ B is then right for a cold start too."
    return _Recommended(implicit, ColdStart(), matters)


def _how_singular(figures) -> str:
    rank, size = figures["rank"], figures["num_variables"]
    if figures["exact"]:
        return f"is singular, of rank {rank:,} with {size:,} variables"
    return (
        f"is singular, as far as {figures['num_products']} products can show (rank about "
        f"{rank:,} of {size:,})"
    )


def _away_from_a_minimum(figures) -> _Recommended:
    step_size = _rounded(figures["step_size"])
    # K steps of gradient descent have the Jacobian of K Neumann terms.
    num_steps = min(figures["terms"][0.1] or _MOST_STEPS, _MOST_STEPS)
    response = Unrolled(optax.sgd(step_size), max(num_steps, _FEWEST_STEPS))
    reason = (
        f"y is not an inner minimum: the inner gradient has norm "
        f"{figures['gradient_norm']:.1e}. Implicit derivatives are right only at a "
        "minimum; unrolling does not need one. To compare equilibria, solve further and "
        "ask again."
    )
    return _Recommended(response, None, reason, f"optax.sgd({step_size:g})")


_FEWEST_STEPS, _MOST_STEPS = 10, 1000


def _rounded(rate: float) -> float:
    """A rate rounded as it is printed, so that the code and the object are the same."""
    return float(f"{rate:.2g}")


def _at_a_saddle(figures) -> _Recommended:
    epsilon = _rounded(figures["epsilon"])
    reason = (
        f"H has the negative eigenvalue {figures['smallest']:.2g}: y is not a minimum, "
        f"but at or near a saddle. With epsilon = {epsilon:g} the proximal problem is "
        "convex there."
    )
    response = Proximal(epsilon, Projection(), TruncatedCG(100))
    return _Recommended(response, WarmStart(epsilon), reason)


def _definite(figures) -> _Recommended:
    condition = figures["largest"] / figures["smallest_nonzero"]
    reason = (
        f"H is positive definite with a condition number of {condition:.1e}, and the "
        "inner minimum is unique: all equilibria that solve the inner problem are the "
        "same."
    )
    size = figures["num_variables"]
    if size <= DENSE_SIZE:
        reason += " H is small enough to decompose."
        solver: lx.AbstractLinearSolver = Pseudoinverse()
    else:
        # The bound on conjugate gradients, for an error of 1 % in the norm of H.
        num_steps = min(size, int(np.ceil(0.5 * np.sqrt(condition) * np.log(200))))
        reason += f" {num_steps} steps of conjugate gradients have an error below 1 %."
        solver = TruncatedCG(num_steps)
    return _Recommended(Implicit(Projection(), solver), Stackelberg(), reason)
