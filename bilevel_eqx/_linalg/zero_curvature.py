r"""What counts as zero curvature. There is this one rule for it.

A computed eigenvalue of H counts as zero if it is no larger than its own uncertainty:

- rounding, $2 \varepsilon \sqrt n\, \|H\|$, with n between 64 and 1,024: the norm of a
  symmetric matrix of independent roundings, $\varepsilon \|H\|$ each. (Null spaces of
  Hessians by automatic differentiation have eigenvalues of at most $3 \varepsilon \|H\|$,
  for n up to 1,000 and in both precisions. The worst case is $\varepsilon\, n\, \|H\|$,
  and would take real curvature for zero.)
- where H depends on y, twice its change over a step towards the minimum. An eigenvalue
  that vanishes at the minimum is as large as the error of y, and such a step takes most
  of it away. One that is really there changes little, however small it is. (Only those
  below $\varepsilon^{1/2} \|H\|$ are asked.)
- where H depends on y and is too large for that test, $\varepsilon^{2/3} \|H\|$: as much
  as is left of such an eigenvalue after an inner solve as exact as the number type.

The pseudoinverse, the null space, the uniqueness of a minimum and the reports all ask
here, so that no eigenvalue is zero to one of them and counts to another.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Scalar

from .._compat import is_traced
from .._tree import nonzero, where
from .power_iteration import DENSE_SIZE


def rounding_of(largest: Scalar, size: int) -> Scalar:
    """The rounding error of the eigenvalues of an operator on vectors of a size, whose
    largest magnitude is given."""
    # Beyond the dense size nothing is decomposed, and the bound would be far too large.
    # For a tiny matrix it would be less than the rounding of a few products.
    n = max(_FEWEST, min(size, DENSE_SIZE))
    return 2 * float(jnp.finfo(largest.dtype).eps) * n**0.5 * largest


_FEWEST = 64


def is_flat(
    curvature: Scalar, image: Scalar, largest: Scalar, size: int
) -> Bool[Array, ""]:
    """Whether a direction p of conjugate gradients has no curvature but by error.

    `curvature` is p^T H p / p^T p, and `image` is |H p| / |p|. A direction of zero
    curvature comes up with a small part left of directions with a large one. Its
    curvature is then the square of that part, but its image is the part itself; for an
    eigenvector the two are the same.
    """
    size_of = jnp.abs(curvature)
    eps = float(jnp.finfo(largest.dtype).eps)
    leftover = image**2 >= _LEFTOVER * largest * size_of
    small = size_of <= eps ** (2 / 3) * largest
    # Not <, because the largest curvature of the zero operator is zero.
    return (size_of <= rounding_of(largest, size)) | (small & leftover)


_LEFTOVER = 1e-2


def ends(values: Float[Array, " k"]) -> Float[Array, " 2"]:
    """The first and the last of sorted values, which are the extreme ones."""
    return values[:: max(1, values.size - 1)]


def uncertainty(
    values: Float[Array, " k"],
    size: int,
    *,
    change: Float[Array, " k"] | None = None,
    curved: bool = False,
) -> Float[Array, " k"]:
    """How far sorted eigenvalues may be from those at the minimum, one by one.

    `change` is that over a step of descent, where it is known; `curved` says that H
    depends on y.
    """
    largest = jnp.max(jnp.abs(ends(values)), initial=0)
    error = rounding_of(largest, size)
    eps = float(jnp.finfo(values.dtype).eps)
    if change is not None:
        # Far from a minimum large eigenvalues change too, and they are not zero there.
        moved = jnp.minimum(2 * jnp.abs(change), eps ** (1 / 2) * largest)
        return jnp.maximum(error, moved)
    if curved:
        error = jnp.maximum(error, eps ** (2 / 3) * largest)
    return jnp.full_like(values, error)


def clearance(
    values: Float[Array, " k"], uncertainty: Float[Array, " k"]
) -> Float[Array, " k"]:
    """Eigenvalues in units of their uncertainty. Those between -1 and 1 count as zero."""
    # Zero over zero: a zero operator is certainly zero.
    return values / where(uncertainty == 0, jnp.inf, uncertainty)


def margin(clearance: Float[Array, " k"]) -> Scalar:
    """By which factor the closest of all decisions was clear; below a hundred it is not.

    The smallest ratio of an eigenvalue that counts to its uncertainty, or of the
    uncertainty to an eigenvalue that counts as zero, whichever is smaller.
    """
    size = jnp.abs(clearance)
    ratio = jnp.maximum(size, 1 / where(size == 0, 1, size))
    return jnp.min(where(size == 0, jnp.inf, ratio), initial=jnp.inf)


def smallest(
    clearance: Float[Array, " k"], values: Float[Array, " k"] | None
) -> tuple[Scalar, Scalar]:
    """Of the eigenvalue with the least clearance: its size, and what size would count as
    zero, both relative to the largest eigenvalue. `values` as for `least_clear`."""
    clear = jnp.abs(clearance)
    size = clear if values is None else jnp.abs(values)
    largest, i = nonzero(jnp.max(size)), jnp.argmin(clear)
    rounding = rounding_of(jnp.ones((), size.dtype), size.shape[-1])
    # An exact zero has no ratio.
    uncertain = size[i] / nonzero(clear[i]) / largest
    return size[i] / largest, where(clear[i] == 0, rounding, uncertain)


def least_clear(
    clearance: Float[Array, "*batch k"], values: Float[Array, "*batch k"] | None
) -> Float[Any, "*batch"]:
    """The size, relative to the largest, of the eigenvalue whose decision is the least
    clear; zero if all decisions are clear.

    Rounding is at least twice smaller than its bound, and what is a hundred times larger
    is not rounding. An eigenvalue that vanishes at the minimum changes by itself over a
    step towards it, and any other by less than a quarter of itself. In between it is not
    clear which of the two it is. `values` are `None` if all uncertainty is rounding.
    """
    # NumPy, where there are numbers: it has nothing to compile.
    xp: Any = jnp if is_traced(clearance) else np
    clear = abs(xp.asarray(clearance))
    size = clear if values is None else abs(xp.asarray(values))
    largest = xp.max(size, -1, keepdims=True, initial=0)
    relative = size / xp.where(largest == 0, 1, largest)
    low, high = _NOISE, _SIGNAL
    if values is not None:
        rounding = rounding_of(xp.ones((), size.dtype), size.shape[-1])
        # A little more, for the rounding of the quotient.
        by_rounding = relative <= 1.01 * clear * rounding
        low, high = xp.where(by_rounding, low, 2 / 3), xp.where(by_rounding, high, 2.0)
    is_unclear = (clear > low) & (clear < high)
    distance = abs(xp.log(xp.where(is_unclear, clear, 1)))
    closest = xp.argmin(xp.where(is_unclear, distance, xp.inf), -1, keepdims=True)
    found = xp.where(is_unclear, relative, 0)
    return xp.take_along_axis(found, closest, -1)[..., 0]


_NOISE, _SIGNAL = 0.5, 100.0
