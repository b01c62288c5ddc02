"""A mixture of the paper's exploration (tables 1 to 3): 6.6B parameters, 0.88B active, 64 experts
of which 4 are active, 75B tokens.

    python -m experiments.train --config=configs/moe_7b.py --workdir=FOLDER
    python -m experiments.plan --config=configs/moe_7b.py --topology=v5p-64

Variants: mlp (default: KHA-MLP on values), linear (KHA-Linear on q, k, v), gate, baseline.
"""

from configs import base

get_config = base.pretraining("moe_7b", tokens=75 * 10**9)
