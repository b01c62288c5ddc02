"""Rotary position embedding in the half-split convention of Llama and Qwen.

Legend: B batch, T position, N heads, R rotary width.
"""

import functools

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
    # Fenced off: XLA's CPU backend would evaluate them again for every head.
    return _turn(x_BTNR, *jax.lax.optimization_barrier((jnp.cos(angle), jnp.sin(angle))))


# The gradient is written out: it is the rotation back, which autodiff would build from padded
# halves.
@jax.custom_vjp
def _turn(x, cos, sin):
    """x [cos | cos] + (x with its halves swapped) [-sin | sin]."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    join = functools.partial(jnp.concatenate, axis=-1)
    turned = x * join([cos, cos]) + join([second, first]) * join([-sin, sin])
    return turned.astype(x.dtype)


_turn.defvjp(
    lambda x, cos, sin: (_turn(x, cos, sin), (cos, sin)),
    lambda angle, d_out: (_turn(d_out, angle[0], -angle[1]), None, None),
)
