"""Rotary position embedding in the half-split convention of Llama and Qwen.

Legend: B batch, T position, N heads, H head width, R rotary width.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.xla_metadata import set_xla_metadata


def frequencies(theta: float, width: int) -> np.ndarray:
    """theta^(-2i/R) [R/2] in float64, R = width (Su et al., arXiv 2104.09864)."""
    half = width // 2
    return theta ** (-np.arange(half) / half)


def rotate(
    x_BTNH: jax.Array, positions_BT: jax.Array, frequencies: np.ndarray, factor: float = 1.0
) -> jax.Array:
    """Rotates feature pairs (i, i + R/2) of the first R features by position * frequency i.

    Args:
        x_BTNH: queries or keys; features from R on stay as they are.
        positions_BT: position of every token inside its document.
        frequencies: [R/2], on the host and so a constant of the program; none: nothing turns.
        factor: on cos and sin.

    Returns:
        The rotated array in the dtype of x_BTNH; angles and products are float32.
    """
    half = len(frequencies)
    if half == 0:
        return x_BTNH
    angle = positions_BT[..., None, None].astype(jnp.float32) * np.float32(frequencies)
    cos, sin = jax.lax.platform_dependent(angle, cpu=_once, default=_cos_sin)
    cos, sin = cos * factor, sin * factor
    turned, rest = x_BTNH[..., : 2 * half], x_BTNH[..., 2 * half :]
    first, second = jnp.split(turned.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([rotated.astype(x_BTNH.dtype), rest], axis=-1)


def _cos_sin(angle):
    return jnp.cos(angle), jnp.sin(angle)


def _once(angle):
    """As a call of its own: XLA's CPU backend otherwise fuses both into what reads them and
    evaluates them again for every head and each half of it."""
    with set_xla_metadata(inlineable="false"):
        return jax.jit(_cos_sin)(angle)
