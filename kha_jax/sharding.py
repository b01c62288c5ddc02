"""The mesh, and the one table that maps logical array axes to it.

Parameters and activations name their axes once, beside their shapes; RULES says which mesh axis
each name uses. The batch is split over `data` and `expert`; parameters and optimiser state are
split over both too (FSDP), those of experts over `data` since `expert` splits them already; heads,
the feed-forward width and the vocabulary are split over `model`.
"""

import contextlib
import contextvars
import math
from typing import Any, Callable, Iterator

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kha_jax.config import Config, ConfigError, near

RULES: dict[str, str | tuple[str, ...] | None] = {
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
    "expert": "expert",
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
MESH_AXES = ("data", "expert", "model")
# Devices of the places that a run can be meant for; slices have their vendor's names, where a v5p
# chip counts twice.
PRESETS: dict[str, int | None] = {
    "1-device": 1,
    "1-host": None,
    "v5e-64": 64,
    "v5e-256": 256,
    "v5p-64": 32,
    "v5p-128": 64,
    "v6e-64": 64,
    "v6e-256": 256,
}


class MeshConfig(Config):
    """Devices along each mesh axis. Their product must be the number of devices; one axis may be -1
    to take the rest.

    preset: where the run belongs, so that it does not start elsewhere: `1-device` takes one of
    those that there are, `1-host` all of a single process, the others need as many devices as
    PRESETS says. None: wherever it is started.
    """

    preset: str | None = None
    data: int = -1
    expert: int = 1
    model: int = 1

    def validate(self):
        sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
        for axis, size in sizes.items():
            self.require(
                size >= 1 or size == -1,
                axis,
                f"must be positive, or -1 to take the rest, found {size}",
            )
        fill = [axis for axis, size in sizes.items() if size == -1]
        self.require(
            self.preset in (None, *PRESETS),
            "preset",
            f"{self.preset!r} is not known; {near(str(self.preset), PRESETS)}",
        )
        self.require(
            len(fill) <= 1, (fill + [""])[0], f"only one axis may be -1, found {' and '.join(fill)}"
        )

    def shape(self, devices: int) -> tuple[int, int, int]:
        """Sizes of the axes on this many devices.

        Raises:
            ConfigError: when the sizes do not multiply to the number of devices, or the preset has
                another number.
        """
        meant = PRESETS.get(self.preset) or devices
        self.require(
            meant == devices,
            "config.mesh.preset",
            f"{self.preset!r} has {meant} devices, found {devices}",
        )
        sizes = [getattr(self, axis) for axis in MESH_AXES]
        known = math.prod(size for size in sizes if size != -1)
        listed = " x ".join(f"{axis}={getattr(self, axis)}" for axis in MESH_AXES)
        remedy = "use data=-1 to fill"
        if -1 in sizes:
            sizes[sizes.index(-1)] = devices // known
            remedy = f"use sizes that divide {devices}"
        self.require(
            math.prod(sizes) == devices,
            "config.mesh",
            f"{listed} does not make {devices} devices; {remedy}",
        )
        return tuple(sizes)


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of the given devices (all by default) with the axes data, expert and model; of several
    slices `data` spans them.

    Raises:
        ConfigError: when the sizes do not multiply to the number of devices, these are not the
            preset's, or `data` does not divide over the slices.
    """
    devices = jax.devices() if devices is None else devices
    processes = len({device.process_index for device in devices})
    problem = f"{config.preset!r} is one process, found {processes}"
    config.require(
        processes == 1 or config.preset not in ("1-device", "1-host"), "config.mesh.preset", problem
    )
    if config.preset == "1-device":
        devices = devices[:1]
    shape, types = config.shape(len(devices)), (AxisType.Auto,) * 3
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    # heads of one layer may lie across a physical axis: without splitting, few shapes fit a torus
    # of 4 x 4 x 4
    if slices == 1:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(grid, MESH_AXES, axis_types=types)
    problem = f"must divide by the {slices} slices, which only data spans, found {shape[0]}"
    config.require(shape[0] % slices == 0, "config.mesh.data", problem)
    return Mesh(hybrid_devices(shape, slices, devices), MESH_AXES, axis_types=types)


def hybrid_devices(shape: tuple[int, int, int], slices: int, devices: list[Any]) -> np.ndarray:
    """Devices in the mesh's shape, the slow network between slices on the outer part of `data`
    alone."""
    within = (shape[0] // slices, *shape[1:])
    return mesh_utils.create_hybrid_device_mesh(
        within, (slices, 1, 1), devices, allow_split_physical_axes=True
    )


_mesh: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("mesh", default=None)


@contextlib.contextmanager
def using(mesh: Mesh) -> Iterator[None]:
    """Within this, `constrain` pins activations to the mesh."""
    token = _mesh.set(mesh)
    try:
        yield
    finally:
        _mesh.reset(token)


def current_mesh() -> Mesh | None:
    """The mesh of the enclosing `using`, or None outside of one."""
    return _mesh.get()


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation to the mesh by logical axis names; does nothing outside `using`."""
    mesh = _mesh.get()
    return (
        x
        if mesh is None
        else jax.lax.with_sharding_constraint(
            x, NamedSharding(mesh, spec(_divided(axes, x.shape, mesh)))
        )
    )


def _divided(
    axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh
) -> tuple[str | None, ...]:
    """The axes, without those of SHARED that are fewer than their devices."""

    def whole(axis, size):
        return (
            axis in SHARED
            and size < mesh.shape[RULES[axis]]
            and mesh.shape[RULES[axis]] % size == 0
        )

    return tuple(None if whole(axis, size) else axis for axis, size in zip(axes, shape))


def platform() -> str:
    """Where the computation will run: the platform of the enclosing mesh, which may be described
    and not present, or jax's default."""
    mesh = current_mesh()
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def per_device(function: Callable, in_axes: tuple, out_axes: Any) -> Callable:
    """The function on each device's part of its arguments, cut by logical axis names; the function
    itself outside of a mesh.

    in_axes: one tuple of names for each argument; mesh axes that they do not use are gathered.
    out_axes: the same for the result, whose parts must agree along the mesh axes that it does not
    use.
    """
    mesh = current_mesh()
    if mesh is None or mesh.size == 1:
        return function

    def is_axes(axes):
        return isinstance(axes, tuple) and all(a is None or isinstance(a, str) for a in axes)

    in_specs, out_specs = jax.tree.map(spec, (in_axes, out_axes), is_leaf=is_axes)
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def ways(axis: str) -> int:
    """Devices that a logical axis is split over on the enclosing mesh."""
    mesh, part = current_mesh(), RULES[axis]
    if mesh is None or part is None:
        return 1
    return math.prod(mesh.shape[name] for name in ((part,) if isinstance(part, str) else part))


def place(axis: str) -> int | jax.Array:
    """Within `per_device`, which of the `ways` of a logical axis this device holds."""
    return jax.lax.axis_index(RULES[axis]) if ways(axis) > 1 else 0


def axis_size(name: str) -> int:
    """Devices along an axis of the enclosing mesh."""
    mesh = current_mesh()
    return 1 if mesh is None else mesh.shape[name]


def spec(axes: tuple[str | None, ...], where: str = "array") -> PartitionSpec:
    """Mesh axes of an array with these logical axes.

    Raises:
        ValueError: for an unknown name, or when one mesh axis would be used twice.
    """
    parts, used = [], {}
    for axis in axes:
        if axis is not None and axis not in RULES:
            raise ValueError(
                f"{where}: logical axis {axis!r} has no rule; known are {', '.join(RULES)}"
            )
        part = None if axis is None else RULES[axis]
        for mesh_axis in (part,) if isinstance(part, str) else part or ():
            if mesh_axis in used:
                raise ValueError(
                    f"{where}: {axis!r} and {used[mesh_axis]!r} both map to mesh axis {mesh_axis!r}"
                )
            used[mesh_axis] = axis
        parts.append(part)
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
        partition = spec(_divided(leaf.names, leaf.value.shape, mesh), name)
        for size, axis, part in zip(leaf.value.shape, leaf.names, partition):
            ways = math.prod(
                mesh.shape[a] for a in ((part,) if isinstance(part, str) else part or ())
            )
            if size % ways:
                raise ConfigError(
                    "config.mesh",
                    f"{name}: dimension {axis!r} of {size} does not divide into {ways} (mesh "
                    f"axis {part})",
                )
        return NamedSharding(mesh, partition)

    return jax.tree_util.tree_map_with_path(
        one, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Placement of a [batch, length] array."""
    return NamedSharding(mesh, spec(("batch", "length")))


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Row numbers of the global batch that this process's devices hold, in order."""
    index_map = batch_sharding(mesh).addressable_devices_indices_map((batch_size, 1))
    rows = {tuple(range(*index[0].indices(batch_size))) for index in index_map.values()}
    return np.array(sorted(row for part in rows for row in part))
