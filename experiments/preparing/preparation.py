"""From units to a folder with meta.json: what is found finished is kept, the rest is made."""

import logging
import os
from contextlib import closing
from pathlib import Path
from typing import Any, Iterable, Iterator

from experiments.preparing import workers
from experiments.preparing.duplicates import later_ones
from experiments.preparing.folder import ShardFolder
from experiments.preparing.processes import Seen, run_all
from experiments.preparing.progress import Progress, count
from experiments.preparing.readers import SAMPLES, too_many
from experiments.preparing.texts import KEY_BYTES
from experiments.preparing.units import GROWTH, Unit
from experiments.preparing.workers import Job
from kha_jax.data import shard_files, shard_writer, tokenizer_files, tokenizers
from kha_jax.data.shard_files import SPLITS, Meta, Shard
from kha_jax.data.tokenizers import JsonTokenizer, Tokenizer
from kha_jax.errors import DataError
from kha_jax.runs import faults
from kha_jax.storage import being_built

TRAINED_ON = 2**30  # bytes of text that a tokenizer learns from
log = logging.getLogger("kha_jax")


class Preparation:
    """One input on its way into one folder.

    job: with any tokenizer; processes: at most so many work at once.
    """

    def __init__(self, folder: ShardFolder, made: list[Unit], job: Job, processes: int):
        self.folder, self.units, self.job, self.processes = folder, made, job, processes
        self.records: dict[int, dict[str, Any]] = {}  # of finished units
        self.bad = self.shown = 0  # records that were left out, and those of them that were shown
        self.size = self._bytes(range(len(made)))

    def run(self, tokenizer: Tokenizer | int, drop_duplicates: bool, said: dict[str, Any]) -> None:
        """Makes what is missing.

        tokenizer: or the number of tokens of one that is trained on the input. said: flags that
        meta.json shows.
        """
        with being_built(self.folder.own, "aside") as aside:
            if isinstance(tokenizer, int):
                tokenizer = self.trained(tokenizer)
            _warn_of_lost_text(tokenizer)
            tokenizer_files.write_file(self.folder.path, tokenizer)
            if isinstance(tokenizer, JsonTokenizer):
                named = str(self.folder.path / tokenizers.FILE)
                marks = tokenizer.end_of_document, tokenizer.begin_of_document
                self.job = self.job._replace(tokenizer=(named, *marks))
            drop = self.duplicates(aside) if drop_duplicates else [b""] * len(self.units)
            for record in self.intact(tokenizer):
                self.keep(record)
            numbers = range(len(self.units))
            self.write([n for n in numbers if n not in self.records], drop, aside)
            self.hold_one_out(drop, aside)
            self.finish(tokenizer, said)

    def trained(self, size: int) -> Tokenizer:
        """A tokenizer of this input: the one that the folder has, else a new one."""
        path = self.folder.path / tokenizers.FILE
        if path.exists():
            return tokenizers.load(path)
        text = sum(p.size * (GROWTH if p.file.packing else 1) for u in self.units for p in u)
        share = min(1.0, TRAINED_ON / max(1, text))
        with Progress("training a tokenizer", self.size) as progress:
            tasks = [(self.job, self.units, size, share)]
            told = progress.told
            ((_, (content, seen)),) = run_all(1, workers.train, tasks, told, self.processes)
        tokenizer = JsonTokenizer(content.encode(), named=tokenizers.FILE)
        found = f"{tokenizer.vocabulary_size:,} tokens from {count(seen)}B of text"
        enough = "" if tokenizer.vocabulary_size == size else f"; there is not enough for {size:,}"
        log.info("trained a tokenizer: %s%s", found, enough)
        return tokenizer

    def intact(self, tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
        """Records of finished units whose shards are what they say, by this tokenizer."""
        about, probed = tokenizer_files.about(tokenizer), workers.probed(tokenizer)
        for number, record in self.folder.finished().items():
            try:
                if record.get("tokenizer") != probed:
                    raise DataError("the tokenizer gives other ids now")
                shards = {s: _shards([record], s) for s in SPLITS}
                shard_files.verify(self.folder.path, Meta(about, shards, {}, {}))
                yield record
            except DataError as error:
                log.warning("unit %d is made again: %s", number, error)

    def duplicates(self, aside: Path) -> list[bytes]:
        """One bit for each document of each unit, see `later_ones`."""
        paths = [self.folder.keys(number) for number in range(len(self.units))]
        todo = [number for number, path in enumerate(paths) if not path.exists()]
        tasks = [(self.job, self.units[number], aside / paths[number].name) for number in todo]
        done = self.size - self._bytes(todo)
        with Progress("looking for duplicates", self.size, done) as progress:
            with closing(run_all(self.processes, workers.keys, tasks, progress.told)) as ended:
                for index, _ in ended:
                    path = paths[todo[index]]
                    (aside / path.name).replace(path)
                    progress.end(index, Seen(self._bytes([todo[index]])))
        documents = sum(path.stat().st_size for path in paths) // KEY_BYTES
        log.info("%s documents are compared in %sB", count(documents), count(24 * documents))
        return later_ones(paths)

    def write(
        self,
        numbers: list[int],
        drop: list[bytes],
        aside: Path,
        held_out: bytes | None = None,
    ) -> None:
        """Writes the shards of these units and records them."""
        each = self.processes // max(1, len(numbers))
        encoders = each if each > 1 else 0
        tasks = [
            (self.job, number, self.units[number], aside, drop[number], held_out, encoders)
            for number in numbers
        ]
        done = self.size - self._bytes(numbers)
        with Progress("encoding", self.size, done) as progress:
            with closing(run_all(self.processes, workers.write, tasks, progress.told)) as ended:
                for index, record in ended:
                    self.folder.place(record, aside)
                    self.keep(record)
                    progress.end(index, Seen(self._bytes([record["unit"]]), *_sums(record)))

    def _bytes(self, numbers: Iterable[int]) -> int:
        return sum(part.size for number in numbers for part in self.units[number])

    def keep(self, record: dict[str, Any]) -> None:
        """Counts a finished unit in, and shows the first bad records of all units.

        Raises:
            DataError: there are more of them than may be left out.
        """
        before = self.records.get(record["unit"])
        self.records[record["unit"]] = record
        if before:
            return
        for sample in record["samples"][: SAMPLES - self.shown]:
            log.warning("left out %s", sample)
            self.shown += 1
        self.bad += record["left_out"]["bad"]
        if self.bad > self.job.skip_bad:
            raise DataError(too_many(record["samples"][-1], self.job.skip_bad))

    def hold_one_out(self, drop: list[bytes], aside: Path) -> None:
        """Where no document fell into validation, that of the smallest key does."""
        keys = {n: record["keys"] for n, record in self.records.items() if record["keys"]}
        if any("validation" in r["shards"] for r in self.records.values()) or not keys:
            return
        least, most = min(keys.values())[0], max(found[-1] for found in keys.values())
        if least != most:
            numbers = [number for number, found in keys.items() if found[0] == least]
            self.write(numbers, drop, aside, bytes.fromhex(least))

    def finish(self, tokenizer: Tokenizer, said: dict[str, Any]) -> None:
        """Writes meta.json.

        Raises:
            DataError: there is nothing to train on.
        """
        records = [record for _, record in sorted(self.records.items())]
        shards = {split: _shards(records, split) for split in SPLITS}
        if not any(shards.values()):
            raise DataError("the input holds no document: all that was found is empty or left out")
        if not shards["train"]:
            raise DataError(
                f"--val_fraction={self.job.val_fraction}: leaves no document for training; choose "
                "a smaller one, or more input"
            )
        kinds = ("bad", "empty", "duplicates")
        left_out = {kind: sum(r["left_out"][kind] for r in records) for kind in kinds}
        faults.at("meta", len(records), self.folder.path)
        shard_writer.write_meta(self.folder.path, tokenizer, shards, said, left_out)


def _warn_of_lost_text(tokenizer: Tokenizer) -> None:
    """Says where text that is encoded does not come back: no run learns what is not there."""
    before = tokenizer_files.PROBE.decode()
    after = tokenizer.decode(tokenizer.encode(tokenizer_files.PROBE))
    if before != after:
        at = len(os.path.commonprefix([before, after]))
        some = ascii(before[at : at + 12]), ascii(after[at : at + 12])
        log.warning("the tokenizer does not give text back as it was: %s becomes %s", *some)


def _sums(record: dict[str, Any]) -> list[int]:
    """Bytes of text, tokens and documents of a unit."""
    shards = record["shards"].values()
    return [sum(shard[name] for shard in shards) for name in Seen._fields[1:]]


def _shards(records: Iterable[dict[str, Any]], split: str) -> tuple[Shard, ...]:
    """Those of a split, in the order of the records."""
    found = (record["shards"].get(split) for record in records)
    return tuple(Shard(**shard) for shard in found if shard)
