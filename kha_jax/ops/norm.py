"""Root-mean-square normalisation."""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: jax.Array, scale: jax.Array, eps: float = 1e-6) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis (Zhang and Sennrich, arXiv 1910.07467).

    The gradient is written out so that only x and one number per row are kept for the backward
    pass.

    Args:
        x: any shape ending in the normalised axis; the statistics are taken in float32.
        scale: [last axis of x], one weight per feature.
        eps: added to the mean square.

    Returns:
        The normalised array in the dtype of x.
    """
    return _forward(x, scale, eps)[0]


def inverse_rms(x: jax.Array, eps: float) -> jax.Array:
    """1 / sqrt(mean(x^2) + eps) over the last axis, which stays as one entry, in float32."""
    return jax.lax.rsqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True) + eps)


def _forward(x, scale, eps):
    x_f32 = x.astype(jnp.float32)
    inverse = inverse_rms(x, eps)
    return (x_f32 * inverse * scale.astype(jnp.float32)).astype(x.dtype), (x, scale, inverse)


def _backward(eps, residuals, d_out):
    x, scale, inverse = residuals
    normalised = x.astype(jnp.float32) * inverse
    d_scale = jnp.sum(d_out.astype(jnp.float32) * normalised, axis=tuple(range(x.ndim - 1)))
    d_normalised = d_out.astype(jnp.float32) * scale.astype(jnp.float32)
    projection = jnp.mean(d_normalised * normalised, axis=-1, keepdims=True)
    d_x = inverse * (d_normalised - normalised * projection)
    return d_x.astype(x.dtype), d_scale.astype(scale.dtype)


rms_norm.defvjp(_forward, _backward)
