"""What a run is and does: its config (here), the compiled step, the optimizer, what is traced.

The config alone needs neither optax nor grain.
"""

from kha_jax.training.run_config import (
    CheckpointConfig,
    EvaluationConfig,
    MixerOptimizerConfig,
    OptimizerConfig,
    ProfileConfig,
    RunConfig,
)

__all__ = [
    "CheckpointConfig",
    "EvaluationConfig",
    "MixerOptimizerConfig",
    "OptimizerConfig",
    "ProfileConfig",
    "RunConfig",
]
