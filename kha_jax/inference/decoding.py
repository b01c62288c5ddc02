"""Generation: prefill, then a compiled loop that appends one token at a time to a preallocated
cache.

The cache is what the projection calls its state: transformed keys and values, GTA's tied states,
the latents of MLA and GLA. Ragged prompts are padded on the left, so that every row writes to the
same slot; `pad` counts the padding of each row.

Legend: B batch, T prompt length with padding, S slots of the cache, V vocabulary.
"""

import functools
import itertools
import logging
from typing import Any, Callable, Iterator, NamedTuple, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kha_jax.attention.projections import State
from kha_jax.inference.layers import Variables, Weights, blocks, unstack
from kha_jax.inference.sampling import Sampling, draw
from kha_jax.model import ModelConfig
from kha_jax.sharding import axis_size_of, on_mesh

log = logging.getLogger("kha_jax")
PROMPT_MULTIPLE = 32  # prompts are padded to multiples of it, so that few lengths compile
PROMPT_CHUNK = 512  # and longer ones than this to multiples of this
PIECE = 64  # tokens that a conversation goes on by
Cache = list[State]


def prefill(
    model: ModelConfig,
    weights: Weights,
    tokens_BT: jax.Array,
    pad_B: jax.Array,
    slots: int,
    chunk: int | None = None,
) -> tuple[jax.Array, Cache]:
    """Logits [B, V] after the last token of each row, and a cache of `slots` that holds the rows in
    its first T.

    tokens_BT: row b begins with pad_B[b] tokens that nothing looks at. chunk: tokens of a row that
    are computed at once, a divisor of T; all by default. What is held beside the cache grows with
    it and not with T.
    """
    size = chunk or tokens_BT.shape[1]
    filled = _first(model, weights, tokens_BT[:, :size], pad_B, slots)
    if size == tokens_BT.shape[1]:
        return filled

    def more(i, filled):
        tokens_BC = jax.lax.dynamic_slice_in_dim(tokens_BT, i * size, size, axis=1)
        return extend(model, weights, filled[1], tokens_BC, i * size, pad_B)

    return jax.lax.fori_loop(1, tokens_BT.shape[1] // size, more, filled)


def _first(model, weights, tokens_BT, pad_B, slots):
    """`prefill` of what the platform's kernel takes at once."""
    column = jnp.arange(tokens_BT.shape[1])
    positions_BT = jnp.maximum(column - pad_B[:, None], 0)
    # as segment ids: padding is a document of its own
    real_BT = (column >= pad_B[:, None]).astype(jnp.int32)
    transformer = model.build()
    x_BTD, cache = transformer.apply(weights.outer, tokens_BT, method="embed"), []
    for block, layer in zip(blocks(model), weights.layers):
        x_BTD, state = block.apply(layer, x_BTD, positions_BT, real_BT, slots, method="prefill")
        cache.append(state)
    return transformer.apply(weights.outer, x_BTD[:, -1], method="next_token_logits"), cache


def extend(
    model: ModelConfig,
    weights: Weights,
    cache: Cache,
    tokens_BT: jax.Array,
    slot: jax.Array,
    pad_B: jax.Array,
    last: int | jax.Array = -1,
) -> tuple[jax.Array, Cache]:
    """Logits [B, V] after T more tokens in every row, or after the one at `last` of them, and the
    cache with them from `slot` on."""
    places_T = slot + jnp.arange(tokens_BT.shape[1])
    positions_BT = jnp.maximum(places_T - pad_B[:, None], 0)
    transformer = model.build()
    x_BTD, extended = transformer.apply(weights.outer, tokens_BT, method="embed"), []
    for block, layer, state in zip(blocks(model), weights.layers, cache):
        x_BTD, state = block.apply(layer, x_BTD, positions_BT, state, slot, pad_B, method="extend")
        extended.append(state)
    return transformer.apply(weights.outer, x_BTD[:, last], method="next_token_logits"), extended


class Progress(NamedTuple):
    """Where a batch of generations stands. token_B: the last token of each row, not yet in the
    cache; slot: where it goes."""

    cache: Cache
    token_B: jax.Array
    slot: jax.Array
    pad_B: jax.Array
    done_B: jax.Array
    key: jax.Array


class Decoder:
    """Generates from one model.

    Args:
        model: its config; scores of the prompt are computed by the platform's best kernel whatever
            it says.
        variables: as trained, {"params": ...}. Linear mixers are best folded before
            (`fold_if_linear`); any model works as it is.
        prompt_chunk: tokens of a prompt that are computed at once; a longer one comes in chunks, so
            that it takes no more memory but for its cache.
        mesh: the devices that hold the variables, where it is more than one; it splits no rows.

    Raises:
        ValueError: a prompt_chunk that is no multiple, or a mesh that splits rows.
    """

    def __init__(
        self,
        model: ModelConfig,
        variables: Variables,
        prompt_chunk: int = PROMPT_CHUNK,
        mesh: Mesh | None = None,
    ):
        if prompt_chunk < 1 or prompt_chunk % PROMPT_MULTIPLE:
            problem = f"must be a positive multiple of {PROMPT_MULTIPLE}, found {prompt_chunk}"
            raise ValueError(f"prompt_chunk: {problem}")
        self.prompt_chunk = prompt_chunk
        self.model = model.with_attention(lambda attention: attention.replace(kernel="auto"))
        self.weights = unstack(model, variables)
        if (parts := axis_size_of(mesh.shape, "batch") if mesh else 1) > 1:
            raise ValueError(f"mesh: splits rows over {parts} devices, which decoding does not")
        self.mesh = mesh
        self._start = self._jit(self._start_, ("sampling", "slots", "end"))
        self._advance = self._jit(self._advance_, ("sampling", "count", "end"), donate_argnums=1)

    def _jit(self, function: Callable, static: Sequence[str], **settings: Any) -> Callable:
        """The function, compiled for the mesh."""
        return jax.jit(on_mesh(self.mesh, function), static_argnames=static, **settings)

    def _start_(self, weights, tokens_BT, pad_B, key, *, sampling, slots, end) -> Progress:
        chunk = min(self.prompt_chunk, tokens_BT.shape[1])
        logits_BV, cache = prefill(self.model, weights, tokens_BT, pad_B, slots, chunk)
        token_B, key = draw(logits_BV, key, sampling)
        return Progress(
            cache, token_B, jnp.int32(tokens_BT.shape[1]), pad_B, _is(token_B, end), key
        )

    def _advance_(self, weights, progress, *, sampling, count, end) -> tuple[Progress, jax.Array]:
        """Up to `count` more tokens in every row; stops early once all rows are done."""

        def going(carry):
            i, progress, _ = carry
            return (i < count) & ~jnp.all(progress.done_B)

        def one(carry):
            i, p, out_BC = carry
            token_B1 = p.token_B[:, None]
            logits_BV, cache = extend(self.model, weights, p.cache, token_B1, p.slot, p.pad_B)
            token_B, key = draw(logits_BV, p.key, sampling)
            token_B = jnp.where(p.done_B, end[0], token_B) if end else token_B
            done_B = p.done_B | _is(token_B, end)
            return (
                i + 1,
                Progress(cache, token_B, p.slot + 1, p.pad_B, done_B, key),
                out_BC.at[:, i].set(token_B),
            )

        filler = jnp.full((progress.token_B.shape[0], count), end[0] if end else 0, jnp.int32)
        _, progress, out_BC = jax.lax.while_loop(going, one, (0, progress, filler))
        return progress, out_BC

    def columns(self, longest: int) -> int:
        """Tokens that prompts are padded to, of which the longest has so many."""
        one_chunk = longest <= self.prompt_chunk
        return _up(longest, PROMPT_MULTIPLE if one_chunk else self.prompt_chunk)

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        tokens: int,
        *,
        sampling: Sampling = Sampling(),
        seed: int = 0,
        end: int | Sequence[int] | None = None,
        chunk: int = 8,
        length: int = 0,
    ) -> Iterator[np.ndarray]:
        """Yields the new tokens, [B, at most `chunk`] at a time.

        Args:
            prompts: token ids of each row, of any lengths from one.
            tokens: new tokens per row.
            end: the id that ends a row, or several that do; what follows in the row is the first of
                them, and a batch stops once all rows have ended.
            length: tokens that prompts are padded to at least, so that batches of one length share
                what is compiled.

        Raises:
            ValueError: an empty prompt, an id outside the vocabulary, or no tokens to make.
        """
        _check(prompts, tokens, self.model.vocabulary_size)
        end = ends_of(end)
        columns = self.columns(max(length, *map(len, prompts)))
        pad = np.array([columns - len(prompt) for prompt in prompts], np.int32)
        padded = np.stack(
            [np.pad(np.asarray(prompt, np.int32), (p, 0)) for prompt, p in zip(prompts, pad)]
        )
        slots = columns + _up(tokens, PROMPT_MULTIPLE)
        progress = self._start(
            self.weights, padded, pad, jax.random.key(seed), sampling=sampling, slots=slots, end=end
        )
        yield np.asarray(progress.token_B)[:, None]
        left = tokens - 1
        while left > 0 and not np.all(progress.done_B):
            progress, out = self._advance(
                self.weights, progress, sampling=sampling, count=min(chunk, tokens - 1), end=end
            )
            yield np.asarray(out)[:, :left]
            left -= chunk

    def generate(
        self, prompts: Sequence[Sequence[int]], tokens: int, **settings: Any
    ) -> list[list[int]]:
        """The new tokens of each row, without the `end` that stopped it; see `stream`, whose
        settings it takes."""
        rows = np.concatenate(
            list(self.stream(prompts, tokens, **{"chunk": tokens, **settings})), axis=1
        ).tolist()
        ends = ends_of(settings.get("end"))
        return [list(itertools.takewhile(lambda i: i not in ends, row)) for row in rows]


class Session:
    """A conversation: one cache for all of it, and what a prompt has in common with what came
    before is not computed again.

    Args:
        decoder: of the model.
        length: tokens that prompt and answer have at most.
    """

    def __init__(self, decoder: Decoder, length: int):
        self.decoder, self.length, self.ids = decoder, length, list[int]()
        self._more = decoder._jit(self._more_, ["sampling"], donate_argnums=1)
        empty = functools.partial(prefill, decoder.model, slots=length + PIECE)
        one, pad = np.zeros((1, 1), np.int32), np.zeros(1, np.int32)
        self.cache = decoder._jit(empty, [])(decoder.weights, one, pad)[1]

    def _more_(self, weights, cache, tokens_1T, slot, last, key, *, sampling):
        pad_1 = jnp.zeros(1, jnp.int32)
        model = self.decoder.model
        logits_1V, cache = extend(model, weights, cache, tokens_1T, slot, pad_1, last)
        return *draw(logits_1V, key, sampling), cache

    def stream(
        self,
        prompt: Sequence[int],
        tokens: int,
        *,
        sampling: Sampling = Sampling(),
        seed: int = 0,
        end: int | Sequence[int] | None = None,
        chunk: int = 8,
    ) -> Iterator[list[int]]:
        """Yields the new tokens, up to `chunk` of them at a time; see `Decoder.stream`.

        Raises:
            ValueError: as there, or the prompt leaves no room in the cache.
        """
        _check([prompt], tokens, self.decoder.model.vocabulary_size)
        room, ends = self.length - len(prompt), ends_of(end)
        if room < 1:
            raise ValueError(f"prompt: has {len(prompt)} tokens, the cache room for {self.length}")
        progress = self._read(list(prompt), sampling, jax.random.key(seed), ends)
        made, left = progress.token_B.tolist(), min(tokens, room) - 1
        yield made
        while left > 0 and not np.all(progress.done_B):
            how = {"sampling": sampling, "count": chunk, "end": ends}
            progress, out = self.decoder._advance(self.decoder.weights, progress, **how)
            new = out[0, :left].tolist()
            made, left = made + new, left - chunk
            self.cache = progress.cache
            self.ids = [*prompt, *made][: int(progress.slot)]
            yield new

    def _read(self, prompt, sampling, key, ends) -> Progress:
        """The prompt in the cache, from where it differs from what is there, and what follows."""
        pairs = zip(prompt[:-1], self.ids)
        begin = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        for first in range(begin, len(prompt), PIECE):
            piece = np.array(prompt[first : first + PIECE], np.int32)
            padded = np.pad(piece, (0, PIECE - len(piece)))[None]  # behind it nothing is seen
            where = np.int32(first), np.int32(len(piece) - 1)
            found = self._more(
                self.decoder.weights, self.cache, padded, *where, key, sampling=sampling
            )
            token_1, next_key, self.cache = found
        self.ids = prompt
        slot, pad_1 = jnp.int32(len(prompt)), jnp.zeros(1, jnp.int32)
        return Progress(self.cache, token_1, slot, pad_1, _is(token_1, ends), next_key)


def ends_of(end: int | Sequence[int] | None) -> tuple[int, ...]:
    """The ids that end a row."""
    return () if end is None else (end,) if isinstance(end, int) else tuple(end)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _is(token_B: jax.Array, ends: tuple[int, ...]) -> jax.Array:
    return jnp.isin(token_B, jnp.array(ends, jnp.int32))


def _check(prompts: Sequence[Sequence[int]], tokens: int, vocabulary_size: int) -> None:
    if tokens < 1:
        raise ValueError(f"tokens: must be at least 1, found {tokens}")
    if not prompts:
        raise ValueError("prompts: there is none")
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(
                f"prompts[{row}]: is empty; begin with a token, such as the end of a document"
            )
        if not 0 <= min(prompt) <= max(prompt) < vocabulary_size:
            raise ValueError(
                f"prompts[{row}]: ids must be in [0, {vocabulary_size}), found {min(prompt)} to "
                f"{max(prompt)}"
            )
