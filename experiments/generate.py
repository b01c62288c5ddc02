"""Continues text with a trained model.

    python -m experiments.generate --workdir=runs/kha_tiny --prompt='def main('
    python -m experiments.generate --workdir=runs/kha_tiny --prompt='class A' --temperature=0.8

Reads the run's newest checkpoint, folds linear mixers into the weights and samples. One prompt is
streamed to the terminal; several, of any lengths, are decoded as one batch and printed one after
another. A row stops at the end of its document, or before the first --stop.
"""

import logging
import re
import sys
import time

from absl import flags

from experiments.cli import command_line
from experiments.cli.command_line import UsageError
from experiments.run_folders import stored
from experiments.run_folders.folder import use_compilation_cache
from kha_jax.accounting import cache_bytes
from kha_jax.config import ConfigError
from kha_jax.inference.decoding import Decoder
from kha_jax.inference.folding import fold_if_linear
from kha_jax.inference.sampling import Sampling
from kha_jax.inference.text import Continuation
from kha_jax.training.run_folder import read_config, read_tokenizer

WORKDIR = flags.DEFINE_string("workdir", None, "Required: run folder to read.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint to read; the newest good one by default.")
PROMPT = flags.DEFINE_multi_string(
    "prompt",
    [],
    "Required: text to continue, where \\n, \\t and \\\\ are understood; may be repeated.",
)
STOP = flags.DEFINE_multi_string(
    "stop", [], "Text that ends a continuation and is left out, as --prompt; may be repeated."
)
TOKENS = flags.DEFINE_integer("tokens", 200, "New tokens at most.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token.")
TOP_K = flags.DEFINE_integer("top_k", None, "Draw among that many likeliest tokens.")
TOP_P = flags.DEFINE_float(
    "top_p", 1.0, "Draw among the likeliest tokens that together have this probability."
)
SEED = flags.DEFINE_integer("seed", 0, "Of the sampling.", lower_bound=0, upper_bound=2**32 - 1)
FOLD = flags.DEFINE_bool("fold", True, "Fold linear mixers into the weights first.")

log = logging.getLogger("kha_jax")
FARTHEST = 64  # times the length that a model was trained on, beyond which nothing is continued


def encoded(prompt: str) -> bytes:
    """The bytes of a prompt from the command line, which need not be UTF-8, with \\n, \\t and \\\\
    replaced by what they stand for."""
    stands = {"n": "\n", "t": "\t", "\\": "\\"}
    text = re.sub(r"\\([nt\\])", lambda found: stands[found[1]], prompt)
    return text.encode("utf-8", "surrogateescape")


def stop_text(stop: str) -> str:
    """The text that a --stop stands for.

    Raises:
        UsageError: no text holds it.
    """
    try:
        text = encoded(stop).decode()
    except UnicodeDecodeError:
        text = ""
    if not text:
        raise UsageError("--stop: is empty or not UTF-8; give at least one character")
    return text


def main() -> None:
    """See the module's docstring."""
    try:
        sampling = Sampling(temperature=TEMPERATURE.value, top_k=TOP_K.value, top_p=TOP_P.value)
    except ConfigError as error:
        raise UsageError(f"--{error}") from None
    if not PROMPT.value:
        raise UsageError("--prompt: is required; write --prompt='text to continue'")
    if not all(PROMPT.value):
        raise UsageError("--prompt: is empty; give at least one character")
    stops = [stop_text(stop) for stop in STOP.value]
    folder = stored.run_folder("workdir", WORKDIR.value)
    config = read_config(folder)
    tokenizer = read_tokenizer(folder, config)
    if tokenizer is None:
        raise UsageError(
            f"--workdir={WORKDIR.value}: was trained on {type(config.data).__name__}, which is "
            "not text"
        )
    prompts = [tokenizer.encode(encoded(text)).tolist() for text in PROMPT.value]
    longest = max(map(len, prompts)) + TOKENS.value
    if longest > FARTHEST * config.seq_len:
        raise UsageError(
            f"--tokens={TOKENS.value}: makes {longest:,} with the longest --prompt, more than "
            f"{FARTHEST} times the {config.seq_len} that the model was trained on"
        )

    config, step, variables = stored.read_run(WORKDIR.value, STEP.value)
    if longest > config.seq_len:
        log.warning(
            "up to %d tokens with the prompt; the model was trained on %d", longest, config.seq_len
        )
    use_compilation_cache()
    trained = config.model, variables
    decoder = Decoder(*(fold_if_linear(*trained) if FOLD.value else trained))
    settings = {"sampling": sampling, "seed": SEED.value, "end": tokenizer.end_of_document}
    began = time.perf_counter()
    rows = [Continuation(tokenizer, prompt, stops) for prompt in prompts]
    alone = len(rows) == 1
    proceed(decoder, rows, settings, show=alone)
    if not alone:
        for row in rows:
            print(f"--- {tokenizer.decode(row.prompt)!r}\n{row.text}")
    made = sum(len(row.ids) for row in rows)
    took, each = time.perf_counter() - began, cache_bytes(decoder.model)
    log.info(
        "step %d: %d new tokens in %.1f s with compilation; a token's cache takes %s bytes, "
        "%.3g MB for %d tokens in %d rows",
        *(step, made, took, f"{each:,}"),
        *(each * longest * len(prompts) / 1e6, longest, len(prompts)),
    )


def proceed(decoder: Decoder, rows: list[Continuation], settings: dict, show: bool) -> None:
    """Continues all rows until they are done; shows the first one as it comes where that is asked
    for."""

    def write(text: str) -> None:
        if show:
            sys.stdout.write(text)
            sys.stdout.flush()

    write(rows[0].take())
    for part in decoder.stream([row.prompt for row in rows], TOKENS.value, **settings):
        if getattr(sys.stdout, "gone", False):
            break  # nobody reads on
        for row, ids in zip(rows, part.tolist()):
            row.add(ids)
        write(rows[0].take())
        if all(row.done for row in rows):
            break
    for row in rows:
        row.finish()
    write(rows[0].take() + "\n")


if __name__ == "__main__":
    command_line.run(main)
