"""A dense model of the paper (table 5): 1.68B parameters, 100B tokens.

    python -m experiments.train --config=configs/dense_2b.py --workdir=FOLDER
    python -m experiments.plan --config=configs/dense_2b.py --topology=v5e-64

Variants: mlp (default: KHA-MLP on values), linear (KHA-Linear on q, k, v), gate, baseline.
"""

from configs import base

get_config = base.pretraining("dense_2b")
