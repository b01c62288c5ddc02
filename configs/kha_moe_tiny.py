"""A 3.2M-parameter mixture of 16 experts, 4 active, with KHA-MLP on values: five minutes on two CPU cores.

    python -m experiments.train --config=configs/kha_moe_tiny.py --workdir=runs/kha_moe_tiny

Variants as in kha_tiny. The progress line shows MaxVio, the largest excess load over the mean of any layer; the default balancing brings it
under 0.2 within 300 steps. To compare: --config.model.feed_forward.balancing=sign (sign_centred, auxiliary, none).
"""

from configs import kha_tiny
from kha_jax.config import from_dict, to_config_dict
from kha_jax.moe import MoE
from kha_jax.training import RunConfig


def get_config(variant: str = "mlp"):
    """kha_tiny with experts of a third of its feed-forward width."""
    run = from_dict(RunConfig, kha_tiny.get_config(variant))
    return to_config_dict(run.replace(model=run.model.replace(feed_forward=MoE(experts=16, top_k=4, width=128))))
