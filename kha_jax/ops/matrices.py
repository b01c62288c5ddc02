"""What one looks at in a small matrix T[..., n, m], with any leading axes such as layers."""

import jax
import jax.numpy as jnp

POWER_ITERATIONS = 6


def diagonal_mean(T: jax.Array) -> jax.Array:
    """The mean diagonal entry, [...]: 1 for the identity."""
    return jnp.diagonal(T, axis1=-2, axis2=-1).mean(-1)


def off_diagonal_share(T: jax.Array) -> jax.Array:
    """The share of the squared entries that lies off the diagonal, [...]: 0 for a diagonal matrix
    (and for none at all), 1 for a hollow one, 1 - 1/n for equal entries."""
    total = jnp.sum(T**2, (-2, -1))
    on = jnp.sum(jnp.diagonal(T, axis1=-2, axis2=-1) ** 2, -1)
    return jnp.where(total > 0, 1 - on / jnp.where(total > 0, total, 1), 0)


def spectral_norm(T: jax.Array, iterations: int = POWER_ITERATIONS) -> jax.Array:
    """The largest singular value, [...], from below: a few power iterations on T^T T, which cost
    4 n m FLOPs each. Within a few per cent when the spectrum falls, exact for the identity."""
    # Fixed, and in no direction that a structured matrix would be blind to.
    v = jnp.cos(jnp.arange(1.0, T.shape[-1] + 1) ** 2).astype(T.dtype)
    v = jnp.broadcast_to(v, (*T.shape[:-2], T.shape[-1]))
    for _ in range(iterations):
        v = v / jnp.maximum(jnp.linalg.norm(v, axis=-1, keepdims=True), 1e-30)
        v = jnp.einsum("...nm,...n->...m", T, jnp.einsum("...nm,...m->...n", T, v))
    return jnp.sqrt(jnp.linalg.norm(v, axis=-1))
