"""What an equilibrium is, and what certifies one."""

import abc
import functools as ft
from collections.abc import Iterable
from typing import Any, cast, ClassVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree, Scalar

from .._arguments import as_count, as_variables, check_count, check_key, says
from .._compat import called_once, Fn, is_traced
from .._custom_types import typechecked
from .._linalg.power_iteration import DENSE_SIZE
from .._linalg.precision import in_full_precision
from .._linalg.zero_curvature import least_clear, smallest
from .._mesh import on_auto_axes
from .._problem.base import AbstractBilevelProblem
from .._problem.checks import check_problem
from .._problem.constraints import set_y
from .._problem.finite_sum import AbstractFiniteSumProblem
from .._problem.root import check_has_objective
from .._text import aligned
from .._tree import tree_eps, tree_size, widened
from .jackknife import jackknife
from .outer_curvature import Derivatives, NOT_A_MINIMUM, outer_curvature


MAX_PRODUCTS = 128
"""How many products with H a certificate may take, unless another number is given."""


class Certificate(eqx.Module):
    """How far a point is from the definition of an equilibrium: residuals, each of
    which is zero at one. `print` it for a table.

    **Attributes:**

    - `residuals`: a dictionary from names to values. They have no units, so that 1e-6
        means the same everywhere: see [`bilevel_eqx.certify`][].
    - `concept`: the equilibrium in question.
    - `meanings`: a dictionary from the same names to what each one measures.
    - `largest`: the largest of the residuals.
    - `accuracy`: how accurate the linear solves behind the residuals were, as a relative
        residual that was measured and not presumed; `None` if there were none.
    - `unclear`: the eigenvalue of $H$, relative to the largest, of which it is the least
        clear whether it is zero, because it lies between noise and signal. For a sum of
        squares it is a singular value of the Jacobian of the residual. Zero if all are
        clear; `None` if they were not looked at: beyond 1,024 variables, and in a set.
        It is computed when it is asked for.
    - `standard_errors`: those of the residuals, if they were estimated on some of the
        data; `None` if all data were used.
    - `notes`: what the residuals do not say: where the picture is only local, or where
        a condition is empty.
    """

    residuals: dict[str, Scalar]
    accuracy: Scalar | None
    standard_errors: dict[str, Scalar] | None
    concept: str = eqx.field(static=True)
    notes: tuple[str, ...] = eqx.field(static=True)
    _meanings: tuple[tuple[str, str], ...] = eqx.field(static=True)
    _decisions: tuple[Array, Array | None] | None
    _decided: str = eqx.field(static=True)

    def __init__(
        self,
        concept: str,
        residuals: dict[str, tuple[Any, str]],
        *,
        accuracy: Any = None,
        decisions: tuple[Any, Any, str] | None = None,
        notes: Iterable[str] = (),
    ):
        """**Arguments:**

        - `concept`: the name of the equilibrium.
        - `residuals`: from the name of each residual to a pair of its value and of a
            sentence on what it measures.
        - `accuracy`: the relative residual of the linear solves behind them. Keyword
            only argument.
        - `decisions`: curvatures in units of their uncertainty; the curvatures, or `None`
            if all uncertainty is rounding; and what they are. Keyword only argument.
        - `notes`: further sentences. Keyword only argument.
        """
        self.concept = concept
        self.residuals = {k: jnp.asarray(value) for k, (value, _) in residuals.items()}
        self.accuracy = None if accuracy is None else jnp.asarray(accuracy)
        self._decisions, self._decided = None, ""
        if decisions is not None:
            self._decisions, self._decided = decisions[:2], decisions[2]
        self.standard_errors = None
        self.notes = tuple(notes)
        self._meanings = tuple((k, meaning) for k, (_, meaning) in residuals.items())

    @property
    def meanings(self) -> dict[str, str]:
        return dict(self._meanings)

    @property
    def largest(self) -> Array:
        # `maximum` and not `max`: it hands a NaN on.
        largest = jnp.asarray(0.0)
        for value in self.residuals.values():
            largest = jnp.maximum(largest.astype(value.dtype), value)
        return largest

    @property
    def decisions(self) -> tuple[Any, Any, str] | None:
        known = self._decisions
        return None if known is None else (*known, self._decided)

    @property
    def unclear(self) -> Array | None:
        known = self._known_decisions
        return None if known is None else least_clear(*known)

    @property
    def _known_decisions(self) -> tuple[Array, Array | None] | None:
        known = self._decisions
        return None if known is None or not eqx.is_array(known[0]) else known

    def __str__(self):
        rows = [
            ["  " + name, self._value(name), " " + meaning]
            for name, meaning in self._meanings
        ]
        lines = [f"Certificate for {self.concept}", *aligned(rows, "<><")]
        if self.accuracy is not None:
            accuracy = _as_text(self.accuracy)
            lines.append(f"  (linear solves behind these are right to {accuracy})")
        unclear = self.unclear
        if _is_positive(unclear):
            lines.append(
                f"  (it is not clear whether {self._decided} is zero that is "
                f"{_as_text(unclear)} of the largest: it lies between noise and "
                "signal, and another minimum may or may not be near)"
            )
        known = self._known_decisions
        if _is_positive(self.residuals.get("uniqueness")) and known is not None:
            size, rounding = smallest(*known)
            lines.append(
                f"  (uniqueness: {self._decided} is {_as_text(size)} of the largest, and "
                f"up to {_as_text(rounding)} counts as zero, because it may be an error)"
            )
        lines.extend(f"  ({note})" for note in self.notes)
        return "\n".join(lines)

    def _value(self, name: str) -> str:
        value = _as_text(self.residuals[name])
        if self.standard_errors is None:
            return value
        return f"{value} ± {_as_text(self.standard_errors[name])}"


def _is_positive(value) -> bool:
    known = eqx.is_array(value) and not is_traced(value)
    return known and bool(np.any(np.asarray(value) > 0))


def _as_text(value) -> str:
    if is_traced(value):
        return "traced"
    if not eqx.is_array(value):  # a placeholder, in a tree of something else
        return str(value)
    if value.ndim == 0:
        return f"{float(value):.2e}"
    return np.array2string(np.asarray(value), precision=2)


class AbstractEquilibrium(eqx.Module):
    """An equilibrium concept: which inner solution is meant, and what is zero there."""

    warm: eqx.AbstractClassVar[bool]
    """Whether the inner variables start from where they were (a warm start) or from
    `y0` each time (a cold one)."""

    def check(
        self, problem: AbstractBilevelProblem, x: PyTree[Array], y: PyTree[Array]
    ) -> None:
        """Raises a `ValueError`, with the reason, if `problem` cannot have such an
        equilibrium. Called by [`bilevel_eqx.solve`][] before any work is done, with the
        initial variables; these may be traced, and then there are no numbers to go by.
        """
        del problem, x, y

    bounds_products: ClassVar[bool] = False
    """Whether its `certify` takes a bound on the products with H, `max_products`."""

    heeds_x0: ClassVar[bool] = False
    """Whether its `certify` takes `x0`, where x started."""

    admits_constraints: ClassVar[bool] = False
    """Whether it is defined, and certified, where y is confined to a set."""

    admits_roots: ClassVar[bool] = False
    """Whether it is defined, and certified, where y is a root and not a minimum."""

    def check_kind(self, problem: AbstractBilevelProblem) -> None:
        """Raises a `ValueError` if `problem` confines y, or has a root for a minimum, and
        this concept cannot."""
        if not self.admits_roots:
            check_has_objective(
                problem,
                f"`{type(self).__name__}`",
                "Use `Stackelberg()`, or `WarmStart()`, which accepts roots that are "
                "not isolated.",
            )
        if set_y(problem).confines and not self.admits_constraints:
            raise ValueError(
                f"`{type(self).__name__}` selects among the inner minima by the null "
                "space of H, and where y is confined to a set (`project_y`) that does "
                "not describe them. `Stackelberg()` (one inner minimum), `WarmStart()` "
                "and `Nash()` know of constraints on y, and "
                "`Pessimistic(within=projection)` takes one of its own. Constraints on "
                "x are for all."
            )

    def outer_derivatives(
        self,
        problem: AbstractBilevelProblem,
        x: PyTree[Array],
        y: PyTree[Array],
        y0: PyTree[Array] | None,
    ) -> Derivatives | None:
        """The gradient of x -> F(x, y(x)), for the y(x) of the concept that passes
        through y, and the products with its second derivative; or `None` if they are not
        known. [`bilevel_eqx.certify`][] asks for them if it is to look for a minimum in x
        to second order."""
        del problem, x, y, y0

    @abc.abstractmethod
    def certify(
        self,
        problem: AbstractBilevelProblem,
        x: PyTree[Array],
        y: PyTree[Array],
        y0: PyTree[Array] | None,
    ) -> Certificate:
        """The residuals of `(x, y)`. Called by [`bilevel_eqx.certify`][]."""


def _with_checked_numbers(fn: Fn) -> Fn:
    """From outside of the program, in which counts of NumPy would be data."""

    @ft.wraps(fn)
    def wrapped(*args, **options):
        check_key(options.get("key"), "certify")
        for name in ("max_products", "num_samples"):
            if name in options:
                options[name] = as_count(options[name])
        return fn(*args, **options)

    return cast(Fn, wrapped)


@_with_checked_numbers
@on_auto_axes
@in_full_precision
@called_once
@typechecked
def certify(
    problem: AbstractBilevelProblem,
    equilibrium: AbstractEquilibrium,
    x: PyTree,
    y: PyTree,
    *,
    y0: PyTree = None,
    x0: PyTree = None,
    max_products: int = MAX_PRODUCTS,
    second_order: bool = False,
    num_samples: int | None = None,
    key: PRNGKeyArray | None = None,
) -> Certificate:
    r"""Checks a point against the definition of an equilibrium.

    The check uses accurate operators (pseudoinverses, dense where the problem is small
    and matrix-free where it is not) and knows nothing of how the point was computed, so
    that truncation, damping and unrolling show as what they are: a different point.

    **Arguments:**

    - `problem`: the bilevel problem.
    - `equilibrium`: the concept, for instance [`bilevel_eqx.WarmStart`][].
    - `x`: the outer variables, a pytree of floating-point arrays.
    - `y`: the inner variables, a pytree of floating-point arrays.
    - `y0`: where the inner variables start, for the concepts that depend on it
        ([`bilevel_eqx.ColdStart`][], [`bilevel_eqx.Pessimistic`][]). Keyword only
        argument.
    - `x0`: where the outer variables started. Only [`bilevel_eqx.Nash`][] and
        [`bilevel_eqx.ProximalEquilibrium`][] use it, and `y0`: all of a game may be zero
        at its answer, and the start then says how large the variables can be. Keyword
        only argument.
    - `max_products`: where y has more than 1,024 entries, the largest number of products
        with the inner Hessian H that are taken. A product with a derivative of H counts
        as three, one with $F_{yy}$ does not count, and at a root one with $H^\top$ counts
        as well. The pseudoinverse is then one of a Krylov space of $F_y$, and of
        $\nabla_y f$ where that is more than rounding; `accuracy` says how good that was.
        [`bilevel_eqx.Pessimistic`][] and [`bilevel_eqx.ProximalEquilibrium`][] are not
        bounded by it. Smaller problems take a decomposition of H. Keyword only argument.
    - `second_order`: whether to check, too, that x is a minimum to second order: the
        entry `outer curvature`, from the derivative of the hypergradient. That needs
        third derivatives of f, and a longer program: where y has more than 1,024 entries
        and f is not quadratic, one that compiles for a minute or more, and an unbounded
        number of products with H. Beyond 1,024 entries of x negative
        curvature is looked for in a Krylov space of 64 products. [`bilevel_eqx.Nash`][]
        and [`bilevel_eqx.ProximalEquilibrium`][] always check it. For
        [`bilevel_eqx.Pessimistic`][] it is checked where y alone is worst: at a kink of
        the worst value the entry is zero. In a set (`within=`) it is not known, and a
        note says so. Keyword only argument.
    - `num_samples`: for a [`bilevel_eqx.AbstractFiniteSumProblem`][], of how many samples
        of the inner and of the outer data the residuals are estimated. `None`, the
        default, takes all of the data, in blocks. Otherwise the residuals are estimates
        of those on all data, and `standard_errors` says how good they are: the value on
        all data is within twice the standard error in about 95 of 100 draws, if the noise
        is smaller than the terms that a residual is relative to. This takes 41
        certificates on that many samples, which are split into 20 groups: so it is at
        least 20, unless both levels have no more samples than that. Keyword only
        argument.
    - `key`: a random key for the samples. Keyword only argument.

    **Returns:**

    A [`bilevel_eqx.Certificate`][]. A residual is a share $a / (a + b)$ between zero and
    one: a should be zero, and b is what a is compared with. So a residual has no units.
    It does not change if you multiply an objective by a positive number or add a number
    to it, or if you measure x or y in other units.

    - `inner`: a is the Newton step $H^+ \nabla_y f$ that is left to go, and b the size
      of y (of $|y| + |y - y_0|$ where $y_0$ counts) and of what y moves by if x changes
      by its own size. If $\nabla_y f$ has a part in the null space of H, that part counts
      too, divided by the largest eigenvalue of H.
    - `outer`: a is the hypergradient, and b the size of the terms that cancel in it: of
      $F_x$, of $J^\top F_y$, and of what both change by if x and y change by their own
      sizes. With constraints on x, a is the part of it that a projection leaves.
    - `displacement`: a is the part of $y - y_0$ along $S(x)$, and b the size of y.
    - `selection`: a is the part of $F_y$ along $S(x)$, and b the size of the terms in
      $F_y$. `others`: a is by how much F is larger at another point of the ball, and b by
      how much F changes if y changes by its own size.
    - `ball`, `set`: how far y is outside, relative to the radius, or to y.
    - a `curvature` is the largest one of the wrong sign, relative to the largest of all.
      It is zero or not, and does not become small near an equilibrium.

    If all of a problem is zero at its answer, nothing says how large a deviation is, and
    the shares are of the order of one until the answer is exact. Where x is exactly zero
    in a set (`project_x`), its size counts as one: measure x in units in which the set is
    not much smaller.

    **Raises:**

    A `ValueError` if `y0` is needed and missing, if `num_samples` is given without a
    `key` or for a problem that is no finite sum, if it is less than 20 and not all of the
    data, and as [`bilevel_eqx.inner_hessian`][].
    """
    x, y = as_variables(x, "x"), as_variables(y, "y")
    if y0 is not None:
        y0 = as_variables(y0, "y0")
    if x0 is not None:
        x0 = as_variables(x0, "x0")
    if tree_eps((x, y)) > float(jnp.finfo(jnp.float32).eps):
        # In half precision nothing can be decomposed, nor be told from zero.
        problem, x, y, y0, x0 = widened((problem, x, y, y0, x0))
    check_problem(problem, x, y)
    equilibrium.check_kind(problem)
    check_count(max_products, "max_products", "certify")
    # Concepts of others need not know of these.
    options: dict[str, Any] = {}
    if says(equilibrium, "bounds_products", False):
        options["max_products"] = max_products
    if says(equilibrium, "heeds_x0", False):
        options["x0"] = x0

    def on(problem: AbstractBilevelProblem) -> Certificate:
        certificate = equilibrium.certify(problem, x, y, y0, **options)
        if second_order and NOT_A_MINIMUM in certificate.notes:
            known = equilibrium.outer_derivatives(problem, x, y, y0)
            return _to_second_order(certificate, problem, x, known)
        return certificate

    if num_samples is None:
        return on(problem)
    check_count(num_samples, "num_samples", "certify")
    if key is None or not isinstance(problem, AbstractFiniteSumProblem):
        raise ValueError(
            "`certify(num_samples=...)` draws samples of the data: it needs a random "
            "`key`, and a problem that says what its samples are, such as a "
            f"`FiniteSumProblem`. The problem is a `{type(problem).__name__}`, and the "
            f"key {'is missing' if key is None else 'is there'}."
        )
    certificate, *estimates = jackknife(
        on, lambda certificate: certificate.residuals, problem, num_samples, key
    )
    return eqx.tree_at(
        lambda c: (c.residuals, c.standard_errors),
        certificate,
        tuple(estimates),
        is_leaf=lambda leaf: leaf is None,
    )


def amended(
    certificate: Certificate,
    notes: Iterable[str],
    residuals: dict[str, tuple[Any, str]] | None = None,
) -> Certificate:
    """The certificate with other notes, and with further residuals."""
    old = {k: (certificate.residuals[k], m) for k, m in certificate.meanings.items()}
    return Certificate(
        certificate.concept,
        old | (residuals or {}),
        accuracy=certificate.accuracy,
        decisions=certificate.decisions,
        notes=notes,
    )


def _to_second_order(certificate, problem, x, known) -> Certificate:
    """The certificate with an entry on the second derivative in x."""
    notes = [note for note in certificate.notes if note != NOT_A_MINIMUM]
    if known is None:
        return amended(certificate, [*notes, f"{NOT_A_MINIMUM} for this concept"])
    entry = outer_curvature(problem, x, *known)
    return amended(certificate, notes, entry)


def stated_cost(
    equilibrium: AbstractEquilibrium, y: PyTree, max_products: int = MAX_PRODUCTS
) -> str | None:
    """What a certificate takes, in words; or `None` where it is next to nothing."""
    size = tree_size(y)
    if size <= DENSE_SIZE:
        return None
    if not says(equilibrium, "bounds_products", False):
        return f"{size:,} inner variables, an unbounded number of products with H"
    return f"{size:,} inner variables, at most {max_products} products with H"


def require_start(y0, call: str, concept: str) -> None:
    """Refuses to certify without y0 what is defined by it."""
    if y0 is None:
        raise ValueError(
            f"{concept} is an equilibrium with respect to where the inner variables "
            f"start: call `certify(problem, {call}, x, y, y0=...)`."
        )
