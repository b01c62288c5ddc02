"""kha_jax: attention whose heads interact, in JAX and Flax.

Importing it is quick: a name is loaded when it is first used.

Attention is a layer for any model, `nnx.Attention` the same as an nnx module; AttentionConfig says
everything that a layer can be, by mixers of the streams, the scores and the output. knock mixes the
heads behind a projection of your own, fold takes linear mixers into weights. load reads a run that
was trained, Decoder generates from it, account counts what a model costs.
"""

import importlib

__version__ = "0.1.0"

# Where each public name comes from.
_HOMES = {
    "kha_jax.layer": ("Attention", "knock"),
    "kha_jax.modules": ("Numerics",),
    "kha_jax.attention": ("AttentionConfig",),
    "kha_jax.attention.mixers": (
        "HeadComposition",
        "KnockingGate",
        "KnockingLinear",
        "KnockingMLP",
        "NoMixer",
        "UnsharedLinear",
    ),
    "kha_jax.attention.scores": ("NoScoreMixer", "TalkingHeads"),
    "kha_jax.attention.outputs": (
        "DifferentialOutput",
        "ExclusiveOutput",
        "GatedOutput",
        "HeadGroupNorm",
        "MixtureOfHeads",
        "NoOutputMixer",
    ),
    "kha_jax.accounting": ("account",),
    "kha_jax.inference.decoding": ("Decoder",),
    "kha_jax.inference.folding": ("fold",),
    "kha_jax.training.run_folder": ("load",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted([*_HOME, "nnx"])


def __getattr__(name: str):
    if name == "nnx":
        return importlib.import_module("kha_jax.nnx")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__():
    return sorted({*globals(), *__all__})
