"""Turns text that people own into shards of tokens, on which runs train.

    python -m experiments.prepare_data --input='data/*.jsonl.zst' --out=shards/
    python -m experiments.prepare_data --input=docs/,src/ --out=shards/ --tokenizer=bpe:16384
    python -m experiments.prepare_data --describe=shards/

Reads .txt, .md and code (one document a file), .jsonl, all of them also as .gz or .zst, and
parquet; --input takes names, folders and globs, joined by commas. Killed or stopped, the same
command goes on. --describe says what a folder or file of tokens holds, of these or of llm.c,
nanoGPT and OLMo.
"""

import importlib.util
import logging
import os
import re
import shlex
import signal
from pathlib import Path
from typing import Any

from absl import flags

from experiments.cli import codes, command_line
from experiments.cli.codes import UsageError
from experiments.cli.terminal import say
from experiments.preparing import processes, units
from experiments.preparing.folder import ShardFolder, cannot_be_written
from experiments.preparing.preparation import Preparation
from experiments.preparing.progress import count, many
from experiments.preparing.units import GROWTH, Unit
from experiments.preparing.workers import Job
from kha_jax.data import shard_files, tokenizers
from kha_jax.data.shard_files import SPLITS
from kha_jax.data.tokenizers import ByteTokenizer, Tokenizer
from kha_jax.storage import as_written

INPUT = flags.DEFINE_list("input", [], "Required: files, folders and globs, joined by commas.")
OUT = flags.DEFINE_string("out", None, "Required: folder of the shards.")
TOKENIZER = flags.DEFINE_string(
    "tokenizer",
    "bytes",
    "bytes; a tokenizer.json, as FILE or FILE,end=TOKEN,begin=TOKEN; or bpe:N, which trains a "
    "byte-level BPE of N tokens on the input first.",
)
TEXT_KEY = flags.DEFINE_string("text_key", "text", "Key, or column, of a document's text.")
VAL_FRACTION = flags.DEFINE_float(
    "val_fraction", 0.001, "Share of documents for validation, chosen by a hash of their text."
)
WORKERS = flags.DEFINE_integer("workers", None, "Processes; by default one for each core.")
SKIP_BAD = flags.DEFINE_integer("skip_bad", 0, "Records that may be left out as they are bad.")
DROP_DUPLICATES = flags.DEFINE_bool(
    "drop_duplicates", False, "Keep the first of documents with the same text."
)
DESCRIBE = flags.DEFINE_string("describe", None, "Folder or file of tokens: say what it holds.")
SMALLEST = 257  # ids of a byte-level BPE: 256 bytes and the end
MOST_WORKERS = 1024
log = logging.getLogger("kha_jax")


def named_tokenizer(name: str) -> Tokenizer | int:
    """The tokenizer that --tokenizer names, or the number of tokens of one that is to be trained.

    Raises:
        UsageError, ConfigError: there is none of that name.
    """
    if name.startswith("bpe:"):
        if not re.fullmatch("[0-9]{1,7}", name[4:]) or int(name[4:]) <= SMALLEST:
            found = f"--tokenizer={name}: must be bpe:N with N above {SMALLEST}, below 10^7"
            raise UsageError(f"{found}, such as bpe:16384")
        if importlib.util.find_spec("tokenizers") is None:
            raise UsageError(f"--tokenizer={name}: needs the extra: pip install -e '.[hf]'")
        return int(name[4:])
    path, *options = name.split(",")
    values = dict(option.partition("=")[::2] for option in options)
    if unknown := set(values) - {"end", "begin"}:
        raise UsageError(f"--tokenizer={name}: {min(unknown)!r} is neither end= nor begin=")
    return tokenizers.load(path, **values)


def check_flags() -> None:
    """Raises UsageError where a flag has no usable value."""
    for flag in (INPUT, OUT, TEXT_KEY):
        if not flag.value:
            raise UsageError(f"--{flag.name} is required; --help shows how")
    for flag in (INPUT, OUT):
        if "://" in str(flag.value):
            place = f"--{flag.name}={flag.value}: object stores are not read or written here"
            raise UsageError(f"{place}; name a folder, and copy it")
    if not 0 <= VAL_FRACTION.value < 1:
        raise UsageError(f"--val_fraction={VAL_FRACTION.value}: must be at least 0, below 1")
    if SKIP_BAD.value < 0:
        raise UsageError(f"--skip_bad={SKIP_BAD.value}: must not be negative")
    if WORKERS.value is not None and not 1 <= WORKERS.value <= MOST_WORKERS:
        raise UsageError(f"--workers={WORKERS.value}: must be 1 to {MOST_WORKERS:,}")


def summary(folder: Path) -> None:
    """What the folder has, and the command that trains on it."""
    meta = shard_files.read_meta(folder)
    for split in SPLITS:
        tokens, size = (count(meta.total(split, name)) for name in ("tokens", "bytes"))
        documents = many(meta.total(split, "documents"), "document")
        shards = many(len(meta.shards[split]), "shard")
        say(f"{split}: {documents}, {tokens} tokens, {size}B of text, {shards}")
    if out := ", ".join(f"{number:,} {kind}" for kind, number in meta.left_out.items() if number):
        say(f"left out: {out}")
    if not meta.shards["validation"]:
        log.warning("there is one document alone: a run needs another one to validate on")
    ids = meta.vocabulary_size
    model = f" --config.model.vocabulary_size={ids}" if ids != ByteTokenizer.vocabulary_size else ""
    source = f"--config.data.source={shlex.quote(f'{folder}/')}{model}"
    say(f"python -m experiments.train {source} --workdir=runs/{folder.name}")


def leave(number: int, _: Any) -> None:
    """The first signal ends the work in order, the second at once."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_DFL)
    raise KeyboardInterrupt


def main() -> int:
    """See the module's docstring."""
    if DESCRIBE.value is not None:
        from experiments.preparing.describe import describe

        made_by = named_tokenizer(TOKENIZER.value) if TOKENIZER.present else None
        return describe(as_written(DESCRIBE.value), made_by)
    check_flags()
    processes.begin()
    tokenizer = named_tokenizer(TOKENIZER.value)
    files, left_out = units.find(str(as_written(name)) for name in INPUT.value)
    said = {
        flag.name: flag.value
        for flag in (INPUT, TOKENIZER, TEXT_KEY, VAL_FRACTION, DROP_DUPLICATES)
    }
    identity = {} if isinstance(tokenizer, int) else {"tokenizer file": tokenizer.fingerprint}
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
    try:
        with ShardFolder(as_written(OUT.value)) as folder:
            folder.begin({**said, **identity}, files)
            if folder.complete:
                shard_files.verify(folder.path)
                say(f"{folder.path} is finished already")
            else:
                made = units.cut(files)
                introduce(files, made, left_out)
                job = Job((tokenizers.BYTES,), TEXT_KEY.value, VAL_FRACTION.value, SKIP_BAD.value)
                work = Preparation(folder, made, job, WORKERS.value or len(os.sched_getaffinity(0)))
                said |= {"skip_bad": SKIP_BAD.value}
                work.run(tokenizer, DROP_DUPLICATES.value, said)
            summary(folder.path)
    except KeyboardInterrupt:
        log.info("stopped; the same command goes on")
        return codes.PREEMPTED
    except OSError as error:
        raise cannot_be_written(as_written(OUT.value), error) from None
    return codes.DONE


def introduce(files: list[units.File], made: list[Unit], left_out: int) -> None:
    """What is read, and what is not."""
    size = sum(file.size for file in files)
    say(f"{many(len(files), 'file')}, {count(size)}B, in {many(len(made), 'unit')}")
    if left_out:
        log.info("left out %s whose names in folders are no text's", many(left_out, "file"))
    whole = [f for f in files if f.packing and f.size * GROWTH > units.SMALL]
    if whole:
        named = f"{whole[0].path} and {len(whole) - 1:,} more" if whole[1:] else whole[0].path
        log.info("%s: packed, so one process reads each file", named)


if __name__ == "__main__":
    command_line.run(main)
