"""Frozen, self-validating configs, and their forms.

`base`: what a config is, and how it is checked. `forms`: configs as nested values, as a file holds
them and as a command line sets them.
"""

from kha_jax.config.base import Config as Config
from kha_jax.config.base import ConfigError as ConfigError
from kha_jax.config.base import checked as checked
from kha_jax.config.base import choice as choice
from kha_jax.config.base import meanings as meanings
from kha_jax.config.base import near as near
from kha_jax.config.base import type_hints as type_hints
from kha_jax.config.base import under as under
from kha_jax.config.forms import choices_in as choices_in
from kha_jax.config.forms import departures as departures
from kha_jax.config.forms import differences as differences
from kha_jax.config.forms import dotted as dotted
from kha_jax.config.forms import from_dict as from_dict
from kha_jax.config.forms import kind_of as kind_of
from kha_jax.config.forms import to_config_dict as to_config_dict
from kha_jax.config.forms import to_dict as to_dict
