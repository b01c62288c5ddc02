"""What a stream mixer is: its config, and the module that it builds.

Legend: any leading axes, N heads, H head width."""

import math
from typing import Any, Callable, ClassVar, Literal, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from kha_jax.modules import Module, ModuleConfig
from kha_jax.ops.checkpoint_names import PROJECTED, checkpoint_name
from kha_jax.ops.linear import affine, linear
from kha_jax.sharding import axis_size


class StreamMixer(ModuleConfig):
    """A member of the family; sizes are those of one stream of one layer."""

    axis: ClassVar[Literal["feature", "head"]] = "feature"
    """What its matrices mix."""
    linear: ClassVar[bool] = True
    """Whether z~ is linear in z."""
    by_head: ClassVar[bool] = False
    """Whether it treats heads differently."""
    mixes_heads: ClassVar[bool] = False
    """Whether a head of z~ depends on other heads of z."""

    @property
    def module(self):
        return StreamMixerModule

    def heads(self, heads: int) -> int:
        """Heads that attention reads where `heads` are projected."""
        return heads

    def identity_at_start(self, heads: int) -> bool:
        """Whether it starts as the identity, but for heads that are repeated."""
        return True

    def late(self, heads: int) -> bool:
        """Whether it acts between the cache and the scores and not before the cache."""
        return False

    def normed_late(self, heads: int) -> bool:
        """Whether the k norm is that of the heads that are read, not of those that are cached."""
        return False

    def why_not(self, heads: int) -> str | None:
        """Why it cannot act on this number of heads, or None."""
        return None

    def why_not_folded(self, heads: int) -> str | None:
        """Why no weights can stand for it, or None."""
        return (
            None if self.linear else "is not linear in its stream, so no weights can stand for it"
        )

    def effective(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The matrices [..., n, m] that its parameters stand for, by name: what is traced, measured
        and drawn. The parameters themselves by default."""
        return dict(params)

    def linear_map(self, params: Mapping[str, Any]) -> Any:
        """T [..., H, H] in z~ = z T for small z, or None where no such T is shared by all heads."""
        if not self.linear or self.by_head:
            return None
        (T,) = self.effective(params).values()
        return T

    def parameters(self, heads: int, head_dim: int) -> int:
        """Parameters per layer."""
        return 0

    def vector_flops(self, heads: int, head_dim: int) -> int:
        """FLOPs of one application to [heads, H]."""
        return 2 * heads * self.parameters(heads, head_dim)

    def on_weights(self, rows: int, tokens: float) -> bool:
        """Whether the mixer is applied to a projection's weights [rows, heads, H] rather than to
        `tokens` activations."""
        return False

    def flops(self, heads: int, head_dim: int, rows: int, tokens: float) -> float:
        """Forward FLOPs per token in a step of `tokens`: for each token, or each row of weights."""
        per_vector = self.vector_flops(heads, head_dim)
        if self.on_weights(rows, tokens) and not self.late(heads):
            return per_vector * rows / tokens
        return per_vector


class NoMixer(StreamMixer):
    """z: the baseline."""

    def linear_map(self, params):
        return None


class LinearMixer(StreamMixer):
    """A linear map of the stream, (x W) T = x (W T): the same function and gradients, at the price
    of the tokens or of the weights' rows."""

    apply: Literal["auto", "weights", "activations"] = "auto"
    """T acts on `activations`, x W, or on `weights`, W; `auto`: on those with fewer rows."""

    def on_weights(self, rows, tokens):
        return self.apply == "weights" or self.apply == "auto" and rows < tokens


def transform(z: jax.Array, T: jax.Array) -> jax.Array:
    """z T over the last axis. Heads that are split over devices are not flattened with the rows,
    which would gather them."""
    return linear(z, T) if axis_size("heads") == 1 else jnp.matmul(z, T)


def diagonal(value: float) -> Callable:
    """An initialiser for `value` times the identity."""
    return lambda key, shape, dtype: value * jnp.eye(*shape, dtype=dtype)


def normal() -> Callable:
    """An initialiser with variance 1 / rows."""
    return nn.initializers.variance_scaling(1.0, "fan_in", "normal")


class StreamMixerModule(Module):
    """Base of the mixer modules, and the identity."""

    config: StreamMixer
    heads: int = 0
    head_dim: int = 0

    def matrix(self, name: str, init: Callable, size: int, out: int | None = None) -> jax.Array:
        """A small parameter [size, out or size] that every device holds whole."""
        return self.weight(name, init, mixer_in=size, mixer_out=out or size)

    def __call__(self, z: jax.Array) -> jax.Array:
        """z~ in the dtype of z."""
        return z

    def project(self, x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        """What is cached, for x[..., rows], W[rows, heads, H] and b[heads, H]: mixer(x W + b),
        through W and b where the config says so."""
        rows = kernel.shape[0] + (bias is not None)
        if self.config.on_weights(rows, math.prod(x.shape[:-1])):
            mixed = None if bias is None else self(bias)
            return checkpoint_name(affine(x, self(kernel), mixed), PROJECTED)
        return self(checkpoint_name(affine(x, kernel, bias), PROJECTED))

    def read(self, z: jax.Array, axis: int) -> jax.Array:
        """What the scores read of cached z, whose heads are along `axis`."""
        return z
