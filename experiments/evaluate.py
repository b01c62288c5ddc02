"""Asks trained models what they know.

    python -m experiments.evaluate --workdir=runs/kha_tiny --text=book.txt
    python -m experiments.evaluate --workdir=runs/baseline,runs/kha --text=shards

--text: loss, perplexity and bits per byte of a file, or of what prepare_data wrote (its validation
split, where it has one). Each token is predicted from up to --max_context tokens before it, in
windows that go on by --stride of them: with a smaller one there is more context and more to
compute. Bits per byte are the same measure for every tokenizer.

Reads the run's newest checkpoint and folds linear mixers into the weights. Two runs are compared.
"""

import json
import logging
import os
from typing import IO, Any

from absl import flags
from rich.table import Table

from experiments.cli import command_line, terminal
from experiments.cli.command_line import UsageError
from experiments.run_folders.folder import use_compilation_cache

WORKDIR = flags.DEFINE_list("workdir", None, "Required: run folder to read, or two of them.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint to read; the newest good one by default.")
TEXT = flags.DEFINE_string("text", None, "Text to score: a file, or a folder of token shards.")
STRIDE = flags.DEFINE_integer(
    "stride",
    None,
    "Tokens of a text that a window predicts; half of --max_context by default.",
    lower_bound=1,
)
BATCH_TOKENS = flags.DEFINE_integer(
    "batch_tokens", 16384, "Tokens that are computed at once.", lower_bound=1
)
MAX_CONTEXT = flags.DEFINE_integer(
    "max_context",
    None,
    "Tokens that the model reads at most; those that it was trained on by default.",
    lower_bound=2,
)
DEVICES = flags.DEFINE_integer(
    "devices", 1, "Devices that hold the model together, where one cannot.", lower_bound=1
)
OUT = flags.DEFINE_string("out", None, "Also write the results to this JSON file.")

log = logging.getLogger("kha_jax")


def out_file(mode: str) -> IO[str]:
    """The file of --out."""
    try:
        return open(OUT.value or os.devnull, mode)
    except OSError as error:
        raise UsageError(f"--out={OUT.value} cannot be written: {error.strerror}") from None


def runs() -> list[Any]:
    """Those of --workdir, opened."""
    from experiments.evaluating.models import Asked

    named = WORKDIR.value or [None]
    if len(named) > 2 or len(set(named)) < len(named):
        raise UsageError(f"--workdir={','.join(named)}: name one run, or two different ones")
    use_compilation_cache()
    fixed = {"max_length": MAX_CONTEXT.value, "devices": DEVICES.value}
    return [Asked(name, STEP.value, batch_tokens=BATCH_TOKENS.value, **fixed) for name in named]


def text() -> dict[str, Any]:
    """See the module's docstring."""
    from experiments.evaluating import texts

    texts.check(TEXT.value)
    asked, rows = runs(), {}
    for run in asked:
        rows[run.workdir] = texts.loss(run, TEXT.value, STRIDE.value)
        run.say_counts()
    table = Table(title=f"{TEXT.value}, {next(iter(rows.values())).bytes:,} bytes")
    for column in ("run", "bits per byte", "loss", "perplexity", "tokens"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for name, row in rows.items():
        figures = f"{row.bits_per_byte:.4f}", f"{row.loss:.4f}", f"{row.perplexity:.2f}"
        table.add_row(name, *figures, f"{row.tokens:,}")
    terminal.show(table)
    if len(rows) == 2:
        (first, a), (second, b) = rows.items()
        change = b.bits_per_byte - a.bits_per_byte
        print(f"{second} takes {change:+.4f} bits per byte against {first}")
    return {
        "text": TEXT.value,
        "stride": STRIDE.value,
        "runs": [{**run.about(), **rows[run.workdir]._asdict()} for run in asked],
    }


def main() -> None:
    """See the module's docstring."""
    if TEXT.value is None:
        raise UsageError("--text: is required; name a file, or a folder that prepare_data wrote")
    if not TEXT.value:
        raise UsageError("--text: names no file")
    out_file("a").close()  # before minutes of computing
    results = text()
    with out_file("w") as file:
        json.dump(results, file, indent=1)


if __name__ == "__main__":
    command_line.run(main)
