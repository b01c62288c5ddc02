"""Programs of several commands, each with flags of its own."""

from typing import Callable, Mapping, NamedTuple, Sequence

from experiments.cli.codes import UsageError
from experiments.cli.command_line import own_flags
from kha_jax.config import near


class Command(NamedTuple):
    """One of several that a program has, by the word behind it. flags: the names of its own."""

    main: Callable[[], int | None]
    flags: tuple[str, ...]


def command_of(commands: Mapping[str, Command], words: Sequence[str]) -> Command:
    """The one that the words name.

    Raises:
        UsageError: they name none, or a flag is another command's.
    """
    word = words[0] if words else ""
    if word not in commands:
        hint = near(word, commands)
        raise UsageError(f"{word or 'no command'!r}: is not a command; {hint}")
    for flag in own_flags():
        if flag.present and flag.name not in commands[word].flags:
            hint = near(flag.name, commands[word].flags)
            raise UsageError(f"--{flag.name}: is no flag of {word}; {hint}")
    return commands[word]
