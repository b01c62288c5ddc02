"""What a folder or file of tokens holds: our shards, or what other programs write."""

import os
from pathlib import Path
from typing import Iterator, NamedTuple

import numpy as np

from experiments.cli.codes import UsageError
from experiments.cli.terminal import say
from experiments.preparing.progress import count, many
from kha_jax.config import ConfigError
from kha_jax.data import shard_files, tokenizer_files, tokenizers
from kha_jax.data.shard_files import DOCUMENT, META, SPLITS, Meta
from kha_jax.data.tokenizers import Tokenizer
from kha_jax.errors import DataError
from kha_jax.storage import open_regular

HEADER = 256 * 4  # bytes, of llm.c
MAGICS = {20240520: "<u2", 20240801: "<u4"}  # of llm.c -> ids
GPT_2_END = 50256  # of llm.c's and nanoGPT's texts
LONGER = 2048, 8192
CHUNK = 2**22  # ids at once
LARGEST = 2**63
SHOWN, CHARACTERS, IDS = 3, 90, 60  # beginnings


class Stream(NamedTuple):
    """A file of ids. form: whose; begin: bytes before the ids."""

    path: Path
    form: str
    dtype: np.dtype
    begin: int

    @property
    def tokens(self) -> int:
        """How many ids there are."""
        return (os.path.getsize(self.path) - self.begin) // self.dtype.itemsize

    def read(self, at: int, number: int) -> np.ndarray:
        """Ids [at, at + number), fewer at the end."""
        with open_regular(self.path, "rb", largest=LARGEST) as file:
            file.seek(self.begin + at * self.dtype.itemsize)
            data = file.read(number * self.dtype.itemsize)
        return np.frombuffer(data, self.dtype, len(data) // self.dtype.itemsize)


def describe(path: Path, tokenizer: Tokenizer | None) -> None:
    """Prints what is there.

    tokenizer: of ids that do not say who made them.

    Raises:
        UsageError: there is nothing that is known.
        DataError: it is not what it says of itself.
    """
    if os.path.exists(path / META):
        _ours(path)
        return
    below = path.iterdir() if os.path.isdir(path) else [path] if os.path.isfile(path) else []
    files = sorted(file for file in below if file.suffix in (".bin", ".npy"))
    if not files:
        raise UsageError(f"--describe={path}: holds no {META}, no .bin and no .npy")
    streams = [opened(file) for file in files]
    for form in dict.fromkeys((stream.form, stream.dtype) for stream in streams):
        _foreign([s for s in streams if (s.form, s.dtype) == form], tokenizer)


def _ours(folder: Path) -> None:
    meta = shard_files.read_meta(folder)
    about = meta.about
    say(f"{folder}: shards of prepare_data")
    say(
        f"tokenizer {about['tokenizer'][:16]}, vocabulary {meta.vocabulary_size:,} ({meta.dtype}), "
        f"end {about['end_of_document']}, begin {about['begin_of_document']}"
    )
    for split in SPLITS:
        tokens, size = meta.total(split, "tokens"), meta.total(split, "bytes")
        each = f", {size / tokens:.3g} bytes a token" if tokens else ""
        say(
            f"{split}: {many(meta.total(split, 'documents'), 'document')}, {count(tokens)} tokens "
            f"of {count(size)}B of text{each}, in {many(len(meta.shards[split]), 'shard')}"
        )
        _lengths(np.concatenate([*_lengths_of(folder, meta, split), []]))
    for kind, number in meta.left_out.items():
        if number:
            say(f"left out: {number:,} {kind}")
    _begin(_kept_tokenizer(folder, meta), _beginnings(folder, meta))
    shard_files.verify(folder, meta)
    say("checksums: every shard is as it was written")


def _kept_tokenizer(folder: Path, meta: Meta) -> Tokenizer | None:
    path = folder / tokenizers.FILE
    content = path.read_bytes() if path.exists() else None
    try:
        return tokenizer_files.kept(content, meta.about, folder)
    except ConfigError as error:  # the package is missing
        say(f"no text: {error}")
        return None


def _lengths_of(folder: Path, meta: Meta, split: str) -> Iterator[np.ndarray]:
    """Tokens of each document, its end with it."""
    for shard in meta.shards[split]:
        path = folder / f"{shard.name}.documents"
        try:
            starts = np.fromfile(path, DOCUMENT)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from None
        if len(starts) != shard.documents:
            raise DataError(
                f"{path} has {len(starts):,} documents, {META} says {shard.documents:,}"
            )
        yield np.diff(starts.astype(np.int64), append=shard.tokens)


def _beginnings(folder: Path, meta: Meta) -> Iterator[np.ndarray]:
    """The first ids of the first documents of train."""
    for shard in meta.shards["train"]:
        starts = np.fromfile(folder / f"{shard.name}.documents", DOCUMENT, SHOWN).astype(int)
        stream = Stream(folder / f"{shard.name}.bin", "", meta.dtype, 0)
        for start in starts:
            yield _until(stream.read(start, IDS), meta.about["end_of_document"])


def _until(ids: np.ndarray, end: int | None) -> np.ndarray:
    """The ids before the first end."""
    ends = np.flatnonzero(ids == end)
    return ids[: ends[0]] if ends.size else ids


def _lengths(lengths: np.ndarray) -> None:
    if not lengths.size:
        return
    median, most = np.quantile(lengths, (0.5, 0.9))
    longer = ", ".join(f"{(lengths > n).mean():.1%} longer than {n:,}" for n in LONGER)
    longest = f"longest {lengths.max():,.0f}"
    say(f"  tokens a document: median {median:,.0f}, 90% up to {most:,.0f}, {longest}; {longer}")


def _begin(tokenizer: Tokenizer | None, beginnings: Iterator[np.ndarray]) -> None:
    if tokenizer is None:
        return
    say("documents begin with")
    for ids, _ in zip(beginnings, range(SHOWN)):
        say(f"  {in_one_line(tokenizer.decode(ids))}")


def in_one_line(text: str) -> str:
    """One line that a terminal shows and does not obey."""
    shown = "".join(c if c.isprintable() else " " for c in text[:CHARACTERS])
    return " ".join(shown.split())


def opened(path: Path) -> Stream:
    """The file, by its first bytes.

    Raises:
        DataError: it is not what they say.
    """
    try:
        with open_regular(path, "rb", largest=LARGEST) as file:
            head = file.read(2**20)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    numbers = np.frombuffer(head[:12], "<i4") if len(head) >= HEADER else np.zeros(3, int)
    if dtype := MAGICS.get(int(numbers[0])):
        stream = Stream(path, "llm.c", np.dtype(dtype), HEADER)
        if stream.tokens != numbers[2]:
            said = f"{path} has {stream.tokens:,} ids, its header says {numbers[2]:,}"
            raise DataError(f"{said}; it was cut")
        return _whole(stream)
    if head.startswith(b"\x93NUMPY"):
        raise DataError(f"{path} is an array of numpy; raw ids are read, as tofile() writes them")
    form = "OLMo" if path.suffix == ".npy" else "nanoGPT"
    return _whole(Stream(path, form, np.dtype("<u4" if _looks_wide(head) else "<u2"), 0))


def _whole(stream: Stream) -> Stream:
    """The file, where it does not end within an id."""
    size = os.path.getsize(stream.path) - stream.begin
    if size % stream.dtype.itemsize:
        said = f"{stream.path} holds {size:,} bytes, no whole number of {stream.dtype} ids"
        raise DataError(f"{said}; it was cut")
    return stream


def _looks_wide(head: bytes) -> bool:
    """Whether raw ids look like 32 bits: their upper halves are then next to nothing."""
    halves = np.frombuffer(head[: len(head) // 4 * 4], "<u2")
    return halves.size > 0 and halves[1::2].max() < 16 and halves[::2].max() > 16


def _foreign(streams: list[Stream], tokenizer: Tokenizer | None) -> None:
    """Files of one form: what reading all of them finds."""
    first = streams[0]
    tokens, largest = sum(stream.tokens for stream in streams), 0
    end = GPT_2_END if tokenizer is None else tokenizer.end_of_document
    lengths = []
    for stream in streams:
        ends = [np.array([-1])]
        for at in range(0, stream.tokens, CHUNK):
            ids = stream.read(at, CHUNK)
            largest = max(largest, int(ids.max()))
            ends.append(at + np.flatnonzero(ids == end))
        places = np.concatenate(ends)
        last = stream.tokens - 1
        lengths.append(np.diff(places, append=[last] if places[-1] < last else []))
    names = str(first.path) if len(streams) == 1 else f"{first.path.parent}: {len(streams)} files"
    raw = "" if first.begin else ", raw: the width is what their values look like"
    say(f"{names}: {first.form}, {first.dtype}{raw}")
    found = np.concatenate(lengths)
    found = found[found > 0]
    say(f"{count(tokens)} tokens, the largest id {largest:,}")
    whose = "GPT-2's" if tokenizer is None else "the tokenizer's"
    say(f"{len(found):,} documents, where id {end} ({whose}) ends or begins each")
    _lengths(found)
    if tokenizer is None:
        say("name the tokenizer with --tokenizer=FILE to see how documents begin")
        return
    if largest >= tokenizer.vocabulary_size:
        raise DataError(f"id {largest:,} is beyond the tokenizer's {tokenizer.vocabulary_size:,}")
    head = first.read(0, 2**16)
    pieces = np.split(head, np.flatnonzero(head == end) + 1)
    _begin(tokenizer, (_until(ids[:IDS], end) for ids in pieces if ids.size and ids[0] != end))
