"""What all commands share: the config flag, one-line errors, exit codes, logging."""

import json
import logging
import re
import sys
from pathlib import Path
from typing import Any, Callable

from absl import flags
from ml_collections import config_flags

from kha_jax.config import Config, ConfigError, from_dict, near

DONE, USAGE, DATA, STORAGE, PREEMPTED, NON_FINITE = 0, 2, 65, 74, 75, 76
REPOSITORY = Path(__file__).resolve().parent.parent
DEFAULT_CONFIG = str(REPOSITORY / "configs" / "kha_tiny.py")


class UsageError(Exception):
    """A command line that cannot be used; shown as one line, exit code 2."""


def define_config(default: str = DEFAULT_CONFIG) -> Any:
    """The flag --config=file.py[:variant], with --config.a.b=value for single fields."""
    return config_flags.DEFINE_config_file("config", default, "Run config, FILE.py or FILE.py:VARIANT.", lock_config=True)


def parse_config(cls: type, holder: Any) -> Any:
    """The frozen config of type `cls` from the parsed flag.

    Raises:
        UsageError: names the field, what was found and what would work.
    """
    try:
        return from_dict(cls, holder.value)
    except ConfigError as error:
        raise UsageError(str(error)) from None


def _parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, with every complaint turned into one line."""
    try:
        rest = flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        raise UsageError(f"--{error.flagname} is not a known flag; {near(error.flagname, sorted(_own_flags()))}") from None
    except ConfigError as error:
        raise UsageError(str(error)) from None
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(_one_line(error, argv)) from None
    except OSError as error:
        raise UsageError(f"--config: cannot read {error.filename}: {error.strerror}") from None
    if len(rest) > 1:
        raise UsageError(f"{rest[1]!r} is not understood; flags have the form --name=value")
    return rest


def _own_flags() -> set[str]:
    main = Path(sys.argv[0]).stem
    modules = flags.FLAGS.flags_by_module_dict()
    own = [flag.name for module, members in modules.items() if module.startswith("experiments") or module == sys.argv[0] for flag in members]
    return {*own, main} - {main} or {"config"}


def _one_line(error: Exception, argv: list[str]) -> str:
    """ml_collections knows the bad key or value but words it over several lines; find the override that it meant."""
    text = " ".join(str(error).split())
    for argument in argv[1:]:
        match = re.match(r"--?(config\.[\w.]+)(=(.*))?$", argument)
        if not match:
            continue
        path, leaf = match[1], match[1].rsplit(".", 1)[-1]
        hint = re.search(r"Did you mean [\"'](\w+)[\"']", text)
        if hint and f'"{leaf}"' in text.replace("'", '"'):
            return f"{path}: is not a known field; did you mean {hint[1]!r}?"
        if match[3] is not None and match[3] in text and isinstance(error, (flags.IllegalFlagValueError, TypeError, ValueError)):
            return f"{path}: cannot use the value {match[3]!r}; {text}"
    return text


def read_config(path: Path, cls: type) -> Any:
    """A config from the config.json of a run folder."""
    return from_dict(cls, json.loads(path.read_text()))


def differences(old: dict[str, Any], new: dict[str, Any], path: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted fields whose values differ, with both values."""
    out: dict[str, tuple[Any, Any]] = {}
    for name in {**old, **new}:
        before, after = old.get(name), new.get(name)
        where = f"{path}.{name}" if path else name
        if isinstance(before, dict) and isinstance(after, dict):
            out.update(differences(before, after, where))
        elif before != after:
            out[where] = (before, after)
    return out


def run(main: Callable[[], int | None]) -> None:
    """Parses the flags, calls main and leaves with the contract's exit code; expected errors are one line on stderr."""
    from kha_jax.checkpoint import CheckpointError
    from kha_jax.data import DataError

    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("kha_jax").setLevel(logging.INFO)
    codes = {UsageError: USAGE, ConfigError: USAGE, DataError: DATA, CheckpointError: STORAGE}
    try:
        _parse_flags(sys.argv)
        code = main() or DONE
    except tuple(codes) as error:
        print(f"error: {error}", file=sys.stderr)
        code = codes[type(error)]
    sys.exit(code)


__all__ = ["Config", "UsageError", "define_config", "differences", "parse_config", "read_config", "run"]
