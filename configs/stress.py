"""Figures 1 (right) and 2 of the paper on purpose: a learning rate ten times the usual one after
next to no warm-up, which makes losses spike within minutes.

    python -m experiments.train --config=configs/stress.py:baseline.tiny --workdir=runs/stressed
    python -m experiments.sweep --table=stress --scale=tiny --seeds=3 --out=runs/stress

Rows: baseline, linear (on queries, keys and values), mlp (on values). The paper says that knocking
lowers the number of spikes; it prints no count.
"""

from configs import base, tables


def row(variant: str) -> tables.Row:
    """The run of table 2, stressed."""
    run = base.paper_run(
        "moe_7b", tables.EXPLORED_TOKENS, base.varied(base.PAPER_ATTENTION, variant)
    )
    raised = run.optimizer.replace(
        learning_rate=10 * run.optimizer.learning_rate, warmup_fraction=0.01
    )
    return tables.Row(run.replace(optimizer=raised))


TABLE = tables.Table(
    "Stress: ten times the learning rate",
    {name: row(name) for name in ("baseline", "linear", "mlp")},
)
get_config = TABLE.get_config
