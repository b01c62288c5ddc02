"""Token shards on disk: written one by one, whole or not at all.

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
import os
import re
from pathlib import Path
from typing import Any, Iterator, Mapping, NamedTuple, Sequence

import google_crc32c
import numpy as np

from kha_jax.data import tokenizers
from kha_jax.data.tokenizers import Tokenizer
from kha_jax.errors import DataError, StorageError
from kha_jax.storage import (
    Objects,
    is_url,
    not_followed,
    open_regular,
    read_json,
    write_json,
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


class ShardWriter:
    """Writes one shard of documents, without begin and end: those are added here.

    Files stand aside under the name of the shard and `.part` until `finish` has them on disk and
    renames them, `.bin` last; what a killed writer has left is overwritten. As a context it removes
    them where `finish` was not reached.

        with ShardWriter(folder, "train", 12, tokenizer) as writer:
            writer.add(tokenizer.encode(text), len(text))
            shard = writer.finish()

    Raises:
        StorageError: the folder cannot be written.
        DataError: an id is beyond the vocabulary, or that of the end or begin.
    """

    def __init__(self, folder: Path, split: str, number: int, tokenizer: Tokenizer):
        self.folder, self.name = Path(folder), f"{split}-{number:05d}"
        self.tokenizer, self.dtype = tokenizer, id_type(tokenizer.vocabulary_size)
        self.tokens, self.documents, self.bytes = 0, 0, 0
        self.digest, self.rest = hashlib.sha256(), b""
        self.inside = False  # of a document whose pieces are still coming
        self.files: dict[str, Any] = {}
        with _writing(self.folder):
            for suffix in SUFFIXES:
                self.files[suffix] = open(self._part(suffix), "wb", opener=not_followed)

    def _part(self, suffix: str) -> Path:
        return self.folder / f"{self.name}{suffix}.part"

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *raised: Any) -> None:
        for suffix, file in self.files.items():
            file.close()
            self._part(suffix).unlink(missing_ok=True)

    def add(self, ids: np.ndarray, text_bytes: int) -> None:
        """One document."""
        self.add_all(ids, np.array([len(ids)]), text_bytes)

    def add_all(self, ids: np.ndarray, lengths: Sequence[int], text_bytes: int) -> None:
        """Several documents.

        ids: one after another, lengths: how many are of each, text_bytes: of all of them.
        """
        self._check(ids)
        lengths = np.asarray(lengths, np.int64)
        ends = np.cumsum(lengths)
        begins = ends - lengths
        marks = [self.tokenizer.begin_of_document, self.tokenizer.end_of_document]
        places = np.stack([begins, ends], 1)
        if marks[0] is None:
            marks, places = marks[1:], places[:, 1:]
        values = np.tile(marks, len(lengths)).astype(self.dtype)
        whole = np.insert(ids.astype(self.dtype), places.ravel(), values)
        self._put(whole, self.tokens + begins + len(marks) * np.arange(len(lengths)))
        self.bytes += text_bytes

    def add_piece(self, ids: np.ndarray, text_bytes: int, last: bool) -> None:
        """The next piece of a document that comes in pieces; last: it ends with this one."""
        self._check(ids)
        begin, end = self.tokenizer.begin_of_document, self.tokenizer.end_of_document
        first = [] if self.inside or begin is None else [begin]
        whole = np.concatenate([first, ids, [end] if last else []]).astype(self.dtype)
        self._put(whole, np.array([] if self.inside else [self.tokens]))
        self.inside, self.bytes = not last, self.bytes + text_bytes

    def _check(self, ids: np.ndarray) -> None:
        """The rule that lets readers find documents by the end's id alone."""
        tokenizer = self.tokenizer
        special = {tokenizer.end_of_document, tokenizer.begin_of_document} - {None}
        for number in sorted(special):
            if (ids == number).any():
                at = int(np.argmax(ids == number))
                raise DataError(
                    f"{self.name}: a text encodes to id {number} at its token {at}, which begins "
                    "or ends documents; name another end or begin"
                )
        if ids.size and ids.max() >= tokenizer.vocabulary_size:
            raise DataError(
                f"{self.name}: id {ids.max()} is beyond the vocabulary of "
                f"{tokenizer.vocabulary_size}"
            )

    def _put(self, ids: np.ndarray, starts: np.ndarray) -> None:
        data = ids.tobytes()
        with _writing(self.folder):
            self.files[".bin"].write(data)
            self.files[".documents"].write(starts.astype(DOCUMENT).tobytes())
            self._checksums(data)
        self.digest.update(data)
        self.tokens += len(ids)
        self.documents += len(starts)

    def _checksums(self, data: bytes, last: bool = False) -> None:
        data = self.rest + data
        whole = len(data) if last else len(data) // BLOCK * BLOCK
        self.files[".crc"].write(_checksums(data[:whole]).tobytes())
        self.rest = data[whole:]

    def finish(self) -> Shard:
        """Puts the shard on disk and in its place; its entry of meta.json."""
        assert not self.inside, "a document has not come to its last piece"
        with _writing(self.folder):
            self._checksums(b"", last=True)
            for file in self.files.values():
                file.flush()
                os.fsync(file.fileno())
                file.close()
            for suffix in SUFFIXES:
                self._part(suffix).replace(self.folder / f"{self.name}{suffix}")
            _sync(self.folder)
        self.files = {}
        sha256 = self.digest.hexdigest()
        return Shard(self.name, self.tokens, self.documents, self.bytes, sha256)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Says in one line what the system says of a folder that is written."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {error.strerror or error}") from None


def _checksums(data: bytes) -> np.ndarray:
    """crc32c of each block."""
    blocks = (data[at : at + BLOCK] for at in range(0, len(data), BLOCK))
    return np.array([google_crc32c.value(block) for block in blocks], CHECKSUM)


def _sync(folder: Path) -> None:
    """Renames are on disk when this returns."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Meta(NamedTuple):
    """What meta.json says. about: of the tokenizer, see `tokenizers.about`. shards: of each split.
    flags: of the command that wrote them. left_out: how many texts of each kind."""

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
        said = {name: self.about[name] for name in tokenizers.ABOUT if name != "probe_ids"}
        content = json.dumps([VERSION, said, shards], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def write_meta(
    folder: Path,
    tokenizer: Tokenizer,
    shards: Mapping[str, Sequence[Shard]],
    flags: Mapping[str, Any] | None = None,
    left_out: Mapping[str, int] | None = None,
) -> Meta:
    """Finishes a folder: its tokenizer.json, then meta.json.

    Args:
        shards: of the splits `train` and `validation`, in their order.
        flags: of the command, as JSON holds them.
        left_out: how many documents were left out, by reason.

    Raises:
        StorageError: the folder cannot be written.
    """
    folder = Path(folder)
    splits = {split: tuple(shards.get(split, ())) for split in SPLITS}
    about = tokenizers.about(tokenizer)
    meta = Meta(about, splits, dict(flags or {}), dict(left_out or {}))
    counts = ("tokens", "documents", "bytes")
    content = {
        "version": VERSION,
        "dtype": meta.dtype.name,
        **about,
        "shards": {split: [shard._asdict() for shard in some] for split, some in splits.items()},
        "totals": {s: {field: meta.total(s, field) for field in counts} for s in SPLITS},
        "flags": meta.flags,
        "left_out": meta.left_out,
    }
    with _writing(folder):
        tokenizers.write_file(folder, tokenizer)
        write_json(folder / META, content)
        _sync(folder)
    return meta


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
        {name: values[name] for name in tokenizers.ABOUT},
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
    for name, kind in tokenizers.ABOUT.items():
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


def verify(folder: Path, meta: Meta | None = None) -> None:
    """Compares every shard with its size and sha256, which reads all of them.

    Raises:
        DataError: names the file that is missing, cut or changed.
    """
    meta = read_meta(folder) if meta is None else meta
    for split in SPLITS:
        for shard in meta.shards[split]:
            _verify(Path(folder) / f"{shard.name}.bin", shard, meta.dtype)


def _verify(path: Path, shard: Shard, dtype: np.dtype) -> None:
    digest, size, expected = hashlib.sha256(), 0, shard.tokens * dtype.itemsize
    try:
        with open_regular(path, "rb", largest=2**63) as file:
            while data := file.read(2**22):
                digest.update(data)
                size += len(data)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    if size != expected:
        raise DataError(f"{path} holds {size:,} bytes, {META} says {expected:,}")
    if digest.hexdigest() != shard.sha256:
        raise DataError(f"{path} differs from the sha256 in {META}")
