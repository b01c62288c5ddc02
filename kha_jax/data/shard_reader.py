"""Reads one stream of tokens over all shards of a split, in their order.

Files are read by `pread` and not by memory map: a file that is cut while it is read raises, where a
map would kill the process, and files need not stay open.
"""

import errno
import os
from pathlib import Path
from typing import IO, Any, Callable, Iterator, Sequence

import google_crc32c
import numpy as np

from kha_jax.data.shard_files import BLOCK, CHECKSUM, META, Meta, Place
from kha_jax.errors import DataError
from kha_jax.storage import Objects, is_url, open_regular

OPEN = 128  # files at most
AT_ONCE = 64  # blocks that are compared at once
DEADLINE = 20.0  # seconds in which a store must answer
CALLS = 3  # to a store for a batch: checksums, blocks, windows
REMEDY = "copy the shards again, or prepare the data again"
Asked = Sequence[tuple[str, int, int]]  # file, first byte, bytes
Wanted = Sequence[tuple[str, int, np.ndarray]]  # file, first byte, what is to be filled


class LocalFiles:
    """Parts of the files of a folder on this machine; a few of them stay open.

    Its methods raise OSError. A file that ends before what is asked for gives less.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.opened: dict[str, IO] = {}

    def sizes(self, names: Sequence[str]) -> list[int]:
        """Bytes of files."""
        return [os.stat(self.folder / name).st_size for name in names]

    def read(self, asked: Asked) -> list[bytes]:
        """The bytes of each."""
        return [self._call(os.pread, name, size, at) for name, at, size in asked]

    def fill(self, wanted: Wanted) -> list[int]:
        """Fills arrays; the number of bytes that each got."""
        return [self._call(os.preadv, name, [array], at) for name, at, array in wanted]

    def _call(self, read: Callable, name: str, what: Any, at: int) -> Any:
        file = self._opened(name)  # held by name until it was read, whoever drops it meanwhile
        return read(file.fileno(), what, at)

    def _opened(self, name: str) -> IO:
        file = self.opened.pop(name, None)
        if file is None:
            file = open_regular(self.folder / name, "rb", largest=2**63, buffering=0)
        self.opened[name] = file
        if len(self.opened) > OPEN:
            self.opened.pop(next(iter(self.opened)), None)
        return file


class StoredFiles:
    """The same of objects below a URL; what is asked for at once is read side by side.

    Its methods raise StorageError where the store does not answer.
    """

    def __init__(self, url: str):
        self.objects = Objects(url, DEADLINE)

    def sizes(self, names: Sequence[str]) -> list[int]:
        """See LocalFiles."""
        there = self.objects.listing()
        for name in names:
            if name not in there:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        return [there[name].bytes for name in names]

    def read(self, asked: Asked) -> list[bytes]:
        """See LocalFiles."""
        return self.objects.ranges(asked)

    def fill(self, wanted: Wanted) -> list[int]:
        """See LocalFiles."""
        found = self.read([(name, at, array.nbytes) for name, at, array in wanted])
        for data, (_, _, array) in zip(found, wanted):
            array[:] = np.frombuffer(data, array.dtype)
        return [len(data) for data in found]


class ShardReader:
    """Tokens of a split by their place in its stream. length: tokens of the stream.

    Opening compares the sizes of the files with meta.json and reads none of them. A block of 256
    KiB is compared with its checksum when it is first read.

    Raises:
        DataError: a shard is missing, or of another size.
        StorageError: a store does not answer.
    """

    def __init__(self, folder: Place, split: str, meta: Meta, remedy: str = REMEDY):
        self.folder, self.meta, self.remedy = folder, meta, remedy
        self.files = StoredFiles(str(folder)) if is_url(str(folder)) else LocalFiles(folder)
        self.dtype, shards = meta.dtype, meta.shards[split]
        self.names = [f"{shard.name}.bin" for shard in shards]
        self.tokens = [shard.tokens for shard in shards]
        self.ends = np.cumsum(self.tokens, dtype=np.int64)
        self.starts = (self.ends - np.array(self.tokens, np.int64)).tolist()
        self.length = sum(self.tokens)
        # of each shard a byte a block, 1 once it was compared; made when it is first read
        self.compared: list[bytearray] = [bytearray()] * len(self.names)
        self._check_sizes()

    def _check_sizes(self) -> None:
        try:
            sizes = self.files.sizes(self.names)
        except OSError as error:
            raise self._unreadable(error) from None
        for name, tokens, found in zip(self.names, self.tokens, sizes):
            expected = tokens * self.dtype.itemsize
            if found != expected:
                raise self.harmed(name, f"holds {found:,} bytes, {META} says {expected:,}")

    def harmed(self, name: str, what: str) -> DataError:
        """The error of a file that is not as it was written."""
        return DataError(f"{self.folder}/{name} {what}; {self.remedy}")

    def _unreadable(self, error: OSError) -> DataError:
        name = os.path.basename(error.filename or "")
        why = "is missing" if error.errno == errno.ENOENT else f"cannot be read ({error.strerror})"
        return self.harmed(name, why)

    def read_into(self, begins: np.ndarray, out: np.ndarray) -> None:
        """Fills row i of `out` [rows, count] with the tokens from begins[i] on; where the stream
        ends before, the rest of a row stays as it is.

        Raises:
            DataError: a file is cut, missing or changed, or holds an id beyond the vocabulary.
            StorageError: a store does not answer.
        """
        parts = list(self._parts(begins, out))
        width = self.dtype.itemsize
        try:
            if new := self._new_blocks(parts):
                self._compare(new)
            wanted = [(self.names[number], at * width, some) for number, at, some in parts]
            got = self.files.fill(wanted)
        except OSError as error:
            raise self._unreadable(error) from None
        for size, (name, at, some) in zip(got, wanted):
            if size != some.nbytes:
                end = at // width + len(some)
                raise self.harmed(name, f"ends before token {end:,}; it was cut")
        if out.size and out.max() >= self.meta.vocabulary_size:
            self._name_id(begins, out)

    def _parts(self, begins: np.ndarray, out: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
        """(shard, place in it, what to fill) of each row; several where it spans shards."""
        count, first = out.shape[1], np.searchsorted(self.ends, begins, side="right")
        for begin, number, row in zip(begins.tolist(), first.tolist(), out):
            done = 0
            while done < count and number < len(self.names):
                at = begin + done - self.starts[number]
                size = min(count - done, self.tokens[number] - at)
                if size:
                    yield number, at, row if size == count else row[done : done + size]
                done, number = done + size, number + 1

    def _new_blocks(self, parts: Sequence[tuple[int, int, np.ndarray]]) -> list[tuple[int, int]]:
        """(shard, block) of those that nobody has compared yet."""
        width, new = self.dtype.itemsize, set()
        for number, at, some in parts:
            first, last = at * width // BLOCK, ((at + len(some)) * width - 1) // BLOCK
            compared = self.compared[number]
            if not compared:
                size = self.tokens[number] * width
                compared = self.compared[number] = bytearray(-(-size // BLOCK))
            if compared.find(0, first, last + 1) >= 0:
                new |= {(number, block) for block in range(first, last + 1) if not compared[block]}
        return sorted(new)

    def _compare(self, blocks: Sequence[tuple[int, int]]) -> None:
        """Compares blocks with their checksums."""
        for begin in range(0, len(blocks), AT_ONCE):
            some = blocks[begin : begin + AT_ONCE]
            checksums = [self._checksum(*block) for block in some]
            places = [self._place(*block) for block in some]
            found = zip(some, places, self.files.read(checksums), self.files.read(places))
            for (number, block), (name, at, size), stored, data in found:
                if len(stored) != CHECKSUM.itemsize:
                    raise self.harmed(self._checksum(number, block)[0], "is cut")
                if len(data) != size:
                    raise self.harmed(name, f"ends before byte {at + size:,}; it was cut")
                if google_crc32c.value(data) != int.from_bytes(stored, "little"):
                    where = f"bytes {at:,} to {at + size:,}"
                    raise self.harmed(name, f"differs from its checksum in {where}")
                self.compared[number][block] = 1

    def _checksum(self, number: int, block: int) -> tuple[str, int, int]:
        """Where that of a block is: (file, first byte, bytes)."""
        name = self.names[number].removesuffix(".bin") + ".crc"
        return name, block * CHECKSUM.itemsize, CHECKSUM.itemsize

    def _place(self, number: int, block: int) -> tuple[str, int, int]:
        """Where a block is."""
        size = self.tokens[number] * self.dtype.itemsize
        return self.names[number], block * BLOCK, min(BLOCK, size - block * BLOCK)

    def _name_id(self, begins: np.ndarray, out: np.ndarray) -> None:
        row, column = np.argwhere(out >= self.meta.vocabulary_size)[0].tolist()
        place = int(begins[row]) + column
        number = int(np.searchsorted(self.ends, place, side="right"))
        at, found = place - self.starts[number], out[row, column]
        size = self.meta.vocabulary_size
        what = f"holds id {found} at token {at:,}, beyond the vocabulary of {size:,}"
        raise self.harmed(self.names[number], what)
