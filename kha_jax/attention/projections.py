"""Projections: x -> queries and the state that keys and values are read from.

A projection owns its weights and their logical axes, where its streams are mixed, its q/k norms,
its rotary parts, and its state: the arrays that a decoder would cache for every token.

Legend: B batch, T query position, S key position, D model width, N query heads, K key/value heads,
H head width.
"""

import math
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from kha_jax.attention.mixers import Mixer, StreamMixer
from kha_jax.config import Config
from kha_jax.ops import rope
from kha_jax.ops.attention import cached_attention
from kha_jax.ops.linear import linear
from kha_jax.parameters import Module, RMSNorm
from kha_jax.sharding import constrain

Mixers = dict[str, Mixer]
State = dict[str, jax.Array]


class Projection(Config):
    """What attention and accounting ask of a projection; sizes are per layer.

    stream_weights: for each stream, the parameter [..., heads, H] that makes it, into which a
    linear mixer folds.
    """

    stream_weights: ClassVar[dict[str, str]] = {}

    def streams(self, width: int) -> dict[str, tuple[int, int, int]]:
        """(heads, head width, rows of the weights that make it) of each mixable stream, for a model
        of this width."""
        raise NotImplementedError

    def refusal(self, slot: str, mixer: StreamMixer) -> str | None:
        """Why this mixer cannot stand in this slot, or None."""
        return None

    def output_shape(self) -> tuple[int, int]:
        """(heads, width) of what the score kernel returns and the output projection reads."""
        raise NotImplementedError

    def key_width(self) -> int:
        """Width of queries and keys in the score kernel."""
        return self.output_shape()[1]

    def parameters(self, width: int) -> int:
        """Parameters, without the output projection."""
        raise NotImplementedError

    def flops(self, width: int) -> int:
        """Forward FLOPs per token of the projection's matrix products."""
        raise NotImplementedError

    def score_flops(self, context: float) -> float:
        """Forward FLOPs per token of q k^T and p v over `context` visible keys."""
        heads, value_width = self.output_shape()
        return 2 * heads * (self.key_width() + value_width) * context

    def cache_floats(self) -> int:
        """Numbers per token that a decoder keeps."""
        raise NotImplementedError


class GroupedQuery(Projection):
    """q = x W_Q, k = x W_K, v = x W_V with N query and K key/value heads (arXiv 2305.13245).

    K = N is multi-head attention, K = 1 multi-query attention. qk_norm: an RMS norm over H on each
    query and key head, one weight for all heads (Qwen3), after the mixers and before rotary.
    """

    stream_weights = {"query": "query", "key": "key", "value": "value"}
    query_heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    qk_norm: Literal["rms", "none"] = "rms"
    rope_theta: float = 10_000.0

    def validate(self):
        self.at_least(1, "query_heads", "kv_heads", "head_dim", "rope_theta")
        fitting = [k for k in range(1, self.query_heads + 1) if self.query_heads % k == 0]
        problem = (
            f"must divide query_heads={self.query_heads}, found {self.kv_heads}; use one of "
            f"{fitting}"
        )
        self.require(self.query_heads % self.kv_heads == 0, "kv_heads", problem)
        self.require(
            self.head_dim % 2 == 0,
            "head_dim",
            f"must be even for rotary embedding, found {self.head_dim}",
        )

    def streams(self, width):
        kv = (self.kv_heads, self.head_dim, width)
        return {"query": (self.query_heads, self.head_dim, width), "key": kv, "value": kv}

    def output_shape(self):
        return self.query_heads, self.head_dim

    def parameters(self, width):
        norms = 2 * self.head_dim if self.qk_norm == "rms" else 0
        return self.flops(width) // 2 + norms

    def flops(self, width):
        return 2 * width * (self.query_heads + 2 * self.kv_heads) * self.head_dim

    def cache_floats(self):
        return 2 * self.kv_heads * self.head_dim

    def build(self, **arguments: Any) -> "GroupedQueryProjection":
        return GroupedQueryProjection(config=self, **arguments)


class GroupedQueryProjection(Module):
    """See GroupedQuery. State: key and value, both [B, S, K, H] and final."""

    config: GroupedQuery
    width: int

    def setup(self):
        c = self.config
        self.query = self.weight(
            "query", embed=self.width, heads=c.query_heads, head_dim=c.head_dim
        )
        self.key = self.weight("key", embed=self.width, kv_heads=c.kv_heads, head_dim=c.head_dim)
        self.value = self.weight(
            "value", embed=self.width, kv_heads=c.kv_heads, head_dim=c.head_dim
        )
        if c.qk_norm == "rms":
            self.query_norm = RMSNorm(numerics=self.numerics, axis="head_dim")
            self.key_norm = RMSNorm(numerics=self.numerics, axis="head_dim")

    def __call__(
        self, x_BTD: jax.Array, positions_BT: jax.Array, mixers: Mixers
    ) -> tuple[jax.Array, State]:
        """Queries [B, T, N, H], mixed, normalised and rotated, and the state."""
        q_BTNH = mixers["query"].project(x_BTD, self.query)
        k_BTKH = mixers["key"].project(x_BTD, self.key)
        v_BTKH = mixers["value"].project(x_BTD, self.value)
        if self.config.qk_norm == "rms":
            q_BTNH, k_BTKH = self.query_norm(q_BTNH), self.key_norm(k_BTKH)
        q_BTNH = constrain(q_BTNH, "batch", "length", "heads", None)
        k_BTKH = constrain(k_BTKH, "batch", "length", "kv_heads", None)
        v_BTKH = constrain(v_BTKH, "batch", "length", "kv_heads", None)
        q_BTNH, k_BTKH = (
            rope.rotate(z, positions_BT, self.config.rope_theta) for z in (q_BTNH, k_BTKH)
        )
        return q_BTNH, {"key": k_BTKH, "value": v_BTKH}

    def keys_and_values(self, state: State, mixers: Mixers) -> tuple[jax.Array, jax.Array]:
        """Keys and values for the score kernel."""
        return state["key"], state["value"]

    def attend(
        self, q_B1NH: jax.Array, cache: State, mixers: Mixers, visible_BS: jax.Array
    ) -> jax.Array:
        """What one token's queries read from the cache, [B, 1, N, H]."""
        return cached_attention([(q_B1NH, cache["key"])], cache["value"], visible_BS)


class GroupedTied(Projection):
    """One tied state serves as value and as the unrotated half of the key (GTA, arXiv 2505.21487).

    state = x W_S with K heads; v = state; k = [state[..., :H/2] | RoPE(x W_R)], one rotary key of
    H/2 for all heads; q = [q_nope | RoPE(q_rope)], halves of H. The value mixer acts on the tied
    state before the split, so the cache stays K H + H/2.
    """

    stream_weights = {"query": "query", "value": "state"}
    query_heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    rope_theta: float = 10_000.0

    def validate(self):
        self.at_least(1, "query_heads", "kv_heads", "head_dim", "rope_theta")
        problem = f"must divide query_heads={self.query_heads}, found {self.kv_heads}"
        self.require(self.query_heads % self.kv_heads == 0, "kv_heads", problem)
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

    def refusal(self, slot, mixer):
        return (
            "keys and values are one tied state here; set the mixer on value"
            if slot == "key"
            else None
        )

    def output_shape(self):
        return self.query_heads, self.head_dim

    def parameters(self, width):
        return self.flops(width) // 2

    def flops(self, width):
        return 2 * width * ((self.query_heads + self.kv_heads) * self.head_dim + self.head_dim // 2)

    def cache_floats(self):
        return self.kv_heads * self.head_dim + self.head_dim // 2

    def build(self, **arguments: Any) -> "GroupedTiedProjection":
        return GroupedTiedProjection(config=self, **arguments)


class GroupedTiedProjection(Module):
    """See GroupedTied. State: the tied state [B, S, K, H], mixed, and the rotary key [B, S, 1,
    H/2], rotated."""

    config: GroupedTied
    width: int

    def setup(self):
        c = self.config
        self.query = self.weight(
            "query", embed=self.width, heads=c.query_heads, head_dim=c.head_dim
        )
        self.tied = self.weight("state", embed=self.width, kv_heads=c.kv_heads, head_dim=c.head_dim)
        self.rotary_key = self.weight("rotary_key", embed=self.width, head_dim=c.head_dim // 2)

    def __call__(
        self, x_BTD: jax.Array, positions_BT: jax.Array, mixers: Mixers
    ) -> tuple[jax.Array, State]:
        """Queries [B, T, N, H], mixed and half rotated, and the state."""
        half, theta = self.config.head_dim // 2, self.config.rope_theta
        q_BTNH = mixers["query"].project(x_BTD, self.query)
        q_BTNH = jnp.concatenate(
            [q_BTNH[..., :half], rope.rotate(q_BTNH[..., half:], positions_BT, theta)], axis=-1
        )
        rotary_key = rope.rotate(linear(x_BTD, self.rotary_key)[:, :, None], positions_BT, theta)
        tied = constrain(
            mixers["value"].project(x_BTD, self.tied), "batch", "length", "kv_heads", None
        )
        return constrain(q_BTNH, "batch", "length", "heads", None), {
            "tied": tied,
            "rotary_key": rotary_key,
        }

    def keys_and_values(self, state: State, mixers: Mixers) -> tuple[jax.Array, jax.Array]:
        """Keys [B, S, K, H], half of them the shared rotary key, and values: the tied state."""
        tied, half = state["tied"], self.config.head_dim // 2
        rotary = jnp.broadcast_to(state["rotary_key"], (*tied.shape[:3], half))
        return jnp.concatenate([tied[..., :half], rotary], axis=-1), tied

    def attend(
        self, q_B1NH: jax.Array, cache: State, mixers: Mixers, visible_BS: jax.Array
    ) -> jax.Array:
        """What one token's queries read from the tied states, [B, 1, N, H]; the keys are not put
        together for it."""
        half = self.config.head_dim // 2
        # reads the tied state whole, which is cheaper than cutting the cache in half
        unrotated = q_B1NH.at[..., half:].set(0)
        parts = [(unrotated, cache["tied"]), (q_B1NH[..., half:], cache["rotary_key"])]
        return cached_attention(
            parts, cache["tied"], visible_BS, scale=1 / math.sqrt(self.config.head_dim)
        )


class Latent(Projection):
    """Keys and values expanded from cached latents: MLA (arXiv 2405.04434) with one group, GLA
    (arXiv 2505.21487) with more.

    c_g = RMSNorm(x W_D,g) of `kv_lora` for each of `groups` equal blocks of heads; k = [c_g W_UK |
    RoPE(x W_R)] of head_dim + rope_dim with one rotary key for all heads; v = c_g W_UV. Queries
    come from x, or through a rank `q_lora` with an RMS norm. Scale 1/sqrt(head_dim + rope_dim).
    Cache: groups * kv_lora + rope_dim. Mixers act on the unrotated part of q and k, and on v; only
    linear ones, since keys and values are never made when decoding from the latent.
    """

    stream_weights = {"query": "query", "key": "key_up", "value": "value_up"}
    query_heads: int = 8
    head_dim: int = 64
    value_dim: int = 64
    rope_dim: int = 32
    kv_lora: int = 128
    groups: int = 1
    q_lora: int | None = None
    rope_theta: float = 10_000.0

    def validate(self):
        self.at_least(
            1,
            "query_heads",
            "head_dim",
            "value_dim",
            "rope_dim",
            "kv_lora",
            "groups",
            "q_lora",
            "rope_theta",
        )
        self.require(self.rope_dim % 2 == 0, "rope_dim", f"must be even, found {self.rope_dim}")
        problem = f"must divide query_heads={self.query_heads}, found {self.groups}"
        self.require(self.query_heads % self.groups == 0, "groups", problem)

    def streams(self, width):
        key, value = (
            (self.query_heads, self.head_dim, self.kv_lora),
            (self.query_heads, self.value_dim, self.kv_lora),
        )
        return {
            "query": (self.query_heads, self.head_dim, self.q_lora or width),
            "key": key,
            "value": value,
        }

    def refusal(self, slot, mixer):
        reason = (
            "keys and values are never made when decoding from the latent, so only linear mixers "
            "fold into it"
        )
        return None if mixer.linear else f"{reason}; use linear"

    def output_shape(self):
        return self.query_heads, self.value_dim

    def parameters(self, width):
        norms = self.groups * self.kv_lora + (self.q_lora or 0)
        return self.flops(width) // 2 + norms

    def flops(self, width):
        query = self.query_heads * (self.head_dim + self.rope_dim)
        query_weights = width * query if self.q_lora is None else self.q_lora * (width + query)
        down = width * (self.groups * self.kv_lora + self.rope_dim)
        up = self.kv_lora * self.query_heads * (self.head_dim + self.value_dim)
        return 2 * (query_weights + down + up)

    def key_width(self):
        return self.head_dim + self.rope_dim

    def cache_floats(self):
        return self.groups * self.kv_lora + self.rope_dim

    def build(self, **arguments: Any) -> "LatentProjection":
        return LatentProjection(config=self, **arguments)


class LatentProjection(Module):
    """See Latent. State: the normalised latents [B, S, groups, C] and the rotary key [B, S, 1, R],
    rotated."""

    config: Latent
    width: int

    def setup(self):
        c, D = self.config, self.width
        rank = c.q_lora or D
        if c.q_lora:
            self.query_down = self.weight("query_down", embed=D, latent=rank)
            self.query_norm = RMSNorm(numerics=self.numerics, axis="latent")
        axis = {"latent": rank} if c.q_lora else {"embed": rank}
        self.query = self.weight("query", **axis, heads=c.query_heads, head_dim=c.head_dim)
        self.query_rope = self.weight(
            "query_rope", **axis, heads=c.query_heads, head_dim=c.rope_dim
        )
        self.down = self.weight("latent_down", embed=D, groups=c.groups, latent=c.kv_lora)
        self.latent_norms = [
            RMSNorm(numerics=self.numerics, axis="latent") for _ in range(c.groups)
        ]
        self.rotary_key = self.weight("rotary_key", embed=D, head_dim=c.rope_dim)
        heads = c.query_heads // c.groups
        self.key_up = self.weight(
            "key_up", groups=c.groups, latent=c.kv_lora, heads=heads, head_dim=c.head_dim
        )
        self.value_up = self.weight(
            "value_up", groups=c.groups, latent=c.kv_lora, heads=heads, head_dim=c.value_dim
        )

    def __call__(
        self, x_BTD: jax.Array, positions_BT: jax.Array, mixers: Mixers
    ) -> tuple[jax.Array, State]:
        """Queries [B, T, N, H + R], the first part mixed, the second rotated, and the state."""
        theta = self.config.rope_theta
        source = self.query_norm(linear(x_BTD, self.query_down)) if self.config.q_lora else x_BTD
        nope = mixers["query"].project(source, self.query)
        rotated = rope.rotate(linear(source, self.query_rope), positions_BT, theta)
        q_BTNH = constrain(
            jnp.concatenate([nope, rotated], axis=-1), "batch", "length", "heads", None
        )
        latents = linear(x_BTD, self.down)
        latent = jnp.stack(
            [norm(latents[:, :, g]) for g, norm in enumerate(self.latent_norms)], axis=2
        )
        rotary_key = rope.rotate(linear(x_BTD, self.rotary_key)[:, :, None], positions_BT, theta)
        return q_BTNH, {"latent": latent, "rotary_key": rotary_key}

    def keys_and_values(self, state: State, mixers: Mixers) -> tuple[jax.Array, jax.Array]:
        """Keys [B, S, N, H + R] and values [B, S, N, U], expanded group by group."""
        latent = state["latent"]

        def expand(mixer, up):
            return jnp.concatenate(
                [mixer.project(latent[:, :, g], up[g]) for g in range(self.config.groups)], axis=2
            )

        nope, v_BSNU = expand(mixers["key"], self.key_up), expand(mixers["value"], self.value_up)
        rotary = jnp.broadcast_to(state["rotary_key"], (*nope.shape[:3], self.config.rope_dim))
        k_BSNH = constrain(
            jnp.concatenate([nope, rotary], axis=-1), "batch", "length", "heads", None
        )
        return k_BSNH, constrain(v_BSNU, "batch", "length", "heads", None)

    def attend(
        self, q_B1NH: jax.Array, cache: State, mixers: Mixers, visible_BS: jax.Array
    ) -> jax.Array:
        """What one token's queries read from the latents, [B, 1, N, U].

        (c W_UK) . q = c . (q W_UK^T) and p (c W_UV) = (p c) W_UV: queries go into the latent and
        come back from it, so that nothing is expanded per cached token. The mixers, which are
        linear, act on the up-projections.
        """
        c = self.config
        nope, rotated = q_B1NH[..., : c.head_dim], q_B1NH[..., c.head_dim :]
        key_up, value_up = mixers["key"](self.key_up), mixers["value"](self.value_up)
        grouped = (*nope.shape[:2], c.groups, -1)
        q_latent = jnp.einsum("BTgnH,gCnH->BTgnC", nope.reshape(*grouped, c.head_dim), key_up)
        parts = [
            (q_latent.reshape(*nope.shape[:3], c.kv_lora), cache["latent"]),
            (rotated, cache["rotary_key"]),
        ]
        o_latent = cached_attention(
            parts, cache["latent"], visible_BS, scale=1 / math.sqrt(q_B1NH.shape[-1])
        )
        o = jnp.einsum("BTgnC,gCnU->BTgnU", o_latent.reshape(*grouped, c.kv_lora), value_up)
        return o.reshape(*nope.shape[:3], c.value_dim)


PROJECTIONS = {"grouped_query": GroupedQuery, "grouped_tied": GroupedTied, "latent": Latent}
