"""How a failure is raised, inside and outside of transformations."""

from collections.abc import Callable, Sequence

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from .._arguments import is_traced
from .._tree import tree_scale
from .results import RESULTS
from .sentences import _sentences


class _Composed(Sequence):
    """What stands for the list of messages of `branched_error_if`, which is fixed when
    the program is traced: the sentence that the program has just had composed.
    """

    sentence = ""

    def __getitem__(self, index):
        return self.sentence

    def __len__(self):
        return 1


_composed = _Composed()


def _compose(failed, result, figures):
    _composed.sentence = _sentences(failed, result, figures)
    return np.zeros(np.shape(failed), np.int32)


def throw_if_failed(
    out: PyTree, result: RESULTS, figures: Callable[[], dict[str, Array]]
) -> PyTree:
    """`out`, or an error if `result` is a failure, whose sentence names the `figures`.

    They are asked for only then; inside of a transformation, in a branch of the program
    that is not taken otherwise.
    """
    failed = result != RESULTS.successful
    if not is_traced(failed):
        if failed:
            known = jax.lax.stop_gradient(figures())
            raise eqx.EquinoxRuntimeError(_sentences(failed, result, known))
        return out

    def compose():
        # There is no derivative of a callback, and none of a sentence.
        arguments = jax.lax.stop_gradient((failed, result, figures()))
        # One call for all of a batch, which says which elements of it failed.
        return jax.pure_callback(
            _compose,
            jax.ShapeDtypeStruct((), jnp.int32),
            *arguments,
            vmap_method="broadcast_all",
        )

    index = jax.lax.cond(
        eqxi.unvmap_any(failed), compose, lambda: jnp.zeros((), jnp.int32)
    )
    # The error hangs on the numbers alone: it cannot pass through a typed key.
    numeric, rest = eqx.partition(out, eqx.is_inexact_array)
    return eqx.combine(_throw(numeric, failed, index), rest)


@eqx.filter_custom_jvp
def _throw(numeric, failed, index):
    return eqxi.branched_error_if(numeric, failed, index, _composed)


@_throw.def_jvp
def _throw_jvp(primals, tangents):
    _, failed, index = primals
    # A gradient may have no use for the primal output. Multiplied by a one that hangs on
    # the error, the tangent hangs on it too, and remains linear.
    one = _throw(jnp.ones(()), failed, index)
    return _throw(*primals), tree_scale(one, tangents[0])
