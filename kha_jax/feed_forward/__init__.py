"""Feed-forward blocks: one SwiGLU, or a mixture of them."""

from kha_jax.feed_forward.moe import MoE
from kha_jax.feed_forward.swiglu import FeedForward, SwiGLU

__all__ = ["FeedForward", "MoE", "SwiGLU"]
