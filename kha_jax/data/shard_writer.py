"""Writes token shards, one by one, whole or not at all; see shard_files for what they hold."""

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence

import numpy as np

from kha_jax.data import tokenizer_files
from kha_jax.data.shard_files import (
    BLOCK,
    DOCUMENT,
    META,
    SPLITS,
    SUFFIXES,
    VERSION,
    Meta,
    Shard,
    checksums,
    id_type,
)
from kha_jax.data.tokenizers import Tokenizer
from kha_jax.errors import DataError, StorageError
from kha_jax.storage import (
    not_followed,
    synced,
    write_json,
)


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
        with writing(self.folder):
            for suffix in SUFFIXES:
                self.files[suffix] = open(self._part(suffix), "wb", opener=not_followed)

    def _part(self, suffix: str) -> Path:
        return self.folder / f"{self.name}{suffix}.part"

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *raised: Any) -> None:
        for suffix, file in self.files.items():
            with contextlib.suppress(OSError):  # a full disk, of which the block has told
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
        with writing(self.folder):
            self.files[".bin"].write(data)
            self.files[".documents"].write(starts.astype(DOCUMENT).tobytes())
            self._checksums(data)
        self.digest.update(data)
        self.tokens += len(ids)
        self.documents += len(starts)

    def _checksums(self, data: bytes, last: bool = False) -> None:
        data = self.rest + data
        whole = len(data) if last else len(data) // BLOCK * BLOCK
        self.files[".crc"].write(checksums(data[:whole]).tobytes())
        self.rest = data[whole:]

    def finish(self) -> Shard:
        """Puts the shard on disk and in its place; its entry of meta.json."""
        assert not self.inside, "a document has not come to its last piece"
        with writing(self.folder):
            self._checksums(b"", last=True)
            for file in self.files.values():
                file.flush()
                os.fsync(file.fileno())
                file.close()
            for suffix in SUFFIXES:
                self._part(suffix).replace(self.folder / f"{self.name}{suffix}")
            synced(self.folder)
        self.files = {}
        sha256 = self.digest.hexdigest()
        return Shard(self.name, self.tokens, self.documents, self.bytes, sha256)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Says in one line what the system says of a folder that is written."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {error.strerror or error}") from None


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
    about = tokenizer_files.about(tokenizer)
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
    with writing(folder):
        tokenizer_files.write_file(folder, tokenizer)
        write_json(folder / META, content)
        synced(folder)
    return meta
