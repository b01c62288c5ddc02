"""Folds linear mixers into the weights around them, after which the model is a plain baseline.

x (W T) = (x W) T: T_q, T_k and T_v go into the weights that make the stream, whatever the
projection (paper, equation 8): W_Q, W_K, W_V for grouped queries, the tied state's weights for GTA,
the query and up-projections for MLA and GLA. An MLP or a gate is not linear in its stream and
cannot be folded.
"""

from typing import Any

import jax
import jax.numpy as jnp

from kha_jax.attention.attention import SLOTS, AttentionConfig
from kha_jax.attention.mixers import KnockingLinear, NoMixer
from kha_jax.config import ConfigError


def foldable(config: AttentionConfig) -> list[str]:
    """The slots that hold a mixer to fold.

    Raises:
        ConfigError: names a slot whose mixer is not linear, with the reason.
    """
    slots = [slot for slot in SLOTS if type(getattr(config, slot)) is not NoMixer]
    for slot in slots:
        mixer = getattr(config, slot)
        if not mixer.linear:
            raise ConfigError(
                f"{slot}.kind",
                f"{type(mixer).__name__} is not linear in its stream, so no weights can stand "
                "for it",
            )
    return slots


def matrix(config: KnockingLinear, parameters: dict[str, jax.Array]) -> jax.Array:
    """T [..., H, H] in float32 from a linear mixer's parameters."""
    if config.parameterization == "direct":
        return parameters["kernel"].astype(jnp.float32)
    residual = parameters["residual"].astype(jnp.float32)
    return config.diag_init * jnp.eye(residual.shape[-1]) + residual


def absorb(
    config: AttentionConfig, parameters: dict[str, Any]
) -> tuple[AttentionConfig, dict[str, Any]]:
    """The baseline config and parameters that compute the same attention.

    Args:
        config: any projection with linear mixers or none.
        parameters: of one attention layer, or of a stack of layers with a leading axis. Products
            are float32, then cast back.

    Raises:
        ConfigError: a mixer is not linear.
    """
    projection = dict(parameters["projection"])
    slots = foldable(config)
    for slot in slots:
        name = config.projection.stream_weights[slot]
        weights, T = projection[name], matrix(getattr(config, slot), parameters[f"{slot}_mixer"])
        stacked = T.ndim == 3
        fold = jax.vmap(_fold) if stacked else _fold
        projection[name] = fold(weights, T)
    rest = {
        name: leaf
        for name, leaf in parameters.items()
        if name not in [f"{slot}_mixer" for slot in slots]
    }
    return config.replace(**{slot: NoMixer() for slot in slots}), {**rest, "projection": projection}


def _fold(weights: jax.Array, T: jax.Array) -> jax.Array:
    product = jnp.matmul(weights.astype(jnp.float32), T, precision=jax.lax.Precision.HIGHEST)
    return product.astype(weights.dtype)
