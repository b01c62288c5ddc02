"""Stream mixers: maps z -> z~ of queries, keys or values between projection and q/k norm, the
identity at initialisation.

Knocking-heads attention (arXiv 2510.23052): one [H, H] matrix per projection and layer, shared by
all heads of that projection and acting on the features of each head. Nothing is summed over heads,
so a knocking mixer commutes with any permutation of the heads, and whatever a head learns about the
shared matrix reaches all others through it.

Legend: any leading axes, N heads, H head width.
"""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kha_jax.attention.stream_mixer import (
    LinearMixer,
    NoMixer,
    StreamMixer,
    StreamMixerModule,
    diagonal,
    normal,
    transform,
)
from kha_jax.ops.checkpoint_names import PROJECTED, checkpoint_name
from kha_jax.ops.gating import sigmoid_gate
from kha_jax.ops.linear import affine


class KnockingLinear(LinearMixer):
    """z T, T = diag_init * I at the start (paper, equations 5-7). The start `normal` is a control
    that the paper says fails (section 3.3)."""

    diag_init: float = 1.0
    """Diagonal of T at the start."""
    parameterization: Literal["direct", "residual"] = "direct"
    """Stored is T, or D = T - diag_init * I, which weight decay pulls to zero."""
    init: Literal["diagonal", "normal"] = "diagonal"
    """T at the start: diagonal, or normal with variance 1 / head_dim and no diagonal."""

    def validate(self):
        plain = self.diag_init == 1.0 and self.parameterization == "direct"
        problem = "'normal' knows no diag_init and no parameterization but 'direct'; leave them out"
        self.require(self.init == "diagonal" or plain, "init", problem)

    @property
    def module(self):
        return KnockingLinearModule

    def identity_at_start(self, heads):
        return self.init == "diagonal" and self.diag_init == 1.0

    def effective(self, params):
        return {
            name: leaf + self.diag_init * np.eye(leaf.shape[-1], dtype=leaf.dtype)
            if name == "residual"
            else leaf
            for name, leaf in params.items()
        }

    def parameters(self, heads, head_dim):
        return head_dim**2


class KnockingGate(StreamMixer):
    """z * 2 sigmoid(z W_gate), W_gate = 0 at the start (paper, table 2: harmful on its own; the
    equation is inferred)."""

    linear = False

    @property
    def module(self):
        return KnockingGateModule

    def parameters(self, heads, head_dim):
        return head_dim**2


class KnockingMLP(StreamMixer):
    """2 ((z W_up) * sigmoid(z W_gate)) W_down, W_up = W_down = I and W_gate = 0 at the start
    (paper, equation 9)."""

    linear = False

    @property
    def module(self):
        return KnockingMLPModule

    def linear_map(self, params):
        return params["up"] @ params["down"]  # the gate is 1 at z = 0

    def parameters(self, heads, head_dim):
        return 3 * head_dim**2


class HeadComposition(LinearMixer):
    """z~_m = sum over heads n of z_n W[n, m]: MEA's head-level composition (arXiv 2601.19611).

    More heads read than are projected are virtual heads: the fewer ones are cached and composed
    when they are read. Where the numbers differ, `identity` repeats heads or takes the mean of
    neighbours. That it starts there and acts before the k norm is inferred; the paper's text leaves
    both open. On q, k and v it is interleaved-head attention with one pseudo-head (arXiv
    2602.21371), without its output collapse, which then folds into W_O.
    """

    axis = "head"
    by_head = mixes_heads = True
    heads_read: int | None = None
    """Heads that it makes, as many as are projected by default."""
    before_norm: bool = True
    """Whether it acts before the k norm, as it must to fold into the weights, or after it."""
    init: Literal["identity", "normal"] = "identity"
    """W at the start: every head itself, or normal with variance 1 / heads."""

    @property
    def module(self):
        return HeadCompositionModule

    def validate(self):
        self.at_least(1, "heads_read")

    def heads(self, heads):
        return self.heads_read or heads

    def identity_at_start(self, heads):
        return self.init == "identity" and self.heads(heads) >= heads

    def late(self, heads):
        return not self.before_norm or self.heads(heads) > heads

    def normed_late(self, heads):
        return self.before_norm and self.late(heads)

    def why_not(self, heads):
        read = self.heads(heads)
        if self.init == "identity" and read % heads and heads % read:
            return f"{heads} heads do not repeat into {read}; use a multiple or init='normal'"
        return None

    def why_not_folded(self, heads):
        if not self.late(heads):
            return None
        return f"composes its {heads} cached heads when they are read, so no weights stand for it"

    def parameters(self, heads, head_dim):
        return heads * self.heads(heads)

    def vector_flops(self, heads, head_dim):
        return 2 * head_dim * self.parameters(heads, head_dim)


class UnsharedLinear(LinearMixer):
    """z_n T_n with a matrix for each head, T_n = I at the start: KHA-Linear without what its heads
    share, a control."""

    by_head = True

    @property
    def module(self):
        return UnsharedLinearModule

    def parameters(self, heads, head_dim):
        return heads * head_dim**2

    def vector_flops(self, heads, head_dim):
        return 2 * heads * head_dim**2


STREAM_MIXERS = {
    "none": NoMixer,
    "linear": KnockingLinear,
    "gate": KnockingGate,
    "mlp": KnockingMLP,
    "compose": HeadComposition,
    "unshared": UnsharedLinear,
}


def repetition(key: jax.Array, shape: tuple[int, int], dtype: Any) -> jax.Array:
    """An initial W [heads, heads read]: each head repeated, or the mean of neighbouring ones."""
    heads, read = shape
    fewer = min(heads, read)
    block = jnp.arange(heads)[:, None] * fewer // heads == jnp.arange(read) * fewer // read
    return (block * (fewer / heads)).astype(dtype)


class KnockingLinearModule(StreamMixerModule):
    """See KnockingLinear."""

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        identity = diagonal(self.config.diag_init)
        if self.config.parameterization == "direct":
            init = identity if self.config.init == "diagonal" else normal()
            return transform(z, self.matrix("kernel", init, self.head_dim))
        initial = identity(None, (self.head_dim, self.head_dim), z.dtype)
        return transform(z, initial + self.matrix("residual", nn.initializers.zeros, self.head_dim))


class KnockingGateModule(StreamMixerModule):
    """See KnockingGate."""

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        return sigmoid_gate(
            transform(z, self.matrix("gate", nn.initializers.zeros, self.head_dim)), z
        )


class KnockingMLPModule(StreamMixerModule):
    """See KnockingMLP."""

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        up, down = (self.matrix(name, diagonal(1.0), self.head_dim) for name in ("up", "down"))
        gate = self.matrix("gate", nn.initializers.zeros, self.head_dim)
        # Only z is kept for the gradient: the rest costs three activations of memory and next to
        # nothing to compute again.
        return jax.checkpoint(_mlp)(z, up, gate, down)


def _mlp(z, up, gate, down):
    # one product of twice the width: in decoding each costs more to start than to compute
    gated, value = jnp.split(transform(z, jnp.concatenate([gate, up], axis=1)), 2, axis=-1)
    return transform(sigmoid_gate(gated, value), down)


class UnsharedLinearModule(StreamMixerModule):
    """See UnsharedLinear."""

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        def identities(key, shape, dtype):
            return jnp.broadcast_to(jnp.eye(shape[-1], dtype=dtype), shape)

        size = {"mixer_in": self.head_dim, "mixer_out": self.head_dim}
        T_NHJ = self.weight("kernel", identities, kv_heads=self.heads, **size)
        return jnp.einsum("...NH,NHJ->...NJ", z, T_NHJ)


class HeadCompositionModule(StreamMixerModule):
    """See HeadComposition."""

    def setup(self):
        init = repetition if self.config.init == "identity" else normal()
        self.kernel = self.matrix("kernel", init, self.heads, self.config.heads(self.heads))

    def __call__(self, z: jax.Array) -> jax.Array:
        return compose(z, self.kernel, -2)

    def project(self, x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        if self.config.late(self.heads):
            return checkpoint_name(affine(x, kernel, bias), PROJECTED)
        return super().project(x, kernel, bias)

    def read(self, z: jax.Array, axis: int) -> jax.Array:
        return compose(z, self.kernel, axis) if self.config.late(self.heads) else z


def compose(z: jax.Array, W: jax.Array, axis: int) -> jax.Array:
    """sum over heads n of z_n W[n, m], the heads of z along `axis`."""
    return jnp.moveaxis(jnp.tensordot(z, W, axes=(axis, 0)), -1, axis)
