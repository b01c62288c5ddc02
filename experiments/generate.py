"""Continues text with a trained model.

    python -m experiments.generate --workdir=runs/kha_tiny --prompt='def main('
    python -m experiments.generate --workdir=runs/kha_tiny --prompt='class A' --temperature=0.8
    python -m experiments.generate --workdir=runs/imported --chat --system='Answer briefly.'

Reads the run's newest checkpoint, folds linear mixers into the weights and samples. One prompt is
streamed to the terminal; several, of any lengths, are decoded as one batch and printed one after
another. A row stops at the end of its document, or before the first --stop.

--chat answers the lines that are typed, by the chat template that came with an imported model,
until Ctrl-D. One cache of --max_context tokens holds the conversation and grows with it.
"""

import logging
import sys
import time

from absl import flags

from experiments.cli import command_line
from experiments.cli.codes import UsageError
from experiments.cli.conversation import talk
from experiments.cli.typed import encoded, stop_text
from experiments.run_folders import stored
from experiments.run_folders.folder import use_compilation_cache
from kha_jax.accounting import cache_bytes
from kha_jax.config import ConfigError
from kha_jax.inference.decoding import Decoder
from kha_jax.inference.dialect import Dialect
from kha_jax.inference.folding import fold_if_linear
from kha_jax.inference.sampling import Sampling
from kha_jax.inference.text import Continuation
from kha_jax.training.run_folder import read_config

WORKDIR = flags.DEFINE_string("workdir", None, "Required: run folder to read.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint to read; the newest good one by default.")
PROMPT = flags.DEFINE_multi_string(
    "prompt",
    [],
    "Text to continue, where \\n, \\t and \\\\ are understood; may be repeated.",
)
CHAT = flags.DEFINE_bool("chat", False, "Answer what is typed, by the model's chat template.")
SYSTEM = flags.DEFINE_string("system", None, "What the model is told before a chat.")
MAX_CONTEXT = flags.DEFINE_integer(
    "max_context",
    None,
    "Tokens of a prompt, or a chat, and what follows, at most.",
    lower_bound=2,
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


def check_prompts() -> None:
    """Raises UsageError where there is not what to continue."""
    if CHAT.value and PROMPT.value:
        raise UsageError("--prompt: does nothing with --chat, which reads what is typed")
    if SYSTEM.value is not None and not CHAT.value:
        raise UsageError("--system: does nothing without --chat")
    if not PROMPT.value and not CHAT.value:
        raise UsageError("--prompt: is required; write --prompt='text to continue', or --chat")
    if not all(PROMPT.value):
        raise UsageError("--prompt: is empty; give at least one character")


def ids_of(prompt: str, dialect: Dialect) -> list[int]:
    """The tokens of a prompt from the command line."""
    try:
        return dialect.encode(encoded(prompt).decode("utf-8", "surrogateescape"))
    except (UnicodeEncodeError, TypeError):  # bytes that no text of this tokenizer holds
        raise UsageError("--prompt: is not UTF-8, and the tokenizer knows no bytes") from None


def main() -> None:
    """See the module's docstring."""
    try:
        sampling = Sampling(temperature=TEMPERATURE.value, top_k=TOP_K.value, top_p=TOP_P.value)
    except ConfigError as error:
        raise UsageError(f"--{error}") from None
    check_prompts()
    stops = [stop_text(stop) for stop in STOP.value]
    folder = stored.run_folder("workdir", WORKDIR.value)
    config = read_config(folder)
    dialect = stored.dialect_of(WORKDIR.value, folder, config)
    if CHAT.value and dialect.template is None:
        raise UsageError(
            f"--chat: {WORKDIR.value} has no chat template; continue a --prompt, or import a model "
            "that has one"
        )
    prompts = [ids_of(text, dialect) for text in PROMPT.value]
    longest = max(map(len, prompts), default=0) + TOKENS.value
    check_length(longest, config.seq_len)
    config, step, variables = stored.read_run(WORKDIR.value, STEP.value)
    warn_of_length(longest, config.seq_len)
    use_compilation_cache()
    trained = config.model, variables
    decoder = Decoder(*(fold_if_linear(*trained) if FOLD.value else trained))
    settings = {"sampling": sampling, "seed": SEED.value, "end": dialect.ends}
    if CHAT.value:
        room = MAX_CONTEXT.value or config.seq_len
        talk(decoder, dialect, SYSTEM.value, stops, TOKENS.value, room, settings)
        return
    began = time.perf_counter()
    rows = [Continuation(dialect, prompt, stops, dialect.ends) for prompt in prompts]
    alone = len(rows) == 1
    proceed(decoder, rows, settings, show=alone)
    if not alone:
        for row in rows:
            print(f"--- {dialect.decode(row.prompt)!r}\n{row.text}")
    made = sum(len(row.ids) for row in rows)
    took, each = time.perf_counter() - began, cache_bytes(decoder.model)
    log.info(
        "step %d: %d new tokens in %.1f s with compilation; a token's cache takes %s bytes, "
        "%.3g MB for %d tokens in %d rows",
        *(step, made, took, f"{each:,}"),
        *(each * longest * len(prompts) / 1e6, longest, len(prompts)),
    )


def check_length(longest: int, trained: int) -> None:
    """Raises UsageError where prompt and continuation are longer than what is asked for, or than
    anything that makes sense."""
    if (MAX_CONTEXT.value or 0) > FARTHEST * trained:
        raise UsageError(
            f"--max_context={MAX_CONTEXT.value}: is more than {FARTHEST} times the {trained} that "
            "the model was trained on"
        )
    most = MAX_CONTEXT.value or FARTHEST * trained
    if longest > most and not CHAT.value:
        why = f"--max_context={most}" if MAX_CONTEXT.value else f"{FARTHEST} times the {trained}"
        of = "" if MAX_CONTEXT.value else " that the model was trained on"
        raise UsageError(
            f"--tokens={TOKENS.value}: makes {longest:,} with the longest --prompt, more than "
            f"{why}{of}"
        )


def warn_of_length(longest: int, trained: int) -> None:
    """Where the model has not seen the like."""
    reached = (MAX_CONTEXT.value or 0) if CHAT.value else longest
    if reached > trained:
        log.warning(
            "up to %d tokens with the prompt; the model was trained on %d", reached, trained
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
