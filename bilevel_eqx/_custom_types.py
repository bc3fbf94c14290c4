"""Type variables, and the type checker that guards the public boundary."""

from typing import TypeVar

from beartype import beartype
from jaxtyping import jaxtyped


X = TypeVar("X")


"""A pytree of floating-point arrays: the outer variables."""


Y = TypeVar("Y")


"""A pytree of floating-point arrays: the inner variables."""


# jaxtyping and beartype check the public functions. Under `eqx.filter_jit` they do so
# while tracing, so that a compiled program does not pay for it.
typechecked = jaxtyped(typechecker=beartype)
