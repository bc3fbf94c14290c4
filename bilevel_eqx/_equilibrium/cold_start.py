"""The cold-start equilibrium."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import lineax as lx

from .._linear_solver import Pseudoinverse
from .._misc import (
    depends_on,
    tree_axpy,
    tree_norm,
    tree_scale,
    tree_struct,
    tree_sub,
    tree_zeros_like,
)
from .._operators import cross_derivative_operator, gradient_and_hessian
from .._problem import inner_gradient, outer_gradients
from .base import AbstractEquilibrium, Certificate, relative_gradient


class ColdStart(AbstractEquilibrium):
    r"""The equilibrium of a cold start: the inner variables always start from $y_0$.

    $(x, y)$ is one if y is the inner minimum nearest to $y_0$, and x is stationary for
    the outer objective at that minimum:

    $$y = \Pi(y_0, S(x)), \qquad
    \frac{\mathrm d}{\mathrm d x} F\bigl(x, \Pi(y_0, S(x))\bigr) = 0.$$

    This is the paper's Definition 3.1, mended: there F(x, y) is minimised with y
    undefined. The derivative of the projection has a term in the null space of H
    wherever H moves with x, which $-H^+ B$ lacks; the certificate has it.

    ??? cite "Reference"

        Vicol, Lorraine, Duvenaud and Grosse, *Implicit Regularization in
        Overparameterized Bilevel Optimization*, 2021: Definition 3.1.
    """

    warm: ClassVar[bool] = False

    def certify(self, problem, x, y, y0):
        if y0 is None:
            raise ValueError(
                "A cold start is an equilibrium with respect to where the inner "
                "variables start: call `certify(problem, ColdStart(), x, y, y0=...)`."
            )
        value, outer_x, outer_y = outer_gradients(problem, x, y)
        inner, inner_y = jax.value_and_grad(problem.inner, argnums=1)(x, y)
        _, H = gradient_and_hessian(problem, x, y, {lx.positive_semidefinite_tag})
        H_pinv = lx.invert(H, Pseudoinverse(), throw=False)
        travelled = tree_sub(y, y0)
        astray = tree_sub(travelled, H_pinv.mv(H.mv(travelled)))
        indirect = _transposed_jacobian(problem, x, y, y0, H, H_pinv, outer_y)
        hypergradient = tree_axpy(1.0, indirect, outer_x)
        return Certificate(
            "a cold start",
            {
                "inner": (
                    relative_gradient(inner_y, y, inner),
                    "y is an inner minimum: f_y = 0",
                ),
                "displacement": (
                    tree_norm(astray) / jnp.maximum(1, tree_norm(travelled)),
                    "it is the one nearest to y0 (to first order): P_null (y - y0) = 0",
                ),
                "outer": (
                    relative_gradient(hypergradient, x, value),
                    "x is stationary for F(x, proj(y0, S(x)))",
                ),
            },
        )


def _transposed_jacobian(problem, x, y, y0, H, H_pinv, u):
    r"""$J^\top u$ for the Jacobian J of $x \mapsto \Pi(y_0, S(x))$.

    Differentiating the conditions of $\min \|y - y_0\|^2 / 2$ subject to
    $\nabla_y f(x, y) = 0$, which are $y - y_0 + H \mu = 0$ with
    $\mu = -H^+ (y - y_0)$, and writing $W = I + \partial_y (H \mu)$ and P for the
    projection on the null space of H,

    $$J^\top u = -B^\top H^+ (u - W v) - \nabla_x \langle v, H \mu \rangle, \qquad
    v = (P W P)^+ P u.$$
    """
    mu = tree_scale(-1, H_pinv.mv(tree_sub(y, y0)))

    def project(v):
        return tree_sub(v, H_pinv.mv(H.mv(v)))

    def pulled(x, y):
        return jax.jvp(lambda y: inner_gradient(problem, x, y), (y,), (mu,))[1]

    v = project(u)
    pulled_v = tree_zeros_like(u)
    if depends_on(lambda y: pulled(x, y), y):
        # The set of minima is curved: nearest to y0 means more than orthogonal to it.
        _, curvature = jax.linearize(lambda y: pulled(x, y), y)

        def restricted(v):
            v = project(v)
            return project(tree_axpy(1.0, curvature(v), v))

        operator = lx.FunctionLinearOperator(
            restricted, tree_struct(y), {lx.symmetric_tag}
        )
        v = lx.linear_solve(operator, v, Pseudoinverse(), throw=False).value
        v = project(v)
        pulled_v = curvature(v)
    B = cross_derivative_operator(problem, x, y)
    implicit = B.T.mv(H_pinv.mv(tree_sub(u, pulled_v)))
    _, pull_x = jax.vjp(lambda x: pulled(x, y), x)
    (null_space_term,) = pull_x(v)
    return tree_scale(-1, tree_axpy(1.0, implicit, null_space_term))
