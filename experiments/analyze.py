"""What the heads of trained models learnt.

    python -m experiments.analyze --workdir=runs/kha_tiny --out=figures/
    python -m experiments.analyze --workdir=runs/linear,runs/kha_tiny --watch=30

Reads the mixer matrices of the newest checkpoint (not the rest of it), prints a table, and writes
each figure as SVG, PDF and PNG (300 dpi), and all of them as one page, OUT/index.html, that needs
nothing else. --workdir=a,b,c compares runs side by side; a bare checkpoint will do. --watch=30 goes
on while training runs. What checkpoints hold is listed by experiments.checkpoints.
"""

import functools
import logging
import os
import signal
import time
from pathlib import Path
from typing import Any, Callable

from absl import flags
from rich import box
from rich.table import Table

from experiments.cli import command_line, terminal
from experiments.cli.codes import UsageError
from experiments.run_folders import stored
from experiments.sweeps import page
from kha_jax import analysis
from kha_jax.analysis import curves, figures, heads, measures, style
from kha_jax.analysis.reading import STREAMS, Run, Stack, bare_checkpoint, saved_steps
from kha_jax.errors import CheckpointError
from kha_jax.storage import write_text

WORKDIR = flags.DEFINE_list(
    "workdir", [], "Required: run folders or checkpoints, shown in this order."
)
OUT = flags.DEFINE_string("out", "figures", "Folder to write.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint to read; the newest by default.")
CLIP = flags.DEFINE_bool("clip", False, "Also heat maps cut to [0, 1], as in the paper's figure 3.")
HEADS = flags.DEFINE_bool(
    "heads", True, "Also read the projections: how heads stand to each other."
)
WATCH = flags.DEFINE_integer(
    "watch", None, "Seconds between refreshes until training is done.", lower_bound=1
)

log = logging.getLogger("kha_jax")
WIDEST = 1024  # features of all heads together, up to which heads are compared with one another
Draw = Callable[[], Any]


def open_runs() -> list[Run]:
    """The runs of --workdir.

    Raises:
        UsageError: none is named, or there is no such folder.
    """
    if not WORKDIR.value:
        raise UsageError("--workdir: is required; name run folders, such as runs/kha_tiny")
    command_line.refuse_empty(WORKDIR)
    paths = [_place(path) for path in WORKDIR.value]
    for path in paths:
        try:
            exists = os.path.exists(path)
        except ValueError as error:  # the name is no name
            raise UsageError(f"--workdir={path}: {' '.join(str(error).split())}") from None
        if not exists:
            raise UsageError(f"--workdir={path}: no such folder")
    return [Run(path, STEP.value) for path in paths]


def _place(path: str) -> str:
    """The folder, of gs:// the mirror."""
    of_this_machine = path.lower().startswith("file://")
    return str(stored.readable_folder("workdir", path[len("file://") * of_this_machine :]))


def compared(runs: list[Run], stacks: dict[str, dict[str, Stack]]) -> dict[str, Draw]:
    """The figures that hold all runs, by name."""
    draws: dict[str, Draw] = {}
    rows = {run.name: run.metrics() for run in runs if run.config is not None}
    if rows:
        draws["training"] = functools.partial(curves.training, rows)
        draws["stability"] = functools.partial(curves.stability, rows)
    if any(stacks.values()):
        draws["depth"] = functools.partial(figures.depth, stacks)
    return draws


def of_run(run: Run, stacks: dict[str, Stack], scale: float) -> dict[str, Draw]:
    """The figures of one run, by name."""
    draws: dict[str, Draw] = {}
    if stacks:
        draws["heat_maps"] = functools.partial(figures.heat_maps, stacks, scale=scale)
        if CLIP.value:
            draws["clipped"] = functools.partial(figures.heat_maps, stacks, clip=True)
        draws["diagonals"] = functools.partial(figures.diagonal_profiles, stacks, scale)
        draws["spectra"] = functools.partial(figures.spectra, stacks)
        found = figures.blocks_of(stacks)
        draws["blocks"] = functools.partial(figures.block_maps, stacks, found, scale)
    gates = {place: stack for place, stack in stacks.items() if place.endswith("/gate")}
    if gates:
        draws["gates"] = functools.partial(figures.gates, gates)
    logged = analysis.trace(run.metrics()) if run.config is not None else {}
    if logged:
        draws["history"] = functools.partial(figures.history, logged)
    return {**draws, **(of_heads(run) if HEADS.value else {})}


def of_heads(run: Run) -> dict[str, Draw]:
    """The figures of what knocking does to heads, by their weights; slots that are too wide to
    compare, or whose weights go through a latent, are left out."""
    transforms, moments = run.transforms(), {}
    for slot in STREAMS:
        weights = run.stream_weights(slot, WIDEST)
        if weights:
            moments[slot] = [measures.moments_of_weights(*layer) for layer in weights]
    if left_out := [slot for slot in STREAMS if slot not in moments]:
        named = ", ".join(left_out)
        log.info("heads are not compared by %s: over %d features or no own weights", named, WIDEST)
    draws: dict[str, Draw] = {}
    mixed = {slot: transforms[slot] for slot in moments if slot in transforms}
    if mixed:
        rank = max(1, min(stack.T.shape[1] for stack in mixed.values()) // 4)
        draws["subspaces"] = functools.partial(heads.subspaces, mixed, moments, rank)
    if moments:
        alike = {
            slot: heads.alike_by_weights(mixed, moments)[slot]
            if slot in mixed
            else heads.alike(C, C)
            for slot, C in moments.items()
        }
        draws["similarity"] = functools.partial(heads.similarity, alike)
    return draws


def _table(*left: str, right: tuple[str, ...] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for name in (*left, *right):
        table.add_column(name, justify="left" if name in left else "right")
    return table


def summary(runs: list[Run], stacks: dict[str, dict[str, Stack]]) -> Table:
    """How far each matrix has come, over its layers."""
    right = ("step", "distance", "most", "layer", "diagonal", "off", "norm")
    table = _table("run", "matrix", right=right)
    for run in runs:
        for place, stack in stacks[run.name].items():
            far = measures.distance(stack.T, stack.start)
            table.add_row(
                run.name,
                place,
                str(run.step if run.step is not None else ""),
                f"{far.mean():.3f}",
                f"{far.max():.3f}",
                f"{stack.layers[int(far.argmax())]} of {len(stack.layers)}",
                f"{measures.diagonal_mean(stack.T).mean():.3f}",
                f"{measures.off_diagonal_share(stack.T).mean():.1%}",
                f"{measures.spectrum(stack.T)[:, 0].max():.2f}",
            )
        if not stacks[run.name]:
            table.add_row(run.name, "no mixers", str(run.step))
    return table


def write(out: Path) -> list[Run]:
    """Reads the runs and writes their figures and the page; returns the runs.

    Raises:
        UsageError: the folder cannot be written, or the extra is not installed.
    """
    runs = open_runs()
    stacks = {run.name: run.matrices() for run in runs}
    if len(stacks) < len(runs):
        raise UsageError("--workdir: two runs have one name; rename one of the folders")
    terminal.say("distance |T - start| / |I|: mean and most over layers; off: off-diagonal share")
    terminal.show(table := summary(runs, stacks))
    try:
        out.mkdir(parents=True, exist_ok=True)
        sections = {
            name: [("", style.save(draw, out / name))]
            for name, draw in compared(runs, stacks).items()
        }
        everything = {f"{run}/{p}": s for run, of in stacks.items() for p, s in of.items()}
        scale = figures.scale_of(everything) if everything else 1.0
        for run in runs:
            for name, draw in of_run(run, stacks[run.name], scale).items():
                path = out / (name if len(runs) == 1 else f"{name}_{run.name}")
                sections.setdefault(name, []).append((run.name, style.save(draw, path)))
        text = page.write([(run.name, run.step) for run in runs], table, sections, WATCH.value)
        write_text(out / "index.html", text)  # a browser never sees half of it
    except OSError as error:
        raise UsageError(f"--out={out} cannot be written: {error.strerror}") from None
    except style.PlotsMissing as error:
        raise UsageError(str(error)) from None
    print(f"wrote {out / 'index.html'} and {sum(map(len, sections.values()))} figures", flush=True)
    return runs


def watch(out: Path) -> None:
    """Writes again whenever a run has come further, until all are done; Ctrl-C ends it.

    Raises:
        UsageError: one of the folders is no run's, and will never be done.
    """
    for path in WORKDIR.value:
        if bare_checkpoint(_place(path)):
            problem = "is a bare checkpoint, to which nothing is added; name a run folder"
            raise UsageError(f"--watch: --workdir={path} {problem}")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    seen = said = None
    try:
        while True:
            try:
                now = [
                    (analysis.read_metrics(p)[-1:], saved_steps(p))
                    for p in map(_place, WORKDIR.value)
                ]
                if now != seen:
                    runs, seen = write(out), now
                    if all(run.step >= run.config.steps for run in runs):
                        return
            except CheckpointError as error:
                # none yet, or retention removed it while it was read
                if str(error) != said:
                    log.info("waiting: %s", said := str(error))
            time.sleep(WATCH.value)
    except KeyboardInterrupt:
        return


def main() -> None:
    """See the module's docstring."""
    out = stored.own_folder("out", OUT.value)
    if WATCH.value:
        return watch(out)
    write(out)


if __name__ == "__main__":
    command_line.run(main)
