"""What one looks at in a small matrix T[..., n, m], with any leading axes such as layers."""

import jax
import jax.numpy as jnp


def diagonal_mean(T: jax.Array) -> jax.Array:
    """The mean diagonal entry, [...]: 1 for the identity."""
    return jnp.diagonal(T, axis1=-2, axis2=-1).mean(-1)


def off_diagonal_share(T: jax.Array) -> jax.Array:
    """The share of the squared entries that lies off the diagonal, [...]: 0 for a diagonal matrix
    (and for none at all), 1 for a hollow one, 1 - 1/n for equal entries."""
    total = jnp.sum(T**2, (-2, -1))
    on = jnp.sum(jnp.diagonal(T, axis1=-2, axis2=-1) ** 2, -1)
    return jnp.where(total > 0, 1 - on / jnp.where(total > 0, total, 1), 0)


def identity_distance(T: jax.Array) -> jax.Array:
    """|T - I| / |I| in the Frobenius norm, [...]: 0 for the identity, 1 for zeros."""
    identity = jnp.eye(*T.shape[-2:], dtype=T.dtype)
    return jnp.linalg.norm(T - identity, axis=(-2, -1)) / jnp.linalg.norm(identity)


def spectral_norm(T: jax.Array, squarings: int = 6) -> jax.Array:
    """The largest singular value, [...], from below: 2^squarings power iterations on T^T T, as so
    many squarings of it, which are matrix products and need no loop. Exact for the identity;
    0.2% below on average, 3% at worst, for random entries, which converge slowest (128 x 128)."""

    def product(A, B):
        return jnp.matmul(A, B, precision=jax.lax.Precision.HIGHEST)

    # Fixed, and in no direction that a structured matrix would be blind to.
    start = jnp.cos(jnp.arange(1.0, T.shape[-1] + 1) ** 2).astype(T.dtype)[:, None]
    power = product(T.mT, T)
    for _ in range(squarings):
        size = jnp.linalg.norm(power, axis=(-2, -1), keepdims=True)
        power = power / jnp.where(size > 0, size, 1)
        power = product(power, power)
    v = product(power, start)
    length = jnp.linalg.norm(v, axis=(-2, -1))
    image = jnp.linalg.norm(product(T, v), axis=(-2, -1))
    return image / jnp.where(length > 0, length, 1)
