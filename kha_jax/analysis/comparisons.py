"""Figures of a sweep: differences beside the paper's, and how losses went over training."""

import itertools
from typing import Any

import numpy as np

from kha_jax.analysis import style
from kha_jax.analysis.rates import Curve
from kha_jax.analysis.sweeps import COSTS, LOSSES, Result, Summary, band

Curves = dict[str, dict[int, dict[int, float]]]  # of each row: {seed: {step: loss}}
SHOWN = 0.75  # share of training, its end, that decides the range of the losses shown


def differences(summary: Summary) -> Any:
    """Every row's difference to its baseline with its interval over seeds (each a tick, their
    number on the right), and the paper's printed one; left of 0 is better."""
    rows = [one for one in summary.results.values() if one.differences]
    figure, axes = style.pyplot().subplots(figsize=(7.2, 1.3 + 0.42 * max(len(rows), 2)))
    measured, printed = style.KINDS[0], style.KINDS[1]
    for y, one in enumerate(rows):
        low, high = one.difference.low, one.difference.high
        if np.isfinite(low):
            axes.plot([low, high], [y, y], color=measured, linestyle="-", linewidth=2.2, alpha=0.7)
        look = {"linestyle": "none", "color": measured}
        dots = list(one.differences.values())
        axes.plot(dots, [y] * len(dots), marker="|", markersize=9, label="a seed", **look)
        if np.isfinite(low):
            label = "mean, 95% interval over n seeds"
            axes.plot(one.difference.mean, y, marker="o", markersize=6, label=label, **look)
        axes.text(
            1.01, y, _count(one.differences), transform=axes.get_yaxis_transform(), va="center"
        )
        if one.printed_difference is not None:
            look = {"linestyle": "none", "color": printed, "markerfacecolor": "none"}
            axes.plot(one.printed_difference, y, marker="D", markersize=6, label="paper", **look)
    axes.axvline(0, color="grey", linewidth=1, linestyle="-")
    axes.set_yticks(range(len(rows)), [one.row.name for one in rows])
    axes.set(ylim=(len(rows) - 0.5, -0.5), xlabel=f"difference to the baseline, {_unit(summary)}")
    style.shared_legend(figure, [axes])
    return figure


def losses(summary: Summary, curves: Curves) -> Any:
    """The loss of every row over training beside that of its baseline (grey, dashed); bands are
    from the lowest to the highest of its n seeds."""
    rows = [one for name, one in summary.results.items() if curves.get(name)]
    figure, axes = style.row_of(len(rows), 2.0, 2.6, sharex=True, sharey=True)
    ends = []
    for each, one in zip(axes, rows):
        own = "the row: mean and range of n seeds"
        inks = (one.row.baseline, "grey", "its baseline"), (one.row.name, style.KINDS[0], own)
        for name, ink, label in inks:
            if not curves.get(name) or (ink == "grey" and name == one.row.name):
                continue
            steps, values = band(list(curves[name].values()))
            _band(each, steps, values, ink, "--" if ink == "grey" else "-", label)
            late = steps >= (1 - SHOWN) * steps.max(initial=0)
            ends.extend(values[:, late].ravel())
        each.set_title(f"{one.row.name}: {one.loss:.3f} ({_count(one.losses)})")
    low, high = min(ends), max(ends)
    margin = 0.05 * (high - low) or 0.1
    axes[0].set_ylim(low - margin, high + margin)
    figure.supylabel(
        LOSSES[summary.loss].replace(" of the last tenth of the steps", ""), fontsize="medium"
    )
    figure.supxlabel("step", fontsize="medium")
    style.shared_legend(figure, axes, "upper")
    return figure


def gaps(summary: Summary, curves: Curves) -> Any:
    """The paired difference to the baseline over training, seeds thin, their range shaded, their
    mean bold; below 0 is better. The paper's difference at its end is dotted."""
    rows = [one for one in summary.results.values() if _gap(one, curves)[0].size]
    figure, axes = style.row_of(len(rows), 2.0, 2.6, sharex=True, sharey=True)
    ends = [0.0]
    for each, one in zip(axes, rows):
        steps, values = _gap(one, curves)
        _band(each, steps, values, style.KINDS[0], "-", "mean of n seeds")
        if len(values) > 1:
            look = {"color": style.KINDS[0], "linewidth": 0.5, "linestyle": "-", "alpha": 0.6}
            each.plot(steps, values.T, label="a seed", **look)
        each.axhline(0, color="grey", linewidth=1, linestyle="-")
        if one.printed_difference is not None:
            look = {"color": style.KINDS[1], "linestyle": ":"}
            each.axhline(one.printed_difference, label="paper, at its end", **look)
            ends.append(one.printed_difference)
        ends.extend(values[:, steps >= (1 - SHOWN) * steps.max()].ravel())
        each.set_title(f"{one.row.name}: {one.difference.mean:+.3f} ({_count(one.differences)})")
    margin = 0.08 * (max(ends) - min(ends)) or 0.1
    axes[0].set_ylim(min(ends) - margin, max(ends) + margin)
    figure.supylabel("less the baseline, nats", fontsize="medium")
    figure.supxlabel("step", fontsize="medium")
    style.shared_legend(figure, axes, "upper")
    return figure


def rates(summary: Summary) -> Any:
    """The loss of every row over learning rates beside that of its baseline (grey, dashed); bands
    are from the lowest to the highest seed, a cross is a rate at which a run diverged."""
    shown = {name: summary.results[name] for name in summary.rates if name in summary.results}
    figure, axes = style.row_of(len(shown), 2.2, 2.6, sharex=True, sharey=True)
    ends = []
    for each, (name, one) in zip(axes, shown.items()):
        base = one.row.baseline
        if base != name and base in summary.rates:
            _over_rates(each, summary.rates[base], "grey", "--", "its baseline")
        own = summary.rates[name]
        _over_rates(each, own, style.KINDS[0], "-", "the row: mean and range of its seeds")
        known = (at.losses.values() for at in own.rates.values() if np.isfinite(at.loss))
        ends.extend(itertools.chain(*known))
        each.set_title(f"{name}: {own.sensitivity:.2f} (n = {len(own.seeds)})")
        each.set_xscale("log")
        each.set_xticks(list(own.rates), [f"{rate:g}" for rate in own.rates])
        each.minorticks_off()
    margin = 0.05 * (max(ends) - min(ends)) or 0.1
    axes[0].set_ylim(min(ends) - margin, max(ends) + margin)
    figure.supylabel(LOSSES[summary.loss].split(" of the last")[0], fontsize="medium")
    figure.supxlabel("learning rate; above each panel its sensitivity in nats", fontsize="medium")
    style.shared_legend(figure, axes, "upper")
    return figure


def _over_rates(axes: Any, of: Curve, colour: str, stroke: str, label: str) -> None:
    known = {rate: at for rate, at in of.rates.items() if np.isfinite(at.loss)}
    means = [at.loss for at in known.values()]
    axes.plot(list(known), means, color=colour, linestyle=stroke, marker=".", label=label)
    ranges = zip(*((min(at.losses.values()), max(at.losses.values())) for at in known.values()))
    axes.fill_between(list(known), *ranges, color=colour, alpha=0.2, linewidth=0)
    lost = [rate for rate, at in known.items() if at.diverged]
    look = {"color": colour, "linestyle": "none", "marker": "x", "markersize": 7}
    axes.plot(lost, [known[rate].loss for rate in lost], label="a run diverged", **look)


def costs(summary: Summary, measured: dict[str, dict[str, float]]) -> Any:
    """Every row's difference to its baseline with its interval over seeds, the best first, and
    beside it what it costs, over the baseline's.

    measured: for rows, fields of `sweeps.COSTS`.
    """
    rows = [one for name, one in summary.results.items() if one.differences and name in measured]
    rows.sort(key=lambda one: one.difference.mean)
    fields = [name for name in COSTS if name in measured[rows[0].row.name]]
    figure, (first, *others) = style.pyplot().subplots(
        1,
        1 + len(fields),
        figsize=(3.6 + 1.6 * len(fields), 1.2 + 0.28 * max(len(rows), 3)),
        sharey=True,
        gridspec_kw={"width_ratios": [1.7, *[1] * len(fields)]},
    )
    look = {"color": style.KINDS[0], "linestyle": "none", "marker": "o"}
    for y, one in enumerate(rows):
        low, high = one.difference.low, one.difference.high
        if np.isfinite(low):
            first.plot([low, high], [y, y], color=style.KINDS[0], linestyle="-", alpha=0.7)
        first.plot(one.difference.mean, y, **look)
        for axes, field in zip(others, fields):
            ratio = measured[one.row.name][field] / measured[one.row.baseline][field]
            axes.plot([1, ratio], [y, y], color=style.KINDS[1], linestyle="-", linewidth=2.2)
            axes.plot(ratio, y, color=style.KINDS[1], marker="o", linestyle="none")
    first.axvline(0, color="grey", linewidth=1, linestyle="-")
    first.set_yticks(range(len(rows)), [one.row.name for one in rows])
    first.set(ylim=(len(rows) - 0.5, -0.5), xlabel="difference, nats")
    for axes, field in zip(others, fields):
        axes.axvline(1, color="grey", linewidth=1, linestyle="-")
        axes.set_xlabel(f"{COSTS[field]},\nover the baseline's")
    return figure


def has_gaps(summary: Summary, curves: Curves) -> bool:
    """Whether `gaps` has anything to draw."""
    return any(_gap(one, curves)[0].size for one in summary.results.values())


def _gap(one: Result, curves: Curves) -> tuple[np.ndarray, np.ndarray]:
    own, base = curves.get(one.row.name, {}), curves.get(one.row.baseline, {})
    seeds = [seed for seed in one.differences if seed in own and seed in base]
    if not seeds:
        return np.array([]), np.array([])
    steps, both = band([own[seed] for seed in seeds] + [base[seed] for seed in seeds])
    return steps, both[: len(seeds)] - both[len(seeds) :]


def _band(axes: Any, steps: np.ndarray, values: np.ndarray, colour: str, stroke: str, label: str):
    look = {"color": colour, "linestyle": stroke, "marker": "." if len(steps) < 3 else ""}
    axes.plot(steps, values.mean(0), label=label, **look)
    if len(values) > 1:
        axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)


def _count(by_seed: dict[int, float]) -> str:
    return f"n = {len(by_seed)}"


def _unit(summary: Summary) -> str:
    return f"nats ({LOSSES[summary.loss].split(',')[0]})"
