"""The peers: every way for heads to interact in the paper's 6.6B mixture, 75B tokens. The paper
compares them in words and ticks; nothing of this table is printed but three losses of table 2.

    python -m experiments.train --config=configs/table6.py:talking.tiny --workdir=runs/talking
    python -m experiments.sweep --table=6 --scale=tiny --seeds=3 --out=runs/table6

Rows: those of configs.base.variants.
"""

from configs import base, tables

PRINTED = {"baseline": 1.856, "mlp": 1.832, "linear": 1.838, "gate": 1.919}
TABLE = tables.Table(
    "Table 6: the ways for heads to interact",
    {
        name: tables.Row(
            base.paper_run(
                "moe_7b", tables.EXPLORED_TOKENS, base.varied(base.PAPER_ATTENTION, name)
            ),
            loss=PRINTED.get(name),
        )
        for name in base.variants(base.PAPER_ATTENTION)
    },
)
get_config = TABLE.get_config
