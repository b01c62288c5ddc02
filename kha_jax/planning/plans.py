"""Plans of runs on slices."""

from typing import Any, NamedTuple

from kha_jax.config import ConfigError, under
from kha_jax.planning import memory, times
from kha_jax.planning.slices import Topology
from kha_jax.sharding import axis_size_of
from kha_jax.training import optimizer as optimizers
from kha_jax.training.run_config import RunConfig


class Memory(NamedTuple):
    """Bytes of one device. activation: saved for the backward pass, part of `temporary`. hbm: that
    there are."""

    params: float
    optimizer: float
    activation: float
    temporary: float
    peak: float
    hbm: float

    @property
    def fits(self) -> bool:
        return self.peak <= self.hbm


class Roofline(NamedTuple):
    """Seconds that each part of the hardware takes for one optimiser step; the step takes those of
    the longest, `bound`, and the rest follows from it."""

    compute_seconds: float
    hbm_seconds: float
    link_seconds: float
    network_seconds: float
    step_seconds: float
    bound: str
    mfu: float
    tokens_per_second: float
    days: float
    chip_hours: float


class Expected(NamedTuple):
    """What `kha_jax.planning.times` expects. products: seconds of a step by kind of product."""

    products: dict[str, float]
    step_seconds: float
    mfu: float
    chip_hours: float


class Plan(NamedTuple):
    """moved: bytes per device and step by kind of collective. kernels: of each attention, by its
    field; compiler_options: of libtpu, both by `kha_jax.hardware.tpu`. source: of the memory,
    `compiled` or `analytic`."""

    topology: str
    chips: int
    remat: str
    batch_size: int
    sequences_per_device: int
    accumulation: int
    params_total: int
    params_active: int
    memory: Memory
    flops_per_step: float
    moved: dict[str, float]
    roofline: Roofline
    expected: Expected
    kernels: dict[str, str]
    compiler_options: dict[str, str]
    compile_seconds: float
    source: str

    def as_dict(self) -> dict[str, Any]:
        """All figures beside one another, for JSON."""
        sizes = self.memory._asdict().items()
        groups = {
            "memory": {
                **{f"{name}_bytes_per_device": size for name, size in sizes},
                "fits": self.memory.fits,
            },
            "roofline": self.roofline._asdict(),
            "expected": {f"expected_{k}": v for k, v in self.expected._asdict().items()},
        }
        out: dict[str, Any] = {}
        for name, value in self._asdict().items():
            out |= groups.get(name, {name: value})
        return out


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
    batch_shards = axis_size_of(sizes, "batch")
    if sequences is not None:
        at_once = sequences * batch_shards
        batch = max(config.batch_size, at_once)
        if batch % at_once:
            found = f"found {config.batch_size}"
            raise ConfigError(
                "batch_size",
                f"must be a multiple of {at_once}, {sequences} on each of "
                f"{batch_shards} devices, {found}",
            )
        # a larger batch sees the same tokens
        steps = max(1, config.steps * config.batch_size // batch)
        config = config.replace(batch_size=batch, accumulation=batch // at_once, steps=steps)
    config.check_on(sizes, "tpu")
    return config


def plan(config: RunConfig, slice_: Topology, compiled: bool) -> Plan:
    """Plans a run that `placed` has put on the slice. compiled: memory from XLA; otherwise
    estimated from the sizes."""
    config, settings = config.tuned(slice_.kind)
    cost, layout = config.cost(), memory.layout(config, slice_.chips)
    held, seconds = _memory(config, slice_, layout, compiled)
    moved = times.collectives(config, layout.state.params, layout.sizes)
    work = times.work(config, layout, cost.forward_flops)
    state = held.params + held.optimizer
    parts = {
        "compute": times.compute_seconds(config, slice_, work),
        "HBM": times.hbm_seconds(config, slice_, layout, state, work),
        "links": sum(moved.values()) / slice_.chip.link_bandwidth,
        "network": times.network_seconds(slice_, moved),
    }
    flops = cost.training_flops * config.tokens_per_step
    ideal = flops / slice_.chips / slice_.chip.flops  # seconds of a step at the chips' peak
    roofline = _roofline(config, slice_, parts, ideal)
    products = times.product_seconds(config, slice_, layout, work)
    return Plan(
        topology=slice_.name if slice_.slices == 1 else f"{slice_.slices}*{slice_.name}",
        chips=slice_.chips,
        remat=config.model.remat,
        batch_size=config.batch_size,
        sequences_per_device=config.batch_size // config.accumulation // layout.batch_ways,
        accumulation=config.accumulation,
        params_total=cost.parameters,
        params_active=cost.active,
        memory=held,
        flops_per_step=flops,
        moved=moved,
        roofline=roofline,
        expected=_expected(config, slice_, products, roofline, ideal),
        kernels=config.kernels("tpu"),
        compiler_options=settings.options,
        compile_seconds=seconds,
        source="compiled" if compiled else "analytic",
    )


def _memory(
    config: RunConfig, slice_: Topology, layout: memory.Layout, compiled: bool
) -> tuple[Memory, float]:
    """What a device holds, and the seconds that its compilation took."""
    params = memory.held_bytes(layout.state.params)
    optimizer = memory.held_bytes((layout.state.optimizer, layout.state.balance))
    seconds = 0.0
    if compiled:
        peak, temporary, seconds = memory.compiled_memory(config, slice_)
    else:
        paths = optimizers.trained(config.optimizer, layout.state.params)
        trained = optimizers.only(paths, layout.state.params)
        copies = 2 if config.accumulation > 1 else 1  # their sum besides
        gradients = copies * memory.held_bytes(trained)
        temporary = gradients + memory.estimated_temporaries(config, layout)
        peak = params + optimizer + temporary
    activation = memory.activation_bytes(config, layout)
    return Memory(params, optimizer, activation, temporary, peak, slice_.chip.hbm_bytes), seconds


def _roofline(
    config: RunConfig, slice_: Topology, parts: dict[str, float], ideal: float
) -> Roofline:
    bound = max(parts, key=parts.get)
    step = parts[bound]
    return Roofline(
        *parts.values(),
        step_seconds=step,
        bound=bound,
        mfu=ideal / step,
        tokens_per_second=config.tokens_per_step / step,
        days=step * config.steps / 86400,
        chip_hours=_chip_hours(config, slice_, step),
    )


def _expected(
    config: RunConfig,
    slice_: Topology,
    products: dict[str, float],
    roofline: Roofline,
    ideal: float,
) -> Expected:
    step = times.expected_seconds(
        products, roofline.hbm_seconds, roofline.link_seconds, roofline.network_seconds
    )
    return Expected(products, step, ideal / step, _chip_hours(config, slice_, step))


def _chip_hours(config: RunConfig, slice_: Topology, step: float) -> float:
    return step * config.steps / 3600 * slice_.chips
