"""What a rematerialised layer keeps for its backward pass: one table for the model, which names it
to jax, and for plans, which count its bytes and the FLOPs that are run again."""

from typing import Any, Callable, NamedTuple

import jax

from kha_jax.attention import AttentionConfig
from kha_jax.feed_forward import FeedForward
from kha_jax.ops.checkpoint_names import ATTENTION, INNER, PROJECTED, ROUTER, STREAM

REST = "rest"  # norms, rotary, mixers, activations: what no policy but `none` keeps


class Policy(NamedTuple):
    """names: of `kha_jax.ops.checkpoint_names`, kept beside the layer's input. also: a policy of
    jax that keeps more."""

    names: tuple[str, ...] = ()
    also: Callable | None = None


# From the least that is kept to the most; `none` keeps all and is no policy of jax.
POLICIES = {
    "full": Policy(),
    "attention": Policy((ATTENTION, STREAM, ROUTER)),
    "projections": Policy((ATTENTION, STREAM, ROUTER, PROJECTED)),
    "inner": Policy((ATTENTION, STREAM, ROUTER, PROJECTED, INNER)),
    "dots": Policy(
        (ATTENTION, STREAM, ROUTER, PROJECTED, INNER),
        also=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    ),
    "none": Policy((ATTENTION, STREAM, ROUTER, PROJECTED, INNER, REST)),
}


def jax_policy(remat: str) -> Callable[..., Any]:
    """The policy for jax.checkpoint of a key of POLICIES but `none`."""
    policy = POLICIES[remat]
    named = jax.checkpoint_policies.save_only_these_names(*policy.names)
    if policy.also is None:
        return named
    return jax.checkpoint_policies.save_from_both_policies(named, policy.also)


class Part(NamedTuple):
    """Of one layer and token: numbers in the compute dtype that are kept, and forward FLOPs that
    are run again where they are not."""

    floats: float
    flops: float


def parts(
    attention: AttentionConfig, feed_forward: FeedForward, width: int, context: float, tokens: float
) -> dict[str, Part]:
    """What a layer may keep, by name. context: keys that a query sees; tokens: of a step.

    A feed-forward's last product stands nowhere: no gradient reads it, so nothing runs it again.
    """
    heads, value_width = attention.projection.output_shape()
    left, _ = attention.output_shape()
    streams = attention.projection.streams(width).values()
    projected = Part(sum(N * H for N, H, _ in streams), attention.projection.flops(width))
    # the log-partition of every head and query is float32
    scores = Part(heads * value_width + 2 * heads, attention.projection.score_flops(context))
    if attention.mixes_scores:
        scores = Part(0, 0)
    stream = Part(width, 2 * left * value_width * width)
    router = Part(2 * feed_forward.router_width(), 2 * feed_forward.router_width() * width)
    inner = Part(feed_forward.inner_floats(width), 2 * feed_forward.inner_floats(width) * width)
    whole = attention.flops(width, context, tokens)
    rest = whole - projected.flops - scores.flops - stream.flops
    apart = 2 * width + projected.floats + feed_forward.stream_floats(width) - inner.floats
    return {
        PROJECTED: projected,
        ATTENTION: scores,
        STREAM: stream,
        ROUTER: router,
        INNER: inner,
        REST: Part(apart, rest),
    }
