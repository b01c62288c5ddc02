"""Runs one after another, each a process of experiments.train with a folder of its own, and what
came of them in one small CSV.

A sweep's folder holds `sweep.json` (what was asked for), one run folder each, and `runs.csv`, a
line for each run that has ended well. Several commands may work on one folder at once: a run that
another one is training is passed over.
"""

import contextlib
import fcntl
import json
import logging
import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import numpy as np

from experiments.cli import codes, config_files
from experiments.cli.codes import UsageError
from experiments.run_folders import results
from experiments.sweeps.planned import Planned
from experiments.train_loop.data_check import check_vocabulary
from experiments.train_loop.stop import asking
from kha_jax.attention.attention import LARGEST
from kha_jax.config import to_dict
from kha_jax.errors import CheckpointError, DataError
from kha_jax.metrics import read_lines
from kha_jax.runs.manifest import read_manifest
from kha_jax.runs.results import RunResult, read_results, write_results
from kha_jax.spikes import spike_score
from kha_jax.storage import not_followed, write_json
from kha_jax.training.run_config import RunConfig

log = logging.getLogger("kha_jax")
RESULTS, PLAN, LOG = "runs.csv", "sweep.json", "log.txt"
LAST = 0.1  # of the steps, over which the training loss is averaged


def summary(run: Planned, folder: Path, commit: str) -> RunResult | None:
    """What came of a run that was trained by this commit; None if it has not ended."""
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
    cost = config.cost()
    late = [loss for step, loss in losses if step > (1 - LAST) * config.steps]
    rates = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    return RunResult(
        name=run.name,
        row=run.row,
        seed=run.seed,
        learning_rate=config.optimizer.learning_rate,
        hash=run.hash(),
        data=str(manifest.get("data"))[:12],
        validation=str(manifest.get("validation", ""))[:12] or None,
        steps=config.steps,
        parameters=cost.parameters,
        active_parameters=cost.active,
        flops_per_token=cost.training_flops,
        val_loss=evaluated[-1]["val_loss"],
        val_bits_per_byte=evaluated[-1].get("val_bits_per_byte"),
        val_accuracy=evaluated[-1].get("val_accuracy"),
        train_loss=statistics.fmean(late or [losses[-1][1]]),
        step_seconds=round(config.tokens_per_step / statistics.median(rates), 5),
        spike_share=spike_score(rows),
        nonfinite=sum(bool(row.get("nonfinite")) for row in rows),
        first_loss=losses[0][1] if losses[0][0] == 1 else None,
        largest_logit=largest(rows, LARGEST),
        hardware=str(manifest.get("hardware", "")),
        commit=commit,
        curve={row["step"]: row["val_loss"] for row in evaluated},
    )


def largest(rows: list[dict[str, Any]], name: str) -> float | None:
    """The largest finite value of a metric, of which a line may hold one for each layer."""
    found = (value for row in rows for value in np.ravel(row.get(name, ())))
    return max((float(z) for z in found if np.isfinite(z)), default=None)


class Sweep:
    """The folder of a sweep and the runs that are wanted in it.

    known: results from elsewhere; a run whose config and text are those of one of them is not
    trained again.
    """

    def __init__(self, folder: Path, runs: Sequence[Planned], known: Sequence[RunResult] = ()):
        self.folder, self.runs = folder, list(runs)
        self.known = {(result.hash, result.data, result.validation): result for result in known}
        self.texts: dict[str, tuple[str, str]] = {}
        self.failed: dict[str, int] = {}
        self.asked_to_stop = False

    def begin(self, about: dict[str, Any]) -> None:
        """Makes the folder and writes what was asked for.

        Raises:
            ConfigError: a run would refuse to train on its data.
            DataError: results that are there are those of other data.
            UsageError: it cannot be written.
        """
        for run in self.runs:
            check_vocabulary(run.config, run.arguments)
        self._check_texts()
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

    def results(self) -> dict[str, RunResult]:
        """Those that are there, by the name of the run; others than the wanted too."""
        path = self.folder / RESULTS
        return {result.name: result for result in read_results(path)} if path.exists() else {}

    def done(self) -> dict[str, RunResult]:
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

    def keep(self, result: RunResult) -> None:
        """Adds a line to runs.csv."""
        with open(self.folder / "lock", "a", opener=not_followed) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            together = {**self.results(), result.name: result}
            write_results(self.folder / RESULTS, list(together.values()))

    def elsewhere(self) -> dict[str, RunResult]:
        """Results of missing runs that are known from elsewhere, by the name of the run."""
        found = {}
        for run in self.missing() if self.known else ():
            data, validation = self._texts(run.config)
            same = (self.known.get((run.hash(), data, named)) for named in (validation, None))
            result = next(filter(None, same), None)
            if result:
                found[run.name] = result._replace(name=run.name, row=run.row)
        return found

    def take_known(self) -> int:
        """Takes over the results that are known from elsewhere; how many."""
        found = self.elsewhere()
        for result in found.values():
            self.keep(result)
        return len(found)

    def _check_texts(self) -> None:
        done = self.done()
        for run in self.runs:
            if run.name in done:
                found, now = done[run.name], self._texts(run.config)
                if (found.data, found.validation or now[1]) != now:
                    raise DataError(
                        f"{self.folder / RESULTS}: {run.name} was trained or evaluated on other "
                        f"data than is there now; name another --out"
                    )
        if any(result.validation is None for result in [*done.values(), *self.known.values()]):
            log.info("lines of runs.csv without a hash of the validation data: taken for the same")

    def _texts(self, config: RunConfig) -> tuple[str, str]:
        """Hashes of the data that a run would train and be evaluated on."""
        key = json.dumps([to_dict(config.data), config.seq_len, config.seed], sort_keys=True)
        if key not in self.texts:
            splits = (
                config.data.open(split, config.seq_len, config.seed)
                for split in ("train", "validation")
            )
            self.texts[key] = tuple(source.fingerprint[:12] for source in splits)
        return self.texts[key]

    def train(self, run: Planned, watch: Callable[[], None]) -> int | None:
        """Trains one run in a process of its own, or goes on with it; its exit code, that of a stop
        where a signal came in its last moments, None where another process is training it.

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
            commit = results.commit()
            line = [sys.executable, "-m", "experiments.train", *run.arguments]
            code = self._train([*line, f"--workdir={folder}"], folder / LOG, watch)
        result = summary(run, folder, commit) if code == codes.DONE else None
        if result:
            self.keep(result)
        elif code == codes.DONE:
            code = codes.STORAGE  # it says that it is done, and its record is not there
        if code not in (codes.DONE, codes.PREEMPTED):
            self.failed[run.name] = code
        return codes.PREEMPTED if self.asked_to_stop else code

    def code(self) -> int:
        """The sweep's exit code: that of the first run that failed, and where a signal has ended it
        that of a process which is gone."""
        first = next(iter(self.failed.values()), codes.DONE)
        return first if first >= 0 else codes.HANG

    def _train(self, line: list[str], path: Path, watch: Callable[[], None]) -> int:
        with open(path, "ab", opener=not_followed) as log:
            # where this process is, so that paths mean the same
            known = str(config_files.REPOSITORY), os.environ.get("PYTHONPATH")
            child = subprocess.Popen(
                line,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, known))},
                start_new_session=True,
            )
        with self._passed_on(child):
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return child.wait(timeout=1)
                watch()

    @contextlib.contextmanager
    def _passed_on(self, child: subprocess.Popen) -> Iterator[None]:
        """Signals that ask this process to stop go to the child, which saves and leaves."""

        def ask(number: int, _: Any) -> None:
            self.asked_to_stop = True
            child.send_signal(number)

        before = {number: signal.signal(number, ask) for number in asking()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

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
    with open(path, "a", opener=not_followed) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
