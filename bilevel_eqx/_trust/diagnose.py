"""The overparameterisation doctor: what H is like where F feels it, and what to do."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import lineax as lx
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from .._arguments import as_variables, check_count
from .._derivatives.first import outer_gradients
from .._derivatives.second import (
    cross_derivative_operator,
    gradient_and_hessian,
    is_curved,
    is_turning,
)
from .._linalg.decompositions import eigh
from .._linalg.eigenbasis import lanczos
from .._linalg.power_iteration import DENSE_SIZE
from .._problem.base import AbstractBilevelProblem
from .._problem.checks import check_problem
from .._problem.least_squares import AbstractLeastSquaresProblem
from .._tree import all_finite, nonzero, tree_dot, tree_dtype, tree_norm, tree_size


_PRODUCTS = 60


_FEWEST_PRODUCTS = 10


_PROBE_STEPS = 10


# The errors that are asked about, and the numbers of terms that are compared.
_ERRORS = (1.0, 0.1, 0.01)


_TERMS = (1, 10, 100)


_MOST_TERMS = 2**40


# Below this share of F_y it does not matter to F which of many minima is chosen.
_SMALL_SHARE = 1e-3


# Farther than this from a minimum, relative to the size of y, is not at one.
_NEAR = 1e-3


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    r"""What [`bilevel_eqx.diagnose`][] returns; `print` it for the findings in words.

    **Attributes:**

    - `response`, `equilibrium`: what is recommended, as one would write it.
    - `reason`: why.
    - `smallest`, `largest`: the extreme eigenvalues of $H$ that were seen.
    - `smallest_nonzero`: the smallest absolute eigenvalue that does not count as zero;
        `inf` if all do.
    - `rank`: the number of eigenvalues that do not.
    - `singular`: whether some do: whether $H$ is singular, or could not be told from it.
    - `null_share`: $\|P F_y\|^2 / \|F_y\|^2$, with $P$ the projection on the null space
        of $H$: how much of what F wants of y is about *which* minimum it is.
    - `gaps`: from an approximation to how far its hypergradient is from that of the
        pseudoinverse, relative to the larger of that and of its part through y. Damping
        is by $\epsilon = 1 / (\alpha K)$, which matches $K$ terms.
    - `terms`: from a relative error to the number $K$ of Neumann terms that it takes, or
        `None` where no number attains it.
    - `step_size`: a safe $\alpha$, $1 / \lambda_{\max}$. Twice of it is the limit.
    - `epsilon`: a safe damping. If a curvature is negative, twice of what makes
        $H + \epsilon I$ definite; otherwise the largest that costs 10 %, and `nan` if
        all cost more.
    - `gradient_norm`: $\|\nabla_y f\|$.
    - `distance`: how far the minimum is along that gradient, relative to the size of y.
    - `at_minimum`: whether y is close enough to one for implicit differentiation.
    - `residual`: how far $q$ is from $H q = (I - P) F_y$, relative to $F_y$, because
        products were few: the accuracy of what is compared with.
    - `exact`: whether $H$ was decomposed. If not, all is said within Krylov spaces, and
        the rank is an estimate.
    - `num_variables`: the size of y.
    - `num_products`: how many products with $H$ it took.
    - `num_cross_products`: and with $B^\top$.
    """

    response: str
    equilibrium: str
    reason: str
    smallest: float
    largest: float
    smallest_nonzero: float
    rank: int
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

    def __str__(self):
        about = "" if self.exact else "about "
        definite = "some count as zero" if self.singular else "none counts as zero"
        minimum = "an inner minimum" if self.at_minimum else "not an inner minimum"
        gaps = ", ".join(f"{name}: {gap:.1e}" for name, gap in self.gaps.items())
        errors = ", ".join(f"{error:g}" for error in self.terms)
        terms = ", ".join("none" if k is None else f"{k:,}" for k in self.terms.values())
        how = "exact" if self.exact else "matrix-free"
        return "\n".join(
            [
                f"H: {self.num_variables:,} inner variables, rank {about}{self.rank:,}; "
                f"eigenvalues from {self.smallest:.3g} to {self.largest:.3g}, the "
                f"smallest nonzero one {self.smallest_nonzero:.3g}; {definite}.",
                f"y: {minimum}; the inner gradient has norm {self.gradient_norm:.1e}, "
                f"and its minimum is {self.distance:.1e} of the size of y away.",
                f"F_y: {self.null_share:.1%} of it is in the null space of H.",
                f"Hypergradients, from that of the pseudoinverse: {gaps}."
                if any(self.gaps.values())
                else "Hypergradients: nothing of them comes through y, since B^T q = 0 "
                "for all q that were tried: x does not reach the inner gradient, or y "
                "not F, or F_y vanishes here. `check_hypergradient` tells which.",
                f"Neumann terms for a relative error of {errors}: {terms}.",
                f"Safe: a step size of {self.step_size:.3g} (the limit is "
                f"{2 * self.step_size:.3g}); an epsilon of {self.epsilon:.3g}.",
                f"Cost: {self.num_products} products with H and "
                f"{self.num_cross_products} with B^T, {how}; relative residual "
                f"{self.residual:.1e}.",
                f"Response: {self.response}. Equilibrium: {self.equilibrium}.",
                self.reason,
            ]
        )


def diagnose(
    problem: AbstractBilevelProblem,
    x: PyTree,
    y: PyTree,
    *,
    num_products: int | None = None,
    key: PRNGKeyArray | None = None,
) -> Diagnosis:
    r"""The overparameterisation doctor: how singular the inner Hessian $H$ is, how much
    of that the outer objective notices, what approximate inverses would cost, and which
    response and equilibrium to take.

    An approximate inverse is a filter $m$ of the eigenvalues $s$ of $H$, and its
    hypergradient is $F_x - B^\top m(H) F_y$:

    $$m(s) = \frac{1 - (1 - \alpha s)^K}{s} \;\text{(Neumann)}, \qquad
    \frac{1}{s + \epsilon} \;\text{(damped)}, \qquad
    \frac{1}{s} \text{ or } 0 \;\text{(pseudoinverse)}.$$

    A small $H$ is decomposed. For a large one, a single Lanczos run from $F_y$ has all
    of them, $m(H) F_y \approx V m(T) V^\top F_y$, and a second short one, from a random
    vector, estimates the rank by stochastic quadrature. A Ritz value counts as zero if
    zero is within its error bound.

    **Arguments:**

    - `problem`: the bilevel problem.
    - `x`: the outer variables, a pytree of floating-point arrays.
    - `y`: the inner variables, a pytree of floating-point arrays: an inner minimum, or
        it is among the findings that they are none.
    - `num_products`: the largest number of products with $H$, and of as many with
        $B^\top$. By default what a decomposition takes where y has at most 1,024
        entries, and 60 where it has more. Keyword only argument.
    - `key`: for the random vector. Keyword only argument.

    **Returns:**

    A [`bilevel_eqx.Diagnosis`][].

    **Raises:**

    A `ValueError` for a problem that cannot be right, if a derivative at (x, y) is not
    finite, or if `num_products` is less than ten.

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
    if problem.project_y is not None:
        raise ValueError(
            "`diagnose` looks at inner problems without constraints: where y is confined "
            "to a set (`project_y`), the null space of H says little of its minima. "
            "`check_hypergradient` knows of constraints."
        )
    num_steps, num_probes = _budget(tree_size(y), num_products)
    key = jr.key(0) if key is None else key
    measured = _measure(problem, x, y, key, num_steps, num_probes)
    if not bool(all_finite(measured)):
        raise ValueError("`diagnose` needs derivatives that are finite at (x, y).")
    return _interpret(problem, x, y, measured, num_steps is None)


def _budget(size: int, num_products: int | None) -> tuple[int | None, int]:
    """The numbers of Lanczos steps; or none, where a decomposition is affordable.

    One product is left for the curvature along the inner gradient.
    """
    if num_products is None:
        num_products = size + 1 if size <= DENSE_SIZE else _PRODUCTS
    else:
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
# What takes products with H
#


class _Nodes(eqx.Module):
    """Eigenvalues or Ritz values, in ascending order, and the coordinates of a vector.

    `ends` is what each Ritz vector lacks to be an eigenvector: H v - value v is `end`
    times one vector of length one, which is the same for all.
    """

    values: Float[Array, " k"]
    ends: Float[Array, " k"]
    coordinates: Float[Array, " k"]


class _Measured(eqx.Module):
    nodes: _Nodes
    probe: _Nodes | None
    # B^T of each vector of the nodes.
    images: Float[Array, "k m"]
    outer_x: Float[Array, " m"]
    gradient_norm: Scalar
    # Of the inner gradient: g^T H g / g^T g.
    quotient: Scalar
    size: Scalar


@eqx.filter_jit
def _measure(problem, x, y, key, num_steps: int | None, num_probes: int) -> _Measured:
    gradient, H = gradient_and_hessian(problem, x, y)
    _, outer_x, outer_y = outer_gradients(problem, x, y)
    outer_y, unravel = jax.flatten_util.ravel_pytree(outer_y)
    if num_steps is None:
        nodes, rows, rotation = _decomposed(H, outer_y)
        probe = None
    else:
        nodes, rows, rotation = _krylov(H, outer_y, num_steps)
        noise = jr.normal(key, outer_y.shape, outer_y.dtype)
        probe, _, _ = _krylov(H, noise, num_probes)
    B = cross_derivative_operator(problem, x, y)

    def image(row):
        return jax.flatten_util.ravel_pytree(B.T.mv(unravel(row)))[0]

    # One after the other: together they would take the memory of as many networks.
    images = jax.lax.map(image, rows)
    square = tree_dot(gradient, gradient)
    quotient = tree_dot(gradient, H.mv(gradient)) / nonzero(square)
    return _Measured(
        nodes,
        probe,
        rotation.T.astype(images.dtype) @ images,
        jax.flatten_util.ravel_pytree(outer_x)[0],
        tree_norm(gradient),
        quotient,
        tree_norm(y),
    )


def _decomposed(operator: lx.AbstractLinearOperator, vector: Float[Array, " n"]):
    """All eigenvalues; the eigenvectors in rows, which nothing need rotate."""
    matrix = operator.as_matrix()
    values, vectors = eigh(0.5 * (matrix + matrix.T))
    nodes = _Nodes(values, jnp.zeros_like(values), vectors.T @ vector)
    return nodes, vectors.T, jnp.eye(values.size, dtype=values.dtype)


def _krylov(
    operator: lx.AbstractLinearOperator, vector: Float[Array, " n"], num_steps: int
):
    """Lanczos from a vector: Ritz values, the basis in rows, and its rotation to the
    Ritz vectors. Along the first of the basis is the vector itself."""
    size = jnp.linalg.norm(vector)
    # Where F does not feel y, its eigenvalues are of interest nonetheless.
    first = jnp.where(size == 0, 1 / jnp.sqrt(vector.size), vector / nonzero(size))
    basis, values, rotation, last = lanczos(
        operator, first.astype(vector.dtype), num_steps
    )
    return _Nodes(values, last * rotation[-1], size * rotation[0]), basis, rotation


#
# What it means. In NumPy and double precision: no array here is of the size of y.
#


def _interpret(problem, x, y, measured: _Measured, exact: bool) -> Diagnosis:
    measured = jtu.tree_map(lambda u: np.asarray(u, np.float64), measured)
    nodes = measured.nodes
    spectrum = _Spectrum(problem, x, y, nodes, measured.probe)
    # One is as good as any where there is no curvature at all.
    step_size = 1 / (spectrum.size_of_H or 1.0)
    filters = _Filters(measured, spectrum.is_zero[: nodes.values.size], step_size)
    distance = _distance(measured)
    rounding = 100 * spectrum.eps * spectrum.size_of_H * float(measured.size)
    figures: dict[str, Any] = dict(
        smallest=spectrum.smallest,
        largest=spectrum.largest,
        smallest_nonzero=spectrum.smallest_nonzero,
        rank=spectrum.rank,
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
    )
    negative, turning = spectrum.convexifying > 0, is_turning(problem, x, y)
    response, equilibrium, reason = _recommend(figures, negative, turning)
    return Diagnosis(response, equilibrium, reason, **figures)


class _Spectrum:
    """All eigenvalues that were seen of H, and which of them count as zero."""

    def __init__(self, problem, x, y, nodes: _Nodes, probe: _Nodes | None):
        n, curved = tree_size(y), is_curved(problem, x, y)
        seen = [nodes] if probe is None else [nodes, probe]
        values = np.concatenate([np.asarray(part.values) for part in seen])
        bounds = np.concatenate([_bounds(part) for part in seen])
        lowest, highest = np.argmin(values), np.argmax(np.abs(values))
        self.values, self.eps = values, float(jnp.finfo(tree_dtype(y)).eps)
        self.smallest, self.largest = float(values[lowest]), float(np.max(values))
        self.size_of_H = float(np.abs(values[highest]) + bounds[highest])
        # As in the pseudoinverse: at an inner minimum that is not exact, what should be
        # zero is as large as its error.
        relative = self.eps ** (2 / 3) if curved else self.eps * min(n, DENSE_SIZE)
        threshold = relative * float(np.abs(values[highest]))
        self.is_zero = np.abs(values) <= np.maximum(threshold, bounds)
        # The rank of a sum of squares is at most their number.
        most = n if curved else min(n, _num_squares(problem, x, y))
        if probe is None:
            self.is_zero[np.argsort(np.abs(values))[: n - most]] = True
        rank = self._seen(nodes) if probe is None else self._estimated(nodes, probe, n)
        self.rank = min(most, rank)
        self.singular = self.rank < n or bool(np.any(self.is_zero))
        nonzero_values = np.abs(values[~self.is_zero])
        self.smallest_nonzero = float(np.min(nonzero_values, initial=np.inf))
        is_negative = bool(values[lowest] < -threshold)
        # Twice the epsilon that makes H definite, or zero.
        margin = 2 * float(bounds[lowest] - values[lowest])
        self.convexifying = margin if is_negative else 0.0

    def _seen(self, nodes: _Nodes) -> int:
        return int(np.sum(~self.is_zero[: nodes.values.size]))

    def _estimated(self, nodes: _Nodes, probe: _Nodes, n: int) -> int:
        # For a random vector, the weights estimate how many eigenvalues are where.
        weights = np.asarray(probe.coordinates) ** 2
        nonzero_weights = weights[~self.is_zero[nodes.values.size :]]
        estimate = round(n * float(np.sum(nonzero_weights) / np.sum(weights)))
        # A compression of H has no larger rank than H. What has no weight may only fill
        # up a Krylov space that was exhausted.
        sizes = np.abs(np.asarray(nodes.coordinates))
        is_filling = sizes <= self.eps * np.linalg.norm(sizes)
        filling = int(np.sum(is_filling & ~self.is_zero[: sizes.size]))
        return max(estimate, self._seen(nodes) - filling)


def _bounds(nodes: _Nodes) -> np.ndarray:
    """How far Ritz values may be from eigenvalues: by their residual, or by its square
    over the gap, which is the better bound for one that stands alone."""
    residuals = np.abs(np.asarray(nodes.ends))
    gaps = np.diff(np.asarray(nodes.values), prepend=-np.inf, append=np.inf)
    gap = np.minimum(gaps[1:], gaps[:-1])
    return residuals * np.minimum(1, residuals / np.where(gap > 0, gap, np.inf))


def _num_squares(problem, x, y) -> float:
    if not isinstance(problem, AbstractLeastSquaresProblem):
        return np.inf
    return tree_size(jax.eval_shape(problem.inner_residual, x, y))


def _distance(measured: _Measured) -> float:
    """To the minimum along the gradient, relative to the size of y."""
    norm, size = float(measured.gradient_norm), float(measured.size)
    curvature = abs(float(measured.quotient))
    if norm == 0:
        return 0.0
    return norm / (curvature * (size or 1.0)) if curvature > 0 else np.inf


class _Filters:
    """The hypergradients of all approximate inverses, from the nodes alone."""

    def __init__(self, measured: _Measured, at_zero, step_size: float):
        nodes = measured.nodes
        self.values, self.step_size = np.asarray(nodes.values), step_size
        # Lengths are all that is asked for, and the triangular factor keeps them.
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
        """Of B^T m(H) F_y."""
        return float(np.linalg.norm(self.factor[:, 1:] @ multipliers))

    def error(self, multipliers) -> float:
        with np.errstate(invalid="ignore"):
            error = self.length(multipliers - self.exact)
        # Not `error > 0`, which would take a sum that has overflowed for a right one.
        return error if error == 0 else error / self.scale

    def neumann(self, num_terms: int) -> float:
        """The error of a Neumann series."""
        s = self.values
        # Rounding must not make it more than one, of which there is no logarithm.
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
    """The largest epsilon, up to the size of H, that costs no more than this error."""
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

_IMPLICIT = "Implicit(Projection(), Pseudoinverse())"


def _recommend(figures: dict, negative: bool, turning: bool) -> tuple[str, str, str]:
    """A response, an equilibrium, and the reason for both."""
    if not figures["at_minimum"]:
        return _away_from_a_minimum(figures)
    if negative:
        return _at_a_saddle(figures)
    if not figures["singular"]:
        return _definite(figures)
    share = figures["null_share"]
    where = f"H {_how_singular(figures)}"
    if share <= _SMALL_SHARE:
        reason = (
            f"{where}; but only {share:.1e} of F_y is in its null space, so that to "
            "first order F does not mind which of the inner minima it is. A full warm "
            "start is the cheapest."
        )
        return _IMPLICIT, "WarmStart()", reason
    matters = (
        f"{where}, and {share:.0%} of F_y is along the inner minima: it matters which of "
        "them is meant. ColdStart() if x alone is what will be used; if the pair is, "
        "WarmStart(), or Optimistic() for the best one; Pessimistic(radius) for a "
        "guarantee."
    )
    if turning:
        matters += (
            " H moves with x, so that the derivative of a cold start has a term in the "
            "null space, which -H^+ B lacks."
        )
        return "MinimumDisplacement()", "ColdStart()", matters
    matters += " H does not move with x: -H^+ B is then right for a cold start too."
    return _IMPLICIT, "ColdStart()", matters


def _how_singular(figures) -> str:
    rank, size = figures["rank"], figures["num_variables"]
    if figures["exact"]:
        return f"is singular, of rank {rank:,} with {size:,} variables"
    return (
        f"is singular, or could not be told from it by {figures['num_products']} "
        f"products (rank about {rank:,} of {size:,})"
    )


def _away_from_a_minimum(figures) -> tuple[str, str, str]:
    response = f"Unrolled(optax.sgd({figures['step_size']:.2g}), num_steps)"
    reason = (
        f"y is not an inner minimum: the inner gradient has norm "
        f"{figures['gradient_norm']:.1e}. Implicit derivatives presume one, and "
        "unrolling presumes nothing. Or solve further, and ask again: which equilibria "
        "differ is a question about a minimum."
    )
    return response, "to be asked again at a minimum", reason


def _at_a_saddle(figures) -> tuple[str, str, str]:
    epsilon = f"{figures['epsilon']:.2g}"
    reason = (
        f"H has the negative eigenvalue {figures['smallest']:.2g}, where a minimum has "
        f"none: y is at a saddle, or near one. With epsilon = {epsilon} the proximal "
        "problem is convex there."
    )
    response = f"Proximal({epsilon}, Projection(), TruncatedCG(100))"
    return response, f"WarmStart({epsilon})", reason


def _definite(figures) -> tuple[str, str, str]:
    condition = figures["largest"] / figures["smallest_nonzero"]
    reason = (
        f"H is positive definite with a condition number of {condition:.1e}, and the "
        "inner minimum unique: all equilibria that solve the inner problem are the same."
    )
    size = figures["num_variables"]
    if size <= DENSE_SIZE:
        return _IMPLICIT, "Stackelberg()", reason + " H is small enough to decompose."
    # The bound on conjugate gradients, for an error of a hundredth in the norm of H.
    num_steps = min(size, int(np.ceil(0.5 * np.sqrt(condition) * np.log(200))))
    response = f"Implicit(Projection(), TruncatedCG({num_steps}))"
    reason += f" {num_steps} steps of conjugate gradients bring an error below 1 %."
    return response, "Stackelberg()", reason
