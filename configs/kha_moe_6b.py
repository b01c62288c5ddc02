"""The paper's main run: 6.1B parameters, 1.0B active, 128 experts of which 8 are active, 1T tokens (section 4.1, table 5).

    python -m experiments.train --config=configs/kha_moe_6b.py --workdir=gs://BUCKET/kha_moe_6b

Variants: mlp (default: KHA-MLP on values), linear (KHA-Linear on q, k, v), gate, baseline. For TPU pods: FSDP over all chips, full
rematerialisation, bfloat16 over float32 AdamW. Bring a corpus: `data` still names the embedded text.
"""

from configs import base
from kha_jax.attention import AttentionConfig
from kha_jax.attention.projections import GroupedQuery
from kha_jax.config import to_config_dict
from kha_jax.model import LossConfig, ModelConfig
from kha_jax.moe import MoE
from kha_jax.optimizer import OptimizerConfig
from kha_jax.parameters import Numerics
from kha_jax.training import CheckpointConfig, EvaluationConfig, RunConfig

TOKENS, BATCH, LENGTH = 10**12, 512, 8192  # 4.2M tokens a step


def get_config(variant: str = "mlp"):
    """The run; `variant` is a key of configs.base.KNOCKING."""
    attention = AttentionConfig(projection=GroupedQuery(query_heads=32, kv_heads=4, head_dim=128))
    run = RunConfig(
        steps=TOKENS // (BATCH * LENGTH),
        batch_size=BATCH,
        seq_len=LENGTH,
        model=ModelConfig(
            layers=18,
            width=2048,
            vocabulary_size=157184,
            attention=base.with_knocking(attention, variant),
            feed_forward=MoE(experts=128, top_k=8, width=384, chunk_tokens=4096),
            numerics=Numerics(init_std=0.006),
            remat="full",
            loss=LossConfig(chunk_tokens=16384),
        ),
        optimizer=OptimizerConfig(learning_rate=4.78e-4),
        evaluation=EvaluationConfig(every=2000, batches=4),
        checkpoint=CheckpointConfig(every=1000, keep=3),
    )
    return to_config_dict(run)
