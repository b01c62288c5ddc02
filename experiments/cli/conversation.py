"""A conversation on the terminal: a line in, an answer out as it comes."""

import sys
from typing import Callable, Iterator

Messages = list[dict[str, str]]


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
