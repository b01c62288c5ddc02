"""What a train step is compiled with on a TPU: the attention kernel of long rows, and options of
libtpu's compiler; one table by chip and kind of model.

They are options of the step's own compilation (`jax.jit`), not of the process: they hold wherever
it is compiled, ahead of time for several chips too, and libtpu refuses one that it does not know
instead of ending the process. What LIBTPU_INIT_ARGS names is left to it.
"""

import os
from typing import Iterable, Mapping, NamedTuple

VMEM = "xla_tpu_scoped_vmem_limit_kib"
ENVIRONMENT = "LIBTPU_INIT_ARGS"
# A block on the diagonal is computed whole: those of 2048 compute a quarter too much of a row of
# 8192, and half too much of one of 4096.
LONG = 8192


class Settings(NamedTuple):
    """kernel: of `kha_jax.ops.attention.KERNELS`, instead of `splash`, for rows of LONG tokens or
    more; None: `splash`. options: of libtpu's compiler."""

    kernel: str | None
    options: dict[str, str]


# What follows is of public presets of MaxText (benchmarks/xla_flags_library.py and the configs of
# models beside it), as far as libtpu 0.0.51 takes it; none was measured here. It refuses the fused
# all-gather on other chips than v5e, where it may compute wrong results, and knows two flags of
# the presets' SparseCore collectives no more, which are left out.
_DENSE, _MIXTURE = {VMEM: "98304"}, {VMEM: "81920"}
# All-gathers beside the computation, between and, on v5e, inside fusions.
_GATHER = {"xla_tpu_overlap_compute_collective_tc": "true", "xla_enable_async_all_gather": "true"}
_FUSION = "xla_tpu_enable_async_collective_fusion"
_FUSED_GATHER = _GATHER | {
    _FUSION: "true",
    f"{_FUSION}_fuse_all_gather": "true",
    f"{_FUSION}_multiple_steps": "true",
}
# All-reduces of gradients over the network beside the computation.
_REDUCE = {
    "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
    "xla_tpu_data_parallel_opt_different_sized_ops": "true",
}
_V5P_MIXTURE = {
    "xla_tpu_megacore_fusion_allow_ags": "false",
    "xla_enable_async_collective_permute": "true",
    "xla_tpu_enable_ag_backward_pipelining": "true",
}
_V6E_LAYOUT = {
    "xla_tpu_use_minor_sharding_for_major_trivial_input": "true",
    "xla_tpu_relayout_group_size_threshold_for_reduce_scatter": "1",
    "xla_tpu_assign_all_reduce_scatter_layout": "true",
}
SETTINGS = {
    "v5p": {
        "dense": Settings("splash_2048", _DENSE | _GATHER | _REDUCE),
        "mixture": Settings("splash_2048", _MIXTURE | _GATHER | _REDUCE | _V5P_MIXTURE),
    },
    "v5e": {
        "dense": Settings("splash_2048", _DENSE | _FUSED_GATHER | _REDUCE),
        "mixture": Settings("splash_2048", _MIXTURE | _FUSED_GATHER | _REDUCE),
    },
    "v6e": {
        "dense": Settings("splash_2048", _DENSE | _GATHER | _REDUCE | _V6E_LAYOUT),
        "mixture": Settings("splash_2048", _MIXTURE | _GATHER | _REDUCE),
    },
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


def given() -> dict[str, str]:
    """What LIBTPU_INIT_ARGS sets."""
    words = os.environ.get(ENVIRONMENT, "").split()
    pairs = (word.lstrip("-").partition("=") for word in words)
    return {name: value for name, _, value in pairs}


def told(kernels: Iterable[str], options: Mapping[str, str]) -> str:
    """One line of what a step is compiled with."""
    words = " ".join(f"{name}={value}" for name, value in options.items())
    names = ", ".join(dict.fromkeys(kernels))
    return f"compiled with: attention {names}; {words or 'no options of libtpu'}"
