"""Commands that run in one process."""

from experiments.cli.codes import UsageError
from kha_jax.config import ConfigError
from kha_jax.errors import WaitError
from kha_jax.runs import cluster


def check(command: str, remedy: str) -> None:
    """Raises UsageError, with the remedy, where a cluster has started this command several
    times."""
    try:
        here = cluster.place(seconds=1)
    except (ConfigError, WaitError):
        return  # whatever it tells
    if here is not None:
        raise UsageError(
            f"{command}: runs in one process, and {here.cluster} has started {here.count}; {remedy}"
        )
