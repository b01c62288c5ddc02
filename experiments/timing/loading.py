"""What it costs to read shards: CPU time of the loader, opening, memory, and how long training
waits for batches; and the table of that and of `corpora`."""

import itertools
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Iterator

import numpy as np
from rich.table import Table

from experiments.timing import corpora, turns
from experiments.timing.corpora import Row, command, documents, peak_of, write_jsonl

SHAPES = (256, 32), (1024, 32), (8192, 64)  # T, B
TOKENS = 2**22  # that a turn of the loader reads
SHARDS, DOCUMENTS = 1000, 10_000  # of those that are opened: in all, and in each
STEPS, FIRST = 150, 50  # of kha_tiny, and from which on its waiting counts
TEXT = 20  # megabytes of it that shards hold
SPARSE = 10**10  # bytes


def table(
    title: str, save_to: str | None, megabytes: int, rounds: int
) -> tuple[Table, dict[str, Any]]:
    """(the table, its rows by name). save_to: a folder; megabytes: see `corpora`."""
    shown, out = Table(title=title), {}
    for column in ("", "here", "beside it", "", "ratio", "wanted"):
        shown.add_column(column, justify="right")
    with tempfile.TemporaryDirectory(dir=save_to) as scratch:
        made, read = Path(scratch, "made"), Path(scratch, "read")
        made.mkdir(), read.mkdir()
        for row in itertools.chain(rows(read, rounds), corpora.rows(made, megabytes, rounds)):
            numbers = (row.here, row.alone, row.ratio)
            here, alone, ratio = ("" if n is None else f"{n:.3g}" for n in numbers)
            shown.add_row(row.what, here, alone, row.unit, ratio, row.bar)
            out[row.what] = row._asdict()
    return shown, out


def rows(folder: Path, rounds: int) -> Iterator[Row]:
    """All of them, as they are measured."""
    yield from loading(folder / "loading", rounds)
    yield from opened(folder / "opened")
    yield over_sparse_file(folder / "sparse")
    yield from waiting(folder)


def loading(folder: Path, rounds: int) -> Iterator[Row]:
    """Tokens that `data.batches` gives in a CPU second, beside the same windows one at a time."""
    from kha_jax.data.shard_writer import ShardWriter, write_meta
    from kha_jax.data.tokenizers import ByteTokenizer

    folder.mkdir()
    tokenizer = ByteTokenizer()
    with ShardWriter(folder, "train", 0, tokenizer) as writer:
        for text in documents(TEXT * 1e6):
            writer.add(tokenizer.encode(text.encode()), len(text.encode()))
        write_meta(folder, tokenizer, {"train": [writer.finish()]})
    for T, B in SHAPES:
        makers = {name: (loading_step, str(folder), T, B, name) for name in ("here", "alone")}
        found = turns.apart(makers, rounds, settled=1)
        rates = [TOKENS / found[name]["cpu"] / 1e6 for name in ("here", "alone")]
        what = f"data.batches, {T} x {B}; row by row"
        yield Row(what, rates[0], "M tokens a CPU s", rates[1], rates[0] / rates[1])


class OneByOne:
    """A source whose windows are read one at a time."""

    bytes_per_token, fingerprint = None, ""

    def __init__(self, inner: Any):
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        return self.inner[index]


def loading_step(folder: str, T: int, B: int, how: str) -> Callable[[], None]:
    """Reads TOKENS tokens in batches, always the next ones."""
    from kha_jax.data import Draws, Shards, batches

    source = Shards(folder=folder).open("train", T, 0)
    source = source if how == "here" else OneByOne(source)
    count, at = TOKENS // (T * B), itertools.count()
    about = {"draws": Draws([(0, B)]), "rows": np.arange(B), "seed": 0}

    def step() -> None:
        start = next(at) * count
        for batch in batches(source, **about, start=start, stop=start + count):
            assert batch["tokens"].shape == (B, T)

    return step


def opened(folder: Path) -> Iterator[Row]:
    """Opening many shards, and what stays open."""
    found = opening(folder)
    what = f"opening {SHARDS:,} shards of {DOCUMENTS:,} documents"
    yield Row(what, found["seconds"], "CPU s", bar="0.1")
    yield Row("its memory", found["bytes"] / 1e6, "MB", bar="20")
    yield Row("files open after 10,000 windows", found["files"], "", bar="under 200")


def opening(folder: Path, shards: int = SHARDS, documents: int = DOCUMENTS) -> dict[str, float]:
    """CPU seconds, bytes of memory, and files that are open after 10,000 windows. The folder is
    made with shards of documents of two tokens."""
    from kha_jax.data import Shards, window_order
    from kha_jax.data.shard_writer import ShardWriter, write_meta
    from kha_jax.data.tokenizers import ByteTokenizer

    folder.mkdir(exist_ok=True)
    ids, lengths, made = np.arange(2 * documents) % 256, np.full(documents, 2), []
    for number in range(shards):
        with ShardWriter(folder, "train", number, ByteTokenizer()) as writer:
            writer.add_all(ids, lengths, len(ids))
            made.append(writer.finish())
    write_meta(folder, ByteTokenizer(), {"train": made})
    before, began = peak_of(name="VmRSS"), time.process_time()
    source = Shards(folder=str(folder)).open("train", 256, 0)
    seconds, grown = time.process_time() - began, peak_of(name="VmRSS") - before
    assert source.documents == shards * documents
    handles, order = len(os.listdir("/proc/self/fd")), window_order(len(source), 0)
    for first in range(0, 10_000, 50):
        source.rows([order[first + row] for row in range(50)])
    files = len(os.listdir("/proc/self/fd")) - handles
    return {"seconds": seconds, "bytes": grown, "files": files}


def over_sparse_file(folder: Path) -> Row:
    """Memory of a reader of windows all over a large shard."""
    grown, what = reading(folder), f"reader's memory over {SPARSE / 1e9:.0f} GB"
    return Row(what, grown / 1e6, "MB more", bar="flat")


def reading(folder: Path, size: int = SPARSE) -> int:
    """Bytes of memory that 6,400 windows all over a shard take after the first 64; the shard, of so
    many bytes, is a file of holes."""
    import google_crc32c

    from kha_jax.data.shard_files import BLOCK, Shard
    from kha_jax.data.shard_writer import write_meta
    from kha_jax.data.shards import TokenWindows
    from kha_jax.data.tokenizers import ByteTokenizer

    folder.mkdir(exist_ok=True)
    with open(folder / "train-00000.bin", "wb") as file:
        file.truncate(size)
    sums = [google_crc32c.value(bytes(n)) for n in (BLOCK, size % BLOCK)]
    whole = np.append(np.full(size // BLOCK, sums[0], "<u4"), np.array(sums[1:], "<u4"))
    (folder / "train-00000.crc").write_bytes(whole[: -(-size // BLOCK)].tobytes())
    shard = Shard("train-00000", size // 2, 1, size, "0" * 64)
    meta = write_meta(folder, ByteTokenizer(), {"train": [shard]})
    source, random = TokenWindows(folder, meta, "train", 2048), np.random.default_rng(0)
    source.rows(random.integers(len(source), size=64))
    before = peak_of(name="VmRSS")
    for _ in range(100):
        source.rows(random.integers(len(source), size=64))
    return peak_of(name="VmRSS") - before


def waiting(folder: Path) -> Iterator[Row]:
    """How much of kha_tiny's time is spent waiting for batches."""
    text, shards = folder / "text.jsonl", folder / "shards"
    write_jsonl(text, TEXT)
    command("prepare_data", f"--input={text}", f"--out={shards}", "--val_fraction=0.05")
    for name, flags in {
        "Python's library": [],
        "shards": [f"--config.data.source={shards}"],
    }.items():
        run = folder / f"run_{name[:2]}"
        command("train", *flags, f"--config.steps={STEPS}", f"--workdir={run}")
        log = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        shares = [row["data_wait_fraction"] for row in log if "loss" in row and row["step"] > FIRST]
        what = f"data_wait_fraction, kha_tiny, {name}, steps {FIRST}-{STEPS}"
        yield Row(what, statistics.fmean(shares), "", bar="under 0.01")
