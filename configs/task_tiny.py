"""Tasks that are made up, for a 2-layer transformer with few and small key/value heads: a minute
each on two CPU cores.

    python -m experiments.train --config=configs/task_tiny.py:k_hop-mlp --workdir=runs/k_hop
    python -m experiments.sweep --seeds=3 --out=runs/k_hop_sweep \
        --configs=configs/task_tiny.py:k_hop-baseline,configs/task_tiny.py:k_hop-mlp

TASK-VARIANT: a task of kha_jax.data.TASKS and a name of configs.base.variants. Watch val_accuracy.
Each task's fields make it harder: --config.data.pairs, hops, copied, needles, degree.
"""

from configs import base
from kha_jax.attention import AttentionConfig
from kha_jax.attention.projections import GroupedQuery
from kha_jax.config import near, to_config_dict
from kha_jax.data import TASKS
from kha_jax.feed_forward import SwiGLU
from kha_jax.model import ModelConfig
from kha_jax.optimizer import OptimizerConfig
from kha_jax.parameters import Numerics
from kha_jax.training import EvaluationConfig, RunConfig

SETTINGS = {
    "mqar": {"pairs": 12, "vocabulary": 64},
    "compositional_recall": {"pairs": 4, "vocabulary": 48},
    "k_hop": {"hops": 2, "symbols": 4},
    "selective_copy": {"copied": 8},
    "needle": {"needles": 6, "values": 2, "vocabulary": 64},
    "relational_graph": {"vocabulary": 64, "degree": 4, "asked": 8},
}


def get_config(variant: str = "relational_graph-mlp"):
    """The run of TASK-VARIANT."""
    task, _, name = variant.partition("-")
    if task not in TASKS:
        raise ValueError(f"task {task!r} is not known; {near(task, TASKS)}")
    data = TASKS[task](**SETTINGS[task])
    attention = AttentionConfig(projection=GroupedQuery(query_heads=4, kv_heads=2, head_dim=16))
    run = RunConfig(
        steps=800,
        batch_size=64,
        seq_len=64,
        data=data,
        model=ModelConfig(
            layers=2,
            width=64,
            vocabulary_size=data.vocabulary,
            attention=base.varied(attention, name or "baseline"),
            feed_forward=SwiGLU(width=128),
            numerics=Numerics(dtype="float32"),
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        evaluation=EvaluationConfig(every=100, batches=8),
    )
    return to_config_dict(run)
