"""A sweep that is stored, whole or in part, and what its runs say about its rows.

A sweep folder holds `sweep.json` (title, command, hardware, commit; `rows` with their baseline and
the paper's printed loss; the `runs` that were planned), `runs.csv` (one line per finished run) and
the run folders, of which any may be absent.
"""

import csv
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kha_jax.analysis.curves import smoothed
from kha_jax.analysis.rates import Curve, over_rates
from kha_jax.analysis.significance import (
    Agreement,
    Difference,
    agreement,
    holm,
    mean,
    paired,
    pooled_deviation,
)
from kha_jax.errors import SweepError
from kha_jax.metrics import column, read_lines
from kha_jax.runs.results import RunResult, read_results
from kha_jax.storage import open_regular, read_json

LOSSES = {
    "val_loss": "validation loss, nats per token",
    "train_loss": "training loss of the last tenth of the steps, nats per token",
}
# What zoo.csv, the table of experiments.zoo --csv, tells of a row where it stands beside a sweep.
COSTS = {
    "training_flops": "training FLOPs a token",
    "step_seconds": "step time",
    "cache_bytes": "cache",
}


class Row(NamedTuple):
    """A row of a table. baseline: the row that it is compared with, itself for a baseline. printed:
    the paper's loss."""

    name: str
    baseline: str
    printed: float | None
    note: str


class Sweep(NamedTuple):
    """A sweep as it is stored. planned: (name, row, seed) of its runs. finished: by name. others,
    dropped: names in runs.csv that are planned with another config, and that are not planned any
    more, which nothing else counts. costs: of rows and their baselines, what is known of COSTS."""

    folder: Path
    about: dict[str, str]
    rows: dict[str, Row]
    planned: list[tuple[str, str, int]]
    finished: dict[str, RunResult]
    others: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    costs: dict[str, dict[str, float]] = {}

    @property
    def in_turns(self) -> bool:
        """Whether step times are those of zoo.csv, and not of the runs."""
        return any("step_seconds" in of for of in self.costs.values())

    def log(self, name: str) -> list[dict[str, Any]]:
        """The lines of a run's metrics.jsonl; none where its folder is not here."""
        try:
            return list(read_lines(self.folder / name / "metrics.jsonl"))
        except OSError:
            return []


class Result(NamedTuple):
    """What the runs of a row say.

    learning_rate, rates: the best one, and how many there were. runs: finished ones at that rate.
    losses: of each seed. unfinite: runs without a finite loss, which no other number counts.
    differences: losses less those of the baseline, seed by seed. difference: their mean; None for
    baselines.
    """

    row: Row
    learning_rate: float
    rates: int
    runs: list[RunResult]
    losses: dict[int, float]
    unfinite: int
    differences: dict[int, float]
    difference: Difference | None
    printed_difference: float | None
    accuracy: float
    time_ratio: float
    spike_share: float

    @property
    def loss(self) -> float:
        """Mean over seeds."""
        return mean(self.losses.values())

    @property
    def sign_agrees(self) -> bool | None:
        """Whether the difference has the printed sign; None where there is nothing to compare."""
        if not self.differences or not self.printed_difference:
            return None
        return (mean(self.differences.values()) > 0) == (self.printed_difference > 0)


class Scatter(NamedTuple):
    """How much one paired difference varies over seeds. deviation: NaN without a second pair.
    freedom: its degrees of freedom. pairs: the most that a row has."""

    deviation: float
    freedom: int
    pairs: int


class Summary(NamedTuple):
    """What a sweep says. loss: of LOSSES, the one that is compared. finished, planned: counts of
    runs. scatter: of one paired difference, pooled over the rows of each baseline. holm: p values
    of the rows that have one, adjusted for their number. rates: rows that have several learning
    rates, over them."""

    loss: str
    results: dict[str, Result]
    finished: int
    planned: int
    scatter: dict[str, Scatter]
    agreement: Agreement
    holm: dict[str, float]
    rates: dict[str, Curve]


def load(folder: Path) -> Sweep:
    """Reads a sweep folder.

    Raises:
        SweepError: sweep.json is not there, or one of the files is damaged, zoo.csv among them.
    """
    path = folder / "sweep.json"
    try:
        described = read_json(path)
        rows = {}
        for row in described["rows"]:
            printed = None if row.get("printed") is None else float(row["printed"])
            rows[row["name"]] = Row(row["name"], row["baseline"], printed, row.get("note", ""))
        planned = [(run["name"], run["row"], int(run["seed"])) for run in described["runs"]]
        hashes = {run["name"]: run.get("hash") for run in described["runs"]}
    except OSError as error:
        raise SweepError(f"{path}: {error.strerror}; name the folder of a sweep") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SweepError(f"{path}: is damaged ({error!r})") from None
    for row in rows.values():
        if row.baseline not in rows:
            raise SweepError(f"{path}: rows: {row.name}: its baseline {row.baseline!r} is no row")
    words = "title", "command", "hardware", "commit"
    about = {word: str(described.get(word, "")) for word in words}
    table = folder / "runs.csv"
    there = {run.name: run for run in read_results(table)} if table.exists() else {}
    dropped = there.keys() - hashes.keys()
    known = {name: run for name, run in there.items() if name in hashes}
    others = {name for name, run in known.items() if (hashes[name] or run.hash) != run.hash}
    finished = {name: run for name, run in known.items() if name not in others}
    left_out = (tuple(sorted(names)) for names in (others, dropped))
    costs = _costs(folder / "zoo.csv", rows, list(finished.values()))
    return Sweep(folder, about, rows, planned, finished, *left_out, costs)


def _costs(path: Path, rows: dict[str, Row], runs: list[RunResult]) -> dict[str, dict[str, float]]:
    """Of the rows that have a line, the fields that all of these lines have."""
    if not path.exists():
        return {}
    try:
        with open_regular(path, newline="") as file:
            every = {line["variant"]: line for line in csv.DictReader(file)}
        lines = {name: every[name] for name in rows if name in every}
        fields = [field for field in COSTS if all(line[field] for line in lines.values())]
        costs = {name: {f: float(line[f]) for f in fields} for name, line in lines.items()}
    except (KeyError, ValueError, TypeError, OSError) as error:
        raise SweepError(f"{path}: is no table of experiments.zoo --csv ({error!r})") from None
    for name, of in costs.items():
        if rows[name].baseline not in costs:
            raise SweepError(f"{path}: has {name} and not {rows[name].baseline}, its baseline")
        if not all(0 < value < math.inf for value in of.values()):
            raise SweepError(f"{path}: {name}: a cost is not above 0")
        counted = {f"{run.number('parameters'):.0f}" for run in runs if run.row == name}
        if lines[name].get("parameters") and not counted <= {lines[name]["parameters"]}:
            raise SweepError(
                f"{path}: {name} has {lines[name]['parameters']} parameters, its runs have "
                f"{', '.join(sorted(counted))}; measure the configs that were trained"
            )
    return costs


def _mean_number(runs: list[RunResult], name: str) -> float:
    """Of the runs that have it."""
    return mean(z for run in runs if math.isfinite(z := run.number(name)))


def best_rate(runs: list[RunResult], loss: str) -> float:
    """The learning rate with the lowest mean loss over the seeds that all rates have; without any
    such seed, of the rates with the most seeds. A loss that is not finite is the worst."""
    rates: dict[float, dict[int, float]] = {}
    for run in runs:
        value = run.number(loss)
        of_rate = rates.setdefault(run.learning_rate, {})
        of_rate[run.seed] = value if math.isfinite(value) else math.inf
    common = set.intersection(*map(set, rates.values()))
    most = max(map(len, rates.values()))
    means = {
        rate: mean(of[seed] for seed in common or of)
        for rate, of in rates.items()
        if common or len(of) == most
    }
    return min(means, key=means.__getitem__)


def _measured_ratio(sweep: Sweep, row: Row) -> float:
    """Of step times that were measured in turns."""
    own, base = (sweep.costs.get(name, {}) for name in (row.name, row.baseline))
    return own["step_seconds"] / base["step_seconds"] if own else math.nan


def _time_ratio(runs: list[RunResult], baseline: list[RunResult]) -> float:
    """Of median step times, on the hardware that most of the runs had of what both had."""
    shared = [run.hardware for run in runs if run.hardware in {b.hardware for b in baseline}]
    if not shared:
        return math.nan
    where = statistics.mode(shared)
    own, base = (
        statistics.median(run.step_seconds for run in side if run.hardware == where)
        for side in (runs, baseline)
    )
    return own / base if base else math.nan


def summarise(sweep: Sweep) -> Summary:
    """What the finished runs say of each row that has any."""
    known = [run for run in sweep.finished.values() if run.row in sweep.rows]
    evaluated = any(math.isfinite(run.val_loss) for run in known)
    loss = "val_loss" if evaluated else "train_loss"
    chosen, rates = {}, {}
    for name in sweep.rows:
        if runs := [run for run in known if run.row == name]:
            best, rates[name] = best_rate(runs, loss), len({run.learning_rate for run in runs})
            chosen[name] = [run for run in runs if run.learning_rate == best]
    results = {name: _result(sweep, chosen, name, rates[name], loss) for name in chosen}
    compared = [one for one in results.values() if one.differences]
    scatter = {name: _scatter(compared, name) for name in {one.row.baseline: 0 for one in compared}}
    both = [one for one in compared if one.printed_difference]
    agreed = agreement([one.differences for one in both], [one.printed_difference for one in both])
    several = {name: one.difference.p for name, one in results.items() if _has_interval(one)}
    adjusted = dict(zip(several, holm(list(several.values()))))
    counts = len(known), len(sweep.planned)
    return Summary(loss, results, *counts, scatter, agreed, adjusted, over_rates(known, loss))


def _has_interval(one: Result) -> bool:
    return one.difference is not None and one.difference.count > 1


def _scatter(compared: list[Result], baseline: str) -> Scatter:
    differences = [one.difference for one in compared if one.row.baseline == baseline]
    most = max(difference.count for difference in differences)
    return Scatter(*pooled_deviation(differences), most)


def _result(
    sweep: Sweep, chosen: dict[str, list[RunResult]], name: str, rates: int, loss: str
) -> Result:
    row, runs = sweep.rows[name], chosen[name]
    of_baseline, baseline = sweep.rows[row.baseline], chosen.get(row.baseline, [])
    own, base = (
        {run.seed: run.number(loss) for run in side if math.isfinite(run.number(loss))}
        for side in (runs, baseline)
    )
    compared = name != row.baseline
    ratio = _measured_ratio(sweep, row) if sweep.in_turns else _time_ratio(runs, baseline)
    printed = compared and row.printed is not None and of_baseline.printed is not None
    return Result(
        row,
        runs[0].learning_rate,
        rates,
        runs,
        own,
        len(runs) - len(own),
        {seed: own[seed] - base[seed] for seed in sorted(own) if compared and seed in base},
        paired(own, base) if compared else None,
        row.printed - of_baseline.printed if printed else None,
        _mean_number(runs, "val_accuracy"),
        ratio,
        _mean_number(runs, "spike_share"),
    )


def curves(sweep: Sweep, result: Result, loss: str) -> dict[int, dict[int, float]]:
    """{seed: {step: loss}} of a row: the losses of its evaluations, or its smoothed training loss,
    as the sweep is compared by."""
    found = {}
    for run in result.runs:
        curve = run.curve
        if loss == "train_loss" or not curve:
            name = "val_loss" if loss == "val_loss" else "loss"
            steps, values = column(sweep.log(run.name), name)
            values = values if name == "val_loss" else smoothed(values)
            curve = dict(zip(steps.tolist(), values.tolist()))
        if curve:
            found[run.seed] = {step: z for step, z in curve.items() if math.isfinite(z)}
    return found


def band(curves: list[dict[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    """(steps [S], values [seeds, S]) at the steps that all curves have."""
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    return np.array(steps), np.array([[curve[step] for step in steps] for curve in curves])
