"""Chips by their data sheets, and slices of them."""

import re
from typing import NamedTuple

from kha_jax.config import near
from kha_jax.hardware import chips
from kha_jax.hardware.chips import SLICES, TPUS, Tpu


class Topology(NamedTuple):
    """A pod slice, or several over the network: its name for libtpu (`v5p:4x4x4`), chips of all
    slices, their data sheet, how many slices."""

    name: str
    chips: int
    chip: Tpu
    slices: int = 1

    @property
    def kind(self) -> str:
        """The chip's name: a key of TPUS."""
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
    if kind not in TPUS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise SliceError(
            f"{name!r} is not KIND:SHAPE with a kind of {', '.join(TPUS)}; {near(name, SLICES)}"
        )
    return Topology(full, chips.chips(full), TPUS[kind])
