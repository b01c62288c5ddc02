"""The decoder-only transformer: embedding, a scanned stack of pre-norm blocks, final norm, output
embedding, loss.

Legend: B batch, T position, D model width, V vocabulary.
"""

import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from kha_jax.attention import AttentionConfig
from kha_jax.attention.projections import State
from kha_jax.config import Config, ConfigError, choice
from kha_jax.feed_forward import FeedForward, SwiGLU
from kha_jax.moe import MoE
from kha_jax.ops import losses
from kha_jax.parameters import Module, Numerics, RMSNorm
from kha_jax.sharding import constrain, per_device, sum_over, ways

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
FEED_FORWARDS = {"swiglu": SwiGLU, "moe": MoE}
Batch = dict[str, jax.Array]


class LossConfig(Config):
    """z_loss: weight of the squared log-partition. chunk_tokens: tokens whose logits exist at once,
    over the whole batch."""

    z_loss: float = 0.0
    chunk_tokens: int = 1024

    def validate(self):
        self.at_least(0, "z_loss")
        self.at_least(1, "chunk_tokens")


class ModelConfig(Config):
    """A decoder-only transformer.

    layers, width (D), vocabulary_size (V). embeddings: `tied` shares the input and output table,
    `untied` has two. stack: `scan` compiles one block for all layers, `unroll` lays them out (the
    parameters are the same tree). remat: what the backward pass recomputes: `none`, `dots` keeps
    matrix products of the layer, `full` keeps the layer's input only.
    """

    layers: int = 4
    width: int = 256
    vocabulary_size: int = 264
    embeddings: Literal["tied", "untied"] = "tied"
    stack: Literal["scan", "unroll"] = "scan"
    remat: Literal["none", "dots", "full"] = "none"
    attention: AttentionConfig = AttentionConfig()
    feed_forward: FeedForward = choice(FEED_FORWARDS, SwiGLU())
    loss: LossConfig = LossConfig()
    numerics: Numerics = Numerics()

    def validate(self):
        self.at_least(1, "layers", "width")
        self.at_least(2, "vocabulary_size")
        try:
            self.feed_forward.segments(self.layers)
        except ConfigError as error:
            raise error.under("feed_forward") from None

    def build(self) -> "Transformer":
        return Transformer(config=self, numerics=self.numerics)


class Block(Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    config: ModelConfig
    feed_forward_config: FeedForward

    def setup(self):
        c, D = self.config, self.config.width
        norm = functools.partial(RMSNorm, numerics=self.numerics, axis="embed")
        self.attention_norm, self.feed_forward_norm = norm(), norm()
        self.attention = c.attention.build(width=D, numerics=self.numerics)
        self.feed_forward = self.feed_forward_config.build(model_width=D, numerics=self.numerics)

    def __call__(self, x_BTD: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array | None):
        """The block's output and named metrics."""
        x_BTD, attention_aux, aux = self._residuals(
            x_BTD, lambda y: self.attention(y, positions_BT, segment_ids_BT)
        )
        return x_BTD, {**attention_aux, **aux}

    def prefill(self, x_BTD: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array):
        """The block's output and the state of its attention; see Attention.prefill."""
        return self._residuals(
            x_BTD, lambda y: self.attention.prefill(y, positions_BT, segment_ids_BT)
        )[:2]

    def extend(
        self,
        x_B1D: jax.Array,
        positions_B1: jax.Array,
        cache: State,
        slot: jax.Array,
        visible_BS: jax.Array,
    ):
        """The block's output for one more token and the cache that holds it; see
        Attention.extend."""
        return self._residuals(
            x_B1D, lambda y: self.attention.extend(y, positions_B1, cache, slot, visible_BS)
        )[:2]

    def _residuals(self, x_BTD, attend):
        x_BTD = constrain(x_BTD, "batch", "length", "features")
        y_BTD, from_attention = attend(self.attention_norm(x_BTD))
        x_BTD = x_BTD + y_BTD
        y_BTD, aux = self.feed_forward(self.feed_forward_norm(x_BTD))
        return constrain(x_BTD + y_BTD, "batch", "length", "features"), from_attention, aux


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
            block = nn.remat(Block, policy=REMAT_POLICIES[c.remat], prevent_cse=c.stack == "unroll")
        for name, length, feed_forward in c.feed_forward.segments(c.layers):
            layers = nn.scan(
                block,
                variable_axes={"params": 0, "balance": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=length,
                unroll=length if c.stack == "unroll" else 1,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            setattr(
                self,
                name,
                layers(config=c, feed_forward_config=feed_forward, numerics=self.numerics),
            )

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        """Embedded tokens [B, T, D]."""
        with jax.named_scope("embed"):
            return constrain(self.embedding[tokens_BT], "batch", "length", "features")

    def hidden(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array | None = None
    ):
        """Final normalised hidden states [B, T, D] and metrics stacked over layers."""
        x_BTD, aux = self.embed(tokens_BT), {}
        for name, _, _ in self.config.feed_forward.segments(self.config.layers):
            x_BTD, more = getattr(self, name)(x_BTD, positions_BT, segment_ids_BT)
            aux |= more
        return self.final_norm(x_BTD), aux

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

    def loss(self, batch: Batch) -> tuple[jax.Array, tuple[losses.TokenSums, dict[str, Any]]]:
        """The objective summed over the batch's weighted tokens, the token sums, and the layers'
        metrics."""
        x_BTD, aux = self.hidden(batch["tokens"], batch["positions"], batch["segment_ids"])
        objective, sums = self._cross_entropy(x_BTD, batch["targets"], batch["weights"])
        if "router_loss" in aux:
            objective += jnp.sum(aux["router_loss"]) * sums.tokens
        return objective, (sums, aux)

    def _cross_entropy(self, x_BTD, targets_BT, weights_BT):
        """Each device takes its own tokens, split over all mesh axes, through the whole table,
        whose gradient is summed once."""
        c, tokens = self.config.loss, ("batch", "loss_length")
        chunk = max(1, c.chunk_tokens // ways(*tokens))

        def local(x_BTD, table_VD, targets_BT, weights_BT):
            sums = losses.cross_entropy(
                x_BTD, table_VD, targets_BT, weights_BT, z_loss=c.z_loss, chunk_tokens=chunk
            )
            return sum_over(sums, *tokens)

        scalars = ((), losses.TokenSums((), (), (), ()))
        each = per_device(local, ((*tokens, None), (None, None), tokens, tokens), scalars)
        return each(x_BTD, self.output_table(), targets_BT, weights_BT)
