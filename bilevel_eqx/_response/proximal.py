"""The proximal response: partial warm start."""

import dataclasses
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, PyTree, ScalarLike

from .._arguments import as_rate, check_positive
from .._inner_solver.minimum import InnerSolver
from .._problem.proximal import proximal
from .._tree import tree_dtype
from .base import AbstractSolvedResponse
from .implicit import Implicit


class Proximal(AbstractSolvedResponse):
    r"""Solves the inner problem with a pull towards the anchor $a$, and differentiates
    implicitly (Equations 3 and 4 of the paper):

    $$y^* \in \operatorname{argmin}_y f(x, y) + \frac\epsilon2 \|y - a\|^2, \qquad
    \frac{\partial y^*}{\partial x} = -(H + \epsilon I)^{-1} B.$$

    For a large $\epsilon$, y is about one step of gradient descent of size
    $1 / \epsilon$ from the anchor. As $\epsilon \to 0$, y tends to the projection of the
    anchor on the set of minima, and the inverse to a pseudoinverse. y is differentiable
    with respect to the anchor too.

    It is [`bilevel_eqx.Implicit`][] for the proximal objective.

    ??? cite "References"

        Vicol, Lorraine, Duvenaud and Grosse, *Implicit Regularization in
        Overparameterized Bilevel Optimization*, 2021: Algorithm 3. Rajeswaran, Finn,
        Kakade and Levine, *Meta-learning with implicit gradients*, 2019.
    """

    epsilon: ScalarLike = eqx.field(converter=as_rate)
    solver: InnerSolver
    linear_solver: lx.AbstractLinearSolver
    tolerance: float | None = 1e-3
    max_steps: int | None = 10_000
    carry_adjoint: bool = eqx.field(default=False, kw_only=True)

    state_is_guess: ClassVar[bool] = True

    def __check_init__(self):
        check_positive(self.epsilon, "epsilon", "Proximal")
        self._implicit()

    def _implicit(self):
        return Implicit(
            self.solver,
            self.linear_solver,
            self.tolerance,
            self.max_steps,
            carry_adjoint=self.carry_adjoint,
        )

    def init(self, problem, x, anchor):
        return self._implicit().init(problem, x, anchor)

    def _answer(self, problem, x, anchor, state):
        # In the type of y, since it leaves the program with the answer.
        epsilon = jnp.asarray(self.epsilon, tree_dtype(anchor))
        presumes = _Proximity(anchor, epsilon)
        answer, push = self._implicit()._answer(presumes(problem), x, anchor, state)
        return dataclasses.replace(answer, presumes=presumes), push

    def best_response(self, problem, x, anchor):
        problem = proximal(problem, anchor, self.epsilon)
        return self._implicit().best_response(problem, x, anchor)

    def reaches(self, problem, x, anchor):
        return self._implicit().reaches(problem, x, anchor)


class _Proximity(eqx.Module):
    """The assumption that y is a minimum of the proximal objective."""

    anchor: PyTree[Array]
    epsilon: ScalarLike

    def __call__(self, problem):
        return proximal(problem, self.anchor, self.epsilon)


Proximal.__init__.__doc__ = r"""**Arguments:**

- `epsilon`: $\epsilon$, positive: the strength of the pull, in units of the curvature of
    the inner objective.
- `solver`: any optimistix minimiser, run on the proximal objective from the anchor. With
    `None`, the anchor must already be a solution.
- `linear_solver`: any lineax solver, for $(H + \epsilon I) q = F_y$.
- `tolerance`, `max_steps`, `carry_adjoint`: as for [`bilevel_eqx.Implicit`][].
"""
