"""The paper's main run: 6.1B parameters, 1.0B active, 128 experts of which 8 are active, 1T tokens,
4.2M a step (section 4.1).

    python -m experiments.train --config=configs/kha_moe_6b.py --config.data.source=python_source \\
        --workdir=FOLDER
    python -m experiments.plan --config=configs/kha_moe_6b.py --topology=v5p-128 --fastest

Variants: mlp (default: KHA-MLP on values), linear (KHA-Linear on q, k, v), gate, baseline.

PRESETS says what `--config.mesh.preset=SLICE` sets beside it: what --fastest --nocompile ranks
first, the fastest to expect of what fits with room to spare.
"""

from configs import base

PRESETS = {
    "v5p-64": {"model.remat": "inner", "accumulation": 2},
    "v5p-128": {"model.remat": "inner", "accumulation": 1},
    "v5e-64": {"model.remat": "projections", "accumulation": 4},
    "v5e-256": {"model.remat": "projections", "accumulation": 1},
    "v6e-64": {"model.remat": "projections", "accumulation": 2},
    "v6e-256": {"model.remat": "inner", "accumulation": 1},
}
get_config = base.pretraining("kha_moe_6b", tokens=10**12)
