"""Figures of what variants cost and lose. Each function returns a matplotlib figure in the style in
force (`style.using`); nothing is read or written here."""

from typing import Any, NamedTuple

import numpy as np

from kha_jax.analysis import style


class Cost(NamedTuple):
    """Of one training step: seconds, bytes of its temporaries, and FLOPs per token by the
    accounting."""

    seconds: float
    temporaries: int
    flops: float


def scaling(found: dict[int, dict[str, Cost]]) -> Any:
    """Step time and temporaries over those of `baseline` against the length, a line for each other
    way; what the accounting predicts of the time is thin and without markers.

    found: by length, then by way.
    """
    lengths, ways = list(found), [way for way in next(iter(found.values())) if way != "baseline"]
    figure, (times, memory) = style.row_of(2, 3.4, 4.2)

    def ratios(way, field):
        return [getattr(of[way], field) / getattr(of["baseline"], field) for of in found.values()]

    for index, way in enumerate(ways):
        look = style.line(index)
        times.plot(lengths, ratios(way, "seconds"), label=way, **look)
        thin = {**look, "marker": "", "linewidth": 0.8, "alpha": 0.7}
        times.plot(lengths, ratios(way, "flops"), **thin)
        memory.plot(lengths, ratios(way, "temporaries"), **look)
    for axes, title in ((times, "step time (thin: FLOPs)"), (memory, "temporaries of a step")):
        axes.set(xscale="log", xlabel="tokens a row", title=f"{title}, over the baseline")
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.minorticks_off()
        style.plain_log(axes)
        axes.axhline(1, color="grey", linewidth=0.8, linestyle="-")
    style.shared_legend(figure, [times])
    return figure


def compression(profiles: dict[str, dict[int, np.ndarray]], heads: int) -> Any:
    """Relative error of each layer's heads as combinations of fewer, a panel for each stream; the
    upright line is where they were cut.

    profiles: by stream, then by layer, [K]: the error with 1, 2, ... K heads.
    """
    figure, panels = style.row_of(len(profiles), 3.2, 3.6, sharey=True)
    for axes, (slot, of) in zip(panels, profiles.items()):
        for layer, errors in of.items():
            colour = style.of_layer(layer, max(of) + 1)
            numbers = np.arange(1, len(errors) + 1)
            axes.plot(numbers, errors, color=colour, linestyle="-", marker="o")
        axes.axvline(heads, color="grey", linewidth=0.8, linestyle="--")
        axes.set(title=slot, xlabel="heads kept", xticks=numbers)
    panels[0].set(ylabel="relative error of W", ylim=(0, None))
    style.layer_bar(figure, panels, max(max(of) for of in profiles.values()) + 1)
    return figure
