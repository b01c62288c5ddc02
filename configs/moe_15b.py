"""A mixture of the paper's exploration (table 5): 14.6B parameters, 1.6B active, 64 experts of
which 4 are active, 100B tokens.

    python -m experiments.train --config=configs/moe_15b.py --workdir=FOLDER
    python -m experiments.plan --config=configs/moe_15b.py --topology=v5p-128

Variants: mlp (default: KHA-MLP on values), linear (KHA-Linear on q, k, v), gate, baseline.
"""

from configs import base

get_config = base.pretraining("moe_15b")
