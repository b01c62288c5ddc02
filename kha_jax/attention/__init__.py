"""Attention composed at four seams: projection, stream mixers, scores, output."""

from kha_jax.attention.attention import Attention, AttentionConfig

__all__ = ["Attention", "AttentionConfig"]
