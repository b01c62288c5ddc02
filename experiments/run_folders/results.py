"""What came of runs: one small CSV, a line for each that has ended well."""

import contextlib
import csv
import io
import subprocess
from pathlib import Path
from typing import Any, NamedTuple, Sequence

from experiments.cli import command_line
from experiments.cli.command_line import UsageError
from experiments.run_folders import stored


class Result(NamedTuple):
    """A line of runs.csv. Losses in nats per token: val_* of the last evaluation, None for what it
    or an older file does not have; train_loss the mean over the last tenth of the steps.
    step_seconds: median. data: hash of the text. spike_share: see spikes.spike_score. nonfinite:
    steps that were not applied. curve: `step:val_loss`, joined by spaces."""

    name: str
    row: str
    seed: int
    learning_rate: float
    hash: str
    data: str
    steps: int
    parameters: int
    active_parameters: int
    flops_per_token: float
    val_loss: float
    val_bits_per_byte: float | None
    val_accuracy: float | None
    train_loss: float
    step_seconds: float
    spike_share: float
    nonfinite: int
    hardware: str
    commit: str
    curve: str


def read(path: Path) -> list[Result]:
    """The lines of a runs.csv.

    Raises:
        UsageError: it is not one.
    """
    types = {name: hint for name, hint in Result.__annotations__.items()}

    def value(name: str, line: dict[str, str]) -> Any:
        kind = types[name]
        if kind in (int, float, str):
            return kind(line[name])
        return float(line[name]) if line.get(name) else None

    try:
        with open(path, newline="") as file:
            lines = list(csv.DictReader(file))
        return [Result(**{name: value(name, line) for name in types}) for line in lines]
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise UsageError(f"{path}: is no table of runs ({error!r})") from None


def write(path: Path, results: Sequence[Result]) -> None:
    """Writes a runs.csv, whole or not at all."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Result._fields)
    writer.writerows(results)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text.getvalue())
    temporary.rename(path)


def known(paths: Sequence[str]) -> list[Result]:
    """Those of several files."""
    return [result for path in paths for result in read(stored.local_folder("known", path))]


def commit() -> str:
    """Of this code, with a + where it was changed since; empty outside of git."""

    def git(*words: str) -> str:
        line = ["git", "-C", str(command_line.REPOSITORY), *words]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    with contextlib.suppress(OSError):
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + "+" * bool(changed)
    return ""
