"""Multi-query associative recall: a 2-layer KHA transformer that learns to look values up, half a
minute on two CPU cores.

    python -m experiments.train --config=configs/mqar_tiny.py --workdir=runs/mqar
    python -m experiments.train --config=configs/mqar_tiny.py:baseline --workdir=runs/mqar_baseline

Watch val_accuracy: it lingers near one in four (guessing among the four values shown), then rises
steeply to 100% once the model has found the look-up. More pairs (--config.data.pairs=8) or fewer
heads make it hard.
"""

from configs import base
from kha_jax.attention import AttentionConfig
from kha_jax.attention.projections import GroupedQuery
from kha_jax.config import to_config_dict
from kha_jax.data import MultiQueryAssociativeRecall
from kha_jax.feed_forward import SwiGLU
from kha_jax.model import ModelConfig
from kha_jax.modules import Numerics
from kha_jax.training.run_config import EvaluationConfig, OptimizerConfig, RunConfig


def get_config(variant: str = "mlp"):
    """The run; `variant` is a name that configs.base.with_variant takes."""
    task = MultiQueryAssociativeRecall(pairs=4, vocabulary=64)
    attention = AttentionConfig(projection=GroupedQuery(query_heads=4, kv_heads=2, head_dim=32))
    run = RunConfig(
        steps=600,
        batch_size=128,
        seq_len=32,
        data=task,
        model=ModelConfig(
            layers=2,
            width=128,
            vocabulary_size=64,
            attention=attention,
            feed_forward=SwiGLU(width=256),
            numerics=Numerics(dtype="float32"),
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        evaluation=EvaluationConfig(every=50, batches=4),
    )
    return to_config_dict(base.with_variant(run, variant))
