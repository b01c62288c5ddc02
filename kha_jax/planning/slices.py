"""Chips by their data sheets, and slices of them."""

import re
from typing import NamedTuple

from kha_jax import sharding
from kha_jax.accounting import PEAK_FLOPS
from kha_jax.config import near
from kha_jax.sharding import SLICES


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


class Topology(NamedTuple):
    """A pod slice, or several over the network: its name for libtpu (`v5p:4x4x4`), chips of all
    slices, their data sheet, how many slices."""

    name: str
    chips: int
    chip: Chip
    slices: int = 1

    @property
    def kind(self) -> str:
        """The chip's name: a key of CHIPS."""
        return self.name.partition(":")[0]


class SliceError(ValueError):
    """A slice that does not exist. The message says which do."""


def topology(name: str) -> Topology:
    """The slice of a name such as v5p:4x4x4, or of a preset such as v5p-128; N*NAME is N of them.

    Raises:
        SliceError: for a name of neither form.
    """
    several = re.fullmatch(r"([1-9]\d*)\*(.+)", name)
    if several:
        one = topology(several[2])
        slices = int(several[1])
        return one._replace(chips=one.chips * slices, slices=slices)
    full = SLICES.get(name, name)
    kind, _, shape = full.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise SliceError(
            f"{name!r} is not KIND:SHAPE with a kind of {', '.join(CHIPS)}; {near(name, SLICES)}"
        )
    return Topology(full, sharding.chips(full), CHIPS[kind])
