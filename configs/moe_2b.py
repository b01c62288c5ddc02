"""A mixture of the paper's exploration (table 5): 2.3B parameters, 0.44B active, 64 experts of
which 4 are active, 100B tokens.

    python -m experiments.train --config=configs/moe_2b.py --workdir=FOLDER
    python -m experiments.plan --config=configs/moe_2b.py --topology=v5e-64

Variants: mlp (default: KHA-MLP on values), linear (KHA-Linear on q, k, v), gate, baseline.
"""

from configs import base
from kha_jax.moe import MoE

get_config = base.pretraining(
    layers=12,
    width=1152,
    feed_forward=MoE(experts=64, top_k=4, width=768, chunk_tokens=8192),
    tokens=10**11,
)
