"""Which token comes next. Legend: B batch, V vocabulary."""

import jax
import jax.numpy as jnp

from kha_jax.config import Config
from kha_jax.ops.attention import MASKED


class Sampling(Config):
    """softmax(logits / temperature) over the likeliest tokens; top_p is nucleus sampling (arXiv
    1904.09751)."""

    temperature: float = 0.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int | None = None
    """Draw among that many likeliest tokens; None: among all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability."""

    def validate(self):
        self.at_least(0, "temperature")
        self.at_least(1, "top_k")
        self.require(0 < self.top_p <= 1, "top_p", f"must be in (0, 1], found {self.top_p}")
        for field, idle in (("top_k", self.top_k is None), ("top_p", self.top_p == 1.0)):
            problem = (
                f"does nothing with temperature=0, found {getattr(self, field)}; set a temperature"
            )
            self.require(idle or self.temperature > 0, field, problem)


def sample(logits_BV: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """Token ids [B] drawn from the logits."""
    if sampling.temperature == 0:
        return likeliest(logits_BV)
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k is not None:
        least = jax.lax.top_k(logits_BV, min(sampling.top_k, logits_BV.shape[-1]))[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least, MASKED, logits_BV)
    if sampling.top_p < 1:
        descending = -jnp.sort(-logits_BV, axis=-1)
        p = jax.nn.softmax(descending, axis=-1)
        # those before a token leave it room, so one always stays
        chosen = jnp.cumsum(p, axis=-1) - p < sampling.top_p
        least = jnp.min(jnp.where(chosen, descending, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least, MASKED, logits_BV)
    return jax.random.categorical(key, logits_BV, axis=-1).astype(jnp.int32)


def draw(logits_BV: jax.Array, key: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
    """Token ids [B] and the key of the next draw; the likeliest token takes none."""
    key, now = jax.random.split(key) if sampling.temperature > 0 else (key, key)
    return sample(logits_BV, now, sampling), key


def likeliest(logits_BV: jax.Array) -> jax.Array:
    """The first of the largest over the last axis. XLA's CPU backend does not vectorise argmax, but
    it does this."""
    V = logits_BV.shape[-1]
    largest = logits_BV == jnp.max(logits_BV, axis=-1, keepdims=True)
    # nothing equals the largest where it is no number
    return jnp.minimum(jnp.min(jnp.where(largest, jnp.arange(V), V), axis=-1), V - 1)
