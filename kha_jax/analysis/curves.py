"""Figures of how runs went, from the lines of their metrics.jsonl (`reading.read_metrics`)."""

import math
from typing import Any

import numpy as np

from kha_jax.analysis import style
from kha_jax.analysis.models import Variant
from kha_jax.attention.attention import LARGEST
from kha_jax.metrics import column
from kha_jax.runs import goodput
from kha_jax.spikes import Spike, spikes_in

Rows = list[dict[str, Any]]
VALIDATION = {
    "val_bits_per_byte": "validation bits per byte",
    "val_loss": "validation loss, nats per token",
}
BALANCE = "max_violation"
STABILITY = {
    "loss": "training loss, nats",
    "grad_norm": "gradient norm",
    LARGEST: "largest logit",
}
WHERE = {"loss": "in the loss", "grad_norm": "in the gradient norm"}  # of spikes.SPIKING


def smoothed(values: np.ndarray, over: int = 11) -> np.ndarray:
    """Means of the finite values among the `over` around each entry, fewer at the ends; NaN where
    there are none."""
    window, finite = np.ones(over), np.isfinite(values)
    if len(values) < over:
        return values
    sums = np.convolve(np.where(finite, values, 0), window, "same")
    counts = np.convolve(finite.astype(float), window, "same")
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def training(runs: dict[str, Rows]) -> Any:
    """Training loss, smoothed; validation bits per byte (or loss, for data without bytes) with its
    last value; for mixtures the worst layer's MaxVio. Below the losses, which lie on one another,
    those of each further run less those of the first, at the steps that both have."""
    every = [row for rows in runs.values() for row in rows]
    texts = any("val_bits_per_byte" in row for row in every)
    key = "val_bits_per_byte" if texts else "val_loss"
    balance = [BALANCE] if any(BALANCE in row for row in every) else []
    layout = [["loss", key, *balance], ["loss less", f"{key} less", *balance]]
    layout, heights = (layout, (3, 2)) if len(runs) > 1 else (layout[:1], (3,))
    figure, panels = style.pyplot().subplot_mosaic(
        layout, figsize=(4.2 * len(layout[0]), 0.3 + sum(heights)), height_ratios=heights
    )
    for index, (name, rows) in enumerate(runs.items()):
        plain, marked = style.line(index, marker=""), style.line(index)
        steps, losses = column(rows, "loss")
        panels["loss"].plot(steps, smoothed(losses), label=name, **plain)
        steps, values = column(rows, key)
        last = f"{name}: {values[-1]:.3f}" if values.size else name
        panels[key].plot(steps, values, label=last, **marked)
        if balance:
            steps, worst = column(rows, BALANCE)
            panels[BALANCE].plot(steps, smoothed(worst), label=name, **plain)
    panels["loss"].set_title("training loss, nats per token")
    panels[key].set_title(VALIDATION[key])
    if balance:
        panels[BALANCE].axhline(0.2, color="grey", linewidth=0.8, linestyle=":")
        panels[BALANCE].set_title("MaxVio of the worst layer")
        style.plain_log(panels[BALANCE])
    if len(runs) > 1:
        _less_the_first(panels["loss less"], runs, "loss")
        _less_the_first(panels[f"{key} less"], runs, key)
    for each in panels.values():
        each.legend()
    for name in layout[-1]:
        panels[name].set_xlabel("step")
    return figure


def _less_the_first(axes: Any, runs: dict[str, Rows], key: str) -> None:
    """A series of every run but the first, less that of the first: the loss smoothed, what is
    evaluated with its last value. The last three quarters of training decide the range."""
    (first, base), *others = runs.items()
    ends, each_step = [0.0], key == "loss"
    axes.axhline(0, color="grey", linewidth=1, linestyle="-")
    axes.set_title(f"the same less that of {first}")
    for index, (name, rows) in enumerate(others, 1):
        (steps, values), (steps_of_base, of_base) = column(rows, key), column(base, key)
        steps, at, there = np.intersect1d(steps, steps_of_base, return_indices=True)
        less = values[at] - of_base[there]
        label = f"{name}: {less[-1]:+.3f}" if less.size and not each_step else name
        less, look = (smoothed(less), {"marker": ""}) if each_step else (less, {})
        axes.plot(steps, less, label=label, **style.line(index, **look))
        ends.extend(less[(steps >= 0.25 * steps.max(initial=0)) & np.isfinite(less)])
    margin = 0.1 * (max(ends) - min(ends)) or 0.1
    axes.set_ylim(min(ends) - margin, max(ends) + margin)


def stability(runs: dict[str, Rows], across: int = 4) -> Any:
    """The loss of every step and the gradient norm with their spikes (`spikes.spikes_in`) marked
    and counted, and the largest attention logit of any layer where it was logged; a column for each
    run, `across` of them side by side, on one scale (the paper's figures 1, right, and 2)."""
    shown = [
        name for name in STABILITY if any(name in row for rows in runs.values() for row in rows)
    ]
    columns, blocks = min(across, len(runs)), math.ceil(len(runs) / across)
    size = (
        (4.2 if columns < 3 else 3.2) * columns,
        (2.3 if blocks == 1 else 1.9) * blocks * len(shown),
    )
    figure, grid = style.pyplot().subplots(
        blocks * len(shown), columns, figsize=size, squeeze=False, sharex=True
    )
    for index, (name, rows) in enumerate(runs.items()):
        block, at = divmod(index, columns)
        panels = grid[block * len(shown) : (block + 1) * len(shown), at]
        spikes = spikes_in(rows)
        found = {key: [spike for spike in spikes if spike.name == key] for key in shown}
        for panel, key in zip(panels, shown):
            _spiky(panel, rows, key, index, found[key])
        counts = (f"{len(found[key])} {WHERE[key]}" for key in shown if key in WHERE)
        panels[0].set_title(f"{name}\nspikes: {', '.join(counts)}")
    for row, key in enumerate(shown):
        for panel in grid[row :: len(shown)].ravel():
            panel.sharey(grid[row, 0])
        for panel in grid[row :: len(shown), 0]:
            panel.set_ylabel(STABILITY[key])
        if key != "loss":
            style.plain_log(grid[row, 0])
    for panel in grid.ravel():
        panel.label_outer()
        panel.set_visible(panel.has_data())
    for panel in grid[-1]:
        panel.set_xlabel("step")
    return figure


def _spiky(axes: Any, rows: Rows, key: str, index: int, found: list[Spike]) -> None:
    """Draws a series with its spikes."""
    steps, values = column(rows, key)
    colour = style.KINDS[index % 4]
    axes.plot(steps, values, color=colour, linewidth=0.8, linestyle="-")
    # what is not finite is marked where it left
    heights = [one.centre if math.isnan(one.peak) else one.peak for one in found]
    at = [one.step for one in found]
    axes.plot(at, heights, linestyle="none", marker="v", color=style.KINDS[4])


def time_spent(runs: dict[str, Rows]) -> Any:
    """Where the time of each run went since it first began, by kind, over all its starts: the steps
    that count lie at the bottom, and what a restart did again is `lost`."""
    figure, panels = style.row_of(len(runs), 3.2, 4.2)
    kinds = ("steps", *(kind for kind in goodput.KINDS if kind != "steps"))
    for axes, (name, rows) in zip(panels, runs.items()):
        found = [seconds for row in rows if (seconds := goodput.of(row))]
        minutes = np.array([[0.0] * len(kinds), *([one[k] for k in kinds] for one in found)]) / 60
        axes.stackplot(minutes.sum(axis=1), minutes.T, labels=[k.replace("_", " ") for k in kinds])
        axes.set(title=name, xlabel="minutes since the run began", ylabel="minutes spent")
    style.shared_legend(figure, panels)
    return figure


def cost_against_loss(rows: list[Variant]) -> Any:
    """What each variant costs to train and where it came to; down and to the left is better."""
    figure, axes = style.pyplot().subplots(figsize=(5.2, 3.6))
    texts = all(not math.isnan(row.bits_per_byte) for row in rows)
    for index, row in enumerate(rows):
        value = row.bits_per_byte if texts else row.loss
        look = {"marker": style.MARKERS[index % 6], "color": style.KINDS[index % 6]}
        axes.plot(row.cost.training_flops / 1e6, value, linestyle="none", label=row.name, **look)
    axes.set(
        xlabel="training cost, MFLOP per token",
        ylabel=VALIDATION["val_bits_per_byte" if texts else "val_loss"],
    )
    axes.margins(0.2)
    axes.legend()
    return figure
