"""Rotary position embedding in the half-split convention of Llama and Qwen.

Legend: B batch, T position, N heads, R rotary width.
"""

import jax
import jax.numpy as jnp


def rotate(x_BTNR: jax.Array, positions_BT: jax.Array, theta: float) -> jax.Array:
    """Rotates feature pairs (i, i + R/2) by position * theta^(-2i/R) (Su et al., arXiv 2104.09864).

    Args:
        x_BTNR: queries or keys; R must be even.
        positions_BT: position of every token inside its document.
        theta: base of the geometric frequencies.

    Returns:
        The rotated array in the dtype of x_BTNR; angles and products are float32.
    """
    half = x_BTNR.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions_BT[..., None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x_BTNR.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNR.dtype)
