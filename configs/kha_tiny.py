"""A 1.0M-parameter KHA transformer on the text of Python's standard library: three minutes on two
CPU cores.

    python -m experiments.train --config=configs/kha_tiny.py --workdir=runs/kha_tiny
    python -m experiments.train --config=configs/kha_tiny.py:baseline --workdir=runs/baseline

Variants: mlp (default: KHA-MLP on values, the paper's main setting), linear (KHA-Linear on q, k,
v), mlp_tuned and linear_tuned (their matrices at ten times the learning rate), gate, baseline, and
all others of configs.base.variants. Expect about 2 bits per byte on held-out modules from 8 at the
start.
"""

from configs import base
from kha_jax.attention import AttentionConfig
from kha_jax.attention.projections import GroupedQuery
from kha_jax.config import to_config_dict
from kha_jax.feed_forward import SwiGLU
from kha_jax.model import ModelConfig
from kha_jax.modules import Numerics
from kha_jax.training.run_config import (
    CheckpointConfig,
    EvaluationConfig,
    OptimizerConfig,
    RunConfig,
)


def get_config(variant: str = "mlp"):
    """The run; `variant` is a name that configs.base.with_variant takes."""
    attention = AttentionConfig(projection=GroupedQuery(query_heads=8, kv_heads=4, head_dim=32))
    run = RunConfig(
        steps=600,
        batch_size=16,
        seq_len=256,
        model=ModelConfig(
            layers=4,
            width=128,
            stack="unroll",
            attention=attention,
            feed_forward=SwiGLU(width=384),
            numerics=Numerics(dtype="float32"),
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        evaluation=EvaluationConfig(every=50, batches=8),
        checkpoint=CheckpointConfig(every=100),
    )
    return to_config_dict(base.with_variant(run, variant))
