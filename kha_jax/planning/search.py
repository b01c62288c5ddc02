"""What would make a run fit, and what would make it faster."""

import math
from typing import Any, Iterator, NamedTuple

from kha_jax.config import ConfigError, differences
from kha_jax.hardware.chips import SLICES
from kha_jax.mesh import MeshConfig
from kha_jax.planning.plans import Plan, placed, plan
from kha_jax.planning.slices import Topology, topology
from kha_jax.remat import POLICIES
from kha_jax.sharding import axis_size_of
from kha_jax.training.run_config import RunConfig

# The memory estimate errs by up to this much of what a device has, and a setting that fits only by
# less than that is left to the compiler.
MARGIN = 0.15
# Settings that are compiled.
COMPILED = 3
MODEL_WAYS = (1, 2, 4, 8)
EXPERT_WAYS = (1, 2, 4, 8, 16)


class Remedy(NamedTuple):
    """A change that saves memory: fields of the run by their dotted names, the slice where it is
    another one, and what they make of the run and the slice."""

    changes: dict[str, Any]
    moved_to: str | None
    config: RunConfig
    slice_: Topology


def remedies(config: RunConfig, slice_: Topology) -> Iterator[Remedy]:
    """What may make a run fit that `placed` has put on the slice, cheapest first.

    Policies of rematerialisation that keep less and fewer sequences at once, in the order of the
    step to expect; then larger slices of the kind, whose FSDP leaves each device less state. What
    the estimate puts above the memory by more than MARGIN is left out.
    """
    policies = list(POLICIES)[: list(POLICIES).index(config.model.remat) + 1]
    most = plan(config, slice_, compiled=False).sequences_per_device
    for setting in _worthwhile(settings(config, slice_)):
        less = setting.config.model.remat in policies and setting.config != config
        if less and setting.plan.sequences_per_device <= most and _may_fit(setting.plan):
            given = {"model.remat": config.model.remat, "accumulation": config.accumulation}
            changes = {k: v for k, v in setting.changes.items() if given.get(k) != v}
            yield Remedy(changes, None, setting.config, slice_)
    for name in SLICES:
        larger = topology(name)
        if larger.chip == slice_.chip and larger.chips > slice_.chips:
            yield from _moved(config, name, policies[::-1])


def _moved(config: RunConfig, name: str, policies: list[str]) -> Iterator[Remedy]:
    """The run on a larger slice, one sequence at once, with each of the policies that may fit."""
    larger, mesh = topology(name), config.mesh.moved(name)
    moved = _mesh_changes(config.mesh, mesh)
    for policy in policies:
        model = config.model.replace(remat=policy)
        try:
            fewest = placed(config.replace(mesh=mesh, model=model), larger, 1)
            fits = _may_fit(plan(fewest, larger, compiled=False))
        except ConfigError:
            return  # something does not divide over it
        if fits:
            kept = {"model.remat": policy} if policy != config.model.remat else {}
            changes = {**kept, "accumulation": fewest.accumulation, **moved}
            yield Remedy(changes, name, fewest, larger)


def _may_fit(estimated: Plan) -> bool:
    return estimated.memory.peak <= estimated.memory.hbm * (1 + MARGIN)


class Setting(NamedTuple):
    """Fields of the run by their dotted names, what they make of it, and its plan."""

    changes: dict[str, Any]
    config: RunConfig
    plan: Plan

    @property
    def flags(self) -> list[str]:
        """What to write behind a command."""
        return [f"--config.{field}={value}" for field, value in self.changes.items()]


def settings(
    config: RunConfig,
    slice_: Topology,
    sequences: int | None = None,
    meshes: bool = False,
    remat: str | None = None,
) -> list[Setting]:
    """All settings of rematerialisation, sequences at once and accumulation (with meshes, sizes of
    `model` and `expert` too) that divide, with their plans from the sizes, fastest to expect first,
    then by memory. sequences, remat: only these.

    Raises:
        ConfigError: nothing divides; what is wrong with the first.
    """
    found: dict[RunConfig, Setting] = {}
    problem = None
    divisors = [n for n in range(1, config.batch_size + 1) if config.batch_size % n == 0]
    for mesh in _meshes(config, slice_) if meshes else [config.mesh]:
        for n in [sequences] if sequences else divisors:
            try:
                batch_shards = axis_size_of(mesh.sizes(slice_.chips), "batch")
                if n * batch_shards > max(config.batch_size, batch_shards) and not sequences:
                    break  # n = 1 may raise the batch, as asked-for sequences may
                run = placed(config.replace(mesh=mesh), slice_, n)
                for policy in [remat] if remat else POLICIES:
                    changed = run.replace(model=run.model.replace(remat=policy))
                    estimate = plan(changed, slice_, compiled=False)
                    found[changed] = Setting(_changes(config, changed), changed, estimate)
            except ConfigError as error:
                problem = problem or error  # something does not divide
    if problem and not found:
        raise problem
    return sorted(found.values(), key=_order)


def _worthwhile(found: list[Setting]) -> list[Setting]:
    """Without those that differ from a faster one, or one as fast, in rematerialisation alone and
    take no less memory."""
    out, least = [], {}
    for setting in found:
        apart = tuple((k, v) for k, v in setting.changes.items() if k != "model.remat")
        peak = setting.plan.memory.peak
        if peak < least.get(apart, math.inf):
            least[apart] = peak
            out.append(setting)
    return out


def _order(setting: Setting) -> tuple[float, float]:
    # less than about a thousandth of a step is no reason to take more memory
    per_token = setting.plan.expected.step_seconds / setting.config.tokens_per_step
    return float(f"{per_token:.3g}"), setting.plan.memory.peak


def _meshes(config: RunConfig, slice_: Topology) -> list[Any]:
    """The run's own mesh, then others of the slice, `data` taking the rest."""
    mixture = config.model.segments()[-1].feed_forward.router_width()
    sizes = [
        config.mesh.replace(data=-1, model=model, expert=expert)
        for model in MODEL_WAYS
        for expert in (EXPERT_WAYS if mixture else (1,))
        if slice_.chips % (model * expert) == 0
    ]
    return [config.mesh, *(mesh for mesh in sizes if mesh != config.mesh)]


def _changes(asked: RunConfig, run: RunConfig) -> dict[str, Any]:
    """What to set, also where the config has it already, so that the line says it all."""
    changes: dict[str, Any] = {"model.remat": run.model.remat, "accumulation": run.accumulation}
    if run.batch_size != asked.batch_size:
        changes |= {"batch_size": run.batch_size, "steps": run.steps}
    return changes | _mesh_changes(asked.mesh, run.mesh)


def _mesh_changes(old: MeshConfig, new: MeshConfig) -> dict[str, Any]:
    return {field: value for field, (_, value) in differences(old, new, "mesh").items()}


def fastest(
    config: RunConfig,
    slice_: Topology,
    compiled: int = COMPILED,
    sequences: int | None = None,
    meshes: bool = False,
    remat: str | None = None,
) -> list[Setting]:
    """Settings that fit, fastest to expect first. compiled: how many are compiled, and as many more
    as it takes until one of them fits; those that XLA knows not to fit are left out, and those that
    it does not know come after those that it does. 0: none is, and all fit with MARGIN to spare."""
    room = slice_.chip.hbm_bytes
    found = _worthwhile(settings(config, slice_, sequences, meshes, remat))
    if not compiled:
        return [s for s in found if s.plan.memory.peak <= room * (1 - MARGIN)]
    worth = [s for s in found if _may_fit(s.plan)]
    known: list[Setting] = []
    tried = 0
    while tried < len(worth) and (tried < compiled or not known):
        setting = worth[tried]
        tried += 1
        truth = plan(setting.config, slice_, compiled=True)
        if truth.memory.fits:
            known.append(setting._replace(plan=truth))
    sure = [s for s in worth[tried:] if s.plan.memory.peak <= room * (1 - MARGIN)]
    return known + (sure if known else [])


def faster(config: RunConfig, slice_: Topology, than: Plan) -> Setting | None:
    """A setting of the mesh of a run that `placed` has put on the slice which fits by its estimate,
    with MARGIN to spare, and is expected to take less of the time by a hundredth or more; None:
    there is none."""
    found = fastest(config, slice_, compiled=0)
    now = than.expected.step_seconds / config.tokens_per_step
    if not found:
        return None
    best = found[0].plan.expected.step_seconds / found[0].config.tokens_per_step
    return found[0] if best < 0.99 * now else None
