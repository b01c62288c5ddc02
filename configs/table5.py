"""Table 5 of the paper: knocking by scale, mixtures and dense models of GQA 32/4, 100B tokens.

    python -m experiments.train --config=configs/table5.py:dense_600m_mlp.tiny --workdir=runs/dense
    python -m experiments.sweep --table=5 --scale=tiny --seeds=3 --out=runs/table5

Rows: moe_2b, moe_7b, moe_15b, dense_600m, dense_2b, dense_4b as the baseline, with _mlp (on values)
and with _linear (on queries, keys and values).
"""

from configs import base, tables

# active parameters, all, losses
PRINTED = {
    "moe_2b": ("0.44B", "2.3B", (1.896, 1.881, 1.882)),
    "moe_7b": ("0.8B", "6.6B", (1.807, 1.787, 1.791)),
    "moe_15b": ("1.6B", "14.6B", (1.762, 1.737, 1.742)),
    "dense_600m": ("0.61B", "0.61B", (2.017, 2.013, 2.007)),
    "dense_2b": ("1.68B", "1.68B", (1.892, 1.884, 1.872)),
    "dense_4b": ("3.94B", "3.94B", (1.815, 1.811, 1.807)),
}


def rows() -> dict[str, tables.Row]:
    """The baseline and both kinds of knocking at each scale."""
    found = {}
    for size, (active, total, losses) in PRINTED.items():
        for variant, loss in zip(("baseline", "mlp", "linear"), losses):
            plain = variant == "baseline"
            run = base.paper_run(size, attention=base.varied(base.PAPER_ATTENTION, variant))
            sizes = {"active": active, "total": total} if plain else {}
            found[size if plain else f"{size}_{variant}"] = tables.Row(run, size, loss, **sizes)
    return found


TABLE = tables.Table("Table 5: knocking by scale", rows())
get_config = TABLE.get_config
