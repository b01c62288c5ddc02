"""What a run is: hashes of its config and text, and the entries of its lineage."""

import hashlib
import json
from pathlib import Path
from typing import Any

from experiments.cli.command_line import UsageError
from kha_jax.config import departures, differences, dotted
from kha_jax.training.run_config import RunConfig, old_name

# Fields that may change on resume: they decide what is recorded, not what is learnt.
FREE = (
    "evaluation.",
    "checkpoint.",
    "profile.",
    "mesh.",
    "max_nonfinite_steps",
    "hang_timeout",
    "data.cache_dir",
    "model.attention.kernel",
)
# Of the model, those that may be allowed to change: they decide how it is computed or trained. The
# others decide which function it is.
COMPUTED = (
    "model.stack",
    "model.remat",
    "model.loss.",
    "model.numerics.dtype",
    "model.feed_forward.kernel",
    "model.feed_forward.chunk_tokens",
    "model.feed_forward.balancing",
    "model.feed_forward.router_z_loss",
    "model.attention.query.apply",
    "model.attention.key.apply",
    "model.attention.value.apply",
)
IDENTITY = ("config", "data", "tokenizer")


def settings(old: RunConfig, new: RunConfig) -> list[str]:
    """The flags that make config `new` of config `old`."""
    differing = differences(old, new, "config")
    return [f"--{field}={now}" for field, (_, now) in differing.items() if now is not None]


def changed(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Fields that decide what is learnt and differ, with both values."""
    differing = differences(old, new)
    return {field: both for field, both in differing.items() if not field.startswith(FREE)}


def config_hash(config: RunConfig) -> str:
    """Of the fields that decide what is learnt."""
    learnt = {k: v for k, v in dotted(departures(config)).items() if not k.startswith(FREE)}
    fields = {old_name(k): v for k, v in learnt.items()}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def tokenizer_hash(config: RunConfig) -> str:
    """Which ids stand for which text; empty where there is no text."""
    tokenizer = config.data.tokenizer()
    return "" if tokenizer is None else tokenizer.fingerprint


def read_lineage(folder: Path, config: RunConfig) -> list[dict[str, Any]]:
    """The entries of lineage.json, oldest first; without one, what the config alone tells.

    Raises:
        UsageError: the file is damaged.
    """
    path = folder / "lineage.json"
    try:
        entries = [{k: one[k] for k in IDENTITY} for one in json.loads(path.read_text())]
        return entries or [{"config": config_hash(config)}]
    except FileNotFoundError:
        return [{"config": config_hash(config)}]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{path}: is damaged ({error!r}); put back that of the run") from None
