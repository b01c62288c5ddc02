"""From a source of windows to batches whose content depends on (seed, step) alone.

Legend: B batch, T position.
"""

import collections
import hashlib
from concurrent import futures
from typing import TYPE_CHECKING, Any, Callable, Iterable, Iterator, Protocol, Sequence

import numpy as np

from kha_jax.config import Config
from kha_jax.errors import DataError

if TYPE_CHECKING:  # seconds and memory, which who wants configs or tokenizers alone does not pay
    import jax

Example = dict[str, np.ndarray]
AHEAD = 2  # batches that are made before they are asked for


class Source(Protocol):
    """Random access to examples: tokens, targets, positions, segment_ids (int32) and weights
    (float32), all [T].

    bytes_per_token: mean bytes of text behind one token, None where there is no text. fingerprint:
    a hash of the content. A source may also have `rows(indices)`, which gives the examples of
    several indices at once, each array [B, T], in arrays of its own, and the number of its
    `documents`.
    """

    bytes_per_token: float | None
    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class DataConfig(Config):
    """Base of the configs of sources."""

    def vocabulary_size(self) -> int | None:
        """Ids are below this; None where the data that would tell are not there."""
        raise NotImplementedError

    def minimum_seq_len(self) -> int:
        """Tokens of the shortest row that an example fits in."""
        return 1

    def tokenizer(self) -> Any | None:
        """Between text and ids; None where the data is not text."""
        return None

    def deadline(self) -> float:
        """Seconds that reading a batch may take where a store does not answer."""
        return 0.0

    def open(self, split: str, seq_len: int, seed: int) -> Source:
        """The examples of the `train` or `validation` split."""
        raise NotImplementedError

    def evaluated(self, length: int, count: int) -> Sequence[int]:
        """Which `count` of the `length` windows of the validation split an evaluation reads."""
        del length
        return range(count)


class WindowOrder:
    """Which example comes when: an endless sequence of epochs over `length` of them, each in an
    order of its own. order[draw] is its number.

    It is that of grain.MapDataset.range(length).seed(seed).shuffle().repeat(), without a walk
    through its layers for each draw.
    """

    def __init__(self, length: int, seed: int, shuffle: bool = True):
        self.length, self.shuffle = length, shuffle
        # as Grain derives the seed of a `shuffle` that is one step after `seed`
        self.seed = int(np.random.SeedSequence([seed, 1]).generate_state(1, np.uint32)[0])

    def __getitem__(self, draw: int) -> int:
        # nearly a second, which whoever wants configs alone does not pay
        from grain.experimental import index_shuffle

        epoch, index = divmod(draw, self.length)
        if not self.shuffle:
            return index
        seed = (self.seed + epoch) % 2**32
        return index_shuffle(index, max_index=self.length - 1, seed=seed, rounds=4)


def window_order(length: int, seed: int, shuffle: bool = True) -> WindowOrder:
    """See WindowOrder."""
    return WindowOrder(length, seed, shuffle)


class Draws:
    """Which draws of `window_order` a batch holds: those after the last batch's, also where a run
    has gone on with another batch size.

    batch_sizes: (first step, batch size), in the order in which they were decided. A later one
    takes the place of what was decided before for the steps from its first on.
    """

    def __init__(self, batch_sizes: Iterable[tuple[int, int]]):
        self.parts: list[tuple[int, int, int]] = []  # first step, first draw, batch size
        for step, size in batch_sizes:
            begin = self(step).start if self.parts else step * size
            self.parts = [part for part in self.parts if part[0] < step] + [(step, begin, size)]

    def __call__(self, step: int) -> range:
        """Those of batch `step`, which the step after it trains on."""
        first, begin, size = next(part for part in reversed(self.parts) if part[0] <= step)
        begin += (step - first) * size
        return range(begin, begin + size)


def check_length(source: Source, at_least: int, remedy: str) -> None:
    """Raises DataError when the source holds fewer examples."""
    if len(source) < at_least:
        raise DataError(
            f"{source} holds {len(source)} windows, fewer than the {at_least} that are needed; "
            f"{remedy}"
        )


def rows_of(source: Source, indices: Sequence[int]) -> Example:
    """The examples of these indices, each array [B, T], in writable arrays of its own."""
    if hasattr(source, "rows"):
        return source.rows(indices)
    rows = [source[index] for index in indices]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def batches(
    source: Source,
    *,
    draws: Draws,
    rows: np.ndarray,
    seed: int,
    start: int,
    stop: int,
    shuffle: bool = True,
) -> Iterator[Example]:
    """Yields the given rows of the global batches start, start + 1, ..., stop - 1.

    Row r of batch s is example draws(s)[r] of `window_order`. A reader therefore needs no state but
    the step, and any number of processes reads the same global batch.

    Args:
        source: where examples come from.
        draws: which examples are in which batch.
        rows: the rows wanted, for example those of this process (`sharding.local_rows`).
        seed: of the order.
        start, stop: steps.
        shuffle: False reads in the source's order.

    Raises:
        DataError: when the source holds less than one batch.
    """
    check_length(source, len(draws(start)), "lower batch_size or seq_len")
    order = window_order(len(source), seed, shuffle)

    def batch(step: int) -> Example:
        drawn = draws(step)
        return rows_of(source, [order[drawn[row]] for row in rows.tolist()])

    return _ahead(batch, range(start, stop))


def _ahead(make: Callable[[int], Example], steps: Iterable[int]) -> Iterator[Example]:
    """What is made of each step, by a thread that is AHEAD of whoever asks."""
    with futures.ThreadPoolExecutor(1, "data") as thread:
        made: collections.deque[futures.Future] = collections.deque()
        try:
            for step in steps:
                made.append(thread.submit(make, step))
                if len(made) > AHEAD:
                    yield made.popleft().result()
            while made:
                yield made.popleft().result()
        finally:
            for one in made:
                one.cancel()


def each_once(
    source: Source, *, batch_size: int, rows: np.ndarray, windows: Sequence[int]
) -> Iterator[Example]:
    """Yields the given rows of batches that hold the examples of these numbers, in order. The last
    batch is filled up with examples whose weights are zero."""
    windows = np.asarray(windows)
    for first in range(0, len(windows), batch_size):
        places = first + np.asarray(rows)
        batch = rows_of(source, windows[np.minimum(places, len(windows) - 1)])
        there = (places < len(windows))[:, None]
        batch["weights"] = batch["weights"] * there.astype(np.float32)
        yield batch


def batch_hash(source: Source, *, draws: Draws, seed: int, step: int) -> str:
    """Of the content of a global batch, so that a resumed run can tell that it goes on with it."""
    order, digest = window_order(len(source), seed), hashlib.sha256()
    batch = rows_of(source, [order[draw] for draw in draws(step)])
    for row in range(len(batch["tokens"])):
        for name in sorted(batch):
            digest.update(batch[name][row].tobytes())
    return digest.hexdigest()


def to_device(batch: Example, sharding: "jax.sharding.Sharding", batch_size: int) -> dict[str, Any]:
    """The global arrays [B, T] of which `batch` holds this process's rows."""
    import jax

    return {
        name: jax.make_array_from_process_local_data(sharding, rows, (batch_size, *rows.shape[1:]))
        for name, rows in batch.items()
    }
