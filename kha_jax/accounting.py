"""What a model costs, counted from its config: parameters, FLOPs per token, cache per token.

FLOPs count the multiply-adds of matrix products twice, as published model FLOPs do; norms,
activations and the embedding lookup are left out. Causal attention is counted over the keys that
are visible, (T + 1) / 2 on average.
"""

import math
from typing import Callable, Literal, NamedTuple

import jax

from kha_jax.config import ConfigError
from kha_jax.model import ModelConfig, Segment


class Accounting(NamedTuple):
    """Costs of a model at one sequence length.

    parameters: all of them. active: those that one token passes through. mixing: those of the
    mixers of heads, part of both. forward_flops, training_flops: per token; a training step costs
    three forward passes, less the gradients of weights that are frozen, recomputation not counted.
    cache_floats: numbers per token that a decoder keeps over all layers.
    """

    parameters: int
    active: int
    mixing: int
    forward_flops: float
    training_flops: float
    cache_floats: int


Trainable = Literal["all", "mixers"]


def account(
    model: ModelConfig,
    seq_len: int,
    causal: bool = True,
    tokens: float = math.inf,
    trainable: Trainable = "all",
) -> Accounting:
    """Counts one model.

    causal=False counts every query against all seq_len keys, as a kernel without skipping does.
    tokens: of a step; linear mixers applied to the weights cost the same whatever it is, so their
    share of a token vanishes as it grows (the default). trainable: all, or mixers alone.
    """
    D, segments = model.width, model.segments()
    context = (seq_len + 1) / 2 if causal else seq_len

    def over_layers(count: Callable[[Segment], float]) -> float:
        return sum(segment.layers * count(segment) for segment in segments)

    forward = output = 2 * model.vocabulary_size * D
    forward += over_layers(
        lambda s: s.attention.flops(D, context, tokens) + s.feed_forward.flops(D)
    )
    frozen = 0.0
    if trainable == "mixers":
        frozen = output + over_layers(
            lambda s: s.attention.frozen_flops(D, tokens) + s.feed_forward.flops(D)
        )
    return Accounting(
        parameters=count_parameters(model),
        active=count_parameters(model, active=True),
        mixing=over_layers(lambda s: s.attention.mixer_parameters(D)),
        forward_flops=forward,
        training_flops=3 * forward - frozen,
        cache_floats=over_layers(lambda s: s.attention.cache_floats()),
    )


def count_parameters(model: ModelConfig, active: bool = False) -> int:
    """All parameters of a model, or those that one token passes through."""
    D = model.width
    tables = 1 if model.embeddings == "tied" else 2
    count = tables * model.vocabulary_size * D + D
    for segment in model.segments():
        feed_forward = segment.feed_forward
        inside = feed_forward.active_parameters if active else feed_forward.parameters
        count += segment.layers * (segment.attention.parameters(D) + 2 * D + inside(D))
    return count


def cache_bytes(model: ModelConfig) -> int:
    """Bytes per token that a decoder keeps."""
    itemsize = jax.numpy.dtype(model.numerics.dtype).itemsize
    return itemsize * sum(s.layers * s.attention.cache_floats() for s in model.segments())


def check_memory(
    model: ModelConfig, tokens: int, available: float, trainable: Trainable = "all"
) -> None:
    """Checks that training a model may fit at all: each parameter, of what is trained the gradient
    and two moments in float32, and, for the backward pass, the input of each layer. What it really
    takes is more.

    tokens: that are computed at once, on all devices. available: bytes of all of them.

    Raises:
        ConfigError: names what takes too much, and how much.
    """
    parameters = trained = count_parameters(model)
    if trainable == "mixers":
        trained = account(model, 1).mixing
    state = 4 * (parameters + 3 * trained)
    itemsize = jax.numpy.dtype(model.numerics.dtype).itemsize
    inputs = tokens * model.width * model.layers * itemsize
    there = f"the devices have {available / 1e9:,.1f} GB"
    if state > available:
        raise ConfigError(
            "model",
            f"has {parameters:,} parameters, which take {state / 1e9:,.1f} GB with their gradients "
            f"and moments; {there}",
        )
    if state + inputs > available:
        raise ConfigError(
            "seq_len",
            f"with batch_size / accumulation makes {tokens:,} tokens at once, for which the inputs "
            f"of the layers alone take {inputs / 1e9:,.1f} GB; {there}",
        )
