"""Trains a model.

    python -m experiments.train --config=configs/kha_tiny.py --workdir=runs/kha_tiny
    python -m experiments.train --config.model.attention.key.kind=linear --workdir=runs/key_linear
    python -m experiments.train --config=configs/kha_moe_tiny.py --config.help

The same command resumes a run that was stopped. Without --config a run folder that is there has its
own config. Exit codes: 0 done, 2 flags or config, 65 data, 70 a step hangs, or another process did
not come, is gone or cannot go on, 74 checkpoint storage, 75 stopped by SIGTERM or Ctrl-C after a
save (run it again), 76 too many non-finite steps, or a state that is not finite.
"""

import contextlib
import importlib.util
import json
import logging
import re
import sys
import time
from pathlib import Path

import jax
from absl import flags

from experiments.cli import codes, command_line, config_files, terminal
from experiments.cli.codes import UsageError
from experiments.cli.terminal import say
from experiments.run_folders import stored
from experiments.run_folders.folder import RunFolder, use_compilation_cache
from experiments.train_loop import data_check, replay
from experiments.train_loop.loop import Run, train, windows_to_evaluate
from experiments.train_loop.progress import farewell
from experiments.train_loop.stop import Stop
from kha_jax import accounting, data
from kha_jax.config import to_dict, under
from kha_jax.errors import DataError
from kha_jax.hardware import chips, tpu
from kha_jax.mesh import make_mesh
from kha_jax.runs import processes
from kha_jax.runs.cluster import Place
from kha_jax.runs.goodput import Goodput, process_began
from kha_jax.runs.pace import Pace
from kha_jax.runs.watchdog import Watchdog
from kha_jax.training.optimizer import jump
from kha_jax.training.run_config import RunConfig
from kha_jax.training.step import Trainer, TrainState, begun, make_trainer

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
        "coordinator_address": COORDINATOR.value,
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
    """The run folder that the flags name, to be trained or to be read."""
    usual = config_files.REPOSITORY / "runs" / Path(flags.FLAGS["config"].config_filename).stem
    open_folder = stored.readable_folder if REPLAY.value else stored.trained_folder
    return open_folder("workdir", str(usual) if WORKDIR.value is None else WORKDIR.value)


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
            sinks = TENSORBOARD.value, WAIT.value
            run = Run(config, mesh, trainer, *sources, draws, checkpoints, stop, *timing, *sinks)
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


if __name__ == "__main__":
    command_line.run(main)
