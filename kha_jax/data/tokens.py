"""Flat token streams on disk: written once, read by memory map.

A stream is a folder with `tokens.bin` (little-endian integers, documents one after another, each
ended by the tokenizer's end-of-document id), `documents.npy` (the int64 offset where each document
starts) and `meta.json`, written last.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, Iterable

import numpy as np

from kha_jax.data.loader import Example
from kha_jax.data.tokenizers import ByteTokenizer
from kha_jax.errors import DataError, StorageError
from kha_jax.storage import being_built, open_regular, read_json

ID = np.dtype("<u2")
CHUNK = 2**23  # tokens that are checked at once
NAMED = 16  # characters of the hash that a folder's name has
META = {
    "dtype": str,
    "tokens": int,
    "bytes": int,
    "documents": int,
    "sha256": str,
    "vocabulary_size": int,
    "tokenizer": str,
    "end_of_document": int,
}


def write_stream(
    base: Path, name: str, documents: Iterable[bytes], tokenizer: ByteTokenizer
) -> Path:
    """Tokenises documents into a folder below `base`, which appears complete or not at all, and is
    called after its content: NAME-HASH. One that is complete is left as it is.

    Raises:
        StorageError: the folder cannot be written.
    """
    try:
        base.mkdir(parents=True, exist_ok=True)
        with being_built(base, name) as temporary:
            sha256 = _write_files(temporary, documents, tokenizer)
            folder = base / f"{name}-{sha256[:NAMED]}"
            _put_in_place(temporary, folder)
    except OSError as error:
        raise StorageError(
            f"{base} cannot be written: {error.strerror or error}; name another place with "
            "KHA_JAX_CACHE or config.data.cache_dir"
        ) from None
    return folder


def _write_files(folder: Path, documents: Iterable[bytes], tokenizer: ByteTokenizer) -> str:
    """The files of a stream, meta.json last; the hash of the tokens."""
    starts, tokens, text_bytes, digest = [], 0, 0, hashlib.sha256()
    end = np.array([tokenizer.end_of_document], np.uint16)
    with open(folder / "tokens.bin", "wb") as file:
        for text in documents:
            data = np.concatenate([tokenizer.encode(text), end]).astype(ID).tobytes()
            file.write(data)
            digest.update(data)
            starts.append(tokens)
            tokens += len(data) // ID.itemsize
            text_bytes += len(text)
    np.save(folder / "documents.npy", np.array(starts, np.int64))
    meta = {
        "dtype": "uint16",
        "tokens": tokens,
        "bytes": text_bytes,
        "documents": len(starts),
        "sha256": digest.hexdigest(),
        "vocabulary_size": tokenizer.vocabulary_size,
        "tokenizer": tokenizer.fingerprint,
        "end_of_document": tokenizer.end_of_document,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))
    return digest.hexdigest()


def _put_in_place(temporary: Path, folder: Path) -> None:
    try:
        temporary.rename(folder)
    except OSError:  # what another process has made in the meantime stays: it may be reading it
        if not (folder / "meta.json").exists():
            shutil.rmtree(folder)
            temporary.rename(folder)


def _usable(value: Any, kind: type) -> bool:
    """Whether an entry of meta.json is a text, or a count."""
    return isinstance(value, kind) and (kind is str or 0 <= value < 2**63)


class TokenWindows:
    """Fixed-length windows over a token stream; a `loader.Source`.

    Window i reads tokens [i T, (i + 1) T]. Its documents get segment ids 0, 1, ... in order,
    positions restart in each, and a token whose successor belongs to another document has weight 0.
    The stream is read whole when it is opened, to compare it with its checksum; afterwards from the
    file and not by memory map, so that a file which is cut while it is read raises and does not
    kill the process.

    Raises:
        DataError: when the folder is not a stream, is not what meta.json says, was made by another
            tokenizer, or holds an id beyond its vocabulary.
    """

    def __init__(self, folder: Path, seq_len: int, tokenizer: str = ByteTokenizer.fingerprint):
        self.folder, self.seq_len = Path(folder), seq_len
        self.path = self.folder / "tokens.bin"
        try:
            self.meta = read_json(self.folder / "meta.json")
            self.starts = np.load(self.folder / "documents.npy", allow_pickle=False)
            self.file = open_regular(self.path, "rb", largest=2**63)
            wrong = next((k for k, t in META.items() if not _usable(self.meta[k], t)), None)
        except Exception as error:  # files of any content raise whatever their parsers do
            raise DataError(f"{self.folder} is not a token stream: {error!r}") from None
        if wrong or self.meta["dtype"] != "uint16":
            raise self._changed("meta.json", f"holds no usable {wrong or 'dtype'}")
        if self.meta["tokenizer"] != tokenizer:
            raise DataError(
                f"{self.folder} was made by the tokenizer {self.meta['tokenizer']!r}, this run's "
                f"is {tokenizer!r}"
            )
        self.length = os.fstat(self.file.fileno()).st_size // ID.itemsize
        self._check()
        self.bytes_per_token = self.meta["bytes"] / self.length
        self.fingerprint = self.meta["sha256"]

    def _changed(self, name: str, what: str) -> DataError:
        return DataError(f"{self.folder / name} {what}; remove the folder to make it again")

    def _check(self) -> None:
        if self.length != self.meta["tokens"] or not self.length:
            says = f"holds {self.length} tokens, meta.json says {self.meta['tokens']}"
            raise self._changed("tokens.bin", says)
        digest, ends = hashlib.sha256(), []
        for begin in range(0, self.length, CHUNK):
            ids = self.read(begin, min(CHUNK, self.length - begin))
            digest.update(ids.tobytes())
            ends.append(begin + np.flatnonzero(ids == self.meta["end_of_document"]))
        if digest.hexdigest() != self.meta["sha256"]:
            raise self._changed("tokens.bin", "differs from the checksum in meta.json")
        if not np.array_equal(self.starts, np.append(0, np.concatenate(ends)[:-1] + 1)):
            raise self._changed("documents.npy", "is not where the documents of tokens.bin begin")

    def read(self, begin: int, count: int) -> np.ndarray:
        """Tokens [begin, begin + count), little-endian integers.

        Raises:
            DataError: the file ends before, or holds an id beyond the vocabulary.
        """
        data = os.pread(self.file.fileno(), count * ID.itemsize, begin * ID.itemsize)
        if len(data) != count * ID.itemsize:
            raise self._changed("tokens.bin", f"ends before token {begin + count}; it was cut")
        ids = np.frombuffer(data, ID)
        if ids.max(initial=0) >= self.meta["vocabulary_size"]:
            at = int(np.argmax(ids >= self.meta["vocabulary_size"]))
            raise DataError(
                f"{self.path} holds id {ids[at]} at token {begin + at}, beyond the vocabulary of "
                f"{self.meta['vocabulary_size']}"
            )
        return ids

    def __str__(self):
        return str(self.folder)

    def __len__(self) -> int:
        return max(0, (self.length - 1) // self.seq_len)

    def __getitem__(self, index: int) -> Example:
        begin, T = int(index) * self.seq_len, self.seq_len
        tokens = self.read(begin, T + 1).astype(np.int32)
        document = np.searchsorted(self.starts, np.arange(begin, begin + T + 1), side="right") - 1
        start_in_window = np.maximum(self.starts[document[:T]] - begin, 0)
        return {
            "tokens": tokens[:T],
            "targets": tokens[1:],
            "positions": (np.arange(T) - start_in_window).astype(np.int32),
            "segment_ids": (document[:T] - document[0]).astype(np.int32),
            "weights": (document[:T] == document[1:]).astype(np.float32),
        }
