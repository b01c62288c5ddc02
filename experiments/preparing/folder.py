"""The folder that prepare_data writes: one writer, and units that are found finished or not at
all, of the very input and flags that they were begun with."""

import contextlib
import fcntl
import json
import os
from pathlib import Path
from typing import Any, Iterator

from experiments.cli.codes import UsageError
from experiments.preparing.units import File
from kha_jax.data import tokenizers
from kha_jax.data.shard_files import META, SUFFIXES
from kha_jax.errors import StorageError
from kha_jax.runs import faults
from kha_jax.storage import not_followed, read_json, replacing, synced, write_json

OWN = ".preparing"  # the folder of what is known before all units are there
VERSION = 1  # of the way that units are cut and written
PLAN, INPUTS, UNITS, LOCK = "plan.json", "inputs.jsonl", "units.jsonl", "lock"
KEYS = "keys-"


class ShardFolder:
    """The folder, created and locked for this process, as a context.

    Raises:
        UsageError: it cannot be written, is in use, or holds something else.
    """

    def __init__(self, path: Path):
        self.path, self.own = path, path / OWN
        try:
            if path.exists() and not self.own.exists() and any(path.iterdir()):
                raise UsageError(f"--out={path}: holds something else; name an empty folder")
            self.own.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.own / LOCK, "a+", opener=not_followed)
            self._take_lock()
        except OSError as error:
            raise UsageError(
                f"--out={path} cannot be written: {error.strerror}; name another folder"
            ) from None

    def __enter__(self) -> "ShardFolder":
        return self

    def __exit__(self, *raised: Any) -> None:
        self.lock.close()

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.lock.seek(0)
            holder = self.lock.read(100).strip()
            raise UsageError(f"--out={self.path} is in use by process {holder}") from None
        self.lock.truncate(0)
        self.lock.write(f"{os.getpid()} on {os.uname().nodename}")
        self.lock.flush()

    def begin(self, flags: dict[str, Any], files: list[File]) -> None:
        """Writes what the units are made of, or compares it with what they were begun with.

        Raises:
            UsageError: units are finished, and names the flag or file that differs.
        """
        plan = {"version": VERSION, **flags}
        if (self.own / PLAN).exists():
            different = next(self._differences(plan, files), None)
            if different is None:
                return
            if self.finished():
                raise UsageError(
                    f"{different} since {self.path} was begun; remove it, or name another --out"
                )
        for left in (self.path / tokenizers.FILE, *self.own.glob(f"{KEYS}*")):
            left.unlink(missing_ok=True)
        with replacing(self.own / INPUTS) as temporary, open(temporary, "x") as file:
            file.writelines(_line(entry) + "\n" for entry in files)
            file.flush()
            os.fsync(file.fileno())
        write_json(self.own / PLAN, plan)

    def _differences(self, plan: dict[str, Any], files: list[File]) -> Iterator[str]:
        before = read_json(self.own / PLAN)
        for name in {**before, **plan}:
            if before.get(name) != plan.get(name):
                was, now = (json.dumps(values.get(name)) for values in (before, plan))
                yield f"--{name}: was {was}, is {now}"
        with open(self.own / INPUTS) as old:
            for entry in files:
                was = next(old, "").rstrip("\n")
                if was != _line(entry):
                    yield f"--input: {_difference(was, entry)}"
            for left in old:
                yield f"--input: {json.loads(left)[0]} is gone"

    def keys(self, number: int) -> Path:
        """Where the keys of a unit's documents are."""
        return self.own / f"{KEYS}{number:05d}"

    def finished(self) -> dict[int, dict[str, Any]]:
        """Records of units, by number; of the last record of each."""
        return {record["unit"]: record for record in self._records()}

    def _records(self) -> Iterator[dict[str, Any]]:
        if not (self.own / UNITS).exists():
            return
        with open(self.own / UNITS) as file:
            for line in file:
                with contextlib.suppress(ValueError):  # whoever wrote it was killed
                    yield json.loads(line)

    def place(self, record: dict[str, Any], aside: Path) -> None:
        """Moves the shards of a unit to their place, and records that it is finished.

        Raises:
            StorageError: the folder cannot be written.
        """
        number = record["unit"]
        faults.at("unit_written", number, self.path)
        try:
            for shard in record["shards"].values():
                for suffix in SUFFIXES:
                    name = f"{shard['name']}{suffix}"
                    (aside / name).replace(self.path / name)
            synced(self.path)
            faults.at("unit_renamed", number, self.path)
            self._append(json.dumps(record))
        except OSError as error:
            raise cannot_be_written(self.path, error) from None
        faults.at("unit_recorded", number, self.path)

    def _append(self, line: str) -> None:
        with open(self.own / UNITS, "a+b", opener=not_followed) as file:
            size = file.seek(0, os.SEEK_END)
            if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
                file.write(b"\n")  # after a line that was cut
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    @property
    def complete(self) -> bool:
        """Whether meta.json is there."""
        return (self.path / META).exists()


def cannot_be_written(path: Path, error: OSError) -> StorageError:
    """What is said of a folder that the system refuses to write to."""
    return StorageError(f"{path} cannot be written: {error.strerror or error}")


def _line(file: File) -> str:
    return json.dumps([file.path, file.size, file.changed])


def _difference(was: str, file: File) -> str:
    if not was:
        return f"{file.path} is new"
    path, size, _ = json.loads(was)
    if path != file.path:
        return f"{file.path} stands where {path} was"
    return f"{path} has another time" if size == file.size else f"{path} has another size"
