"""A dense model of the paper (table 5): 0.61B parameters, 100B tokens.

    python -m experiments.train --config=configs/dense_600m.py --workdir=FOLDER
    python -m experiments.plan --config=configs/dense_600m.py --topology=v5e-64

Variants: mlp (default: KHA-MLP on values), linear (KHA-Linear on q, k, v), gate, baseline.
"""

from configs import base
from kha_jax.config import to_config_dict
from kha_jax.feed_forward import SwiGLU


def get_config(variant: str = "mlp"):
    """The run; `variant` is a key of configs.base.KNOCKING."""
    feed_forward = SwiGLU(width=3072)
    run = base.pretraining(variant, layers=24, width=1024, feed_forward=feed_forward, tokens=10**11)
    return to_config_dict(run)
