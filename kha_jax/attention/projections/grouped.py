"""Queries, keys and values straight from x: grouped queries, and grouped tied states.

Legend: B batch, T query position, S key position, D model width, N query heads, K key/value heads,
H head width.
"""

from typing import Literal

import flax.linen as nn
import jax.numpy as jnp

from kha_jax.attention.mixers import StreamMixer
from kha_jax.attention.projections.base import (
    Projection,
    ProjectionModule,
    by_head,
    by_row,
    cached_heads,
    why_not_shared,
)
from kha_jax.attention.projections.rotary import ROPE_SCALINGS, NoScaling, RopeScaling
from kha_jax.config import choice
from kha_jax.modules import RMSNorm
from kha_jax.ops.linear import linear
from kha_jax.sharding import constrain


class GroupedQuery(Projection):
    """q = x W_Q, k = x W_K, v = x W_V with N query and K key/value heads (arXiv 2305.13245).

    K = N is multi-head attention, K = 1 multi-query attention. The q/k norm (Qwen3) comes after the
    mixers and before rotary.
    """

    stream_weights = {"query": "query", "key": "key", "value": "value"}
    cache_fields = ("kv_heads", "head_dim")
    keys_only = ("key", "key_factor")
    query_heads: int = 8
    """Query heads, N."""
    kv_heads: int = 4
    """Key/value heads, K; a divisor of N, unless mixers make other numbers of them."""
    head_dim: int = 64
    """Width of a head, H; even."""
    qk_norm: Literal["rms", "none"] = "rms"
    """RMS norm over H of queries and keys, one weight for all heads; or none."""
    bias: Literal["none", "qkv"] = "none"
    """Biases of queries, keys and values, zero at the start (Qwen2); mixers act on them too."""
    rope_dim: int | None = None
    """First features of a query and key that are rotated, R, even; None: all, 0: no positions."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling = choice(ROPE_SCALINGS, NoScaling())
    """What becomes of the frequencies in rows longer than those of training."""

    def validate(self):
        self.at_least(1, "query_heads", "kv_heads", "head_dim")
        self.at_least(self.rope_scaling.smallest_theta, "rope_theta")
        R, H = self.rotary_width, self.head_dim
        problem = f"must be even for rotary embedding, found {H}"
        self.require(R != H or H % 2 == 0, "head_dim", problem)
        problem = f"must be even and at most head_dim={H}, found {R}"
        self.require(R % 2 == 0 and 0 <= R <= H, "rope_dim", problem)
        plain = self.rope_theta == 10_000.0 and isinstance(self.rope_scaling, NoScaling)
        problem = "rotates nothing with 0, so leave out rope_theta and rope_scaling"
        self.require(R > 0 or plain, "rope_dim", problem)

    @property
    def rotary_width(self) -> int:
        """Features of a query and key that are rotated, R."""
        return self.head_dim if self.rope_dim is None else self.rope_dim

    def streams(self, width):
        rows = width + (self.bias == "qkv")
        kv = (self.kv_heads, self.head_dim, rows)
        return {"query": (self.query_heads, self.head_dim, rows), "key": kv, "value": kv}

    def rotary(self):
        return dict.fromkeys(("query", "key"), (0, self.rotary_width))

    def why_not_heads(self, read):
        return why_not_shared(self.query_heads, read, "key", "value")

    def with_heads(self, read):
        return self.replace(kv_heads=read)

    def output_shape(self):
        return self.query_heads, self.head_dim

    def parameters(self, width):
        norms = 2 * self.head_dim if self.qk_norm == "rms" else 0
        biases = self._features if self.bias == "qkv" else 0
        return width * self._features + biases + norms

    def flops(self, width):
        return 2 * width * self._features

    @property
    def _features(self) -> int:
        return (self.query_heads + 2 * self.kv_heads) * self.head_dim

    def normed_late(self, key: StreamMixer) -> bool:
        """Whether keys are composed when they are read, the k norm's factor cached beside them."""
        return self.qk_norm == "rms" and key.normed_late(self.kv_heads)

    def cache_floats(self, mixers):
        K = self.kv_heads
        heads = sum(cached_heads(mixers[slot], K) for slot in ("key", "value"))
        factors = mixers["key"].heads(K) if self.normed_late(mixers["key"]) else 0
        return heads * self.head_dim + factors

    @property
    def module(self):
        return GroupedQueryModule


class GroupedQueryModule(ProjectionModule):
    """See GroupedQuery. State: key and value [B, S, K, H], final but for mixers that act late.

    Where those compose keys under a k norm, the keys carry the norm's weight and `key_factor` [B,
    S, K read, 1] its 1/rms: rotation commutes with mixing heads, so key_factor * compose(key) is
    exact.
    """

    config: GroupedQuery

    def setup(self):
        c, D = self.config, self.width
        self.query = self._affine("query", embed=D, heads=c.query_heads, head_dim=c.head_dim)
        self.key = self._affine("key", embed=D, kv_heads=c.kv_heads, head_dim=c.head_dim)
        self.value = self._affine("value", embed=D, kv_heads=c.kv_heads, head_dim=c.head_dim)
        if c.qk_norm == "rms":
            self.query_norm = RMSNorm(numerics=self.numerics, axis="head_dim")
            self.key_norm = RMSNorm(numerics=self.numerics, axis="head_dim")

    def __call__(self, x_BTD, positions_BT, mixers):
        c, factor = self.config, {}
        q_BTNH = mixers["query"].project(x_BTD, *self.query)
        k_BTKH = mixers["key"].project(x_BTD, *self.key)
        v_BTKH = mixers["value"].project(x_BTD, *self.value)
        if c.normed_late(mixers["key"].config):
            k_BTKH, factor_BTM1 = self.key_norm(k_BTKH, of=mixers["key"].read(k_BTKH, 2))
            factor = {"key_factor": factor_BTM1}
        elif c.qk_norm == "rms":
            k_BTKH = self.key_norm(k_BTKH)
        if c.qk_norm == "rms":
            q_BTNH = self.query_norm(q_BTNH)
        q_BTNH = constrain(q_BTNH, "batch", "length", "heads", None)
        k_BTKH = constrain(k_BTKH, "batch", "length", "kv_heads", None)
        v_BTKH = constrain(v_BTKH, "batch", "length", "kv_heads", None)
        q_BTNH, k_BTKH = (self.rotated(z, positions_BT, c.rotary_width) for z in (q_BTNH, k_BTKH))
        return mixers["query"].read(q_BTNH, 2), {"key": k_BTKH, "value": v_BTKH, **factor}

    def _affine(self, name, embed, **features):
        """The weights that make a stream, and its bias or None."""
        kernel = self.weight(name, embed=embed, **features)
        if self.config.bias == "none":
            return kernel, None
        return kernel, self.weight(f"{name}_bias", nn.initializers.zeros, **features)

    def keys_and_values(self, state, mixers, axis=2):
        key = mixers["key"].read(state["key"], axis)
        if "key_factor" in state:
            key = (key * state["key_factor"]).astype(key.dtype)
        return key, mixers["value"].read(state["value"], axis)

    def read(self, q_B1NH, cache, mixers):
        rows = {name: by_row(z, len(q_B1NH)) for name, z in cache.items()}
        key, value = self.keys_and_values(rows, mixers, axis=1)
        return [(q_B1NH, by_head(key))], by_head(value)


class GroupedTied(Projection):
    """One tied state serves as value and as the unrotated half of the key (GTA, arXiv 2505.21487).

    state = x W_S with K heads; v = state; k = [state[..., :H/2] | RoPE(x W_R)], one rotary key of
    H/2 for all heads; q = [q_nope | RoPE(q_rope)], halves of H. The value mixer acts on the tied
    state before the split, so the cache stays K H + H/2.
    """

    stream_weights = {"query": "query", "value": "state"}
    cache_fields = ("kv_heads", "head_dim")
    keys_only = ("rotary_key",)
    query_heads: int = 8
    """Query heads, N."""
    kv_heads: int = 4
    """Heads of the tied state, K, a divisor of N."""
    head_dim: int = 64
    """Width of a head, H, half of it rotated; a multiple of 4."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling = choice(ROPE_SCALINGS, NoScaling())
    """What becomes of the frequencies in rows longer than those of training."""

    def validate(self):
        self.at_least(1, "query_heads", "kv_heads", "head_dim")
        self.at_least(self.rope_scaling.smallest_theta, "rope_theta")
        self.require(
            self.head_dim % 4 == 0,
            "head_dim",
            f"must divide by 4 for a rotary half, found {self.head_dim}",
        )

    def streams(self, width):
        return {
            "query": (self.query_heads, self.head_dim, width),
            "value": (self.kv_heads, self.head_dim, width),
        }

    def rotary(self):
        return {"query": (self.head_dim // 2, self.head_dim)}

    def why_not(self, slot, mixer):
        if slot == "key":
            return "keys and values are one tied state here; set the mixer on value"
        return None

    def why_not_heads(self, read):
        return why_not_shared(self.query_heads, read, "value")

    def with_heads(self, read):
        return self.replace(kv_heads=read)

    def output_shape(self):
        return self.query_heads, self.head_dim

    def parameters(self, width):
        return self.flops(width) // 2

    def flops(self, width):
        return 2 * width * ((self.query_heads + self.kv_heads) * self.head_dim + self.head_dim // 2)

    def cache_floats(self, mixers):
        return cached_heads(mixers["value"], self.kv_heads) * self.head_dim + self.head_dim // 2

    @property
    def module(self):
        return GroupedTiedModule


class GroupedTiedModule(ProjectionModule):
    """See GroupedTied. State: the tied state [B, S, K, H], final but for a mixer that acts late,
    and the rotary key [B, S, 1, H/2], rotated."""

    config: GroupedTied

    def setup(self):
        c, D = self.config, self.width
        self.query = self.weight("query", embed=D, heads=c.query_heads, head_dim=c.head_dim)
        self.tied = self.weight("state", embed=D, kv_heads=c.kv_heads, head_dim=c.head_dim)
        self.rotary_key = self.weight("rotary_key", embed=D, head_dim=c.head_dim // 2)

    def __call__(self, x_BTD, positions_BT, mixers):
        half = self.config.head_dim // 2
        q_BTNH = mixers["query"].project(x_BTD, self.query)
        rotated = self.rotated(q_BTNH[..., half:], positions_BT)
        q_BTNH = jnp.concatenate([q_BTNH[..., :half], rotated], axis=-1)
        q_BTNH = constrain(mixers["query"].read(q_BTNH, 2), "batch", "length", "heads", None)
        rotary_key = self.rotated(linear(x_BTD, self.rotary_key)[:, :, None], positions_BT)
        tied = mixers["value"].project(x_BTD, self.tied)
        tied = constrain(tied, "batch", "length", "kv_heads", None)
        return q_BTNH, {"tied": tied, "rotary_key": rotary_key}

    def keys_and_values(self, state, mixers):
        tied, half = mixers["value"].read(state["tied"], 2), self.config.head_dim // 2
        rotary = jnp.broadcast_to(state["rotary_key"], (*tied.shape[:3], half))
        return jnp.concatenate([tied[..., :half], rotary], axis=-1), tied

    def read(self, q_B1NH, cache, mixers):
        half = self.config.head_dim // 2
        tied = by_head(mixers["value"].read(by_row(cache["tied"], len(q_B1NH)), 1))
        # The tied state is read whole, which is cheaper than cutting the cache in half.
        unrotated = q_B1NH.at[..., half:].set(0)
        return [(unrotated, tied.swapaxes(1, 2)), (q_B1NH[..., half:], cache["rotary_key"])], tied
