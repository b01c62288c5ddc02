"""Configs as nested values: what config.json holds, what a command line sets, and the way back."""

import dataclasses
import os
import types
import typing
from typing import Any, Callable, Iterator, Mapping

from ml_collections import config_dict

from kha_jax.config.base import Config, ConfigError, near, type_hints


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
    kind = values.pop(by)
    kind = kind_of(field, field.default) if kind is None else kind
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
