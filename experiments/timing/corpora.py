"""What it costs to turn text into shards: beside the library alone that does the same part of the
work, in turns; and memory, in processes of their own.

The text is the Python code that is installed here, over again where there is too little of it. M
megabytes of it are tokenised; a tokenizer learns from 2 M; memory is that of 40 M as bytes and of
4 M by the tokenizer with one line of 2 M in it, packed, and of a tenth of both.
"""

import contextlib
import functools
import itertools
import json
import os
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path
from typing import IO, Any, Callable, Iterator, NamedTuple

from experiments.timing import turns
from experiments.timing.turns import Turn
from kha_jax.errors import PeerError

VOCABULARY, KEPT = 16384, "tokenizer.json"
WORKERS = 2
SEEN = 0.05  # seconds between two looks at the memory of processes


class Row(NamedTuple):
    """A line of the table. unit: of `here` and `alone`; ratio: of the two; bar: what is wanted."""

    what: str
    here: float
    unit: str
    alone: float | None = None
    ratio: float | None = None
    bar: str = ""


def rows(folder: Path, megabytes: int, rounds: int) -> Iterator[Row]:
    """All of them, as they are measured; folder: with room for 60 times the text."""
    few = max(1, rounds // 4)  # of what takes long
    text, half, kept = (folder / name for name in ("text.jsonl", "half.jsonl", KEPT))
    write_jsonl(text, 2 * megabytes)
    yield training(text, kept, few)
    write_jsonl(half, megabytes)
    yield tokenising(half, kept, few)
    yield from memory(folder, megabytes)
    yield row_group(folder, 5 * megabytes)


# -------------------------------------------------------------------------------- text and costs
@functools.cache
def _modules() -> list[Path]:
    folders = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    return [path for folder in folders for path in sorted(folder.rglob("*.py"))]


def documents(size: float) -> Iterator[str]:
    """Modules of Python, until there are so many bytes of them."""
    for number, path in enumerate(itertools.cycle(_modules())):
        if size <= 0:
            return
        with contextlib.suppress(OSError, UnicodeDecodeError):
            text = path.read_text("utf-8")
            text = f"{number}\n{text}" if number >= len(_modules()) else text
            yield text
            size -= len(text.encode())


def write_jsonl(path: Path, megabytes: float, longest: float = 0) -> None:
    """A file of so much text, packed where its name says so; longest: megabytes of one line in its
    middle."""
    opened: Callable = open
    if path.suffix == ".zst":
        import zstandard

        opened = zstandard.open
    half = int((megabytes - longest) * 5e5)
    with opened(path, "wt", encoding="utf-8") as file:
        for size, long in ((half, longest), (half, 0)):
            for text in documents(size):
                file.write(json.dumps({"text": text}) + "\n")
            if long:
                file.write(json.dumps({"text": "".join(documents(int(long * 1e6)))}) + "\n")


class Cost(NamedTuple):
    """Of a command with its processes. peak: bytes that one of them had at most, if watched."""

    wall: float
    peak: int


def command(name: str, *arguments: str, watched: bool = False) -> Cost:
    """Runs `python -m experiments.NAME ARGUMENTS`. watched: for memory, which takes much of a core.

    Raises:
        PeerError: it failed.
    """
    line, began = [sys.executable, "-m", f"experiments.{name}", *arguments], time.perf_counter()
    process = subprocess.Popen(
        line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    ended, peaks = threading.Event(), [0]
    watchers = [threading.Thread(target=_drain, args=(process.stderr, said := [b""]))]
    if watched:
        watchers.append(threading.Thread(target=_watch, args=(process.pid, ended, peaks)))
    for watcher in watchers:
        watcher.start()
    process.wait()
    wall = time.perf_counter() - began
    ended.set()
    for watcher in watchers:
        watcher.join()
    if process.returncode:
        raise PeerError(f"{name}, which was measured, failed: {said[0].decode()}")
    return Cost(wall, max(peaks))


def _watch(session: int, ended: threading.Event, peaks: list[int]) -> None:
    while not ended.wait(SEEN):
        peaks.append(max(map(peak_of, _of_session(session)), default=0))


def _drain(errors: IO[bytes], said: list[bytes]) -> None:
    """Keeps the last line."""
    for line in errors:
        said[0] = line.strip()


def _of_session(session: int) -> Iterator[str]:
    for process in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                yield process


def peak_of(process: str = "self", name: str = "VmHWM") -> int:
    """Bytes that a process had at most; `VmRSS`: that it has."""
    try:
        said = Path(f"/proc/{process}/status").read_text().partition(f"{name}:")[2]
        return int(said.split()[0]) * 1024
    except (OSError, IndexError):  # it has ended
        return 0


# -------------------------------------------------------------------------------- making shards
ALONE = """
import json, os, sys, time
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

doing, path, kept, size = sys.argv[1:]
texts = [json.loads(line)["text"] for line in open(path)]
if doing == "train":
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=int(size), special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    began = time.perf_counter()
    tokenizer.train_from_iterator(texts, trainer)
else:
    tokenizer = Tokenizer.from_file(kept)
    began = time.perf_counter()
    for at in range(0, len(texts), 1000):
        tokenizer.encode_batch_fast(texts[at : at + 1000], add_special_tokens=False)
print(time.perf_counter() - began)
"""


# The part of prepare_data that trains, from the start of its process on.
TRAINED = """
import sys, time
from experiments.preparing import units, workers
from experiments.preparing.processes import Worker

path, kept, size, threads = sys.argv[1:]
began = time.perf_counter()
job = workers.Job(("bytes",), "text", 0.0, 0)
with Worker(int(threads)) as worker:
    worker.send(workers.train, job, units.cut(units.find([path])[0]), int(size), 1.0)
    content, _ = worker.result()
open(kept, "w").write(content)
print(time.perf_counter() - began)
"""


def program(text: str, *words: Any) -> float:
    """What a program prints, with as many threads for `tokenizers` as there are workers here."""
    threads = {"RAYON_NUM_THREADS": str(WORKERS), "TOKENIZERS_PARALLELISM": "true"}
    line = [sys.executable, "-c", text, *map(str, words)]
    done = subprocess.run(
        line, env={**os.environ, **threads}, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def alone(doing: str, path: Path, kept: Path) -> float:
    """Seconds in which `tokenizers` trains or encodes what it has in memory already."""
    return program(ALONE, doing, path, kept, VOCABULARY)


def in_turns(here: Callable[[], float], alone: Callable[[], float], rounds: int) -> list[float]:
    """Median seconds of both, which they say themselves."""

    def turn(seconds: Callable[[], float]) -> Turn:
        return Turn(seconds(), 0.0)

    made = {"here": lambda: turn(here), "alone": lambda: turn(alone)}
    found = turns.interleave(made, rounds)
    return [found[name]["median"] for name in ("here", "alone")]


def training(text: Path, kept: Path, rounds: int) -> Row:
    """A BPE that prepare_data trains, with the start of its process and reading the text."""
    ours, theirs = in_turns(
        lambda: program(TRAINED, text, kept, VOCABULARY, WORKERS),
        lambda: alone("train", text, kept),
        rounds,
    )
    what = f"bpe:{VOCABULARY}, {text.stat().st_size / 1e6:.0f} MB; tokenizers"
    return Row(what, ours, "s", theirs, ours / theirs, "1.1")


def tokenising(text: Path, kept: Path, rounds: int) -> Row:
    """The command by a tokenizer.json, with all that it does, and `encode_batch_fast`."""
    numbers = itertools.count()

    def here() -> float:
        out = kept.parent / f"tokenised_{next(numbers)}"
        words = f"--input={text}", f"--out={out}", f"--tokenizer={kept}"
        return command("prepare_data", *words, f"--workers={WORKERS}").wall

    ours, theirs = in_turns(here, lambda: alone("encode", text, kept), rounds)
    what = f"tokenising {text.stat().st_size / 1e6:.0f} MB, {WORKERS} workers; tokenizers"
    return Row(what, ours, "s", theirs, theirs / ours, "0.9")


def memory(folder: Path, megabytes: int) -> Iterator[Row]:
    """The most that a process of prepare_data has, also of a tenth of the input."""
    kept = folder / KEPT
    for name, size, longest in (("bytes", 40, 0), (str(kept), 4, 2)):
        peaks = []
        for part in (1, 10):
            path, out = folder / f"{size}-{part}.jsonl.zst", folder / f"memory_{size}-{part}"
            long = longest * megabytes
            write_jsonl(path, long + (size - longest) * megabytes / part, long)
            words = f"--input={path}", f"--out={out}", f"--tokenizer={name}"
            peaks.append(
                command("prepare_data", *words, f"--workers={WORKERS}", watched=True).peak / 1e6
            )
        by = "bytes" if name == "bytes" else f"a BPE, a line of {longest * megabytes} MB"
        what = f"peak memory, {size * megabytes} MB of .jsonl.zst, {by}; a tenth of it"
        yield Row(what, peaks[0], "MB", peaks[1], peaks[0] / peaks[1], "700; 1.2")


# A unit in a process of its own: bytes at the start, and the most that it ever had.
PEAK = """
import sys
from pathlib import Path
from experiments.preparing import units, workers
from experiments.timing.corpora import peak_of

class Silent:
    def seen(self, seen): pass
    def say(self, kind, text): print(text, file=sys.stderr)

path, out = sys.argv[1:]
if path.endswith(".parquet"):
    import pyarrow.parquet
(unit,) = units.cut(units.find([path])[0])
before = peak_of(name="VmRSS")
workers.write(workers.Job(("bytes",), "text", 0.001, 0), 0, unit, Path(out), b"", None, 0, Silent())
print(before, peak_of())
"""


def peak(path: Path, out: Path) -> tuple[int, ...]:
    """(bytes at the start, bytes at most) of a worker that writes the shards of this file."""
    out.mkdir()
    words = [sys.executable, "-c", PEAK, str(path), str(out)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return tuple(map(int, done.stdout.split()))


def row_group(folder: Path, megabytes: int) -> Row:
    """Memory that parquet takes whose rows are one group."""
    import pyarrow
    from pyarrow import parquet

    path = folder / "one.parquet"
    texts = pyarrow.array(list(documents(megabytes * 10**6)), pyarrow.string())
    rows = len(texts)
    parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=rows)
    del texts
    before, most = peak(path, folder / "of_parquet")
    what = f"parquet, a row group of {megabytes} MB"
    return Row(what, (most - before) / 1e6, "MB above the start", bar="200")
