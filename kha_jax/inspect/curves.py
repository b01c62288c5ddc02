"""Figures of how runs went, from the lines of their metrics.jsonl (`reading.read_metrics`)."""

import math
from typing import Any

import numpy as np

from kha_jax.inspect import style
from kha_jax.inspect.models import Variant

Rows = list[dict[str, Any]]
VALIDATION = {
    "val_bits_per_byte": "validation bits per byte",
    "val_loss": "validation loss, nats per token",
}


def series(rows: Rows, key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the lines that have the key; of a list, its largest entry."""
    found = [(row["step"], row[key]) for row in rows if key in row]
    values = [max(value) if isinstance(value, list) else value for _, value in found]
    return np.array([step for step, _ in found]), np.array(values, np.float64)


def smoothed(values: np.ndarray, over: int = 11) -> np.ndarray:
    """Means of the finite values among the `over` around each entry, fewer at the ends; NaN where
    there are none."""
    window, finite = np.ones(over), np.isfinite(values)
    if len(values) < over:
        return values
    sums = np.convolve(np.where(finite, values, 0), window, "same")
    counts = np.convolve(finite.astype(float), window, "same")
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def spikes(losses: np.ndarray, window: int = 50, size: float = 6.0) -> np.ndarray:
    """Indices of losses that stand out of the `window` before them: above the line through those by
    more than `size` standard deviations, estimated from the median absolute deviation around it; or
    not finite."""
    finite = np.isfinite(losses)
    if len(losses) <= window or not finite.any():
        return np.flatnonzero(~finite)
    last = np.maximum.accumulate(np.where(finite, np.arange(len(losses)), np.argmax(finite)))
    before = np.lib.stride_tricks.sliding_window_view(losses[last], window)[:-1]
    at = np.arange(window) - (window - 1) / 2
    middle, slope = before.mean(1, keepdims=True), (before @ at)[:, None] / (at @ at)
    spread = 1.4826 * np.median(np.abs(before - middle - slope * at), axis=1)
    expected = (middle + slope * (window + 1) / 2)[:, 0]
    high = losses[window:] > expected + size * np.maximum(spread, 1e-6)
    return np.flatnonzero(~finite | np.concatenate([np.zeros(window, bool), high]))


def training(runs: dict[str, Rows]) -> Any:
    """Training loss, smoothed; validation bits per byte (or loss, for data without bytes) with its
    last value; for mixtures the worst layer's MaxVio."""
    balanced = any("max_violation" in row for rows in runs.values() for row in rows)
    count = 3 if balanced else 2
    figure, axes = style.pyplot().subplots(1, count, figsize=(4.2 * count, 3.3))
    left, right = axes[:2]
    texts = any("val_bits_per_byte" in row for rows in runs.values() for row in rows)
    key = "val_bits_per_byte" if texts else "val_loss"
    for index, (name, rows) in enumerate(runs.items()):
        steps, losses = series(rows, "loss")
        left.plot(steps, smoothed(losses), label=name)
        steps, values = series(rows, key)
        last = f"{name}: {values[-1]:.3f}" if values.size else name
        right.plot(steps, values, marker=style.MARKERS[index % 6], label=last)
        if balanced:
            steps, worst = series(rows, "max_violation")
            axes[2].plot(steps, smoothed(worst), label=name)
    left.set_title("training loss, nats per token")
    right.set_title(VALIDATION[key])
    if balanced:
        axes[2].axhline(0.2, color="grey", linewidth=0.8, linestyle=":")
        axes[2].set_title("MaxVio of the worst layer")
        style.plain_log(axes[2])
    for each in axes:
        each.set_xlabel("step")
        each.legend()
    return figure


def stability(runs: dict[str, Rows], window: int = 50) -> Any:
    """The loss of every step with its spikes (`spikes`) marked, and the gradient norm; a column for
    each run, on one scale."""
    plots = style.pyplot()
    figure, grid = plots.subplots(
        2, len(runs), figsize=(4.2 * len(runs), 4.6), squeeze=False, sharex=True, sharey="row"
    )
    for (name, rows), (top, bottom), colour in zip(runs.items(), grid.T, _cycle(style.KINDS)):
        steps, losses = series(rows, "loss")
        at = spikes(losses, window)
        top.plot(steps, losses, color=colour, linewidth=0.5, alpha=0.6, linestyle="-")
        top.plot(steps, smoothed(losses), color=colour, linestyle="-")
        top.plot(steps[at], losses[at], linestyle="none", marker="v", color=style.KINDS[4])
        top.set_title(f"{name}: {len(at)} spikes")
        steps, norms = series(rows, "grad_norm")
        bottom.plot(steps, norms, color=colour, linewidth=0.7, linestyle="-")
        bottom.set_xlabel("step")
        style.plain_log(bottom)
    grid[0, 0].set_ylabel("training loss, nats per token")
    grid[1, 0].set_ylabel("gradient norm")
    return figure


def cost_against_loss(rows: list[Variant]) -> Any:
    """What each variant costs to train and where it came to; down and to the left is better."""
    figure, axes = style.pyplot().subplots(figsize=(5.2, 3.6))
    texts = all(not math.isnan(row.bits_per_byte) for row in rows)
    for index, row in enumerate(rows):
        value = row.bits_per_byte if texts else row.loss
        look = {"marker": style.MARKERS[index % 6], "color": style.KINDS[index % 6]}
        axes.plot(row.training_flops / 1e6, value, linestyle="none", label=row.name, **look)
    axes.set(
        xlabel="training cost, MFLOP per token",
        ylabel=VALIDATION["val_bits_per_byte" if texts else "val_loss"],
    )
    axes.margins(0.2)
    axes.legend()
    return figure


def _cycle(values: tuple) -> Any:
    while True:
        yield from values
