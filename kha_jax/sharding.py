"""The one table that maps logical array axes to the mesh, and what follows from it.

Parameters and activations name their axes once, beside their shapes; RULES says which mesh axis
each name uses. The batch is split over `data` and `expert`; parameters and optimiser state are
split over both too (FSDP), those of experts over `data` since `expert` splits them already; heads,
the feed-forward width and the vocabulary are split over `model`.

No other module names a mesh axis: they ask by logical one. The mesh that they ask about is jax's
own, of `jax.set_mesh` or of `on_mesh`, and therefore a part of jit's key: what was traced without
it is traced again within. So are the rules that a layer brings for its own call (`own_rules`). A
mesh need not have all axes: one that it lacks has size 1.
"""

import contextlib
import functools
import math
from typing import Any, Callable, Collection, Iterator, Mapping

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from kha_jax.config import ConfigError, near
from kha_jax.mesh import MESH_AXES

Rules = Mapping[str, str | tuple[str, ...] | None]
RULES: Rules = {
    # activations
    "batch": ("data", "expert"),
    "length": None,
    "loss_length": "model",
    "query_length": "model",
    "features": None,
    # parameters
    "layers": None,
    "embed": ("data", "expert"),
    "expert_embed": "data",
    "head_dim": None,
    "latent": None,
    "groups": None,
    "mixer_in": None,
    "mixer_out": None,
    "experts": "expert",
    "router": None,
    # either
    "vocabulary": "model",
    "heads": "model",
    "kv_heads": "model",
    "feed_forward": "model",
}
# Axes that are kept whole where there are fewer of them than devices: one key head serves the query
# heads of several devices.
SHARED = ("kv_heads",)
# Axes whose parts are gathered where a parameter is used (FSDP).
STORED = ("embed", "expert_embed")
# Entries that stand before those of RULES, as sorted items.
_OWN = jax.make_user_context(default_value=())


def on_mesh(mesh: Mesh | None, function: Callable) -> Callable:
    """The function, to be jitted: wherever it is called from, it is traced where `constrain` and
    its siblings see this mesh; None: no mesh."""
    seen = AbstractMesh((), ()) if mesh is None else mesh.abstract_mesh

    @functools.wraps(function)
    def inside(*arguments, **named):
        with jax.sharding.use_abstract_mesh(seen):
            return function(*arguments, **named)

    return inside


def platform() -> str:
    """Where the computation will run: the platform of the mesh, whose devices may be described and
    not present, or jax's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def checked_rules(rules: Rules) -> Rules:
    """The rules.

    Raises:
        ConfigError: one of them is for a logical axis that no array has.
    """
    for axis in rules:
        if axis not in RULES:
            raise ConfigError(f"rules[{axis!r}]", f"is no logical axis; {near(axis, RULES)}")
    return rules


@contextlib.contextmanager
def own_rules(rules: Rules, fits: Mapping[str, Callable[[int], bool]]) -> Iterator[None]:
    """Within, these rules stand before RULES, on the mesh as it is found here: axes over which a
    `shard_map` around this runs are taken already.

    fits: whether a logical axis can be split over so many devices; by as many of its mesh axes as
    it can, the first ones first.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = [axis for axis in mesh.axis_names if axis not in mesh.manual_axes]
    rules = {**RULES, **rules}
    kept = {axis: tuple(a for a in _several(rules[axis]) if a in free) for axis in rules}
    for axis, fit in fits.items():
        while not fit(math.prod(mesh.shape[a] for a in kept[axis])):
            kept[axis] = kept[axis][:-1]
    with _OWN(tuple(sorted(kept.items()))):
        yield


def in_auto_mode(function: Callable, like: Any) -> Callable:
    """The function of arrays, of which a mesh with explicit axes sees only what goes in and what
    comes out; the function itself on any other mesh.

    like: a tree of arrays placed as what it returns; None is whole on every device. Where no mesh
    is set it is theirs.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        mesh = jax.typeof(jax.tree.leaves(like)[0]).sharding.mesh
    if not mesh.explicit_axes:
        return function

    def placed(array):
        return PartitionSpec() if array is None else jax.typeof(array).sharding.spec

    out = jax.tree.map(placed, like, is_leaf=lambda leaf: leaf is None)
    hidden = jax.sharding.auto_axes(function, axes=mesh.explicit_axes, out_sharding=out)

    def inside(*arguments):
        with jax.sharding.use_abstract_mesh(mesh):
            return hidden(*arguments)

    return inside


def _several(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (part,) if isinstance(part, str) else tuple(part or ())


def _rule(axis: str) -> str | tuple[str, ...] | None:
    return dict(_OWN.value).get(axis, RULES[axis])


def mesh_axes(*axes: str | None, among: Collection[str] = MESH_AXES) -> tuple[str, ...]:
    """The mesh axes that split these logical axes.

    among: those that the mesh has.
    """
    parts = [_several(_rule(axis)) for axis in axes if axis is not None]
    return tuple(a for part in parts for a in part if a in among)


def axis_size_of(sizes: Mapping[str, int], *axes: str | None) -> int:
    """Devices that split these logical axes together, on a mesh of these sizes."""
    return math.prod(sizes[axis] for axis in mesh_axes(*axes, among=sizes))


def axis_size(*axes: str) -> int:
    """Devices of the mesh that split these logical axes together; 1 without a mesh."""
    return axis_size_of(jax.sharding.get_abstract_mesh().shape, *axes)


def _here(*axes: str) -> tuple[str, ...]:
    """The mesh axes that split these logical axes on the mesh of this place."""
    return mesh_axes(*axes, among=jax.sharding.get_abstract_mesh().shape)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation to the mesh by logical axis names; does nothing without a mesh."""
    sizes = jax.sharding.get_abstract_mesh().shape
    if not sizes:
        return x
    kept = _divided(axes, x.shape, sizes)
    return jax.lax.with_sharding_constraint(x, spec(kept, among=sizes))


def _divided(
    axes: tuple[str | None, ...], shape: tuple[int, ...], sizes: Mapping[str, int]
) -> tuple[str | None, ...]:
    """The axes, without those of SHARED that are fewer than their devices."""

    def whole(axis, size):
        return axis in SHARED and size < (n := axis_size_of(sizes, axis)) and n % size == 0

    return tuple(None if whole(axis, size) else axis for axis, size in zip(axes, shape))


def per_device(function: Callable, in_axes: tuple, out_axes: Any) -> Callable:
    """The function on each device's part of its arguments, cut by logical axis names; the function
    itself without a mesh.

    in_axes: one tuple of names for each argument; mesh axes that they do not use are gathered.
    out_axes: the same for the result, whose parts must agree along the mesh axes that it does not
    use. Inside, devices meet through `gather`, `sum_over` and `scatter_sum`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = set(mesh.axis_names) - set(mesh.manual_axes)  # of a shard_map around this
    if math.prod(mesh.shape[axis] for axis in free) == 1:
        return function

    def is_axes(axes):
        return isinstance(axes, tuple) and all(a is None or isinstance(a, str) for a in axes)

    here = functools.partial(spec, among=mesh.shape)
    in_specs, out_specs = jax.tree.map(here, (in_axes, out_axes), is_leaf=is_axes)
    specs = {"in_specs": in_specs, "out_specs": out_specs}
    return jax.shard_map(function, **specs, axis_names=free, check_vma=False)


def gather(x: jax.Array, axis: str) -> jax.Array:
    """Within `per_device`: the parts of x on all devices that split a logical axis, one after
    another along the first dimension."""
    return jax.lax.all_gather(x, _here(axis), tiled=True) if axis_size(axis) > 1 else x


def sum_over(tree: Any, *axes: str) -> Any:
    """Within `per_device`: sums over all devices that split these logical axes."""
    return jax.lax.psum(tree, _here(*axes)) if axis_size(*axes) > 1 else tree


def scatter_sum(x: jax.Array, axis: str) -> jax.Array:
    """Within `per_device`: of the sum over all devices that split a logical axis, this device's
    part along the first dimension; the transpose of `gather`."""
    return jax.lax.psum_scatter(x, _here(axis), tiled=True) if axis_size(axis) > 1 else x


def index_along(axis: str) -> jax.Array | int:
    """Within `per_device`: which part of a logical axis this device holds, from 0."""
    return jax.lax.axis_index(_here(axis)) if axis_size(axis) > 1 else 0


def spec(
    axes: tuple[str | None, ...], where: str = "array", among: Collection[str] = MESH_AXES
) -> PartitionSpec:
    """Mesh axes of an array with these logical axes.

    among: those that the mesh has.

    Raises:
        ValueError: for an unknown name, or when one mesh axis would be used twice.
    """
    parts, used = [], {}
    for axis in axes:
        if axis is not None and axis not in RULES:
            raise ValueError(
                f"{where}: logical axis {axis!r} has no rule; known are {', '.join(RULES)}"
            )
        split = mesh_axes(axis, among=among)
        for mesh_axis in split:
            if mesh_axis in used:
                raise ValueError(
                    f"{where}: {axis!r} and {used[mesh_axis]!r} both map to mesh axis {mesh_axis!r}"
                )
            used[mesh_axis] = axis
        parts.append(split[0] if len(split) == 1 else split or None)
    return PartitionSpec(*parts)


def tree_shardings(boxed: Any, mesh: Mesh) -> Any:
    """NamedShardings for a tree of arrays or shapes boxed with their logical axes; unboxed leaves
    are replicated.

    Raises:
        ConfigError: names the array and the dimension that its mesh axes do not divide.
    """

    def one(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not isinstance(leaf, nn.LogicallyPartitioned):
            return NamedSharding(mesh, PartitionSpec())
        axes = _divided(leaf.names, leaf.value.shape, mesh.shape)
        for size, axis in zip(leaf.value.shape, axes):
            if size % axis_size_of(mesh.shape, axis):
                raise ConfigError(
                    "",
                    f"{name}: dimension {axis!r} of {size} does not divide into "
                    f"{axis_size_of(mesh.shape, axis)} (mesh axis {RULES[axis]})",
                )
        return NamedSharding(mesh, spec(axes, name, mesh.shape))

    return jax.tree_util.tree_map_with_path(
        one, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
    )


def gathered_axis_size(sharding: NamedSharding) -> int:
    """Devices over which FSDP gathers a parameter when it is used."""
    stored = [RULES[axis] for axis in STORED]
    axes = [axis for axis in sharding.spec if axis in stored]
    return math.prod(sharding.mesh.shape[a] for axis in axes for a in _several(axis))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Placement of a [batch, length] array."""
    return NamedSharding(mesh, spec(("batch", "length"), among=mesh.shape))


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Row numbers of the global batch that this process's devices hold, in order."""
    index_map = batch_sharding(mesh).addressable_devices_indices_map((batch_size, 1))
    rows = {tuple(range(*index[0].indices(batch_size))) for index in index_map.values()}
    return np.array(sorted(row for part in rows for row in part))
