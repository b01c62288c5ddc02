"""Pieces that run configs share. Sizes are the paper's (arXiv 2510.23052, tables 3 and 5)."""

from typing import Callable

from ml_collections.config_dict import ConfigDict

from kha_jax.attention import AttentionConfig
from kha_jax.attention.mixers import KnockingGate, KnockingLinear, KnockingMLP
from kha_jax.attention.projections import GroupedQuery
from kha_jax.config import to_config_dict
from kha_jax.feed_forward import FeedForward
from kha_jax.model import LossConfig, ModelConfig
from kha_jax.optimizer import OptimizerConfig
from kha_jax.parameters import Numerics
from kha_jax.training import CheckpointConfig, EvaluationConfig, RunConfig

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
        raise ValueError(
            f"config variant {variant!r} is not known; use one of {', '.join(KNOCKING)}"
        )
    return attention.replace(**KNOCKING[variant])


def pretraining(
    *,
    layers: int,
    width: int,
    feed_forward: FeedForward,
    tokens: int,
    batch_size: int = 512,
    seq_len: int = 4096,
    learning_rate: float = 7.5e-4,
) -> Callable[..., ConfigDict]:
    """get_config(variant) of a run of the paper (section 4.1): GQA 32/4 with heads of 128, tied
    vocabulary of 157,184, 2.1M tokens a step by default; `variant` is a key of KNOCKING.

    For accelerators: FSDP over all of them, full rematerialisation, bfloat16 over float32 AdamW.
    `data` names the embedded text until a corpus is given.
    """
    attention = AttentionConfig(projection=GroupedQuery(query_heads=32, kv_heads=4, head_dim=128))

    def run(variant):
        return RunConfig(
            steps=tokens // (batch_size * seq_len),
            batch_size=batch_size,
            seq_len=seq_len,
            model=ModelConfig(
                layers=layers,
                width=width,
                vocabulary_size=157184,
                attention=with_knocking(attention, variant),
                feed_forward=feed_forward,
                numerics=Numerics(init_std=0.006),
                remat="full",
                loss=LossConfig(chunk_tokens=16384),
            ),
            optimizer=OptimizerConfig(learning_rate=learning_rate),
            evaluation=EvaluationConfig(every=2000, batches=4),
            checkpoint=CheckpointConfig(every=1000, keep=3),
        )

    return lambda variant="mlp": to_config_dict(run(variant))
