"""Tasks that are made up, for a 2-layer transformer with few and small key/value heads: half a
minute each on a CPU core.

    python -m experiments.train --config=configs/task_tiny.py:k_hop-mlp --workdir=runs/k_hop
    python -m experiments.sweep --table=tasks --rows=k_hop-baseline,k_hop-mlp --out=runs/k_hop

Rows are SETTING-VARIANT: a setting below and a way for heads to interact, each compared with the
baseline of its setting. Watch val_accuracy. What makes a task harder are the fields of its config,
such as --config.data.pairs, hops, copied, needles and degree.
"""

from configs import base, tables
from kha_jax.attention import AttentionConfig
from kha_jax.attention.projections import GroupedQuery
from kha_jax.data import TASKS
from kha_jax.feed_forward import SwiGLU
from kha_jax.model import ModelConfig
from kha_jax.modules import Numerics
from kha_jax.training.run_config import (
    CheckpointConfig,
    EvaluationConfig,
    OptimizerConfig,
    RunConfig,
)

# setting -> (task, its fields)
SETTINGS = {
    "mqar": ("mqar", {"pairs": 12, "vocabulary": 64}),
    "compositional_recall": ("compositional_recall", {"pairs": 4, "vocabulary": 48}),
    "k_hop": ("k_hop", {"hops": 2, "symbols": 4}),
    "selective_copy": ("selective_copy", {"copied": 8}),
    "needle": ("needle", {"needles": 6, "values": 2, "vocabulary": 64}),
    "relational_graph": ("relational_graph", {"vocabulary": 64, "degree": 4, "asked": 8}),
}
VARIANTS = ("baseline", "linear", "mlp", "talking", "compose")


def run(setting: str, variant: str) -> RunConfig:
    """The run of a setting with a variant of configs.base."""
    task, fields = SETTINGS[setting]
    data = TASKS[task](**fields)
    attention = AttentionConfig(projection=GroupedQuery(query_heads=4, kv_heads=2, head_dim=16))
    return RunConfig(
        steps=800,
        batch_size=64,
        seq_len=64,
        data=data,
        model=ModelConfig(
            layers=2,
            width=64,
            vocabulary_size=data.vocabulary,
            attention=base.varied(attention, variant),
            feed_forward=SwiGLU(width=128),
            numerics=Numerics(dtype="float32"),
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        evaluation=EvaluationConfig(every=100, batches=8),
        checkpoint=CheckpointConfig(every=0, keep=1),
    )


TABLE = tables.Table(
    "Tasks that are made up: which settings tell which variants apart",
    {
        f"{setting}-{variant}": tables.Row(run(setting, variant), baseline=f"{setting}-baseline")
        for setting in SETTINGS
        for variant in VARIANTS
    },
    scales={},
)
get_config = TABLE.get_config
