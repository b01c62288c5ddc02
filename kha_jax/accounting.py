"""What a model costs, counted from its config: parameters, FLOPs per token, cache per token.

FLOPs count the multiply-adds of matrix products twice, as published model FLOPs do; norms,
activations and the embedding lookup are left out. Causal attention is counted over the keys that
are visible, (T + 1) / 2 on average.
"""

import math
from typing import Callable, NamedTuple

from kha_jax.model import ModelConfig, Segment

# Dense bf16 peak of one device in FLOP/s, from the vendors' data sheets, by a fragment of jax's
# device_kind.
PEAK_FLOPS = {
    "v5p": 459e12,
    "v5 lite": 197e12,
    "v5e": 197e12,
    "TPU v5": 459e12,  # what a v5p calls itself; the lite ones have matched above
    "v6 lite": 918e12,
    "v6e": 918e12,
    "v4": 275e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
}


class Accounting(NamedTuple):
    """Costs of a model at one sequence length.

    parameters: all of them. active: those that one token passes through. mixing: those of the
    mixers of heads, part of both. forward_flops, training_flops: per token; a training step costs
    three forward passes, recomputation not counted. cache_floats: numbers per token that a decoder
    keeps over all layers.
    """

    parameters: int
    active: int
    mixing: int
    forward_flops: float
    training_flops: float
    cache_floats: int


def account(
    model: ModelConfig, seq_len: int, causal: bool = True, tokens: float = math.inf
) -> Accounting:
    """Counts one model.

    causal=False counts every query against all seq_len keys, as a kernel without skipping does.
    tokens: of a step; linear mixers applied to the weights cost the same whatever it is, so their
    share of a token vanishes as it grows (the default).
    """
    D, segments = model.width, model.segments()
    tables = (1 if model.embeddings == "tied" else 2) * model.vocabulary_size * D
    outside = tables + D
    context = (seq_len + 1) / 2 if causal else seq_len

    def over_layers(count: Callable[[Segment], float]) -> float:
        return sum(segment.layers * count(segment) for segment in segments)

    attention = over_layers(lambda s: s.attention.parameters(D) + 2 * D)
    forward = 2 * model.vocabulary_size * D
    forward += over_layers(
        lambda s: s.attention.flops(D, context, tokens) + s.feed_forward.flops(D)
    )
    return Accounting(
        parameters=outside + attention + over_layers(lambda s: s.feed_forward.parameters(D)),
        active=outside + attention + over_layers(lambda s: s.feed_forward.active_parameters(D)),
        mixing=over_layers(lambda s: s.attention.mixer_parameters(D)),
        forward_flops=forward,
        training_flops=3 * forward,
        cache_floats=over_layers(lambda s: s.attention.cache_floats()),
    )


def peak_flops(device_kind: str) -> float:
    """bf16 FLOP/s of one device, or NaN where unknown."""
    return next(
        (peak for name, peak in PEAK_FLOPS.items() if name.lower() in device_kind.lower()), math.nan
    )
