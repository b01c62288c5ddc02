"""The paper's main run: 6.1B parameters, 1.0B active, 128 experts of which 8 are active, 1T tokens,
4.2M a step (section 4.1).

    python -m experiments.train --config=configs/kha_moe_6b.py --workdir=FOLDER
    python -m experiments.plan --config=configs/kha_moe_6b.py --topology=v5p-128

Variants: mlp (default: KHA-MLP on values), linear (KHA-Linear on q, k, v), gate, baseline.
"""

from configs import base
from kha_jax.moe import MoE

get_config = base.pretraining(
    layers=18,
    width=2048,
    feed_forward=MoE(experts=128, top_k=8, width=384, chunk_tokens=4096),
    tokens=10**12,
    seq_len=8192,
    learning_rate=4.78e-4,
)
