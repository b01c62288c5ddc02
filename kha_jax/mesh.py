"""The mesh of a run: how many devices along each axis, and which stand where."""

import math
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from kha_jax.config import Config, near
from kha_jax.hardware.chips import SLICES, chips

MESH_AXES = ("data", "expert", "model")
# Devices of the places that a run can be meant for; None: any number.
PRESETS: dict[str, int | None] = {
    "1-device": 1,
    "1-host": None,
    **{name: chips(topology) for name, topology in SLICES.items()},
}


class MeshConfig(Config):
    """Devices along each mesh axis. Their product must be the number of devices; one axis may be -1
    to take the rest.

    Of the presets, `1-device` takes one of the devices that there are, `1-host` all of a single
    process, and a slice, as `v5p-64`, needs as many as it has.
    """

    preset: str | None = None
    """Where the run belongs, so that it does not start elsewhere; None: anywhere."""
    data: int = -1
    """Devices that split the batch, the parameters and the optimiser state (FSDP)."""
    expert: int = 1
    """Devices that split the experts; batch and other parameters are split over these too."""
    model: int = 1
    """Devices that split the heads, the feed-forward width and the vocabulary."""
    tuning: Literal["chip", "none"] = "chip"
    """What a TPU step is compiled with: its chip's settings, or the compiler's own defaults."""

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

    def sizes(self, devices: int) -> dict[str, int]:
        """Sizes of the mesh axes, in their order, on this many devices.

        Raises:
            ConfigError: when the sizes do not multiply to the number of devices, or the preset has
                another number.
        """
        meant = PRESETS.get(self.preset) or devices
        self.require(
            meant == devices, "preset", f"{self.preset!r} has {meant} devices, found {devices}"
        )
        sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
        known = math.prod(size for size in sizes.values() if size != -1)
        listed = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
        fills = [axis for axis, size in sizes.items() if size == -1]
        remedy = f"use sizes that divide {devices}" if fills else "use data=-1 to fill"
        sizes.update({axis: devices // known for axis in fills})
        self.require(
            math.prod(sizes.values()) == devices,
            "",
            f"{listed} does not make {devices} devices; {remedy}",
        )
        return sizes

    def moved(self, name: str) -> "MeshConfig":
        """The same on the slice `name`: its preset where there was one, filled where nothing did
        fill."""
        fills = -1 in (getattr(self, axis) for axis in MESH_AXES)
        return self.replace(preset=name if self.preset else None, data=self.data if fills else -1)


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
    config.require(processes == 1 or config.preset not in ("1-device", "1-host"), "preset", problem)
    if config.preset == "1-device":
        devices = devices[:1]
    shape = tuple(config.sizes(len(devices)).values())
    types = (AxisType.Auto,) * len(shape)  # linen's constraints fail under Explicit
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    # heads of one layer may lie across a physical axis: without splitting, few shapes fit a torus
    # of 4 x 4 x 4
    if slices == 1:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(grid, MESH_AXES, axis_types=types)
    problem = f"must divide by the {slices} slices, which only data spans, found {shape[0]}"
    config.require(shape[0] % slices == 0, "data", problem)
    return Mesh(hybrid_devices(shape, slices, devices), MESH_AXES, axis_types=types)


def hybrid_devices(shape: tuple[int, int, int], slices: int, devices: list[Any]) -> np.ndarray:
    """Devices in the mesh's shape, the slow network between slices on the outer part of `data`
    alone."""
    within = (shape[0] // slices, *shape[1:])
    return mesh_utils.create_hybrid_device_mesh(
        within, (slices, 1, 1), devices, allow_split_physical_axes=True
    )
