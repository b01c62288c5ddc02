"""Text as it is typed on a command line, where a shell has no good way to write a new line."""

import re

from experiments.cli.codes import UsageError


def encoded(prompt: str) -> bytes:
    """The bytes of a prompt, which need not be UTF-8, with \\n, \\t and \\\\ replaced by what they
    stand for."""
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
