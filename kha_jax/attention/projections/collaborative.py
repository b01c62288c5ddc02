"""Queries and keys that all heads share, each head weighing their features.

Legend: B batch, T query position, S key position, D model width, N heads, C shared width, H head
width, J = C / H blocks.
"""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from kha_jax.attention.projections.base import (
    Projection,
    ProjectionModule,
    by_head,
    by_row,
    cached_heads,
)
from kha_jax.attention.projections.rotary import ROPE_SCALINGS, NoScaling, RopeScaling
from kha_jax.config import choice
from kha_jax.ops.linear import linear
from kha_jax.sharding import constrain


class Collaborative(Projection):
    """softmax((x W_Q) diag(m_n) (x W_K)^T / sqrt(H)) x W_V,n (collaborative heads, arXiv
    2006.16362).

    W_Q and W_K [D, C] serve all heads; W_V [D, N, H] is each head's own. The paper defines no
    rotary embedding: here shared queries and keys are rotated in blocks of H, each as a head would
    be, with one weight m for both features of a rotary pair. With a block for each head,
    `concatenate` starts as multi-head attention without a q/k norm. The authors' code scales by
    1 / sqrt(C / N), the same where C = N H, and has a content bias, which is left out here. Cache:
    C for keys, N H for values.
    """

    stream_weights = {"value": "value"}
    cache_fields = ("head_dim",)
    keys_only = ("key",)
    mixes_heads = True
    query_heads: int = 8
    """Heads, N."""
    head_dim: int = 64
    """Width of a value head and of a rotary block, H; even."""
    shared_dim: int | None = None
    """Width of the shared queries and keys, C, a multiple of H; N H by default."""
    mixing: Literal["concatenate", "uniform"] = "concatenate"
    """m at the start: ones on a block of each head's own, or normal(0.2)."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling = choice(ROPE_SCALINGS, NoScaling())
    """What becomes of the frequencies in rows longer than those of training."""

    def validate(self):
        self.at_least(1, "query_heads", "head_dim", "shared_dim")
        self.at_least(self.rope_scaling.smallest_theta, "rope_theta")
        H, C, whole = self.head_dim, self.shared_width, self.query_heads * self.head_dim
        self.require(H % 2 == 0, "head_dim", f"must be even for rotary embedding, found {H}")
        self.require(C % H == 0, "shared_dim", f"must be a multiple of head_dim={H}, found {C}")
        problem = f"'concatenate' needs shared_dim={whole}, a block a head, found {C}"
        remedy = f"{problem}; use 'uniform'"
        self.require(C == whole or self.mixing == "uniform", "mixing", remedy)

    @property
    def shared_width(self) -> int:
        """Width of the shared queries and keys, C."""
        return self.shared_dim or self.query_heads * self.head_dim

    def streams(self, width):
        return {"value": (self.query_heads, self.head_dim, width)}

    def why_not(self, slot, mixer):
        if slot in ("query", "key"):
            return "queries and keys belong to no head here; set the mixer on value"
        return None

    def output_shape(self):
        return self.query_heads, self.head_dim

    def key_width(self):
        return self.shared_width

    def scale(self):
        return self.head_dim**-0.5

    def parameters(self, width):
        return self.flops(width) // 2 + self.query_heads * self.shared_width // 2

    def flops(self, width):
        return 2 * width * (2 * self.shared_width + self.query_heads * self.head_dim)

    def cache_floats(self, mixers):
        return self.shared_width + cached_heads(mixers["value"], self.query_heads) * self.head_dim

    @property
    def module(self):
        return CollaborativeModule


def concatenated(key: jax.Array, shape: tuple[int, int], dtype: Any) -> jax.Array:
    """[N, C/2]: ones on the n-th of N equal blocks."""
    heads, pairs = shape
    return jnp.repeat(jnp.eye(heads, dtype=dtype), pairs // heads, axis=1)


class CollaborativeModule(ProjectionModule):
    """See Collaborative. State: the shared key [B, S, 1, C], rotated, and value [B, S, N, H]."""

    config: Collaborative

    def setup(self):
        c, D = self.config, self.width
        init = concatenated if c.mixing == "concatenate" else nn.initializers.normal(0.2)
        self.query = self.weight("query", embed=D, latent=c.shared_width)
        self.key = self.weight("key", embed=D, latent=c.shared_width)
        pairs = c.shared_width // 2
        self.mixing = self.weight("mixing", init, mixer_in=c.query_heads, mixer_out=pairs)
        self.value = self.weight("value", embed=D, heads=c.query_heads, head_dim=c.head_dim)

    def __call__(self, x_BTD, positions_BT, mixers):
        query, key = (
            self._in_blocks(linear(x_BTD, weight), positions_BT)
            for weight in (self.query, self.key)
        )
        N, half = self.config.query_heads, self.config.head_dim // 2
        mixing_NJ1h = self.mixing.reshape(N, -1, 1, half)
        q_BTNJ2h = query.reshape(*query.shape[:2], 1, -1, 2, half) * mixing_NJ1h
        q_BTNC = constrain(
            q_BTNJ2h.reshape(*query.shape[:2], N, -1), "batch", "length", "heads", None
        )
        v_BTNH = mixers["value"].project(x_BTD, self.value)
        v_BTNH = constrain(v_BTNH, "batch", "length", "heads", None)
        return q_BTNC, {"key": key[:, :, None], "value": v_BTNH}

    def _in_blocks(self, z_BTC, positions_BT):
        z_BTJH = z_BTC.reshape(*z_BTC.shape[:2], -1, self.config.head_dim)
        return self.rotated(z_BTJH, positions_BT).reshape(z_BTC.shape)

    def keys_and_values(self, state, mixers):
        value = mixers["value"].read(state["value"], 2)
        shape = (*value.shape[:3], self.config.shared_width)
        k_BSNC = jnp.broadcast_to(state["key"], shape)
        return constrain(k_BSNC, "batch", "length", "heads", None), value

    def read(self, q_B1NC, cache, mixers):
        value = mixers["value"].read(by_row(cache["value"], len(q_B1NC)), 1)
        return [(q_B1NC, cache["key"])], by_head(value)
