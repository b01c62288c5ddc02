"""Facts about chips and slices."""

import dataclasses
import math
import os
import platform
from pathlib import Path
from typing import Mapping

import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One device by its data sheet. device_kinds: what jax calls it, or a part of that. flops: of
    dense bf16, a second."""

    device_kinds: tuple[str, ...]
    flops: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tpu(Chip):
    """One whose slices can be planned: bytes of HBM, bytes/s of HBM, bytes/s of its links, all
    directions together, bytes/s to other slices (its share of the host's network), and the side of
    its matrix unit. slices: shapes by their vendor's names, where a v5p chip counts twice."""

    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    matrix_side: int
    slices: Mapping[str, str] = dataclasses.field(hash=False)


# A device is the first one that knows what it calls itself.
CHIPS = {
    "v5e": Tpu(
        device_kinds=("v5 lite", "v5e"),
        flops=197e12,
        hbm_bytes=15.75 * 2**30,
        hbm_bandwidth=819e9,
        link_bandwidth=200e9,
        network_bandwidth=3.125e9,
        matrix_side=128,
        slices={"v5e-1": "1x1", "v5e-4": "2x2", "v5e-64": "8x8", "v5e-256": "16x16"},
    ),
    "v5p": Tpu(
        device_kinds=("v5p", "TPU v5"),
        flops=459e12,
        hbm_bytes=95 * 2**30,
        hbm_bandwidth=2765e9,
        link_bandwidth=600e9,
        network_bandwidth=6.25e9,
        matrix_side=128,
        slices={"v5p-8": "2x2x1", "v5p-64": "4x4x2", "v5p-128": "4x4x4"},
    ),
    "v6e": Tpu(
        device_kinds=("v6 lite", "v6e"),
        flops=918e12,
        hbm_bytes=31.25 * 2**30,
        hbm_bandwidth=1640e9,
        link_bandwidth=448e9,
        network_bandwidth=12.5e9,
        matrix_side=256,
        slices={"v6e-1": "1x1", "v6e-4": "2x2", "v6e-64": "8x8", "v6e-256": "16x16"},
    ),
    "v4": Chip(device_kinds=("v4",), flops=275e12),
    "H200": Chip(device_kinds=("H200",), flops=989e12),
    "H100": Chip(device_kinds=("H100",), flops=989e12),
    "A100": Chip(device_kinds=("A100",), flops=312e12),
}
TPUS = {name: chip for name, chip in CHIPS.items() if isinstance(chip, Tpu)}
# Slices by their vendor's names, and by libtpu's: chip and shape.
SLICES = {
    name: f"{chip}:{shape}" for chip, tpu in TPUS.items() for name, shape in tpu.slices.items()
}


def chip_of(device_kind: str) -> str | None:
    """The name of a chip in CHIPS by what jax calls it; None: it is none of them."""
    called = device_kind.lower()
    for name, chip in CHIPS.items():
        if any(kind.lower() in called for kind in chip.device_kinds):
            return name
    return None


def peak_flops(device_kind: str) -> float:
    """bf16 FLOP/s of one device, or NaN where unknown."""
    chip = chip_of(device_kind)
    return CHIPS[chip].flops if chip else math.nan


def device_bytes(device: jax.Device) -> float:
    """Memory of a device; a CPU's share of the machine's, or of what its control group may have."""
    told = (device.memory_stats() or {}).get("bytes_limit")
    if told:
        return told
    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(total, float(text) if text.isdecimal() else total) / jax.local_device_count()


def hardware() -> str:
    """What computes: accelerators of one kind, or the cores of a processor."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{jax.device_count()} x {device.device_kind}"
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    named = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return f"{os.cpu_count()} cores of {next(named, platform.processor() or platform.machine())}"


def chips(topology: str) -> int:
    """Devices of a slice by libtpu's name, such as v5p:4x4x4."""
    return math.prod(map(int, topology.partition(":")[2].split("x")))
