r"""The second derivative of a value that is selected on S(x): the least, or the worst.

Let $y(x)$ be stationary for F along $S(x)$, and perhaps on a sphere
$\|y - c(x)\| = R$. With the multipliers $\mu$ of $\nabla_y f = 0$ and $\nu$ of the
sphere, $\phi(x) = F(x, y(x))$ has the derivatives of the Lagrangian
$\Lambda = F + \langle \mu, \nabla_y f \rangle - \frac\nu2 \|y - c(x)\|^2$:

$$\phi' = \Lambda_x, \qquad
\phi'' = \begin{pmatrix} I \\ D \end{pmatrix}^{\!\top}
\nabla^2 \Lambda \begin{pmatrix} I \\ D \end{pmatrix}, \qquad
D = \frac{\mathrm d y}{\mathrm d x}.$$

$\mathrm d y$ has three parts. The first two keep it on $S(x)$ and on the sphere, and the
third keeps it stationary. With $n = -H^+ B\, \mathrm d x$, the offset $o = P (y - c)$,
and $P'$ for $P$ without the direction of o,

$$\mathrm d y = n + \frac{\langle y - c, \mathrm d c - n \rangle}{\|o\|^2}\, o + p, \qquad
p = -(P' \Lambda_{yy} P')^+ P' g,$$

where g is what $\nabla^2 \Lambda$ makes of the first two in y (Fiacco, *Introduction to
Sensitivity and Stability Analysis in Nonlinear Programming*, 1983).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Scalar

from .._linalg.eigenbasis import eigenbasis_within
from .._tree import nonzero, tree_axpy, tree_zeros_like, where
from .picture import Picture


class Sphere(NamedTuple):
    """The boundary of a ball that y may lie on."""

    center: Callable[[PyTree[Array]], Float[Array, " n"]]
    """c(x)."""
    multiplier: Scalar
    """nu. Where it is zero y is free."""


def second_derivative(
    here: Picture, sphere: Sphere | None = None
) -> tuple[PyTree[Array], Callable[[PyTree[Array]], PyTree[Array]]]:
    r"""$\phi'$, and $\mathrm d x \mapsto \phi''\, \mathrm d x$, of the value selected at
    a picture."""
    problem, x, y = here.problem, here.x, here.y
    if sphere is None:
        sphere = Sphere(lambda x: y, jnp.zeros((), y.dtype))
    nu = sphere.multiplier
    center, pull_center = jax.vjp(sphere.center, x)
    displacement = y - center
    offset = where(nu > 0, here.project(displacement), 0)
    square = nonzero(jnp.vdot(offset, offset))
    slope = jax.grad(problem.outer, argnums=1)(x, y) - nu * displacement
    mu = here.multiplier(slope)

    def objective(x, y):
        value = problem.outer(x, y)
        pressed = 0.5 * nu * jnp.sum((y - sphere.center(x)) ** 2)
        return value - pressed.astype(value.dtype)

    def gradients(x, y):
        def inner(y):
            return jax.grad(problem.inner, argnums=(0, 1))(x, y)

        of_constraint = jax.linearize(inner, y)[1](mu)
        return tree_axpy(1.0, of_constraint, jax.grad(objective, (0, 1))(x, y))

    (gradient, _), push = jax.linearize(gradients, x, y)
    still = tree_zeros_like(x)

    def project(vector):
        vector = here.project(vector)
        return vector - jnp.vdot(offset, vector) / square * offset

    W = here.operator(lambda v: push(still, v)[1])
    basis = eigenbasis_within(project, W, slope)
    curvatures = where(basis.values == 0, jnp.inf, basis.values)

    def product(dx):
        moved = jax.jvp(lambda x: here.condition(problem, x), (x,), (dx,))[1]
        dy = -here.step_of(moved)
        along = jnp.vdot(displacement, jax.jvp(sphere.center, (x,), (dx,))[1] - dy)
        dy = dy + along / square * offset
        change = project(push(dx, dy)[1])
        dy = dy - basis.combine(basis.coordinates(change) / curvatures, change)
        in_x, in_y = push(dx, dy)
        # D^T of what is left in y. It is nothing along p, which is stationary.
        share = jnp.vdot(offset, in_y) / square
        total = tree_axpy(1.0, here.pull(in_y - share * displacement), in_x)
        return tree_axpy(share, pull_center(displacement)[0], total)

    return gradient, product
