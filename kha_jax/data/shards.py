"""Token shards as a source: what `prepare_data` has written, cut into windows.

Legend: B batch, T position.
"""

import numpy as np

from kha_jax.config import ConfigError
from kha_jax.data import tokenizer_files
from kha_jax.data.loader import DataConfig, Example
from kha_jax.data.shard_copy import copied
from kha_jax.data.shard_files import Meta, Place, read_meta
from kha_jax.data.shard_reader import CALLS, DEADLINE, REMEDY, ShardReader
from kha_jax.data.tokenizers import Tokenizer
from kha_jax.errors import DataError, StorageError
from kha_jax.storage import as_written, buckets, is_url

OPENED: dict[str, Meta] = {}  # what this process has opened below URLs


class TokenWindows:
    """Fixed-length windows over the tokens of a split; a `loader.Source`.

    Window i reads tokens [i T, (i + 1) T]. Its documents get segment ids 0, 1, ... in order,
    positions restart in each, and the end of a document, whose successor belongs to another one,
    has weight 0. All of that comes from the end's id in the window alone. The last window is filled
    up with ends.

    Args:
        folder: of the shards.
        meta: what its meta.json says.
        split: `train` or `validation`.
        seq_len: T.
        tail: False leaves out the last window where tokens are missing in it.
        remedy: what helps when a file is harmed.

    Raises:
        DataError: when it is opened: a shard is missing, or of another size. When it is read: one
            was cut or changed, or holds an id beyond the vocabulary.
    """

    def __init__(
        self,
        folder: Place,
        meta: Meta,
        split: str,
        seq_len: int,
        *,
        tail: bool = True,
        remedy: str = REMEDY,
    ):
        self.folder, self.meta, self.split, self.seq_len = folder, meta, split, seq_len
        self.reader = ShardReader(folder, split, meta, remedy)
        self.length, self.documents = self.reader.length, meta.total(split, "documents")
        self.windows = -(-self.length // seq_len) if tail else max(0, (self.length - 1) // seq_len)
        self.fingerprint = meta.fingerprint(split)
        self.bytes_per_token = meta.total(split, "bytes") / self.length if self.length else None

    def __str__(self):
        return str(self.folder)

    def __len__(self) -> int:
        return self.windows

    def __getitem__(self, index: int) -> Example:
        return {name: rows[0] for name, rows in self.rows([index]).items()}

    def rows(self, indices) -> Example:
        """The windows of these numbers, each array [B, T].

        Raises:
            IndexError: there is no window of that number.
            DataError: see the class.
        """
        T, end = self.seq_len, self.meta.about["end_of_document"]
        windows = np.asarray(indices, np.int64)
        if windows.size and not 0 <= windows.min() <= windows.max() < self.windows:
            raise IndexError(f"{self} has windows 0 to {self.windows - 1}, not {indices}")
        begins = windows * T
        shape = len(begins), T + 1
        if begins.max(initial=0) + T + 1 > self.length:
            row_BT = np.full(shape, end, self.reader.dtype)
        else:
            row_BT = np.empty(shape, self.reader.dtype)
        self.reader.read_into(begins, row_BT)
        return {
            "tokens": row_BT[:, :-1].astype(np.int32),
            "targets": row_BT[:, 1:].astype(np.int32),
            **_documents(row_BT[:, :-1] == end),
        }

    def read(self, begin: int, count: int) -> np.ndarray:
        """Tokens [begin, begin + count) of the stream.

        Raises:
            DataError: see the class.
        """
        out = np.empty((1, min(count, self.length - begin)), self.reader.dtype)
        self.reader.read_into(np.array([begin]), out)
        return out[0]


def _documents(ends_BT: np.ndarray) -> Example:
    """Positions, segment ids and weights of windows in which documents end at these places."""
    B, T = ends_BT.shape
    marks = np.ones(B * T + 1, bool)  # where one begins, and where the last one has ended
    marks[:-1].reshape(B, T)[:, 1:] = ends_BT[:, :-1]
    places = np.flatnonzero(marks)
    begins, lengths = places[:-1], np.diff(places)
    firsts = np.searchsorted(begins, np.arange(B) * T)  # the first document of each row
    segments = np.arange(len(begins)) - firsts[begins // T]
    place = np.arange(B * T, dtype=np.int32) - np.repeat(begins.astype(np.int32), lengths)
    return {
        "positions": place.reshape(B, T),
        "segment_ids": np.repeat(segments.astype(np.int32), lengths).reshape(B, T),
        "weights": (~ends_BT).astype(np.float32),
    }


class Shards(DataConfig):
    """Text of your own, as `experiments.prepare_data` has written it; docs/data.md.

    The config is valid where its folder is not, as when a checkpoint is read on another machine, or
    where none is named yet, as after `convert import`: what the folder decides is checked where it
    is there, and when it is opened.
    """

    folder: str = ""
    """Folder of the shards; `--config.data.source=FOLDER` sets it and the source."""
    cache_dir: str | None = None
    """Folder for a copy of shards below 10 GB that lie in a bucket; None: read by ranges."""

    def validate(self):
        remote = is_url(self.folder)
        problem = f"does nothing with shards on this machine, found {self.cache_dir}"
        self.require(remote or self.cache_dir is None, "cache_dir", problem)
        here = self.cache_dir is None or not is_url(self.cache_dir)
        self.require(here, "cache_dir", f"must be a folder of this machine, found {self.cache_dir}")
        if remote:
            try:
                buckets.checked(self.folder)
            except StorageError as error:
                raise ConfigError("folder", str(error)) from None

    def place(self) -> Place:
        """Where the shards are; raises DataError where no folder is named."""
        if not self.folder.strip():
            raise DataError(
                "config.data.folder: names no folder; write --config.data.source=FOLDER, with what "
                "prepare_data wrote"
            )
        return self.folder.rstrip("/") if is_url(self.folder) else as_written(self.folder)

    def vocabulary_size(self) -> int | None:
        try:
            place = self.place()
            if is_url(str(place)):  # which is not asked before it is opened
                return OPENED[place].vocabulary_size if place in OPENED else None
            return read_meta(place).vocabulary_size
        except DataError:  # it is not there, or opening it says what is wrong
            return None

    def deadline(self) -> float:
        """See DataConfig."""
        return CALLS * DEADLINE if is_url(self.folder) else 0.0

    def tokenizer(self) -> Tokenizer:
        """Raises DataError, ConfigError, StorageError: see `open`."""
        place = self.place()
        meta = OPENED.get(place) or read_meta(place)
        return tokenizer_files.kept(tokenizer_files.read_file(place), meta.about, place)

    def evaluated(self, length: int, count: int) -> np.ndarray:
        """Windows from all over the split, the same each time: shards are in no random order."""
        return np.arange(count) * length // count

    def open(self, split: str, seq_len: int, seed: int) -> TokenWindows:
        """Windows of a split. The seed has no part in real text.

        Raises:
            DataError: the folder holds no shards, or not those that its meta.json says; the
                tokenizer beside them is not theirs, or tokenises otherwise.
            ConfigError: the package `tokenizers` is not installed.
            StorageError: a store does not answer, or the copy cannot be written.
        """
        del seed
        place = self.place()
        meta = read_meta(place)
        tokenizer_files.kept(tokenizer_files.read_file(place), meta.about, place)
        if is_url(str(place)):
            OPENED[place] = meta
            if self.cache_dir is not None:
                place = copied(place, as_written(self.cache_dir), meta)
        source = TokenWindows(place, meta, split, seq_len)
        if not source.length:
            raise DataError(f"{place} holds no tokens of {split}; prepare more data")
        return source
