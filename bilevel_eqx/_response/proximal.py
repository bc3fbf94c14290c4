"""The proximal response: partial warm start."""

import equinox as eqx
import lineax as lx
import optimistix as optx
from jaxtyping import ScalarLike

from .._arguments import as_rate, check_positive
from .._problem.proximal import proximal
from .base import AbstractResponse
from .implicit import Implicit


class Proximal(AbstractResponse):
    r"""Solves the inner problem with a pull towards the anchor $a$, and differentiates
    implicitly (Equations 3 and 4 of the paper):

    $$y^* \in \operatorname{argmin}_y f(x, y) + \frac\epsilon2 \|y - a\|^2, \qquad
    \frac{\partial y^*}{\partial x} = -(H + \epsilon I)^{-1} B.$$

    A large $\epsilon$ is like one step of gradient descent of size $1 / \epsilon$; as
    $\epsilon \to 0$ it becomes the projection of the anchor on the set of minima, and
    the inverse becomes a pseudoinverse. It is differentiable in the anchor too.

    It is [`bilevel_eqx.Implicit`][], of another inner objective.

    ??? cite "References"

        Vicol, Lorraine, Duvenaud and Grosse, *Implicit Regularization in
        Overparameterized Bilevel Optimization*, 2021: Algorithm 3. Rajeswaran, Finn,
        Kakade and Levine, *Meta-learning with implicit gradients*, 2019.
    """

    epsilon: ScalarLike = eqx.field(converter=as_rate)
    solver: optx.AbstractMinimiser | None
    linear_solver: lx.AbstractLinearSolver
    tolerance: float | None = 1e-3
    max_steps: int | None = 10_000

    def __check_init__(self):
        check_positive(self.epsilon, "epsilon", "Proximal")
        self._implicit()

    def _implicit(self):
        return Implicit(self.solver, self.linear_solver, self.tolerance, self.max_steps)

    def init(self, problem, x, anchor):
        return None

    def __call__(self, problem, x, anchor, state=None):
        return self._implicit()(proximal(problem, anchor, self.epsilon), x, anchor)

    def best_response(self, problem, x, anchor):
        problem = proximal(problem, anchor, self.epsilon)
        return self._implicit().best_response(problem, x, anchor)

    def reaches(self, problem, x, anchor):
        return self._implicit().reaches(problem, x, anchor)


Proximal.__init__.__doc__ = r"""**Arguments:**

- `epsilon`: $\epsilon$, positive: how strong the pull is. In units of the curvature of
    the inner objective.
- `solver`: any optimistix minimiser, run on the proximal objective from the anchor.
    `None` takes the anchor to be a solution already.
- `linear_solver`: any lineax solver, for $(H + \epsilon I) q = F_y$.
- `tolerance`, `max_steps`: as for [`bilevel_eqx.Implicit`][].
"""
