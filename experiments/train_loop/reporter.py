"""What a run tells while it trains: metrics to the terminal, metrics.jsonl and TensorBoard, spikes
and steps that were not applied to the log, a profiler trace. None of them can stop it."""

import functools
import logging
import sys
import time
from pathlib import Path
from typing import Any, Callable

import jax

from experiments.train_loop.progress import Progress
from experiments.train_loop.stop import SAVE_DUE
from kha_jax.attention.attention import LARGEST
from kha_jax.data import Draws, Source
from kha_jax.hardware import chips
from kha_jax.metrics import Meter, MetricsFile, Spared, TensorBoard
from kha_jax.runs.goodput import Goodput
from kha_jax.runs.pace import Pace
from kha_jax.spikes import SPIKING, Spikes, spike_rule
from kha_jax.training.run_config import RunConfig
from kha_jax.training.trace import TRACE

WINDOWS_NAMED = 8  # of a batch, in the log
TRACE_EVERY = 10  # steps between the lines that hold what SELDOM begins
SELDOM = (TRACE, LARGEST)  # the trace of the knocking matrices, the largest logit of each layer
log = logging.getLogger("kha_jax")


class Reporter:
    """Where metrics go: the terminal, metrics.jsonl and TensorBoard, on process 0 alone. A step is
    reported while the next one runs.

    origin: what the run begins from. source: of the training data. draws: which of them, as they
    are drawn, a batch holds. windows: the numbers of the windows that a step trains on. clock,
    pace: of the run. nonfinite: consecutive steps that were not applied. save_due: what the newest
    step's vote says.
    """

    def __init__(
        self,
        config: RunConfig,
        mesh: jax.sharding.Mesh,
        workdir: Path,
        first_step: int,
        origin: str,
        source: Source,
        draws: Draws,
        windows: Callable[[int], list[int]],
        tensorboard: bool,
        clock: Goodput,
        pace: Pace,
    ):
        self.config, self.draws, self.windows = config, draws, windows
        self.clock, self.pace, self.examples = clock, pace, len(source)
        self.pending, self.nonfinite, self.save_due = None, 0, False
        self.timed = False  # a line of this start says where the time went
        cost = config.cost()
        peak = chips.peak_flops(jax.devices()[0].device_kind) * mesh.devices.size
        self.meter = Meter(cost.training_flops, peak)
        rule = spike_rule(config.steps)
        self.spikes = {name: Spikes(rule) for name in SPIKING}
        leader = jax.process_index() == 0
        self.sinks: list[Spared] = []
        if leader:
            make = functools.partial(MetricsFile, workdir / "metrics.jsonl", first_step)
            self.sinks.append(Spared("metrics.jsonl", make))
        if leader and tensorboard:
            make = functools.partial(TensorBoard, workdir / "tensorboard", first_step)
            self.sinks.append(Spared("tensorboard", make))
        if leader and first_step:  # the lines that told of lost steps are gone from here on
            told = {"time": round(time.time(), 3), **clock.values()}
            self.sinks[0].call("write", first_step, told)
        self.progress = Progress(first_step, config.steps, enabled=leader)
        self.progress.header(workdir, config, cost, mesh, source, origin)

    def now(self, step: int, values: dict[str, Any]) -> None:
        """Reports values that are there."""
        values = {**values, "time": round(time.time(), 3)}
        for sink in self.sinks:
            sink.call("write", step, values)
        self.progress.update(step, values)

    def later(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Reports the step before this one, and this one next time."""
        self.flush()
        self.pending = (step, metrics)

    def flush(self, timed: bool = False) -> None:
        """Reports the step that is waiting for it. timed: with where the time went."""
        if self.pending is None:
            return
        (step, metrics), self.pending = self.pending, None
        if step % TRACE_EVERY:
            metrics = {name: z for name, z in metrics.items() if not name.startswith(SELDOM)}
        with self.pace.waiting():
            values = {name: value.tolist() for name, value in jax.device_get(metrics).items()}
        self.save_due = values.pop(SAVE_DUE, 0) > 0
        self.clock.step = step
        self.nonfinite = self.nonfinite + 1 if values["nonfinite"] else 0
        if self.nonfinite:
            found = f"loss {values['loss']}, gradient norm {values['grad_norm']}"
            log.warning("step %d not applied: %s; %s", step, found, self._batch(step))
        for name, spikes in self.spikes.items():
            centre = spikes.centre_before(values[name])
            if centre is not None:
                found = f"{name} {values[name]:.4g} is far from its recent {centre:.4g}"
                log.warning("step %d: spike, %s; %s", step, found, self._batch(step))
                values["spike"] = 1
        if timed or not self.timed:
            values, self.timed = {**values, **self.clock.values()}, True
        epoch = self.draws(step - 1).stop / self.examples
        self.now(step, {**values, "epoch": epoch, **self.meter.read(self.config.tokens_per_step)})

    def _batch(self, step: int) -> str:
        """Which examples a step had."""
        examples = self.draws(step - 1)
        windows = self.windows(step)
        named = ", ".join(map(str, windows[:WINDOWS_NAMED]))
        more = ", ..." if len(windows) > WINDOWS_NAMED else ""
        return (
            f"examples {examples[0]} to {examples[-1]}, windows {named}{more}; "
            f"--replay_step={step} shows them"
        )

    def evaluated(self, step: int) -> bool:
        """Whether a resumed run's last line holds an evaluation; process 0 alone can tell."""
        file = self.sinks[0].inner  # None where it cannot be written
        return not step or (file is not None and "val_loss" in file.last)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()
        self.progress.close()
        if lost := getattr(sys.stdout, "lost", 0):
            log.warning("the terminal: %d lines were not shown, training went on", lost)


class Profile:
    """The profiler trace that the config asks for, of a run that goes on after first_step."""

    def __init__(self, config: RunConfig, folder: Path, first_step: int):
        self.first, self.last = config.profile.start + 1, min(config.profile.stop, config.steps)
        self.folder, self.running = folder, False
        self.profiler = Spared("the profile", lambda: jax.profiler)
        if self.last and not first_step < self.first <= self.last:
            there = f"steps {first_step + 1} to {config.steps} are left"
            log.warning("config.profile.start=%d: no trace, %s", config.profile.start, there)

    def before(self, step: int) -> None:
        if self.last and step == self.first:
            self.profiler.call("start_trace", str(self.folder))
            self.running = not self.profiler.lost

    def after(self, step: int, state: Any) -> None:
        if self.running and step == self.last:
            jax.block_until_ready(state)
            self.profiler.call("stop_trace")
            self.running = False
            if not self.profiler.lost:
                log.info("profile of steps %d to %d: %s", self.first, step, self.folder)
