"""Plans of runs on slices."""

from typing import NamedTuple

from kha_jax.config import ConfigError, under
from kha_jax.planning import memory, times
from kha_jax.planning.slices import Topology
from kha_jax.sharding import axis_size_of
from kha_jax.training.run_config import RunConfig


class Plan(NamedTuple):
    """Sizes are bytes per device, times seconds of one optimiser step, `moved` bytes per device and
    step by kind of collective. `step_seconds` and what follows from it are the roofline,
    `expected_...` what `kha_jax.planning.times` expects. kernels: of each attention, by its field;
    compiler_options: of libtpu, both by `kha_jax.hardware.tpu`."""

    topology: str
    chips: int
    remat: str
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
    network_seconds: float
    step_seconds: float
    bound: str
    mfu: float
    tokens_per_second: float
    days: float
    chip_hours: float
    expected_products: dict[str, float]
    expected_step_seconds: float
    expected_mfu: float
    expected_chip_hours: float
    kernels: dict[str, str]
    compiler_options: dict[str, str]
    compile_seconds: float
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
    chips, chip, tokens = slice_.chips, slice_.chip, config.tokens_per_step
    config, settings = config.tuned(slice_.kind)
    cost = config.cost()
    layout = memory.layout(config, chips)
    params_bytes = memory.held_bytes(layout.state.params)
    optimizer_bytes = memory.held_bytes((layout.state.optimizer, layout.state.balance))
    seconds = 0.0
    if compiled:
        peak, temporaries, seconds = memory.compiled_memory(config, slice_)
    else:
        gradients = (2 if config.accumulation > 1 else 1) * params_bytes  # their sum besides
        temporaries = gradients + memory.estimated_temporaries(config, layout)
        peak = params_bytes + optimizer_bytes + temporaries
    moved = times.collectives(config, layout.state.params, layout.sizes)
    work = times.work(config, layout, cost.forward_flops)
    network = times.network_seconds(slice_, moved)
    roofline = {
        "compute": times.compute_seconds(config, slice_, work),
        "HBM": times.hbm_seconds(config, slice_, layout, params_bytes + optimizer_bytes, work),
        "links": sum(moved.values()) / chip.link_bandwidth,
    } | ({"network": network} if network else {})
    bound = max(roofline, key=roofline.get)
    step = roofline[bound]
    products = times.product_seconds(config, slice_, layout, work)
    expected = times.expected_seconds(products, roofline["HBM"], roofline["links"], network)
    ideal = cost.training_flops * tokens / chips / chip.flops
    return Plan(
        topology=slice_.name if slice_.slices == 1 else f"{slice_.slices}*{slice_.name}",
        chips=chips,
        remat=config.model.remat,
        batch_size=config.batch_size,
        sequences_per_device=config.batch_size // config.accumulation // layout.batch_ways,
        accumulation=config.accumulation,
        params_total=cost.parameters,
        params_active=cost.active,
        params_bytes_per_device=params_bytes,
        optimizer_bytes_per_device=optimizer_bytes,
        activation_bytes_per_device=memory.activation_bytes(config, layout),
        temporary_bytes_per_device=temporaries,
        peak_bytes_per_device=peak,
        hbm_bytes_per_device=chip.hbm_bytes,
        fits=peak <= chip.hbm_bytes,
        flops_per_step=cost.training_flops * tokens,
        moved=moved,
        compute_seconds=roofline["compute"],
        hbm_seconds=roofline["HBM"],
        link_seconds=roofline["links"],
        network_seconds=network,
        step_seconds=step,
        bound=bound,
        mfu=ideal / step,
        tokens_per_second=tokens / step,
        days=step * config.steps / 86400,
        chip_hours=step * config.steps / 3600 * chips,
        expected_products=products,
        expected_step_seconds=expected,
        expected_mfu=ideal / expected,
        expected_chip_hours=expected * config.steps / 3600 * chips,
        kernels=config.kernels("tpu"),
        compiler_options=settings.options,
        compile_seconds=seconds,
        source="compiled" if compiled else "analytic",
    )
