"""What differs between two configs of a run, and what of it may."""

from typing import Any

from kha_jax.config import differences
from kha_jax.training.run_config import RunConfig
from kha_jax.training.run_folder import FREE

# Of the model, those that may be allowed to change: they decide how it is computed or trained. The
# others decide which function it is.
COMPUTED = (
    "model.stack",
    "model.remat",
    "model.loss.",
    "model.numerics.dtype",
    "model.feed_forward.kernel",
    "model.feed_forward.chunk_tokens",
    "model.feed_forward.balancing",
    "model.feed_forward.router_z_loss",
    "model.attention.query.apply",
    "model.attention.key.apply",
    "model.attention.value.apply",
)


def settings(old: RunConfig, new: RunConfig) -> list[str]:
    """The flags that make config `new` of config `old`."""
    differing = differences(old, new, "config")
    return [f"--{field}={now}" for field, (_, now) in differing.items() if now is not None]


def changed(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Fields that decide what is learnt and differ, with both values."""
    differing = differences(old, new)
    return {field: both for field, both in differing.items() if not field.startswith(FREE)}
