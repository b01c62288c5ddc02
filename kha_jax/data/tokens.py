"""Flat token streams on disk: written once, read by memory map.

A stream is a folder with `tokens.bin` (little-endian integers, documents one after another, each
ended by the tokenizer's end-of-document id), `documents.npy` (the int64 offset where each document
starts) and `meta.json`, written last.
"""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Iterable

import numpy as np

from kha_jax.data.loader import DataError, Example


class ByteTokenizer:
    """UTF-8 bytes as they are, then <end of document>, then seven reserved ids so that the
    vocabulary divides by 8."""

    vocabulary_size = 264
    end_of_document = 256
    fingerprint = "bytes-v1"

    def encode(self, text: bytes) -> np.ndarray:
        """[length] uint16 ids of a document, without its end."""
        return np.frombuffer(text, np.uint8).astype(np.uint16)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the byte ids; special ids are dropped."""
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


def cache_folder(name: str) -> Path:
    """A folder for what can be made again: $KHA_JAX_CACHE/name, by default below the user's cache
    folder."""
    base = (
        os.environ.get("KHA_JAX_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kha_jax"
    )
    return Path(base) / name


def write_stream(folder: Path, documents: Iterable[bytes], tokenizer: ByteTokenizer) -> None:
    """Tokenises documents into `folder`, which appears complete or not at all; one that is complete
    is left as it is."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        starts, tokens, text_bytes, digest = [], 0, 0, hashlib.sha256()
        end = np.array([tokenizer.end_of_document], np.uint16)
        with open(temporary / "tokens.bin", "wb") as file:
            for text in documents:
                data = np.concatenate([tokenizer.encode(text), end]).astype("<u2").tobytes()
                file.write(data)
                digest.update(data)
                starts.append(tokens)
                tokens += len(data) // 2
                text_bytes += len(text)
        np.save(temporary / "documents.npy", np.array(starts, np.int64))
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
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1))
        try:
            temporary.rename(folder)
        except OSError:  # what another process has made in the meantime stays: it may be reading it
            if not (folder / "meta.json").exists():
                shutil.rmtree(folder)
                temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class TokenWindows:
    """Fixed-length windows over a token stream; a `loader.Source`.

    Window i reads tokens [i T, (i + 1) T]. Its documents get segment ids 0, 1, ... in order,
    positions restart in each, and a token whose successor belongs to another document has weight 0.

    Raises:
        DataError: when the folder is not a stream or its size is not what meta.json says.
    """

    def __init__(self, folder: Path, seq_len: int):
        self.folder, self.seq_len = Path(folder), seq_len
        try:
            self.meta: dict[str, Any] = json.loads((self.folder / "meta.json").read_text())
            self.starts = np.load(self.folder / "documents.npy", allow_pickle=False)
            self.tokens = np.memmap(self.folder / "tokens.bin", dtype="<u2", mode="r")
        except (OSError, ValueError) as error:
            raise DataError(f"{self.folder} is not a token stream: {error}") from None
        if len(self.tokens) != self.meta["tokens"]:
            message = (
                f"holds {len(self.tokens)} tokens, meta.json says {self.meta['tokens']}; remove "
                "the folder to make it again"
            )
            raise DataError(f"{self.folder / 'tokens.bin'} {message}")
        self.bytes_per_token = self.meta["bytes"] / self.meta["tokens"]
        self.fingerprint = self.meta["sha256"]

    def __str__(self):
        return str(self.folder)

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - 1) // self.seq_len)

    def __getitem__(self, index: int) -> Example:
        begin, T = int(index) * self.seq_len, self.seq_len
        tokens = np.asarray(self.tokens[begin : begin + T + 1], np.int32)
        document = np.searchsorted(self.starts, np.arange(begin, begin + T + 1), side="right") - 1
        start_in_window = np.maximum(self.starts[document[:T]] - begin, 0)
        return {
            "tokens": tokens[:T],
            "targets": tokens[1:],
            "positions": (np.arange(T) - start_in_window).astype(np.int32),
            "segment_ids": (document[:T] - document[0]).astype(np.int32),
            "weights": (document[:T] == document[1:]).astype(np.float32),
        }
