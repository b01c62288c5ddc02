"""How long a step takes: a roofline, and what to expect.

The roofline has the matrix units at EFFICIENCY of their data-sheet rate, memory and links at all of
theirs, everything perfectly overlapped, so that the step is as long as its slowest part; large
dense products beat EFFICIENCY, most else falls short of it. What to expect adds up what a TPU core
does one after another, each at the efficiency of its kernel.

None of these constants was measured here. Five of them (DENSE, EXPERTS, ATTENTION_KERNEL, HBM,
EXPOSED) are round numbers that agree with eight of nine runs on three kinds of chip which the
authors of MaxText published (`tests/published.py`, docs/pods.md); none is of one chip or one run.
The others follow from how chips and kernels are built.
"""

import math
from typing import Any, NamedTuple

import jax
import numpy as np

from kha_jax import sharding
from kha_jax.model import Segment
from kha_jax.ops.attention_chunked import chunks
from kha_jax.ops.attention_splash import Blocks
from kha_jax.ops.checkpoint_names import ATTENTION, INNER
from kha_jax.planning.memory import Layout, flash_blocks, head_floats, held, kept
from kha_jax.planning.slices import Topology
from kha_jax.remat import POLICIES
from kha_jax.sharding import axis_size_of
from kha_jax.training.run_config import RunConfig

# Of the peak, in the matrix products and the attention kernel: an assumption, not a measurement.
EFFICIENCY = 0.75
# Of the peak, large dense products in bfloat16. Published: dense 32B on v5e, where nothing else
# takes long, spends 0.88 of the peak over its whole step.
DENSE = 0.90
# Of the peak, grouped products of experts where a matrix unit is full and groups are long.
# Published: Mixtral 8x7B without dropping on v5p.
EXPERTS = 0.75
# Of the peak, the flash kernel of attention where a matrix unit is full: exponentials and masks run
# on the vector unit in between. Published: Llama 3.1 8B at 8192 on v6e, a quarter of it attention.
ATTENTION_KERNEL = 0.50
# Products of the flash kernel's backward pass over those of its forward pass: five to two, since it
# computes the scores again (arXiv 2205.14135); seven to two where the gradients of queries and of
# keys come from two kernels, which both do.
ATTENTION_BACKWARD, ATTENTION_BACKWARD_APART = 2.5, 3.5
# Rows of a grouped product's tile: one more of them runs for every group, since groups end
# anywhere. megablox and ragged_dot take 128 by default; at groups of 128 rows on v5p others saw
# 0.56 of the rate, where this says 0.5.
GROUP_ROWS = 128
# Of the memory's data-sheet rate, for what is not part of a product: norms, residuals, activations.
# Published: the runs on v6e, which has the least bandwidth for its products.
HBM = 0.80
# Of the links' time at their data-sheet rate, what computation does not hide: links fall short of
# the sheet, and each layer's first gather and last scatter have nothing to hide behind. Published:
# Llama 2 70B on v6e, which gathers 138 GB three times for 8192 tokens.
EXPOSED = 0.50
# Of the time on the network between slices, the same. Published: dense 32B loses 3% from one slice
# of 256 v5e to two, and this says 1%: nothing of it is hidden.
NETWORK_EXPOSED = 1.0


class Work(NamedTuple):
    """Forward FLOPs per token, and those that are run again, by kernel: `attention`, `experts`,
    `dense`."""

    forward: dict[str, float]
    again: dict[str, float]


def work(config: RunConfig, layout: Layout, forward_flops: float) -> Work:
    """forward_flops: of a token, by the accounting."""
    context = (config.seq_len + 1) / 2
    forward = dict.fromkeys(("attention", "experts", "dense"), 0.0)
    again = dict(forward)
    for segment in config.model.segments():
        mixture = segment.feed_forward.router_width() > 0
        routed = 2 * segment.feed_forward.router_width() * config.model.width
        if not segment.attention.mixes_scores:
            scores = segment.attention.projection.score_flops(context)
            forward["attention"] += segment.layers * scores
        if mixture:
            inside = segment.feed_forward.flops(config.model.width) - routed
            forward["experts"] += segment.layers * inside
        kinds = {ATTENTION: "attention", INNER: "experts" if mixture else "dense"}
        for name, flops in kept(config, segment, layout)[0].items():
            again[kinds.get(name, "dense")] += segment.layers * flops
    forward["dense"] = forward_flops - forward["attention"] - forward["experts"]
    return Work(forward, again)


def compute_seconds(config: RunConfig, slice_: Topology, work: Work) -> float:
    """The roofline of the products, those that are run again among them."""
    flops = 3 * sum(work.forward.values()) + sum(work.again.values())
    return flops * config.tokens_per_step / slice_.chips / slice_.chip.flops / EFFICIENCY


def product_seconds(
    config: RunConfig, slice_: Topology, layout: Layout, work: Work
) -> dict[str, float]:
    """What to expect of the products, by kernel; heads, blocks and groups of all layers are taken
    to be as in the last ones."""
    per_device = config.tokens_per_step / slice_.chips / slice_.chip.flops
    side, segment = slice_.chip.matrix_side, config.model.segments()[-1]
    forward, again = work
    out = {"dense": (3 * forward["dense"] + again["dense"]) / DENSE}
    projection = segment.attention.projection
    heads = _full(min(projection.key_width(), projection.output_shape()[1]), side)
    blocks = flash_blocks(config, segment)
    apart = blocks is not None and not blocks.fused
    backward = ATTENTION_BACKWARD_APART if apart else ATTENTION_BACKWARD
    flops = (1 + backward) * forward["attention"] + again["attention"]
    out["attention"] = flops * _diagonal(config, blocks) / heads / ATTENTION_KERNEL
    if forward["experts"]:
        group = _group_rows(segment, layout)
        filled = _full(segment.feed_forward.width / layout.model_ways, side)
        filled *= group / (group + GROUP_ROWS)
        out["experts"] = (3 * forward["experts"] + again["experts"]) / filled / EXPERTS
    return {kernel: flops * per_device for kernel, flops in out.items()}


def _full(width: float, side: int) -> float:
    """How much of a matrix unit of this side a product of this width uses."""
    return width / (math.ceil(width / side) * side)


def _diagonal(config: RunConfig, blocks: Blocks | None) -> float:
    """Scores that the causal kernel computes over those that it needs: blocks on the diagonal are
    computed whole."""
    block = blocks.queries if blocks else chunks(config.seq_len)[0][1]
    return (config.seq_len + block) / (config.seq_len + 1)


def _group_rows(segment: Segment, layout: Layout) -> float:
    """Rows of one expert in one grouped product."""
    feed_forward = segment.feed_forward
    gathered = layout.gathered(segment) * layout.local_tokens
    at_once = feed_forward.tokens_at_once(gathered)
    return at_once * feed_forward.top_k / feed_forward.experts


def pass_bytes(config: RunConfig, layout: Layout) -> float:
    """HBM traffic of one pass over the layers, roughly: weights once, and each stream of a token
    and each score that exists outside of a kernel written and read once."""
    model, item = config.model, np.dtype(config.model.numerics.dtype).itemsize
    per_token = item * 8 * model.width * model.layers
    for segment in model.segments():
        feed_forward = segment.feed_forward.stream_floats(model.width)
        streams = 3 * head_floats(segment) + feed_forward
        scores = segment.attention.score_floats(config.seq_len)
        per_token += segment.layers * (item * streams + 4 * scores) / layout.model_ways
    return item * layout.weights + 2 * per_token * layout.local_tokens


def hbm_seconds(
    config: RunConfig, slice_: Topology, layout: Layout, state_bytes: float, work: Work
) -> float:
    """The roofline of memory: forward, backward, what is run again, and the update."""
    passes = 3 + sum(work.again.values()) / sum(work.forward.values())
    moved = passes * config.accumulation * pass_bytes(config, layout) + 3 * state_bytes
    return moved / slice_.chip.hbm_bandwidth


def collectives(config: RunConfig, params: Any, sizes: dict[str, int]) -> dict[str, float]:
    """Bytes that a device sends in a step, by kind of collective.

    FSDP gathers weights in the compute dtype for the forward and the backward pass of every
    micro-batch and reduce-scatters their gradients; what is whole on every device has its gradient
    summed. Split experts gather tokens and reduce-scatter results, in every pass; split heads and
    feed-forward widths sum their outputs.
    """
    item = np.dtype(config.model.numerics.dtype).itemsize
    gathered, replicated, devices = 0.0, 0.0, math.prod(sizes.values())
    for leaf in jax.tree.leaves(params):
        axis_size = sharding.gathered_axis_size(leaf.sharding)
        gathered += item * held(leaf) * (axis_size - 1)
        replicated += 4 * held(leaf) if axis_size == 1 else 0
    moved = {
        "all-gather": 2 * gathered * config.accumulation,
        "reduce-scatter": gathered * config.accumulation,
        "all-reduce": 2 * replicated * (devices - 1) / devices * config.accumulation,
    }
    # of the layers: forward, backward, and forward again where the experts are run again
    passes = 2 if INNER in POLICIES[config.model.remat].names else 3
    tokens = config.tokens_per_step / axis_size_of(sizes, "batch")
    stream = passes * item * tokens * config.model.width * config.model.layers
    for kind in ("all-gather", "reduce-scatter"):
        moved[kind] += stream * (axis_size_of(sizes, "experts") - 1)
    wide = axis_size_of(sizes, "heads")
    moved["all-reduce"] += 2 * stream * 2 * (wide - 1) / wide
    return {kind: size for kind, size in moved.items() if size}


def network_seconds(slice_: Topology, moved: dict[str, float]) -> float:
    """Between slices: the other slices' part of everything that is gathered or scattered comes to a
    slice once, through all of its hosts."""
    per_slice = slice_.chips / slice_.slices
    across = (slice_.slices - 1) / slice_.slices * sum(moved.values()) / per_slice
    return across / slice_.chip.network_bandwidth


def expected_seconds(products: dict[str, float], hbm: float, links: float, network: float) -> float:
    """Products and memory one after another, and what they do not hide of the collectives, all of
    them where those take longer."""
    busy = sum(products.values()) + hbm / HBM
    return max(busy + EXPOSED * links + NETWORK_EXPOSED * network, links, network)
