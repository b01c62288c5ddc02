"""A mixture of the paper's exploration (table 5): 2.3B parameters, 0.44B active, 64 experts of
which 4 are active, 100B tokens.

    python -m experiments.train --config=configs/moe_2b.py --workdir=FOLDER
    python -m experiments.plan --config=configs/moe_2b.py --topology=v5e-64

Variants: mlp (default: KHA-MLP on values), linear (KHA-Linear on q, k, v), gate, baseline.
"""

from configs import base

get_config = base.pretraining("moe_2b")
