"""What a run would cost on a TPU pod: the real train step compiled ahead of time for chips that are not there, and a roofline.

Memory is XLA's own analysis of the compiled step. FLOPs come from the accounting, since XLA counts a loop's body once. Times are a
roofline: the matrix units at EFFICIENCY of their data-sheet rate, memory and links at all of theirs, everything perfectly overlapped,
so that the step is as long as its slowest part.
"""

import importlib.util
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kha_jax import accounting, sharding
from kha_jax.accounting import PEAK_FLOPS
from kha_jax.config import ConfigError, near
from kha_jax.training import RunConfig, make_trainer

EFFICIENCY = 0.75  # of the peak, in the matrix products and the attention kernel; an assumption, not a measurement


class Chip(NamedTuple):
    """One device by its data sheet: dense bf16 FLOP/s, bytes of HBM, bytes/s of HBM, bytes/s of its links, all directions together."""

    flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float


CHIPS = {
    "v5p": Chip(PEAK_FLOPS["v5p"], 95 * 2**30, 2765e9, 600e9),
    "v5e": Chip(PEAK_FLOPS["v5e"], 15.75 * 2**30, 819e9, 200e9),
    "v6e": Chip(PEAK_FLOPS["v6e"], 31.25 * 2**30, 1640e9, 448e9),
}
TOPOLOGIES = {
    "v5e-64": "v5e:8x8", "v5e-256": "v5e:16x16", "v5p-64": "v5p:4x4x2", "v5p-128": "v5p:4x4x4", "v6e-64": "v6e:8x8", "v6e-256": "v6e:16x16",
}  # fmt: skip


class Topology(NamedTuple):
    """A pod slice: its name for libtpu (`v5p:4x4x4`), chips and their data sheet."""

    name: str
    chips: int
    chip: Chip


def topology(name: str) -> Topology:
    """The slice of a name such as v5p:4x4x4, or of a preset such as v5p-128.

    Raises:
        ConfigError: for a name of neither form.
    """
    full = TOPOLOGIES.get(name, name)
    kind, _, shape = full.partition(":")
    if kind not in CHIPS or not shape or not all(part.isdigit() and int(part) for part in shape.split("x")):
        raise ConfigError("--topology", f"{name!r} is not KIND:SHAPE with a kind of {', '.join(CHIPS)}; {near(name, TOPOLOGIES)}")
    return Topology(full, math.prod(map(int, shape.split("x"))), CHIPS[kind])


class Plan(NamedTuple):
    """Sizes are bytes per device, times seconds of one optimiser step, `moved` bytes per device and step by kind of collective."""

    topology: str
    chips: int
    batch_size: int
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
    """The run on a slice: with `sequences` on a device at once, and as many micro-batches as its batch then needs.

    Raises:
        ConfigError: the batch does not divide.
    """
    ways = slice_.chips // (config.mesh.model if config.mesh.model > 0 else 1)
    if sequences is None:
        sequences = max(1, config.batch_size // config.accumulation // ways)
    at_once = sequences * ways
    batch = max(config.batch_size, at_once)
    if batch % at_once:
        raise ConfigError("config.batch_size", f"must be a multiple of {sequences} sequences on {ways} devices, found {config.batch_size}")
    return config.replace(batch_size=batch, accumulation=batch // at_once)


def has_libtpu() -> bool:
    return importlib.util.find_spec("libtpu") is not None


def compiled_memory(config: RunConfig, slice_: Topology) -> tuple[float, float]:
    """(peak, temporaries) in bytes per device of one train step, compiled for the slice through libtpu."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=slice_.name).devices
    mesh = sharding.make_mesh(config.mesh, devices)
    trainer, rows = make_trainer(config, mesh), sharding.batch_sharding(mesh)
    ids = jax.ShapeDtypeStruct((config.batch_size, config.seq_len), jnp.int32, sharding=rows)
    batch = {name: ids for name in ("tokens", "targets", "positions", "segment_ids")}
    batch["weights"] = jax.ShapeDtypeStruct(ids.shape, jnp.float32, sharding=rows)
    step = jax.jit(trainer.train_step, donate_argnums=0, out_shardings=(trainer.shardings, None))
    memory = step.lower(trainer.abstract, batch).compile().memory_analysis()
    whole = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
    return float(getattr(memory, "peak_memory_in_bytes", 0) or whole), float(memory.temp_size_in_bytes)


def _state_bytes(config: RunConfig, chips: int) -> tuple[float, float]:
    """(parameters, optimiser state) on one device of this many, by the shardings that the trainer gives them."""
    mesh_shape = dict(zip(sharding.MESH_AXES, config.mesh.shape(chips)))
    mesh = jax.sharding.AbstractMesh(tuple(mesh_shape.values()), tuple(mesh_shape))
    trainer = make_trainer(config, mesh)
    size = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize  # noqa: E731
    total = lambda tree: float(sum(size(leaf) for leaf in jax.tree.leaves(tree)))  # noqa: E731
    return total(trainer.abstract.params), total((trainer.abstract.optimizer, trainer.abstract.balance))


def plan(config: RunConfig, slice_: Topology, compiled: bool) -> Plan:
    """Plans a run that `placed` has put on the slice. compiled: memory from XLA; otherwise estimated from the sizes."""
    chips, chip, model = slice_.chips, slice_.chip, config.model
    cost = accounting.account(model, config.seq_len, tokens=config.batch_size * config.seq_len)
    tokens = config.batch_size * config.seq_len
    local_tokens = tokens / config.accumulation / chips
    params_bytes, optimizer_bytes = _state_bytes(config, chips)
    activations = local_tokens * model.width * model.layers * np.dtype(model.numerics.dtype).itemsize
    if compiled:
        peak, temporaries = compiled_memory(config, slice_)
    else:
        temporaries = _estimated_temporaries(config, local_tokens, cost, params_bytes, activations)
        peak = params_bytes + optimizer_bytes + temporaries

    # The backward pass costs two forward ones; full rematerialisation runs the layers forward once more.
    again = {"none": 0.0, "dots": 0.05, "full": 1.0}[model.remat]
    executed = cost.training_flops * (3 + again) / 3 * tokens
    moved = _moved(config, chips, cost)
    passes = 3 + again
    hbm = passes * config.accumulation * _pass_bytes(config, local_tokens, cost) + 3 * (params_bytes + optimizer_bytes)
    times = {
        "compute": executed / chips / chip.flops / EFFICIENCY, "HBM": hbm / chip.hbm_bandwidth,
        "links": sum(moved.values()) / chip.link_bandwidth,
    }  # fmt: skip
    bound = max(times, key=times.get)
    step = times[bound]
    seconds = step * config.steps
    return Plan(
        topology=slice_.name, chips=chips, batch_size=config.batch_size, accumulation=config.accumulation, params_total=cost.parameters,
        params_active=cost.active, params_bytes_per_device=params_bytes, optimizer_bytes_per_device=optimizer_bytes,
        activation_bytes_per_device=activations, temporary_bytes_per_device=temporaries, peak_bytes_per_device=peak,
        hbm_bytes_per_device=chip.hbm_bytes, fits=peak <= chip.hbm_bytes, flops_per_step=cost.training_flops * tokens, moved=moved,
        compute_seconds=times["compute"], hbm_seconds=times["HBM"], link_seconds=times["links"], step_seconds=step, bound=bound,
        mfu=cost.training_flops * tokens / chips / chip.flops / step, tokens_per_second=tokens / step, days=seconds / 86400,
        chip_hours=seconds / 3600 * chips, source="compiled" if compiled else "analytic",
    )  # fmt: skip


def _moved(config: RunConfig, chips: int, cost: accounting.Accounting) -> dict[str, float]:
    """FSDP: weights are gathered in bfloat16 for the forward and the backward pass of every micro-batch, gradients reduce-scattered;
    `expert` gathers tokens and reduce-scatters results, `model` sums the outputs of attention and feed-forward."""
    data, expert, model = config.mesh.shape(chips)
    width = np.dtype(config.model.numerics.dtype).itemsize
    ways = data * expert
    weights = width * cost.parameters / model * (ways - 1) / ways * config.accumulation
    passes = 2 if config.model.remat == "full" else 1  # forward passes
    moved = {"all-gather": 2 * weights, "reduce-scatter": weights, "all-reduce": 0.0}
    tokens = config.batch_size * config.seq_len / ways
    stream = width * tokens * config.model.width * config.model.layers
    if expert > 1:
        moved["all-gather"] += 2 * stream * (expert - 1)
        moved["reduce-scatter"] += 2 * stream * (expert - 1)
    if model > 1:
        moved["all-reduce"] += 2 * (2 + passes) * stream * 2 * (model - 1) / model
    return {kind: size for kind, size in moved.items() if size}


def _pass_bytes(config: RunConfig, local_tokens: float, cost: accounting.Accounting) -> float:
    """HBM traffic of one pass over the layers, roughly: weights once, and each stream of a token written and read once."""
    model, width = config.model, np.dtype(config.model.numerics.dtype).itemsize
    heads, value_width = model.attention.projection.output_shape()
    feed_forward = getattr(model.feed_forward, "top_k", 1) * 3 * model.feed_forward.width
    spread = getattr(model.feed_forward, "top_k", 0) * 2 * model.width
    per_token = model.layers * (8 * model.width + 6 * heads * value_width + feed_forward + spread)
    return width * (cost.parameters + 2 * per_token * local_tokens)


def _estimated_temporaries(config, local_tokens, cost, params_bytes, activations) -> float:
    """Gradients, saved activations, one layer's gathered weights with their gradients, its streams, and the loss's table and logits."""
    model, width = config.model, np.dtype(config.model.numerics.dtype).itemsize
    heads, value_width = model.attention.projection.output_shape()
    saved = {"none": 12.0, "dots": 5.0, "full": 1.0}[model.remat] * activations
    layer = 2 * width * (cost.parameters - model.vocabulary_size * model.width) / model.layers
    streams = width * local_tokens * (8 * model.width + 8 * heads * value_width)
    chunk = min(local_tokens, getattr(model.feed_forward, "chunk_tokens", None) or local_tokens)
    rows = width * chunk * getattr(model.feed_forward, "top_k", 0) * (4 * model.width + 4 * model.feed_forward.width)
    table = (width + 4) * model.vocabulary_size * model.width
    return params_bytes + saved + max(layer + streams + rows, table)
