"""Memory of a run on a slice: how its state lies on the devices, XLA's analysis of the compiled
step, and an estimate from the sizes."""

import functools
import importlib.util
import math
import re
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from kha_jax import remat, sharding
from kha_jax.mesh import make_mesh
from kha_jax.model import Segment
from kha_jax.ops.attention import ROWS
from kha_jax.ops.attention_splash import LIMITS, Blocks, splash_blocks
from kha_jax.ops.checkpoint_names import INNER
from kha_jax.planning.slices import SliceError, Topology
from kha_jax.sharding import axis_size_of
from kha_jax.training.run_config import RunConfig
from kha_jax.training.step import TrainState, make_trainer


def has_libtpu() -> bool:
    return importlib.util.find_spec("libtpu") is not None


class Compiled(NamedTuple):
    """Bytes per device of one train step by the compiler, and the seconds that it took."""

    peak: float
    temporaries: float
    seconds: float


def compiled_memory(config: RunConfig, slice_: Topology) -> Compiled:
    """One train step, compiled for the slice through libtpu.

    Raises:
        SliceError: libtpu knows no such slice.
    """
    from jax.experimental import topologies

    several = {"num_slices": slice_.slices} if slice_.slices > 1 else {}
    try:
        devices = topologies.get_topology_desc(
            platform="tpu", topology_name=slice_.name, **several
        ).devices
    except RuntimeError as error:
        raise SliceError(
            f"libtpu knows no slice {slice_.name}: {' '.join(str(error).split())}"
        ) from None
    trainer = make_trainer(config, make_mesh(config.mesh, devices))
    lowered, began = trainer.lower(), time.perf_counter()
    try:
        memory = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        wanted = needed(str(error))
        if wanted is None:
            raise
        return Compiled(wanted + held_bytes(trainer.abstract), wanted, time.perf_counter() - began)
    whole = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    peak = float(getattr(memory, "peak_memory_in_bytes", 0) or whole)
    return Compiled(peak, float(memory.temp_size_in_bytes), time.perf_counter() - began)


def needed(message: str) -> float | None:
    """Bytes of temporaries that the compiler wanted when it ran out of HBM, or None for another
    failure."""
    sizes = [float(number) * 2**30 for number in re.findall(r"\b([\d.]+)G", message)]
    return max(sizes) if "HBM" in message and "RESOURCE_EXHAUSTED" in message and sizes else None


class Layout(NamedTuple):
    """How a run lies on the devices: its abstract state, the mesh's sizes, the devices that split a
    batch, a layer and a mixture's experts, the tokens that a device has at once, and the weights
    that it computes with."""

    state: TrainState
    sizes: dict[str, int]
    batch_ways: int
    model_ways: int
    expert_ways: int
    local_tokens: float
    weights: float

    def gathered(self, segment: Segment) -> int:
        """Times the tokens of a device that its feed-forward sees: a mixture gathers those of all
        devices that split its experts."""
        return self.expert_ways if segment.feed_forward.router_width() else 1


def layout(config: RunConfig, chips: int) -> Layout:
    """The run's layout on this number of chips."""
    sizes = config.mesh.sizes(chips)
    # neither the batch nor what is kept for the backward pass changes the state
    model = config.model.replace(remat="none")
    plain = config.replace(model=model, batch_size=chips, accumulation=1)
    state, batch_shards = _abstract(plain, tuple(sizes.items())), axis_size_of(sizes, "batch")
    leaves = jax.tree.leaves(state.params)
    weights = sum(held(leaf) * sharding.gathered_axis_size(leaf.sharding) for leaf in leaves)
    tokens = config.tokens_per_step / config.accumulation / batch_shards
    split = axis_size_of(sizes, "heads"), axis_size_of(sizes, "experts")
    return Layout(state, sizes, batch_shards, *split, tokens, weights)


@functools.lru_cache(maxsize=64)
def _abstract(config: RunConfig, sizes: tuple[tuple[str, int], ...]) -> TrainState:
    axes, shape = zip(*sizes)
    return make_trainer(config, jax.sharding.AbstractMesh(shape, axes)).abstract


def held(leaf: jax.ShapeDtypeStruct) -> int:
    """Elements of an array on one device."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape))


def held_bytes(tree: Any) -> float:
    """Bytes of a tree of arrays on one device."""
    return float(sum(held(leaf) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree)))


def kept(config: RunConfig, segment: Segment, layout: Layout) -> tuple[dict[str, float], float]:
    """Of one layer and token: forward FLOPs of what is run again, by name (see
    `kha_jax.remat.parts`), and the numbers that are kept beside the layer's input.

    What a mixture computes in chunks is kept by name alone: `none` runs it again.
    """
    feed_forward, context = segment.feed_forward, (config.seq_len + 1) / 2
    parts = remat.parts(
        segment.attention, feed_forward, config.model.width, context, config.tokens_per_step
    )
    policy = remat.POLICIES[config.model.remat]
    names, times = set(policy.names), layout.gathered(segment)
    # of the products that no gradient reads, the feed-forward's last one is not named
    floats = sum(parts[name].floats for name in names) + (config.model.width if policy.also else 0)
    if INNER in names:
        floats += (times - 1) * parts[INNER].floats  # with rows for the experts of other devices
    tokens = times * layout.local_tokens
    if config.model.remat == "none" and feed_forward.tokens_at_once(tokens) < tokens:
        names -= {INNER}
        floats -= times * feed_forward.stream_floats(config.model.width)
    return {name: part.flops for name, part in parts.items() if name not in names}, floats


def activation_bytes(config: RunConfig, layout: Layout) -> float:
    """What all layers keep for the backward pass, their inputs among it, of the tokens that a
    device has at once; what heads and feed-forward make is split over `model`."""
    model = config.model
    floats = sum(
        s.layers * (model.width + kept(config, s, layout)[1] / layout.model_ways)
        for s in model.segments()
    )
    return layout.local_tokens * floats * np.dtype(model.numerics.dtype).itemsize


def head_floats(segment: Segment) -> int:
    """Numbers per token of the queries and the outputs of all heads together: the keys of
    collaborative heads are wider than their values."""
    projection = segment.attention.projection
    heads, value_width = projection.output_shape()
    return heads * (projection.key_width() + value_width)


def flash_blocks(config: RunConfig, segment: Segment) -> Blocks | None:
    """Those of the TPU's flash kernel; None where another one computes the scores."""
    attention, length = segment.attention, config.seq_len
    kernel = attention.kernel_on("tpu", config.model.numerics.dtype, length)
    widest = max(attention.projection.key_width(), attention.projection.output_shape()[1])
    return splash_blocks(length, widest, LIMITS[kernel]) if kernel in LIMITS else None


def estimated_temporaries(config: RunConfig, layout: Layout) -> float:
    """Saved activations, one layer's gathered weights with their gradients, its streams, and the
    loss's table and logits; the gradients of the parameters are not among them."""
    model, item = config.model, np.dtype(config.model.numerics.dtype).itemsize
    table = model.vocabulary_size * model.width / layout.model_ways
    layer = 2 * item * (layout.weights - table) / model.layers
    streams = max(_layer_bytes(config, segment, layout) for segment in model.segments())
    output = (item + 4) * model.vocabulary_size * model.width
    return activation_bytes(config, layout) + max(layer + streams, output)


def _layer_bytes(config: RunConfig, segment: Segment, layout: Layout) -> float:
    """What a layer of this segment holds between its input and its output, with its gradients:
    streams, the parts of the queries' gradient, and four times the float32 scores of the queries
    whose heads mix in the scores, at a time."""
    model, item = config.model, np.dtype(config.model.numerics.dtype).itemsize
    attention = 8 * model.width + 4 * head_floats(segment) / layout.model_ways
    blocks, projection = flash_blocks(config, segment), segment.attention.projection
    if blocks and blocks.fused:
        queries = projection.output_shape()[0] * projection.key_width()
        attention += config.seq_len / blocks.keys * queries / layout.model_ways
    gathered = layout.gathered(segment) * layout.local_tokens
    tokens = segment.feed_forward.tokens_at_once(gathered)
    between = 2 * tokens * segment.feed_forward.stream_floats(model.width) / layout.model_ways
    at_once = layout.local_tokens * min(1, ROWS / config.seq_len)
    scores = 4 * 4 * at_once * segment.attention.score_floats(config.seq_len)
    return item * (layout.local_tokens * attention + between) + scores
