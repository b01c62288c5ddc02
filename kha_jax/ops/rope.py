"""Rotary position embedding in the half-split convention of Llama and Qwen.

Legend: B batch, T position, N heads, R rotary width.
"""

import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata


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
    cos, sin = jax.lax.platform_dependent(angle, cpu=_once, default=_cos_sin)
    first, second = jnp.split(x_BTNR.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNR.dtype)


def _cos_sin(angle):
    return jnp.cos(angle), jnp.sin(angle)


def _once(angle):
    """As a call of its own: XLA's CPU backend otherwise fuses both into what reads them and
    evaluates them again for every head and each half of it."""
    with set_xla_metadata(inlineable="false"):
        return jax.jit(_cos_sin)(angle)
