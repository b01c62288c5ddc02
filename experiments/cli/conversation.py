"""A conversation on the terminal: a line in, an answer out as it comes."""

import logging
import sys
from typing import Any, Callable, Iterator, Sequence

from experiments.cli.codes import UsageError
from kha_jax.inference.decoding import Decoder, Session
from kha_jax.inference.dialect import Dialect
from kha_jax.inference.text import Continuation

Messages = list[dict[str, str]]
log = logging.getLogger("kha_jax")


def talk(
    decoder: Decoder,
    dialect: Dialect,
    system: str | None,
    stops: Sequence[str],
    tokens: int,
    length: int,
    settings: dict[str, Any],
) -> None:
    """Answers what is typed, by the model's chat template.

    tokens: of an answer, at most; length: of the conversation; settings: of `Session.stream`.

    Raises:
        UsageError: the conversation has outgrown its length.
    """
    session = Session(decoder, length)

    def answer(messages: Messages) -> Iterator[str]:
        prompt = dialect.encode(dialect.prompt(messages), special=False)
        if len(prompt) >= length:
            raise UsageError(
                f"--max_context={length}: the conversation has grown to {len(prompt)} tokens; "
                "begin anew, or give it more"
            )
        row = Continuation(dialect, prompt, stops, dialect.ends)
        row.take()  # what was typed
        for ids in session.stream(prompt, tokens, **settings):
            row.add(ids)
            yield row.take()
            if row.done:
                return
        row.finish()
        yield row.take()

    turns = converse(answer, system)
    log.info("%d answers, %d tokens of %d in the cache", turns, len(session.ids), length)


def converse(answer: Callable[[Messages], Iterator[str]], system: str | None = None) -> int:
    """Answers every line of standard input in the light of those before; how many there were.
    Ctrl-C ends an answer, and what was shown of it stands; Ctrl-D ends the conversation.

    answer: pieces of the text that follows the messages, as they come.
    """
    messages: Messages = [{"role": "system", "content": system}] if system else []
    turns = 0
    for line in _lines():
        messages.append({"role": "user", "content": line})
        said = ""
        try:
            for piece in answer(messages):
                said += piece
                _show(piece)
        except KeyboardInterrupt:
            pass
        _show("\n")
        messages.append({"role": "assistant", "content": said})
        turns += 1
        if getattr(sys.stdout, "gone", False):
            break  # nobody reads on
    return turns


def _lines() -> Iterator[str]:
    """Those of standard input that hold anything."""
    asks = sys.stdin.isatty()
    while True:
        if asks:
            _show("> ")
        try:
            line = sys.stdin.readline()
        except (KeyboardInterrupt, UnicodeDecodeError):
            return
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
