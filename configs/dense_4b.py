"""A dense model of the paper (table 5): 3.94B parameters, 100B tokens.

    python -m experiments.train --config=configs/dense_4b.py --workdir=FOLDER
    python -m experiments.plan --config=configs/dense_4b.py --topology=v5p-64

Variants: mlp (default: KHA-MLP on values), linear (KHA-Linear on q, k, v), gate, baseline.
"""

from configs import base
from kha_jax.config import to_config_dict
from kha_jax.feed_forward import SwiGLU


def get_config(variant: str = "mlp"):
    """The run; `variant` is a key of configs.base.KNOCKING."""
    feed_forward = SwiGLU(width=9728)
    run = base.pretraining(variant, layers=36, width=2560, feed_forward=feed_forward, tokens=10**11)
    return to_config_dict(run)
