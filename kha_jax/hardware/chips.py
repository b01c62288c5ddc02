"""Facts about chips and slices."""

import math
import os
import platform
from pathlib import Path
from typing import NamedTuple

import jax

# Dense bf16 peak of one device in FLOP/s, from the vendors' data sheets, by a fragment of jax's
# device_kind.
PEAK_FLOPS = {
    "v5p": 459e12,
    "v5 lite": 197e12,
    "v5e": 197e12,
    "TPU v5": 459e12,  # what a v5p calls itself; the lite ones have matched above
    "v6 lite": 918e12,
    "v6e": 918e12,
    "v4": 275e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
}


def peak_flops(device_kind: str) -> float:
    """bf16 FLOP/s of one device, or NaN where unknown."""
    return next(
        (peak for name, peak in PEAK_FLOPS.items() if name.lower() in device_kind.lower()), math.nan
    )


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
    """What computes: so many accelerators of a kind, or the cores of a processor."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{jax.device_count()} x {device.device_kind}"
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    named = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return f"{os.cpu_count()} cores of {next(named, platform.processor() or platform.machine())}"


class Chip(NamedTuple):
    """One device by its data sheet: dense bf16 FLOP/s, bytes of HBM, bytes/s of HBM, bytes/s of its
    links, all directions together, bytes/s to other slices (its share of the host's network), and
    the side of its matrix unit."""

    flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    matrix_side: int


CHIPS = {
    "v5p": Chip(PEAK_FLOPS["v5p"], 95 * 2**30, 2765e9, 600e9, 6.25e9, 128),
    "v5e": Chip(PEAK_FLOPS["v5e"], 15.75 * 2**30, 819e9, 200e9, 3.125e9, 128),
    "v6e": Chip(PEAK_FLOPS["v6e"], 31.25 * 2**30, 1640e9, 448e9, 12.5e9, 256),
}


# Slices by their vendor's names, where a v5p chip counts twice, and by libtpu's: kind and shape.
SLICES = {
    "v5e-1": "v5e:1x1",
    "v5e-4": "v5e:2x2",
    "v5e-64": "v5e:8x8",
    "v5e-256": "v5e:16x16",
    "v5p-8": "v5p:2x2x1",
    "v5p-64": "v5p:4x4x2",
    "v5p-128": "v5p:4x4x4",
    "v6e-1": "v6e:1x1",
    "v6e-4": "v6e:2x2",
    "v6e-64": "v6e:8x8",
    "v6e-256": "v6e:16x16",
}


def chips(topology: str) -> int:
    """Devices of a slice by libtpu's name, such as v5p:4x4x4."""
    return math.prod(map(int, topology.partition(":")[2].split("x")))
