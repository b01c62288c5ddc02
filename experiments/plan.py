"""Decides on a laptop whether a run fits a pod.

    python -m experiments.plan --config=configs/kha_moe_6b.py --topology=v5p:4x4x4
    python -m experiments.plan --compare=baseline,linear,mlp --sequences_per_device=4
    python -m experiments.plan --sweep_topologies=v5e-64,v5p-64,v6e-64 --nocompile --json
    python -m experiments.plan --config=configs/kha_moe_6b.py --topology=v5p-128 --fastest

Compiles the real train step for the slice, without a TPU, through libtpu (extra: plan), and prints
memory per device, FLOPs, bytes moved, a roofline of the step, the step to expect, and days and
chip-hours for the whole run. --fastest searches rematerialisation, sequences at once and
micro-batches and ranks what fits. Without libtpu memory is estimated, and it says so.
"""

import json
import os
import sys
from typing import Iterable

import jax
from absl import flags
from rich.table import Table

from experiments.cli import command_line, config_files, terminal
from experiments.cli.codes import UsageError
from kha_jax import planning
from kha_jax.config import ConfigError, under
from kha_jax.hardware import tpu
from kha_jax.hardware.chips import SLICES
from kha_jax.planning import EFFICIENCY, Plan, Setting, Topology
from kha_jax.planning.search import COMPILED, MARGIN
from kha_jax.remat import POLICIES
from kha_jax.training.run_config import RunConfig

command_line.define_config(str(config_files.REPOSITORY / "configs" / "kha_moe_6b.py"))
TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    f"KIND:SHAPE, such as v5p:4x4x4, or one of {', '.join(SLICES)}; by default the mesh's "
    "preset, or v5p-128.",
)
SEQUENCES = flags.DEFINE_integer(
    "sequences_per_device", None, "Rows of a micro-batch on a device.", lower_bound=1
)
REMAT = flags.DEFINE_enum("remat", None, list(POLICIES), "Instead of the config's policy.")
FASTEST = flags.DEFINE_bool(
    "fastest",
    False,
    "Rank settings of rematerialisation, sequences at once and micro-batches that fit; the "
    f"{COMPILED} that are expected to be fastest are compiled.",
)
MESHES = flags.DEFINE_bool(
    "meshes", False, "With --fastest: other sizes of the mesh's `model` and `expert` too."
)
SWEEP = flags.DEFINE_list("sweep_topologies", [], "Plan for each of these slices.")
COMPARE = flags.DEFINE_list(
    "compare",
    [],
    "Plan these variants of the config file, such as baseline,linear,mlp, on one slice.",
)
UNTUNED = flags.DEFINE_bool(
    "untuned", False, "Plan without the settings of kha_jax.hardware.tpu too, side by side."
)
COMPILE = flags.DEFINE_bool("compile", True, "Compile for the slice; off: estimate the memory.")
JSON = flags.DEFINE_bool("json", False, "Print the plans as JSON.")

GIB = 2**30
SHOWN = 10  # settings of a ranking


def leave_chips_alone() -> None:
    """This process computes on the CPU; libtpu compiles for chips that it must not look for."""
    jax.config.update("jax_platforms", "cpu")
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_WORKER_HOSTNAMES="localhost"
    )
    # read by libtpu, which would complain; the slice is what --topology says
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    for quiet in ("TPU_MIN_LOG_LEVEL", "TF_CPP_MIN_LOG_LEVEL", "TPU_STDERR_LOG_LEVEL"):
        os.environ.setdefault(quiet, "3")


def runs() -> dict[str, RunConfig]:
    """The runs that the flags name."""
    holder = flags.FLAGS["config"]
    found = {holder.config_filename: command_line.parse_config(RunConfig)}
    if COMPARE.value:
        path = holder.config_filename.partition(":")[0]
        found = {name: command_line.load_variant(RunConfig, path, name) for name in COMPARE.value}
    if REMAT.value is None:
        return found
    return {
        name: run.replace(model=run.model.replace(remat=REMAT.value)) for name, run in found.items()
    }


def slices() -> dict[str, Topology]:
    """The slices that the flags name."""
    preset = command_line.parse_config(RunConfig).mesh.preset
    named = SWEEP.value or [TOPOLOGY.value or (preset if preset in SLICES else "v5p-128")]
    return {name: planning.topology(name) for name in named}


def compiles() -> bool:
    """Whether plans are compiled, and a line where they are to be and cannot."""
    compiled = COMPILE.value and planning.has_libtpu()
    if COMPILE.value and not compiled:
        print(
            "libtpu is not installed, memory is estimated; for the compiled figures: pip install "
            "-e '.[plan]'",
            file=sys.stderr,
        )
    return compiled


def plans() -> dict[str, Plan]:
    """What the flags ask for, by name."""
    named, out = slices(), {}
    compiled = compiles()
    for slice_name, slice_ in named.items():
        for name, run in runs().items():
            label = (
                name
                if COMPARE.value and not SWEEP.value
                else f"{slice_name} {name if COMPARE.value else ''}".strip()
            )
            out[label] = advise(label, run, slice_, compiled)
            if UNTUNED.value:
                plain, label = run.replace(mesh=run.mesh.replace(tuning="none")), f"{label} untuned"
                out[label] = advise(label, plain, slice_, compiled)
    return out


def ranking() -> list[Setting]:
    """The fastest settings of one run on one slice that fit."""
    (run,), (slice_,) = runs().values(), slices().values()
    count = COMPILED if compiles() else 0
    with under("config"):
        found = planning.fastest(run, slice_, count, SEQUENCES.value, MESHES.value, REMAT.value)
    if not found:
        raise UsageError(
            f"--fastest: no setting fits {slice_.name}; take a larger slice"
            f"{'' if MESHES.value else ', or --meshes'}"
        )
    return found[:SHOWN]


def advise(label: str, asked: RunConfig, slice_: planning.Topology, compiled: bool) -> Plan:
    """The plan; where it does not fit, the cheapest change that does is printed behind its
    label."""
    with under("config"):
        run = planning.placed(asked, slice_, SEQUENCES.value)
    raised = []
    if run.batch_size != asked.batch_size:
        raised = [f"--config.batch_size={run.batch_size}", f"--config.steps={run.steps}"]
        print(
            f"{label}: planned with {' '.join(raised)} instead of {asked.batch_size} and "
            f"{asked.steps}",
            file=sys.stderr,
        )
    with under("config"):
        found = planning.plan(run, slice_, compiled)
    if not found.memory.fits:
        remedy = (
            "no change of rematerialisation, accumulation or slice that is known here does; "
            "split the model further"
        )
        for change in planning.remedies(run, slice_):
            try:
                then = planning.plan(change.config, change.slice_, compiled)
            except ConfigError:
                continue  # something does not divide over the larger slice
            if then.memory.fits:
                needed = [f"--config.{field}={value}" for field, value in change.changes.items()]
                moved = [f"--topology={change.moved_to}"] if change.moved_to else []
                size = (
                    f"{then.sequences_per_device} sequences a device, "
                    f"{then.memory.peak / GIB:.1f} GiB"
                )
                remedy = f"fits with {' '.join([*needed, *moved, *raised])}: {size}"
                break
        peak, room = found.memory.peak / GIB, slice_.chip.hbm_bytes / GIB
        print(f"{label}: {peak:.1f} GiB do not fit {room:.2f}; {remedy}", file=sys.stderr)
    elif better := planning.faster(run, slice_, found):
        needed = " ".join([*better.flags, *raised])
        print(
            f"{label}: fits; {needed} is faster and fits too, by its estimate of "
            f"{better.plan.memory.peak / GIB:.1f} GiB: bound "
            f"{better.plan.roofline.mfu:.1%} instead of {found.roofline.mfu:.1%}, expected "
            f"{better.plan.expected.mfu:.1%} instead of {found.expected.mfu:.1%}",
            file=sys.stderr,
        )
    return found


def show(found: dict[str, Plan]) -> None:
    """One column a plan."""
    rows = {
        "chips": lambda p: f"{p.chips} {p.topology}",
        "sequences a device x micro-batches": lambda p: (
            f"{p.sequences_per_device} x {p.accumulation}"
        ),
        "parameters, active": lambda p: (
            f"{p.params_total / 1e6:,.0f}M, {p.params_active / 1e6:,.0f}M"
        ),
        "GiB parameters + optimiser": lambda p: (
            f"{p.memory.params / GIB:.2f} + {p.memory.optimizer / GIB:.2f}"
        ),
        "GiB saved activations": lambda p: f"{p.memory.activation / GIB:.2f}",
        "GiB temporaries": lambda p: f"{p.memory.temporary / GIB:.2f}",
        "GiB at the peak, of": lambda p: f"{p.memory.peak / GIB:.2f}, {p.memory.hbm / GIB:.1f}",
        "s to compile": lambda p: f"{p.compile_seconds:.0f}" if p.compile_seconds else "",
        "fits": lambda p: "yes" if p.memory.fits else "NO",
        "memory is": lambda p: p.source,
        "PFLOP a step": lambda p: f"{p.flops_per_step / 1e15:.3g}",
        "GB moved a step": lambda p: ", ".join(
            f"{kind} {size / 1e9:{',.0f' if size > 1e10 else '.1g'}}"
            for kind, size in p.moved.items()
        ),
        "s compute / HBM / links": lambda p: " / ".join(
            f"{seconds:.3f}" for seconds in p.roofline[:3]
        ),
        "rematerialisation": lambda p: p.remat,
        "s a step, bound by": lambda p: f"{p.roofline.step_seconds:.4f}, {p.roofline.bound}",
        "planned MFU": lambda p: f"{p.roofline.mfu:.1%}",
        "tokens a second": lambda p: f"{p.roofline.tokens_per_second:,.0f}",
        "days, chip-hours": lambda p: f"{p.roofline.days:.1f}, {p.roofline.chip_hours:,.0f}",
        "expected: s a step, MFU": lambda p: f"{p.expected.step_seconds:.4f}, {p.expected.mfu:.1%}",
        "expected: chip-hours": lambda p: f"{p.expected.chip_hours:,.0f}",
    }
    table = Table(
        title=(
            f"roofline: matrix units at {EFFICIENCY:.0%} of their peak, memory and links at all "
            "of theirs, fully overlapped"
        )
    )
    table.add_column("")
    for name in found:
        table.add_column(name, justify="right")
    for label, cell in rows.items():
        table.add_row(label, *[cell(plan) for plan in found.values()])
    terminal.show(table)


def show_settings(found: Iterable[Plan]) -> None:
    """What the steps are compiled with, each once."""
    lines = (tpu.told(plan.kernels.values(), plan.compiler_options) for plan in found)
    print("\n".join(dict.fromkeys(lines)))


def show_ranking(found: list[Setting]) -> None:
    """One line a setting, fastest first."""
    chips = f"{found[0].plan.chips} chips of {found[0].plan.topology}"
    title = f"{chips}; bound: the roofline; expected: by the kernels' efficiencies"
    table = Table(title=title)
    for name in ("flags", "GiB", "bound", "chip-hours", "expected", "chip-hours"):
        table.add_column(name, justify="left" if name == "flags" else "right")
    for setting in found:
        p = setting.plan
        estimated = "" if p.source == "compiled" else "~"
        table.add_row(
            " ".join(setting.flags),
            f"{estimated}{p.memory.peak / GIB:.1f}",
            f"{p.roofline.mfu:.1%}",
            f"{p.roofline.chip_hours:,.0f}",
            f"{p.expected.mfu:.1%}",
            f"{p.expected.chip_hours:,.0f}",
        )
    terminal.show(table)
    if any(setting.plan.source != "compiled" for setting in found):
        print(f"~ estimated from the sizes, with {MARGIN:.0%} of the memory to spare")


def check_flags() -> None:
    """Flags that do nothing beside each other are refused."""
    command_line.refuse_empty(TOPOLOGY, SWEEP, COMPARE)
    typed = ["--" + argument.lstrip("-") for argument in sys.argv[1:] if argument.startswith("-")]
    if COMPARE.value and any(argument.startswith("--config.") for argument in typed):
        raise UsageError(
            "--compare: takes the variants of the config file as they are; leave out "
            "--config.FIELD=VALUE"
        )
    path, _, variant = flags.FLAGS["config"].config_filename.partition(":")
    if COMPARE.value and variant:
        raise UsageError(f"--compare: names the variants of {path}; leave out :{variant}")
    if SEQUENCES.value and any(a.startswith("--config.accumulation") for a in typed):
        raise UsageError(
            "--sequences_per_device: says how many micro-batches there are; leave out "
            "--config.accumulation"
        )
    if SWEEP.value and TOPOLOGY.value:
        raise UsageError(
            "--topology: does nothing beside --sweep_topologies; leave out one of them"
        )
    if FASTEST.value and (COMPARE.value or SWEEP.value or UNTUNED.value):
        raise UsageError(
            "--fastest: ranks one run on one slice; leave out --compare, --sweep_topologies and "
            "--untuned"
        )
    searched = "--config.accumulation", "--config.model.remat"
    if FASTEST.value and (sets := [a for a in typed if a.startswith(searched)]):
        raise UsageError(
            f"--fastest: searches what {sets[0]} sets; leave it out, or use "
            "--sequences_per_device or --remat"
        )
    if REMAT.value and any(a.startswith("--config.model.remat") for a in typed):
        raise UsageError("--remat: sets the same as --config.model.remat; leave out one of them")
    if MESHES.value and not FASTEST.value:
        raise UsageError("--meshes: does nothing without --fastest")


def main() -> None:
    """See the module's docstring."""
    check_flags()
    leave_chips_alone()
    try:
        found = ranking() if FASTEST.value else plans()
    except planning.SliceError as error:
        flag = "--sweep_topologies" if SWEEP.value else "--topology"
        raise UsageError(f"{flag}: {error}") from None
    if JSON.value and FASTEST.value:
        ranked = [{"flags": setting.flags, **setting.plan.as_dict()} for setting in found]
        print(json.dumps({"plans": ranked}, indent=1))
    elif FASTEST.value:
        show_ranking(found)
        show_settings([found[0].plan])
    elif JSON.value:
        as_dict = {name: plan.as_dict() for name, plan in found.items()}
        print(json.dumps(next(iter(as_dict.values())) if len(found) == 1 else as_dict, indent=1))
    else:
        show(found)
        show_settings(found.values())


if __name__ == "__main__":
    command_line.run(main)
