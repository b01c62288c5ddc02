"""Figures of what knocking does to heads: the directions they use, and how alike they are.

They take second moments C[L, N, H, N, H] of the streams before their mixer (`measures`), from the
weights alone or from activations; layers run from left to right. Legend: L layers, N heads, H head
width.
"""

import math
from typing import Any, Sequence

import numpy as np

from kha_jax.analysis import measures, style
from kha_jax.analysis.figures import Stacks
from kha_jax.analysis.models import Stream
from kha_jax.analysis.reading import STREAMS

Alike = dict[str, tuple[np.ndarray, np.ndarray]]
ALIKE = {
    "similarity of two heads (linear CKA)": lambda C: _of_pairs(measures.similarity(C)),
    "share of a head that another predicts (R²)": lambda C: _of_pairs(measures.predicted_by_one(C)),
    "share that all its peers predict (R²)": (
        lambda C: float(measures.predicted_by_peers(C).mean()) if len(C) > 1 else math.nan
    ),
}


def subspaces(transforms: Stacks, moments: dict[str, np.ndarray], rank: int) -> Any:
    """What T does to the `rank` directions in which each head's stream varies most: how far it
    turns them, and how close the heads' directions are to one another before and after.

    moments: C [L, N, H, N, H] of each slot before its mixer (`measures`).
    """
    figure, grid = style.row_of(2, height=3.0, width=4.6, sharey=True)
    for slot, stack in transforms.items():
        turned, before, after = [], [], []
        for C, T in zip(moments[slot], stack.T):
            old, new = (measures.subspaces(z, rank) for z in (C, measures.mixed(C, T)))
            turned.append(measures.principal_angles(old, new).mean(-1))
            before.append(measures.between_heads(old))
            after.append(measures.between_heads(new))
        line, turned = style.line(STREAMS.index(slot)), np.array(turned)
        grid[0].plot(stack.layers, turned.mean(1), label=slot, **line)
        for head in turned.T:
            faint = {"color": line["color"], "alpha": 0.35, "linestyle": "none", "marker": "."}
            grid[0].plot(stack.layers, head, **faint)
        _before_after(grid[1], stack.layers, before, after, slot, line)
    grid[0].set(
        title=f"turn of a head's {rank} main directions by T (dots: heads)",
        ylabel="mean principal angle, degrees",
        ylim=(0, 90),
    )
    grid[1].set(title="angle between the main directions of two heads")
    _finish(figure, grid)
    return figure


def alike(before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> Alike:
    """How alike heads are, before and after the mixer, by the measures of ALIKE, over the layers:
    mean CKA of all pairs, and how much of a head one other, or all others together, predict. The
    last is 1 by counting wherever the peers' features are as many as the inputs. NaN for one head.
    """
    moments = list(before), list(after)
    return {
        name: tuple(np.array([measure(C) for C in layers]) for layers in moments)
        for name, measure in ALIKE.items()
    }


def alike_by_weights(transforms: Stacks, moments: dict[str, np.ndarray]) -> dict[str, Alike]:
    """`alike` of every slot from its moments before the mixer and its T."""
    return {
        slot: alike(moments[slot], [measures.mixed(*pair) for pair in zip(moments[slot], stack.T)])
        for slot, stack in transforms.items()
    }


def alike_on_streams(streams: dict[str, Stream]) -> dict[str, Alike]:
    """`alike` on streams that a model made of real tokens (`models.streams`)."""
    return {
        slot: alike(map(measures.moments, stream.before), map(measures.moments, stream.after))
        for slot, stream in streams.items()
    }


def similarity(found: dict[str, Alike]) -> Any:
    """How alike the heads of each slot are, before and after the mixer."""
    figure, grid = style.row_of(3, height=3.0, width=3.4, sharey=True)
    for slot, numbers in found.items():
        for axes, (before, after) in zip(grid, numbers.values()):
            _before_after(
                axes, range(len(before)), before, after, slot, style.line(STREAMS.index(slot))
            )
    for axes, title in zip(grid, ALIKE):
        axes.set(title=title, ylim=(0, 1.02))
    _finish(figure, grid)
    return figure


def _of_pairs(matrix_NN: np.ndarray) -> float:
    pairs = ~np.eye(len(matrix_NN), dtype=bool)
    return float(matrix_NN[pairs].mean()) if pairs.any() else math.nan


def _before_after(axes, layers, before, after, slot, line):
    axes.plot(layers, before, **{**line, "alpha": 0.6, "markerfacecolor": "none"})
    axes.plot(layers, after, label=slot, **line)


def _finish(figure: Any, grid: list[Any]) -> None:
    for axes in grid:
        axes.set_xlabel("layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
    grid[1].plot([], [], color="grey", marker="o", markerfacecolor="none", label="before T")
    grid[1].plot([], [], color="grey", marker="o", linestyle="-", label="after T")
    style.shared_legend(figure, grid[1:])
