"""The pessimistic equilibrium."""

from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, ScalarLike

from .._linear_solver import Pseudoinverse
from .._misc import (
    as_rate,
    check_positive,
    is_traced,
    tree_axpy,
    tree_dot,
    tree_norm,
    tree_sub,
)
from .._solution_set import nearest_to, polished, SolutionSet
from .._worst_case import danskin_gradient, WorstCase
from .base import (
    AbstractEquilibrium,
    Certificate,
    curved_notes,
    inner_residual,
    relative_gradient,
    require_start,
)


_CENTER_STEPS = 100


def _required(radius: Any) -> Any:
    if radius is None or (not is_traced(radius) and np.any(np.isinf(radius))):
        raise ValueError(
            "`Pessimistic` asks for the worst inner minimum, and without a compact set "
            "there is none: where S(x) is unbounded, so in general is F on it. Give a "
            "radius: `Pessimistic(radius=...)` takes the worst of those inner minima "
            "that are no farther than that from the one nearest to y0."
        )
    return as_rate(radius)


class Pessimistic(AbstractEquilibrium):
    r"""The pessimistic equilibrium: of the inner minima within reach, the worst,

    $$\min_x \max_{y \in S(x),\ \|y - c\| \le R} F(x, y), \qquad c = \Pi(y_0, S(x)).$$

    It is what can be guaranteed whatever the inner player does. The maximum needs a
    compact set, and this one is a ball in $S(x)$ around what a cold start would choose:
    never empty, and as $R \to 0$ the pessimistic equilibrium becomes the cold one. So
    the optimistic value is at most that of a cold start, and that at most this one.

    Also known as weak Stackelberg equilibrium. At some x two points may be equally bad;
    the worst value then has a kink, and stationary means that zero is between their
    gradients.

    ??? cite "References"

        Dempe, *Foundations of Bilevel Programming*, 2002. Danskin, *The Theory of
        Max-Min*, 1967.
    """

    warm: ClassVar[bool] = False
    radius: ScalarLike

    def __init__(self, radius: ScalarLike | None = None):
        """**Arguments:**

        - `radius`: $R$, positive and finite, in the units of y. It is required: without
            one it is refused, and told why.
        """
        self.radius = _required(radius)

    def __check_init__(self):
        check_positive(self.radius, "radius", "Pessimistic")

    def within(self, y: PyTree[Array], center: PyTree[Array]) -> PyTree[Array]:
        """y, drawn into the ball around `center`."""
        way = tree_sub(y, center)
        length = tree_norm(way)
        radius = jnp.asarray(self.radius, length.dtype)
        share = jnp.where(length > radius, radius / jnp.where(length == 0, 1, length), 1)
        return tree_axpy(share, way, center)

    def certify(self, problem, x, y, y0):
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
                    excess / jnp.where(scale == 0, 1, scale),
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

        g, other = gradient(S.y), gradient(mirrored)
        # How much less bad the mirror image is, relative to the value.
        gap = jnp.maximum(0, value - problem.outer(x, mirrored))
        gap = gap / jnp.maximum(1, jnp.abs(value))
        towards = tree_sub(other, g)
        square = tree_dot(towards, towards)
        share = -tree_dot(g, towards) / jnp.where(square == 0, 1, square)
        share = jnp.clip(share, 0, 1)
        between = tree_axpy(share, towards, g)
        kink = relative_gradient(between, x, value) + share * gap
        return jnp.minimum(relative_gradient(g, x, value), kink)
