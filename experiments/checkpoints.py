"""Looks after the checkpoints of a run.

    python -m experiments.checkpoints --workdir=runs/kha_tiny --verify
    python -m experiments.checkpoints --workdir=runs/kha_tiny --diff=500,600
    python -m experiments.checkpoints --workdir=runs/kha_tiny --leaves=600

Without another flag it lists them: step, whether they belong to the run and have their sizes, size
on disk, age, config. --verify also compares every checksum, and leaves with 74 when one is not
intact. --prune=STEP,STEP removes those by name, but never the last good one. --diff=STEP,STEP
compares two, leaf by leaf. --leaves=STEP shows the leaves of one with their norms. Both refuse one
that is damaged or of another run.
"""

import contextlib
import fcntl
import math
import sys
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags
from rich.table import Table

from experiments.cli import codes, command_line, terminal
from experiments.cli.codes import UsageError
from experiments.run_folders import stored
from kha_jax.analysis.leaves import Checkpoint
from kha_jax.errors import CheckpointError
from kha_jax.runs.arrays import leaves
from kha_jax.runs.checkpoint import Checkpoints
from kha_jax.runs.manifest import read_manifest, verify, why
from kha_jax.storage import Lease, address, fetch, in_bucket, not_followed
from kha_jax.storage import stored as stored_files
from kha_jax.training.run_folder import read_config, read_lineage

WORKDIR = flags.DEFINE_string("workdir", None, "Required: run folder.")
VERIFY = flags.DEFINE_bool("verify", False, "Read every file and compare it with its checksum.")
PRUNE = flags.DEFINE_list("prune", [], "Steps whose checkpoints are removed.")
DIFF = flags.DEFINE_list("diff", [], "Two steps whose leaves are compared.")
LEAVES = flags.DEFINE_string("leaves", None, "A step whose leaves are shown.")


def steps_of(flag: str, words: list[str], known: list[int]) -> list[int]:
    """The steps that a flag names, all of which are there.

    Raises:
        UsageError: names the first that is not.
    """
    for word in words:
        if not word.isdecimal() or int(word) not in known:
            raise UsageError(f"--{flag}={word}: is no checkpoint; there are {known}")
    return [int(word) for word in words]


def problem(folder: Path, accepts: list[dict], thorough: bool) -> str:
    """Why a checkpoint does not count; empty when it does."""
    try:
        verify(folder, accepts, thorough)
        return ""
    except (CheckpointError, OSError) as error:
        return str(error)


def intact(checkpoints: Checkpoints, steps: list[int], accepts: list[dict]) -> list[int]:
    """The steps, whose leaves may be shown.

    Raises:
        CheckpointError: one of them is damaged, or of another run.
    """
    for step in steps:
        verify(checkpoints.path(step), accepts)
    return steps


def show(folders: list[Path], accepts: list[dict], thorough: bool) -> bool:
    """One row a checkpoint; whether all of them count."""
    table = Table("step", "verified" if thorough else "counts", "MB", "age", "config")
    table.columns[2].justify = table.columns[3].justify = "right"
    wrong = {folder: problem(folder, accepts, thorough) for folder in folders}
    for folder in folders:
        size = sum(found.bytes for found in stored_files(folder).values())
        hours = (time.time() - folder.stat().st_mtime) / 3600
        try:
            config = read_manifest(folder)["config"][:12]
        except (CheckpointError, KeyError, TypeError):
            config = "?"
        row = (str(int(folder.name)), "no" if wrong[folder] else "yes", f"{size / 1e6:,.1f}")
        table.add_row(*row, f"{hours:,.1f} h", config)
    terminal.show(table)
    for reason in filter(None, wrong.values()):
        print(reason, file=sys.stderr)
    return not any(wrong.values())


def prune(workdir: Path, checkpoints: Checkpoints, steps: list[int], accepts: list[dict]) -> None:
    """Removes checkpoints of a run that nobody trains.

    Raises:
        UsageError: it is being trained, or no good checkpoint would be left.
        CheckpointError: one of them cannot be removed.
    """
    with contextlib.ExitStack() as held:
        lock = held.enter_context(open(workdir / "lock", "a+", opener=not_followed))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if in_bucket(workdir):
                held.enter_context(contextlib.closing(Lease(str(address(workdir)))))
        except BlockingIOError:
            said = f"--workdir={address(workdir)} is being trained; stop it first"
            raise UsageError(said) from None
        fetch(workdir)  # from here on nobody else changes it
        left = [step for step in checkpoints.steps() if step not in steps]
        if not any(not problem(checkpoints.path(step), accepts, thorough=True) for step in left):
            raise UsageError("--prune: no good checkpoint would be left")
        for step in steps:
            where = address(checkpoints.path(step))
            try:
                checkpoints.remove(step)
            except OSError as error:
                raise CheckpointError(f"{where} could not be removed: {why(error)}") from None
            print(f"removed {where}")


def diff(checkpoints: Checkpoints, first: int, second: int) -> None:
    """One line for each leaf: equal, or the largest change and its share of the largest value."""
    before, after = (leaves(checkpoints.restore_all(step)) for step in (first, second))
    for name in sorted({**before, **after}):
        if name not in before or name not in after:
            print(f"{name}: only in {first if name in before else second}")
            continue
        a, b = (np.asarray(tree[name]) for tree in (before, after))
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            print(f"{name}: {a.dtype}{list(a.shape)} -> {b.dtype}{list(b.shape)}")
        elif a.tobytes() == b.tobytes():
            print(f"{name}: equal")
        else:
            change = float(np.abs(b.astype(np.float64) - a.astype(np.float64)).max())
            largest = float(np.abs(a.astype(np.float64)).max())
            share = change / largest if largest else math.inf
            print(f"{name}: changes by up to {change:.3g}, {share:.2%} of its largest value")


def show_leaves(folder: Path) -> None:
    """Path, shape, dtype and Frobenius norm of every leaf of a checkpoint, parameters first."""
    state = Checkpoint(address(folder) / "state")
    norms, table = state.norms(), Table("leaf", "shape", "dtype", "norm")
    for name in sorted(norms, key=lambda name: (not name.startswith("params/"), name)):
        leaf = state.leaves[name]
        shape = " x ".join(map(str, leaf.shape)) or "scalar"
        table.add_row(name, shape, leaf.dtype, f"{norms[name]:.6g}")
    terminal.show(table)


def main() -> int:
    """See the module's docstring."""
    workdir = stored.run_folder("workdir", WORKDIR.value)
    if len(DIFF.value) not in (0, 2):
        raise UsageError(f"--diff={','.join(DIFF.value)}: name two steps, such as --diff=100,200")
    jax.config.update("jax_platforms", "cpu")
    accepts = read_lineage(workdir, read_config(workdir))
    with Checkpoints(workdir / "checkpoints", accepts=accepts) as checkpoints:
        folders = checkpoints.folders()
        known = [int(folder.name) for folder in folders]
        if DIFF.value:
            diff(checkpoints, *intact(checkpoints, steps_of("diff", DIFF.value, known), accepts))
        elif LEAVES.value:
            (step,) = intact(checkpoints, steps_of("leaves", [LEAVES.value], known), accepts)
            show_leaves(checkpoints.path(step))
        elif PRUNE.value:
            prune(workdir, checkpoints, steps_of("prune", PRUNE.value, known), accepts)
        elif not show(folders, accepts, VERIFY.value):
            return codes.STORAGE if VERIFY.value else codes.DONE
    return codes.DONE


if __name__ == "__main__":
    command_line.run(main)
