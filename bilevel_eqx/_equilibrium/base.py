"""What an equilibrium is, and what certifies one."""

import abc
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, Scalar

from .._custom_types import typechecked
from .._misc import as_variables, tree_norm
from .._problem import AbstractBilevelProblem, check_problem


class Certificate(eqx.Module):
    """How far a point is from the definition of an equilibrium: residuals, each of
    which is zero at one. `print` it for a table.

    **Attributes:**

    - `residuals`: a dictionary from names to values. They are relative: see
        `meanings`.
    - `concept`: the equilibrium in question.
    - `meanings`: a dictionary from the same names to what each one measures.
    - `largest`: the largest of the residuals.
    """

    residuals: dict[str, Scalar]
    concept: str = eqx.field(static=True)
    _meanings: tuple[tuple[str, str], ...] = eqx.field(static=True)

    def __init__(self, concept: str, residuals: dict[str, tuple[Any, str]]):
        """**Arguments:**

        - `concept`: the name of the equilibrium.
        - `residuals`: from the name of each residual to a pair of its value and of a
            sentence on what it measures.
        """
        self.concept = concept
        self.residuals = {k: jnp.asarray(value) for k, (value, _) in residuals.items()}
        self._meanings = tuple((k, meaning) for k, (_, meaning) in residuals.items())

    @property
    def meanings(self) -> dict[str, str]:
        return dict(self._meanings)

    @property
    def largest(self) -> Array:
        # `maximum` and not `max`: it hands a NaN on.
        largest = jnp.asarray(0.0)
        for value in self.residuals.values():
            largest = jnp.maximum(largest.astype(value.dtype), value)
        return largest

    def __str__(self):
        lines = [f"Certificate for {self.concept}"]
        for name, meaning in self._meanings:
            value = self.residuals[name]
            if eqx.is_array(value) and not isinstance(value, np.ndarray):
                try:
                    text = np.array2string(np.asarray(value), precision=2)
                    text = f"{float(value):.2e}" if np.ndim(value) == 0 else text
                except Exception:  # traced: there are no numbers yet
                    text = "traced"
            else:
                text = str(value)
            lines.append(f"  {name:<14} {text:>10}   {meaning}")
        return "\n".join(lines)


class AbstractEquilibrium(eqx.Module):
    """An equilibrium concept: which inner solution is meant, and what is zero there."""

    warm: eqx.AbstractClassVar[bool]
    """Whether the inner variables start from where they were (a warm start) or from
    `y0` each time (a cold one)."""

    @abc.abstractmethod
    def certify(
        self,
        problem: AbstractBilevelProblem,
        x: PyTree[Array],
        y: PyTree[Array],
        y0: PyTree[Array] | None,
    ) -> Certificate:
        """The residuals of `(x, y)`. Called by [`bilevel_eqx.certify`][]."""


@eqx.filter_jit
@typechecked
def certify(
    problem: AbstractBilevelProblem,
    equilibrium: AbstractEquilibrium,
    x: PyTree,
    y: PyTree,
    *,
    y0: PyTree = None,
) -> Certificate:
    r"""Checks a point against the definition of an equilibrium.

    The check uses accurate operators (pseudoinverses, dense where the problem is small
    and matrix-free where it is not) and knows nothing of how the point was computed, so
    that truncation, damping and unrolling show as what they are: a different point.

    **Arguments:**

    - `problem`: the bilevel problem.
    - `equilibrium`: the concept, for instance [`bilevel_eqx.WarmStart`][].
    - `x`: the outer variables, a pytree of floating-point arrays.
    - `y`: the inner variables, a pytree of floating-point arrays.
    - `y0`: where the inner variables start, for the concepts that depend on it
        ([`bilevel_eqx.ColdStart`][]). Keyword only argument.

    **Returns:**

    A [`bilevel_eqx.Certificate`][]. Every gradient in it is scaled as by Dennis and
    Schnabel, $\|\nabla\phi(v)\| \max(1, \|v\|) / \max(1, |\phi|)$: the relative change
    of the objective for a relative change of its variable.

    **Raises:**

    A `ValueError` if `y0` is needed and missing, and as
    [`bilevel_eqx.inner_hessian`][].
    """
    x, y = as_variables(x, "x"), as_variables(y, "y")
    if y0 is not None:
        y0 = as_variables(y0, "y0")
    check_problem(problem, x, y)
    return equilibrium.certify(problem, x, y, y0)


def relative_gradient(
    gradient: PyTree[Array], variables: PyTree[Array], value: Scalar
) -> Scalar:
    r"""$\|\nabla\phi(v)\| \max(1, \|v\|) / \max(1, |\phi(v)|)$."""
    size = jnp.maximum(1, tree_norm(variables))
    return tree_norm(gradient) * size / jnp.maximum(1, jnp.abs(value))
