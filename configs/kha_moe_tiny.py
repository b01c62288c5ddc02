"""A 3.6M-parameter mixture of 16 experts, 4 active, with KHA-MLP on values: six minutes on two CPU
cores.

    python -m experiments.train --config=configs/kha_moe_tiny.py --workdir=runs/kha_moe_tiny

Variants as in kha_tiny. The progress line shows MaxVio, the largest excess load over the mean in
any layer: all tokens crowd on the same four experts at first (MaxVio 3), and the default balancing
brings it under 0.2 within 300 steps. To compare:
--config.model.feed_forward.balancing=sign (sign_centred; none with
--config.model.feed_forward.balancing_rate=0). Rows are shorter and more than in kha_tiny, so that
the load of a step is less at the mercy of its documents, and the bias moves three times as far a
step as in runs of usual length.
"""

from configs import kha_tiny
from kha_jax.config import from_dict, to_config_dict
from kha_jax.feed_forward import MoE
from kha_jax.training.run_config import RunConfig


def get_config(variant: str = "mlp"):
    """kha_tiny with experts of a third of its feed-forward width."""
    run = from_dict(RunConfig, kha_tiny.get_config(variant))
    model = run.model.replace(feed_forward=MoE(experts=16, top_k=4, width=128, balancing_rate=3e-3))
    optimizer = run.optimizer.replace(learning_rate=2e-3)
    return to_config_dict(
        run.replace(steps=300, batch_size=64, seq_len=128, model=model, optimizer=optimizer)
    )
