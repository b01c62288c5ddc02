"""Tiny runs of what long runs are made of: python -m tests.soak --config=tests/soaked.py:mea"""

from kha_jax.attention import AttentionConfig
from kha_jax.attention.mixers import HeadComposition, KnockingMLP
from kha_jax.attention.outputs import HeadGroupNorm
from kha_jax.attention.projections import GroupedQuery
from kha_jax.attention.scores import TalkingHeads
from kha_jax.config import to_config_dict
from kha_jax.data import MultiQueryAssociativeRecall
from kha_jax.feed_forward import MoE, SwiGLU
from kha_jax.model import AttentionFrom, ModelConfig
from kha_jax.modules import Numerics
from kha_jax.training.run_config import CheckpointConfig, EvaluationConfig, RunConfig

PROJECTION = GroupedQuery(query_heads=4, kv_heads=2, head_dim=8)
VIRTUAL = HeadComposition(heads_read=4)
ATTENTIONS = {
    "mixture": AttentionConfig(projection=PROJECTION, value=KnockingMLP()),
    "mea": AttentionConfig(
        projection=PROJECTION, key=VIRTUAL, value=VIRTUAL, output=HeadGroupNorm()
    ),
    "talking": AttentionConfig(
        projection=PROJECTION, logits=TalkingHeads(), probabilities=TalkingHeads()
    ),
    "later": AttentionConfig(projection=PROJECTION),
}


def get_config(variant: str = "mixture"):
    """mixture: in bfloat16, parameters too. later: other layers from the second on, in two
    micro-batches."""
    mixture, later = variant == "mixture", variant == "later"
    model = ModelConfig(
        layers=2,
        width=32,
        vocabulary_size=64,
        attention=ATTENTIONS[variant],
        feed_forward=MoE(experts=4, top_k=2, width=32) if mixture else SwiGLU(width=64),
        numerics=Numerics(dtype="bfloat16", param_dtype="bfloat16" if mixture else "float32"),
    )
    if later:
        composed = AttentionConfig(projection=PROJECTION, value=HeadComposition())
        model = model.replace(later=AttentionFrom(layer=1, attention=composed))
    run = RunConfig(
        steps=60,
        batch_size=4,
        seq_len=32,
        accumulation=2 if later else 1,
        data=MultiQueryAssociativeRecall(pairs=4, vocabulary=64),
        model=model,
        evaluation=EvaluationConfig(every=20, batches=2),
        checkpoint=CheckpointConfig(every=15),
    )
    return to_config_dict(run)
