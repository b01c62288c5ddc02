"""The decoder-only transformer: embedding, a scanned stack of pre-norm blocks, final norm, output
embedding, loss.

Legend: B batch, T position, D model width, V vocabulary.
"""

import functools
import itertools
from typing import Any, Callable, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from kha_jax.attention import AttentionConfig
from kha_jax.attention.projections import State
from kha_jax.config import Config, ConfigError, choice
from kha_jax.feed_forward import FeedForward, MoE, SwiGLU
from kha_jax.modules import Aux, Module, ModuleConfig, Numerics, RMSNorm, no_aux
from kha_jax.ops import losses
from kha_jax.ops.checkpoint_names import STREAM, checkpoint_name
from kha_jax.remat import POLICIES, jax_policy
from kha_jax.sharding import axis_size, constrain, per_device, sum_over

FEED_FORWARDS = {"swiglu": SwiGLU, "moe": MoE}
Batch = dict[str, jax.Array]


class LossConfig(Config):
    """Cross-entropy of the next token, z_loss * log(Z)^2 added."""

    z_loss: float = 0.0
    """Weight of the squared log-partition."""
    chunk_tokens: int = 1024
    """Tokens whose logits exist at once, over the whole batch."""

    def validate(self):
        self.at_least(0, "z_loss")
        self.at_least(1, "chunk_tokens")


class SameAttention(Config):
    """All layers have the model's `attention`."""


class AttentionFrom(Config):
    """The last layers have an attention of their own."""

    layer: int = 1
    """First layer that has it, counted from 0."""
    attention: AttentionConfig = AttentionConfig()
    """Attention of those layers; on the command line, what is not set is as the model's."""

    def validate(self):
        self.at_least(1, "layer")


LATER = {"same": SameAttention, "from": AttentionFrom}


class Segment(NamedTuple):
    """A run of equal layers: one scan, whose parameters stand under `name`."""

    name: str
    layers: int
    attention: AttentionConfig
    feed_forward: FeedForward


class ModelConfig(ModuleConfig):
    """A decoder-only transformer.

    A stack that is unrolled spares a CPU the copies in and out of what layers keep; the parameters
    are the same tree. Kept for the backward pass (`kha_jax.remat.POLICIES`), from least to most:
    `full` the layer's input alone; `attention` also what attention and the router give;
    `projections` also queries, keys and values; `inner` all products that a gradient reads; `dots`
    every matrix product, those of kernels too; `none` rematerialises nothing.
    """

    layers: int = 4
    """Layers, dense ones of a mixture of experts included."""
    width: int = 256
    """Width of the residual stream, D."""
    vocabulary_size: int = 264
    """Rows of the embedding table, V; at least the ids of the data."""
    embeddings: Literal["tied", "untied"] = "tied"
    """Whether input and output share one table."""
    stack: Literal["scan", "unroll"] = "scan"
    """`scan` compiles one block for all layers; `unroll` each, for fewer copies on a CPU."""
    remat: Literal[tuple(POLICIES)] = "none"
    """What of a layer is kept for the backward pass, from little to all; the rest runs again."""
    attention: AttentionConfig = AttentionConfig()
    """Attention of the layers."""
    later: SameAttention | AttentionFrom = choice(
        LATER, SameAttention(), like={"attention": "attention"}
    )
    """Whether later layers have another attention."""
    feed_forward: FeedForward = choice(FEED_FORWARDS, SwiGLU())
    """Feed-forward of the layers."""
    loss: LossConfig = LossConfig()
    """How the next token's cross-entropy is computed, and what is added to it."""
    numerics: Numerics = Numerics()
    """Precision and initial scale."""

    def validate(self):
        self.at_least(1, "layers", "width")
        self.at_least(2, "vocabulary_size")
        try:
            self.feed_forward.segments(self.layers)
        except ConfigError as error:
            raise error.under("feed_forward") from None
        if isinstance(self.later, AttentionFrom):
            problem = f"must be below layers={self.layers}, found {self.later.layer}"
            self.require(self.later.layer < self.layers, "later.layer", problem)

    def attentions(self) -> dict[str, AttentionConfig]:
        """The attention of the first layers, and of later ones that differ, by its field."""
        later = isinstance(self.later, AttentionFrom)
        return {"attention": self.attention} | (
            {"later.attention": self.later.attention} if later else {}
        )

    def with_attention(self, change: Callable[[AttentionConfig], AttentionConfig]) -> "ModelConfig":
        """The model with every layer's attention changed."""
        changed = self.replace(attention=change(self.attention))
        if isinstance(self.later, AttentionFrom):
            later = self.later.replace(attention=change(self.later.attention))
            changed = changed.replace(later=later)
        return changed

    def segments(self) -> list[Segment]:
        """The runs of equal layers, first to last."""
        changes = {self.later.layer} if isinstance(self.later, AttentionFrom) else set()
        out, begin = [], 0
        for name, layers, feed_forward in self.feed_forward.segments(self.layers):
            end = begin + layers
            inside = sorted(at for at in changes if begin < at < end)
            for first, last in itertools.pairwise([begin, *inside, end]):
                late = bool(changes) and first >= min(changes)
                attention = self.later.attention if late else self.attention
                unique = name if first == begin else f"{name}_{first}"
                out.append(Segment(unique, last - first, attention, feed_forward))
            begin = end
        return out

    @property
    def module(self):
        return Transformer

    def build(self, **arguments: Any) -> "Transformer":
        return super().build(numerics=self.numerics, **arguments)


class Block(Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    width: int
    attention_config: AttentionConfig
    feed_forward_config: FeedForward

    def setup(self):
        norm = functools.partial(RMSNorm, numerics=self.numerics, axis="embed")
        self.attention_norm, self.feed_forward_norm = norm(), norm()
        self.attention = self.attention_config.build(width=self.width, numerics=self.numerics)
        self.feed_forward = self.feed_forward_config.build(
            model_width=self.width, numerics=self.numerics
        )

    def __call__(
        self, x_BTD: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array | None
    ) -> tuple[jax.Array, Aux]:
        """The block's output and what comes beside it."""

        def attend(y_BTD):
            return self.attention(y_BTD, positions_BT, segment_ids_BT)

        x_BTD, attention_aux, aux = self._residuals(x_BTD, attend)
        return x_BTD, no_aux().joined(attention=attention_aux, feed_forward=aux)

    def prefill(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array,
        slots: int | None = None,
    ):
        """The block's output and the cache of its attention; see Attention.prefill."""

        def attend(y_BTD):
            return self.attention.prefill(y_BTD, positions_BT, segment_ids_BT, slots)

        return self._residuals(x_BTD, attend)[:2]

    def extend(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        cache: State,
        slot: jax.Array,
        pad_B: jax.Array,
        first_BT: jax.Array | None = None,
    ):
        """The block's output for T more tokens and the cache that holds them; see
        Attention.extend."""

        def attend(y_BTD):
            return self.attention.extend(y_BTD, positions_BT, cache, slot, pad_B, first_BT)

        return self._residuals(x_BTD, attend)[:2]

    def _residuals(self, x_BTD, attend):
        x_BTD = constrain(x_BTD, "batch", "length", "features")
        y_BTD, from_attention = attend(self.attention_norm(x_BTD))
        x_BTD = checkpoint_name(x_BTD + y_BTD, STREAM)
        y_BTD, aux = self.feed_forward(self.feed_forward_norm(x_BTD))
        return constrain(x_BTD + y_BTD, "batch", "length", "features"), from_attention, aux


def block_fields(model: ModelConfig, segment: Segment) -> dict[str, Any]:
    """What a Block of this segment is made with."""
    return {
        "width": model.width,
        "attention_config": segment.attention,
        "feed_forward_config": segment.feed_forward,
        "numerics": model.numerics,
    }


def in_order(parts: dict[str, Aux]) -> Aux:
    """One Aux from those of the scanned segments: the sum of all losses, the counts of each segment
    under its name, and every metric over the layers that have it, [layers], first to last."""
    metrics: dict[str, list[jax.Array]] = {}
    for part in parts.values():
        for name, values_L in part.metrics.items():
            metrics.setdefault(name, []).append(values_L)
    return Aux(
        sum(jnp.sum(part.loss) for part in parts.values()),
        {name: part.counts for name, part in parts.items() if part.counts},
        {name: jnp.concatenate(values) for name, values in metrics.items()},
    )


class Transformer(Module):
    """See ModelConfig. A batch holds tokens, targets, positions, segment_ids (int32) and weights
    (float32), all [B, T]."""

    config: ModelConfig

    def setup(self):
        c = self.config
        self.embedding = self.weight("embedding", vocabulary=c.vocabulary_size, embed=c.width)
        if c.embeddings == "untied":
            self.unembedding = self.weight(
                "unembedding", vocabulary=c.vocabulary_size, embed=c.width
            )
        self.final_norm = RMSNorm(numerics=self.numerics, axis="embed")
        block = Block
        if c.remat != "none":
            block = nn.remat(Block, policy=jax_policy(c.remat), prevent_cse=c.stack == "unroll")
        for segment in c.segments():
            layers = nn.scan(
                block,
                variable_axes={"params": 0, "balance": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=segment.layers,
                unroll=segment.layers if c.stack == "unroll" else 1,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            setattr(self, segment.name, layers(**block_fields(c, segment)))

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        """Embedded tokens [B, T, D]."""
        with jax.named_scope("embed"):
            return constrain(self.embedding[tokens_BT], "batch", "length", "features")

    def hidden(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array | None = None
    ):
        """Final normalised hidden states [B, T, D] and the Aux of all layers, see `in_order`."""
        x_BTD, parts = self.embed(tokens_BT), {}
        for segment in self.config.segments():
            x_BTD, parts[segment.name] = getattr(self, segment.name)(
                x_BTD, positions_BT, segment_ids_BT
            )
        return self.final_norm(x_BTD), in_order(parts)

    def output_table(self) -> jax.Array:
        """The output embedding [V, D]."""
        return self.embedding if self.config.embeddings == "tied" else self.unembedding

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
    ):
        """Logits [B, T, V] in float32, for tests and small vocabularies; training goes through
        `loss`."""
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        x_BTD, _ = self.hidden(tokens_BT, positions_BT, segment_ids_BT)
        return self.logits(x_BTD)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Logits [B, T, V] in float32 of normalised hidden states."""
        return jnp.einsum(
            "BTD,VD->BTV", x_BTD, self.output_table(), preferred_element_type=jnp.float32
        )

    def next_token_logits(self, x_BD: jax.Array) -> jax.Array:
        """Logits [B, V] in float32 of the last block's outputs."""
        return self.logits(self.final_norm(x_BD)[:, None])[:, 0]

    def loss(self, batch: Batch) -> tuple[jax.Array, tuple[losses.TokenSums, Aux]]:
        """The objective summed over the batch's weighted tokens, the token sums, and the Aux of all
        layers."""
        x_BTD, aux = self.hidden(batch["tokens"], batch["positions"], batch["segment_ids"])
        objective, sums = self._cross_entropy(x_BTD, batch["targets"], batch["weights"])
        return objective + aux.loss * sums.tokens, (sums, aux)

    def _cross_entropy(self, x_BTD, targets_BT, weights_BT):
        """Each device takes its own tokens, split over all mesh axes, through the whole table,
        whose gradient is summed once."""
        c, tokens = self.config.loss, ("batch", "loss_length")
        chunk = max(1, c.chunk_tokens // axis_size(*tokens))

        def local(x_BTD, table_VD, targets_BT, weights_BT):
            sums = losses.cross_entropy(
                x_BTD, table_VD, targets_BT, weights_BT, z_loss=c.z_loss, chunk_tokens=chunk
            )
            return sum_over(sums, *tokens)

        scalars = ((), losses.TokenSums((), (), (), ()))
        each = per_device(local, ((*tokens, None), (None, None), tokens, tokens), scalars)
        return each(x_BTD, self.output_table(), targets_BT, weights_BT)
