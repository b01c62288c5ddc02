"""Attention in five steps: project, mix streams, norm and rotate (these in the projection), scores,
output.

Legend: B batch, T query position, S key position, D model width, N query heads, K key/value heads,
H query and key width, U value width.
"""

from typing import Any, Literal, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from kha_jax.attention.devices import attend
from kha_jax.attention.mixers import STREAM_MIXERS, NoMixer, StreamMixer
from kha_jax.attention.outputs import OUTPUT_MIXERS, NoOutputMixer, OutputMixer
from kha_jax.attention.projections import (
    PROJECTIONS,
    GroupedQuery,
    Projection,
    State,
    cache_slots,
    from_cache,
    slots_axis,
    to_cache,
)
from kha_jax.attention.scores import SCORE_MIXERS, NoScoreMixer, ScoreMixer
from kha_jax.config import choice
from kha_jax.modules import Aux, Module, ModuleConfig
from kha_jax.ops import attention as ops
from kha_jax.ops import attention_cached
from kha_jax.ops.linear import linear

SLOTS = ("query", "key", "value")
SCORES = ("logits", "probabilities")
LARGEST = "attention/largest_logit"  # the metric; see `devices`
KEYS = 128  # cached ones at once, at least, that branches look at


class AttentionConfig(ModuleConfig):
    """One choice per seam, and the kernel of the scores (`kha_jax.ops.attention.KERNELS`)."""

    projection: Projection = choice(PROJECTIONS, GroupedQuery())
    """What makes queries, keys and values."""
    query: StreamMixer = choice(STREAM_MIXERS, NoMixer())
    """What mixes the queries before norm and rotation."""
    key: StreamMixer = choice(STREAM_MIXERS, NoMixer())
    """What mixes the keys before norm and rotation."""
    value: StreamMixer = choice(STREAM_MIXERS, NoMixer())
    """What mixes the values."""
    logits: ScoreMixer = choice(SCORE_MIXERS, NoScoreMixer())
    """What mixes heads between the logits and the mask."""
    probabilities: ScoreMixer = choice(SCORE_MIXERS, NoScoreMixer())
    """What mixes heads after the softmax."""
    output: OutputMixer = choice(OUTPUT_MIXERS, NoOutputMixer())
    """What mixes the heads' outputs before the output projection."""
    output_bias: bool = False
    """Whether the output projection has a bias, zero at the start."""
    kernel: Literal["auto", *ops.KERNELS] = "auto"
    """What computes the scores; `auto`: the platform's best, on a TPU that of its chip."""

    def validate(self):
        streams = self.projection.streams(1)
        for slot in SLOTS:
            mixer, name = getattr(self, slot), type(getattr(self, slot)).__name__
            reason = None if type(mixer) is NoMixer else self.projection.why_not(slot, mixer)
            if reason is None and slot in streams:
                reason = mixer.why_not(streams[slot][0])
            self.require(reason is None, f"{slot}.kind", f"{name} cannot stand here: {reason}")
        read = self.heads_read()
        if problem := self.projection.why_not_heads(read):
            slot, said = problem
            kept = read[slot] == streams[slot][0]
            self.require(False, "projection.kv_heads" if kept else f"{slot}.heads_read", said)
        heads = self.projection.output_shape()[0]
        reason = self.output.why_not(heads, heads // read["value"])
        name = type(self.output).__name__
        self.require(reason is None, "output.kind", f"{name} cannot stand here: {reason}")
        if self.mixes_scores:
            problem = ops.why_not(self.kernel, self.case("any", "float32", 1))
            self.require(problem is None, "kernel", str(problem))

    def mixers(self) -> dict[str, StreamMixer]:
        """The stream mixer of each slot."""
        return {slot: getattr(self, slot) for slot in SLOTS}

    def effective(self, params: Mapping[str, Any]) -> dict[str, tuple[Any, dict[str, Any]]]:
        """slot -> (its mixer, the matrices that this layer's parameters stand for, by name), of the
        slots that have any."""
        out = {}
        for slot in (*SLOTS, *SCORES, "output"):
            mixer, own = getattr(self, slot), params.get(f"{slot}_mixer")
            matrices = mixer.effective(own) if own else {}
            out |= {slot: (mixer, matrices)} if matrices else {}
        return out

    def heads_read(self) -> dict[str, int]:
        """Heads of each stream that the scores read."""
        streams = self.projection.streams(1)
        return {slot: getattr(self, slot).heads(heads) for slot, (heads, _, _) in streams.items()}

    @property
    def mixes_scores(self) -> bool:
        """Whether the scores of all heads have to exist at once, as they do where heads mix."""
        return any(getattr(self, slot).mixes_heads for slot in SCORES)

    @property
    def mixes_heads(self) -> bool:
        """Whether moving whole heads, each with its weights, shows in the output."""
        streams, read = self.projection.streams(1), self.heads_read()
        several = [s for s, (heads, _, _) in streams.items() if max(heads, read[s]) > 1]
        parts = [getattr(self, slot) for slot in (*several, *SCORES, "output")]
        return any(part.mixes_heads for part in [self.projection, *parts])

    @property
    def identity_at_start(self) -> bool:
        """Whether all mixers start as the identity."""
        streams = self.projection.streams(1)
        return all(getattr(self, slot).identity_at_start() for slot in (*SCORES, "output")) and all(
            getattr(self, slot).identity_at_start(heads) for slot, (heads, _, _) in streams.items()
        )

    def case(self, platform: str, dtype: Any, length: int) -> ops.Case:
        """What the kernels are asked to compute."""
        widths = self.projection.key_width(), self.projection.output_shape()[1]
        return ops.Case(platform, dtype, length, *widths, self.mixes_scores)

    def kernel_on(self, platform: str, dtype: Any, length: int) -> str:
        """The kernel, where it is `auto` the one that this stands for."""
        best = ops.best_kernel(self.case(platform, dtype, length))
        return best if self.kernel == "auto" else self.kernel

    def output_shape(self) -> tuple[int, int]:
        """(heads, width) of what the output projection reads."""
        heads, value_width = self.projection.output_shape()
        return self.output.heads(heads), value_width

    def mixer_parameters(self, width: int) -> int:
        """Parameters of the mixers of one layer."""
        heads, value_width = self.projection.output_shape()
        streams = self.projection.streams(width).items()
        return (
            sum(getattr(self, slot).parameters(N, H) for slot, (N, H, _) in streams)
            + sum(getattr(self, slot).parameters(heads) for slot in SCORES)
            + self.output.parameters(width, heads, value_width)
        )

    def parameters(self, width: int) -> int:
        """Parameters of one layer."""
        heads, value_width = self.output_shape()
        output = (heads * value_width + self.output_bias) * width
        return self.projection.parameters(width) + output + self.mixer_parameters(width)

    def flops(self, width: int, context: float, tokens: float) -> float:
        """Forward FLOPs per token and layer with `context` visible keys, in steps of `tokens`."""
        heads, value_width = self.projection.output_shape()
        left, _ = self.output_shape()
        streams = self.projection.streams(width).items()
        return (
            self.projection.flops(width)
            + sum(getattr(self, slot).flops(*shape, tokens) for slot, shape in streams)
            + self.projection.score_flops(context)
            + sum(getattr(self, slot).flops(heads, context) for slot in SCORES)
            + self.output.flops(width, heads, value_width)
            + 2 * left * value_width * width
        )

    def frozen_flops(self, width: int, tokens: float) -> float:
        """Of `flops` those that multiply weights whose gradient is not needed where mixers alone
        are trained: a mixer that acts on weights needs the gradient of what they make."""
        left, value_width = self.output_shape()
        streams = self.projection.streams(width).items()
        needed = sum(
            2 * heads * head_dim * rows
            for slot, (heads, head_dim, rows) in streams
            if getattr(self, slot).on_weights(rows, tokens)
        )
        return self.projection.flops(width) - needed + 2 * left * value_width * width

    def score_floats(self, length: int) -> int:
        """Logits per query that exist outside of a kernel: those of all heads, where they mix."""
        return self.projection.output_shape()[0] * length if self.mixes_scores else 0

    def cache_floats(self) -> int:
        """Numbers per token and layer that a decoder keeps."""
        return self.projection.cache_floats(self.mixers())

    @property
    def module(self):
        return Attention


class Attention(Module):
    """Causal self-attention over packed documents."""

    config: AttentionConfig
    width: int

    def setup(self):
        c, D = self.config, self.width
        self.projection = c.projection.build(width=D, numerics=self.numerics)
        self.mixers = {
            slot: getattr(c, slot).build(
                heads=heads, head_dim=head_dim, numerics=self.numerics, name=f"{slot}_mixer"
            )
            for slot, (heads, head_dim, _) in c.projection.streams(D).items()
        }
        heads, value_width = c.projection.output_shape()
        self.score_mixers = {
            slot: getattr(c, slot).build(heads=heads, numerics=self.numerics, name=f"{slot}_mixer")
            for slot in SCORES
        }
        self.output_mixer = c.output.build(
            width=D,
            heads=heads,
            value_dim=value_width,
            numerics=self.numerics,
            name="output_mixer",
        )
        left, _ = c.output_shape()
        self.output = self.weight("output", heads=left, head_dim=value_width, embed=D)
        if c.output_bias:
            self.output_bias = self.weight("output_bias", nn.initializers.zeros, embed=D)

    def __call__(
        self, x_BTD: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array | None = None
    ) -> tuple[jax.Array, Aux]:
        """The attention output [B, T, D] and what comes beside it: the metric
        `attention/largest_logit`, and what the output mixer tells."""
        return self._whole(x_BTD, positions_BT, segment_ids_BT)[:2]

    def prefill(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array | None = None,
        slots: int | None = None,
    ) -> tuple[jax.Array, State]:
        """The attention output [B, T, D] and what a decoder caches, the projection's state, with
        room for `slots` tokens, T by default."""
        y_BTD, _, state = self._whole(x_BTD, positions_BT, segment_ids_BT)
        projection, more = self.config.projection, (slots or x_BTD.shape[1]) - x_BTD.shape[1]

        def with_room(name, z):
            room = [(0, more if axis == slots_axis(projection, name) else 0) for axis in range(3)]
            return jnp.pad(z, room)

        cache = to_cache(projection, state)
        return y_BTD, {name: with_room(name, z) for name, z in cache.items()}

    def extend(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        cache: State,
        slot: jax.Array,
        pad_B: jax.Array,
        first_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, State]:
        """T more tokens: their output [B, T, D] and the cache with their state written from `slot`
        on.

        cache: as from `prefill`, with room for S tokens, of which row b sees those from pad_B[b] up
        to its own. One new token looks at all of them, T new ones at T after another. first_BT:
        where the new tokens are branches, the slot at which each one's branch begins: of the others
        it sees nothing.
        """
        projection, (B, T, _) = self.config.projection, x_BTD.shape
        # project, mix streams, norm and rotate
        q_BTNH, state = self._projected(x_BTD, positions_BT)
        # write the new tokens' state
        with jax.named_scope("project"):
            cache = {
                name: jax.lax.dynamic_update_slice_in_dim(
                    cache[name], new, slot, slots_axis(projection, name)
                )
                for name, new in to_cache(projection, state).items()
            }
        slots = cache_slots(projection, cache)

        def visible(places_C):
            own_T1 = slot + jnp.arange(T)[:, None]
            seen_BTC = (places_C >= pad_B[:, None, None]) & (places_C <= own_T1)
            if first_BT is None:
                return seen_BTC
            return seen_BTC & ((places_C < slot) | (places_C >= first_BT[..., None]))

        # scores
        scale, maps = projection.scale(), self._maps()
        with jax.named_scope("attention_cached"):
            if T == 1:
                parts, values = self.projection.read(q_BTNH, cache, self.mixers)
                seen_BS = visible(jnp.arange(slots))[:, 0]
                o = attention_cached.one_query(parts, values, seen_BS, scale, maps)
                o_BTNU = self.projection.finish(o, self.mixers)
            else:
                block = T if first_BT is None else max(T, KEYS)
                keys = min(block, slots), slots, slot + T
                read = self._reader(cache, B, keys[0])
                o_BTNU = attention_cached.many_queries(q_BTNH, read, visible, keys, scale, maps)
        # output
        own_BTKU = None
        if self.config.output.reads_values:
            _, own_BTKU = self.projection.keys_and_values(state, self.mixers)
        return self._finish(o_BTNU, x_BTD, own_BTKU)[0], cache

    def _reader(self, cache: State, batch: int, size: int):
        """Place -> keys and values of the `size` cached tokens from there on, as a function that a
        loop may call: it holds this module's variables and not the module."""
        bare, variables = self.clone(parent=None, name=None), self.variables
        projection = self.config.projection

        def read(first):
            block = {
                name: jax.lax.dynamic_slice_in_dim(z, first, size, slots_axis(projection, name))
                for name, z in cache.items()
            }
            state = from_cache(projection, block, batch)
            return bare.apply(variables, state, method="keys_and_values")

        return read

    def keys_and_values(self, state: State) -> tuple[jax.Array, jax.Array]:
        """Keys [B, S, K, H] and values [B, S, K, U] of a state, as the scores read them."""
        return self.projection.keys_and_values(state, self.mixers)

    def _whole(self, x_BTD, positions_BT, segment_ids_BT):
        # project, mix streams, norm and rotate
        q_BTNH, state = self._projected(x_BTD, positions_BT)
        with jax.named_scope("project"):
            k_BSKH, v_BSKU = self.projection.keys_and_values(state, self.mixers)
        # scores
        scale, kernel = self.config.projection.scale(), self.config.kernel
        streams = q_BTNH, k_BSKH, v_BSKU, segment_ids_BT
        o_BTNU, largest = attend(*streams, self._maps(), scale, kernel)
        # output
        y_BTD, aux = self._finish(o_BTNU, x_BTD, v_BSKU)
        return y_BTD, aux._replace(metrics={**aux.metrics, LARGEST: largest}), state

    @jax.named_scope("project")
    def _projected(self, x_BTD, positions_BT):
        """Queries as the kernels take them, times the factor of each head's logits, and the
        state."""
        q_BTNH, state = self.projection(x_BTD, positions_BT, self.mixers)
        return self._scaled(q_BTNH, "logits"), state

    def _scaled(self, z_BTNH, slot):
        """Queries by the factors of the logits, outputs by those of the probabilities."""
        scale_N = self.score_mixers[slot].scale()
        return z_BTNH if scale_N is None else z_BTNH * scale_N.astype(z_BTNH.dtype)[:, None]

    def _finish(self, o_BTNU, x_BTD, v_BTKU):
        with jax.named_scope("output"):
            o_BTNU = self._scaled(o_BTNU, "probabilities")
            o_BTNU, aux = self.output_mixer(o_BTNU, x_BTD, v_BTKU)
            y_BTD = linear(o_BTNU, self.output, contract=2)
            return y_BTD + self.output_bias if self.config.output_bias else y_BTD, aux

    def _maps(self) -> ops.ScoreMaps:
        return ops.ScoreMaps(*(self.score_mixers[slot]() for slot in SCORES))
