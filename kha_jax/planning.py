"""What a run would cost on a TPU pod: the real train step compiled ahead of time for chips that are
not there, and a roofline.

Memory is XLA's own analysis of the compiled step. FLOPs come from the accounting, since XLA counts
a loop's body once. Times are a roofline: the matrix units at EFFICIENCY of their data-sheet rate,
memory and links at all of theirs, everything perfectly overlapped, so that the step is as long as
its slowest part.
"""

import importlib.util
import math
import re
from typing import Any, Iterator, NamedTuple

import jax
import numpy as np

from kha_jax import accounting, sharding
from kha_jax.accounting import PEAK_FLOPS
from kha_jax.config import ConfigError, near, to_dict, under
from kha_jax.model import Segment
from kha_jax.ops.attention import ROWS
from kha_jax.sharding import SLICES, ways_of
from kha_jax.training import RunConfig, TrainState, make_trainer

# Of the peak, in the matrix products and the attention kernel: an assumption, not a measurement.
EFFICIENCY = 0.75
# By rematerialisation: forward passes that are run again (the backward pass costs two of them), and
# what each layer keeps for its gradient in units of its input, an estimate.
AGAIN = {"none": 0.0, "dots": 0.05, "full": 1.0}
SAVED = {"none": 12.0, "dots": 5.0, "full": 1.0}


class Chip(NamedTuple):
    """One device by its data sheet: dense bf16 FLOP/s, bytes of HBM, bytes/s of HBM, bytes/s of its
    links, all directions together."""

    flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float


CHIPS = {
    "v5p": Chip(PEAK_FLOPS["v5p"], 95 * 2**30, 2765e9, 600e9),
    "v5e": Chip(PEAK_FLOPS["v5e"], 15.75 * 2**30, 819e9, 200e9),
    "v6e": Chip(PEAK_FLOPS["v6e"], 31.25 * 2**30, 1640e9, 448e9),
}


class Topology(NamedTuple):
    """A pod slice: its name for libtpu (`v5p:4x4x4`), chips and their data sheet."""

    name: str
    chips: int
    chip: Chip


class SliceError(ValueError):
    """A slice that does not exist. The message says which do."""


def topology(name: str) -> Topology:
    """The slice of a name such as v5p:4x4x4, or of a preset such as v5p-128.

    Raises:
        SliceError: for a name of neither form.
    """
    full = SLICES.get(name, name)
    kind, _, shape = full.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise SliceError(
            f"{name!r} is not KIND:SHAPE with a kind of {', '.join(CHIPS)}; {near(name, SLICES)}"
        )
    return Topology(full, sharding.chips(full), CHIPS[kind])


class Plan(NamedTuple):
    """Sizes are bytes per device, times seconds of one optimiser step, `moved` bytes per device and
    step by kind of collective."""

    topology: str
    chips: int
    batch_size: int
    sequences_per_device: int
    accumulation: int
    params_total: int
    params_active: int
    params_bytes_per_device: float
    optimizer_bytes_per_device: float
    activation_bytes_per_device: float
    temporary_bytes_per_device: float
    peak_bytes_per_device: float
    hbm_bytes_per_device: float
    fits: bool
    flops_per_step: float
    moved: dict[str, float]
    compute_seconds: float
    hbm_seconds: float
    link_seconds: float
    step_seconds: float
    bound: str
    mfu: float
    tokens_per_second: float
    days: float
    chip_hours: float
    source: str


def placed(config: RunConfig, slice_: Topology, sequences: int | None) -> RunConfig:
    """The run on a slice: with `sequences` on a device at once, and as many micro-batches as its
    batch then needs.

    A batch that is smaller than all devices hold at once is raised to that, with fewer steps for
    the same tokens.

    Raises:
        ConfigError: the batch or the mesh does not divide, or the kernel is of another platform.
    """
    with under("mesh"):
        sizes = config.mesh.sizes(slice_.chips)
    ways = ways_of(sizes, "batch")
    if sequences is not None:
        at_once = sequences * ways
        batch = max(config.batch_size, at_once)
        if batch % at_once:
            found = f"found {config.batch_size}"
            raise ConfigError(
                "batch_size",
                f"must be a multiple of {at_once}, {sequences} on each of {ways} devices, {found}",
            )
        # a larger batch sees the same tokens
        steps = max(1, config.steps * config.batch_size // batch)
        config = config.replace(batch_size=batch, accumulation=batch // at_once, steps=steps)
    config.check_on(sizes, "tpu")
    return config


class Remedy(NamedTuple):
    """A change that saves memory: fields of the run by their dotted names, the slice where it is
    another one, and what they make of the run and the slice."""

    changes: dict[str, Any]
    moved_to: str | None
    config: RunConfig
    slice_: Topology


def remedies(config: RunConfig, slice_: Topology) -> Iterator[Remedy]:
    """What may make a run fit that `placed` has put on the slice, cheapest first.

    Full rematerialisation, then fewer sequences at once, then larger slices of the kind, whose FSDP
    leaves each device less state.
    """
    full: dict[str, Any] = {}
    if config.model.remat != "full":
        full = {"model.remat": "full"}
        config = config.replace(model=config.model.replace(remat="full"))
        yield Remedy(full, None, config, slice_)
    apart = ways_of(config.mesh.sizes(slice_.chips), "batch")
    sequences = config.batch_size // config.accumulation // apart
    for fewer in (n for n in range(sequences - 1, 0, -1) if sequences % n == 0):
        accumulation = config.accumulation * sequences // fewer
        changed = config.replace(accumulation=accumulation)
        yield Remedy({**full, "accumulation": accumulation}, None, changed, slice_)
    for name in SLICES:
        larger = topology(name)
        if larger.chip != slice_.chip or larger.chips <= slice_.chips:
            continue
        mesh = config.mesh.moved(name)
        try:
            fewest = placed(config.replace(mesh=mesh), larger, 1)
        except ConfigError:
            continue  # something does not divide over it
        moved = {
            f"mesh.{field}": value
            for field, value in to_dict(mesh).items()
            if value != getattr(config.mesh, field)
        }
        changes = {**full, "accumulation": fewest.accumulation, **moved}
        yield Remedy(changes, name, fewest, larger)


def has_libtpu() -> bool:
    return importlib.util.find_spec("libtpu") is not None


def compiled_memory(config: RunConfig, slice_: Topology) -> tuple[float, float]:
    """(peak, temporaries) in bytes per device of one train step, compiled for the slice through
    libtpu.

    Raises:
        SliceError: libtpu knows no such slice.
    """
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=slice_.name).devices
    except RuntimeError as error:
        raise SliceError(
            f"libtpu knows no slice {slice_.name}: {' '.join(str(error).split())}"
        ) from None
    trainer = make_trainer(config, sharding.make_mesh(config.mesh, devices))
    try:
        memory = trainer.lower().compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        needed = _needed(str(error))
        if needed is None:
            raise
        return needed + _held_bytes(trainer.abstract), needed
    whole = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    return float(getattr(memory, "peak_memory_in_bytes", 0) or whole), float(
        memory.temp_size_in_bytes
    )


def _needed(message: str) -> float | None:
    """Bytes of temporaries that the compiler wanted when it ran out of HBM, or None for another
    failure."""
    sizes = [float(number) * 2**30 for number in re.findall(r"\b([\d.]+)G", message)]
    return max(sizes) if "HBM" in message and "RESOURCE_EXHAUSTED" in message and sizes else None


class Layout(NamedTuple):
    """How a run lies on the devices: its abstract state, the mesh's sizes, the devices that split a
    batch and a layer, the tokens that a device has at once, and the weights that it computes
    with."""

    state: TrainState
    sizes: dict[str, int]
    batch_ways: int
    model_ways: int
    local_tokens: float
    weights: float


def _layout(config: RunConfig, chips: int) -> Layout:
    sizes = config.mesh.sizes(chips)
    mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))
    state, ways = make_trainer(config, mesh).abstract, ways_of(sizes, "batch")
    leaves = jax.tree.leaves(state.params)
    weights = sum(_held(leaf) * sharding.gathered_ways(leaf.sharding) for leaf in leaves)
    tokens = config.tokens_per_step / config.accumulation / ways
    return Layout(state, sizes, ways, ways_of(sizes, "heads"), tokens, weights)


def _held(leaf: jax.ShapeDtypeStruct) -> int:
    """Elements of an array on one device."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape))


def _held_bytes(tree: Any) -> float:
    return float(sum(_held(leaf) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree)))


def plan(config: RunConfig, slice_: Topology, compiled: bool) -> Plan:
    """Plans a run that `placed` has put on the slice. compiled: memory from XLA; otherwise
    estimated from the sizes."""
    chips, chip, tokens = slice_.chips, slice_.chip, config.tokens_per_step
    cost = accounting.account(config.model, config.seq_len, tokens=tokens)
    layout = _layout(config, chips)
    params_bytes = _held_bytes(layout.state.params)
    optimizer_bytes = _held_bytes((layout.state.optimizer, layout.state.balance))
    if compiled:
        peak, temporaries = compiled_memory(config, slice_)
    else:
        temporaries = params_bytes + _estimated_temporaries(config, layout)
        peak = params_bytes + optimizer_bytes + temporaries
    moved = _moved(config, layout.state.params, layout.sizes)
    passes = 3 + AGAIN[config.model.remat]
    hbm = passes * config.accumulation * _pass_bytes(config, layout)
    times = {
        "compute": cost.training_flops * passes / 3 * tokens / chips / chip.flops / EFFICIENCY,
        "HBM": (hbm + 3 * (params_bytes + optimizer_bytes)) / chip.hbm_bandwidth,
        "links": sum(moved.values()) / chip.link_bandwidth,
    }
    bound = max(times, key=times.get)
    step = times[bound]
    return Plan(
        topology=slice_.name,
        chips=chips,
        batch_size=config.batch_size,
        sequences_per_device=config.batch_size // config.accumulation // layout.batch_ways,
        accumulation=config.accumulation,
        params_total=cost.parameters,
        params_active=cost.active,
        params_bytes_per_device=params_bytes,
        optimizer_bytes_per_device=optimizer_bytes,
        activation_bytes_per_device=_activation_bytes(config, layout),
        temporary_bytes_per_device=temporaries,
        peak_bytes_per_device=peak,
        hbm_bytes_per_device=chip.hbm_bytes,
        fits=peak <= chip.hbm_bytes,
        flops_per_step=cost.training_flops * tokens,
        moved=moved,
        compute_seconds=times["compute"],
        hbm_seconds=times["HBM"],
        link_seconds=times["links"],
        step_seconds=step,
        bound=bound,
        mfu=cost.training_flops * tokens / chips / chip.flops / step,
        tokens_per_second=tokens / step,
        days=step * config.steps / 86400,
        chip_hours=step * config.steps / 3600 * chips,
        source="compiled" if compiled else "analytic",
    )


def _activation_bytes(config: RunConfig, layout: Layout) -> float:
    """The inputs of all layers for the tokens that a device has at once."""
    model = config.model
    return (
        layout.local_tokens * model.width * model.layers * np.dtype(model.numerics.dtype).itemsize
    )


def _moved(config: RunConfig, params: Any, sizes: dict[str, int]) -> dict[str, float]:
    """Bytes that a device sends in a step, by kind of collective.

    FSDP gathers weights in the compute dtype for the forward and the backward pass of every
    micro-batch and reduce-scatters their gradients; what is whole on every device has its gradient
    summed. Split experts gather tokens and reduce-scatter results, in every pass; split heads and
    feed-forward widths sum their outputs.
    """
    item = np.dtype(config.model.numerics.dtype).itemsize
    gathered, replicated, devices = 0.0, 0.0, math.prod(sizes.values())
    for leaf in jax.tree.leaves(params):
        ways = sharding.gathered_ways(leaf.sharding)
        gathered += item * _held(leaf) * (ways - 1)
        replicated += 4 * _held(leaf) if ways == 1 else 0
    moved = {
        "all-gather": 2 * gathered * config.accumulation,
        "reduce-scatter": gathered * config.accumulation,
        "all-reduce": 2 * replicated * (devices - 1) / devices * config.accumulation,
    }
    passes = 3 if config.model.remat == "full" else 2  # of the layers, forward and backward
    tokens = config.tokens_per_step / ways_of(sizes, "batch")
    stream = passes * item * tokens * config.model.width * config.model.layers
    for kind in ("all-gather", "reduce-scatter"):
        moved[kind] += stream * (ways_of(sizes, "experts") - 1)
    wide = ways_of(sizes, "heads")
    moved["all-reduce"] += 2 * stream * 2 * (wide - 1) / wide
    return {kind: size for kind, size in moved.items() if size}


def _pass_bytes(config: RunConfig, layout: Layout) -> float:
    """HBM traffic of one pass over the layers, roughly: weights once, and each stream of a token
    and each score that exists outside of a kernel written and read once."""
    model, item = config.model, np.dtype(config.model.numerics.dtype).itemsize
    per_token = item * 8 * model.width * model.layers
    for segment in model.segments():
        feed_forward = segment.feed_forward.stream_floats(model.width)
        streams = 3 * _head_floats(segment) + feed_forward
        scores = segment.attention.score_floats(config.seq_len)
        per_token += segment.layers * (item * streams + 4 * scores) / layout.model_ways
    return item * layout.weights + 2 * per_token * layout.local_tokens


def _head_floats(segment: Segment) -> int:
    """Numbers per token of the queries and the outputs of all heads together: the keys of
    collaborative heads are wider than their values."""
    projection = segment.attention.projection
    heads, value_width = projection.output_shape()
    return heads * (projection.key_width() + value_width)


def _estimated_temporaries(config: RunConfig, layout: Layout) -> float:
    """Saved activations, one layer's gathered weights with their gradients, its streams, and the
    loss's table and logits; the gradients of the parameters are not among them."""
    model, item = config.model, np.dtype(config.model.numerics.dtype).itemsize
    saved = SAVED[model.remat] * _activation_bytes(config, layout)
    table = model.vocabulary_size * model.width / layout.model_ways
    layer = 2 * item * (layout.weights - table) / model.layers
    streams = max(_layer_bytes(config, segment, layout) for segment in model.segments())
    output = (item + 4) * model.vocabulary_size * model.width
    return saved + max(layer + streams, output)


def _layer_bytes(config: RunConfig, segment: Segment, layout: Layout) -> float:
    """What a layer of this segment holds between its input and its output, with its gradients:
    streams, and four times the float32 scores of the queries whose heads meet at a time."""
    model, item = config.model, np.dtype(config.model.numerics.dtype).itemsize
    attention = 8 * model.width + 4 * _head_floats(segment) / layout.model_ways
    tokens = segment.feed_forward.tokens_at_once(layout.local_tokens)
    between = 2 * tokens * segment.feed_forward.stream_floats(model.width) / layout.model_ways
    at_once = layout.local_tokens * min(1, ROWS / config.seq_len)
    scores = 4 * 4 * at_once * segment.attention.score_floats(config.seq_len)
    return item * (layout.local_tokens * attention + between) + scores
