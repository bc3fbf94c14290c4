"""How a single loop estimates its directions from batches."""

import abc
import os
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Int, PyTree, ScalarLike

from .._arguments import as_count, as_rate, check_count, check_positive
from .._compat import is_traced
from .._problem.base import AbstractBilevelProblem
from .._problem.batches import place_of
from .._tree import tree_axpy, tree_scale, tree_sub, tree_zeros_like
from .oracles import (
    Directions,
    InnerTerms,
    LoopPoint,
    Oracle,
    OuterTerms,
    Terms,
    terms_of,
)


State = TypeVar("State")


class AbstractEstimator(eqx.Module, Generic[State]):
    """Makes the directions of a single loop from what is computed on its batches.

    With the state held fixed, the mean over the batches of an epoch of what it returns is
    linear in their mean: no estimator of ours is biased by the split into batches.
    """

    fixed_batches: ClassVar[bool] = False
    """Whether the batches of each epoch must be the same."""
    at_once: ClassVar[bool] = False
    """Whether y, v and x must move at once, on the same batches."""
    vanishing_noise: ClassVar[bool] = False
    """Whether its noise vanishes at rest, so that constant rates converge."""

    @abc.abstractmethod
    def init(self, oracle: Oracle, point: LoopPoint) -> State:
        """The state before the first step."""

    @abc.abstractmethod
    def __call__(
        self,
        oracle: Oracle,
        on_batch: AbstractBilevelProblem,
        point: LoopPoint,
        terms: Terms,
        state: State,
    ) -> tuple[Directions, State]:
        """The directions at a point.

        **Arguments:**

        - `oracle`: what else can be asked.
        - `on_batch`: the problem on the batches of this step.
        - `point`: x, y and v.
        - `terms`: those of `on_batch` there.
        - `state`: that of the last step.
        """


class MiniBatch(AbstractEstimator[None]):
    """The directions of the batch, as they are.

    With constant rates a single loop then comes to rest only up to the noise of its
    batches: let the rates decay.
    """

    def init(self, oracle, point):
        return None

    def __call__(self, oracle, on_batch, point, terms, state):
        return oracle.directions(terms.inner, terms.outer, point.v), None


class Momentum(AbstractEstimator[PyTree[Array]]):
    r"""An average of the directions of x, $h \leftarrow (1 - \theta) h + \theta D_x$,
    from zero; y and v move along those of the batch. A single loop with it is MA-SOBA.

    ??? cite "Reference"

        Chen, Xiao and Balasubramanian, *Optimal algorithms for stochastic bilevel
        optimization under relaxed smoothness conditions*, 2023.
    """

    theta: ScalarLike = eqx.field(converter=as_rate)

    def __check_init__(self):
        check_positive(self.theta, "theta", "Momentum")
        if not is_traced(self.theta) and jnp.max(jnp.asarray(self.theta)) > 1:
            raise ValueError(
                "`Momentum(theta=...)` is the weight of the newest direction, above zero "
                f"and at most one; it is {self.theta}."
            )

    def init(self, oracle, point):
        return tree_zeros_like(point.x)

    def __call__(self, oracle, on_batch, point, terms, state):
        directions = oracle.directions(terms.inner, terms.outer, point.v)
        news = tree_sub(directions.x, state)
        average = tree_axpy(self.theta, news, state)
        return directions._replace(x=average), average


Momentum.__init__.__doc__ = r"""**Arguments:**

- `theta`: $\theta$, the weight of the newest direction, above zero and at most one.
"""


class _Table(NamedTuple):
    """The terms of each batch of an epoch as they were when it was last drawn.

    Those that were drawn last are beside the table, and are written in the next step,
    before anything is read. In a loop the table is then written in place. XLA would copy
    all of it in each step if the same step read a row before it writes one.
    """

    entries: Any
    newest: Any
    """The terms that were drawn last, which belong into row `place`."""
    place: Int[Array, ""]
    total: Any
    """The sum of the entries, the newest among them, times `scale`."""
    lost: Any
    """What `total` has lost to rounding. If the first entries are large, that is larger
    than what is left of them in the end, and it would stay in the sum for ever."""

    @property
    def length(self) -> int:
        return jtu.tree_leaves(self.entries)[0].shape[0]

    @property
    def scale(self) -> float:
        """About one over the length, so that no sum overflows where the mean does not. A
        power of two, so that an entry is taken out as exactly as it was put in."""
        return 2.0 ** -(self.length - 1).bit_length()

    @property
    def mean(self) -> Any:
        scale = 1 / (self.length * self.scale)
        return tree_scale(scale, self.total)

    def complete(self) -> Any:
        """The entries, the newest among them."""
        return jtu.tree_map(
            lambda room, u: room.at[self.place].set(u), self.entries, self.newest
        )


class SAGA(AbstractEstimator[tuple[_Table, _Table]]):
    r"""SAGA on each of $f_y$, $f_{yy} v$, $f_{xy} v$, $F_y$ and $F_x$: of each batch the
    term is kept as it was when the batch was last drawn,

    $$g = g_i^{\text{new}} - g_i^{\text{kept}}
    + \operatorname{mean}_j g_j^{\text{kept}}.$$

    The tables start at zero. A single loop with it is SABA. The batches of each epoch are
    the same, in another order. With constant rates it converges as the full method does.

    The tables have $n (2 d_y + d_x) + m (d_y + d_x)$ entries, where n and m are the
    numbers of inner and outer batches. They are refused if they do not fit into memory.

    ??? cite "References"

        Defazio, Bach and Lacoste-Julien, *SAGA*, NeurIPS 2014. Dagréou, Ablin, Vaiter and
        Moreau, *A framework for bilevel optimization that enables stochastic and global
        variance reduction algorithms*, NeurIPS 2022.
    """

    fixed_batches: ClassVar[bool] = True
    at_once: ClassVar[bool] = True
    vanishing_noise: ClassVar[bool] = True

    def init(self, oracle, point):
        x, y = point.x, point.y
        inner, outer = InnerTerms(y, y, x), OuterTerms(y, x)
        num_inner, num_outer = oracle.num_batches("inner"), oracle.num_batches("outer")
        _check_memory(num_inner * _num_bytes(inner) + num_outer * _num_bytes(outer))
        return _blank_table(inner, num_inner), _blank_table(outer, num_outer)

    def __call__(self, oracle, on_batch, point, terms, state):
        inner_table, outer_table = state
        place = place_of(on_batch, "inner")
        inner, inner_table = _updated(inner_table, place, terms.inner)
        place = place_of(on_batch, "outer")
        outer, outer_table = _updated(outer_table, place, terms.outer)
        return oracle.directions(inner, outer, point.v), (inner_table, outer_table)


def _blank_table(like: Any, length: int) -> _Table:
    entries = jtu.tree_map(lambda u: jnp.zeros((length, *u.shape), u.dtype), like)
    zeros = tree_zeros_like(like)
    return _Table(entries, zeros, jnp.zeros((), jnp.int32), zeros, zeros)


def _updated(table: _Table, place, terms):
    """The estimate, and the table with the terms as its newest."""
    entries = table.complete()
    kept = jtu.tree_map(lambda room: room[place], entries)
    estimate = tree_axpy(1, tree_sub(terms, kept), table.mean)

    def updated(total, lost, new, old):
        total, lost_by_new = _sum_and_lost(total, new * table.scale)
        total, lost_by_old = _sum_and_lost(total, -old * table.scale)
        return _sum_and_lost(total, lost + lost_by_new + lost_by_old)

    pairs = jtu.tree_map(updated, table.total, table.lost, terms, kept)
    total, lost = (jtu.tree_map(lambda _, pair: pair[i], kept, pairs) for i in range(2))
    return estimate, _Table(entries, terms, place, total, lost)


def _sum_and_lost(a: Array, b: Array) -> tuple[Array, Array]:
    """a + b, and what it has lost to rounding, which is exact (Knuth's TwoSum)."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


def _num_bytes(tree: PyTree[Array]) -> int:
    return sum(u.size * u.dtype.itemsize for u in jtu.tree_leaves(tree))


# A run keeps the state that a failure would go back to, besides the current one.
_COPIES = 2


def _check_memory(num_bytes: int) -> None:
    available = _available_bytes()
    if available is not None and _COPIES * num_bytes > available:
        raise ValueError(
            f"The tables of `SAGA` have {num_bytes:,} bytes, and a run keeps {_COPIES} "
            f"copies of them, but there are {available:,} bytes of memory. The tables "
            "have an entry for each batch: draw larger batches (`inner_batch`, "
            "`outer_batch`), or use `SARAH`, which keeps no tables."
        )


def _available_bytes() -> int | None:
    """The memory of the device, or of the machine; `None` if neither is known."""
    stats = jax.local_devices()[0].memory_stats()
    if stats is not None and "bytes_limit" in stats:
        return stats["bytes_limit"]
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


class _Recursion(NamedTuple):
    """The directions of the last step, and where they were taken."""

    directions: Directions
    point: LoopPoint


class SARAH(AbstractEstimator[_Recursion]):
    r"""SARAH on the three directions: all data once in a period, and in between the
    change along the last step, on one batch:

    $$D_k = D_{k-1} + D^{\text{batch}}(z_k) - D^{\text{batch}}(z_{k-1}).$$

    A single loop with it is SRBA. With constant rates it converges as the full method
    does.

    ??? cite "References"

        Nguyen, Liu, Scheinberg and Takáč, *SARAH*, ICML 2017. Dagréou, Moreau, Vaiter and
        Ablin, *A lower bound and a near-optimal algorithm for bilevel empirical risk
        minimization*, AISTATS 2024.
    """

    at_once: ClassVar[bool] = True
    vanishing_noise: ClassVar[bool] = True
    period: int = eqx.field(converter=as_count)

    def __check_init__(self):
        check_count(self.period, "period", "SARAH")

    def init(self, oracle, point):
        x, y, v = point
        return _Recursion(tree_zeros_like(Directions(y, v, x)), point)

    def __call__(self, oracle, on_batch, point, terms, state):
        def on_all():
            whole = terms_of(oracle.problem, point)
            return oracle.directions(whole.inner, whole.outer, point.v)

        def on_change():
            before = terms_of(on_batch, state.point)
            after = oracle.directions(terms.inner, terms.outer, point.v)
            before = oracle.directions(before.inner, before.outer, state.point.v)
            return tree_axpy(1, tree_sub(after, before), state.directions)

        is_due = oracle.inner_count % self.period == 0
        directions = jax.lax.cond(is_due, on_all, on_change)
        return directions, _Recursion(directions, point)


SARAH.__init__.__doc__ = """**Arguments:**

- `period`: all data are used at every step whose number is a multiple of it.
"""
