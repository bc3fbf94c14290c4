"""The pessimistic equilibrium."""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree, ScalarLike

from .._arguments import as_rate, check_positive
from .._compat import is_traced
from .._inner_solver.minimum import minimise_inner
from .._inner_solver.projection import Projection
from .._linalg.power_iteration import largest_curvature
from .._linear_solver.pseudoinverse import Pseudoinverse
from .._problem.constraints import set_x
from .._solution_set.nearest import nearest_to
from .._solution_set.picture import picture
from .._solution_set.worst_by_penalty import penalised_worst
from .._solution_set.worst_in_ball import danskin_gradient, worst_case, WorstCase
from .._tree import (
    nonzero,
    project_on_ball,
    tree_axpy,
    tree_dot,
    tree_dtype,
    tree_norm,
    tree_sub,
    vector_norm,
)
from .base import (
    AbstractEquilibrium,
    Certificate,
    curved_notes,
    relative_gradient,
    require_start,
    solution_residual,
)


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
    gradients at these points.

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

    def certify(self, problem, x, y, y0):
        if self.within is not None:
            return _certify_in_set(problem, x, y, self.within)
        require_start(
            y0, "Pessimistic(radius)", "The ball lies around c = proj(y0, S(x));"
        )
        assert self.radius is not None
        here, layout = picture(problem, x, y)
        y, anchor = here.y, layout.ravel(y0)
        start = y
        if not here.is_plane:
            # The search for the center of the ball starts at y0 only if S(x) is curved.
            start = minimise_inner(here.problem, x, anchor, Projection()).value
        center, _ = nearest_to(
            here.problem, x, start, anchor, Pseudoinverse(), _CENTER_STEPS
        )
        worst = worst_case(here, center, self.radius)
        radius, value = worst.radius, worst.value
        distance = vector_norm(worst.displacement)
        slack = worst.multiplier * (radius - distance)
        selection = jnp.hypot(vector_norm(worst.tangential_residual), slack)
        top = jnp.max(worst.basis.values)
        scale = jnp.maximum(jnp.max(jnp.abs(worst.basis.values)), worst.multiplier)
        excess = jnp.maximum(0, top - worst.multiplier)
        return Certificate(
            "a pessimistic equilibrium",
            {
                **solution_residual(here),
                "ball": (
                    jnp.maximum(0, distance - radius) / jnp.maximum(1, radius),
                    "y is within the radius of proj(y0, S(x))",
                ),
                "selection": (
                    selection
                    * jnp.maximum(1, tree_norm(y))
                    / jnp.maximum(1, jnp.abs(value)),
                    "no minimum nearby has a larger F: P_null (F_y - nu (y - c)) = 0",
                ),
                "curvature": (
                    excess / nonzero(scale),
                    "nor any in the ball: the curvature of F along S(x) is at most nu",
                ),
                "outer": (
                    self._outer(x, worst),
                    "x is stationary for max F over S(x) and the ball, by Danskin",
                ),
            },
            accuracy=here.accuracy(worst.slope, here.pinv(worst.slope)),
            notes=curved_notes(here),
        )

    def _outer(self, x, worst: WorstCase):
        """How far zero is from the segment between the gradients at the worst points."""
        here, value = worst.picture, worst.value
        mirrored = worst.mirrored()

        def gradient(y):
            return danskin_gradient(here, y, worst.center, worst.multiplier)

        # One after the other, so that the program contains the derivative once.
        gradients = jax.lax.map(gradient, jnp.stack([here.y, mirrored]))
        x_set = set_x(here.problem)
        g, other = (
            x_set.remaining_step(jtu.tree_map(lambda u, i=i: u[i], gradients), x)
            for i in range(2)
        )
        # How much smaller F is at the mirror image, relative to the value.
        gap = jnp.maximum(0, value - here.problem.outer(x, mirrored))
        gap = gap / jnp.maximum(1, jnp.abs(value))
        between, share = nearest_to_zero(g, other)
        kink = relative_gradient(between, x, value) + share * gap
        return jnp.minimum(relative_gradient(g, x, value), kink)


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
    x_set = set_x(problem)
    left = (x_set.remaining_step(at.gradient, x) for at in (here, there))
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
                "y is an inner minimum there: a projected gradient step does not move it",
            ),
            "selection": (
                gain / jnp.maximum(1, jnp.abs(outer)),
                "no other inner minimum in the set has a larger F",
            ),
            "outer": (
                relative_gradient(between, x, outer),
                "x is stationary for max F over the inner minima, kinks included",
            ),
        },
        notes=(f"right to about {1 / weight:.0e}, the error of a penalty",),
    )


def nearest_to_zero(a, b):
    """The point of least norm on the segment from a to b, and its position there."""
    towards = tree_sub(b, a)
    square = tree_dot(towards, towards)
    share = -tree_dot(a, towards) / nonzero(square)
    share = jnp.clip(share, 0, 1)
    return tree_axpy(share, towards, a), share
