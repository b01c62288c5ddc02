"""A dense model of the paper (table 5): 1.68B parameters, 100B tokens.

    python -m experiments.train --config=configs/dense_2b.py --workdir=FOLDER
    python -m experiments.plan --config=configs/dense_2b.py --topology=v5e-64

Variants: mlp (default: KHA-MLP on values), linear (KHA-Linear on q, k, v), gate, baseline.
"""

from configs import base
from kha_jax.feed_forward import SwiGLU

get_config = base.pretraining(layers=24, width=2048, feed_forward=SwiGLU(width=6144), tokens=10**11)
