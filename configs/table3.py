"""Table 3 of the paper: knocking on other attentions, in mixtures of about 6.6B, 100B tokens.

    python -m experiments.train --config=configs/table3.py:gta_mlp.tiny --workdir=runs/gta_mlp
    python -m experiments.sweep --table=3 --scale=tiny --seeds=3 --out=runs/table3

Rows: mla, gta, mqa, gqa8 (16 query heads), gqa4 (32) and mha with their cache, and gla, which the
paper names and does not print (two latents of 256: as much cache as mla). Each also with knocking:
mla_linear and gla_linear on queries, keys and values (what decodes from a latent must fold into
it), the others on values, as gta_mlp and so on.
MLA cannot be as printed: 8 query heads give no 970M active parameters with a cache of 512 + 64; 32
heads with a query rank of 1024 give 971.7M.
"""

from configs import base, tables
from kha_jax.attention import AttentionConfig
from kha_jax.attention.mixers import KnockingLinear, KnockingMLP
from kha_jax.attention.projections import GroupedQuery, GroupedTied, Latent

LATENT = Latent(query_heads=32, head_dim=128, value_dim=128, rope_dim=64, kv_lora=512, q_lora=1024)
MLA_NOTE = "printed with 8 query heads, which cannot give 970M; 32 heads and a query rank of 1024"
# projection, cache, active parameters, loss of the baseline and with knocking
PRINTED = {
    "mla": (LATENT, 512 + 64, "970M", 1.812, 1.801),
    "gta": (GroupedTied(query_heads=32, kv_heads=4, head_dim=128), 512 + 64, "868M", 1.819, 1.802),
    "mqa": (GroupedQuery(query_heads=32, kv_heads=1, head_dim=128), 256, "859M", 1.814, 1.801),
    "gqa8": (GroupedQuery(query_heads=16, kv_heads=8, head_dim=128), 2048, "795M", 1.801, 1.791),
    "gqa4": (base.PAPER_ATTENTION.projection, 1024, "880M", 1.807, 1.787),
    "mha": (GroupedQuery(query_heads=16, kv_heads=16, head_dim=128), 4096, "852M", 1.795, 1.785),
    "gla": (LATENT.replace(groups=2, kv_lora=256), 512 + 64, None, None, None),
}
KNOCKING = {
    "linear": dict.fromkeys(("query", "key", "value"), KnockingLinear()),
    "mlp": {"value": KnockingMLP()},
}


def rows() -> dict[str, tables.Row]:
    """Both runs of each attention."""
    found = {}
    for name, (projection, cache, active, *losses) in PRINTED.items():
        kind = "linear" if isinstance(projection, Latent) else "mlp"
        plain = AttentionConfig(projection=projection)
        pair = {name: plain, f"{name}_{kind}": plain.replace(**KNOCKING[kind])}
        for (row, attention), loss in zip(pair.items(), losses):
            sizes = {"cache": cache}
            if row == name:
                sizes |= {"active": active, "note": MLA_NOTE if row == "mla" else ""}
            run = base.paper_run("moe_7b", attention=attention)
            found[row] = tables.Row(run, baseline=name, loss=loss, **sizes)
    return found


TABLE = tables.Table("Table 3: knocking on other attentions", rows())
get_config = TABLE.get_config
