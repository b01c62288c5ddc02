"""What a sweep says, in words: a table, findings, markdown and CSV."""

import csv
import io
import itertools
import math
import shlex
from pathlib import Path
from typing import Any, Sequence

from rich.table import Table

from experiments.sweeps import page
from kha_jax.analysis.rates import NEAR
from kha_jax.analysis.significance import LEVEL, POWER, detectable, pairs_needed
from kha_jax.analysis.sweeps import LOSSES, Result, Scatter, Summary, Sweep

TARGET = 0.01  # nats that a sweep should be able to tell apart
NAMED = 5  # of the runs that are left out
TIMES = (
    "Step times are those of the runs, whatever else the machine did meanwhile; what a variant "
    "costs is measured in turns by `python -m experiments.zoo --measure`."
)
IN_TURNS = "Step times were measured in turns, by `python -m experiments.zoo --measure`."
MEASURED = {  # of COSTS, name and unit
    "training_flops": ("training MFLOP / token", 1e6),
    "step_seconds": ("step, ms", 1e-3),
    "cache_bytes": ("cache, bytes / token", 1),
}
COLUMNS = (
    "row, baseline, learning rate, seeds, loss, accuracy, difference, 95% interval, not 0, "
    "p by Holm, printed, printed difference, sign agrees, time / baseline, spike share"
).split(", ")


def _number(value: float | None, form: str = ".4f") -> str:
    return "" if value is None or not math.isfinite(value) else format(value, form)


def _yes(value: bool | None) -> str:
    return "" if value is None else "yes" if value else "no"


def _cells(one: Result, adjusted: float | None) -> list[str]:
    """Of a row, as COLUMNS names them."""
    d = one.difference
    bounds = f"{d.low:+.4f} to {d.high:+.4f}" if d and d.count > 1 else "one seed" if d else ""
    rate = f"{one.learning_rate:g}" if one.learning_rate else ""
    return [
        one.row.name,
        one.row.baseline if d else "",
        f"{rate} of {one.rates}" if one.rates > 1 else rate,
        str(len(one.losses)),
        _number(one.loss),
        _number(one.accuracy, ".1%"),
        _number(d.mean, "+.4f") if d else "",
        bounds if d and d.count else "no common seed" if d else "",
        _yes(d.distinguishable) if d and d.count > 1 else "",
        _number(adjusted, ".2g"),
        _number(one.row.printed, ".3f"),
        _number(one.printed_difference, "+.3f"),
        _yes(one.sign_agrees),
        _number(one.time_ratio, ".3f"),
        _number(one.spike_share, ".2%"),
    ]


def table(summary: Summary) -> Table:
    """The rows that have runs, in the columns that any of them has."""
    made = Table()
    cells = [_cells(one, summary.holm.get(name)) for name, one in summary.results.items()]
    used = [any(column) for column in zip(*cells)]
    for name in itertools.compress(COLUMNS, used):
        made.add_column(name)
    for row in cells:
        made.add_row(*itertools.compress(row, used))
    return made


def as_csv(sweep: Sweep, summary: Summary) -> str:
    """The same numbers unrounded, one line per row with runs."""
    names = "row,baseline,note,learning_rate,rates,seeds,loss,loss_is,difference,standard_error,low"
    names += ",high,distinguishable,printed_loss,printed_difference,sign_agrees,time_ratio"
    names += ",spike_share,runs_without_finite_loss,parameters,flops_per_token,accuracy"
    names += ",p,p_by_holm,sensitivity,sensitivity_low,sensitivity_high,largest_rate,diverged"
    names += ",step_seconds,cache_bytes"
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names.split(","))
    for name, one in summary.results.items():
        d, over = one.difference, summary.rates.get(name)
        first = one.runs[0]
        values: list[Any] = [one.row.name, one.row.baseline, one.row.note, one.learning_rate]
        values += [one.rates, len(one.losses), one.loss, summary.loss]
        values += [d.mean, d.error, d.low, d.high] if d else [None] * 4
        values += [_yes(d.distinguishable) if d and d.count > 1 else None]
        values += [one.row.printed, one.printed_difference, _yes(one.sign_agrees)]
        values += [one.time_ratio, one.spike_share, one.unfinite]
        values += [first.number("parameters"), first.flops_per_token, one.accuracy]
        values += [d.p if d else None, summary.holm.get(name)]
        values += [over.sensitivity, over.low, over.high] if over else [None] * 3
        values += [over.largest, over.diverged] if over else [None] * 2
        values += [
            sweep.costs.get(name, {}).get(field) for field in ("step_seconds", "cache_bytes")
        ]
        nan = (isinstance(z, float) and not math.isfinite(z) for z in values)
        writer.writerow(["" if missing else z for z, missing in zip(values, nan)])
    return out.getvalue()


def rates_csv(summary: Summary) -> str:
    """A line for each row and learning rate."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = "row,learning_rate,seeds,loss,diverged,largest_logit,spikes_per_1000_steps"
    writer.writerow(names.split(","))
    for name, over in summary.rates.items():
        for rate, at in over.rates.items():
            values = at.loss, at.diverged, at.largest_logit, at.spikes
            told = ("" if math.isnan(value) else value for value in values)
            writer.writerow([name, rate, len(at.losses), *told])
    return out.getvalue()


def rates_table(summary: Summary) -> list[list[str]]:
    """Of each row over learning rates: how it bears them, then its loss at each; names first."""
    grid = sorted({rate for over in summary.rates.values() for rate in over.rates})
    names = ["row", "seeds", "sensitivity", "95% interval", f"largest within {NEAR:g}", "diverged"]
    lines = [[*names, *(f"{rate:g}" for rate in grid)]]
    for name, over in summary.rates.items():
        known = math.isfinite(over.low)
        losses = (over.rates[rate].loss if rate in over.rates else None for rate in grid)
        lines.append(
            [
                name,
                str(len(over.seeds)),
                _number(over.sensitivity, ".3f"),
                f"{over.low:.3f} to {over.high:.3f}" if known else "one seed",
                _number(over.largest, "g"),
                f"{over.diverged:.0%}",
                *(_number(loss, ".3f") for loss in losses),
            ]
        )
    return lines


def costs_table(sweep: Sweep, summary: Summary) -> list[list[str]]:
    """What rows cost by zoo.csv, and over their baseline's; names first."""
    lines = []
    for name, one in summary.results.items():
        own, base = (sweep.costs.get(side, {}) for side in (name, one.row.baseline))
        line = [name, _number(one.runs[0].number("parameters"), ",.0f")]
        for field, value in own.items():
            line += [f"{value / MEASURED[field][1]:,.4g}", f"{value / base[field]:.3f}"]
        lines += [line] if own else []
    fields = next(iter(sweep.costs.values()))
    names = (word for field in fields for word in (MEASURED[field][0], "/ baseline"))
    return [["row", "parameters", *names], *lines]


def _over_rates(summary: Summary) -> str:
    each = (
        f"{name} {_number(over.sensitivity, '.3f')}, {_number(over.largest, 'g')}"
        for name, over in summary.rates.items()
    )
    return (
        "Sensitivity to the learning rate in nats (the mean over the rates of the loss, cut to the "
        "one at the start, less the loss of the best rate), and the largest rate within "
        f"{NEAR:g} nats of the best: {'; '.join(each)}."
    )


def findings(sweep: Sweep, summary: Summary) -> list[str]:
    """What holds and what is not known, a paragraph each."""
    named = {name: one for name, one in summary.results.items() if one.differences}
    said = [f"{summary.finished} of {summary.planned} runs are finished; the loss is the "]
    said[0] += LOSSES[summary.loss] + "."
    if sweep.others:
        said.append(f"Left out, trained with another config: {', '.join(sweep.others)}.")
    if sweep.dropped:
        said.append(
            f"Left out, in runs.csv but not among the planned runs: {len(sweep.dropped)} "
            f"({', '.join(sweep.dropped[:NAMED])}{', ...' if sweep.dropped[NAMED:] else ''})."
        )
    absent = [name for name in sweep.rows if name not in summary.results]
    if absent:
        said.append(f"Rows without a finished run: {', '.join(absent)}.")
    single = [name for name, one in named.items() if one.difference.count == 1]
    if single:
        said.append(f"One seed alone, so no interval: {', '.join(single)}.")
    lost = {name: one.unfinite for name, one in summary.results.items() if one.unfinite}
    if lost:
        counts = ", ".join(f"{name} ({count})" for name, count in lost.items())
        said.append(f"Runs without a finite loss, which no mean holds: {counts}.")
    known = {name: of for name, of in summary.scatter.items() if of.freedom}
    if known:
        said += [_precisions(known), _by_interval(named), _by_holm(summary)]
    said += _against_print(summary) if summary.agreement.rows else []
    said += [_over_rates(summary)] if summary.rates else []
    return [*said, IN_TURNS if sweep.in_turns else TIMES]


def _precisions(known: dict[str, Scatter]) -> str:
    if len(known) == 1:
        return _precision(*known.values())
    each = (
        f"{name} {deviation:.4f} ({detectable(deviation, pairs):.3f} at {pairs})"
        for name, (deviation, _, pairs) in known.items()
    )
    return (
        "A paired difference of one seed scatters, in nats, pooled over the rows of a baseline, by "
        f"(in brackets what is found with probability {POWER:g} with this number of seeds): "
        f"{', '.join(each)}."
    )


def _precision(scatter: Scatter) -> str:
    deviation, freedom, pairs = scatter
    needed = pairs_needed(deviation, TARGET)
    seeds = f"takes {needed} seeds" if needed else "takes over 100 seeds"
    return (
        f"A paired difference of one seed scatters by {deviation:.4f} nats (pooled over rows, "
        f"{freedom} degrees of freedom): standard error {deviation / pairs**0.5:.4f} at "
        f"{pairs} seeds, at which a difference of {detectable(deviation, pairs):.4f} is found with "
        f"probability {POWER:g}; one of {TARGET} {seeds}."
    )


def _by_interval(named: dict[str, Result]) -> str:
    several = {name: one.difference for name, one in named.items() if one.difference.count > 1}
    below, above, neither = [], [], []
    for name, d in several.items():
        (below if d.high < 0 else above if d.low > 0 else neither).append(name)
    lists = (
        ("below their baseline", below),
        ("above it", above),
        ("no difference found", neither),
    )
    listed = "; ".join(f"{label}: {', '.join(names) or 'none'}" for label, names in lists)
    return (
        f"By their 95% intervals, {listed}. Of {len(several)} such intervals, "
        f"{0.05 * len(several):.1f} leave out 0 by chance where there is nothing."
    )


def _by_holm(summary: Summary) -> str:
    several = {name: summary.results[name].difference for name in summary.holm}
    told = [name for name, p in summary.holm.items() if p < 1 - LEVEL]
    lists = (
        ("below", [name for name in told if several[name].mean < 0]),
        ("above", [name for name in told if several[name].mean > 0]),
    )
    listed = "; ".join(f"{label}: {', '.join(names) or 'none'}" for label, names in lists)
    return f"By Holm's correction for these {len(several)} rows, {listed}."


def _against_print(summary: Summary) -> list[str]:
    a = summary.agreement
    text = f"The sign of the difference is the printed one in {a.same_sign} of {a.rows} rows."
    if a.rows < 3 or not math.isfinite(a.spearman):
        return [f"{text} Too few rows for a rank correlation."]
    low, high = a.low, a.high
    interval = (
        f" (95% over seeds: {low:+.2f} to {high:+.2f})" if math.isfinite(low) else " (one seed)"
    )
    return [
        f"{text} Rank correlation of measured with printed differences: Spearman "
        f"{a.spearman:+.2f}{interval}, Kendall {a.kendall:+.2f}; {a.chance:.1%} of random orders "
        "do as well."
    ]


def provenance(sweep: Sweep, summary: Summary) -> list[str]:
    """Command, hardware and commit, of the runs where they say it."""
    runs = [run for one in summary.results.values() for run in one.runs]
    hardware = dict.fromkeys(run.hardware for run in runs if run.hardware)
    commits = dict.fromkeys(run.commit for run in runs if run.commit)
    where = "; ".join(hardware) or sweep.about["hardware"] or "not known"
    commit = ", ".join(commits) or sweep.about["commit"] or "not known"
    return [f"Command: {sweep.about['command']}", f"Hardware: {where}", f"Commit: {commit}"]


def as_markdown(sweep: Sweep, summary: Summary, figures: list[str], command: str) -> str:
    """report.md. figures: names of those beside it."""
    shown, title = table(summary), sweep.about["title"] or sweep.folder.name
    head = [str(column.header) for column in shown.columns]
    lines = zip(*(column.cells for column in shown.columns))
    tables = [_markdown([head, *lines])]
    tables += [_markdown(rates_table(summary))] if summary.rates else []
    tables += [_markdown(costs_table(sweep, summary))] if sweep.costs else []
    command, *rest = (
        f"`{sweep.about['command']}`, then `{command}`",
        *provenance(sweep, summary)[1:],
    )
    parts = [f"# {title}", *findings(sweep, summary), *tables]
    notes = [f"- {row.name}: {row.note}" for row in sweep.rows.values() if row.note]
    parts += ["\n".join(notes)] if notes else []
    parts += [f"Command: {command}", *rest]
    for name in figures:
        says = " ".join(page.SAYS[name].split())
        source = f'<source media="(prefers-color-scheme: dark)" srcset="{name}_dark.png">'
        picture = f'<picture>{source}<img alt="{name}" src="{name}.png"></picture>'
        parts += [f"## {name.capitalize()}", says, picture]
    return "\n\n".join(parts) + "\n"


def _markdown(lines: list[Sequence[str]]) -> str:
    """A table whose first line has the names."""
    head, *rest = lines
    rule = ["---" if name in ("row", "baseline") else "---:" for name in head]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in (head, rule, *rest))


def as_page(
    sweep: Sweep, summary: Summary, sections: dict[str, list[tuple[str, str]]], command: str
) -> str:
    """report.html, which loads nothing."""
    title = sweep.about["title"] or sweep.folder.name
    about = [*findings(sweep, summary), *provenance(sweep, summary), f"This page: {command}"]
    return page.render(title, about, table(summary), sections)


def command_of(folder: Path, out: Path) -> str:
    """The line that makes this report."""
    return shlex.join(["python", "-m", "experiments.report", f"--sweep={folder}", f"--out={out}"])
