"""The folder of a run: one writer, one config, one text, and room for its checkpoints.

`config.json` is the config; `lineage.json` lists what the run has been since it began, one entry
for each change that was allowed: hashes of the config, the data, the validation data and the
tokenizer, the batch size, the step from which they hold, and the changed fields with both values.
`registered.json` says which modules registered kinds of one's own, where there are any.
`tokenizer_ids.json`, and `tokenizer.json` where it is not bytes, are the tokenizer of a run on
text.
"""

import contextlib
import errno
import fcntl
import importlib.metadata
import logging
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import jax

from experiments.cli.codes import UsageError
from experiments.run_folders import grace
from experiments.run_folders.identity import COMPUTED, changed
from kha_jax import __version__
from kha_jax.config import dotted, near, to_dict
from kha_jax.data import Draws, Source, batch_hash, tokenizer_files
from kha_jax.errors import CheckpointError, DataError, StorageError
from kha_jax.hardware import chips
from kha_jax.runs.arrays import state_bytes
from kha_jax.runs.checkpoint import Checkpoints
from kha_jax.runs.manifest import MANIFEST, WEIGHTS, read_manifest, room
from kha_jax.storage import (
    PROBE,
    READ,
    Lease,
    address,
    cache_folder,
    fetch,
    holder,
    in_bucket,
    mirror,
    not_followed,
    put,
    put_all,
    read_json,
    writable,
    write_json,
)
from kha_jax.training.optimizer import jump
from kha_jax.training.run_config import RunConfig
from kha_jax.training.run_folder import (
    CONFIG,
    LATER,
    LINEAGE,
    batch_sizes,
    config_hash,
    read_config,
    read_lineage,
    tokenizer_hash,
    write_config,
    write_registrations,
)

log = logging.getLogger("kha_jax")
METRICS = "metrics.jsonl"
VERSIONS = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")


def use_compilation_cache() -> None:
    """Keeps compiled programs where that can be done, unless the user has said where; a run does
    without."""
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    folder = cache_folder("compiled")
    try:
        writable(folder)
    except OSError as error:
        log.warning("%s: %s; compiled programs are not kept", folder, error.strerror)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))


class RunFolder:
    """A run folder: created, locked for this process, and holding the same config as before.

    Nothing in it is overwritten before `keep`, so that a refused change leaves it as it was.

    Raises:
        UsageError: the folder cannot be written, is in use, or holds another run.
        CheckpointError: its disk is full.
    """

    def __init__(self, path: Path, config: RunConfig, allowed: list[str]):
        if jax.process_index() != 0 and in_bucket(path):  # what is written is that of process 0
            path = mirror(str(address(path)), READ)
        self.path, self.config, self.allowed = path, config, allowed
        self.before = config  # what the run had last
        self.changes: dict[str, tuple[Any, Any]] = {}
        self.identity: dict[str, str] = {}
        self.draws = Draws([(0, config.batch_size)])
        self.lineage: list[dict[str, Any]] = []
        try:
            path.mkdir(parents=True, exist_ok=True)
            self.lease: Lease | None = None
            self.lock = open(path / "lock", "a+", opener=not_followed)
            if jax.process_index() == 0:
                self._take_lock()
                writable(path)
            fetch(path)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise CheckpointError(
                    f"{path}: {error.strerror}; {len(PROBE):,} bytes are needed to begin with, "
                    f"{room(path)}"
                ) from None
            raise UsageError(
                f"--workdir={path} cannot be written: {error.strerror}; name another folder"
            ) from None
        self._check_names()
        if jax.process_index() == 0 and any((path / "checkpoints").glob("*")):
            self._compare()

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.lock.seek(0)
            raise self._in_use(self.lock.read().strip()) from None
        self.lock.truncate(0)
        self.lock.write(f"{os.getpid()} on {os.uname().nodename}")
        self.lock.flush()
        os.fsync(self.lock.fileno())
        if in_bucket(self.path):
            try:
                self.lease = Lease(str(address(self.path)))
            except BlockingIOError as held:
                raise self._in_use(held.strerror) from None

    def _in_use(self, holder: str) -> UsageError:
        where = f"--workdir={address(self.path)}"
        return UsageError(f"{where} is in use by process {holder}; name another folder")

    def mark(self) -> str:
        """What all processes find that see the same folder."""
        if in_bucket(self.path):
            return holder(str(address(self.path)))
        return (self.path / "lock").read_text()

    def _allows(self, field: str) -> bool:
        if self._untrained():
            return True
        return any(field == name or field.startswith(f"{name}.") for name in self.allowed)

    def _untrained(self) -> bool:
        """Whether the run is a model that was made and not trained yet: all but it is open."""
        made = [*(self.path / "checkpoints").glob(f"*/{MANIFEST}")]
        zero = made and all(int(path.parent.name) == 0 for path in made)
        return bool(zero) and read_manifest(made[0].parent).get("holds") == WEIGHTS

    def _check_names(self) -> None:
        fields = list(dotted(to_dict(self.config)))
        groups = {f.rsplit(".", depth)[0] for f in fields for depth in range(1, f.count(".") + 1)}
        for name in self.allowed:
            if name not in fields and name not in groups:
                raise UsageError(f"--allow_changes={name}: is no field; {near(name, fields)}")

    def _compare(self) -> None:
        """Finds what differs from the config that the run had last."""
        if not (self.path / CONFIG).exists():
            self.lineage = read_lineage(self.path, self.config)
            if self.lineage[-1]["config"] != config_hash(self.config):
                raise UsageError(
                    f"{self.path}: its {CONFIG} is gone, and {LINEAGE} records another config than "
                    "this one; put it back, or use another --workdir"
                )
            return
        self.before = old = read_config(self.path)
        self.lineage = read_lineage(self.path, old)
        for field, (before, after) in changed(old, self.config).items():
            message = f"config.{field}: this run began with {before!r}, found {after!r}"
            if field.startswith("model.") and not field.startswith(COMPUTED):
                raise UsageError(f"{message}; the model cannot change, use another --workdir")
            if not self._allows(field):
                effect = self._effect(field)
                allow = f"use another --workdir or --allow_changes={field}{effect}"
                raise UsageError(f"{message}; {allow}")
            self.changes[field] = before, after

    def _effect(self, field: str) -> str:
        """What allowing the change of the field would do, where that is more than it says."""
        if field != "steps":
            return ""
        folders = (self.path / "checkpoints").glob("*")
        done = max((int(one.name) for one in folders if one.name.isdecimal()), default=0)
        if done > self.config.steps:
            return f", but it has {done} steps already"
        effect = ", which goes on with the schedule of the new number of steps"
        if rates := jump(self.before, self.config, done):
            effect += ": the next learning rate is {1:.3g} instead of {0:.3g}".format(*rates)
        return effect

    def identify(self, train: Source, validation: Source) -> None:
        """Says which text the run reads, and compares it with what it has read.

        Raises:
            UsageError: the tokenizer is another one.
            DataError: the data are others, and --allow_changes does not name them.
        """
        splits = {"data": train, "validation": validation}
        self.source = train
        self.identity = {
            "config": config_hash(self.config),
            **{name: source.fingerprint for name, source in splits.items()},
            "tokenizer": tokenizer_hash(self.config),
        }
        known = self.lineage[-1] if self.lineage else {}  # None of what a new model has not read
        last = self.identity | {name: value for name, value in known.items() if value is not None}
        if last["tokenizer"] != self.identity["tokenizer"]:
            raise UsageError(
                f"config.data: this run began with the tokenizer {last['tokenizer']}, found "
                f"{self.identity['tokenizer']}; use another --workdir"
            )
        for name in LATER - self.lineage[-1].keys() if self.lineage else ():
            log.info("lineage.json names no %s data: that of now is taken for it, and named", name)
        # what a synthetic source holds depends on these
        follows = any(field.startswith(("data.", "seed", "seq_len")) for field in self.changes)
        for name, source in splits.items():
            before, after = last[name], self.identity[name]
            if before != after and not follows and not self._allows("data"):
                raise DataError(
                    f"{source} is not what this run has read: it began with {before[:12]}, found "
                    f"{after[:12]}; use another --workdir or --allow_changes=data"
                    f"{self._interpreters()}"
                )
            if before != after:
                self.changes[name] = before, after

    def _interpreters(self) -> str:
        """Where text differs: that of the standard library comes with the interpreter."""
        manifests = sorted((self.path / "checkpoints").glob(f"*/{MANIFEST}"))
        before = now = platform.python_version()
        with contextlib.suppress(IndexError, CheckpointError, KeyError, TypeError):
            before = read_manifest(manifests[-1].parent)["versions"]["python"]
        if before == now:
            return ""
        return f"; its newest checkpoint is of Python {before}, this is {now}, with other text"

    def checkpoints(self, state: Any) -> Checkpoints:
        """Those of this run, whose manifests say whose they are and how they go on.

        state: its shapes. Raises CheckpointError when there is no room for them.
        """
        wanted = self.config.checkpoint
        accepts = [*self.lineage, self.identity]
        place = self.path / "checkpoints"
        every, ours = wanted.keep_every, self._check_lease
        made = Checkpoints(place, wanted.keep, self._about, accepts, every, ours)
        if jax.process_index() == 0:
            if not in_bucket(self.path):
                self._check_room(made, state_bytes(state))
            grace.check(self.path, state_bytes(state), self.config.checkpoint.grace)
        return made

    def _check_room(self, checkpoints: Checkpoints, size: int) -> None:
        wanted, steps = self.config.checkpoint, self.config.steps
        for_good = steps // wanted.keep_every if wanted.keep_every else 0
        saves = 1 + (steps // wanted.every if wanted.every else 0)
        saves = wanted.keep + 1 if wanted.every_minutes else min(wanted.keep + 1, saves)
        missing = saves + for_good - len(checkpoints.steps())
        free = shutil.disk_usage(self.path).free
        if missing * size > free:
            raise CheckpointError(
                f"{checkpoints.folder}: {missing} checkpoints of {size:,} bytes are still to be "
                f"written there, {free:,} bytes are free; lower config.checkpoint.keep"
                f"{' or raise keep_every' if for_good else ''}, or name another --workdir"
            )

    def begin_at(self, step: int) -> Draws:
        """Which windows the run goes on with, now that the step is known: the same on all
        processes, whether the record of this start is written or not."""
        if step:
            self.draws = Draws([*self._batch_sizes(), (step, self.config.batch_size)])
        return self.draws

    def _batch_sizes(self) -> list[tuple[int, int]]:
        config = read_config(self.path) if (self.path / CONFIG).exists() else self.config
        return batch_sizes(self.path, config)

    def _check_lease(self) -> None:
        if self.lease is not None:
            self.lease.check()

    def _next_batch(self, step: int) -> str:
        return batch_hash(self.source, draws=self.draws, seed=self.config.seed, step=step)

    def _about(self, step: int) -> dict[str, Any]:
        """What a manifest says of the run; step s has used the batches 0 ... s - 1. In a bucket the
        metrics up to there come before it."""
        if (self.path / METRICS).exists():  # a run can do without
            put(self.path / METRICS)
        versions = {name: importlib.metadata.version(name) for name in VERSIONS}
        versions = {"python": platform.python_version(), "kha_jax": __version__, **versions}
        next_batch = self._next_batch(step)
        return {
            **self.identity,
            "next_batch": next_batch,
            "versions": versions,
            "hardware": chips.hardware(),
        }

    def check_next_batch(self, checkpoints: Checkpoints, step: int) -> None:
        """Prints whether a resumed run goes on with the batch that the checkpoint foresaw.

        Raises:
            DataError: it does not, although nothing was changed.
        """
        if jax.process_index() != 0 or step >= self.config.steps:
            return
        now = self._next_batch(step)
        foreseen = str(read_manifest(checkpoints.path(step)).get("next_batch", now))
        said = f"resume check: next batch {now[:12]}"
        if foreseen == now:
            print(f"{said} matches the checkpoint of step {step}")
        elif self.changes:
            print(f"{said} is not the checkpoint's {foreseen[:12]}, after the allowed changes")
        else:
            problem = f"{said} of {self.source} is not the checkpoint's {foreseen[:12]}"
            raise DataError(problem + self._interpreters())

    def keep(self, step: int) -> None:
        """Writes config.json and what has changed; called once the state of this step is there."""
        if jax.process_index() != 0:
            return
        try:
            write_registrations(self.path, self.before, self.config)
            if (tokenizer := self.config.data.tokenizer()) is not None:
                tokenizer_files.keep(self.path, tokenizer)
            put_all(self.path)  # the tokenizer's own file is one of a library
            write_config(self.path, self.config, lambda: self._record(step))
            write_registrations(self.path, self.config)
        except OSError as error:
            found = f"{self.path / LINEAGE} or {CONFIG} could not be written: {error.strerror}"
            raise CheckpointError(found) from None
        for field, (before, after) in self.changes.items():
            log.info("resuming with %s changed: %s -> %s", field, before, after)
        if step and self.changes.keys() & {"seq_len", "seed"}:
            read = self.draws(step).start * self.before.seq_len
            share = read / (len(self.source) * self.config.seq_len) % 1
            log.info("a new order begins: %.0f%% of this epoch were read before it", 100 * share)

    def _record(self, step: int) -> None:
        path = self.path / LINEAGE
        if self._changed(step):
            entries = read_json(path) if path.exists() and self.lineage else []
            size = self.config.batch_size
            at = {"batch_size": size, "from_step": step, "changes": self.changes}
            write_json(path, [*entries, {**self.identity, **at}])

    def _changed(self, step: int) -> bool:
        """Whether lineage.json says something else of this step. After a walk back to one before a
        change of the batch size it does."""
        if not self.lineage or self.lineage[-1] != self.identity:
            return True
        return len(Draws(self._batch_sizes())(step)) != self.config.batch_size

    def close(self) -> None:
        """Gives the lock back; all that is not a checkpoint is in the bucket then, if it is one."""
        try:
            if self.lease is not None:
                self.lease.check()
                put_all(self.path)
        except StorageError as error:
            log.error("the last metrics are in %s alone: %s", self.path, error)
        finally:
            if self.lease is not None:
                self.lease.close()
            self.lock.close()
