r"""The residuals that certificates share, and what they are relative to.

A residual is a share $a / (a + b)$, where $a$ should be zero and $b$ is the size of what
$a$ is the difference of. Both have the same units, so a residual has none: it does not
change if an objective is scaled or shifted, or a variable measured in other units. It
lies between zero and one. Where it is small, it is $a / b$.

For a gradient, b is the size of the terms that cancel in it. They are not known one by
one, but another sum of them is: the change of the gradient if every variable changes by a
part of its own size, up or down.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree, Scalar

from .._derivatives.first import outer_gradients
from .._derivatives.operators import AugmentedHessian
from .._linalg.power_iteration import DENSE_SIZE
from .._problem.base import AbstractBilevelProblem
from .._problem.constraints import set_x, set_y
from .._solution_set.picture import NewtonStep, Picture
from .._tree import (
    nonzero,
    tree_axpy,
    tree_dot,
    tree_scale,
    tree_waves,
    vector_norm,
)


def share(wrong: Scalar, right: Scalar) -> Scalar:
    """a / (a + b), and zero if both are zero."""
    return wrong / nonzero(wrong + right)


def norm(a: PyTree[Array]) -> Scalar:
    """The two-norm, in fewer operations than `tree_norm`, which has a derivative at 0."""
    return jnp.sqrt(tree_dot(a, a))


class Slopes(NamedTuple):
    """The outer objective at (x, y), and its gradients."""

    value: Scalar
    x: PyTree[Array]
    """F_x."""
    y: Float[Array, " n"]
    """F_y."""
    change_x: PyTree[Array]
    """By how much F_x changes if x and y change by their own sizes."""
    change_y: Float[Array, " n"]
    """The same of F_y."""
    size: Scalar
    """The size of y."""
    size_x: PyTree[Array]
    """The size of each entry of x."""

    @property
    def terms_y(self) -> Scalar:
        """The size of the terms in F_y."""
        return vector_norm(self.y) + vector_norm(self.change_y)


def entry_sizes(at: PyTree[Array], start: PyTree[Array] | None) -> PyTree[Array]:
    """The absolute value of each entry, and how far it is from where it started."""
    sizes = jtu.tree_map(jnp.abs, at)
    if start is None:
        return sizes
    return jtu.tree_map(lambda s, u, v: s + jnp.abs(u - v), sizes, at, start)


def outer_slopes(
    problem: AbstractBilevelProblem,
    x: PyTree[Array],
    y: Float[Array, " n"],
    x0: PyTree[Array] | None = None,
    y0: Float[Array, " n"] | None = None,
) -> Slopes:
    """F and its gradients, for inner variables in one vector.

    If it is known where the variables started, that says how large they can be too.
    """
    size_x, sizes = entry_sizes(x, x0), entry_sizes(y, y0)
    step = float(jnp.finfo(y.dtype).eps) ** (1 / 3)
    moves_x = jtu.tree_map(jnp.multiply, size_x, tree_waves(x))
    # Not the same waves, which would cancel in F(x - y).
    moves_y = sizes * jnp.sin(1 + jnp.arange(y.size, dtype=y.dtype))

    def at(t):
        return outer_gradients(problem, tree_axpy(t, moves_x, x), y + t * moves_y)

    # In one batch, so that the program contains the gradient once.
    both = jax.vmap(at)(jnp.asarray([0, step], y.dtype))
    value, outer_x, outer_y = jtu.tree_map(lambda u: u[0], both)
    _, change_x, change_y = jtu.tree_map(lambda u: (u[1] - u[0]) / step, both)
    return Slopes(value, outer_x, outer_y, change_x, change_y, vector_norm(sizes), size_x)


def slopes_of(
    here: Picture,
    x0: PyTree[Array] | None = None,
    y0: Float[Array, " n"] | None = None,
) -> Slopes:
    """F and its gradients at a picture."""
    return outer_slopes(here.problem, here.x, here.y, x0, y0)


class Measures(NamedTuple):
    """What the residuals of all concepts are made of."""

    picture: Picture
    outer: Slopes
    accuracy: Scalar
    """How well a system with H was solved."""
    newton: NewtonStep
    """The way to an inner minimum."""
    reach: Scalar
    """How far y moves that way if x changes by its own size."""
    hypergradient: PyTree[Array]
    r"""$F_x + J^\top F_y$."""
    terms: Scalar
    """The size of the terms that cancel in it."""
    adjoint: Float[Array, " n"]
    r"""$q = H^{+\top} F_y$; with `tangential`, $H^{+\top} u$."""

    def inner(self, what: str = "y is an inner minimum") -> dict:
        """The entries on f_y and f_yy."""
        here = self.picture
        confined = set_y(here.problem).confines
        curvature = self.newton.curvature
        left = curvature * self.newton.length + self.newton.rest
        size = self.outer.size + self.reach
        if here.is_root:
            residual = share(left, curvature * size)
            return {"inner": (residual, "y is a root: r = 0")}
        equation = "y = proj(y - f_y)" if confined else "f_y = 0"
        return {
            "inner": (
                share(left, curvature * size),
                f"{what}: {equation}",
            ),
            "inner curvature": (
                here.negative_curvature(),
                "the same to second order: f_yy >= 0" + (" in the set" * confined),
            ),
        }

    @property
    def notes(self) -> tuple[str, ...]:
        """What these measures do not say."""
        return self._notes(searched=not (self.picture.is_convex or self.picture.is_root))

    @property
    def notes_along_set(self) -> tuple[str, ...]:
        """The same where a certificate also looks for curvature along S(x)."""
        return self._notes(searched=True)

    def _notes(self, searched: bool) -> tuple[str, ...]:
        here, notes = self.picture, []
        if not (here.is_plane or here.is_root):
            notes.append("the inner problem is not quadratic: all on its minima is local")
        if searched and not here.is_dense:
            notes.append(
                f"y has more than {DENSE_SIZE:,} entries: negative curvature is looked "
                "for in a Krylov space alone"
            )
        return tuple(notes)

    @property
    def decisions(self) -> tuple[Any, Any, str] | None:
        """By how much each curvature is clearly zero or not, and what it is."""
        known = self.picture.decisions()
        if known is None:
            return None
        what = "an eigenvalue of H"
        if self.picture.is_root:
            what = "a singular value of dr/dy"
        elif isinstance(self.picture.system, AugmentedHessian):
            what = "a singular value of the residual's Jacobian"
        return *known, what

    def stationary(self, what: str) -> dict:
        """The entry on the hypergradient."""
        here = self.picture
        return outer_residual(here.problem, here.x, self.hypergradient, self.terms, what)


def measure(
    here: Picture,
    outer: Slopes,
    tangential: tuple[Float[Array, " n"], PyTree[Array]] | None = None,
) -> Measures:
    r"""The measures of a picture.

    The hypergradient is $F_x - B^\top H^+ F_y$. If y moves along S(x) too, it is
    $F_x - B^\top H^+ u + t$ for `tangential`, which is a pair of u and t.
    """
    newton = here.newton_step(outer.size)
    unit = newton.step / nonzero(newton.length)
    # The terms of F_y with other signs, which do not cancel in J^T F_y.
    mixed = tree_waves(unit) * (jnp.abs(outer.y) + jnp.abs(outer.change_y))
    slope, direct = outer.y, outer.x
    terms = norm(direct) + norm(outer.change_x)
    if tangential is not None:
        slope, term = tangential
        direct, terms = tree_axpy(1.0, term, direct), terms + norm(term)

    def pull(u):
        q, image, _ = here.adjoint(here.at.along(u))
        return here.cross_transposed(here.at.along(q), image=image), q

    pulled, adjoints = jax.vmap(pull)(jnp.stack([slope, mixed, unit]))
    indirect, mixed, moves = (jtu.tree_map(lambda u, i=i: u[i], pulled) for i in range(3))
    reach = tree_dot(jtu.tree_map(jnp.abs, moves), outer.size_x)
    return Measures(
        picture=here,
        outer=outer,
        accuracy=here.accuracy(here.at.along(slope), adjoints[0]),
        newton=newton,
        reach=reach.astype(unit.dtype),
        hypergradient=tree_axpy(-1.0, indirect, direct),
        terms=terms + norm(mixed),
        adjoint=adjoints[0],
    )


def outer_residual(
    problem: AbstractBilevelProblem,
    x: PyTree[Array],
    gradient: PyTree[Array],
    terms: Scalar,
    what: str,
) -> dict:
    """The entry on a gradient in x, less what the constraints on x take from it."""
    x_set = set_x(problem)
    size = nonzero(norm(x))
    # A gradient as large as its terms would move x by its own size.
    step = size / nonzero(terms + norm(gradient))
    left = x_set.remaining_step(tree_scale(step, gradient), x)
    where = ", in its set: x = proj(x - that)" if x_set.confines else ""
    return {"outer": (norm(left) / size, what + where)}
