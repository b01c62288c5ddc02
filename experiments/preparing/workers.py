"""What the processes of prepare_data do: turn a unit into shards, find its duplicates, train a
tokenizer.

A process reads the files of its unit itself. Where there are more processes than units, some encode
what another reads: they get text and give back ids. Each encodes in one thread.
"""

import collections
import contextlib
import functools
import hashlib
import json
import os
import queue
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Iterable, Iterator, NamedTuple

import numpy as np

from experiments.preparing import texts
from experiments.preparing.processes import Report, Seen, Worker
from experiments.preparing.readers import Reader
from experiments.preparing.texts import Batch
from experiments.preparing.units import Unit
from kha_jax.data import tokenizer_files, tokenizers
from kha_jax.data.shard_files import SPLITS
from kha_jax.data.shard_writer import ShardWriter, writing
from kha_jax.data.tokenizers import Tokenizer

LONG = 2**24  # bytes of a document that is encoded whole, above which that is warned of


class Job(NamedTuple):
    """What all units of an input have in common. tokenizer: what `tokenizers.load` takes."""

    tokenizer: tuple[Any, ...]
    text_key: str
    val_fraction: float
    skip_bad: int


def write(
    job: Job,
    number: int,
    unit: Unit,
    folder: Path,
    drop: bytes,
    held_out: bytes | None,
    encoders: int,
    report: Report,
) -> dict[str, Any]:
    """Writes the shards of a unit into `folder`.

    Args:
        drop: one bit for each document of the unit, set where it is left out; empty: none is.
        held_out: the key of a document that belongs to validation whatever the share.
        encoders: processes that encode; 0: this one does.

    Returns:
        The unit's record: its number, by which tokenizer, the shard of each split that has
        documents, what was left out and why, the smallest and the largest key.
    """
    reader = Reader(unit, job.text_key, job.skip_bad)
    with contextlib.ExitStack() as held:
        encoded = held.enter_context(Encoders(job.tokenizer, encoders))  # before there are threads
        tokenizer = encoded.tokenizer
        kept = Kept(_told(reader, tokenizer, report), drop, job.val_fraction, held_out)
        writers = {
            split: held.enter_context(ShardWriter(folder, split, number, tokenizer))
            for split in SPLITS
        }
        for batch, ids, lengths in encoded.over(texts.batches(kept, tokenizer.in_pieces)):
            _add(writers[batch.split], batch, ids, lengths)
            sums = (sum(getattr(w, name) for w in writers.values()) for name in Seen._fields[1:])
            report.seen(Seen(reader.done, *sums))
        shards = {s: w.finish()._asdict() for s, w in writers.items() if w.documents}
    return {
        "unit": number,
        "tokenizer": probed(tokenizer),
        "shards": shards,
        "left_out": {"bad": reader.bad, "empty": reader.empty, "duplicates": kept.dropped},
        "samples": reader.samples,
        "keys": [key.hex() for key in (kept.least, kept.most) if key],
    }


def probed(tokenizer: Tokenizer) -> str:
    """A hash of what a tokenizer is, and of its ids of a fixed text: those hang on the version of
    the library too."""
    said = json.dumps(tokenizer_files.about(tokenizer), sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


def _add(writer: ShardWriter, batch: Batch, ids: np.ndarray, lengths: np.ndarray) -> None:
    size = sum(map(len, batch.texts))
    if batch.piece:
        writer.add_piece(ids, size, batch.last)
    else:
        writer.add_all(ids, lengths, size)


def _told(reader: Reader, tokenizer: Tokenizer, report: Report) -> Iterator[bytes]:
    """The documents, of which what surprises is said."""
    quiet = True
    for text in reader:
        if quiet and reader.nul:
            quiet = False
            report.say("nul", f"{reader.nul}: holds NUL bytes, which are text like others")
        if len(text) > LONG and not tokenizer.in_pieces:
            report.say(
                "long",
                f"a document of {len(text) / 1e6:,.0f} MB is encoded as a whole, which may take a "
                "hundred times its memory: with this tokenizer, ids depend on what stands before",
            )
        yield text


class Kept:
    """(split, text) of the documents of a unit that are not left out; an iterator, and what it has
    met so far."""

    def __init__(self, found: Iterable[bytes], drop: bytes, share: float, held_out: bytes | None):
        self.found, self.share, self.held_out = found, share, held_out
        self.drop = np.unpackbits(np.frombuffer(drop, np.uint8))
        self.dropped = 0
        self.least = self.most = b""

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        for index, text in enumerate(self.found):
            if self.drop.size and self.drop[index]:
                self.dropped += 1
                continue
            key = texts.key_of(text)
            self.least = min(self.least or key, key)
            self.most = max(self.most, key)
            out = texts.within(key, self.share) or key == self.held_out
            yield SPLITS[out], text


def keys(job: Job, unit: Unit, path: Path, report: Report) -> None:
    """Writes the key of each document of a unit, in order."""
    reader = Reader(unit, job.text_key, job.skip_bad)
    with writing(path.parent), open(path, "xb") as file:
        for text in reader:
            file.write(texts.key_of(text))
            report.seen(Seen(reader.done))
        file.flush()
        os.fsync(file.fileno())


def train(
    job: Job, units: list[Unit], vocabulary_size: int, share: float, report: Report
) -> tuple[str, int]:
    """A byte-level BPE of the documents whose keys are within the share.

    Returns:
        The content of its tokenizer.json, and the bytes of text that it has seen.
    """
    import tokenizers as library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    done = size = 0

    def some_texts() -> Iterator[list[str]]:
        nonlocal done, size
        for unit in units:
            reader = Reader(unit, job.text_key, job.skip_bad)
            chosen = (("", t) for t in reader if share >= 1 or texts.within(texts.key_of(t), share))
            for batch in texts.batches(chosen, in_pieces=True):
                size += sum(map(len, batch.texts))
                report.seen(Seen(done + reader.done, size))
                yield [text.decode() for text in batch.texts]
            done += reader.done

    tokenizer = library.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[tokenizers.ENDS[0]],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(some_texts(), trainer)
    return tokenizer.to_str(pretty=True), size


_loaded = functools.lru_cache(maxsize=1)(tokenizers.load)


def encode(named: tuple[Any, ...], batch: list[bytes], report: Report) -> Any:
    """(ids one after another, how many are of each text)."""
    del report
    return _encoded(_loaded(*named), batch)


def _encoded(tokenizer: Tokenizer, batch: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    ids = tokenizer.encode_batch(batch)
    return np.concatenate(ids), np.array([len(some) for some in ids], np.int64)


class Encoders:
    """Encodes batches in their order: in this process, or in several more. tokenizer: that of this
    process."""

    def __init__(self, named: tuple[Any, ...], count: int):
        self.named, self.count = named, count
        self.idle: queue.SimpleQueue = queue.SimpleQueue()
        self.held = contextlib.ExitStack()

    def __enter__(self) -> "Encoders":
        started = [self.held.enter_context(Worker(forked=True)) for _ in range(self.count)]
        for worker in started:
            worker.send(encode, self.named, [b""])  # which loads its tokenizer meanwhile
        self.tokenizer = tokenizers.load(*self.named)
        for worker in started:
            worker.result()
            self.idle.put(worker)
        self.threads = self.held.enter_context(ThreadPoolExecutor(max(1, self.count)))
        return self

    def __exit__(self, *raised: Any) -> None:
        self.held.close()

    def over(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, np.ndarray, np.ndarray]]:
        """(batch, ids, lengths). At most two batches for each process are on their way."""
        if not self.count:
            for batch in batches:
                yield batch, *_encoded(self.tokenizer, batch.texts)
            return
        waiting: collections.deque = collections.deque()
        for batch in batches:
            waiting.append((batch, self.threads.submit(self._elsewhere, batch.texts)))
            if len(waiting) == 2 * self.count:
                batch, future = waiting.popleft()
                yield batch, *future.result()
        for batch, future in waiting:
            yield batch, *future.result()

    def _elsewhere(self, batch: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        worker = self.idle.get()
        try:
            worker.send(encode, self.named, batch)
            return worker.result()
        finally:
            self.idle.put(worker)
