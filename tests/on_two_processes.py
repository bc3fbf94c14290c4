"""A run of two processes with two devices each. `test_devices.py` starts them.

By hand, once with each rank, with `XLA_FLAGS=--xla_force_host_platform_device_count=2`:
`python tests/on_two_processes.py RANK PORT FOLDER`.
"""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from on_four_devices import _loop, _make, _mesh, COPIED, SPLIT

import bilevel_eqx as blx


rank, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_enable_x64", True)
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank)
assert jax.device_count() == 4

mesh = _mesh(AxisType.Explicit)
problem, x, y = _make()


def put(tree, spec):
    """Each process has all of it, and gives its devices their parts."""
    sharding = NamedSharding(mesh, spec)

    def of_all(u):
        return jax.make_array_from_callback(u.shape, sharding, lambda i: np.asarray(u)[i])

    return jtu.tree_map(of_all, tree)


def run(problem, x, y, num_steps, checkpoint=None):
    return blx.solve(
        problem,
        blx.WarmStart(),
        x,
        y,
        pipeline=_loop,
        num_steps=num_steps,
        checkpoint=checkpoint,
        checkpoint_every=None if checkpoint is None else 2,
        certify=False,
    )


def parts(tree):
    """What this process has of the arrays."""
    for leaf in jtu.tree_leaves(tree):
        if eqx.is_array(leaf):
            is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            leaf = jr.key_data(leaf) if is_key else leaf
            yield from (np.asarray(shard.data) for shard in leaf.addressable_shards)


def same(one, other):
    pairs = zip(parts(one), parts(other), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


split, x_all, y_all = put(problem, SPLIT), put(x, COPIED), put(y, SPLIT)
whole = run(split, x_all, y_all, 9)
# Two of the four entries of y are here.
mine = np.concatenate(list(parts(whole.y)))
(all_of_y,) = jtu.tree_leaves(multihost_utils.process_allgather(whole.y, tiled=True))
assert np.array_equal(all_of_y[2 * rank : 2 * rank + 2], mine)
alike = True
if rank == 0:
    # What one device of one process finds.
    alone = run(problem, x, y, 9)
    alike = np.allclose(np.asarray(whole.x), np.asarray(alone.x), rtol=1e-9, atol=0)
    alike = alike and np.allclose(all_of_y, np.asarray(alone.y["weights"]))
# Both of them fail, since one would wait for the other for minutes.
assert np.all(multihost_utils.process_allgather(np.array(alike)))

# A run in three parts is the whole run, to the last bit, and lies as it does.
for num_steps in (3, 5, 9):
    last = run(split, x_all, y_all, num_steps, f"{folder}/run")
assert same((last.state, last.value), (whole.state, whole.value))
assert last.y["weights"].sharding == whole.y["weights"].sharding
other = eqx.tree_at(lambda p: p.inner_data[1], problem, problem.inner_data[1] + 1)
try:
    run(put(other, SPLIT), x_all, y_all, 11, f"{folder}/run")
except ValueError as error:
    assert "the values of `problem.inner_data` changed" in str(error), error
else:
    raise AssertionError("A checkpoint of other data was taken.")

# A state, lying in another way.
blx.save(f"{folder}/state", whole.state)
loaded = blx.load(f"{folder}/state", whole.state)
assert same(loaded, whole.state)
like = eqx.tree_at(lambda s: s.y, whole.state, put(y, COPIED))
loaded = blx.load(f"{folder}/state", like)
assert loaded.y["weights"].is_fully_replicated
found = np.asarray(loaded.y["weights"])
assert np.array_equal(found[2 * rank : 2 * rank + 2], mine)

print("both are well")
