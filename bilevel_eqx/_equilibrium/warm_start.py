"""The warm-start equilibrium."""

from typing import Any, ClassVar

import equinox as eqx
from jaxtyping import ScalarLike

from .._arguments import as_rate, check_positive
from .._derivatives.public import is_nonzero
from .._linear_solver.pseudoinverse import Pseudoinverse
from .._problem.constraints import set_y
from .._problem.proximal import proximal
from .._problem.root import AbstractRootProblem
from .._response.base import AbstractResponse
from .._response.implicit import Implicit
from .._response.minimum_displacement import MinimumDisplacement
from .._solution_set.picture import picture
from .base import AbstractEquilibrium, Certificate
from .outer_curvature import derivatives, NOT_A_MINIMUM
from .residuals import measure, slopes_of


def _zero_or_rate(epsilon):
    """Full and partial are different programs: zero must be known when tracing."""
    return as_rate(epsilon) if is_nonzero(epsilon) else 0.0


class WarmStart(AbstractEquilibrium):
    r"""The equilibrium of a warm start: the inner variables start from their last values.

    $(x, y)$ is a warm-start equilibrium if the response to x from y is y, and x is
    stationary for the outer objective with that response:

    $$y \in \operatorname{argmin}_{y'} f(x, y') + \frac\epsilon2 \|y' - y\|^2, \qquad
    F_x - B^\top (H + \epsilon I)^{-1} F_y = 0,$$

    with $H^+$ for the inverse when $\epsilon = 0$ (a *full* warm start, where y is its
    own projection on $S(x)$). A positive $\epsilon$ is a *partial* one.

    This corrects the paper's Definition 3.2. Its first line, $x \in
    \operatorname{argmin} F(x, y)$ at fixed y, is empty if F does not contain x, and is
    replaced by stationarity with the response. In a convex problem $\epsilon$ does not
    change the inner condition, only the hypergradient.

    If y is a root ([`bilevel_eqx.AbstractRootProblem`][]) there is only the full one,
    $r(x, y) = 0$ and $F_x - (\partial r / \partial x)^\top
    (\partial r / \partial y)^{+\top} F_y = 0$.

    ??? cite "Reference"

        Vicol, Lorraine, Duvenaud and Grosse, *Implicit Regularization in
        Overparameterized Bilevel Optimization*, 2021: Definition 3.2, Appendix C.
    """

    bounds_products: ClassVar[bool] = True
    warm: ClassVar[bool] = True
    admits_constraints: ClassVar[bool] = True
    admits_roots: ClassVar[bool] = True
    epsilon: ScalarLike = eqx.field(converter=_zero_or_rate, default=0.0)

    def __check_init__(self):
        check_positive(self.epsilon, "epsilon", "WarmStart", or_zero=True)

    @property
    def partial(self) -> bool:
        """Whether epsilon is positive. A traced epsilon counts as positive."""
        return is_nonzero(self.epsilon)

    def outer_derivatives(self, problem, x, y, y0):
        plain = not (set_y(problem).confines or isinstance(problem, AbstractRootProblem))
        answering: Any = problem
        response: AbstractResponse = Implicit(None, Pseudoinverse(), None)
        if self.partial:
            answering = proximal(problem, y, self.epsilon)
        elif plain:
            # Not -H^+ B alone, which need not be the derivative of any function.
            response = MinimumDisplacement(None, tolerance=None, selection_tolerance=None)

        def fn(x):
            return problem.outer(x, response.best_response(answering, x, y)[0])

        return derivatives(fn, x)

    def certify(self, problem, x, y, y0, max_products=None):
        # At the anchor itself the pull vanishes but its curvature, epsilon I, does not.
        answering = proximal(problem, y, self.epsilon) if self.partial else problem
        here, _ = picture(answering, x, y, max_products=max_products)
        at = measure(here, slopes_of(here))
        through = "B^T (H + epsilon I)^-1" if self.partial else "B^T H^+"
        if here.is_root:
            through = "(dr/dx)^T (dr/dy)^+T"
        return Certificate(
            "a partial warm start" if self.partial else "a full warm start",
            {
                **at.inner("the response from y is y"),
                **at.stationary(f"x is stationary with it: F_x - {through} F_y = 0"),
            },
            accuracy=at.accuracy,
            decisions=at.decisions,
            notes=(*at.notes, NOT_A_MINIMUM),
        )


WarmStart.__init__.__doc__ = r"""**Arguments:**

- `epsilon`: $\epsilon$, at least zero, in units of the curvature of the inner objective.
    Zero, the default, is a full warm start; a positive value a partial one.
"""
