"""Figures of what heads learnt, from arrays. Each function returns a matplotlib figure in the style
in force (`style.using`); nothing is read or written here.

Legend: L layers, N heads, H head width.
"""

import math
import re
from typing import Any

import numpy as np

from kha_jax.analysis import measures, style
from kha_jax.analysis.reading import STREAMS, Stack

COLUMNS = 12  # panels in a row at most
Stacks = dict[str, Stack]
HALVES = "rotary halves: feature i turns with the one in its place in the other half"
PLACE = re.compile(r"(?:(.+)/)?([^/]+)/([^/\d][^/]*)(?:/(\d+))?")  # [SEGMENT/]SLOT/MATRIX[/HEAD]


def symbol(place: str) -> str:
    """A place of `reading.Run.matrices` as a paper writes it, in mathtext: T_v for `value/kernel`,
    W_v^up for `value/up`."""
    segment, slot, matrix, head = PLACE.fullmatch(place).groups()
    stream = slot[0] if slot in STREAMS else rf"\mathrm{{{slot}}}"
    of_mlp = matrix not in ("kernel", "residual")
    written = rf"$W_{{{stream}}}^{{\mathrm{{{matrix}}}}}$" if of_mlp else rf"$T_{{{stream}}}$"
    before, after = f"{segment}: " if segment else "", f", head {head}" if head else ""
    return before + written + after


def scale_of(stacks: Stacks) -> float:
    """The magnitude that 99.8% of all changes stay below: one scale for all panels."""
    changes = np.concatenate([np.abs(stack.change).ravel() for stack in stacks.values()])
    return float(np.quantile(changes, 0.998)) or 1.0


def heat_maps(stacks: Stacks, clip: bool = False, scale: float | None = None) -> Any:
    """Every matrix as a heat map, a row for each place, layers from left to right.

    What is shown is the change since the start (the identity; zeros for a gate): white is
    untouched. clip: the entries themselves cut to [0, 1], as figure 3 of the paper has them, which
    hides negative entries and diagonals above 1. scale: what the strongest colour means, to compare
    runs; `scale_of` by default. Dashed lines are where the halves of rotated features begin.
    """
    scale = scale or scale_of(stacks)
    look = {"cmap": style.SIGNED, "vmin": -scale, "vmax": scale}
    label = "entry less its start"
    if clip:
        look, label = {"cmap": style.POSITIVE, "vmin": 0, "vmax": 1}, "entry, cut to [0, 1]"
    figure, rows = _panels(stacks)
    for (place, stack), row in zip(stacks.items(), rows):
        shown = stack.T if clip else stack.change
        for layer, T, axes in zip(stack.layers, shown, row):
            image = axes.imshow(T, **look)
            axes.set_title(f"layer {layer}" if layer == stack.layers[0] else layer)
            _mark_features(axes, stack)
        _say_place(row, place, stack)
        row[0].tick_params(labelleft=True, labelbottom=True)
    extend = "neither" if clip else "both"
    figure.colorbar(image, ax=figure.axes, label=label, extend=extend, fraction=0.03, aspect=30)
    style.shared_legend(figure, figure.axes)
    return figure


def _mark_features(axes: Any, stack: Stack) -> None:
    """Four ticks at most on each side, and lines where rotary halves begin."""
    for ticks, size in ((axes.set_xticks, stack.T.shape[2]), (axes.set_yticks, stack.T.shape[1])):
        ticks(range(0, size, math.ceil(size / 4)))
    axes.tick_params(length=2, labelsize=6, labelleft=False, labelbottom=False)
    first, last = stack.rotary
    look = {"color": "grey", "linewidth": 0.8, "linestyle": "--"}
    for edge in {first, (first + last) // 2, last} - {0, stack.T.shape[2]}:
        axes.axvline(edge - 0.5, label=HALVES, **look)
        axes.axhline(edge - 0.5, **look)


def blocks_of(stacks: Stacks) -> dict[str, list[measures.Blocks]]:
    """The block structure of every change, for the square matrices."""
    return {
        place: [measures.blocks(change) for change in stack.change]
        for place, stack in stacks.items()
        if stack.T.shape[1] == stack.T.shape[2]
    }


def block_maps(
    stacks: Stacks, blocks: dict[str, list[measures.Blocks]], scale: float | None = None
) -> Any:
    """The heat maps with features reordered so that those that mix stand together, and lines around
    the blocks (`blocks_of`). Above each the modularity Q of its blocks, in brackets that of the
    same entries shuffled: only what is above it is structure."""
    stacks = {place: stacks[place] for place in blocks}
    scale = scale or scale_of(stacks)
    figure, rows = _panels(stacks)
    for (place, stack), row in zip(stacks.items(), rows):
        for layer, change, found, axes in zip(stack.layers, stack.change, blocks[place], row):
            shown = change[found.order][:, found.order]
            look = {"cmap": style.SIGNED, "vmin": -scale, "vmax": scale}
            image = axes.imshow(shown, **look)
            edges = np.flatnonzero(np.diff(found.labels[found.order])) + 0.5
            for low, high in zip([-0.5, *edges], [*edges, len(shown) - 0.5]):
                box = [low, high, high, low, low], [low, low, high, high, low]
                axes.plot(*box, color="#222222", linewidth=0.7, linestyle="-")
            title = f"{layer}: {found.modularity:.2f} ({found.shuffled:.2f})"
            axes.set_title(title, fontsize=7)
        _say_place(row, place, stack)
    figure.colorbar(
        image, ax=figure.axes, label="entry less its start", extend="both", fraction=0.03, aspect=30
    )
    return figure


def _panels(stacks: Stacks) -> tuple[Any, list[list[Any]]]:
    """A grid of square panels, COLUMNS at most side by side, and the axes of each place."""
    lengths = [len(stack.T) for stack in stacks.values()]
    columns = min(COLUMNS, max(lengths))
    needed = [math.ceil(length / columns) for length in lengths]
    size = max(1.0, 7 / columns)
    figure, grid = style.pyplot().subplots(
        sum(needed),
        columns,
        figsize=(size * columns + 1.6, (size + 0.28) * sum(needed) + 0.1),
        squeeze=False,
    )
    rows, first = [], 0
    for count, length in zip(needed, lengths):
        axes = grid[first : first + count].ravel()
        for unused in axes[length:]:
            unused.set_visible(False)
        for each in axes[:length]:
            style.images(each)
        rows.append(list(axes[:length]))
        first += count
    return figure, rows


def _say_place(row: list[Any], place: str, stack: Stack) -> None:
    n, m = stack.T.shape[1:]
    row[0].set_ylabel(f"{symbol(place)}\n{n} x {m} {stack.axis}s", fontsize=8)


def diagonal_profiles(stacks: Stacks, scale: float | None = None) -> Any:
    """The diagonal of every matrix less its start, features sorted, one row a layer: how many keep
    to themselves (white), how many give way (blue) or grow (red)."""
    longest = max(len(stack.T) for stack in stacks.values())
    figure, grid = style.row_of(len(stacks), height=1.3 + 0.11 * longest, width=3.0)
    profiles = {p: np.sort(measures.diagonal(s.change))[:, ::-1] for p, s in stacks.items()}
    scale = scale or max(float(np.abs(z).max()) for z in profiles.values()) or 1.0
    for (place, profile), axes in zip(profiles.items(), grid):
        layers = stacks[place].layers
        image = axes.imshow(
            profile,
            aspect="auto",
            cmap=style.SIGNED,
            vmin=-scale,
            vmax=scale,
            extent=(0, 1, layers[-1] + 0.5, layers[0] - 0.5),
        )
        axes.grid(False)
        axes.set(title=symbol(place), xlabel="share of features, sorted", ylabel="layer")
        axes.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=grid, label="diagonal less its start", fraction=0.04)
    return figure


def depth(runs: dict[str, Stacks]) -> Any:
    """Distance from the start, what the diagonal lost or won, and the off-diagonal share (but for
    gates) over the layers; a line for each run and place."""
    figure, grid = style.row_of(3, height=3.0, width=3.4)
    lines = [(run, place, s) for run, stacks in runs.items() for place, s in stacks.items()]
    kinds = list(dict.fromkeys(place for _, place, _ in lines))
    for run, place, stack in lines:
        line = style.line(kinds.index(place), marker=style.MARKERS[list(runs).index(run) % 6])
        label = symbol(place) if len(runs) == 1 else f"{run}: {symbol(place)}"
        values = (
            measures.distance(stack.T, stack.start),
            measures.diagonal_mean(stack.change),
            measures.off_diagonal_share(stack.T),
        )
        # what starts at zero has no diagonal to leave
        for axes, value in zip(grid if stack.start.any() else grid[:2], values):
            axes.plot(stack.layers, value, label=label, **line)
    names = (
        "distance from the start, |T - start| / |I|",
        "mean diagonal less its start",
        "off-diagonal share of the squares",
    )
    for axes, name in zip(grid, names):
        axes.set(xlabel="layer", title=name)
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in (grid[0], grid[2]):
        axes.set_ylim(bottom=0)
    style.shared_legend(figure, grid)
    return figure


def history(trace: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]) -> Any:
    """What training logged of its matrices (`reading.trace`): a row for each place, layers by
    colour, from first (dark) to last (bright)."""
    plots, shown = style.pyplot(), ("diagonal_mean", "off_diagonal_share", "spectral_norm")
    names = [name.replace("_", " ") for name in shown]
    figure, grid = plots.subplots(
        len(trace), 3, figsize=(9.6, 1.9 * len(trace) + 0.6), squeeze=False, sharex=True
    )
    layers = max(z[shown[0]][1].shape[1] for z in trace.values())
    for row, (place, logged) in zip(grid, trace.items()):
        for axes, measure in zip(row, shown):
            steps, values = logged[measure]
            for layer, value in enumerate(values.T):
                axes.plot(steps, value, color=style.of_layer(layer, layers), linestyle="-")
        row[0].set_ylabel(symbol(place))
    for axes, name in zip(grid[0], names):
        axes.set_title(name)
    for axes in grid[-1]:
        axes.set_xlabel("step")
    style.layer_bar(figure, grid, layers)
    return figure


def spectra(stacks: Stacks) -> Any:
    """Singular values of every matrix, layers by colour: a flat line at 1 is the identity, a
    falling one a matrix that lets few directions through."""
    figure, grid = style.row_of(len(stacks), height=3.0, width=3.0, sharey=True)
    layers = max(stack.layers[-1] + 1 for stack in stacks.values())
    for (place, stack), axes in zip(stacks.items(), grid):
        values = measures.spectrum(stack.T)
        for layer, line in zip(stack.layers, values):
            share = (np.arange(line.size) + 0.5) / line.size
            axes.plot(share, line, color=style.of_layer(layer, layers), linestyle="-")
        axes.set(title=symbol(place), xlabel="share of singular directions", ylim=(0, None))
    grid[0].set_ylabel("singular value")
    style.layer_bar(figure, grid, layers)
    return figure


def gates(stacks: Stacks, reach: float = 3.0) -> Any:
    """The response of every gate as z moves along the direction in which it reacts most: the factor
    on the features, a light band holding all of them and a dark one the middle half."""
    plots = style.pyplot()
    panels = [(p, s, i) for p, s in stacks.items() for i in range(len(s.T))]
    columns = min(9, len(panels))
    rows = math.ceil(len(panels) / columns)
    size = max(1.15, min(2.3, 9 / columns))
    figure, grid = plots.subplots(
        rows,
        columns,
        figsize=(size * columns + 0.6, size * rows + 0.7),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    scales = np.linspace(-reach, reach, 61)
    for axes, (place, stack, index) in zip(grid.ravel(), panels):
        W = stack.T[index].astype(np.float64)
        factors = measures.gate_response(W, measures.steepest(W)[0], scales)
        low, first, last, high = np.quantile(factors, (0, 0.25, 0.75, 1), axis=1)
        band = {"color": style.KINDS[0], "linewidth": 0}
        axes.fill_between(scales, low, high, alpha=0.2, label="all features", **band)
        axes.fill_between(scales, first, last, alpha=0.5, label="the middle half of them", **band)
        axes.axhline(1, color=style.KINDS[1], linewidth=1, linestyle="--", label="does nothing")
        axes.set_title(f"{symbol(place)}, layer {stack.layers[index]}", fontsize=8)
    for unused in grid.ravel()[len(panels) :]:
        unused.set_visible(False)
    grid[0, 0].set(ylim=(0, 2), yticks=[0, 1, 2])
    figure.supxlabel("z along the gate's steepest direction", fontsize=9)
    figure.supylabel("factor on the features", fontsize=9)
    style.shared_legend(figure, [grid[0, 0]], "upper")
    return figure
