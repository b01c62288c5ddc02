"""Token shards on disk: what their files hold, read and held against their checksums.

A folder holds `meta.json`, the `tokenizer.json` of its ids (none for bytes), and for each shard

    train-00012.bin        token ids, little-endian: uint16 where the vocabulary is at most 65,536,
                           else uint32; each document ends with the end's id, which occurs nowhere
                           else
    train-00012.documents  where each document begins, in tokens: little-endian uint64
    train-00012.crc        crc32c of each 256 KiB of .bin: little-endian uint32

`meta.json` is written last: a folder without it is not finished.
"""

import contextlib
import hashlib
import json
import re
from pathlib import Path
from typing import IO, Any, Iterator, Mapping, NamedTuple

import google_crc32c
import numpy as np

from kha_jax.data import tokenizer_files
from kha_jax.errors import DataError
from kha_jax.storage import (
    Objects,
    is_url,
    open_regular,
    read_json,
)

Place = Path | str  # a folder of this machine, or the URL of one in a store
META = "meta.json"
VERSION = 1
SPLITS = ("train", "validation")
BLOCK = 2**18  # bytes behind one checksum
SUFFIXES = (".documents", ".crc", ".bin")
DOCUMENT, CHECKSUM = np.dtype("<u8"), np.dtype("<u4")


def id_type(vocabulary_size: int) -> np.dtype:
    """Of the ids in a `.bin`; vocabulary_size: with added tokens."""
    return np.dtype("<u2" if vocabulary_size <= 2**16 else "<u4")


class Shard(NamedTuple):
    """An entry of meta.json. bytes: of text. sha256: of its .bin."""

    name: str
    tokens: int
    documents: int
    bytes: int
    sha256: str


class Meta(NamedTuple):
    """What meta.json says. about: of the tokenizer, see `tokenizer_files.about`. shards: of each
    split. flags: of the command that wrote them. left_out: how many texts of each kind."""

    about: dict[str, Any]
    shards: dict[str, tuple[Shard, ...]]
    flags: dict[str, Any]
    left_out: dict[str, int]

    @property
    def vocabulary_size(self) -> int:
        """Ids are below it."""
        return self.about["vocabulary_size"]

    @property
    def dtype(self) -> np.dtype:
        """Of the ids."""
        return id_type(self.vocabulary_size)

    def total(self, split: str, field: str) -> int:
        """Of all shards of a split; field: `tokens`, `documents` or `bytes`."""
        return sum(getattr(shard, field) for shard in self.shards[split])

    def fingerprint(self, split: str) -> str:
        """A hash of what a run reads of a split, wherever it lies and whoever wrote it."""
        shards = [(s.tokens, s.documents, s.bytes, s.sha256) for s in self.shards[split]]
        said = {name: self.about[name] for name in tokenizer_files.ABOUT if name != "probe_ids"}
        content = json.dumps([VERSION, said, shards], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def read_meta(folder: Place) -> Meta:
    """What the meta.json of a folder says.

    Raises:
        DataError: there is none, or it is not what `write_meta` writes.
        StorageError: a store does not answer.
    """
    path = f"{folder}/{META}"
    try:
        remote = is_url(str(folder))
        values = json.loads(Objects(str(folder)).read(META)) if remote else read_json(Path(path))
        problem = "is no object" if not isinstance(values, dict) else None
        problem = problem or next(_problems(values), None)
    except FileNotFoundError:
        raise DataError(
            f"{folder} holds no {META}: no shards, or not finished; prepare_data writes them"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        problem = f"cannot be read ({getattr(error, 'strerror', None) or error})"
    if problem:
        raise DataError(f"{path} {problem}; write the shards again")
    return Meta(
        {name: values[name] for name in tokenizer_files.ABOUT},
        {s: tuple(Shard(**entry) for entry in values["shards"][s]) for s in SPLITS},
        values["flags"],
        values["left_out"],
    )


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _problems(values: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the content of a meta.json."""
    if values.get("version") != VERSION:
        yield f"is of version {values.get('version')!r}, this program reads {VERSION}"
    for name, kind in tokenizer_files.ABOUT.items():
        number = isinstance(values.get(name), int)
        fits = isinstance(values.get(name), kind) and (not number or _count(values[name]))
        if name not in values or not fits:
            yield f"holds no usable {name}"
    size = values["vocabulary_size"]
    if not 0 < size <= 2**31 or values.get("dtype") != id_type(size).name:
        yield f"holds no usable dtype: {values.get('dtype')!r} for a vocabulary of {size}"
    end, begin = values["end_of_document"], values["begin_of_document"]
    if not (end < size and (begin is None or begin < size) and begin != end):
        yield f"holds no usable end_of_document: {end}, begin {begin}, vocabulary {size}"
    if not all(map(_count, values["probe_ids"])):
        yield "holds no usable probe_ids"
    for name in ("shards", "totals", "flags", "left_out"):
        if not isinstance(values.get(name), dict):
            yield f"holds no usable {name}"
    if not all(map(_count, values["left_out"].values())):
        yield "holds no usable left_out"
    if set(values["shards"]) != set(SPLITS):
        yield f"holds no usable shards: they are of {', '.join(SPLITS)}"
    for split in SPLITS:
        yield from _problems_of_shards(split, values["shards"][split])
        totals = values["totals"].get(split)
        for field in ("tokens", "documents", "bytes"):
            found = sum(entry[field] for entry in values["shards"][split])
            if not isinstance(totals, dict) or totals.get(field) != found:
                yield f"holds no usable totals: the shards of {split} have {found:,} {field}"


def _problems_of_shards(split: str, entries: Any) -> Iterator[str]:
    if not isinstance(entries, list):
        yield f"holds no list of shards of {split}"
    for number, entry in enumerate(entries):
        where = f"holds no usable shard {number} of {split}"
        if not isinstance(entry, dict) or set(entry) != set(Shard._fields):
            yield f"{where}: it must have {', '.join(Shard._fields)}"
        names = isinstance(entry["name"], str) and re.fullmatch(rf"{split}-\d{{5,}}", entry["name"])
        hashed = isinstance(entry["sha256"], str) and re.fullmatch("[0-9a-f]{64}", entry["sha256"])
        if not names or not hashed:
            yield f"{where}: no usable name or sha256"
        if not all(_count(entry[field]) for field in ("tokens", "documents", "bytes")):
            yield f"{where}: no usable tokens, documents or bytes"
        if entry["documents"] > entry["tokens"]:
            yield f"{where}: more documents than tokens"
    if len({entry["name"] for entry in entries}) != len(entries):
        yield f"holds a shard of {split} twice"


def verify(folder: Path, meta: Meta | None = None, documents: bool = True) -> None:
    """Compares every shard with its size and sha256, and the files beside it with its ids, which
    reads all of them. documents: also where those begin.

    Raises:
        DataError: names the file that is missing, cut or changed.
    """
    meta = read_meta(folder) if meta is None else meta
    for split in SPLITS:
        for shard in meta.shards[split]:
            _verify(Path(folder), shard, meta, documents)


def _verify(folder: Path, shard: Shard, meta: Meta, documents: bool) -> None:
    path, expected = folder / f"{shard.name}.bin", shard.tokens * meta.dtype.itemsize
    digest, size = hashlib.sha256(), 0
    with contextlib.ExitStack() as held:
        ids = held.enter_context(_opened(path))
        sums = _Beside(folder / f"{shard.name}.crc", held)
        starts = _Beside(folder / f"{shard.name}.documents", held) if documents else None
        while data := ids.read(16 * BLOCK):
            digest.update(data)
            sums.compare(checksums(data))
            if starts:
                starts.compare(_starts(data, size, shard.tokens, meta))
            size += len(data)
        if size != expected:
            raise DataError(f"{path} holds {size:,} bytes, {META} says {expected:,}")
        if digest.hexdigest() != shard.sha256:
            raise DataError(f"{path} differs from the sha256 in {META}")
        for beside in filter(None, (sums, starts)):
            beside.end()


def _opened(path: Path) -> IO[bytes]:
    try:
        return open_regular(path, "rb", largest=2**63)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


class _Beside:
    """A file that follows from a shard's ids, held against them as they are read."""

    def __init__(self, path: Path, held: contextlib.ExitStack):
        self.path, self.file, self.same = path, held.enter_context(_opened(path)), True

    def compare(self, expected: np.ndarray) -> None:
        """With what the next ids make of it."""
        data = expected.tobytes()
        self.same &= self.file.read(len(data)) == data

    def end(self) -> None:
        """Raises DataError where it is not what all of the ids make of it."""
        if not self.same or self.file.read(1):
            raise DataError(f"{self.path} does not belong to its .bin; copy or write it again")


def checksums(data: bytes) -> np.ndarray:
    """What a .crc holds of each block."""
    blocks = (data[at : at + BLOCK] for at in range(0, len(data), BLOCK))
    return np.array([google_crc32c.value(block) for block in blocks], CHECKSUM)


def _starts(data: bytes, at: int, tokens: int, meta: Meta) -> np.ndarray:
    """Where the documents begin that follow the ends in these ids; at: bytes before them."""
    width = meta.dtype.itemsize
    ids = np.frombuffer(data, meta.dtype, len(data) // width)
    ends = np.flatnonzero(ids == meta.about["end_of_document"]) + at // width + 1
    first = [] if at else [0]
    return np.concatenate([first, ends[ends < tokens]]).astype(DOCUMENT)
