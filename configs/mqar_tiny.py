"""Multi-query associative recall: a 2-layer KHA transformer that learns to look values up, minutes on two CPU cores.

    python -m experiments.train --config=configs/mqar_tiny.py --workdir=runs/mqar
    python -m experiments.train --config=configs/mqar_tiny.py:baseline --workdir=runs/mqar_baseline

Watch val_accuracy: it stays near chance (1/128), then rises steeply once the model has found the look-up.
"""

from configs import base
from kha_jax.attention import AttentionConfig
from kha_jax.attention.projections import GroupedQuery
from kha_jax.config import to_config_dict
from kha_jax.data import MultiQueryAssociativeRecall
from kha_jax.feed_forward import SwiGLU
from kha_jax.model import ModelConfig
from kha_jax.optimizer import OptimizerConfig
from kha_jax.parameters import Numerics
from kha_jax.training import EvaluationConfig, RunConfig


def get_config(variant: str = "mlp"):
    """The run; `variant` is a key of configs.base.KNOCKING."""
    task = MultiQueryAssociativeRecall(pairs=8, vocabulary=256)
    attention = AttentionConfig(projection=GroupedQuery(query_heads=4, kv_heads=2, head_dim=32))
    run = RunConfig(
        steps=1500,
        batch_size=64,
        seq_len=64,
        data=task,
        model=ModelConfig(
            layers=2,
            width=128,
            vocabulary_size=256,
            attention=base.with_knocking(attention, variant),
            feed_forward=SwiGLU(width=256),
            numerics=Numerics(dtype="float32"),
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        evaluation=EvaluationConfig(every=100, batches=4),
    )
    return to_config_dict(run)
