"""kha_jax: attention whose heads interact, in JAX and Flax."""

__version__ = "0.1.0"
