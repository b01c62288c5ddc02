"""What --help and --config.help print."""

import dataclasses
import inspect
import sys
import textwrap
import typing
from pathlib import Path
from typing import Any, Iterator

from absl import flags

from kha_jax.config import Config, kind_of, meanings, type_hints


def of_fields(config: Config, path: str, told: set[type] | None = None) -> Iterator[str]:
    """What a config and those in it are, and their fields with values and types. told: classes that
    have been described above."""
    told = set() if told is None else told
    above = type(config) in told
    told.add(type(config))
    yield f"{path} ({type(config).__name__}{', as above' if above else ''})"
    if not above:
        paragraphs = inspect.getdoc(type(config)).split("\n\n")
        yield "\n\n".join(_filled(paragraph, "    ", "    ") for paragraph in paragraphs)
    says = {} if above else meanings(type(config))
    rows, inner = {}, {}
    for field in dataclasses.fields(config):
        value, where = getattr(config, field.name), f"{path}.{field.name}"
        if isinstance(value, Config):
            inner[where] = value
        if "choices" in field.metadata:
            term = f"--{where}.{field.metadata['by']}={kind_of(field, value)}"
        else:
            term = f"{where}.*" if isinstance(value, Config) else f"--{where}={_typed(value)}"
        rows[f"{term}  [{_accepts(config, field)}]"] = says.get(field.name, "")
    yield from _stacked(rows)
    yield ""
    for where, value in inner.items():
        yield from of_fields(value, where, told)


def _typed(value: Any) -> str:
    """A value as one types it."""
    if isinstance(value, tuple):
        return str(value[0]) if len(value) == 1 else f'"{value}"'
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _accepts(config: Config, field: dataclasses.Field) -> str:
    """A field's type or choices, and its default."""
    if "choices" in field.metadata:
        kinds = ", ".join(field.metadata["choices"])
        return f"one of {kinds}; default {kind_of(field, field.default)}"
    kind = _type_name(type_hints(type(config))[field.name])
    if isinstance(field.default, Config):
        return f"{kind}, below"
    required = field.default is dataclasses.MISSING
    return f"{kind}; {'required' if required else f'default {_typed(field.default)}'}"


def _type_name(hint: Any) -> str:
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if type(None) in arguments:
        return f"{_type_name(arguments[0])} or None"
    return f"tuple of {_type_name(arguments[0])}" if arguments else hint.__name__


def wanted() -> bool:
    """Whether the command line asks for help."""
    return any(argument in ("-h", "-help", "--help", "--helpfull") for argument in sys.argv[1:])


def of_program(about: str, own: list[flags.Flag], home: Path) -> Iterator[str]:
    """What the program does, with examples, and its flags with their defaults, where files below
    `home` are named from there."""
    yield f"{about.strip()}\n\nFlags:"
    rows = {}
    for flag in own:
        default = flag.default_unparsed
        if flag.boolean:
            term = f"--[no]{flag.name}" if flag.default else f"--{flag.name}"
        elif default in (None, []):
            term = f"--{flag.name}=..."
        else:
            term = f"--{flag.name}={_typed(default).removeprefix(f'{home}/')}"
        rows[term] = flag.help.partition(";\n")[0]  # absl goes on there about repeating it
    yield from _columns(rows)


def _columns(rows: dict[str, str]) -> Iterator[str]:
    """Indented terms and their meanings, one beside the other."""
    width = min(max(map(len, rows), default=0), 58) + 6
    for term, meaning in rows.items():
        first, others = f"  {term}  ".ljust(width), " " * width
        yield textwrap.fill(meaning, 100, initial_indent=first, subsequent_indent=others)


def _stacked(rows: dict[str, str]) -> Iterator[str]:
    """Indented terms with their meanings below, as terms are long here."""
    for term, meaning in rows.items():
        yield _filled(term, "  ", "        ")
        if meaning:
            yield _filled(meaning, "        ", "        ")


def _filled(text: str, first: str, others: str) -> str:
    """The text in lines of 80 columns, but for a longer word."""
    whole = {"break_on_hyphens": False, "break_long_words": False}
    return textwrap.fill(text, 80, initial_indent=first, subsequent_indent=others, **whole)
