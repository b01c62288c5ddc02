"""Stream mixers: maps z -> z~ of queries, keys or values between projection and q/k norm, the
identity at initialisation.

Knocking-heads attention (arXiv 2510.23052): one [H, H] matrix per projection and layer, shared by
all heads of that projection and acting on the features of each head. Nothing is summed over heads,
so a knocking mixer commutes with any permutation of the heads, and whatever a head learns about the
shared matrix reaches all others through it.

Legend: any leading axes, N heads, H head width.
"""

import math
from typing import Callable, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from kha_jax.config import Config
from kha_jax.ops.gating import sigmoid_gate
from kha_jax.ops.linear import linear
from kha_jax.parameters import Module, Numerics
from kha_jax.sharding import ways


class StreamMixer(Config):
    """A member of the family. `matrices` counts the [H, H] matrices; `linear` mixers fold into the
    projection weights."""

    matrices: ClassVar[int] = 0
    linear: ClassVar[bool] = True

    def parameters(self, head_dim: int) -> int:
        """Parameters per layer."""
        return self.matrices * head_dim**2

    def on_weights(self, rows: int, tokens: float) -> bool:
        """Whether the mixer is applied to a projection's weights [rows, heads, H] rather than to
        `tokens` activations."""
        return False

    def flops(self, heads: int, head_dim: int, rows: int, tokens: float) -> float:
        """Forward FLOPs per token in a step of `tokens`: 2 H^2 per matrix and head, for each token
        or each row of weights."""
        per_vector = 2 * heads * self.matrices * head_dim**2
        return per_vector * rows / tokens if self.on_weights(rows, tokens) else per_vector

    def build(self, head_dim: int, numerics: Numerics, name: str) -> "Mixer":
        """The map z[..., H] -> z~[..., H] as a module."""
        raise NotImplementedError


class NoMixer(StreamMixer):
    """z: the baseline."""

    def build(self, head_dim, numerics, name):
        return Mixer(config=self, numerics=numerics, name=name)


class KnockingLinear(StreamMixer):
    """z T, T = diag_init * I at the start (paper, equations 5-7).

    diag_init: initial diagonal. parameterization: `direct` stores T; `residual` stores D in T =
    diag_init * I + D, D = 0 at the start, which changes what weight decay pulls towards. apply: to
    `activations`, (x W) T, or to `weights`, x (W T), the same function and gradients at the price
    of the weights' rows instead of the tokens; `auto` takes the fewer.
    """

    matrices = 1
    diag_init: float = 1.0
    parameterization: Literal["direct", "residual"] = "direct"
    apply: Literal["auto", "weights", "activations"] = "auto"

    def on_weights(self, rows, tokens):
        return self.apply == "weights" or self.apply == "auto" and rows < tokens

    def build(self, head_dim, numerics, name):
        return Linear(config=self, head_dim=head_dim, numerics=numerics, name=name)


class KnockingGate(StreamMixer):
    """z * 2 sigmoid(z W_gate), W_gate = 0 at the start (paper, table 2: harmful on its own; the
    equation is inferred)."""

    matrices = 1
    linear = False

    def build(self, head_dim, numerics, name):
        return Gate(config=self, head_dim=head_dim, numerics=numerics, name=name)


class KnockingMLP(StreamMixer):
    """2 ((z W_up) * sigmoid(z W_gate)) W_down, W_up = W_down = I and W_gate = 0 at the start
    (paper, equation 9)."""

    matrices = 3
    linear = False

    def build(self, head_dim, numerics, name):
        return MLP(config=self, head_dim=head_dim, numerics=numerics, name=name)


STREAM_MIXERS = {
    "none": NoMixer,
    "linear": KnockingLinear,
    "gate": KnockingGate,
    "mlp": KnockingMLP,
}


def transform(z: jax.Array, T: jax.Array) -> jax.Array:
    """z T over the last axis. Heads that are split over devices are not flattened with the rows,
    which would gather them."""
    return linear(z, T) if ways("heads") == 1 else jnp.matmul(z, T)


def diagonal(value: float) -> Callable:
    """An initialiser for `value` times the identity."""
    return lambda key, shape, dtype: value * jnp.eye(*shape, dtype=dtype)


class Mixer(Module):
    """Base of the mixer modules, and the identity."""

    config: StreamMixer

    def __call__(self, z: jax.Array) -> jax.Array:
        """z~ in the shape and dtype of z."""
        return z

    def project(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """mixer(x W) for x[..., rows] and W[rows, heads, H], through the weights where the config
        says so."""
        if self.config.on_weights(kernel.shape[0], math.prod(x.shape[:-1])):
            return linear(x, self(kernel))
        return self(linear(x, kernel))


class KnockingModule(Mixer):
    """A mixer whose parameters are [H, H] matrices that start at a known value rather than at
    random."""

    head_dim: int = 0

    def matrix(self, name: str, init: Callable) -> jax.Array:
        return self.weight(name, init, knock_in=self.head_dim, knock_out=self.head_dim)


class Linear(KnockingModule):
    """See KnockingLinear."""

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        identity = diagonal(self.config.diag_init)
        if self.config.parameterization == "direct":
            return transform(z, self.matrix("kernel", identity))
        initial = identity(None, (self.head_dim, self.head_dim), z.dtype)
        return transform(z, initial + self.matrix("residual", nn.initializers.zeros))


class Gate(KnockingModule):
    """See KnockingGate."""

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        return sigmoid_gate(transform(z, self.matrix("gate", nn.initializers.zeros)), z)


class MLP(KnockingModule):
    """See KnockingMLP."""

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        up, down = (self.matrix(name, diagonal(1.0)) for name in ("up", "down"))
        gate = self.matrix("gate", nn.initializers.zeros)
        # Only z is kept for the gradient: the rest costs three activations of memory and next to
        # nothing to compute again.
        return jax.checkpoint(_mlp)(z, up, gate, down)


def _mlp(z, up, gate, down):
    return transform(sigmoid_gate(transform(z, gate), transform(z, up)), down)
