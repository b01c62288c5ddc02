"""From a source of windows to batches whose content depends on (seed, step) alone.

Legend: B batch, T position.
"""

from typing import Any, Iterator, Protocol

import grain
import jax
import numpy as np

Example = dict[str, np.ndarray]


class DataError(Exception):
    """Data that cannot be trained on. The message names the file or source and what to do."""


class Source(Protocol):
    """Random access to examples: tokens, targets, positions, segment_ids (int32) and weights
    (float32), all [T].

    bytes_per_token: mean bytes of text behind one token, None where there is no text. fingerprint:
    a hash of the content.
    """

    bytes_per_token: float | None
    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


def batches(
    source: Source,
    *,
    batch_size: int,
    rows: np.ndarray,
    seed: int,
    start: int,
    stop: int,
    shuffle: bool = True,
) -> Iterator[Example]:
    """Yields the given rows of the global batches start, start + 1, ..., stop - 1.

    Row r of batch s is example s * batch_size + r of an endless sequence of epochs, each in an
    order of its own. A reader therefore needs no state but the step, and any number of processes
    reads the same global batch.

    Args:
        source: where examples come from.
        batch_size: rows of a global batch.
        rows: the rows wanted, for example those of this process (`sharding.local_rows`).
        seed: of the order.
        start, stop: steps.
        shuffle: False reads in the source's order, as evaluation does.

    Raises:
        DataError: when the source holds less than one batch.
    """
    if len(source) < batch_size:
        raise DataError(
            f"{source} holds {len(source)} windows, fewer than one batch of {batch_size}; lower "
            "batch_size or seq_len"
        )
    examples = grain.MapDataset.source(source).seed(seed)
    examples = examples.shuffle() if shuffle else examples
    examples = examples.repeat()

    def batch(step: int) -> Example:
        picked = [examples[step * batch_size + int(row)] for row in rows]
        return {name: np.stack([example[name] for example in picked]) for name in picked[0]}

    steps = grain.MapDataset.range(start, stop).map(batch)
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


def to_device(batch: Example, sharding: jax.sharding.Sharding, batch_size: int) -> dict[str, Any]:
    """The global arrays [B, T] of which `batch` holds this process's rows."""
    return {
        name: jax.make_array_from_process_local_data(sharding, rows, (batch_size, *rows.shape[1:]))
        for name, rows in batch.items()
    }
