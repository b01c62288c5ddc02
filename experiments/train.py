"""Trains a model: python -m experiments.train --config=configs/kha_tiny.py --workdir=runs/kha_tiny

The same command resumes a run that was stopped. Exit codes: 0 done, 2 flags or config, 65 data, 74 checkpoint storage,
75 stopped by SIGTERM or Ctrl-C after a save (run it again), 76 too many non-finite steps.
"""

import fcntl
import hashlib
import json
import logging
import os
import signal
import threading
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
from kha_jax import accounting, data, sharding
from kha_jax.checkpoint import Checkpoints
from kha_jax.config import to_dict
from kha_jax.data.loader import to_device
from kha_jax.data.tokens import cache_folder
from kha_jax.metrics import Meter, MetricsFile, TensorBoard, bits_per_byte
from kha_jax.ops.attention import unavailable
from kha_jax.training import RunConfig, make_trainer

CONFIG = command_line.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "Run folder; runs/NAME of the config file by default.")
PRINT_CONFIG = flags.DEFINE_bool("print_config", False, "Print the resolved config and stop.")
TENSORBOARD = flags.DEFINE_bool("tensorboard", False, "Also write TensorBoard scalars (extra: tensorboard).")
COORDINATOR = flags.DEFINE_string("coordinator_address", None, "host:port of process 0, for several processes outside SLURM and TPU pods.")
PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of the run; with --coordinator_address.", lower_bound=1)
PROCESS = flags.DEFINE_integer("process_id", None, "This process, from 0; with --coordinator_address.", lower_bound=0)
ALLOW_CHANGES = flags.DEFINE_list("allow_changes", [], "Config fields that may differ from the run being resumed.")

log = logging.getLogger("kha_jax")
JOIN_SECONDS = 300
# Fields that may change on resume: they decide what is recorded, not what is learnt.
FREE = ("evaluation.", "checkpoint.", "profile.", "mesh.", "max_nonfinite_steps", "data.cache_dir", "model.attention.kernel")


def join_processes() -> None:
    """Connects the processes of a run: as the flags say, or by itself under SLURM and on TPU pods; one process needs nothing.

    Raises:
        UsageError: the flags are incomplete, or some process did not come within JOIN_SECONDS.
    """
    given = {"coordinator_address": COORDINATOR.value, "num_processes": PROCESSES.value, "process_id": PROCESS.value}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < 3:
        raise UsageError(f"--{missing[0]}: is needed together with {' and '.join('--' + n for n in given if n not in missing)}")
    slurm = int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in os.environ
    pod = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    if missing and not slurm and not pod:
        return
    where = f"at {COORDINATOR.value}" if not missing else "that SLURM started" if slurm else "of this TPU slice"
    hint = f"still waiting for the other processes {where}: check that each runs this command and reaches process 0"
    timer = threading.Timer(60, log.warning, [hint])
    timer.start()
    try:
        jax.distributed.initialize(**({} if missing else given), initialization_timeout=JOIN_SECONDS)
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"the processes {where} did not come together within {JOIN_SECONDS} s: {error}") from None
    finally:
        timer.cancel()


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
        log.info("%s: saving after this step; once more leaves at once", signal.Signals(number).name)

    def now(self, step: int) -> bool:
        return self.asked if jax.process_count() == 1 else multihost_utils.reached_preemption_sync_point(step)


def open_workdir(config: RunConfig) -> tuple[Path, Any]:
    """The run folder, created, locked for this process, and holding the same config as before.

    Raises:
        UsageError: the folder cannot be written, is in use, or holds another run.
    """
    name = Path(flags.FLAGS["config"].config_filename or "run").stem if "config" in flags.FLAGS else "run"
    workdir = Path(WORKDIR.value or command_line.REPOSITORY / "runs" / name)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = open(workdir / "lock", "a+")
    except OSError as error:
        raise UsageError(f"--workdir={workdir} cannot be written: {error.strerror}; name another folder") from None
    if jax.process_index() != 0:
        return workdir, lock
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        raise UsageError(f"--workdir={workdir} is in use by process {lock.read().strip()}; name another folder") from None
    lock.truncate(0)
    lock.write(f"{os.getpid()} on {os.uname().nodename}")
    lock.flush()
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
                raise UsageError(f"config.{field}: {message}; use another --workdir or --allow_changes={field}")
    path.write_text(json.dumps(new, indent=1) + "\n")


def evaluate(step_function, state, source, config: RunConfig, mesh) -> dict[str, float]:
    """Loss, accuracy and, for text, bits per byte over the first validation batches."""
    rows, placement = sharding.local_rows(mesh, config.batch_size), sharding.batch_sharding(mesh)
    wanted = min(config.evaluation.batches, max(1, len(source) // config.batch_size))
    reader = data.batches(source, batch_size=config.batch_size, rows=rows, seed=0, start=0, stop=wanted, shuffle=False)
    sums = [step_function(state, to_device(batch, placement, config.batch_size)) for batch in reader]
    total = jax.tree.map(lambda *parts: float(np.sum([np.asarray(part, np.float64) for part in parts])), *sums)
    tokens = max(total.tokens, 1.0)
    values = {"val_loss": total.loss / tokens, "val_accuracy": total.correct / tokens}
    if source.bytes_per_token:
        values["val_bits_per_byte"] = bits_per_byte(values["val_loss"], source.bytes_per_token)
    return values


def main() -> int:
    """See the module's docstring."""
    started = time.perf_counter()
    config: RunConfig = command_line.parse_config(RunConfig, CONFIG)
    if PRINT_CONFIG.value:
        print(json.dumps(to_dict(config), indent=1))
        return command_line.DONE

    # ---------------------------------------------------------------- processes, devices and folders
    join_processes()
    jax.config.update("jax_compilation_cache_dir", str(cache_folder("compiled")))
    mesh = sharding.make_mesh(config.mesh)
    ways = mesh.shape["data"] * mesh.shape["expert"]
    if config.batch_size // config.accumulation % ways:
        found = f"found {config.batch_size} / {config.accumulation}"
        raise UsageError(f"config.batch_size: must divide by {ways} devices in each micro-batch, {found}")
    if config.seq_len % mesh.shape["model"]:
        raise UsageError(f"config.seq_len: must divide by mesh.model={mesh.shape['model']}, found {config.seq_len}")
    problem = unavailable(config.model.attention.kernel, jax.default_backend(), config.seq_len)
    if problem:
        raise UsageError(f"config.model.attention.kernel: {problem}")
    workdir, lock = open_workdir(config)
    stop = Stop()
    leader = jax.process_index() == 0

    # ---------------------------------------------------------------- data
    train_source = config.data.open("train", config.seq_len, config.seed)
    validation_source = config.data.open("validation", config.seq_len, config.seed)
    rows, placement = sharding.local_rows(mesh, config.batch_size), sharding.batch_sharding(mesh)
    if config.data.vocabulary_size() < config.model.vocabulary_size:
        found = f"{config.data.vocabulary_size()} < {config.model.vocabulary_size}"
        log.warning("config.model.vocabulary_size: the data uses fewer ids (%s)", found)

    # ---------------------------------------------------------------- state, new or restored
    try:
        trainer = make_trainer(config, mesh)
    except ValueError as error:
        raise UsageError(f"config.mesh: {error}") from None
    config_hash = hashlib.sha256(json.dumps(to_dict(config)).encode()).hexdigest()
    about = {"config": config_hash, "data": train_source.fingerprint, "jax": jax.__version__}
    checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint.keep, about)
    resume_from = checkpoints.newest_good()
    if resume_from is None:
        state = jax.jit(trainer.init, out_shardings=trainer.shardings)(jax.random.key(config.seed))
    else:
        state = checkpoints.restore(resume_from, trainer.abstract)
    first_step = resume_from or 0
    if first_step >= config.steps:
        print(f"{workdir} already has its {config.steps} steps; train again with another --workdir, or remove the folder")
        return command_line.DONE

    # ---------------------------------------------------------------- reporting
    cost = accounting.account(config.model, config.seq_len, tokens=config.batch_size * config.seq_len)
    devices = mesh.devices.size
    meter = Meter(cost.training_flops, accounting.peak_flops(jax.devices()[0].device_kind) * devices)
    sinks: list[Any] = []
    if leader:
        sinks.append(MetricsFile(workdir / "metrics.jsonl", first_step))
        if TENSORBOARD.value:
            sinks.append(TensorBoard(workdir / "tensorboard"))
    progress = Progress(first_step, config.steps, enabled=leader)
    progress.header(workdir, config, cost, mesh, first_step)

    def report(step: int, values: dict[str, Any]) -> None:
        for sink in sinks:
            sink.write(step, values)
        progress.update(step, values)

    # ---------------------------------------------------------------- the loop
    train_step = jax.jit(trainer.train_step, donate_argnums=0, out_shardings=(trainer.shardings, None))
    evaluation_step = jax.jit(trainer.evaluation_step)
    nonfinite, late, profiling, code = 0, None, False, command_line.DONE
    reader = data.batches(
        train_source, batch_size=config.batch_size, rows=rows, seed=config.seed, start=first_step, stop=config.steps
    )

    def fetch(pending) -> None:
        """Reports the metrics of a step that has been running while the next one was prepared."""
        nonlocal nonfinite
        if pending is None:
            return
        values = {name: value.tolist() for name, value in jax.device_get(pending[1]).items()}
        nonfinite = nonfinite + 1 if values["nonfinite"] else 0
        if nonfinite:
            found = f"loss {values['loss']}, gradient norm {values['grad_norm']}"
            begin = (pending[0] - 1) * config.batch_size
            log.warning("step %d not applied: %s; examples %d to %d", pending[0], found, begin, begin + config.batch_size - 1)
        report(pending[0], {**values, **meter.read(config.batch_size * config.seq_len)})

    def evaluation_due(step: int) -> bool:
        return config.evaluation.every > 0 and (step == config.steps or step % config.evaluation.every == 0)

    def evaluate_and_report(step: int) -> None:
        report(step, evaluate(evaluation_step, state, validation_source, config, mesh))

    if jax.process_count() == 1 and first_step and evaluation_due(first_step) and "val_loss" not in sinks[0].last:
        evaluate_and_report(first_step)  # the run was stopped before it could

    for step in range(first_step + 1, config.steps + 1):
        if config.profile.stop and step == config.profile.start + 1:
            jax.profiler.start_trace(str(workdir / "profile"))
            profiling = True
        waiting = time.perf_counter()
        batch = to_device(next(reader), placement, config.batch_size)
        meter.wait(time.perf_counter() - waiting)
        state, metrics = train_step(state, batch)
        fetch(late)
        late = (step, metrics)
        if profiling and step == config.profile.stop:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            profiling = False
            log.info("profile of steps %d to %d: %s", config.profile.start, step - 1, workdir / "profile")
        if step == first_step + 1:
            jax.block_until_ready(metrics)
            log.info("first step after %.1f s (imports not counted)", time.perf_counter() - started)

        last = step == config.steps
        stopping = stop.now(step)
        evaluate_now = evaluation_due(step) and not (stopping and not last)
        save_now = last or stopping or (config.checkpoint.every and step % config.checkpoint.every == 0)
        if evaluate_now or save_now:
            fetch(late)
            late, paused = None, time.perf_counter()
            if evaluate_now:
                evaluate_and_report(step)
            if save_now:  # the state is finite whatever the step was: a non-finite update is never applied
                checkpoints.save(step, state)
            meter.pause(time.perf_counter() - paused)
        if nonfinite >= config.max_nonfinite_steps:
            log.error("stopped after %d consecutive non-finite steps; the newest checkpoint is intact", nonfinite)
            code = command_line.NON_FINITE
            break
        if stopping and not last:
            log.info("stopped at step %d; the same command goes on from here", step)
            code = command_line.PREEMPTED
            break

    # ---------------------------------------------------------------- the end
    checkpoints.close()
    for sink in sinks:
        sink.close()
    progress.close()
    if code == command_line.DONE and leader:
        progress.farewell(workdir, CONFIG)
    lock.close()
    return code


if __name__ == "__main__":
    command_line.run(main)
