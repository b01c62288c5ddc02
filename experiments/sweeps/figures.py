"""Which figures there is something for in a sweep, and what they are drawn from."""

import functools
from typing import Any, Callable

from kha_jax.analysis import comparisons, curves, sweeps

STABILITY_ROWS = 12  # in the figure of spikes


def of_sweep(sweep: sweeps.Sweep, summary: sweeps.Summary) -> dict[str, Callable[[], Any]]:
    """The figures that there is something for, by name."""
    results = summary.results.items()
    lines = {name: sweeps.curves(sweep, one, summary.loss) for name, one in results}
    draws: dict[str, Callable[[], Any]] = {}
    if any(one.differences for _, one in results):
        draws["differences"] = functools.partial(comparisons.differences, summary)
        if any(name in sweep.costs for name, one in results if one.differences):
            draws["costs"] = functools.partial(comparisons.costs, summary, sweep.costs)
        if comparisons.has_gaps(summary, lines):
            draws["gaps"] = functools.partial(comparisons.gaps, summary, lines)
    if summary.rates:
        draws["rates"] = functools.partial(comparisons.rates, summary)
    if any(lines.values()):
        draws["losses"] = functools.partial(comparisons.losses, summary, lines)
    logs = {}
    for name, one in results:
        first = min(one.runs, key=lambda run: run.seed)
        log = sweep.log(first.name)
        if any("loss" in row for row in log) and len(logs) < STABILITY_ROWS:
            logs[f"{name}, seed {first.seed}"] = log
    if logs:
        draws["stability"] = functools.partial(curves.stability, logs)
    return draws
