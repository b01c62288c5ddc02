"""Stream mixers: maps z -> z~ of queries, keys or values between projection and q/k norm, the identity at initialisation.

Knocking-heads attention (arXiv 2510.23052): one [H, H] matrix per projection and layer, shared by all heads of that
projection and acting on the features of each head. Nothing is summed over heads, so a knocking mixer commutes with any
permutation of the heads, and whatever a head learns about the shared matrix reaches all others through it.

Legend: any leading axes, N heads, H head width.
"""

from typing import Callable, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from kha_jax.config import Config
from kha_jax.ops.gating import sigmoid_gate
from kha_jax.ops.linear import linear
from kha_jax.parameters import Module, Numerics


class StreamMixer(Config):
    """A member of the family. `matrices` counts the [H, H] matrices; `linear` mixers fold into the projection weights."""

    matrices: ClassVar[int] = 0
    linear: ClassVar[bool] = True

    def parameters(self, head_dim: int) -> int:
        """Parameters per layer."""
        return self.matrices * head_dim**2

    def flops(self, heads: int, head_dim: int) -> int:
        """Forward FLOPs per token when applied to activations: 2 H^2 per matrix and head."""
        return 2 * heads * self.matrices * head_dim**2

    def build(self, head_dim: int, numerics: Numerics, name: str) -> Callable[[jax.Array], jax.Array]:
        """The map z[..., H] -> z~[..., H]; here the identity, without a parameter."""
        return lambda z: z


class NoMixer(StreamMixer):
    """z: the baseline."""


class KnockingLinear(StreamMixer):
    """z T, T = diag_init * I at the start (paper, equations 5-7).

    diag_init: initial diagonal. parameterization: `direct` stores T; `residual` stores D in T = diag_init * I + D, D = 0 at
    the start, which changes what weight decay pulls towards.
    """

    matrices = 1
    diag_init: float = 1.0
    parameterization: Literal["direct", "residual"] = "direct"

    def build(self, head_dim, numerics, name):
        return Linear(config=self, head_dim=head_dim, numerics=numerics, name=name)


class KnockingGate(StreamMixer):
    """z * 2 sigmoid(z W_gate), W_gate = 0 at the start (paper, table 2: harmful on its own; the equation is inferred)."""

    matrices = 1
    linear = False

    def build(self, head_dim, numerics, name):
        return Gate(head_dim=head_dim, numerics=numerics, name=name)


class KnockingMLP(StreamMixer):
    """2 ((z W_up) * sigmoid(z W_gate)) W_down, W_up = W_down = I and W_gate = 0 at the start (paper, equation 9)."""

    matrices = 3
    linear = False

    def build(self, head_dim, numerics, name):
        return MLP(head_dim=head_dim, numerics=numerics, name=name)


STREAM_MIXERS = {"none": NoMixer, "linear": KnockingLinear, "gate": KnockingGate, "mlp": KnockingMLP}


def diagonal(value: float) -> Callable:
    """An initialiser for `value` times the identity."""
    return lambda key, shape, dtype: value * jnp.eye(*shape, dtype=dtype)


class KnockingModule(Module):
    """A module whose parameters are [H, H] matrices that start at a known value rather than at random."""

    head_dim: int

    def matrix(self, name: str, init: Callable) -> jax.Array:
        return self.weight(name, init, knock_in=self.head_dim, knock_out=self.head_dim)


class Linear(KnockingModule):
    """See KnockingLinear."""

    config: KnockingLinear

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        identity = diagonal(self.config.diag_init)
        if self.config.parameterization == "direct":
            return linear(z, self.matrix("kernel", identity))
        initial = identity(None, (self.head_dim, self.head_dim), z.dtype)
        return linear(z, initial + self.matrix("residual", nn.initializers.zeros))


class Gate(KnockingModule):
    """See KnockingGate."""

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        return sigmoid_gate(linear(z, self.matrix("gate", nn.initializers.zeros)), z)


class MLP(KnockingModule):
    """See KnockingMLP."""

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        up = linear(z, self.matrix("up", diagonal(1.0)))
        gate = linear(z, self.matrix("gate", nn.initializers.zeros))
        return linear(sigmoid_gate(gate, up), self.matrix("down", diagonal(1.0)))
