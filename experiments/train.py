"""Trains a model: python -m experiments.train --config=configs/kha_tiny.py --workdir=runs/kha_tiny

The same command resumes a run that was stopped. Exit codes: 0 done, 2 flags or config, 65 data, 70
another process did not come, is gone or cannot go on, 74 checkpoint storage, 75 stopped by SIGTERM
or Ctrl-C after a save (run it again), 76 too many non-finite steps.
"""

import fcntl
import hashlib
import importlib.util
import json
import logging
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from experiments import command_line
from experiments.command_line import UsageError
from experiments.progress import Progress
from kha_jax import accounting, data, processes, sharding
from kha_jax.checkpoint import Checkpoints
from kha_jax.config import to_dict, under
from kha_jax.data.loader import to_device
from kha_jax.data.tokens import cache_folder
from kha_jax.metrics import Meter, MetricsFile, TensorBoard, bits_per_byte
from kha_jax.optimizer import TRACE
from kha_jax.training import RunConfig, Trainer, make_trainer

CONFIG = command_line.define_config()
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
    "host:port of process 0, for several processes outside SLURM and TPU pods.",
)
PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "Processes of the run; with --coordinator_address.", lower_bound=1
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

log = logging.getLogger("kha_jax")
TRACE_EVERY = 10  # steps between the lines that hold the trace of the knocking matrices
# Fields that may change on resume: they decide what is recorded, not what is learnt.
FREE = (
    "evaluation.",
    "checkpoint.",
    "profile.",
    "mesh.",
    "max_nonfinite_steps",
    "data.cache_dir",
    "model.attention.kernel",
)


def join_processes() -> None:
    """See processes.join, for the flags.

    Raises:
        UsageError: the flags are incomplete or contradict each other.
        WaitError: some process did not come.
    """
    given = {
        "coordinator_address": COORDINATOR.value or None,
        "num_processes": PROCESSES.value,
        "process_id": PROCESS.value,
    }
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
    processes.join(**given, seconds=WAIT.value, give_up=command_line.give_up)


class Stop:
    """SIGTERM and Ctrl-C: the first asks the loop to save and leave, the second leaves at once."""

    def __init__(self):
        self.asked = False
        if jax.process_count() == 1:  # several processes agree on a step through JAX's own handler
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        if self.asked:
            os._exit(command_line.PREEMPTED)
        self.asked = True
        log.info(
            "%s: saving after this step; once more leaves at once", signal.Signals(number).name
        )

    def now(self, step: int) -> bool:
        return (
            self.asked
            if jax.process_count() == 1
            else multihost_utils.reached_preemption_sync_point(step)
        )


def open_workdir(config: RunConfig) -> tuple[Path, Any]:
    """The run folder, created, locked for this process, and holding the same config as before.

    Raises:
        UsageError: the folder cannot be written, is in use, or holds another run.
    """
    name = (
        Path(flags.FLAGS["config"].config_filename or "run").stem
        if "config" in flags.FLAGS
        else "run"
    )
    workdir = Path(WORKDIR.value or command_line.REPOSITORY / "runs" / name)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = open(workdir / "lock", "a+")
    except OSError as error:
        raise UsageError(
            f"--workdir={workdir} cannot be written: {error.strerror}; name another folder"
        ) from None
    if jax.process_index() != 0:
        return workdir, lock
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        raise UsageError(
            f"--workdir={workdir} is in use by process {lock.read().strip()}; name another folder"
        ) from None
    lock.truncate(0)
    lock.write(f"{os.getpid()} on {os.uname().nodename}")
    lock.flush()
    os.fsync(lock.fileno())
    _keep_config(workdir / "config.json", config)
    return workdir, lock


def _keep_config(path: Path, config: RunConfig) -> None:
    new = to_dict(config)
    if path.exists() and any((path.parent / "checkpoints").glob("*")):
        old = to_dict(command_line.read_config(path, RunConfig))
        for field, (before, after) in command_line.differences(old, new).items():
            if field in ALLOW_CHANGES.value:
                log.info("resuming with %s changed: %s -> %s", field, before, after)
            elif not field.startswith(FREE):
                message = f"this run began with {before!r}, found {after!r}"
                raise UsageError(
                    f"config.{field}: {message}; use another --workdir or --allow_changes={field}"
                )
    path.write_text(json.dumps(new, indent=1) + "\n")


def evaluate(trainer: Trainer, state, source, config: RunConfig, rows) -> dict[str, float]:
    """Loss, accuracy and, for text, bits per byte over the first validation batches, of which this
    process loads these rows."""
    placement = trainer.abstract_batch["tokens"].sharding
    wanted = min(config.evaluation.batches, max(1, len(source) // config.batch_size))
    reader = data.batches(
        source, batch_size=config.batch_size, rows=rows, seed=0, start=0, stop=wanted, shuffle=False
    )
    sums = [
        trainer.evaluation_step(state, to_device(batch, placement, config.batch_size))
        for batch in reader
    ]
    total = jax.tree.map(
        lambda *parts: float(np.sum([np.asarray(part, np.float64) for part in parts])), *sums
    )
    tokens = max(total.tokens, 1.0)
    values = {"val_loss": total.loss / tokens, "val_accuracy": total.correct / tokens}
    if source.bytes_per_token:
        values["val_bits_per_byte"] = bits_per_byte(values["val_loss"], source.bytes_per_token)
    return values


class Reporter:
    """Where metrics go: the terminal, metrics.jsonl and TensorBoard, on process 0 alone. A step is
    reported while the next one runs.

    nonfinite: consecutive steps that were not applied.
    """

    def __init__(self, config: RunConfig, mesh: jax.sharding.Mesh, workdir: Path, first_step: int):
        self.config, self.pending, self.nonfinite = config, None, 0
        cost = accounting.account(config.model, config.seq_len, tokens=config.tokens_per_step)
        peak = accounting.peak_flops(jax.devices()[0].device_kind) * mesh.devices.size
        self.meter = Meter(cost.training_flops, peak)
        leader = jax.process_index() == 0
        self.sinks: list[Any] = (
            [MetricsFile(workdir / "metrics.jsonl", first_step)] if leader else []
        )
        if leader and TENSORBOARD.value:
            self.sinks.append(TensorBoard(workdir / "tensorboard"))
        self.progress = Progress(first_step, config.steps, enabled=leader)
        self.progress.header(workdir, config, cost, mesh, first_step)

    def now(self, step: int, values: dict[str, Any]) -> None:
        """Reports values that are there."""
        for sink in self.sinks:
            sink.write(step, values)
        self.progress.update(step, values)

    def later(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Reports the step before this one, and this one next time."""
        self.flush()
        self.pending = (step, metrics)

    def flush(self) -> None:
        """Reports the step that is waiting for it."""
        if self.pending is None:
            return
        (step, metrics), self.pending = self.pending, None
        if step % TRACE_EVERY:
            metrics = {name: z for name, z in metrics.items() if not name.startswith(TRACE)}
        values = {name: value.tolist() for name, value in jax.device_get(metrics).items()}
        self.nonfinite = self.nonfinite + 1 if values["nonfinite"] else 0
        if self.nonfinite:
            found, rows = (
                f"loss {values['loss']}, gradient norm {values['grad_norm']}",
                self.config.batch_size,
            )
            log.warning(
                "step %d not applied: %s; examples %d to %d",
                step,
                found,
                (step - 1) * rows,
                step * rows - 1,
            )
        self.now(step, {**values, **self.meter.read(self.config.tokens_per_step)})

    def evaluated(self, step: int) -> bool:
        """Whether a resumed run's last line holds an evaluation, as far as one process can tell."""
        return jax.process_count() > 1 or not step or "val_loss" in self.sinks[0].last

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()
        self.progress.close()


class Profile:
    """The profiler trace that the config asks for."""

    def __init__(self, config: RunConfig, folder: Path):
        self.wanted, self.folder, self.running = config.profile, folder, False

    def before(self, step: int) -> None:
        if self.wanted.stop and step == self.wanted.start + 1:
            jax.profiler.start_trace(str(self.folder))
            self.running = True

    def after(self, step: int, state: Any) -> None:
        if self.running and step == self.wanted.stop:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self.running = False
            log.info("profile of steps %d to %d: %s", self.wanted.start, step - 1, self.folder)


def main() -> int:
    """See the module's docstring."""
    started = time.perf_counter()
    config: RunConfig = command_line.parse_config(RunConfig, CONFIG)
    if PRINT_CONFIG.value:
        print(json.dumps(to_dict(config), indent=1))
        return command_line.DONE
    if TENSORBOARD.value and importlib.util.find_spec("tensorboardX") is None:
        raise UsageError("--tensorboard: needs the extra: pip install -e '.[tensorboard]'")

    # ---------------------------------------------------------------- processes, devices, folder,
    # data
    join_processes()
    jax.config.update("jax_compilation_cache_dir", str(cache_folder("compiled")))
    with processes.together("set-up", WAIT.value):
        with under("config.mesh"):
            mesh = sharding.make_mesh(config.mesh)
        with under("config"):
            config.check_on(mesh.shape, jax.default_backend())
            trainer = make_trainer(config, mesh)
        workdir, lock = open_workdir(config)
        train_source, validation_source = (
            config.data.open(split, config.seq_len, config.seed)
            for split in ("train", "validation")
        )
    processes.same("config", json.dumps(to_dict(config)), "start all with the same command")
    processes.same(
        "--workdir", (workdir / "lock").read_text(), "name a folder that all of them see"
    )
    processes.same("config.data", train_source.fingerprint, "give all of them the same")
    stop = Stop()
    if config.data.vocabulary_size() < config.model.vocabulary_size:
        found = f"{config.data.vocabulary_size()} < {config.model.vocabulary_size}"
        log.warning("config.model.vocabulary_size: the data uses fewer ids (%s)", found)
    # ---------------------------------------------------------------- state, new or restored
    config_hash = hashlib.sha256(json.dumps(to_dict(config)).encode()).hexdigest()
    about = {"config": config_hash, "data": train_source.fingerprint, "jax": jax.__version__}
    checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint.keep, about)
    first_step = checkpoints.newest_good() or 0
    if first_step >= config.steps:
        print(
            f"{workdir} already has its {config.steps} steps; train again with another "
            "--workdir, or remove the folder"
        )
        return command_line.DONE
    if first_step:
        state = checkpoints.restore(first_step, trainer.abstract)
    else:
        state = trainer.init(jax.random.key(config.seed))
    reporter, profile = (
        Reporter(config, mesh, workdir, first_step),
        Profile(config, workdir / "profile"),
    )

    # ---------------------------------------------------------------- the loop
    rows, placement = sharding.local_rows(mesh, config.batch_size), sharding.batch_sharding(mesh)
    where = {
        "batch_size": config.batch_size,
        "rows": rows,
        "seed": config.seed,
        "start": first_step,
        "stop": config.steps,
    }
    reader = data.batches(train_source, **where)

    def evaluation_due(step: int) -> bool:
        return config.evaluation.every > 0 and (
            step == config.steps or step % config.evaluation.every == 0
        )

    def evaluate_and_report(step: int) -> None:
        reporter.now(step, evaluate(trainer, state, validation_source, config, rows))

    if evaluation_due(first_step) and not reporter.evaluated(first_step):
        evaluate_and_report(first_step)  # the run was stopped before it could
    code = command_line.DONE
    for step in range(first_step + 1, config.steps + 1):
        profile.before(step)
        waiting = time.perf_counter()
        batch = to_device(next(reader), placement, config.batch_size)
        reporter.meter.wait(time.perf_counter() - waiting)
        state, metrics = trainer.train_step(state, batch)
        reporter.later(step, metrics)
        profile.after(step, state)
        if step == first_step + 1:
            jax.block_until_ready(metrics)
            log.info("first step after %.1f s (imports not counted)", time.perf_counter() - started)

        last, stopping = step == config.steps, stop.now(step)
        evaluate_now = evaluation_due(step) and (last or not stopping)
        save_now = (
            last or stopping or (config.checkpoint.every and step % config.checkpoint.every == 0)
        )
        if evaluate_now or save_now:
            reporter.flush()
            paused = time.perf_counter()
            if evaluate_now:
                evaluate_and_report(step)
            # the state is finite whatever the step was: a non-finite update is never applied
            if save_now:
                checkpoints.save(step, state)
            reporter.meter.pause(time.perf_counter() - paused)
        if reporter.nonfinite >= config.max_nonfinite_steps:
            log.error(
                "stopped after %d consecutive non-finite steps; the newest checkpoint is intact",
                reporter.nonfinite,
            )
            code = command_line.NON_FINITE
            break
        if stopping and not last:
            log.info("stopped at step %d; the same command goes on from here", step)
            code = command_line.PREEMPTED
            break

    # ---------------------------------------------------------------- the end
    checkpoints.close()
    reporter.close()
    if code == command_line.DONE:
        reporter.progress.farewell(workdir, CONFIG)
    lock.close()
    return code


if __name__ == "__main__":
    command_line.run(main)
