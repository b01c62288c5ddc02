"""Reads one stream of tokens over all shards of a split, in their order.

Files are read by `pread` and not by memory map: a file that is cut while it is read raises, where a
map would kill the process, and files need not stay open.
"""

import errno
import os
from pathlib import Path
from typing import IO

import google_crc32c
import numpy as np

from kha_jax.data.shard_files import BLOCK, CHECKSUM, META, Meta
from kha_jax.errors import DataError
from kha_jax.storage import open_regular

OPEN = 128  # files at most
REMEDY = "copy the shards again, or prepare the data again"


class LocalFiles:
    """Reads parts of the files of a folder on this machine; a few of them stay open."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.opened: dict[str, IO] = {}

    def size(self, name: str) -> int:
        """Bytes of a file. Raises OSError."""
        return os.stat(self.folder / name).st_size

    def read_into(self, name: str, at: int, view: np.ndarray) -> bool:
        """Fills the array from a byte on; False where the file ends before. Raises OSError."""
        # An entry that is dropped is closed once no other thread reads it.
        file = self.opened.pop(name, None) or self._open(name)
        self.opened[name] = file
        if len(self.opened) > OPEN:
            self.opened.pop(next(iter(self.opened)), None)
        return os.preadv(file.fileno(), [view], at) == view.nbytes

    def read(self, name: str, at: int, size: int) -> bytes:
        """Up to `size` bytes of a file that does not stay open. Raises OSError."""
        with self._open(name) as file:
            return os.pread(file.fileno(), size, at)

    def _open(self, name: str) -> IO:
        return open_regular(self.folder / name, "rb", largest=2**63, buffering=0)


class ShardReader:
    """Tokens of a split by their place in its stream. length: tokens of the stream.

    Opening compares the sizes of the files with meta.json and reads none of them. A block of 256
    KiB is compared with its checksum when it is first read.

    Raises:
        DataError: a shard is missing, or of another size.
    """

    def __init__(self, folder: Path, split: str, meta: Meta, remedy: str = REMEDY):
        self.folder, self.meta, self.remedy = folder, meta, remedy
        self.files = LocalFiles(folder)
        self.dtype = meta.dtype
        self.names = [f"{shard.name}.bin" for shard in meta.shards[split]]
        self.tokens = [shard.tokens for shard in meta.shards[split]]
        self.ends = np.cumsum(self.tokens, dtype=np.int64)
        self.starts = (self.ends - np.array(self.tokens, np.int64)).tolist()
        self.length = sum(self.tokens)
        # of each shard a byte a block, 1 once it was compared; made when it is first read
        self.compared: list[bytearray | None] = [None] * len(self.names)
        for name, tokens in zip(self.names, self.tokens):
            self._check_size(name, tokens * self.dtype.itemsize)

    def _check_size(self, name: str, expected: int) -> None:
        try:
            found = self.files.size(name)
        except OSError as error:
            raise self._unreadable(name, error) from None
        if found != expected:
            raise self.harmed(name, f"holds {found:,} bytes, {META} says {expected:,}")

    def harmed(self, name: str, what: str) -> DataError:
        """The error of a file that is not as it was written."""
        return DataError(f"{self.folder / name} {what}; {self.remedy}")

    def _unreadable(self, name: str, error: OSError) -> DataError:
        why = "is missing" if error.errno == errno.ENOENT else f"cannot be read ({error.strerror})"
        return self.harmed(name, why)

    def read_into(self, begins: np.ndarray, out: np.ndarray) -> None:
        """Fills row i of `out` [rows, count] with the tokens from begins[i] on; where the stream
        ends before, the rest of a row stays as it is.

        Raises:
            DataError: a file is cut, missing or changed, or holds an id beyond the vocabulary.
        """
        count, first = out.shape[1], np.searchsorted(self.ends, begins, side="right")
        for begin, number, row in zip(begins.tolist(), first.tolist(), out):
            done = 0
            while done < count and number < len(self.names):
                at = begin + done - self.starts[number]
                size = min(count - done, self.tokens[number] - at)
                if size:
                    self._read(number, at, row if size == count else row[done : done + size])
                done, number = done + size, number + 1
        if out.size and out.max() >= self.meta.vocabulary_size:
            self._name_id(begins, out)

    def _read(self, number: int, at: int, out: np.ndarray) -> None:
        """Fills the array with tokens of one shard."""
        name, width = self.names[number], self.dtype.itemsize
        first, last = at * width // BLOCK, ((at + len(out)) * width - 1) // BLOCK
        compared = self.compared[number]
        try:
            if compared is None or compared.find(0, first, last + 1) >= 0:
                self._compare(number, first, last)
            whole = self.files.read_into(name, at * width, out)
        except OSError as error:
            raise self._unreadable(name, error) from None
        if not whole:
            raise self.harmed(name, f"ends before token {at + len(out):,}; it was cut")

    def _compare(self, number: int, first: int, last: int) -> None:
        """Compares blocks with their checksums."""
        name, size = self.names[number], self.tokens[number] * self.dtype.itemsize
        checksums = name.removesuffix(".bin") + ".crc"
        compared = self.compared[number] or bytearray(-(-size // BLOCK))
        try:
            stored = self.files.read(
                checksums, first * CHECKSUM.itemsize, (last + 1 - first) * CHECKSUM.itemsize
            )
        except OSError as error:
            raise self._unreadable(checksums, error) from None
        if len(stored) != (last + 1 - first) * CHECKSUM.itemsize:
            raise self.harmed(checksums, f"ends before block {last}; it was cut")
        for block, expected in enumerate(np.frombuffer(stored, CHECKSUM).tolist(), first):
            begin, end = block * BLOCK, min((block + 1) * BLOCK, size)
            data = np.empty(end - begin, np.uint8)
            if not self.files.read_into(name, begin, data):
                raise self.harmed(name, f"ends before byte {end:,}; it was cut")
            if google_crc32c.value(data.tobytes()) != expected:
                where = f"bytes {begin:,} to {end:,}"
                raise self.harmed(name, f"differs from its checksum in {where}")
            compared[block] = 1
        self.compared[number] = compared

    def _name_id(self, begins: np.ndarray, out: np.ndarray) -> None:
        row, column = np.argwhere(out >= self.meta.vocabulary_size)[0].tolist()
        place = int(begins[row]) + column
        number = int(np.searchsorted(self.ends, place, side="right"))
        at, found = place - self.starts[number], out[row, column]
        size = self.meta.vocabulary_size
        what = f"holds id {found} at token {at:,}, beyond the vocabulary of {size:,}"
        raise self.harmed(self.names[number], what)
