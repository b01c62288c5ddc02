"""Which runs a sweep wants: rows, under every combination of settings, seeds and learning rates."""

import collections
import functools
import hashlib
import itertools
import json
import re
from typing import NamedTuple, Sequence

from experiments.cli import command_line
from experiments.cli.codes import UsageError
from kha_jax.config import to_dict
from kha_jax.training.run_config import RunConfig
from kha_jax.training.run_folder import config_hash


class Wanted(NamedTuple):
    """A row before its seeds: arguments of experiments.train, the row that it is compared with, and
    what the paper prints."""

    name: str
    arguments: tuple[str, ...]
    baseline: str
    printed: float | None = None
    note: str = ""


class Planned(NamedTuple):
    """A run that is wanted: `arguments` of experiments.train but its folder, and the config that
    they make."""

    name: str
    row: str
    seed: int
    arguments: tuple[str, ...]
    config: RunConfig
    learning_rate: float | None = None

    def hash(self) -> str:
        """Of what decides its figures, but for the text that it reads."""
        return _hash(self.config)

    def tokens(self) -> int:
        return self.config.steps * self.config.tokens_per_step

    def flops(self) -> float:
        """Of the whole training, by the accounting."""
        return self.config.cost().training_flops * self.tokens()


@functools.cache
def _hash(config: RunConfig) -> str:
    evaluation = json.dumps(to_dict(config.evaluation))
    text = config_hash(config) + evaluation
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _short(value: str) -> str:
    """A value as a part of the name of a run and its folder."""
    return re.sub(r"[^\w.+-]+", "_", value).strip("_")


def varied(rows: Sequence[Wanted], settings: Sequence[str]) -> list[Wanted]:
    """The rows under every combination of `config.FIELD=VALUE,VALUE,...`; a single value is for all
    of them and not part of a name. Each is compared with its baseline under the same combination, a
    row that is alone with its first combination.

    Raises:
        UsageError: a setting has another form, or sets what another one does.
    """
    axes = []
    for text in settings:
        field, equals, values = text.partition("=")
        if not equals or not field.startswith("config."):
            problem = "must be config.FIELD=VALUE or config.FIELD=VALUE,VALUE,..."
            raise UsageError(f"--set={text}: {problem}")
        if field == "config.seed":
            raise UsageError(f"--set={text}: runs differ by their seeds; use --seeds=N")
        if any(field == axis[0][0] for axis in axes):
            raise UsageError(f"--set={text}: {field} is set twice; name all its values at once")
        # not the commas of a tuple
        axes.append([(field, value) for value in re.split(r",(?![^(]*\))", values)])
    combinations = list(itertools.product(*axes))

    def named(name: str, combination: tuple[tuple[str, str], ...]) -> str:
        many = [pair for pair, axis in zip(combination, axes) if len(axis) > 1]
        return "-".join(
            [name, *(f"{field.rpartition('.')[2]}={_short(value)}" for field, value in many)]
        )

    return [
        row._replace(
            name=named(row.name, combination),
            arguments=(*row.arguments, *(f"--{field}={value}" for field, value in combination)),
            baseline=named(row.baseline, combinations[0] if len(rows) == 1 else combination),
            printed=row.printed if len(combinations) == 1 else None,
        )
        for row in rows
        for combination in combinations
    ]


def runs(
    rows: Sequence[Wanted], seeds: int = 1, learning_rates: Sequence[str] = ()
) -> list[Planned]:
    """Every run: all rows of a seed before the next seed, so that a part of them is paired.

    Raises:
        UsageError: a config cannot be used, or a rate is no number.
    """
    for rate in learning_rates:
        if not re.fullmatch(r"[0-9.]+(e-?[0-9]+)?", rate):
            raise UsageError(f"--learning_rates={rate}: must be a number, such as 3e-3")
    wanted = [
        _planned(row, seed, rate)
        for seed in range(seeds)
        for row in rows
        for rate in learning_rates or [""]
    ]
    counts = collections.Counter((run.row, run.seed, run.learning_rate) for run in wanted)
    for (row, _, rate), count in counts.items():
        if count > 1:
            which = row if rate is None else f"{row} at the learning rate {rate:g}"
            raise UsageError(f"--learning_rates, --set: ask for {which} twice; name each once")
    return wanted


def _planned(row: Wanted, seed: int, rate: str) -> Planned:
    arguments = (*row.arguments, f"--config.seed={seed}")
    if rate:
        arguments = (*arguments, f"--config.optimizer.learning_rate={rate}")
    name = "-".join(filter(None, (row.name, rate and f"lr{rate}", f"seed{seed}")))
    config = command_line.config_of(RunConfig, arguments)
    if not config.evaluation.every:
        raise UsageError("config.evaluation.every: runs are compared by evaluations, found 0")
    return Planned(name, row.name, seed, arguments, config, float(rate) if rate else None)
