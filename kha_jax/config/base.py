"""Frozen, self-validating configs, and their form on the command line.

A config derives from `Config`, which makes it a keyword-only frozen dataclass. It is checked when
it is made: field types first, then its own `validate`. A slot that one of several configs may fill
is declared with `choice`; on the command line the slot's `kind` (or another word) selects the
config and the fields of all its members are known, so that switching the kind never needs another
file. A field set for a kind that does not have it is an error, but for what a config file had set
for the kind that a command line switched away from. What a field means stands in a string below it.
"""

import ast
import contextlib
import dataclasses
import difflib
import functools
import inspect
import itertools
import textwrap
import types
import typing
from typing import Any, ClassVar, Iterator, Mapping

LARGEST_FLOAT = (2 - 2**-23) * 2.0**127  # of float32


class ConfigError(ValueError):
    """A config value that cannot be used. The message names the field, what was found and what
    would work."""

    def __init__(self, field: str, problem: str):
        self.field, self.problem = field, problem
        super().__init__(f"{field}: {problem}" if field else problem)

    def under(self, path: str) -> "ConfigError":
        """The same error with the field's full path from `path` downwards."""
        return ConfigError(".".join(part for part in (path, self.field) if part), self.problem)


@contextlib.contextmanager
def under(path: str) -> Iterator[None]:
    """Config errors raised within name their field from `path` downwards."""
    try:
        yield
    except ConfigError as error:
        raise error.under(path) from None


def near(word: str, known: typing.Iterable[str]) -> str:
    """A hint that names the closest known word, or lists the known ones when none is close."""
    known = [str(k) for k in known]
    close = difflib.get_close_matches(str(word), known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(known)}"


def choice(
    choices: Mapping[str, type],
    default: "Config",
    by: str = "kind",
    like: Mapping[str, str] = types.MappingProxyType({}),
    folder: str | None = None,
) -> Any:
    """A dataclass field that holds one of the configs in `choices`, selected by name under the key
    `by`. like: fields of the chosen config that are, where the command line leaves them unset, as
    the named siblings of the choice. folder: the kind that is meant where a folder stands for the
    name, which is then its field `folder`."""
    metadata = {"choices": choices, "by": by, "like": like, "folder": folder}
    return dataclasses.field(default=default, metadata=metadata)


@typing.dataclass_transform(frozen_default=True, kw_only_default=True)
class Config:
    """Base of all configs; subclasses become frozen keyword-only dataclasses that check field
    types, then `validate`."""

    _hints: ClassVar[dict[str, Any]]

    def __init_subclass__(cls):
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)

    def __post_init__(self):
        hints = type_hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if "choices" in field.metadata:
                if type(value) not in field.metadata["choices"].values():
                    names = ", ".join(c.__name__ for c in field.metadata["choices"].values())
                    raise ConfigError(field.name, f"expected one of {names}, found {value!r}")
            else:
                object.__setattr__(self, field.name, checked(value, hints[field.name], field.name))
        self.validate()

    def validate(self) -> None:
        """Raises ConfigError where fields contradict each other; the default has nothing to
        check."""

    def require(self, condition: bool, field: str, problem: str) -> None:
        """Raises ConfigError(field, problem) unless the condition holds."""
        if not condition:
            raise ConfigError(field, problem)

    def at_least(self, minimum: float, *fields: str) -> None:
        """Raises ConfigError for the first field that is set and below the minimum."""
        for field in fields:
            value = getattr(self, field)
            self.require(
                value is None or value >= minimum,
                field,
                f"must be at least {minimum}, found {value}",
            )

    def replace(self, **changes: Any) -> "Config":
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)


def type_hints(cls: type) -> dict[str, Any]:
    """The resolved annotations of a config class, kept on the class."""
    if "_hints" not in cls.__dict__:
        cls._hints = typing.get_type_hints(cls)
    return cls._hints


@functools.cache
def meanings(cls: type) -> dict[str, str]:
    """What the fields of a config class mean, by their names. Python keeps no strings below fields,
    so they are read from the source; a class that has none, as in a notebook, adds nothing."""
    if cls is Config:
        return {}
    inherited = [meanings(base) for base in reversed(cls.__bases__) if issubclass(base, Config)]
    return {
        name: text for known in [*inherited, _below_fields(cls)] for name, text in known.items()
    }


def _below_fields(cls: type) -> dict[str, str]:
    try:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    except (OSError, TypeError, SyntaxError):  # no file, or one that has changed since
        return {}
    texts = {}
    for pair in itertools.pairwise(definition.body):
        match pair:
            case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                texts[name] = " ".join(text.split())
    return texts


def checked(value: Any, hint: Any, name: str) -> Any:
    """The value if it fits the annotation (an int serves as a float, a list as a tuple), else
    ConfigError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        if value in arguments:
            return value
        raise ConfigError(name, f"{value!r} is not known; {near(value, arguments)}")
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return checked(value, next(a for a in arguments if a is not type(None)), name)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(name, f"expected a tuple, found {value!r}")
        return tuple(checked(item, arguments[0], f"{name}[{i}]") for i, item in enumerate(value))
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if abs(value) <= LARGEST_FLOAT:
            return float(value)
        raise ConfigError(name, f"must be finite in float32, found {value}")
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        if hint is int and not -(2**63) <= value < 2**63:
            raise ConfigError(name, "must fit in 64 bits, found a number beyond them")
        return value
    raise ConfigError(name, f"expected {hint.__name__}, found {value!r} ({type(value).__name__})")
