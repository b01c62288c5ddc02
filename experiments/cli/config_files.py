"""Config files that a command line names: run, once, and their fields checked."""

import copy
import functools
import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any

from ml_collections.config_dict import ConfigDict

from experiments.cli import hints
from experiments.cli.codes import UsageError
from kha_jax.config import ConfigError, near, to_config_dict

REPOSITORY = Path(__file__).resolve().parents[2]


def check_config_file(path: str, flag: str = "--config") -> None:
    """Raises UsageError where there is no such file, with the one of configs/ that has the name."""
    if not os.path.isfile(path):  # False also where the name is no name
        hint = hints.config_file(path, REPOSITORY / "configs")
        raise UsageError(f"{flag}: no file {path}; {hint}")


@functools.cache
def functions_of(path: str) -> dict[str, Any]:
    """What a config file defines; it is run once. The config.json of a run defines nothing."""
    return {} if path.endswith(".json") else runpy.run_path(path)


@functools.cache
def _made(path: str, variant: str) -> Any:
    return functions_of(path)["get_config"](*filter(None, [variant]))


def run_config_file(path: str, variant: str = "", flag: str = "--config") -> ConfigDict:
    """What get_config(variant) of a config file returns, or what the config.json of a run holds;
    `flag` has named it.

    Raises:
        UsageError: the file cannot be run, with the line of it that says why, or defines no config.
    """
    if path.endswith(".json"):
        return _stored_config(path, variant, flag)
    if (neighbours := str(Path(path).resolve().parent)) not in sys.path:
        sys.path.append(neighbours)  # of a config file outside of the repository
    try:
        functions = functions_of(path)
        if "get_config" not in functions:
            raise UsageError(f"{flag}={path}: defines no get_config(variant)")
        config = _made(path, variant)
    except ConfigError as error:
        raise UsageError(f"{flag}={path}: {error}") from None
    except (Exception, SystemExit) as error:  # whatever the code of a stranger raises
        if isinstance(error, UsageError):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        number = next((f.lineno for f in reversed(frames) if f.filename == path), None)
        number = getattr(error, "lineno", None) or number
        said = " ".join(str(error).split())
        if type(error) is not ValueError:  # which says what a variant is not
            said = f"line {number}: {type(error).__name__}: {said}"
        raise UsageError(f"{flag}={path}: {said}") from None
    if not isinstance(config, ConfigDict):
        found = type(config).__name__
        raise UsageError(f"{flag}={path}: get_config returns a {found}, expected a ConfigDict")
    return copy.deepcopy(config)


def _stored_config(path: str, variant: str, flag: str) -> ConfigDict:
    from kha_jax.training.run_folder import read_config

    if variant or os.path.basename(path) != "config.json":
        problem = "is no config.json of a run, which knows no variants"
        raise UsageError(f"{flag}={path}{variant and ':' + variant}: {problem}")
    return to_config_dict(read_config(Path(path).parent))


def check_override(config: Any, path: str, text: str | None) -> None:
    """Checks one override, before ml_collections does in words of its own.

    Raises:
        UsageError: it names no field, or a text that cannot be its value.
    """
    node, walked = config, "config"
    for name in path.split("."):
        if not hasattr(node, "keys"):
            raise UsageError(f"{walked}.{name}: {walked} is a single value, not a group of fields")
        if name not in node:
            meant = hints.nested(config, path)
            hint = f"did you mean {meant}?" if meant else near(name, node.keys())
            raise UsageError(f"{walked}.{name}: is not a known field; {hint}")
        holder, node, walked = node, node[name], f"{walked}.{name}"
    kind = holder.get_type(name)
    if hasattr(node, "keys"):
        raise UsageError(f"{walked}: is a group of fields; set one of {', '.join(node.keys())}")
    if kind in (int, float) and text is not None:
        try:
            kind(text)
        except ValueError:
            raise UsageError(f"{walked}: expected {kind.__name__}, found {text!r}") from None


def stem(named: str) -> str:
    """FILE-VARIANT of FILE.py:VARIANT."""
    path, _, variant = named.partition(":")
    return "-".join(filter(None, (Path(path).stem, variant)))
