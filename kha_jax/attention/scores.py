"""Score mixers: maps s[B, N, ...] -> s over the heads, of the logits before the mask or of the
probabilities after the softmax.

Where one mixes heads, the scores of all heads have to exist at once: fused kernels are refused, and
where heads are split over devices the queries are split instead. A factor for each head needs none
of that: it multiplies the queries, or what attention returns (`ScoreMixerModule.scale`).

Legend: B batch, N query heads.
"""

from typing import Any, Callable, ClassVar, Literal, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from kha_jax.attention.mixers import diagonal
from kha_jax.modules import Module, ModuleConfig


class ScoreMixer(ModuleConfig):
    """A member of the family; sizes are those of one layer."""

    axis: ClassVar[str] = "head"
    """What its matrices mix."""
    mixes_heads: ClassVar[bool] = True
    """Whether a head's scores depend on those of others; if not, its module has only a `scale`."""

    @property
    def module(self):
        return ScoreMixerModule

    def identity_at_start(self) -> bool:
        """Whether it starts as the identity."""
        return True

    def parameters(self, heads: int) -> int:
        """Parameters per layer."""
        return 0

    def flops(self, heads: int, context: float) -> float:
        """Forward FLOPs per token over `context` visible keys."""
        return 0

    def effective(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """See StreamMixer.effective."""
        return dict(params)


class NoScoreMixer(ScoreMixer):
    """s: the baseline."""

    mixes_heads = False


class TalkingHeads(ScoreMixer):
    """s~_m = sum over heads n of s_n P[n, m] (talking-heads attention, arXiv 2003.02436).

    On the logits it is the paper's P_l, on the probabilities its P_w.
    """

    init: Literal["identity", "variance_scaling"] = "identity"
    """P at the start: the identity, or normal with variance 1/N as in the original."""

    @property
    def module(self):
        return TalkingHeadsModule

    def identity_at_start(self):
        return self.init == "identity"

    def parameters(self, heads):
        return heads**2

    def flops(self, heads, context):
        return 2 * heads**2 * context


SCORE_MIXERS = {"none": NoScoreMixer, "talking": TalkingHeads}


class ScoreMixerModule(Module):
    """Base of the score mixers' modules, and the identity."""

    config: ScoreMixer
    heads: int

    def __call__(self) -> Callable | None:
        """The map s[B, N, ...] -> s as a `Partial` of its arrays; None is the identity."""
        return None

    def scale(self) -> jax.Array | None:
        """A factor [N] on each head's scores, which every kernel can compute with; None is 1."""
        return None


class TalkingHeadsModule(ScoreMixerModule):
    """See TalkingHeads."""

    @nn.compact
    def __call__(self) -> Callable:
        scaled = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        init = diagonal(1.0) if self.config.init == "identity" else scaled
        N = self.heads
        kernel = self.weight("kernel", init, dtype="float32", mixer_in=N, mixer_out=N)
        return jax.tree_util.Partial(over_heads, kernel)


def over_heads(P_NM: jax.Array, s: jax.Array) -> jax.Array:
    """sum over n of s[B, n, ...] P[n, m], the heads staying where they are."""
    return jnp.einsum("bn...,nm->bm...", s, P_NM)
