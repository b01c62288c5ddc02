"""Figures 1 (right) and 2 of the paper on purpose: four times the usual learning rate after next to
no warm-up, gradients that are not clipped, queries and keys that are not normed.

    python -m experiments.train --config=configs/stress.py:baseline.tiny --workdir=runs/stressed
    python -m experiments.sweep --table=stress --scale=tiny --seeds=3 --out=runs/stress

Rows: baseline, linear (on queries, keys and values), mlp (on values). The paper says that knocking
lowers the number of spikes; it prints no count. With clipping and norms even ten times the learning
rate makes no spikes at tiny scale.
"""

from configs import base, tables

PLAIN = base.PAPER_ATTENTION.replace(
    projection=base.PAPER_ATTENTION.projection.replace(qk_norm="none")
)


def row(variant: str) -> tables.Row:
    """The run of table 2, stressed."""
    run = base.paper_run("moe_7b", tables.EXPLORED_TOKENS, base.varied(PLAIN, variant))
    raised = run.optimizer.replace(
        learning_rate=4 * run.optimizer.learning_rate, warmup_fraction=0.01, clip_norm=1e6
    )
    return tables.Row(run.replace(optimizer=raised))


TABLE = tables.Table(
    "Stress: four times the learning rate, no clipping, no norm of queries and keys",
    {name: row(name) for name in ("baseline", "linear", "mlp")},
)
get_config = TABLE.get_config
