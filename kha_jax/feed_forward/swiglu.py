"""Feed-forward layers. Legend: B batch, T position, D model width, F feed-forward width."""

import flax.linen as nn
import jax

from kha_jax.modules import Aux, Module, ModuleConfig, no_aux
from kha_jax.ops.checkpoint_names import INNER, checkpoint_name
from kha_jax.ops.gating import swiglu
from kha_jax.ops.linear import linear
from kha_jax.sharding import constrain


class FeedForward(ModuleConfig):
    """What the model and the accounting ask of a feed-forward layer; sizes are per layer of a model
    of width D. Its module maps x [B, T, D] to (y [B, T, D], Aux)."""

    def parameters(self, model_width: int) -> int:
        """Parameters of one layer."""
        raise NotImplementedError

    def active_parameters(self, model_width: int) -> int:
        """Parameters that one token passes through."""
        return self.parameters(model_width)

    def flops(self, model_width: int) -> int:
        """Forward FLOPs per token."""
        return 2 * self.active_parameters(model_width)

    def stream_floats(self, model_width: int) -> int:
        """Numbers per token that the forward pass makes between the layer's input and its
        output."""
        raise NotImplementedError

    def inner_floats(self, model_width: int) -> int:
        """Numbers per token of the products that the activation reads: those of [D, F]
        matrices."""
        raise NotImplementedError

    def router_width(self) -> int:
        """Logits per token of a router, if there is one."""
        return 0

    def tokens_at_once(self, tokens: float) -> float:
        """How many of a device's tokens have them at the same time."""
        return tokens

    def segments(self, layers: int) -> list[tuple[str, int, "FeedForward"]]:
        """(name, layers, feed-forward) of the runs of equal layers, first to last: each is one
        scan."""
        return [("layers", layers, self)]


class SwiGLU(FeedForward):
    """(silu(x W_gate) * (x W_up)) W_down, no biases (Shazeer, arXiv 2002.05202)."""

    width: int = 768
    """Inner width, F."""

    def validate(self):
        self.at_least(1, "width")

    def parameters(self, model_width):
        return 3 * model_width * self.width

    def stream_floats(self, model_width):
        return 3 * self.width

    def inner_floats(self, model_width):
        return 2 * self.width

    @property
    def module(self):
        return SwiGLUModule


class SwiGLUModule(Module):
    """See SwiGLU."""

    config: SwiGLU
    model_width: int

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, Aux]:
        """The layer's output [B, T, D], and nothing beside it."""
        D, F = self.model_width, self.config.width
        gate_BTF = checkpoint_name(
            linear(x_BTD, self.weight("gate", embed=D, feed_forward=F)), INNER
        )
        up_BTF = checkpoint_name(linear(x_BTD, self.weight("up", embed=D, feed_forward=F)), INNER)
        h_BTF = constrain(swiglu(gate_BTF, up_BTF), "batch", "length", "feed_forward")
        return linear(h_BTF, self.weight("down", feed_forward=F, embed=D)), no_aux()
