"""Runs one after another, each a process of experiments.train with a folder of its own, and what
came of them in one small CSV.

A sweep's folder holds `sweep.json` (what was asked for), one run folder each, and `runs.csv`, a
line for each run that has ended well (`Result`). Several commands may work on one folder at once: a
run that another one is training is passed over.
"""

import contextlib
import csv
import fcntl
import hashlib
import io
import json
import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple, Sequence

from experiments import command_line, stored
from experiments.command_line import UsageError
from experiments.run_folder import config_hash
from kha_jax.accounting import account
from kha_jax.config import to_dict
from kha_jax.manifest import CheckpointError, read_manifest, write_json
from kha_jax.metrics import read_lines
from kha_jax.training import RunConfig

RESULTS, PLAN, LOG = "runs.csv", "sweep.json", "log.txt"
LAST = 0.1  # of the steps, over which the training loss is averaged


class Planned(NamedTuple):
    """A run that is wanted: `arguments` of experiments.train but its folder, and the config that
    they make."""

    name: str
    row: str
    seed: int
    arguments: tuple[str, ...]
    config: RunConfig
    learning_rate: float | None = None

    def hash(self) -> str:
        """Of what decides its figures, but for the text that it reads."""
        evaluation = json.dumps(to_dict(self.config.evaluation))
        text = config_hash(self.config) + evaluation
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def tokens(self) -> int:
        return self.config.steps * self.config.tokens_per_step

    def flops(self) -> float:
        """Of the whole training, by the accounting."""
        cost = account(self.config.model, self.config.seq_len, tokens=self.config.tokens_per_step)
        return cost.training_flops * self.tokens()


class Result(NamedTuple):
    """A line of runs.csv. Losses in nats per token: val_* of the last evaluation, train_loss the
    mean over the last tenth of the steps. step_seconds: median. data: hash of the text. curve:
    `step:val_loss`, joined by spaces. nonfinite: steps that were not applied."""

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
    train_loss: float
    step_seconds: float
    nonfinite: int
    hardware: str
    commit: str
    curve: str


def summary(run: Planned, folder: Path) -> Result | None:
    """What came of a run; None if it has not ended."""
    metrics = folder / "metrics.jsonl"
    rows = list(read_lines(metrics)) if metrics.exists() else []
    evaluated = [row for row in rows if row.get("val_loss") is not None]
    losses = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
    config = run.config
    if not evaluated or evaluated[-1]["step"] != config.steps or not losses:
        return None
    try:
        manifest = read_manifest(folder / "checkpoints" / f"{config.steps:08d}")
    except CheckpointError:
        return None
    cost = account(config.model, config.seq_len, tokens=config.tokens_per_step)
    late = [loss for step, loss in losses if step > (1 - LAST) * config.steps]
    rates = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    return Result(
        name=run.name,
        row=run.row,
        seed=run.seed,
        learning_rate=config.optimizer.learning_rate,
        hash=run.hash(),
        data=str(manifest.get("data"))[:12],
        steps=config.steps,
        parameters=cost.parameters,
        active_parameters=cost.active,
        flops_per_token=cost.training_flops,
        val_loss=evaluated[-1]["val_loss"],
        val_bits_per_byte=evaluated[-1].get("val_bits_per_byte"),
        train_loss=statistics.fmean(late or [losses[-1][1]]),
        step_seconds=round(config.tokens_per_step / statistics.median(rates), 5),
        nonfinite=sum(bool(row.get("nonfinite")) for row in rows),
        hardware=str(manifest.get("hardware", "")),
        commit=commit(),
        curve=" ".join(f"{row['step']}:{row['val_loss']:.5f}" for row in evaluated),
    )


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


def read_results(path: Path) -> list[Result]:
    """The lines of a runs.csv.

    Raises:
        UsageError: it is not one.
    """
    types = {name: hint for name, hint in Result.__annotations__.items()}

    def value(name: str, text: str) -> Any:
        kind = types[name]
        if kind in (int, float, str):
            return kind(text)
        return float(text) if text else None

    try:
        with open(path, newline="") as file:
            lines = list(csv.DictReader(file))
        return [Result(**{name: value(name, line[name]) for name in types}) for line in lines]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise UsageError(f"{path}: is no table of runs ({error!r})") from None


def write_results(path: Path, results: Sequence[Result]) -> None:
    """Writes a runs.csv, whole or not at all."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Result._fields)
    writer.writerows(results)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text.getvalue())
    temporary.rename(path)


class Sweep:
    """The folder of a sweep and the runs that are wanted in it.

    known: results from elsewhere; a run whose config and text are those of one of them is not
    trained again.
    """

    def __init__(self, folder: Path, runs: Sequence[Planned], known: Sequence[Result] = ()):
        self.folder, self.runs = folder, list(runs)
        self.known = {(result.hash, result.data): result for result in known}
        self.data: dict[str, str] = {}
        self.failed: dict[str, int] = {}

    def begin(self, about: dict[str, Any]) -> None:
        """Makes the folder and writes what was asked for.

        Raises:
            UsageError: it cannot be written.
        """
        wanted = [
            {
                "name": run.name,
                "row": run.row,
                "seed": run.seed,
                "learning_rate": run.learning_rate,
                "hash": run.hash(),
                "steps": run.config.steps,
            }
            for run in self.runs
        ]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / PLAN, {**about, "runs": wanted})
        except OSError as error:
            raise UsageError(f"--out={self.folder} cannot be written: {error.strerror}") from None

    def results(self) -> dict[str, Result]:
        """Those that are there, by the name of the run; others than the wanted too."""
        path = self.folder / RESULTS
        return {result.name: result for result in read_results(path)} if path.exists() else {}

    def done(self) -> dict[str, Result]:
        """Those of the wanted runs, of their present config."""
        there = self.results()
        return {
            run.name: there[run.name]
            for run in self.runs
            if run.name in there and there[run.name].hash == run.hash()
        }

    def missing(self) -> list[Planned]:
        done = self.done()
        return [run for run in self.runs if run.name not in done]

    def keep(self, result: Result) -> None:
        """Adds a line to runs.csv."""
        with open(self.folder / "lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            together = {**self.results(), result.name: result}
            write_results(self.folder / RESULTS, list(together.values()))

    def take_known(self) -> int:
        """Takes over the results that are known from elsewhere; how many."""
        taken = 0
        for run in self.missing() if self.known else ():
            result = self.known.get((run.hash(), self._text(run.config)))
            if result:
                self.keep(result._replace(name=run.name, row=run.row))
                taken += 1
        return taken

    def _text(self, config: RunConfig) -> str:
        """The hash of the text that a run would read."""
        key = json.dumps([to_dict(config.data), config.seq_len, config.seed], sort_keys=True)
        if key not in self.data:
            source = config.data.open("train", config.seq_len, config.seed)
            self.data[key] = source.fingerprint[:12]
        return self.data[key]

    def train(self, run: Planned, watch: Callable[[], None]) -> int | None:
        """Trains one run in a process of its own, or goes on with it; its exit code, None where
        another process is training it.

        watch: called about every second meanwhile.
        """
        folder = self.folder / run.name
        folder.mkdir(exist_ok=True)
        # the run's own lock is not taken in its first seconds, and outlives a sweep that is killed
        with _locked(folder / "claim") as claimed:
            with _locked(folder / "lock") as free:
                pass
            if not claimed or not free:
                return None
            line = [sys.executable, "-m", "experiments.train", *run.arguments]
            code = self._train([*line, f"--workdir={folder}"], folder / LOG, watch)
        result = summary(run, folder) if code == command_line.DONE else None
        if result:
            self.keep(result)
        elif code == command_line.DONE:
            code = command_line.STORAGE  # it says that it is done, and its record is not there
        if code not in (command_line.DONE, command_line.PREEMPTED):
            self.failed[run.name] = code
        return code

    def _train(self, line: list[str], path: Path, watch: Callable[[], None]) -> int:
        with open(path, "ab") as log:
            child = subprocess.Popen(
                line, stdout=log, stderr=log, cwd=command_line.REPOSITORY, start_new_session=True
            )
        with _passed_on(child):
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return child.wait(timeout=1)
                watch()

    def last_line(self, run: Planned) -> dict[str, Any]:
        """The newest metrics of a run; empty without any."""
        path = self.folder / run.name / "metrics.jsonl"
        try:
            with open(path, "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - 2**14))
                tail = file.read().splitlines()
        except OSError:
            return {}
        for line in reversed(tail):
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and "loss" in row:
                    return row
        return {}

    def why(self, run: Planned) -> str:
        """The last line that a run has said."""
        path = self.folder / run.name / LOG
        lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
        return lines[-1] if lines else ""


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Whether nobody else has the file locked; it is locked for as long as this lasts."""
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


@contextlib.contextmanager
def _passed_on(child: subprocess.Popen) -> Iterator[None]:
    """Signals that ask this process to stop go to the child, which saves and leaves."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def ask(number: int, _: Any) -> None:
        child.send_signal(number)

    before = [signal.signal(number, ask) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


def planned(
    name: str, row: str, seed: int, arguments: Sequence[str], learning_rate: float | None = None
) -> Planned:
    """A run of experiments.train with these arguments.

    Raises:
        UsageError: its config cannot be used.
    """
    every = (*arguments, f"--config.seed={seed}")
    if learning_rate is not None:
        every = (*every, f"--config.optimizer.learning_rate={learning_rate}")
    config = command_line.config_of(RunConfig, every)
    return Planned(name, row, seed, every, config, learning_rate)


def known_results(paths: Sequence[str]) -> list[Result]:
    """Those of several files."""
    return [result for path in paths for result in read_results(stored.local_folder("known", path))]
