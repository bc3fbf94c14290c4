"""The pessimistic equilibrium."""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, ScalarLike

from .._arguments import as_rate, check_positive, is_traced
from .._linalg.power_iteration import largest_curvature
from .._linear_solver.pseudoinverse import Pseudoinverse
from .._problem.constraints import projection_x, step_left
from .._solution_set.nearest import nearest_to
from .._solution_set.search import polished
from .._solution_set.tangent import SolutionSet
from .._solution_set.worst_by_penalty import penalised_worst
from .._solution_set.worst_in_ball import danskin_gradient, WorstCase
from .._tree import (
    nonzero,
    tree_axpy,
    tree_dot,
    tree_draw_in,
    tree_dtype,
    tree_norm,
    tree_sub,
)
from .base import (
    AbstractEquilibrium,
    Certificate,
    curved_notes,
    inner_residual,
    relative_gradient,
    require_start,
)


_CENTER_STEPS = 100


def _compact(radius: Any, within: Any) -> Any:
    """The radius, if that is what makes the set compact; or a refusal."""
    if (radius is None) == (within is None):
        both = "" if radius is None else "It was given both a radius and a set. "
        raise ValueError(
            "`Pessimistic` asks for the worst inner minimum, and without a compact set "
            "there is none: where S(x) is unbounded, so in general is F on it. "
            f"{both}`Pessimistic(radius=...)` takes the worst of those inner minima that "
            "are no farther than that from the one nearest to y0; "
            "`Pessimistic(within=projection)` those in a compact convex set."
        )
    if radius is not None and not is_traced(radius) and np.any(np.isinf(radius)):
        raise ValueError(
            "`Pessimistic(radius=inf)` is without a compact set, and then there is no "
            "worst inner minimum: give a finite radius."
        )
    return None if radius is None else as_rate(radius)


class Pessimistic(AbstractEquilibrium):
    r"""The pessimistic equilibrium: of the inner minima within reach, the worst,

    $$\min_x \max_{y \in S(x),\ \|y - c\| \le R} F(x, y), \qquad c = \Pi(y_0, S(x)).$$

    It is what can be guaranteed whatever the inner player does. The maximum needs a
    compact set, and this one is a ball in $S(x)$ around what a cold start would choose:
    never empty, and as $R \to 0$ the pessimistic equilibrium becomes the cold one. So
    the optimistic value is at most that of a cold start, and that at most this one.

    Instead of the ball there may be any compact convex set of y that one can project on.

    Also known as weak Stackelberg equilibrium. At some x two points may be equally bad;
    the worst value then has a kink, and stationary means that zero is between their
    gradients.

    ??? cite "References"

        Dempe, *Foundations of Bilevel Programming*, 2002. Danskin, *The Theory of
        Max-Min*, 1967.
    """

    warm: ClassVar[bool] = False
    radius: ScalarLike | None
    projection: Callable[[PyTree], PyTree] | None

    def __init__(
        self,
        radius: ScalarLike | None = None,
        *,
        within: Callable[[PyTree], PyTree] | None = None,
    ):
        r"""**Arguments:**

        - `radius`: $R$, positive and finite, in the units of y.
        - `within`: instead of a radius, the projection on a compact convex set $Y$, as a
            function of y (`optax.projections` has some). The inner problem is then that
            of $Y$: $S(x) = \operatorname{argmin}_{y \in Y} f(x, y)$, and so is the
            worst. Keyword only argument.

        One of the two is required: without a compact set it is refused, and told why.
        """
        self.radius = _compact(radius, within)
        self.projection = within

    def __check_init__(self):
        if self.radius is not None:
            check_positive(self.radius, "radius", "Pessimistic")

    def draw_in(self, y: PyTree[Array], center: PyTree[Array]) -> PyTree[Array]:
        """The point of the compact set next to y; a ball lies around `center`."""
        if self.projection is not None:
            return self.projection(y)
        assert self.radius is not None
        return tree_draw_in(y, center, self.radius)

    def certify(self, problem, x, y, y0):
        if self.projection is not None:
            return _certify_in_set(problem, x, y, self.projection)
        require_start(
            y0, "Pessimistic(radius)", "The ball lies around c = proj(y0, S(x));"
        )
        S = SolutionSet(problem, x, y)
        # The center of the ball: from y0 where S(x) is curved, and else from anywhere.
        start = y if S.is_flat else polished(problem, x, y0)
        center, _ = nearest_to(problem, x, start, y0, Pseudoinverse(), _CENTER_STEPS)
        radius = jnp.asarray(self.radius, tree_norm(y).dtype)
        here = WorstCase(problem, x, y, center, radius)
        value = problem.outer(x, y)
        distance = tree_norm(here.way)
        slack = here.multiplier * (radius - distance)
        astray = jnp.hypot(tree_norm(here.astray), slack)
        top = jnp.max(here.basis.values)
        scale = jnp.maximum(jnp.max(jnp.abs(here.basis.values)), here.multiplier)
        excess = jnp.maximum(0, top - here.multiplier)
        return Certificate(
            "a pessimistic equilibrium",
            {
                **inner_residual(problem, x, y),
                "ball": (
                    jnp.maximum(0, distance - radius) / jnp.maximum(1, radius),
                    "it is within the radius of proj(y0, S(x))",
                ),
                "selection": (
                    astray
                    * jnp.maximum(1, tree_norm(y))
                    / jnp.maximum(1, jnp.abs(value)),
                    "no other one nearby has a larger F: P_null (F_y - nu (y - c)) = 0",
                ),
                "curvature": (
                    excess / nonzero(scale),
                    "nor any in the ball: F bends less along S(x) than the ball, by nu",
                ),
                "outer": (
                    self._outer(problem, x, here, value),
                    "x is stationary for max F over S(x) and the ball, by Danskin",
                ),
            },
            accuracy=S.accuracy(here.slope),
            notes=curved_notes(S),
        )

    def _outer(self, problem, x, here: WorstCase, value):
        """Zero lies between the gradients at the points that are worst, if several."""
        S, nu = here.solutions, here.multiplier
        mirrored = here.mirrored()

        def gradient(y):
            return danskin_gradient(problem, x, y, S, here.center, nu)

        project = projection_x(problem)
        g, other = (step_left(gradient(y), x, project) for y in (S.y, mirrored))
        # How much less bad the mirror image is, relative to the value.
        gap = jnp.maximum(0, value - problem.outer(x, mirrored))
        gap = gap / jnp.maximum(1, jnp.abs(value))
        between, share = nearest_to_zero(g, other)
        kink = relative_gradient(between, x, value) + share * gap
        return jnp.minimum(relative_gradient(g, x, value), kink)


#
# In a set that is no ball
#

# Of the penalty, relative to the ratio of curvatures; and of the neighbourhood of x whose
# gradients count, relative to the size of x. What is below the one is above the other.
_WEIGHT = 1e7


_NEIGHBOURHOOD = 1e-6


def _certify_in_set(problem, x, y, projection) -> Certificate:
    r"""By the penalised value, for minima that may lie on the boundary of the set.

    At a kink of the worst value, which such a boundary makes, stationary means that zero
    lies between the gradients around x (Goldstein, 1977).
    """
    dtype = tree_dtype(y)
    # The penalty and the neighbourhood must both stand out from rounding error.
    coarse = (float(jnp.finfo(dtype).eps) / 2.2e-16) ** 0.5
    weight, reach = _WEIGHT / coarse, _NEIGHBOURHOOD * coarse

    def at(x):
        return penalised_worst(problem, x, y, projection, weight)

    value, gradient = jax.value_and_grad(problem.inner, argnums=1)(x, y)
    curvature = largest_curvature(lambda y: problem.inner(x, y), y)
    step = 1 / nonzero(curvature)
    moved = projection(tree_axpy(-step, gradient, y))
    outer = problem.outer(x, y)
    here = at(x)
    gain = jnp.maximum(0, here.value - outer)
    size = tree_norm(here.gradient)
    length = reach * jnp.maximum(1, tree_norm(x)) / nonzero(size)
    there = at(tree_axpy(-length, here.gradient, x))
    project = projection_x(problem)
    left = (step_left(at.gradient, x, project) for at in (here, there))
    between = nearest_to_zero(*left)[0]
    return Certificate(
        "a pessimistic equilibrium in a convex set",
        {
            "set": (
                tree_norm(tree_sub(projection(y), y)) / jnp.maximum(1, tree_norm(y)),
                "y is in the set",
            ),
            "inner": (
                tree_norm(tree_sub(moved, y)) / jnp.maximum(1, tree_norm(y)),
                "it is an inner minimum there: a projected gradient step stays",
            ),
            "selection": (
                gain / jnp.maximum(1, jnp.abs(outer)),
                "no other one in the set has a larger F",
            ),
            "outer": (
                relative_gradient(between, x, outer),
                "x is stationary for max F over the inner minima, kinks included",
            ),
        },
        notes=(f"right to about {1 / weight:.0e}, the error of a penalty",),
    )


def nearest_to_zero(a, b):
    """The point of the segment from a to b with the least norm, and its place on it."""
    towards = tree_sub(b, a)
    square = tree_dot(towards, towards)
    share = -tree_dot(a, towards) / nonzero(square)
    share = jnp.clip(share, 0, 1)
    return tree_axpy(share, towards, a), share
