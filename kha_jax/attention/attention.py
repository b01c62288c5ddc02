"""Attention: project -> mix streams -> q/k norm, rotate -> scores -> output projection.

Legend: B batch, T query position, S key position, D model width, N query heads, K key/value heads,
H query and key width, U value width.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from kha_jax.attention.mixers import STREAM_MIXERS, NoMixer, StreamMixer
from kha_jax.attention.projections import PROJECTIONS, GroupedQuery, Projection, State
from kha_jax.config import Config, choice
from kha_jax.ops.attention import attention
from kha_jax.ops.linear import linear
from kha_jax.parameters import Module
from kha_jax.sharding import per_device, platform, ways

SLOTS = ("query", "key", "value")


class AttentionConfig(Config):
    """One choice per seam.

    projection: who makes queries, keys and values. query, key, value: the stream mixer of each.
    kernel: which implementation computes the scores (`kha_jax.ops.attention.KERNELS`); `auto` takes
    the platform's best.
    """

    projection: Projection = choice(PROJECTIONS, GroupedQuery())
    query: StreamMixer = choice(STREAM_MIXERS, NoMixer())
    key: StreamMixer = choice(STREAM_MIXERS, NoMixer())
    value: StreamMixer = choice(STREAM_MIXERS, NoMixer())
    kernel: Literal["auto", "reference", "chunked", "xla", "cudnn", "splash"] = "auto"

    def validate(self):
        for slot in SLOTS:
            mixer = getattr(self, slot)
            reason = None if type(mixer) is NoMixer else self.projection.refusal(slot, mixer)
            self.require(
                reason is None,
                f"{slot}.kind",
                f"{type(mixer).__name__} cannot stand here: {reason}",
            )

    def mixer_parameters(self, width: int) -> int:
        """Parameters of the stream mixers of one layer."""
        return sum(
            getattr(self, slot).parameters(H)
            for slot, (_, H, _) in self.projection.streams(width).items()
        )

    def parameters(self, width: int) -> int:
        """Parameters of one layer."""
        heads, value_width = self.projection.output_shape()
        return (
            self.projection.parameters(width)
            + heads * value_width * width
            + self.mixer_parameters(width)
        )

    def flops(self, width: int, context: float, tokens: float) -> float:
        """Forward FLOPs per token and layer with `context` visible keys, in steps of `tokens`."""
        heads, value_width = self.projection.output_shape()
        mixing = sum(
            getattr(self, slot).flops(*shape, tokens)
            for slot, shape in self.projection.streams(width).items()
        )
        projecting = self.projection.flops(width) + 2 * heads * value_width * width
        return projecting + mixing + self.projection.score_flops(context)

    def build(self, **arguments: Any) -> "Attention":
        return Attention(config=self, **arguments)


class Attention(Module):
    """Causal self-attention over packed documents."""

    config: AttentionConfig
    width: int

    def setup(self):
        c = self.config
        self.projection = c.projection.build(width=self.width, numerics=self.numerics)
        self.mixers = {
            slot: getattr(c, slot).build(head_dim, self.numerics, name=f"{slot}_mixer")
            for slot, (_, head_dim, _) in c.projection.streams(self.width).items()
        }
        heads, value_width = c.projection.output_shape()
        self.output = self.weight("output", heads=heads, head_dim=value_width, embed=self.width)

    def __call__(
        self, x_BTD: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The attention output [B, T, D] and named metrics."""
        return self.prefill(x_BTD, positions_BT, segment_ids_BT)[0], {}

    def prefill(
        self, x_BTD: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        """The attention output [B, T, D] and what a decoder caches: the projection's state as [B
        heads, S, width]."""
        with jax.named_scope("project"):
            q_BTNH, state = self.projection(x_BTD, positions_BT, self.mixers)
            k_BSKH, v_BSKU = self.projection.keys_and_values(state, self.mixers)
        o_BTNU = self._scores(q_BTNH, k_BSKH, v_BSKU, segment_ids_BT)
        with jax.named_scope("output"):
            return linear(o_BTNU, self.output, contract=2), _as_cache(state)

    def _scores(self, q_BTNH, k_BSKH, v_BSKU, segment_ids_BT):
        """Heads never meet here, so every device computes its rows and heads: fused kernels need
        not know of the mesh."""
        heads, rows = ("batch", "length", "heads", None), ("batch", "length")
        # a copy for each device that holds some of a key head's queries
        if k_BSKH.shape[2] < ways("heads"):
            k_BSKH, v_BSKU = (
                jnp.repeat(z, ways("heads") // z.shape[2], axis=2) for z in (k_BSKH, v_BSKU)
            )
        kernel = functools.partial(attention, kernel=self.config.kernel, platform=platform())
        if segment_ids_BT is None:
            return per_device(kernel, (heads,) * 3, heads)(q_BTNH, k_BSKH, v_BSKU)
        return per_device(kernel, (*(heads,) * 3, rows), heads)(
            q_BTNH, k_BSKH, v_BSKU, segment_ids_BT
        )

    def extend(
        self,
        x_B1D: jax.Array,
        positions_B1: jax.Array,
        cache: State,
        slot: jax.Array,
        visible_BS: jax.Array,
    ) -> tuple[jax.Array, State]:
        """One more token: its output [B, 1, D] and the cache with its state written at `slot`.

        cache: as from `prefill`, with room for S tokens. visible_BS: the cached tokens, this one
        included, that each row may see.
        """
        with jax.named_scope("project"):
            q_B1NH, state = self.projection(x_B1D, positions_B1, self.mixers)
            write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=slot, axis=1)
            cache = jax.tree.map(write, cache, _as_cache(state))
        with jax.named_scope("attention_cached"):
            o_B1NU = self.projection.attend(q_B1NH, cache, self.mixers, visible_BS)
        with jax.named_scope("output"):
            return linear(o_B1NU, self.output, contract=2), cache


def _as_cache(state: State) -> State:
    return jax.tree.map(lambda z: z.swapaxes(1, 2).reshape(-1, z.shape[1], z.shape[3]), state)
