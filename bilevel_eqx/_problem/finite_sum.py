"""Bilevel problems whose objectives are means over data."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, Scalar

from .._arguments import as_count, check_count, check_key
from .._compat import is_traced
from .._custom_types import X, Y
from .._mesh import check_mesh, laid_as, on_auto_axes
from .._tree import (
    tree_arrays,
    tree_bytes,
    tree_dot,
    tree_joined,
    tree_rest,
    tree_struct,
)
from .base import AbstractBilevelProblem
from .sampling import subset


Level = Literal["inner", "outer"]


class AbstractFiniteSumProblem(AbstractBilevelProblem[X, Y]):
    r"""A bilevel problem whose objectives are means over data, and penalties:

    $$f(x, y) = \frac1n \sum_{i=1}^n \ell_i(x, y) + p(x, y), \qquad
    F(x, y) = \frac1m \sum_{j=1}^m L_j(x, y) + P(x, y).$$

    Subclass it and make the data fields. `inner` and `outer` are made from the losses, so
    that everything that takes a problem takes this one. Algorithms that draw
    mini-batches, such as [`bilevel_eqx.pipelines.SingleLoop`][], need such a
    problem.

    The samples lie along the leading axis of every leaf of `inner_data` and of
    `outer_data`. Where x or y has something for each sample (a weight, say), put the
    indices of the samples into the data as one more column: `batch` then says which ones
    it has.

    The losses are one number for each sample, and not their mean. So a short last batch
    and a split into blocks are exact.

    With a `block_size`, the means, their gradients and products with their second
    derivatives run over blocks of that many samples. Each block is read once, and what is
    stored on the way is that of one block, for any number of samples and any order of
    differentiation in x, y and the other fields; and of the intermediate results those
    with at most a sixteenth of the entries of the data, which would otherwise be computed
    again and again. Derivatives with respect to the data themselves are taken on
    all samples at once. With `block_size="auto"` blocks are such that they fit into the
    cache of a CPU, if the data do not; on a GPU there are none.

    If the samples lie in a random order already, say so: `shuffled = True`. A mini-batch
    is then of neighbouring samples, and only the order of the batches is drawn. That
    reads memory in one piece, where a batch of samples from anywhere costs a read for
    each of them, but the batches of each epoch are the same. The library does not
    shuffle the data: if they are sorted by label, say, such batches are no fair samples.

    !!! Example

        ```python
        class Cleaning(blx.AbstractFiniteSumProblem):
            inner_data: tuple[Array, Array, Array]  # images, labels and indices
            outer_data: tuple[Array, Array]
            block_size = 1000

            def inner_losses(self, x, y, batch, key):
                images, labels, index = batch
                logits = images @ y
                losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
                return jax.nn.sigmoid(x[index]) * losses

            def outer_losses(self, x, y, batch, key):
                images, labels = batch
                logits = images @ y
                return optax.softmax_cross_entropy_with_integer_labels(logits, labels)

            def inner_penalty(self, x, y):
                return 0.001 * jnp.sum(y**2)
        ```
    """

    inner_data: eqx.AbstractVar[PyTree[Array]]
    outer_data: eqx.AbstractVar[PyTree[Array]]
    block_size: ClassVar[int | Literal["auto"] | None] = None
    shuffled: ClassVar[bool] = False

    @abc.abstractmethod
    def inner_losses(
        self, x: X, y: Y, batch: PyTree[Array], key: PRNGKeyArray | None
    ) -> Float[Array, " batch"]:
        r"""The losses $\ell_i(x, y)$ of the samples in a batch.

        **Arguments:**

        - `x`, `y`: the outer and the inner variables.
        - `batch`: some samples of `inner_data`, in the same structure.
        - `key`: for what is random in the losses, such as dropout. It is `None` where all
            data are used; dropout then rests.

        **Returns:**

        A floating-point array with one number for each sample in the batch.
        """

    @abc.abstractmethod
    def outer_losses(
        self, x: X, y: Y, batch: PyTree[Array], key: PRNGKeyArray | None
    ) -> Float[Array, " batch"]:
        r"""The losses $L_j(x, y)$ of some samples of `outer_data`, as `inner_losses`."""

    def inner_penalty(self, x: X, y: Y) -> Scalar:
        """$p(x, y)$, which is whole in every batch. Zero unless overridden."""
        return jnp.zeros(())

    def outer_penalty(self, x: X, y: Y) -> Scalar:
        """$P(x, y)$, which is whole in every batch. Zero unless overridden."""
        return jnp.zeros(())

    def inner(self, x, y):
        return _plus(_mean(self, x, y, "inner"), self.inner_penalty(x, y))

    def outer(self, x, y):
        return _plus(_mean(self, x, y, "outer"), self.outer_penalty(x, y))

    @on_auto_axes
    def sample(
        self, key: PRNGKeyArray, inner_size: int | None, outer_size: int | None
    ) -> AbstractBilevelProblem[X, Y]:
        """The same problem on a random subset of the data.

        Its objectives, gradients and second derivatives at a point are unbiased estimates
        of those of this problem.

        **Arguments:**

        - `key`: for the samples, which are drawn without replacement, and for the losses.
        - `inner_size`, `outer_size`: the numbers of samples; `None` is all of them, and
            the losses are then without a key.

        **Returns:**

        A problem with the objectives of the subset.

        **Raises:**

        A `ValueError` if there are fewer samples than are asked for, or if the leaves of
        the data have not as many samples each.
        """
        check_key(key, "sample")
        inner_key, outer_key = jax.random.split(key)
        return OnBatches(
            self,
            _draw(self, "inner", inner_key, inner_size),
            _draw(self, "outer", outer_key, outer_size),
        )


class FiniteSumProblem(AbstractFiniteSumProblem[X, Y]):
    """A bilevel problem whose objectives are means over data, made from functions.

    !!! Example

        ```python
        def losses(x, y, batch, key):
            features, targets = batch
            return (features @ y - targets) ** 2

        problem = blx.FiniteSumProblem(
            losses,
            losses,
            outer_data=validation,
            inner_data=train,
            inner_penalty=lambda x, y: jnp.sum(jnp.exp(x) * y**2),
        )
        ```
    """

    outer_losses_fn: Callable
    inner_losses_fn: Callable
    outer_data: PyTree[Array]
    inner_data: PyTree[Array]
    outer_penalty_fn: Callable | None
    inner_penalty_fn: Callable | None
    block_size: int | Literal["auto"] | None = eqx.field(static=True)
    shuffled: bool = eqx.field(static=True)
    project_x: Callable[[X], X] | None
    project_y: Callable[[Y], Y] | None

    # `Any`, because a type checker cannot tell what x and y are in a lambda.
    def __init__(
        self,
        outer_losses: Callable[[Any, Any, Any, Any], Any],
        inner_losses: Callable[[Any, Any, Any, Any], Any],
        outer_data: PyTree[Array],
        inner_data: PyTree[Array],
        *,
        outer_penalty: Callable[[Any, Any], Any] | None = None,
        inner_penalty: Callable[[Any, Any], Any] | None = None,
        block_size: int | Literal["auto"] | None = None,
        shuffled: bool = False,
        project_x: Callable[[Any], Any] | None = None,
        project_y: Callable[[Any], Any] | None = None,
    ):
        """**Arguments:**

        - `outer_losses`, `inner_losses`: functions of `(x, y, batch, key)` whose value is
            one loss for each sample in the batch. The `key` is `None` where all data are
            used.
        - `outer_data`, `inner_data`: the samples, along the leading axis of every leaf.
        - `outer_penalty`, `inner_penalty`: functions of `(x, y)` that are added to the
            means. Keyword only arguments.
        - `block_size`: how many samples are used at once where all data are used; `None`,
            the default, is all of them, and `"auto"` as many as fit into the cache.
            Keyword only argument.
        - `shuffled`: whether the samples lie in a random order already, so that
            neighbouring ones may be a mini-batch. Keyword only argument.
        - `project_x`, `project_y`: as for [`bilevel_eqx.BilevelProblem`][].
        """
        self.outer_losses_fn = outer_losses
        self.inner_losses_fn = inner_losses
        self.outer_data = jtu.tree_map(jnp.asarray, outer_data)
        self.inner_data = jtu.tree_map(jnp.asarray, inner_data)
        self.outer_penalty_fn = outer_penalty
        self.inner_penalty_fn = inner_penalty
        self.block_size = as_count(block_size)
        self.shuffled = shuffled
        self.project_x = project_x
        self.project_y = project_y

    def inner_losses(self, x, y, batch, key):
        return self.inner_losses_fn(x, y, batch, key)

    def outer_losses(self, x, y, batch, key):
        return self.outer_losses_fn(x, y, batch, key)

    def inner_penalty(self, x, y):
        return (
            jnp.zeros(())
            if self.inner_penalty_fn is None
            else self.inner_penalty_fn(x, y)
        )

    def outer_penalty(self, x, y):
        return (
            jnp.zeros(())
            if self.outer_penalty_fn is None
            else self.outer_penalty_fn(x, y)
        )


class Batch(eqx.Module):
    """Some samples, and what each counts in the estimate of a mean."""

    samples: PyTree[Array]
    weights: Float[Array, " batch"]
    key: PRNGKeyArray | None
    place: Int[Array, ""] | None = None
    """Which of the batches of an epoch it is; `None` if it is of no epoch."""


class OnBatches(AbstractBilevelProblem[X, Y]):
    """A finite sum on a mini-batch of each level; `None` is all data."""

    problem: AbstractFiniteSumProblem[X, Y]
    inner_batch: Batch | None
    outer_batch: Batch | None

    @property
    def project_x(self):
        return self.problem.project_x

    @property
    def project_y(self):
        return self.problem.project_y

    def inner(self, x, y):
        whole, batch = self.problem, self.inner_batch
        if batch is None:
            return whole.inner(x, y)
        losses = whole.inner_losses(x, y, batch.samples, batch.key)
        check_losses(losses, "inner", batch.weights.size, _of(batch))
        return _plus(_weighted(losses, batch.weights), whole.inner_penalty(x, y))

    def outer(self, x, y):
        whole, batch = self.problem, self.outer_batch
        if batch is None:
            return whole.outer(x, y)
        losses = whole.outer_losses(x, y, batch.samples, batch.key)
        check_losses(losses, "outer", batch.weights.size, _of(batch))
        return _plus(_weighted(losses, batch.weights), whole.outer_penalty(x, y))


def _of(batch: Batch) -> str:
    size = batch.weights.size
    key = "without a key" if batch.key is None else "with a key"
    return f"a batch of {size} {key}"


def data_of(problem: AbstractFiniteSumProblem, level: Level) -> PyTree[Array]:
    """The data of the inner or of the outer objective."""
    return problem.inner_data if level == "inner" else problem.outer_data


def num_samples(problem: AbstractFiniteSumProblem, level: Level) -> int:
    """How many samples the inner or the outer objective is the mean of.

    This refuses data that are not arrays of as many samples each. It uses only shapes.
    """
    leaves = jtu.tree_leaves_with_path(data_of(problem, level))
    if not leaves:
        raise ValueError(f"`problem.{level}_data` contains no arrays.")
    lengths = {}
    for path, leaf in leaves:
        name = f"`problem.{level}_data{jtu.keystr(path)}`"
        is_array = eqx.is_array(leaf) or isinstance(leaf, np.ndarray)
        if not is_array or leaf.ndim == 0 or leaf.shape[0] == 0:
            raise ValueError(
                f"Every leaf of `problem.{level}_data` must be an array with one sample "
                f"or more along its leading axis, but {name} is {leaf!r}. Keep what is "
                "not one entry a sample in another field of the problem."
            )
        lengths[name] = leaf.shape[0]
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise ValueError(
            f"All leaves of `problem.{level}_data` must have as many samples along their "
            f"leading axes, but {listed}. Keep what is not one entry a sample in another "
            "field of the problem."
        )
    return min(lengths.values())


def check_losses(losses: Any, level: Level, size: int, of: str = "all data") -> None:
    """Refuses losses, or their shapes, that are not a number for each of the samples."""
    is_one_each = (
        isinstance(losses, jax.Array | np.ndarray | jax.ShapeDtypeStruct)
        and losses.shape == (size,)
        and jnp.issubdtype(losses.dtype, jnp.floating)
    )
    if not is_one_each:
        shown = jtu.tree_map(
            lambda u: tree_struct(u) if hasattr(u, "shape") else u, losses
        )
        raise ValueError(
            f"`problem.{level}_losses(x, y, batch, key)` must return one floating-point "
            f"number for each sample, of shape ({size},) for {of}, but it returns "
            f"{shown}. Leave out the mean over the samples, and take it over the other "
            "axes."
        )


def losses_of(problem: AbstractFiniteSumProblem, level: Level) -> Callable:
    """The losses of the inner or of the outer objective."""
    return problem.inner_losses if level == "inner" else problem.outer_losses


def _draw(problem, level: Level, key, size: int | None) -> Batch | None:
    if size is None:
        return None
    indices_key, losses_key = jax.random.split(key)
    indices = subset(indices_key, num_samples(problem, level), size, f"`{level}_data`")
    samples = rows(data_of(problem, level), indices)
    return Batch(samples, jnp.full((size,), 1 / size), losses_key)


def rows(data: PyTree[Array], indices: Int[Array, " batch"]) -> PyTree[Array]:
    """Some of the samples. If the data lie on several devices, they lie as the data do:
    each device computes on its share of a batch."""
    check_mesh(data)
    # False, but the compiler does not know it.
    never = indices[0] < 0
    size = indices.shape[0]
    return jtu.tree_map(lambda u: laid_as(u[indices], u[:size], never), data)


def neighbours(data: PyTree[Array], start: Int[Array, ""], size: int) -> PyTree[Array]:
    """So many samples from `start` on. They lie as the data do, like those of `rows`."""
    check_mesh(data)
    never = start < 0

    def read(u):
        batch = jax.lax.dynamic_slice_in_dim(u, start, size)
        return laid_as(batch, u[:size], never)

    return jtu.tree_map(read, data)


def _plus(mean: Scalar, penalty: Scalar) -> Scalar:
    return mean + jnp.asarray(penalty, mean.dtype)


def _weighted(losses: Float[Array, " batch"], weights: Array) -> Scalar:
    return _wide_sum(losses, weights).astype(losses.dtype)


def _wide_sum(losses: Float[Array, " batch"], weights: Array) -> Scalar:
    dtype = _wide(losses.dtype)
    return jnp.vdot(weights.astype(dtype), losses.astype(dtype))


def _wide(dtype: Any) -> Any:
    """The type to sum in: half precision counts to 256, or to 2,048, and no further."""
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


#
# The mean over all data, in blocks.
#
# JAX's derivatives of a loop over blocks would store something of each block. So the mean
# has its own rule: its gradient is another loop over blocks, and so is a product with the
# derivative of that gradient. Both are linear in the tangent, so reverse mode transposes
# them.
#


def _mean(problem: AbstractFiniteSumProblem, x, y, level: Level) -> Scalar:
    size, block_size = num_samples(problem, level), problem.block_size
    if block_size not in (None, "auto"):
        check_count(block_size, "block_size", type(problem).__name__)
    if block_size == "auto":
        block_size = _block_for_cache(data_of(problem, level), y, size)
    if block_size is None or block_size >= size:
        return _whole_mean((problem, x, y, None), level)
    hoisted, dtype = _hoisted(problem, x, y, level, block_size)
    args = problem, x, y, hoisted
    mean = _blocked_mean(args, level=level, block_size=block_size)
    return mean.astype(dtype)


def _hoisted(
    problem, x, y, level: Level, block_size: int
) -> tuple["_Hoisted | None", Any]:
    """The losses, if a derivative can be asked for with respect to what they close over.
    The rules below see only their arguments, and would take zero. And their type."""
    rest, arrays = tree_rest((problem, x, y)), tree_arrays((problem, x, y))

    def losses(arrays, samples):
        problem, x, y = tree_joined(arrays, rest)
        return losses_of(problem, level)(x, y, samples, None)

    def of_first_block(arrays):
        problem, _, _ = tree_joined(arrays, rest)
        return losses(arrays, _block(data_of(problem, level), 0, block_size))

    # Each time anew: an object may hold a number now, and a traced value later.
    program, struct = jax.make_jaxpr(of_first_block, return_shape=True)(arrays)
    check_losses(struct, level, block_size, "a block of the data")
    if not any(map(is_traced, program.consts)):
        return None, struct.dtype
    data = data_of(problem, level)
    block = jax.eval_shape(lambda: _block(data, 0, block_size))
    of_block, of_all = (
        eqx.filter_closure_convert(losses, arrays, samples) for samples in (block, data)
    )
    return _Hoisted(of_block, of_all), struct.dtype


class _Hoisted(eqx.Module):
    """Losses of the arrays of `(problem, x, y)` and some samples. What they close over
    is their leaves."""

    of_block: Callable
    of_all: Callable


# In bytes: data that stay in the cache of a CPU from one pass to the next, and a block
# that stays there from its first use to its last. Both are well below usual sizes.
_CACHED_DATA, _CACHED_BLOCK = 2**21, 2**18


def _block_for_cache(data: PyTree[Array], y: PyTree[Array], size: int) -> int | None:
    """How many samples are read from memory once where all data are read twice."""
    num_bytes = tree_bytes(data)
    if jax.default_backend() != "cpu" or num_bytes <= _CACHED_DATA:
        return None
    # Each block also adds to a gradient, which should not be most of the traffic.
    block = max(_CACHED_BLOCK, 4 * tree_bytes(y))
    return max(1, size * block // num_bytes)


def _whole_mean(args, level: Level) -> Scalar:
    problem, x, y, hoisted = args
    data = data_of(problem, level)
    if hoisted is None:
        losses = losses_of(problem, level)(x, y, data, None)
        check_losses(losses, level, num_samples(problem, level))
        return jnp.mean(losses)
    return jnp.mean(hoisted.of_all(tree_arrays((problem, x, y)), data))


@eqx.filter_custom_jvp
def _blocked_mean(args, *, level: Level, block_size: int):
    return _over_blocks(
        lambda block: _share(args, level, block), args[0], level, block_size
    )


@_blocked_mean.def_jvp
def _blocked_mean_jvp(primals, tangents, *, level: Level, block_size: int):
    (args,), (t_args,) = primals, tangents
    if _moves_data(t_args[0], level):

        def whole(args):
            mean = _whole_mean(args, level)
            return mean.astype(_wide(mean.dtype))

        return eqx.filter_jvp(whole, (args,), (t_args,))
    moving, rest = _parted(args, t_args)
    value = _blocked_mean(args, level=level, block_size=block_size)
    gradient = _blocked_gradient(moving, rest, level=level, block_size=block_size)
    return value, tree_dot(gradient, t_args).astype(value.dtype)


@eqx.filter_custom_jvp
def _blocked_gradient(moving, rest, *, level: Level, block_size: int):
    """The gradient of the mean with respect to `moving`."""

    def gradient(block):
        return _gradient(lambda args: _share(args, level, block), moving, rest)

    return _over_blocks(gradient, _problem(moving, rest), level, block_size)


@_blocked_gradient.def_jvp
def _blocked_gradient_jvp(primals, tangents, *, level: Level, block_size: int):
    if any(_moves_data(t_args[0], level) for t_args in tangents):

        def whole(moving, rest):
            return _gradient(lambda args: _whole_mean(args, level), moving, rest)

        return eqx.filter_jvp(whole, primals, tangents)

    def product(block):
        def gradient(moving, rest):
            return _gradient(lambda args: _share(args, level, block), moving, rest)

        return eqx.filter_jvp(gradient, primals, tangents)[1]

    products = _over_blocks(product, _problem(*primals), level, block_size)
    return _blocked_gradient(*primals, level=level, block_size=block_size), products


def _share(args, level: Level, block: tuple[PyTree[Array], Array]) -> Scalar:
    """What a block adds to the mean."""
    problem, x, y, hoisted = args
    samples, weights = block
    if hoisted is None:
        losses = losses_of(problem, level)(x, y, samples, None)
    else:
        losses = hoisted.of_block(tree_arrays((problem, x, y)), samples)
    return _wide_sum(losses, weights)


def _gradient(fn: Callable, moving, rest):
    return jax.grad(lambda moving: fn(eqx.combine(moving, rest)))(moving)


def _problem(moving, rest) -> AbstractFiniteSumProblem:
    return eqx.combine(moving[0], rest[0])


def _parted(args, t_args):
    """The leaves with a tangent, and the others."""

    def part(which):
        return jtu.tree_map(
            lambda t, u: u if which(t) else None, t_args, args, is_leaf=_is_none
        )

    return part(lambda t: t is not None), part(_is_none)


def _is_none(leaf: Any) -> bool:
    return leaf is None


def _moves_data(t_problem, level: Level) -> bool:
    return len(jtu.tree_leaves(data_of(t_problem, level))) > 0


def _block(data: PyTree[Array], start, block_size: int) -> PyTree[Array]:
    """The samples from `start` on."""
    return jtu.tree_map(
        lambda u: jax.lax.dynamic_slice_in_dim(u, start, block_size), data
    )


# What is kept of a block has at most this share of the entries of its data.
_SMALL_SHARE = 16


def _over_blocks(
    fn: Callable, problem: AbstractFiniteSumProblem, level: Level, block_size: int
):
    """The sum of `fn((samples, weights))` over the blocks."""
    data, size = data_of(problem, level), num_samples(problem, level)

    def at(i):
        # The last block begins earlier if it would be short, and what the block before it
        # has read counts nothing.
        start = jnp.minimum(i * block_size, size - block_size)
        samples = _block(data, start, block_size)
        is_new = start + jnp.arange(block_size) >= i * block_size
        return fn((samples, jnp.where(is_new, 1 / size, 0)))

    # Recomputed where it is differentiated once more, so that no block is stored. What is
    # small beside the data is kept: the slopes of a linear model, say, without which each
    # product with the Hessian would be one more pass over the data.
    entries = sum(u.size for u in jtu.tree_leaves(data)) // size
    most = block_size * max(1, entries // _SMALL_SHARE)

    def is_kept(primitive, *args, **params):
        if primitive.multiple_results:
            # A call, whose parts are asked for one by one.
            return False
        output, _ = primitive.abstract_eval(*args, **params)
        return output.size <= most

    at = jax.checkpoint(at, prevent_cse=False, policy=is_kept)  # pyright: ignore

    def step(total, i):
        return jtu.tree_map(lambda u, v: u + v.astype(u.dtype), total, at(i)), None

    struct = jax.eval_shape(at, 0)
    zeros = jtu.tree_map(lambda u: jnp.zeros(u.shape, _wide(u.dtype)), struct)
    num_blocks = -(-size // block_size)
    total, _ = jax.lax.scan(step, zeros, jnp.arange(num_blocks))
    return jtu.tree_map(lambda u, v: u.astype(v.dtype), total, struct)
