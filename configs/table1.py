"""Table 1 of the paper: 1 to 32 key/value heads under 32 query heads, in the 6.6B mixture, 75B
tokens.

    python -m experiments.train --config=configs/table1.py:kv4_linear.tiny --workdir=runs/kv4_linear
    python -m experiments.sweep --table=1 --rows=kv1_baseline,kv1_mlp --seeds=3 --out=runs/table1

Rows: kvK_baseline, kvK_mlp (on values) and kvK_linear (on queries, keys and values) for
K = 1, 2, 4, 8, 16, 32.
"""

from configs import base, tables
from kha_jax.attention import AttentionConfig
from kha_jax.attention.projections import GroupedQuery

KV_HEADS = (1, 2, 4, 8, 16, 32)
LOSSES = {
    "baseline": (1.864, 1.855, 1.856, 1.851, 1.849, 1.846),
    "mlp": (1.846, 1.835, 1.832, 1.832, 1.833, 1.830),
    "linear": (1.857, 1.845, 1.838, 1.841, 1.832, 1.834),
}


def row(kv_heads: int, variant: str, loss: float) -> tables.Row:
    """A variant by its number of key/value heads."""
    projection = GroupedQuery(query_heads=32, kv_heads=kv_heads, head_dim=128)
    attention = base.varied(AttentionConfig(projection=projection), variant)
    return tables.Row(
        base.paper_run("moe_7b", tables.EXPLORED_TOKENS, attention),
        baseline=f"kv{kv_heads}_baseline",
        loss=loss,
    )


TABLE = tables.Table(
    "Table 1: knocking by the number of key/value heads",
    {
        f"kv{kv_heads}_{variant}": row(kv_heads, variant, losses[column])
        for column, kv_heads in enumerate(KV_HEADS)
        for variant, losses in LOSSES.items()
    },
)
get_config = TABLE.get_config
