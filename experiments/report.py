"""Draws the curves of runs, and reports what a run or a sweep says (extra: plots).

    python -m experiments.report --workdir=runs/kha_tiny --out=kha_tiny.png
    python -m experiments.report --workdir=runs/kha_tiny,runs/baseline --out=curves.png
    python -m experiments.report --sweep=runs/table2 --out=results/table2_tiny
    python -m experiments.report --spikes=runs/kha_tiny/metrics.jsonl

The first is the card of a run: what it is, its cost, curve, spikes and, of a small model of text,
samples, as OUT.html too. The second draws training loss, smoothed; validation bits per byte (or
loss, for data without bytes); for mixtures the worst layer's MaxVio. The third compares the rows of
a sweep, finished or not: report.md, report.csv, report.html, the runs' CSV and figures. The last
lists the spikes of any JSONL log whose lines have a `step` and the values that --values names.
"""

import functools
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from rich.table import Table

from experiments.cli import command_line, terminal
from experiments.cli.codes import UsageError
from experiments.run_folders import stored
from experiments.sweeps import card, figures, page
from experiments.sweeps import report as sweep_report
from kha_jax import analysis, metrics, spikes
from kha_jax.analysis import curves, style, sweeps
from kha_jax.errors import CheckpointError
from kha_jax.runs import goodput
from kha_jax.storage import write_text
from kha_jax.training.run_folder import read_config

WORKDIR = flags.DEFINE_list("workdir", [], "Run folders, drawn in this order; a card of one.")
SWEEP = flags.DEFINE_string("sweep", None, "Folder of a sweep, to report in the folder --out.")
SPIKES = flags.DEFINE_string("spikes", None, "JSONL log, or folder of a run, to list spikes of.")
VALUES = flags.DEFINE_list("values", list(spikes.SPIKING), "What --spikes looks at.")
OUT = flags.DEFINE_string(
    "out",
    "curves.png",
    "The figure to write, as NAME.png (300 dpi), NAME_dark.png (for dark pages), NAME.pdf and "
    "NAME.svg; with --sweep the folder.",
)
log = logging.getLogger("kha_jax")


def _name(folder: Path, folders: list[Path]) -> str:
    """Of a run in the figure: that of its folder, or the whole path where two have the same."""
    alike = [other.name for other in folders].count(folder.name) > 1
    return str(folder) if alike else folder.name


def draw_runs() -> None:
    """The figure of --workdir, and the card of a run that is alone."""
    folders = [stored.readable_folder("workdir", name) for name in WORKDIR.value]
    out = stored.local_folder("out", OUT.value)
    if out.suffix not in style.SUFFIXES:
        raise UsageError(f"--out={out}: must end in {', '.join(style.SUFFIXES)}; all are written")
    try:
        runs = {_name(folder, folders): analysis.read_metrics(folder) for folder in folders}
        if len(folders) == 1 and (folders[0] / "config.json").is_file():
            return write_card(folders[0], *runs.values(), out.with_suffix(""))
        style.save(lambda: curves.training(runs), out.with_suffix(""))
    except CheckpointError as error:
        raise UsageError(f"--workdir: {error}") from None
    except style.PlotsMissing as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        raise UsageError(f"--out={out} cannot be written: {error.strerror or error}") from None
    print(f"wrote {OUT.value}")


def write_card(folder: Path, rows: list[dict[str, Any]], out: Path) -> None:
    """The card of a run, in the terminal and as a page."""
    config = read_config(folder)
    terminal.show(table := card.table(folder, config, rows))
    draws = {
        "training": (curves.training, out),
        "stability": (curves.stability, out.with_name(f"{out.name}_stability")),
    }
    if any(map(goodput.of, rows)):
        draws["time"] = curves.time_spent, out.with_name(f"{out.name}_time")
    sections = {}
    try:
        for name, (draw, path) in draws.items():
            of_run = functools.partial(draw, {folder.name: rows})
            sections[name] = [("", style.save(of_run, path))]
    except style.PlotsMissing as error:
        log.info("no curves: %s", error)
    written = list(card.samples(folder, config))
    for text in written:
        terminal.say(text)
    html = out.with_suffix(".html")
    write_text(html, page.render(f"The run {folder.name}", written, table, sections))
    print(f"wrote {html} and {len(sections)} figures")


def report_sweep() -> None:
    """The report of --sweep."""
    folder = stored.local_folder("sweep", SWEEP.value)
    if not flags.FLAGS["out"].present:
        raise UsageError("--out: name the folder of the report, such as results/table2_tiny")
    out = stored.local_folder("out", OUT.value)
    try:
        sweep = sweeps.load(folder)
    except sweeps.SweepError as error:
        raise UsageError(f"--sweep: {error}") from None
    summary = sweeps.summarise(sweep)
    if not summary.results:
        raise UsageError(
            f"--sweep={folder}: no planned run is finished yet; runs.csv holds none of sweep.json"
        )
    command = sweep_report.command_of(folder, out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        draws = figures.of_sweep(sweep, summary)
        sections = {name: [("", style.save(draw, out / name))] for name, draw in draws.items()}
        write_text(out / "report.csv", sweep_report.as_csv(sweep, summary))
        markdown = sweep_report.as_markdown(sweep, summary, list(sections), command)
        write_text(out / "report.md", markdown)
        page = sweep_report.as_page(sweep, summary, sections, command)
        write_text(out / "report.html", page)
        if summary.rates:
            write_text(out / "rates.csv", sweep_report.rates_csv(summary))
        for name in ("sweep.json", "runs.csv", "zoo.csv"):  # a report can be made from a report
            if (folder / name).exists() and (folder / name).resolve() != (out / name).resolve():
                write_text(out / name, (folder / name).read_text())
    except style.PlotsMissing as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        raise UsageError(f"--out={out} cannot be written: {error.strerror or error}") from None
    terminal.show(sweep_report.table(summary))
    for text in sweep_report.findings(sweep, summary):
        terminal.say(text)
    print(f"wrote {out / 'report.md'}, report.html, report.csv, runs.csv, {len(sections)} figures")


def list_spikes() -> None:
    """The spikes of --spikes, and the score."""
    path = stored.local_folder("spikes", SPIKES.value)
    try:
        path = path / "metrics.jsonl" if path.is_dir() else path
        rows = list(metrics.read_lines(path))
    except OSError as error:
        raise UsageError(f"--spikes={path} cannot be read: {error.strerror}") from None
    series = {name: metrics.column(rows, name) for name in VALUES.value}
    there = {name: of for name, of in series.items() if np.isfinite(of[1]).any()}
    absent = [name for name in series if name not in there]
    if absent:
        keys = {key for row in rows for key in row} - {"step", *absent}
        held = [name for name in sorted(keys) if np.isfinite(metrics.column(rows, name)[1]).any()]
        missing = f"no line of {path} with a step has a number of that name; it has {held}"
        if not there:
            raise UsageError(f"--values={','.join(absent)}: {missing}")
        terminal.say(f"not looked at: {', '.join(absent)}; {missing}")
    table, found = Table(), spikes.spikes_in(rows, list(there))
    for name in ("step", "value", "peak", "over the centre", "times", "spreads", "recovery, steps"):
        table.add_column(name, justify="right")
    for name, (_, values) in there.items():
        terminal.say(f"{name}: {spikes.spike_rule(len(values)).describe()}")
    for one in found:
        numbers = [f"{z:.4g}" for z in (one.peak, one.size, one.times, one.spreads)]
        back = "none" if one.recovery is None else str(one.recovery)
        table.add_row(str(one.step), one.name, *numbers, back)
    if found:
        terminal.show(table)
    score = spikes.spike_score(rows, list(there))
    share = "not known: the log is too short" if math.isnan(score) else f"{score:.4%} of steps"
    terminal.say(f"spikes: {len(found)}; spike score {share}")


def main() -> None:
    """See the module's docstring."""
    given = [bool(WORKDIR.value), SWEEP.value is not None, SPIKES.value is not None]
    if sum(given) > 1:
        raise UsageError("--workdir, --sweep and --spikes: are three reports; name one of them")
    if SWEEP.value is not None:
        return report_sweep()
    if SPIKES.value is not None:
        return list_spikes()
    if not WORKDIR.value:
        raise UsageError("--workdir: name at least one run folder")
    draw_runs()


if __name__ == "__main__":
    command_line.run(main)
