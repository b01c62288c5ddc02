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
    if kind not in TPUS or not re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,4})*", shape):
        sized = of_size(name)
        hint = f"{sized} is the slice of that size" if sized else near(name, SLICES)
        raise SliceError(f"{name!r} is not KIND:SHAPE with a kind of {', '.join(TPUS)}; {hint}")
    if shape.count("x") + 1 != dimensions(kind):
        example = next(reversed(TPUS[kind].slices.values()))
        problem = f"{kind} has {dimensions(kind)} dimensions, as {kind}:{example}"
        raise SliceError(f"{name!r} is no slice: a {problem}")
    return Topology(full, chips.chips(full), TPUS[kind])


def dimensions(kind: str) -> int:
    """Those in which the chips of a kind are linked."""
    return next(iter(TPUS[kind].slices.values())).count("x") + 1


def of_size(name: str) -> str | None:
    """The slice of a vendor's name that SLICES lacks, as even as a power of two can be: v5p:2x2x4
    of v5p-32, where a v5p chip counts twice. None of any other name."""
    kind, _, size = name.partition("-")
    count = int(size) // (2 if kind == "v5p" else 1) if size.isdecimal() else 0
    if kind not in TPUS or count < 1 or count & (count - 1):
        return None
    axes, doublings = dimensions(kind), count.bit_length() - 1
    sides = sorted(2 ** ((doublings + i) // axes) for i in range(axes))
    return f"{kind}:{'x'.join(map(str, sides))}"
