"""What benchmarks say, as tables and as JSON."""

from typing import Any, NamedTuple, Sequence

import numpy as np
from rich.table import Table

from experiments.evaluating.scores import Measured, interval
from experiments.evaluating.tasks import Line

Found = dict[tuple[str, str], Measured]
PROTOCOL = (
    "The paper prints neither prompts nor numbers of examples: scores of ours beside the printed "
    "ones are of these tasks as named here, and not of the paper's protocol."
)


class Run(NamedTuple):
    """A run's scores: what it is called, and what was found of tasks and groups."""

    name: str
    found: Found


def shown(metric: str, score: float) -> str:
    """A share as percent, anything else as it is."""
    counts = ("perplexity", "bits_per_byte")
    return f"{score:.4f}" if any(part in metric for part in counts) else f"{100 * score:.2f}"


def of_tasks(runs: Sequence[Run], names: Sequence[str], shots: dict[str, Any]) -> Table:
    """Each metric of the named tasks and groups with its 95% interval, and the difference of two
    runs, for which documents are drawn in pairs."""
    table = Table(title="95% intervals over documents, by bootstrap")
    heads = ["task", "metric", "shots", "documents", *(run.name for run in runs)]
    for column in heads + (["difference"] if len(runs) == 2 else []):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for key, first in runs[0].found.items():
        if key[0] in names:
            both = [run.found[key] for run in runs]
            cells = [_with_interval(one.metric, one.score, interval(one)) for one in both]
            if len(runs) == 2:
                change = both[1].score - both[0].score
                cells.append(_with_interval(key[1], change, interval(*both), "+"))
            table.add_row(*key, str(shots.get(key[0], "")), str(len(first.values)), *cells)
    return table


def _with_interval(metric: str, score: float, limits: tuple[float, float], sign: str = "") -> str:
    low, high = (shown(metric, limit) for limit in limits)
    plus = "+" if sign and score >= 0 else ""
    return f"{plus}{shown(metric, score)} [{low}, {high}]"


def of_paper(
    lines: Sequence[Line], runs: Sequence[Run], shots: dict[str, Any], limit: int | None = None
) -> Table:
    """Table 4: category, benchmark, the printed scores and ours, averages of each category and of
    all; of ours over the benchmarks that were run. limit: documents of each task that were."""
    of = f", ours of at most {limit:,} documents a task" if limit else ""
    table = Table(title=f"Table 4{of}", caption=PROTOCOL)
    heads = ["category", "benchmark", "task", "shots", "paper: baseline", "KHA", "change"]
    ours = [run.name for run in runs] + (["difference"] if len(runs) == 2 else [])
    for column in heads + ours:
        left = column in ("category", "benchmark", "task")
        table.add_column(column, justify="left" if left else "right")
    done: list[Line] = []
    for category in dict.fromkeys(line.category for line in lines):
        some = [line for line in lines if line.category == category]
        for line in some:
            cells = [category, line.name, line.task, str(shots.get(line.task, ""))]
            table.add_row(*cells, *_figures([line], runs))
        table.add_row(category, "Average", "", "", *_figures(some, runs), end_section=True)
        done += some
    table.add_row("Overall", "Average", "", "", *_figures(done, runs))
    return table


def _figures(lines: Sequence[Line], runs: Sequence[Run]) -> list[str]:
    """Means over the lines: the paper's scores with their change, then those of the runs."""
    printed = np.mean([line.printed for line in lines], axis=0)
    keys = [(line.task, line.metric) for line in lines]
    keys = [key for key in keys if all(key in run.found for run in runs)]
    ours = [100 * float(np.mean([run.found[key].score for key in keys])) for run in runs if keys]
    cells = [*map("{:.2f}".format, printed), f"{printed[1] - printed[0]:+.2f}"]
    cells += [f"{score:.2f}" for score in ours] or ["-"] * len(runs)
    if len(runs) == 2:
        cells.append(f"{ours[1] - ours[0]:+.2f}" if ours else "-")
    return cells


def as_json(runs: Sequence[Run], shots: dict[str, Any]) -> list[dict[str, Any]]:
    """Every metric of every task and group, with its interval; of the runs that have it so far."""
    rows = []
    for task, metric in runs[0].found:
        known = [run for run in runs if (task, metric) in run.found]
        both = [run.found[task, metric] for run in known]
        row = {"task": task, "metric": metric, "shots": shots.get(task)}
        row |= {"documents": len(both[0].values), "scores": {}}
        for run, one in zip(known, both):
            row["scores"][run.name] = {"score": one.score, "interval": interval(one)}
        if len(both) == 2:
            change = both[1].score - both[0].score
            row["difference"] = {"score": change, "interval": interval(*both)}
        rows.append(row)
    return rows
