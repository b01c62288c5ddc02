"""Settings of config fields that one flag gives, as `--set=config.FIELD=VALUE`."""

import re
from typing import Any, Sequence

from absl import flags
from ml_collections import config_flags
from ml_collections.config_dict import ConfigDict

from experiments.cli import codes, command_line, config_files
from experiments.cli.codes import UsageError
from kha_jax.config import to_config_dict


class _Given(flags.ArgumentParser):
    """One config, whatever is named."""

    def __init__(self, config: ConfigDict):
        self.config = config

    def parse(self, path: str) -> ConfigDict:
        return self.config


def with_settings(config: Any, settings: Sequence[str], flag: str) -> Any:
    """The config with the values of config.FIELD=VALUE, which the flag gives.

    Raises:
        UsageError: names the field, what was found and what would work.
    """
    base, values = to_config_dict(config), flags.FlagValues()
    for setting in settings:
        match = re.fullmatch(r"config\.([^=]+)=(.*)", setting, re.DOTALL)
        if not match:
            raise UsageError(f"--{flag}={setting}: write config.FIELD=VALUE")
        config_files.check_override(base, match[1], match[2])
    line = ["", *(f"--{setting}" for setting in settings)]
    config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=line)
    values["config"].parser = _Given(base)
    values.set_default("config", "given")
    try:
        values(line)
        return command_line.parsed(type(config), values["config"])
    except (flags.Error, ValueError, TypeError) as error:
        raise UsageError(f"--{flag}: {codes.one_line(error)}") from None
