"""Projections: x -> queries and the state that keys and values are read from.

A projection owns its weights and their logical axes, where its streams are mixed, its q/k norms, its rotary parts, and its
state: the arrays that a decoder would cache for every token.

Legend: B batch, T query position, S key position, D model width, N query heads, K key/value heads, H head width.
"""

from typing import Any, Callable, Literal

import jax

from kha_jax.config import Config
from kha_jax.ops import rope
from kha_jax.ops.linear import linear
from kha_jax.parameters import Module, RMSNorm
from kha_jax.sharding import constrain

Mixers = dict[str, Callable[[jax.Array], jax.Array]]
State = dict[str, jax.Array]


class Projection(Config):
    """What attention and accounting ask of a projection; sizes are per layer."""

    def stream_shapes(self) -> dict[str, tuple[int, int]]:
        """(heads, width) of each mixable stream."""
        raise NotImplementedError

    def output_shape(self) -> tuple[int, int]:
        """(heads, width) of what the score kernel returns and the output projection reads."""
        raise NotImplementedError

    def parameters(self, width: int) -> int:
        """Parameters, without the output projection."""
        raise NotImplementedError

    def flops(self, width: int) -> int:
        """Forward FLOPs per token of the projection's matrix products."""
        raise NotImplementedError

    def score_flops(self, context: float) -> float:
        """Forward FLOPs per token of q k^T and p v over `context` visible keys."""
        raise NotImplementedError

    def cache_floats(self) -> int:
        """Numbers per token that a decoder keeps."""
        raise NotImplementedError


class GroupedQuery(Projection):
    """q = x W_Q, k = x W_K, v = x W_V with N query and K key/value heads (arXiv 2305.13245).

    K = N is multi-head attention, K = 1 multi-query attention. qk_norm: an RMS norm over H on each query and key head, one
    weight for all heads (Qwen3), after the mixers and before rotary.
    """

    query_heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    qk_norm: Literal["rms", "none"] = "rms"
    rope_theta: float = 10_000.0

    def validate(self):
        self.at_least(1, "query_heads", "kv_heads", "head_dim", "rope_theta")
        fitting = [k for k in range(1, self.query_heads + 1) if self.query_heads % k == 0]
        problem = f"must divide query_heads={self.query_heads}, found {self.kv_heads}; use one of {fitting}"
        self.require(self.query_heads % self.kv_heads == 0, "kv_heads", problem)
        self.require(self.head_dim % 2 == 0, "head_dim", f"must be even for rotary embedding, found {self.head_dim}")

    def stream_shapes(self):
        kv = (self.kv_heads, self.head_dim)
        return {"query": (self.query_heads, self.head_dim), "key": kv, "value": kv}

    def output_shape(self):
        return self.query_heads, self.head_dim

    def parameters(self, width):
        norms = 2 * self.head_dim if self.qk_norm == "rms" else 0
        return self.flops(width) // 2 + norms

    def flops(self, width):
        return 2 * width * (self.query_heads + 2 * self.kv_heads) * self.head_dim

    def score_flops(self, context):
        return 4 * self.query_heads * self.head_dim * context

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
        self.query = self.weight("query", embed=self.width, heads=c.query_heads, head_dim=c.head_dim)
        self.key = self.weight("key", embed=self.width, kv_heads=c.kv_heads, head_dim=c.head_dim)
        self.value = self.weight("value", embed=self.width, kv_heads=c.kv_heads, head_dim=c.head_dim)
        if c.qk_norm == "rms":
            self.query_norm = RMSNorm(numerics=self.numerics, axis="head_dim")
            self.key_norm = RMSNorm(numerics=self.numerics, axis="head_dim")

    def __call__(self, x_BTD: jax.Array, positions_BT: jax.Array, mixers: Mixers) -> tuple[jax.Array, State]:
        """Queries [B, T, N, H], mixed, normalised and rotated, and the state."""
        q_BTNH = mixers["query"](linear(x_BTD, self.query))
        k_BTKH = mixers["key"](linear(x_BTD, self.key))
        v_BTKH = mixers["value"](linear(x_BTD, self.value))
        if self.config.qk_norm == "rms":
            q_BTNH, k_BTKH = self.query_norm(q_BTNH), self.key_norm(k_BTKH)
        q_BTNH = constrain(q_BTNH, "batch", "length", "heads", None)
        k_BTKH = constrain(k_BTKH, "batch", "length", "kv_heads", None)
        v_BTKH = constrain(v_BTKH, "batch", "length", "kv_heads", None)
        q_BTNH, k_BTKH = (rope.rotate(z, positions_BT, self.config.rope_theta) for z in (q_BTNH, k_BTKH))
        return q_BTNH, {"key": k_BTKH, "value": v_BTKH}

    def keys_and_values(self, state: State) -> tuple[jax.Array, jax.Array]:
        """Keys and values for the score kernel."""
        return state["key"], state["value"]


PROJECTIONS = {"grouped_query": GroupedQuery}
