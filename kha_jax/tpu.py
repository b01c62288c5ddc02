"""What a train step is compiled with on a TPU: the attention kernel of long rows, and options of
libtpu's compiler; one table by chip and kind of model.

They are options of the step's own compilation (`jax.jit`), not of the process: they hold wherever
it is compiled, ahead of time for several chips too, and libtpu refuses one that it does not know
instead of ending the process. What LIBTPU_INIT_ARGS names is left to it.
"""

import os
from typing import NamedTuple

import jax

VMEM = "xla_tpu_scoped_vmem_limit_kib"
ENVIRONMENT = "LIBTPU_INIT_ARGS"
# By what they call themselves.
CHIPS = {"TPU v5": "v5p", "TPU v5 lite": "v5e", "TPU v6 lite": "v6e"}


class Settings(NamedTuple):
    """kernel: of `kha_jax.ops.attention.KERNELS`, instead of `splash`, for rows of LONG tokens or
    more; None: `splash`. options: of libtpu's compiler."""

    kernel: str | None
    options: dict[str, str]


# A block on the diagonal is computed whole: those of 2048 compute a quarter too much of a row of
# 8192, and half too much of one of 4096.
LONG = 8192
# Public presets of MaxText (benchmarks/xla_flags_library.py and the model configs beside it), as
# far as libtpu 0.0.51 takes them; none of this was measured here.
_DENSE, _MIXTURE = {VMEM: "98304"}, {VMEM: "81920"}
SETTINGS = {
    chip: {
        "dense": Settings("splash_2048", _DENSE),
        "mixture": Settings("splash_2048", _MIXTURE),
    }
    for chip in ("v5p", "v5e", "v6e")
}


def settings(chip: str | None, mixture: bool) -> Settings:
    """The table's settings for a chip, without what LIBTPU_INIT_ARGS sets; none for a chip that it
    does not know, and no kernel that wants more VMEM than was set there."""
    row = SETTINGS.get(chip or "")
    if row is None:
        return Settings(None, {})
    found, typed = row["mixture" if mixture else "dense"], given()
    options = {name: value for name, value in found.options.items() if name not in typed}
    return Settings(None if VMEM in typed else found.kernel, options)


def chip_of(device: jax.Device) -> str | None:
    """The chip by its name here; None: it is none of the table's."""
    kind = device.device_kind
    return CHIPS.get(kind, kind.removeprefix("TPU "))


def given() -> dict[str, str]:
    """What LIBTPU_INIT_ARGS sets."""
    words = os.environ.get(ENVIRONMENT, "").split()
    pairs = (word.lstrip("-").partition("=") for word in words)
    return {name: value for name, _, value in pairs}
