"""Whether a run of its size has the data for it."""

import logging
from typing import Sequence

from kha_jax.config import ConfigError, to_dict
from kha_jax.training.run_config import RunConfig

LARGE = 10**9  # tokens, from which on a run is no trial
MANY = 2  # times the ids of the data, which rounding up to a multiple does not make
REPEATED = 4  # epochs, beyond which text that is read again teaches less and less (2305.16264)
log = logging.getLogger("kha_jax")


def check_vocabulary(config: RunConfig, arguments: Sequence[str]) -> None:
    """Raises ConfigError for a large run whose model has ids for other data than that of the
    config, unless the arguments of the command say what data is meant."""
    ids, there = config.model.vocabulary_size, config.data.vocabulary_size()
    tokens = config.steps * config.tokens_per_step
    typed = any(argument.lstrip("-").startswith("config.data.") for argument in arguments)
    if typed or tokens <= LARGE or there is None or ids <= MANY * there:
        return
    source = f"config.data.source={to_dict(config)['data']['source']}"
    raise ConfigError(
        "config.model.vocabulary_size",
        f"{ids:,} ids for data that has {there:,}, in a run of {tokens / 1e6:,.0f}M tokens; name "
        f"the data with --config.data.FIELD=VALUE, or say --{source} where that is meant (in a "
        f"sweep --set={source})",
    )


def epochs(config: RunConfig, examples: int) -> float:
    """How often a run reads all of its data."""
    return config.steps * config.batch_size / examples


def warn_of_epochs(config: RunConfig, examples: int) -> None:
    """Says when the data is read too often."""
    if (times := epochs(config, examples)) > REPEATED:
        log.warning("config.steps: the data is read %s times over", f"{times:,.1f}")
