"""A dense model of the paper (table 5): 0.61B parameters, 100B tokens.

    python -m experiments.train --config=configs/dense_600m.py --workdir=FOLDER
    python -m experiments.plan --config=configs/dense_600m.py --topology=v5e-64

Variants: mlp (default: KHA-MLP on values), linear (KHA-Linear on q, k, v), gate, baseline.
"""

from configs import base
from kha_jax.feed_forward import SwiGLU

get_config = base.pretraining(layers=24, width=1024, feed_forward=SwiGLU(width=3072), tokens=10**11)
