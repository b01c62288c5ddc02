"""Trains a model.

    python -m experiments.train --config=configs/kha_tiny.py --workdir=runs/kha_tiny
    python -m experiments.train --config.model.attention.key.kind=linear --workdir=runs/key_linear
    python -m experiments.train --config=configs/kha_moe_tiny.py --config.help

The same command resumes a run that was stopped. Without --config a run folder that is there has its
own config. Exit codes: 0 done, 2 flags or config, 65 data, 70
a step hangs, or another process did not come, is gone or cannot go on, 74 checkpoint storage, 75
stopped by SIGTERM or Ctrl-C after a save (run it again), 76 too many non-finite steps, or a
state that is not finite.
"""

import contextlib
import importlib.util
import json
import logging
import math
import re
import sys
import time
from pathlib import Path
from typing import Iterator, NamedTuple, Sequence

import jax
import numpy as np
from absl import flags

from experiments.cli import codes, command_line, config_files, terminal
from experiments.cli.codes import UsageError
from experiments.cli.terminal import say
from experiments.run_folders import stored
from experiments.run_folders.folder import RunFolder, use_compilation_cache
from experiments.train_loop import data_check, replay
from experiments.train_loop.progress import farewell
from experiments.train_loop.reporter import Profile, Reporter
from experiments.train_loop.stop import SaveVote, Stop
from kha_jax import accounting, data, sharding
from kha_jax.config import to_dict, under
from kha_jax.data.loader import to_device
from kha_jax.errors import DataError
from kha_jax.hardware import chips, tpu
from kha_jax.mesh import make_mesh
from kha_jax.metrics import bits_per_byte
from kha_jax.runs import faults, processes
from kha_jax.runs.checkpoint import Checkpoints
from kha_jax.runs.cluster import Place
from kha_jax.runs.goodput import Goodput, process_began
from kha_jax.runs.pace import Pace
from kha_jax.runs.watchdog import Watchdog
from kha_jax.training.optimizer import jump
from kha_jax.training.run_config import RunConfig
from kha_jax.training.step import Trainer, TrainState, all_finite, begun, make_trainer

command_line.define_config(of_run=True)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Run folder; runs/NAME of the config file by default."
)
PRINT_CONFIG = flags.DEFINE_bool("print_config", False, "Print the resolved config and stop.")
TENSORBOARD = flags.DEFINE_bool(
    "tensorboard", False, "Also write TensorBoard scalars (extra: tensorboard)."
)
COORDINATOR = flags.DEFINE_string(
    "coordinator_address",
    None,
    "host:port of process 0, for several processes that no cluster has started.",
)
PROCESSES = flags.DEFINE_integer(
    "num_processes",
    None,
    "Processes of the run, with --coordinator_address; 1 without: this one alone.",
    lower_bound=1,
)
PROCESS = flags.DEFINE_integer(
    "process_id", None, "This process, from 0; with --coordinator_address.", lower_bound=0
)
WAIT = flags.DEFINE_integer(
    "wait_seconds",
    300,
    "How long processes wait for one another before they give up.",
    lower_bound=1,
)
ALLOW_CHANGES = flags.DEFINE_list(
    "allow_changes", [], "Config fields that may differ from the run being resumed."
)
REPLAY = flags.DEFINE_integer(
    "replay_step",
    None,
    "Print the batch of that step by document, with the losses of the newest checkpoint, and stop.",
    lower_bound=1,
)

log = logging.getLogger("kha_jax")


def join_processes(hang_timeout: float) -> None:
    """See processes.join, for the flags.

    Raises:
        UsageError: the flags are incomplete or contradict each other.
        ConfigError: the processes do not run the same program.
        WaitError: some process did not come.
    """
    given = {
        "coordinator_address": COORDINATOR.value or None,
        "num_processes": PROCESSES.value,
        "process_id": PROCESS.value,
    }
    if given == {**dict.fromkeys(given), "num_processes": 1}:  # whatever a cluster says
        return
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < 3:
        raise UsageError(
            f"--{missing[0]}: is needed together with "
            f"{' and '.join('--' + n for n in given if n not in missing)}"
        )
    if not missing:
        if PROCESS.value >= PROCESSES.value:
            raise UsageError(
                f"--process_id={PROCESS.value}: must be below --num_processes={PROCESSES.value}; "
                "they count from 0"
            )
        if not re.fullmatch(r".+:\d+", COORDINATOR.value):
            raise UsageError(
                f"--coordinator_address={COORDINATOR.value}: must be HOST:PORT, such as "
                "10.0.0.1:1234"
            )
    here = None if missing else Place("by the flags", *given.values())
    number = processes.join(here, WAIT.value, hang_timeout, command_line.give_up)
    if number is not None:
        terminal.Log.prefix = f"[{number}] "
    processes.same_program(processes.program(Path(__file__).parent), WAIT.value)


def workdir() -> Path:
    """The run folder that the flags name."""
    usual = config_files.REPOSITORY / "runs" / Path(flags.FLAGS["config"].config_filename).stem
    return stored.trained_folder("workdir", str(usual) if WORKDIR.value is None else WORKDIR.value)


def build(config: RunConfig) -> tuple[jax.sharding.Mesh, Trainer]:
    """The devices and what is computed on them; nothing is compiled or allocated yet.

    Raises:
        ConfigError: the config does not fit them.
    """
    with under("config.mesh"):
        mesh = make_mesh(config.mesh)
    with under("config"):
        config.check_on(mesh.shape, jax.default_backend())
        memory = mesh.devices.size * chips.device_bytes(jax.local_devices()[0])
        at_once = config.tokens_per_step // config.accumulation
        accounting.check_memory(config.model, at_once, memory, config.optimizer.trainable)
        return mesh, make_trainer(config, mesh)


def open_sources(config: RunConfig) -> tuple[data.Source, data.Source]:
    """The train and validation split.

    Raises:
        ConfigError: the model has too few ids for them.
        DataError: one of them cannot be read, or holds too little for the run.
    """
    train, validation = (
        config.data.open(split, config.seq_len, config.seed) for split in ("train", "validation")
    )
    with under("config"):
        config.validate()  # now that the vocabulary of data in a bucket is known
    data.check_length(train, config.batch_size, "lower config.batch_size or config.seq_len")
    if config.evaluation.every:
        remedy = "lower config.seq_len or set config.evaluation.every=0"
        data.check_length(validation, 1, remedy)
        windows = windows_to_evaluate(config, validation)
        if not any(validation[index]["weights"].any() for index in windows):
            raise DataError(
                f"{validation}: no target counts in the {len(windows)} windows of an evaluation; "
                "raise config.evaluation.batches or set config.evaluation.every=0"
            )
    return train, validation


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


def main() -> int:
    """See the module's docstring."""
    started, clock = time.perf_counter(), Goodput(process_began())
    config: RunConfig = command_line.parse_config(RunConfig)
    if PRINT_CONFIG.value:
        print(json.dumps(to_dict(config), indent=1))
        return codes.DONE
    if TENSORBOARD.value and importlib.util.find_spec("tensorboardX") is None:
        raise UsageError("--tensorboard: needs the extra: pip install -e '.[tensorboard]'")

    path = workdir()
    if REPLAY.value:
        replay.show(path, REPLAY.value)
        return codes.DONE
    terminal.spare()

    # ---------------------------------------------------------------- processes, devices, data
    data_check.check_vocabulary(config, sys.argv[1:])
    join_processes(config.hang_timeout)
    use_compilation_cache()
    with processes.together("set-up", WAIT.value):
        mesh, trainer = build(config)
        if jax.default_backend() == "tpu":
            kernels = trainer.config.kernels("tpu").values()
            log.info(tpu.told(kernels, trainer.compiler_options))
        folder = RunFolder(path, config, ALLOW_CHANGES.value)
        train_source, validation_source = open_sources(config)
        folder.identify(train_source, validation_source)
        checkpoints = folder.checkpoints(trainer.abstract)
    processes.same("config", json.dumps(to_dict(config)), "start all with the same command")
    processes.same("--workdir", folder.mark(), "name a folder that all of them see")
    texts = f"{train_source.fingerprint} {validation_source.fingerprint}"
    processes.same("config.data", texts, "give all of them the same")
    stop = Stop(config.checkpoint.grace)
    pace = Pace()

    def hung(message: str) -> None:
        command_line.give_up(message + pace.who_hangs(), stacks=True)

    watchdog = Watchdog(config.hang_timeout, hung)
    ids = config.data.vocabulary_size()
    if ids is not None and ids < config.model.vocabulary_size:
        found = f"{ids} < {config.model.vocabulary_size}"
        log.warning("config.model.vocabulary_size: the data uses fewer ids (%s)", found)
    data_check.warn_of_epochs(config, len(train_source))

    # ---------------------------------------------------------------- the state, new or restored
    one_fate = processes.one_fate(codes.code_of, command_line.give_up)
    with contextlib.closing(folder), clock, pace, watchdog, checkpoints, one_fate:
        newest = checkpoints.newest_good()
        first_step = newest or 0
        if first_step > config.steps:
            raise UsageError(
                f"config.steps={config.steps}: {folder.path} has {first_step} already; train "
                "again with another --workdir, or go back with experiments.checkpoints --prune"
            )
        if first_step == config.steps:
            say(
                f"{folder.path} already has its {config.steps} steps; go on with a larger "
                "--config.steps and --allow_changes=steps, or train again with another --workdir"
            )
            return codes.DONE
        state = begun(trainer, checkpoints, newest)
        draws = folder.begin_at(first_step)
        if jax.process_index() == 0:
            clock.go_on(folder.path / "metrics.jsonl", first_step)
        with processes.together("record of the run", WAIT.value):
            if first_step:
                folder.check_next_batch(checkpoints, first_step)
            folder.keep(first_step)
        processes.same("lineage.json", str(draws.parts), "give all of them the same --workdir")
        if rates := jump(folder.before, config, applied(state)):
            log.warning("the next learning rate was %.3g, and is %.3g after the changes", *rates)
        try:
            sources = train_source, validation_source
            timing = watchdog, clock, pace, started
            run = Run(config, mesh, trainer, *sources, draws, checkpoints, stop, *timing)
            code = train(run, state)
        finally:
            watchdog.allow("the last checkpoint")
            clock.enter("save")
    if code == codes.PREEMPTED:
        log.info("%s; config.checkpoint.grace=%g", stop.told(), config.checkpoint.grace)
    if code == codes.DONE and jax.process_index() == 0:
        say(farewell(folder.path, text=config.data.tokenizer() is not None))
    return code


def applied(state: TrainState) -> int:
    """How many updates its parameters have had; a step that is not finite has none."""
    return int(state.optimizer[-1].count)


class Run(NamedTuple):
    """What the loop works with; started: when the command was, by time.perf_counter."""

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
    config, trainer, watchdog = run.config, run.trainer, run.watchdog
    workdir, first_step = run.checkpoints.folder.parent, int(state.step)
    reader, placement = run.reader(first_step), sharding.batch_sharding(run.mesh)

    def evaluate_and_report(step: int) -> None:
        watchdog.allow(f"the evaluation after step {step}")
        faults.at("evaluation", step)
        step_function, source = trainer.evaluation_step, run.validation_source
        with run.clock.at("evaluation"), run.pace.waiting():
            reporter.now(step, evaluate(step_function, state, source, config, run.mesh))

    reporter = Reporter(
        config,
        run.mesh,
        workdir,
        first_step,
        run.train_source,
        run.draws,
        run.windows,
        TENSORBOARD.value,
        run.clock,
        run.pace,
    )
    vote = SaveVote(config.checkpoint.every_minutes, run.mesh)
    profile = Profile(config, workdir / "profile")
    with contextlib.closing(reporter):
        evaluated = processes.from_leader(
            "record of the last evaluation", lambda: reporter.evaluated(first_step), WAIT.value
        )
        if run.evaluation_due(first_step) and not evaluated:
            evaluate_and_report(first_step)  # the run was stopped before it could
        watchdog.allow(f"step {first_step + 1} and its compilation")
        for step in range(first_step + 1, config.steps + 1):
            profile.before(step)
            run.pace.step(step)
            run.clock.enter("data_wait")
            waiting = time.perf_counter()
            rows_here = next(reader)
            faults.at("batch", step, rows_here)
            batch = to_device(rows_here, placement, config.batch_size)
            reporter.meter.wait(time.perf_counter() - waiting)
            run.clock.enter("steps" if step > first_step + 1 else "compile")
            with run.pace.waiting():
                state, metrics = trainer.train_step(state, batch)
            reporter.later(step, {**metrics, **vote.cast()})
            profile.after(step, state)
            faults.at("step", step)
            if step == first_step + 1:
                jax.block_until_ready(metrics)
                took = time.perf_counter() - run.started
                log.info("first step after %.1f s (imports not counted)", took)
                run.clock.enter("steps")

            last, stopping = step == config.steps, run.stop.now(step)
            save_now = last or stopping or reporter.save_due or config.checkpoint.due(step)
            evaluate_now = run.evaluation_due(step) and (last or not stopping)
            if evaluate_now or save_now:
                reporter.flush(timed=True)
            if reporter.nonfinite >= config.max_nonfinite_steps:
                log.error(
                    "stopped after %d consecutive non-finite steps; the newest checkpoint is "
                    "intact, and the same command goes on from it",
                    reporter.nonfinite,
                )
                return codes.NON_FINITE
            paused = time.perf_counter()
            if evaluate_now:
                evaluate_and_report(step)
            if save_now and not run.save(step, state):
                return codes.NON_FINITE
            if save_now:
                vote.saved()
                reporter.save_due = False
            reporter.meter.pause(time.perf_counter() - paused)
            if stopping and not last:
                log.info("stopped at step %d; the same command goes on from here", step)
                return codes.PREEMPTED
            watchdog.step(step + 1)
    return codes.DONE


if __name__ == "__main__":
    command_line.run(main)
