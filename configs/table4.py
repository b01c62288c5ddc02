"""Table 4 of the paper: the main run, 6.1B parameters of which 1.0B are active, 1T tokens. The
printed scores of both runs are in SCORES; the loss of the knocking run is 0.015 below the
baseline's (section 4.3), neither is printed.

    python -m experiments.train --config=configs/table4.py:mlp --workdir=FOLDER
    python -m experiments.plan --config=configs/table4.py:mlp --topology=v5p-128

Rows: baseline, mlp (on values).
"""

from configs import base, tables

# task -> score of the baseline, of KHA-MLP
SCORES = {
    "ARC-challenge": (53.56, 55.25),
    "AGIEval": (32.97, 31.33),
    "HellaSwag": (62.44, 62.13),
    "WinoGrande": (60.85, 63.77),
    "PIQA": (76.39, 74.86),
    "MMLU": (51.22, 51.24),
    "MMLU-Pro": (23.42, 21.62),
    "CMMLU": (47.52, 47.32),
    "C-Eval": (49.07, 47.02),
    "CommonsenseQA": (59.05, 59.54),
    "GPQA": (26.26, 27.27),
    "RACE-middle": (69.08, 73.40),
    "RACE-high": (61.89, 66.21),
    "HumanEval-Plus": (35.98, 43.29),
    "MBPP": (35.60, 37.60),
    "MBPP-Plus": (43.12, 45.50),
    "GSM8K": (46.17, 47.16),
    "MATH": (32.66, 33.44),
    "CMATH": (66.30, 69.40),
    "average": (49.13, 50.39),
}


def row(variant: str) -> tables.Row:
    """The main run."""
    attention = base.varied(base.PAPER_ATTENTION, variant)
    run = base.paper_run("kha_moe_6b", tokens=10**12, attention=attention)
    return tables.Row(run, active="1.01B", total="6.1B")


TABLE = tables.Table("Table 4: the main run", {name: row(name) for name in ("baseline", "mlp")})
get_config = TABLE.get_config
