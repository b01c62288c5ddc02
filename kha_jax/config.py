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
import os
import textwrap
import types
import typing
from typing import Any, Callable, ClassVar, Iterator, Mapping

from ml_collections import config_dict

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


def kind_of(field: dataclasses.Field, value: Config) -> str:
    """The name under which a choice field's value stands in its choices."""
    return next(name for name, cls in field.metadata["choices"].items() if cls is type(value))


def to_dict(config: Config) -> dict[str, Any]:
    """Every field with its value, nested, choices with their kind: what config.json
    holds."""
    return _nested(config, lambda field, value: True)


def departures(config: Config) -> dict[str, Any]:
    """What differs from the defaults, nested, choices with their kind: a field that a later version
    adds does not show in it."""
    return _nested(config, lambda field, value: value != field.default)


def _nested(config: Config, shows: Callable[[dataclasses.Field, Any], bool]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if "choices" in field.metadata:
            if shows(field, value):
                kind = {field.metadata["by"]: kind_of(field, value)}
                out[field.name] = kind | _nested(value, shows)
        elif isinstance(value, Config):
            out[field.name] = _nested(value, shows)
        elif shows(field, value):
            out[field.name] = value
    return out


def dotted(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested values by their dotted fields, from `path` downwards."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        where = f"{path}.{name}" if path else name
        out.update(dotted(value, where) if isinstance(value, Mapping) else {where: value})
    return out


def differences(old: Config, new: Config, path: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted fields whose values differ, from `path` downwards, with both values; None for a field
    of a kind that one of the configs does not have."""
    before, after = dotted(to_dict(old), path), dotted(to_dict(new), path)
    both = {field: (before.get(field), after.get(field)) for field in {**after, **before}}
    return {field: (was, now) for field, (was, now) in both.items() if was != now}


def to_config_dict(config: Config) -> config_dict.ConfigDict:
    """The command line's form. In a choice, None stands for the chosen kind's default, so that
    kinds can be switched."""
    out = config_dict.ConfigDict()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if "choices" in field.metadata:
            out[field.name] = _chosen(field, value)
        elif isinstance(value, Config):
            out[field.name] = to_config_dict(value)
        elif value is None:
            hint = type_hints(type(config))[field.name]
            out[field.name] = config_dict.placeholder(_plain_type(hint))
        else:
            out[field.name] = value
    return out


def _chosen(field: dataclasses.Field, value: Config) -> config_dict.ConfigDict:
    """A choice with its kind and what departs from that kind's defaults, None for all else."""
    slot = _unset_choice(field)
    slot[field.metadata["by"]] = kind_of(field, value)
    for own in dataclasses.fields(value):
        given = getattr(value, own.name)
        if given == own.default:
            continue
        if "choices" in own.metadata:
            slot[own.name] = _chosen(own, given)
        else:
            slot[own.name] = to_config_dict(given) if isinstance(given, Config) else given
    return slot


def choices_in(config: Config, path: str = "") -> Iterator[tuple[str, str, type]]:
    """(dotted field, kind, class) of every choice that a config has made, outer ones first."""
    for field in dataclasses.fields(config):
        value, where = getattr(config, field.name), f"{path}.{field.name}".lstrip(".")
        if "choices" in field.metadata:
            yield where, kind_of(field, value), type(value)
        if isinstance(value, Config):
            yield from choices_in(value, where)


def _unset(*classes: type, **leading: Any) -> config_dict.ConfigDict:
    """The fields of these configs with None for each default, after the leading ones."""
    out = config_dict.ConfigDict(leading)
    for cls in classes:
        for field in dataclasses.fields(cls):
            hint = type_hints(cls)[field.name]
            if field.name in out:
                continue
            if "choices" in field.metadata:
                out[field.name] = _unset_choice(field)
            elif isinstance(hint, type) and issubclass(hint, Config):
                out[field.name] = _unset(hint)
            else:
                out[field.name] = config_dict.placeholder(_plain_type(hint))
    return out


def _unset_choice(field: dataclasses.Field) -> config_dict.ConfigDict:
    """The fields of all members of a choice, and its kind, with None for each default."""
    kind = {field.metadata["by"]: config_dict.placeholder(str)}
    return _unset(*field.metadata["choices"].values(), **kind)


def _is_set(value: Any) -> bool:
    """Whether a value, or any below it, is not None."""
    return any(map(_is_set, value.values())) if _is_group(value) else value is not None


def _is_group(value: Any) -> bool:
    return isinstance(value, (Mapping, config_dict.ConfigDict))


def _plain_type(hint: Any) -> type:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return type(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return _plain_type(next(a for a in arguments if a is not type(None)))
    return origin or hint


def from_dict(
    cls: type,
    values: Mapping[str, Any],
    path: str = "config",
    typed: typing.Collection[str] = (),
) -> Any:
    """Builds and validates a config from nested mappings (a ConfigDict, or config.json read back).

    typed: full paths of the values that a person has just set over the others. Where a kind is
    among them, fields that the new kind does not have are dropped, unless they are too.

    Raises:
        ConfigError: with the full path of the offending field.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = type_hints(cls)
    arguments, unset = {}, isinstance(values, config_dict.ConfigDict)
    for name, value in dict(values).items():
        if name not in fields:
            raise ConfigError(f"{path}.{name}", f"is not a known field; {near(name, fields)}")
        where = f"{path}.{name}"
        if "choices" in fields[name].metadata:
            arguments[name] = _choice_from_dict(fields[name], value, where, typed, values)
        elif isinstance(hints[name], type) and issubclass(hints[name], Config):
            if not _is_group(value):
                expected = f"expected fields of {hints[name].__name__}, found {value!r}"
                raise ConfigError(where, expected)
            arguments[name] = from_dict(hints[name], value, where, typed)
        elif value is not None or not unset:
            arguments[name] = value
    return _construct(cls, arguments, path)


def _choice_from_dict(
    field: dataclasses.Field,
    value: Any,
    path: str,
    typed: typing.Collection[str],
    siblings: Mapping[str, Any],
) -> Config:
    choices, by = field.metadata["choices"], field.metadata["by"]
    if not _is_group(value) or by not in value:
        raise ConfigError(path, f"expected fields with {by!r} among them, found {value!r}")
    values = dict(value)
    kind = values.pop(by) or kind_of(field, field.default)
    if field.metadata["folder"] and kind not in choices and _names_folder(kind):
        given, kind = kind, field.metadata["folder"]
        if f"{path}.folder" in typed and values.get("folder") != given:
            raise ConfigError(f"{path}.{by}", f"{given!r} is a folder, and {path}.folder another")
        values["folder"] = given
    if kind not in choices:
        raise ConfigError(f"{path}.{by}", f"{kind!r} is not known; {near(kind, choices)}")

    def was_typed(name: str) -> bool:
        return any(f"{where}.".startswith(f"{path}.{name}.") for where in typed)

    own = {f.name for f in dataclasses.fields(choices[kind])}
    for name in [n for n in values if n not in own]:
        owners = [
            k for k, cls in choices.items() if name in {f.name for f in dataclasses.fields(cls)}
        ]
        if not owners:
            known = near(name, own) if own else "it has none"
            raise ConfigError(f"{path}.{name}", f"is not a known field; {known}")
        if _is_set(values[name]) and (was_typed(name) or not was_typed(by)):
            belongs = f"it belongs to {' and '.join(owners)}"
            raise ConfigError(f"{path}.{name}", f"does nothing with {by}={kind!r}; {belongs}")
    for name in own & field.metadata["like"].keys() & values.keys():
        sibling = siblings.get(field.metadata["like"][name])
        if isinstance(sibling, config_dict.ConfigDict):
            values[name] = config_dict.ConfigDict(_overlaid(sibling, values[name]))
    given = {name: item for name, item in values.items() if name in own and _is_set(item)}
    return from_dict(choices[kind], given, path, typed)


def _names_folder(name: str) -> bool:
    """Whether a name that is no kind stands for a folder, which need not be there."""
    return "/" in name or os.path.isdir(name)


def _overlaid(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `over` and, where they are not set, those of `base`; another kind takes none of
    them."""
    if over.get("kind") not in (None, base.get("kind")):
        return dict(over)
    out = {}
    for name, item in over.items():
        if _is_group(item):
            out[name] = _overlaid(base[name], item)
        else:
            out[name] = base[name] if item is None else item
    return out


def _construct(cls: type, arguments: dict[str, Any], path: str) -> Any:
    missing = [
        f.name
        for f in dataclasses.fields(cls)
        if f.name not in arguments
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{path}.{missing[0]}", "is required and was not given")
    try:
        return cls(**arguments)
    except ConfigError as error:
        raise error.under(path) from None
