"""Table 2 of the paper: what knocks (a linear map, a gate, an MLP) and where (queries, keys,
values, all), in the 6.6B mixture with GQA 32/4, 75B tokens.

    python -m experiments.train --config=configs/table2.py:mlp_v.tiny --workdir=runs/mlp_v
    python -m experiments.sweep --table=2 --scale=tiny --seeds=3 --out=runs/table2

Rows: baseline, linear_q, linear_k, linear_v, linear_qkv, gate_v, mlp_q, mlp_k, mlp_v, mlp_qkv, at
the paper's size; ROW.small for one GPU, ROW.tiny for two minutes on two CPU cores.
"""

from configs import base, tables
from kha_jax.attention.mixers import KnockingGate, KnockingLinear, KnockingMLP

SLOTS = {"q": "query", "k": "key", "v": "value"}
MIXERS = {"linear": KnockingLinear(), "gate": KnockingGate(), "mlp": KnockingMLP()}
LOSSES = {
    "baseline": 1.856,
    "linear_q": 1.849,
    "linear_k": 1.848,
    "linear_v": 1.839,
    "linear_qkv": 1.838,
    "gate_v": 1.919,
    "mlp_q": 1.848,
    "mlp_k": 1.848,
    "mlp_v": 1.832,
    "mlp_qkv": 1.832,
}


def mixers(name: str) -> dict:
    """The mixers of KIND_PLACES, each slot's by its name."""
    kind, _, places = name.partition("_")
    return {SLOTS[place]: MIXERS[kind] for place in places}


TABLE = tables.Table(
    "Table 2: type and place of what knocks",
    {
        name: tables.Row(
            base.paper_run(
                "moe_7b", tables.EXPLORED_TOKENS, base.PAPER_ATTENTION.replace(**mixers(name))
            ),
            loss=loss,
        )
        for name, loss in LOSSES.items()
    },
)
get_config = TABLE.get_config
