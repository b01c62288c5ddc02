"""Pieces that run configs share. Sizes are the paper's (arXiv 2510.23052, tables 3 and 5)."""

from kha_jax.attention import AttentionConfig
from kha_jax.attention.mixers import KnockingGate, KnockingLinear, KnockingMLP

# Variant name -> attention fields: the rows of the paper's table 2, and the baseline.
KNOCKING = {
    "baseline": {},
    "mlp": {"value": KnockingMLP()},
    "linear": {"query": KnockingLinear(), "key": KnockingLinear(), "value": KnockingLinear()},
    "gate": {"value": KnockingGate()},
}


def with_knocking(attention: AttentionConfig, variant: str) -> AttentionConfig:
    """The attention with the mixers of a named variant; an unknown name lists the known ones."""
    if variant not in KNOCKING:
        raise ValueError(f"config variant {variant!r} is not known; use one of {', '.join(KNOCKING)}")
    return attention.replace(**KNOCKING[variant])
