"""The loss of a text under a model, in bits per byte, which do not hang on the tokenizer."""

import itertools
import math
import os
from pathlib import Path
from typing import Iterator, NamedTuple

import numpy as np

from experiments.cli.codes import UsageError
from experiments.evaluating.models import Asked, scores
from kha_jax.data import shard_files
from kha_jax.errors import DataError
from kha_jax.inference.rows import windows
from kha_jax.storage import as_written, open_regular

AT_ONCE = 4096  # windows that wait to be scored
LARGEST = 2**33  # bytes of a file
RECORDS = (".jsonl", ".ndjson", ".parquet", ".gz", ".zst")  # whose bytes are not the text


class Text(NamedTuple):
    """Documents of one text as ids, and the bytes of all of them."""

    documents: Iterator[np.ndarray]
    bytes: int


class Loss(NamedTuple):
    """loss: mean nats of a token; perplexity: its exponential; bits_per_byte: of the text's bytes;
    and what was counted."""

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int


def check(name: str) -> None:
    """Raises UsageError where there is no such text, or a file of something else."""
    if not os.path.exists(as_written(name)):
        raise _missing(name, "is not there")
    if name.endswith(RECORDS):
        raise UsageError(
            f"--text={name}: holds records and not plain text, and keys and braces would count; "
            "prepare_data makes a folder of it that can be named"
        )


def _missing(name: str | Path, why: str) -> UsageError:
    what = "name a file of text, or a folder that prepare_data wrote"
    return UsageError(f"--text={name}: {why}; {what}")


def loss(asked: Asked, name: str, stride: int | None) -> Loss:
    """That of the text of this name, each document for itself. Its first token is predicted behind
    what begins a text, the others behind at least max_length - stride tokens, once there are as
    many.

    Raises:
        UsageError: there is no such file or folder.
        DataError: it cannot be read, or was written with another tokenizer.
    """
    path = as_written(name)
    text = _folder(asked, path) if os.path.isdir(path) else _file(asked, path)
    length, before = asked.max_length, asked.dialect.prefix
    stride = max(1, length // 2) if stride is None else stride
    if stride > length:
        raise UsageError(f"--stride={stride}: is more than the {length} tokens that are read")
    waiting = (w for ids in text.documents for w in windows(ids, before, length, stride))
    nats = tokens = 0
    for some in iter(lambda: list(itertools.islice(waiting, AT_ONCE)), []):
        nats -= sum(score.log_probability for score in scores(asked, some))
        tokens += sum(len(window.continuation) for window in some)
    if not tokens:
        raise DataError(f"{name}: holds no text")
    mean = nats / tokens
    return Loss(mean, _exp(mean), nats / math.log(2) / text.bytes, tokens, text.bytes)


def _exp(mean: float) -> float:
    return math.exp(mean) if mean < 700 else math.inf


def _file(asked: Asked, path: Path) -> Text:
    """A file is one document."""
    try:
        with open_regular(path, "rb", largest=LARGEST) as file:
            content = file.read()
    except (OSError, ValueError) as error:
        raise _missing(path, str(getattr(error, "strerror", None) or error)) from None
    return Text(iter([asked.dialect.tokenizer.encode(content)]), len(content))


def _folder(asked: Asked, folder: Path) -> Text:
    """The documents of prepared shards: of their validation split, where it has any."""
    meta, own = shard_files.read_meta(folder), asked.dialect.tokenizer.fingerprint
    if meta.about["tokenizer"] != own:
        raise DataError(
            f"{folder} was written by the tokenizer {meta.about['tokenizer'][:12]}, that of "
            f"{asked.workdir} is {own[:12]}; give the text itself, as a file"
        )
    split = "validation" if meta.total("validation", "documents") else "train"
    return Text(_documents(folder, meta, split), meta.total(split, "bytes"))


def _documents(folder: Path, meta: shard_files.Meta, split: str) -> Iterator[np.ndarray]:
    """Each without what begins and ends it."""
    marks = [meta.about["begin_of_document"], meta.about["end_of_document"]]
    for shard in meta.shards[split]:
        ids = _all(folder / f"{shard.name}.bin", meta.dtype, shard.tokens)
        starts = _all(folder / f"{shard.name}.documents", shard_files.DOCUMENT, shard.documents)
        for document in np.split(ids, starts[1:].astype(np.int64)):
            yield document[~np.isin(document, [m for m in marks if m is not None])]


def _all(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    try:
        with open_regular(path, "rb", largest=2**63) as file:
            found = np.frombuffer(file.read(), dtype)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if len(found) != count:
        raise DataError(f"{path} holds {len(found):,} entries, {shard_files.META} says {count:,}")
    return found
