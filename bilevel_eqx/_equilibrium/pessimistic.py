"""The pessimistic equilibrium."""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, ScalarLike

from .._arguments import as_rate, check_positive
from .._compat import is_traced
from .._derivatives.first import outer_gradients
from .._inner_solver.minimum import minimise_inner
from .._inner_solver.projection import Projection
from .._inner_solver.proximal_path import has_path, start_of_search
from .._linalg.convex_hull import nearest_to_zero
from .._linalg.power_iteration import largest_curvature
from .._linear_solver.pseudoinverse import Pseudoinverse
from .._problem.constraints import set_x
from .._problem.flat import flat
from .._response.minimum_displacement import MinimumDisplacement
from .._solution_set.nearest import nearest_to
from .._solution_set.picture import Picture, picture
from .._solution_set.selected_value import second_derivative, Sphere
from .._solution_set.ties import gains_and_gradients, MOST_ASCENDED
from .._solution_set.worst_by_penalty import penalised_worst
from .._solution_set.worst_in_ball import (
    is_quadratic,
    pressure,
    worst_case,
    WorstCase,
)
from .._tree import (
    Layout,
    nonzero,
    project_on_ball,
    tree_axpy,
    tree_dtype,
    tree_eps,
    tree_norm,
    tree_scale,
    tree_sub,
    vector_norm,
    where,
)
from .base import AbstractEquilibrium, Certificate, require_start
from .outer_curvature import Derivatives, NOT_A_MINIMUM
from .residuals import measure, Measures, outer_residual, outer_slopes, share, slopes_of


_CENTER_STEPS = 100


def _compact(radius: Any, within: Any) -> Any:
    """The radius, or `None` with a set; raises if neither or both are given."""
    if (radius is None) == (within is None):
        both = "" if radius is None else "It was given both a radius and a set. "
        raise ValueError(
            "`Pessimistic` asks for the worst inner minimum, which exists only in a "
            "compact set: if S(x) is unbounded, F is usually unbounded on it. "
            f"{both}`Pessimistic(radius=...)` takes the worst of the inner minima within "
            "this distance of the one nearest to y0; `Pessimistic(within=projection)` "
            "takes the worst in a compact convex set."
        )
    if radius is not None and not is_traced(radius) and np.any(np.isinf(radius)):
        raise ValueError(
            "`Pessimistic(radius=inf)` has no compact set, and without one there is no "
            "worst inner minimum: give a finite radius."
        )
    return None if radius is None else as_rate(radius)


class Pessimistic(AbstractEquilibrium):
    r"""The pessimistic equilibrium: of the inner minima within reach, the worst,

    $$\min_x \max_{y \in S(x),\ \|y - c\| \le R} F(x, y), \qquad c = \Pi(y_0, S(x)).$$

    It is the value that is guaranteed for every choice of the inner player. The maximum
    needs a compact set. This one is a ball in $S(x)$ around the choice of a cold start.
    It is never empty, and as $R \to 0$ the pessimistic equilibrium becomes the cold one.
    So the optimistic value is at most the cold-start value, which is at most this one.

    Any compact convex set of y with a known projection can replace the ball.

    It is also called weak Stackelberg equilibrium. At some x two points may be equally
    bad. The worst value then has a kink, and stationary means that zero lies between the
    gradients at these points. The certificate knows all of them where S(x) is a plane and
    F quadratic in y. Elsewhere it ascends F from six other points of the ball, among
    them mirror images of y, and knows those that it finds. That is for up to 64 inner
    variables. For more it tries mirror images where S(x) is a plane, and knows y alone
    where it is curved. A note says which.

    With the multiplier $\nu \ge 0$ of the ball, the second-order condition is
    $P (W - \nu I) P \preceq 0$ if S(x) is a plane and F quadratic, where it is that of
    the worst point of all. In general it is required where the ball allows to move to
    first order, and y is worst nearby.

    ??? cite "References"

        Dempe, *Foundations of Bilevel Programming*, 2002. Danskin, *The Theory of
        Max-Min*, 1967.
    """

    warm: ClassVar[bool] = False
    radius: ScalarLike | None
    within: Callable[[PyTree], PyTree] | None

    def __init__(
        self,
        radius: ScalarLike | None = None,
        *,
        within: Callable[[PyTree], PyTree] | None = None,
    ):
        r"""**Arguments:**

        - `radius`: $R$, positive and finite, in the units of y.
        - `within`: instead of a radius, the projection on a compact convex set $Y$, as a
            function of y (`optax.projections` has some). The inner problem is then
            confined to $Y$: $S(x) = \operatorname{argmin}_{y \in Y} f(x, y)$. Keyword
            only argument.

        Exactly one of the two is required; otherwise it raises a `ValueError`.
        """
        self.radius = _compact(radius, within)
        self.within = within

    def __check_init__(self):
        if self.radius is not None:
            check_positive(self.radius, "radius", "Pessimistic")

    def draw_in(self, y: PyTree[Array], center: PyTree[Array]) -> PyTree[Array]:
        """The point of the compact set nearest to y. A ball lies around `center`."""
        if self.within is not None:
            return self.within(y)
        assert self.radius is not None
        return project_on_ball(y, center, self.radius)

    def outer_derivatives(self, problem, x, y, y0):
        if self.within is not None:
            return None
        assert self.radius is not None
        here, layout = picture(problem, x, y)
        nearest = MinimumDisplacement(tolerance=None, selection_tolerance=None)

        def center(x):
            return layout.ravel(nearest.best_response(problem, x, y0)[0])

        value_x, slope = outer_gradients(here.problem, x, here.y)[1:]
        nu = pressure(here, slope, here.y - center(x), self.radius)
        gradient, product = second_derivative(here, Sphere(center, nu))
        # At a kink other points that are as bad hold x, and not the gradient at y.
        terms = tree_norm(value_x) + tree_norm(tree_sub(gradient, value_x))
        own, _ = outer_residual(problem, x, gradient, terms, "")["outer"]
        smooth = where(own < tree_eps(y) ** 0.25, 1, 0)
        what = (
            "the same to second order where y alone is worst: d^2 F(x, y(x)) / dx^2 >= 0"
            " (0 at a kink)"
        )
        return Derivatives(gradient, lambda v: tree_scale(smooth, product(v)), what)

    def certify(self, problem, x, y, y0):
        if self.within is not None:
            return _certify_in_set(problem, x, y, self.within)
        require_start(
            y0, "Pessimistic(radius)", "The ball lies around c = proj(y0, S(x));"
        )
        assert self.radius is not None
        here, layout = picture(problem, x, y)
        at = measure(here, slopes_of(here, y0=layout.ravel(y0)))
        y, anchor = here.y, layout.ravel(y0)
        start = y
        if not here.is_plane:
            # The search for the center of the ball starts at y0 only if S(x) is curved.
            if has_path(here.problem, anchor):
                start, *_ = start_of_search(here.problem, x, anchor, anchor)
            else:
                start = minimise_inner(here.problem, x, anchor, Projection()).value
        center, _ = nearest_to(
            here.problem, x, start, anchor, Pseudoinverse(), _CENTER_STEPS
        )
        worst = worst_case(here, center, self.radius)
        distance = vector_norm(worst.displacement)
        slack = worst.multiplier * (worst.radius - distance)
        selection = jnp.hypot(vector_norm(worst.tangential_residual), slack)
        quadratic = is_quadratic(here)
        notes = [*at.notes_along_set, NOT_A_MINIMUM]
        if not quadratic:
            notes.append(f"F is not quadratic along S(x): {_nearby(here)}")
        return Certificate(
            "a pessimistic equilibrium",
            {
                **at.inner(),
                "ball": (
                    jnp.maximum(0, distance - worst.radius) / worst.radius,
                    "y is within the radius of proj(y0, S(x))",
                ),
                "selection": (
                    share(selection, at.outer.terms_y),
                    "no minimum nearby has a larger F: P_null (F_y - nu (y - c)) = 0",
                ),
                "curvature": (
                    worst.convexity(quadratic),
                    "nor any in the ball: the curvature of F along S(x) is at most nu"
                    if quadratic
                    else "the same to second order, along S(x) within the ball",
                ),
                **_against_others(worst, at, quadratic),
            },
            accuracy=at.accuracy,
            decisions=at.decisions,
            notes=notes,
        )


def _nearby(here: Picture) -> str:
    """What is known of the worst points, if it is not all."""
    if here.y.size <= MOST_ASCENDED:
        return "of other worst y, those count that six ascents of F have found"
    if here.is_plane:
        return "of other worst y, mirror images alone are tried"
    return (
        f"y has more than {MOST_ASCENDED} entries, and other worst y are not looked for"
    )


def _against_others(worst: WorstCase, at: Measures, quadratic: bool) -> dict:
    """The entries on x, and on F, at y and at other points that may be as bad.

    The gradients at points where F is smaller count with a penalty. So the entry on x is
    how far zero is from the epsilon-subdifferential of the worst value, and epsilon.
    """
    here, problem = worst.picture, worst.picture.problem
    layout = Layout(here.x)
    gains, gradients = gains_and_gradients(worst, at.outer.terms_y, quadratic)
    rows = jax.vmap(layout.ravel)(gradients)
    terms = at.terms + vector_norm(rows[0] - layout.ravel(at.outer.x))

    # As large as F gets if y changes by its own size.
    variation = at.outer.terms_y * at.outer.size
    penalties = share(jnp.maximum(0, -gains), variation)
    weights = _weights(problem, here.x, rows, terms, penalties)
    gradient = layout.unravel(weights @ rows)
    what = "x is stationary for max F over S(x) and the ball, by Danskin"
    entry = outer_residual(problem, here.x, gradient, terms, what)
    value, what = entry["outer"]
    return {
        "others": (
            share(jnp.maximum(0, jnp.max(gains)), variation),
            "no other point of the ball that was tried has a larger F",
        ),
        "outer": (value + weights @ penalties.astype(value.dtype), what),
    }


def _weights(problem, x, rows, terms, penalties):
    """Those of gradients, flat ones, between which zero lies, or nearly so."""
    layout, x_set = Layout(x), set_x(problem)
    size = nonzero(tree_norm(x))
    largest = jnp.sqrt(jnp.max(jnp.sum(rows**2, axis=1)))
    step = size / nonzero(terms + largest)

    def left(row):
        return layout.ravel(x_set.remaining_step(layout.unravel(step * row), x)) / size

    remaining = jax.vmap(left)(rows)
    gram = remaining @ remaining.T
    return nearest_to_zero(gram, penalties.astype(gram.dtype))


#
# In a set other than a ball
#

# The weight of the penalty, relative to the ratio of curvatures; and the radius of the
# neighbourhood of x whose gradients count, relative to the size of x. A lower precision
# needs a smaller weight and a larger radius.
_WEIGHT = 1e7


_NEIGHBOURHOOD = 1e-6


def _certify_in_set(problem, x, y, projection) -> Certificate:
    r"""By the penalised value, for minima that may lie on the boundary of the set.

    Such a boundary gives the worst value kinks. At a kink, stationary means that zero
    lies between the gradients around x (Goldstein, 1977).
    """
    dtype = tree_dtype(y)
    # The penalty and the neighbourhood must both stand out from rounding error.
    coarse = (float(jnp.finfo(dtype).eps) / 2.2e-16) ** 0.5
    weight, reach = _WEIGHT / coarse, _NEIGHBOURHOOD * coarse

    def at(x):
        return penalised_worst(problem, x, y, projection, weight)

    def moved(to):
        """How far a projection moves y, relative to y."""
        return share(tree_norm(tree_sub(to, y)), tree_norm(y))

    flat_problem, layout = flat(problem, y)
    v = layout.ravel(y)
    outer = outer_slopes(flat_problem, x, v)
    gradient = jax.grad(problem.inner, argnums=1)(x, y)
    curvature = largest_curvature(lambda y: problem.inner(x, y), y)
    stepped = projection(tree_axpy(-1 / nonzero(curvature), gradient, y))
    here = at(x)
    gain = jnp.maximum(0, here.value - outer.value)
    length = reach * nonzero(tree_norm(x)) / nonzero(tree_norm(here.gradient))
    there = at(tree_axpy(-length, here.gradient, x))
    x_layout = Layout(x)
    rows = jnp.stack([x_layout.ravel(here.gradient), x_layout.ravel(there.gradient)])
    terms = tree_norm(outer.change_x) + tree_norm(outer.x)
    terms = terms + vector_norm(rows[0] - x_layout.ravel(outer.x))
    weights = _weights(problem, x, rows, terms, jnp.zeros(2))
    return Certificate(
        "a pessimistic equilibrium in a convex set",
        {
            "set": (moved(projection(y)), "y is in the set"),
            "inner": (
                moved(stepped),
                "y is an inner minimum there: a projected gradient step does not move it",
            ),
            "selection": (
                share(gain, outer.terms_y * vector_norm(v)),
                "no other inner minimum in the set has a larger F",
            ),
            **outer_residual(
                problem,
                x,
                x_layout.unravel(weights @ rows),
                terms,
                "x is stationary for max F over the inner minima, kinks included",
            ),
        },
        notes=(
            f"right to about {1 / weight:.0e}, the error of a penalty",
            "y may be a minimum, or a worst one, only among those nearby",
            NOT_A_MINIMUM,
        ),
    )
