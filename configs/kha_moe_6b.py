"""The paper's main run: 6.1B parameters, 1.0B active, 128 experts of which 8 are active, 1T tokens,
4.2M a step (section 4.1).

    python -m experiments.train --config=configs/kha_moe_6b.py --workdir=FOLDER
    python -m experiments.plan --config=configs/kha_moe_6b.py --topology=v5p-128

Variants: mlp (default: KHA-MLP on values), linear (KHA-Linear on q, k, v), gate, baseline.
"""

from configs import base

get_config = base.pretraining("kha_moe_6b", tokens=10**12)
