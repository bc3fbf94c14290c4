"""Mini-batches without replacement, drawn without a state."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray


def shuffled(
    key: PRNGKeyArray,
    positions: Int[Array, " batch"],
    size: int,
    count: Int[Array, ""] | None = None,
) -> Int[Array, " batch"]:
    """Where a random permutation of `size` numbers takes some of them. With a `count` it
    is number `count` of the permutations of the key.

    `jax.random.permutation` sorts all of them. This needs only those that are asked for:
    it is a Feistel network, a bijection of the pairs (left, right) for any round
    function. A result out of the range is encrypted again until it is in the range, which
    makes this a bijection of the range (Black and Rogaway, *Ciphers with arbitrary finite
    domains*, 2002).
    """
    num_left = math.isqrt(size - 1) + 1
    num_right = -(-size // num_left)
    # So many that all orders of five numbers are as likely, as far as 120,000 draws show.
    # In a large range fewer hide the pairs of positions as well.
    num_rounds = 6 if size < 256 else 3
    keys = jr.bits(key, (num_rounds, 2), jnp.uint32)
    if count is not None:
        # The bits do not change in a loop over counts, and XLA draws them before it. To
        # draw others for each count would take longer than a step of a single loop.
        keys = _hash(keys, count.astype(jnp.uint32))

    def encrypt(position):
        left, right = position // num_right, position % num_right
        for left_key, right_key in keys:
            left = (left + _hash(right, left_key) % num_left) % num_left
            right = (right + _hash(left, right_key) % num_right) % num_right
        return left * num_right + right

    positions = positions.astype(jnp.uint32)
    if num_left * num_right == size:
        return encrypt(positions).astype(jnp.int32)

    # All of it is in the loop, where it is compiled once.
    def body(carry):
        position, done = carry
        position = jnp.where(done, position, encrypt(position))
        return position, position < size

    start = positions, jnp.zeros(positions.shape, bool)
    positions, _ = jax.lax.while_loop(lambda carry: ~jnp.all(carry[1]), body, start)
    return positions.astype(jnp.int32)


def _hash(number: Array, key: Array) -> Array:
    """A mixing of 32 bits (the finaliser of MurmurHash3)."""
    number = (number + key) * jnp.uint32(0x9E3779B1)
    number = (number ^ (number >> 16)) * jnp.uint32(0x85EBCA6B)
    number = (number ^ (number >> 13)) * jnp.uint32(0xC2B2AE35)
    return number ^ (number >> 16)


def subset(key: PRNGKeyArray, size: int, count: int, name: str) -> Int[Array, " count"]:
    """`count` of `size` numbers, without replacement."""
    check_batch_size(count, size, name)
    return shuffled(key, jnp.arange(count), size)


def check_batch_size(count: int, size: int, name: str) -> None:
    """Refuses a batch without samples, and one with more than there are."""
    if not 1 <= count <= size:
        raise ValueError(
            f"A batch of {count} samples was asked for, but {name} has {size}. Draw at "
            f"least one and at most {size} of them; `None` takes all of them."
        )


class Epochs(eqx.Module):
    """Batches of `batch_size` of `size` samples. In an epoch each sample is drawn once.

    Batch number t is a function of the key and of t: so a run that is resumed, vmapped or
    cut into segments draws the same ones. If `batch_size` does not divide `size`, the
    last batch of an epoch is filled up by repeating a sample, with a weight of zero.

    If `fixed`, the batches of each epoch are the same, in another order. Tables with an
    entry for each batch need that. If `neighbours`, they are the same, and each is of
    samples that lie one after another.
    """

    size: int = eqx.field(static=True)
    batch_size: int = eqx.field(static=True)
    fixed: bool = eqx.field(static=True, default=False)
    neighbours: bool = eqx.field(static=True, default=False)

    @property
    def num_batches(self) -> int:
        """The number of batches in an epoch."""
        return -(-self.size // self.batch_size)

    def place(self, key: PRNGKeyArray, count: Int[Array, ""]) -> Int[Array, ""]:
        """Which of the batches of an epoch batch number `count` is."""
        epoch, place = count // self.num_batches, count % self.num_batches
        if self.fixed or self.neighbours:
            order = jr.fold_in(key, 1)
            (place,) = shuffled(order, place[None], self.num_batches, epoch)
        return place.astype(jnp.int32)

    def __call__(
        self, key: PRNGKeyArray, count: Int[Array, ""]
    ) -> tuple[Int[Array, " batch"], Float[Array, " batch"]]:
        """The indices in batch number `count`, and what each counts in the mean over all
        samples: the mean of the estimates in an epoch is exact."""
        return self.at(key, count, self.place(key, count))

    def at(
        self, key: PRNGKeyArray, count: Int[Array, ""], place: Int[Array, ""]
    ) -> tuple[Int[Array, " batch"], Float[Array, " batch"]]:
        """The same, where its place is known."""
        if self.neighbours:
            start, weights = self.slice(place)
            return start + jnp.arange(self.batch_size, dtype=jnp.int32), weights
        epoch = jnp.zeros_like(count) if self.fixed else count // self.num_batches
        positions = place * self.batch_size + jnp.arange(self.batch_size, dtype=jnp.int32)
        weights = self._weights(positions < self.size)
        positions = jnp.minimum(positions, self.size - 1)
        order = jr.fold_in(key, 0)
        return shuffled(order, positions, self.size, epoch), weights

    def slice(
        self, place: Int[Array, ""]
    ) -> tuple[Int[Array, ""], Float[Array, " batch"]]:
        """Where a batch of neighbours starts, and the weights of its samples. A short
        last batch starts earlier, and what the batch before it has too counts nothing."""
        first = place * self.batch_size
        start = jnp.minimum(first, self.size - self.batch_size)
        positions = start + jnp.arange(self.batch_size, dtype=jnp.int32)
        return start, self._weights(positions >= first)

    def _weights(self, counts: Bool[Array, " batch"]) -> Float[Array, " batch"]:
        return jnp.where(counts, self.num_batches / self.size, 0)
