"""The steps of a run: what each does, and what is due after it."""

import contextlib
import logging
import math
import time
from pathlib import Path
from typing import Iterator, NamedTuple, Sequence

import jax
import numpy as np

from experiments.cli import codes
from experiments.train_loop.reporter import Profile, Reporter
from experiments.train_loop.stop import SaveVote, Stop
from kha_jax import data, sharding
from kha_jax.data.loader import to_device
from kha_jax.metrics import bits_per_byte
from kha_jax.runs import faults, processes
from kha_jax.runs.checkpoint import Checkpoints
from kha_jax.runs.goodput import Goodput
from kha_jax.runs.pace import Pace
from kha_jax.runs.watchdog import Watchdog
from kha_jax.training.run_config import RunConfig
from kha_jax.training.step import Trainer, TrainState, all_finite

log = logging.getLogger("kha_jax")


def windows_to_evaluate(config: RunConfig, source: data.Source) -> Sequence[int]:
    """Which windows an evaluation reads, the same each time."""
    count = min(config.evaluation.batches * config.batch_size, len(source))
    return config.data.evaluated(len(source), count)


def evaluate(step_function, state, source, config: RunConfig, mesh) -> dict[str, float]:
    """Loss, accuracy and, for text, bits per byte over `windows_to_evaluate`, as many at once as
    in a training step's micro-batch."""
    size, placement = config.batch_size // config.accumulation, sharding.batch_sharding(mesh)
    windows = windows_to_evaluate(config, source)
    rows = sharding.local_rows(mesh, size)
    reader = data.each_once(source, batch_size=size, rows=rows, windows=windows)
    sums = [step_function(state, to_device(batch, placement, size)) for batch in reader]
    total = jax.tree.map(
        lambda *parts: float(np.sum([np.asarray(part, np.float64) for part in parts])), *sums
    )
    tokens = total.tokens or math.nan  # the mean of nothing is none
    values = {"val_loss": total.loss / tokens, "val_accuracy": total.correct / tokens}
    if source.bytes_per_token:
        values["val_bits_per_byte"] = bits_per_byte(values["val_loss"], source.bytes_per_token)
    return values


class Run(NamedTuple):
    """What the loop works with. started: when the command was, by time.perf_counter. tensorboard:
    whether its scalars are written. patience: seconds that processes wait for one another."""

    config: RunConfig
    mesh: jax.sharding.Mesh
    trainer: Trainer
    train_source: data.Source
    validation_source: data.Source
    draws: data.Draws
    checkpoints: Checkpoints
    stop: Stop
    watchdog: Watchdog
    clock: Goodput
    pace: Pace
    started: float
    tensorboard: bool
    patience: int

    @property
    def workdir(self) -> Path:
        """The run folder."""
        return self.checkpoints.folder.parent

    def windows(self, step: int) -> list[int]:
        """The numbers of the windows that a step trains on."""
        order = data.window_order(len(self.train_source), self.config.seed)
        return [order[draw] for draw in self.draws(step - 1)]

    def reader(self, first_step: int) -> Iterator[dict[str, np.ndarray]]:
        """This process's rows of the batches after that step."""
        return data.batches(
            self.train_source,
            draws=self.draws,
            rows=sharding.local_rows(self.mesh, self.config.batch_size),
            seed=self.config.seed,
            start=first_step,
            stop=self.config.steps,
        )

    def evaluation_due(self, step: int) -> bool:
        """Whether the config asks for one after this step."""
        every, last = self.config.evaluation.every, self.config.steps
        return every > 0 and (step == last or step % every == 0)

    def reporter(self, first_step: int) -> Reporter:
        """Of the steps after that one."""
        imported = 0 in self.checkpoints.steps()
        scratch = "from the weights of step 0" if imported else "from scratch"
        return Reporter(
            self.config,
            self.mesh,
            self.workdir,
            first_step,
            f"resuming after step {first_step}" if first_step else scratch,
            self.train_source,
            self.draws,
            self.windows,
            self.tensorboard,
            self.clock,
            self.pace,
        )

    def evaluate(self, step: int, state: TrainState, reporter: Reporter) -> None:
        """An evaluation, which is then told of."""
        self.watchdog.allow(f"the evaluation after step {step}")
        faults.at("evaluation", step)
        step_function, source = self.trainer.evaluation_step, self.validation_source
        with self.clock.at("evaluation"), self.pace.waiting():
            values = evaluate(step_function, state, source, self.config, self.mesh)
            reporter.now(step, values)

    def save(self, step: int, state: TrainState) -> bool:
        """Starts a save; False, with the reason logged, of a state that is not finite."""
        self.watchdog.allow(f"the checkpoint of step {step}")
        if not all_finite(state):
            log.error(
                "stopped at step %d: parameters or moments are not finite, and are not saved; the "
                "newest checkpoint, if there is one, is intact",
                step,
            )
            return False
        with self.clock.at("save"), self.pace.waiting():
            self.checkpoints.save(step, state)
        return True


def train(run: Run, state: TrainState) -> int:
    """The steps that are left; the contract's exit code."""
    first_step = int(state.step)
    with contextlib.closing(run.reporter(first_step)) as reporter:
        evaluated = processes.from_leader(
            "record of the last evaluation", lambda: reporter.evaluated(first_step), run.patience
        )
        if run.evaluation_due(first_step) and not evaluated:
            run.evaluate(first_step, state, reporter)  # the run was stopped before it could
        run.watchdog.allow(f"step {first_step + 1} and its compilation")
        return _steps(run, state, reporter)


def _steps(run: Run, state: TrainState, reporter: Reporter) -> int:
    config, first_step, reader = run.config, int(state.step), run.reader(int(state.step))
    vote = SaveVote(config.checkpoint.every_minutes, run.mesh)
    profile = Profile(config, run.workdir / "profile", first_step)
    for step in range(first_step + 1, config.steps + 1):
        profile.before(step)
        run.pace.step(step)
        batch = _batch(run, reader, step, reporter)
        run.clock.enter("steps" if step > first_step + 1 else "compile")
        with run.pace.waiting():
            state, metrics = run.trainer.train_step(state, batch)
        reporter.later(step, {**metrics, **vote.cast()})
        profile.after(step, state)
        faults.at("step", step)
        if step == first_step + 1:
            jax.block_until_ready(metrics)
            took = time.perf_counter() - run.started
            log.info("first step after %.1f s (imports not counted)", took)
            run.clock.enter("steps")
        code = _due(run, step, state, reporter, vote)
        if code is not None:
            return code
        run.watchdog.step(step + 1)
    return codes.DONE


def _batch(run: Run, reader: Iterator[data.Example], step: int, reporter: Reporter) -> data.Example:
    """The batch of a step on the devices, and how long it was waited for."""
    run.clock.enter("data_wait")
    waiting = time.perf_counter()
    rows_here = next(reader)
    faults.at("batch", step, rows_here)
    batch = to_device(rows_here, sharding.batch_sharding(run.mesh), run.config.batch_size)
    reporter.meter.wait(time.perf_counter() - waiting)
    return batch


def _due(run: Run, step: int, state: TrainState, reporter: Reporter, vote: SaveVote) -> int | None:
    """Evaluates and saves where it is time; the exit code where the run ends before its last
    step."""
    config = run.config
    last, stopping = step == config.steps, run.stop.now(step)
    save_now = last or stopping or reporter.save_due or config.checkpoint.due(step)
    evaluate_now = run.evaluation_due(step) and (last or not stopping)
    if evaluate_now or save_now:
        reporter.flush(timed=True)
    if reporter.nonfinite >= config.max_nonfinite_steps:
        log.error(
            "stopped after %d consecutive non-finite steps; the newest checkpoint is intact, and "
            "the same command goes on from it",
            reporter.nonfinite,
        )
        return codes.NON_FINITE
    paused = time.perf_counter()
    if evaluate_now:
        run.evaluate(step, state, reporter)
    if save_now and not run.save(step, state):
        return codes.NON_FINITE
    if save_now:
        vote.saved()
        reporter.save_due = False
    reporter.meter.pause(time.perf_counter() - paused)
    if stopping and not last:
        log.info("stopped at step %d; the same command goes on from here", step)
        return codes.PREEMPTED
    return None
