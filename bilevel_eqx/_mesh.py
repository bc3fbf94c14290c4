"""Arrays on several devices: meshes with Explicit axes, and where a state lies."""

import contextlib
import functools as ft
import inspect
from collections.abc import Callable, Iterator
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, PyTree

from ._compat import as_function, closure_to_pytree, Fn, is_traced, manual_axes


def on_auto_axes(fn: Fn) -> Fn:
    """`fn`, with all arrays on meshes of Explicit axes moved to the same meshes with Auto
    axes, and its results moved back.

    With Explicit axes, which are JAX's default, the sharding of an array is part of its
    type. lineax then takes two arrays for different structures if they only lie
    differently (https://github.com/patrick-kidger/lineax/issues/185). The change of the
    axes copies no data.

    Within a transformation `fn` is called as it is. What does not work on Explicit axes
    calls `check_mesh`. Within a `jax.shard_map` it is traced as on a single device.
    """

    @ft.wraps(fn)
    def wrapped(*args, **kwargs):
        if _is_mapped():
            return _as_on_one_device(fn, args, kwargs)
        leaves = jtu.tree_leaves((args, kwargs), is_leaf=_is_iterator)
        if any(map(is_traced, leaves)):
            return fn(*args, **kwargs)
        try:
            around = jax.sharding.get_mesh()
        except ValueError:
            # So JAX says that this is within a transformation.
            return fn(*args, **kwargs)
        meshes = {u.sharding.mesh for u in leaves if _is_on_mesh(u)} | {around}
        auto = {
            m: _with_auto_axes(m) for m in meshes if AxisType.Explicit in m.axis_types
        }
        if len(auto) == 0:
            return fn(*args, **kwargs)
        context = contextlib.nullcontext()
        if around in auto:
            context = jax.set_mesh(auto[around])
        with context:
            args, kwargs = _on(auto, (args, kwargs))
            out = fn(*args, **kwargs)
        return _on({a: explicit for explicit, a in auto.items()}, out)

    return cast(Fn, wrapped)


def _is_mapped() -> bool:
    """Whether this is within a `jax.shard_map`."""
    return AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types


def _as_on_one_device(fn: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Calls `fn` within a `jax.shard_map`, as a program that knows nothing of the mesh.

    There the mesh is a part of the type of each array, and lineax takes arrays that come
    from outside for others than those that it makes. It looks at them while it is traced,
    and not at what comes of it.
    """
    opened = jtu.tree_map(
        lambda u: closure_to_pytree(u) if inspect.isfunction(u) else u,
        (args, kwargs),
        is_leaf=_is_iterator,
    )
    arrays = [u for u in jtu.tree_leaves(opened) if eqx.is_array(u)]
    check_mesh(arrays)
    args, kwargs = jtu.tree_map(
        lambda u: jax.ShapeDtypeStruct(u.shape, u.dtype) if eqx.is_array(u) else u, opened
    )
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        program, structure, others = eqx.filter_make_jaxpr(fn)(*args, **kwargs)
    found = as_function(program.jaxpr, program.consts)(*arrays)
    return eqx.combine(jtu.tree_unflatten(jtu.tree_structure(structure), found), others)


def _is_iterator(node: Any) -> bool:
    # JAX warns of those that it meets in a pytree.
    return isinstance(node, Iterator)


def _is_on_mesh(leaf: Any) -> bool:
    return (
        isinstance(leaf, jax.Array)
        and not is_traced(leaf)
        and isinstance(leaf.sharding, NamedSharding)
    )


def spans_processes(tree: PyTree) -> bool:
    """Whether some array lies on devices of several processes."""
    return any(
        isinstance(leaf, jax.Array)
        and not is_traced(leaf)
        and not leaf.is_fully_addressable
        for leaf in jtu.tree_leaves(tree, is_leaf=_is_iterator)
    )


def _is_explicit(mesh: Any) -> bool:
    return AxisType.Explicit in mesh.axis_types


def _with_auto_axes(mesh: Mesh) -> Mesh:
    kinds = (AxisType.Auto,) * len(mesh.axis_names)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)


def _on(others: dict[Mesh, Mesh], tree: PyTree) -> PyTree:
    """`tree`, with its arrays on another mesh of the same devices, if there is one."""

    def move(leaf):
        if not _is_on_mesh(leaf) or leaf.sharding.mesh not in others:
            return leaf
        was = leaf.sharding
        mesh = others[was.mesh]
        new = NamedSharding(mesh, was.spec, memory_kind=was.memory_kind)
        if leaf.is_fully_addressable:
            return jax.device_put(leaf, new)
        # `jax.device_put` refuses this for some arrays of several processes.
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            numbers = move(jr.key_data(leaf))
            return jr.wrap_key_data(numbers, impl=jr.key_impl(leaf))
        parts = [shard.data for shard in leaf.addressable_shards]
        return jax.make_array_from_single_device_arrays(leaf.shape, new, parts)

    return jtu.tree_map(move, tree, is_leaf=_is_iterator)


_AUTO_MESH = (
    "`jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(names))`"
)


def check_mesh(tree: PyTree) -> None:
    """Refuses, within a transformation, what no loop of ours works with: arrays on a mesh
    with Explicit axes, and those of a `shard_map` that checks how they vary."""
    leaves = [u for u in jtu.tree_leaves(tree) if eqx.is_array(u)]
    meshes = [jax.typeof(u).sharding.mesh for u in leaves]
    meshes.append(jax.sharding.get_abstract_mesh())
    if any(map(_is_explicit, meshes)):
        raise ValueError(
            "An array is on a mesh with Explicit axes, which are JAX's default, within "
            "`jax.jit`, `jax.vmap` or another transformation. Linear solves and draws of "
            "batches do not work there yet. Transform "
            "`jax.sharding.auto_axes(fn, out_sharding=...)` instead of `fn`, and pass it "
            f"all such arrays; or make the mesh with Auto axes: {_AUTO_MESH}. Outside of "
            "transformations both kinds work."
        )
    if any(len(manual_axes(u)) > 0 for u in leaves):
        raise ValueError(
            "Within `jax.shard_map` the loops of a solver begin with constants, which "
            "are the same on all devices, and JAX refuses that they become different. "
            "Turn that check off: `jax.shard_map(..., check_vma=False)`."
        )


def check_mesh_of_solve(tree: PyTree) -> None:
    """`check_mesh`, for linear solves. In a `shard_map` they work within a program that
    does not know of it: see `on_auto_axes`."""
    check_mesh(tree)
    if _is_mapped():
        raise ValueError(
            "Within `jax.shard_map` linear solves work if they are called by `solve`, "
            "`certify`, `hypergradient`, `best_response` or another function of this "
            "package, but not in a response or a step of a pipeline that is called "
            "directly: lineax takes arrays of a mesh for others than those of none. Call "
            "one of these functions. Or trace your own function before, by "
            "`jax.make_jaxpr`, and map the function of its program."
        )


def check_mesh_of_operator(tree: PyTree, name: str) -> None:
    """Refuses arrays on a mesh with Explicit axes for an operator that the user gets. Its
    products are taken later, when no function of ours can move them."""
    leaves = [u for u in jtu.tree_leaves(tree) if eqx.is_array(u)]
    if any(_is_explicit(jax.typeof(u).sharding.mesh) for u in leaves):
        raise ValueError(
            f"`{name}` returns an operator of lineax, and lineax does not work with "
            "arrays on a mesh with Explicit axes, which are JAX's default: such an array "
            f"is in the problem, x or y. Make the mesh with Auto axes: {_AUTO_MESH}. Or "
            "use `hypergradient` or `best_response`, and differentiate it: they take "
            "both kinds."
        )


def placement(tree: PyTree[Array]) -> PyTree[jax.ShapeDtypeStruct] | None:
    """How the arrays of `tree` lie on their mesh, as shapes with shardings, which are a
    part of a program; `None` if none of them is on a mesh."""
    if not any(map(_is_on_mesh, jtu.tree_leaves(tree))):
        return None

    def struct(leaf):
        sharding = leaf.sharding if _is_on_mesh(leaf) else None
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jtu.tree_map(lambda u: struct(u) if eqx.is_array(u) else None, tree)


def on_devices_of(
    batches: PyTree[np.ndarray], data: PyTree[Array], level: str
) -> PyTree[Array]:
    """Batches of the host, with an axis of steps before that of samples, on the devices:
    each sample of a batch as those of `data` lie. All processes must give the same."""

    def put(batch, leaf):
        if not _is_on_mesh(leaf):
            return jax.device_put(batch)
        mesh, spec = leaf.sharding.mesh, PartitionSpec(None, *leaf.sharding.spec)
        sharding = NamedSharding(mesh, spec)
        try:
            sharding.shard_shape(batch.shape)
        except ValueError as error:
            raise ValueError(
                f"`solve(batches=...)`: the {level} data lie on {mesh.size} devices as "
                f"{leaf.sharding.spec} says, and so each {level} batch must. But its "
                f"{batch.shape[1]} samples, of shape {batch.shape[2:]}, cannot be "
                f"divided among {mesh.size} devices. Let their number be a multiple."
            ) from error
        return jax.make_array_from_callback(batch.shape, sharding, lambda i: batch[i])

    return jtu.tree_map(put, batches, data)


def laid_as(array: Array, like: Array, never: Bool[Array, ""]) -> Array:
    """`array`, of which the compiler puts on each device the part that it has there of
    `like`, an array of the same shape. `never` is false, which only shows at runtime.

    With Auto axes no program knows how its arguments lie, and so it cannot say
    `jax.lax.with_sharding_constraint`. But what an elementwise operation takes lies as
    what it returns.
    """
    if jax.device_count() == 1:
        return array
    return jnp.where(never, jax.lax.stop_gradient(like), array)


def on_mesh_of(like: PyTree[Array], tree: PyTree[Array]) -> PyTree[Array]:
    """`tree`, with each array that is on no mesh copied to all devices of the mesh of
    `like`, if there is one. What a program with that mesh returns lies so, and its next
    call would be another program."""
    meshes = [leaf.sharding.mesh for leaf in jtu.tree_leaves(like) if _is_on_mesh(leaf)]
    if len(meshes) == 0:
        return tree
    elsewhere, rest = eqx.partition(
        tree, lambda leaf: eqx.is_array(leaf) and not _is_on_mesh(leaf)
    )
    # Not `jax.device_put`, which does not know the devices of other processes.
    everywhere = NamedSharding(meshes[0], PartitionSpec())
    elsewhere = jax.jit(_identity, out_shardings=everywhere)(elsewhere)
    return eqx.combine(elsewhere, rest)


def _identity(tree):
    return tree


def tree_placed(tree: PyTree[Array], like: PyTree | None) -> PyTree[Array]:
    """`tree` within a program, whose arrays lie as those of `like`, its placement, do."""
    if like is None:
        return tree
    likes = jtu.tree_leaves(like, is_leaf=lambda u: u is None)
    leaves, treedef = jtu.tree_flatten(tree)
    return jtu.tree_unflatten(treedef, map(_placed, leaves, likes))


def state_placed(state: PyTree[Array], variables: dict[str, PyTree] | None) -> PyTree:
    """The state of a run within a program, whose variables lie as those of the same name
    in `variables`, which are placements. Left alone, the compiler may put a copy of an
    array on each device.

    Another array of the state lies as that variable which has its shape and type and the
    longest path that is the end of its own, if there is only one. So the moments of an
    optimiser lie as what it moves, and the rows of a table as what they are rows of.
    """
    if variables is None:
        return state
    known = jtu.tree_leaves_with_path(variables)

    def place(path, leaf):
        if not eqx.is_array(leaf) or leaf.ndim == 0:
            return leaf
        for (key, *end), like in known:
            if path == (jtu.GetAttrKey(key.key), *end):
                return _placed(leaf, like)
        found = [
            (end, like)
            for (_, *end), like in known
            if list(path[len(path) - len(end) :]) == end
            and leaf.dtype == like.dtype
            and like.shape in (leaf.shape, leaf.shape[1:])
        ]
        longest = max((len(end) for end, _ in found), default=0)
        found = [like for end, like in found if len(end) == longest]
        return _placed(leaf, found[0]) if len(found) == 1 else leaf

    return jtu.tree_map_with_path(place, state)


def _placed(leaf: Any, like: jax.ShapeDtypeStruct | None) -> Any:
    """`leaf` as `like` lies, or each of its rows, if it has one more axis."""
    if like is None or like.sharding is None:
        return leaf
    sharding = like.sharding
    if leaf.ndim > len(like.shape):
        spec = PartitionSpec(None, *sharding.spec)
        sharding = NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)
    return jax.lax.with_sharding_constraint(leaf, sharding)
