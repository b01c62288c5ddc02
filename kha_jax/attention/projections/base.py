"""What a projection is: x -> queries and the state that keys and values are read from.

A projection owns its weights and their logical axes, where its streams are mixed, its q/k norms,
its rotary parts, and its state: the arrays that a decoder would cache for every token.

Legend: B batch, T query position, S key position, D model width, N query heads, K key/value heads,
H query and key width, U value width.
"""

import math
from typing import ClassVar, Mapping

import jax

from kha_jax.attention.mixers import StreamMixer, StreamMixerModule
from kha_jax.modules import Module, ModuleConfig
from kha_jax.ops import rope

Mixers = dict[str, StreamMixerModule]
State = dict[str, jax.Array]
Parts = list[tuple[jax.Array, jax.Array]]


class Projection(ModuleConfig):
    """What attention and accounting ask of a projection; sizes are per layer.

    What is `keys_only` has its slots last since a CPU multiplies queries with those in a third to a
    half of the time.
    """

    stream_weights: ClassVar[dict[str, str]] = {}
    """Of each stream the parameter [..., heads, H] that a linear mixer folds into; its bias [heads,
    H], where there is one, is named like it with `_bias` behind."""
    cache_fields: ClassVar[tuple[str, ...]] = ()
    """Sizes that decide how much is cached, the first ones to change first."""
    keys_only: ClassVar[tuple[str, ...]] = ()
    """Entries of the state that no values are read from, cached with their slots last."""
    mixes_heads: ClassVar[bool] = False
    """Whether heads share what tells them apart."""

    def streams(self, width: int) -> dict[str, tuple[int, int, int]]:
        """(heads, head width, rows of the weights that make it, a bias among them) of each mixable
        stream, for a model of this width."""
        raise NotImplementedError

    def rotary(self) -> dict[str, tuple[int, int]]:
        """Of mixed streams the features that are rotated, from and to."""
        return {}

    def why_not(self, slot: str, mixer: StreamMixer) -> str | None:
        """Why this mixer cannot stand in this slot, or None."""
        return None

    def why_not_heads(self, read: dict[str, int]) -> tuple[str, str] | None:
        """(slot, problem) where mixers make numbers of heads that cannot attend together."""
        for slot, (heads, _, _) in self.streams(1).items():
            if read[slot] != heads:
                return slot, f"must leave {heads} heads, found {read[slot]}"
        return None

    def with_heads(self, read: int) -> "Projection":
        """The projection that makes as many key/value heads as mixers had made of its own."""
        return self

    def output_shape(self) -> tuple[int, int]:
        """(heads, width) of what the score kernel returns."""
        raise NotImplementedError

    def key_width(self) -> int:
        """Width of queries and keys in the score kernel."""
        return self.output_shape()[1]

    def scale(self) -> float:
        """Factor on the logits."""
        return 1 / math.sqrt(self.key_width())

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

    def cache_floats(self, mixers: Mapping[str, StreamMixer]) -> int:
        """Numbers per token that a decoder keeps."""
        raise NotImplementedError


def cached_heads(mixer: StreamMixer, heads: int) -> int:
    """Heads in the cache where `heads` are projected."""
    return heads if mixer.late(heads) else mixer.heads(heads)


def why_not_shared(query_heads: int, read: dict[str, int], *slots: str):
    """See Projection.why_not_heads, where the slots' heads serve groups of query heads."""
    if read["query"] != query_heads:
        return "query", f"must leave {query_heads} heads, found {read['query']}"
    for slot in slots:
        if query_heads % read[slot]:
            fitting = [k for k in range(1, min(query_heads, 256) + 1) if query_heads % k == 0]
            found = f"found {read[slot]}; use one of {fitting}"
            return slot, f"must divide query_heads={query_heads}, {found}"
        if read[slot] != read[slots[-1]]:
            found = f"found {read[slot]} and {read[slots[-1]]}"
            return slot, f"must make as many key heads as value heads, {found}"
    return None


class ProjectionModule(Module):
    """Base of the projections' modules; a mixer of their streams is a `mixers.StreamMixerModule`.

    Attention calls the instance, then either `keys_and_values` and the score kernel, or `read` and
    the cached scores, then `finish`.
    """

    width: int

    def rotated(
        self, z_BTNH: jax.Array, positions_BT: jax.Array, width: int | None = None
    ) -> jax.Array:
        """z with its first `width` features turned, all by default, as the config's `rope_theta`
        and `rope_scaling` say."""
        c, width = self.config, z_BTNH.shape[-1] if width is None else width
        frequencies = c.rope_scaling.frequencies(c.rope_theta, width)
        return rope.rotate(z_BTNH, positions_BT, frequencies, c.rope_scaling.rotation_factor())

    def __call__(self, x_BTD: jax.Array, positions_BT: jax.Array, mixers: Mixers):
        """(queries [B, T, N, H] as the scores read them, state): the state is what is cached, each
        entry [B, S, heads, width]."""
        raise NotImplementedError

    def keys_and_values(self, state: State, mixers: Mixers) -> tuple[jax.Array, jax.Array]:
        """Keys [B, S, K, H] and values [B, S, K, U] for the score kernel."""
        raise NotImplementedError

    def read(self, q_B1NH: jax.Array, cache: State, mixers: Mixers) -> tuple[Parts, jax.Array]:
        """(parts, values) for `ops.attention_cached.one_query`, from a cache of [B heads, S,
        width], or [B heads, width, S] for `keys_only`."""
        raise NotImplementedError

    def finish(self, o_BTNU: jax.Array, mixers: Mixers) -> jax.Array:
        """The output of attention, from what the cached scores return."""
        return o_BTNU


def by_row(cache: jax.Array, batch: int) -> jax.Array:
    """[B heads, ...] -> [B, heads, ...]."""
    return cache.reshape(batch, -1, *cache.shape[1:])


def slots_axis(config: Projection, name: str) -> int:
    """Which axis of a cached entry runs over slots."""
    return 2 if name in config.keys_only else 1


def cache_slots(config: Projection, cache: State) -> int:
    """Tokens that a cache has room for."""
    name, z = next(iter(cache.items()))
    return z.shape[slots_axis(config, name)]


def to_cache(config: Projection, state: State) -> State:
    """A state [B, S, heads, width] as it is cached, see ProjectionModule.read."""

    def one(name, z_BSNH):
        z_RSH = z_BSNH.swapaxes(1, 2).reshape(-1, z_BSNH.shape[1], z_BSNH.shape[3])
        return z_RSH.swapaxes(1, 2) if slots_axis(config, name) == 2 else z_RSH

    return {name: one(name, z) for name, z in state.items()}


def from_cache(config: Projection, cache: State, batch: int) -> State:
    """The inverse of to_cache."""

    def one(name, z):
        z_RSH = z.swapaxes(1, 2) if slots_axis(config, name) == 2 else z
        return by_row(z_RSH, batch).swapaxes(1, 2)

    return {name: one(name, z) for name, z in cache.items()}


def by_head(cache: jax.Array) -> jax.Array:
    """The inverse of by_row."""
    return cache.reshape(-1, *cache.shape[2:])
