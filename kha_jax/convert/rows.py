"""Which of our leaves is which of their tensors, and how one is laid out as the other: a table of
rows, from which both directions and the check of names and shapes are made.

Their weights are [out, in], heads one after another; ours are [in, heads, H], or [heads, H, out].

Legend: D model width, N heads, H head width, C latent width, E experts, F feed-forward width.
"""

import math
from typing import Iterator, NamedTuple

import numpy as np

from kha_jax.convert.folders import Tensor
from kha_jax.errors import DataError
from kha_jax.model import ModelConfig

NAMED = 5  # of the tensors that are missing or not expected
TILE = 128, 1024  # rows and columns that are transposed at once
PAD = 16  # entries: rows that are a power of two apart fall on the same lines of the cache


def transpose(rows: np.ndarray, out: np.ndarray) -> None:
    """Writes rows.T, tile by tile: three times as fast as at once, as what is read again and again
    stays in the cache."""
    (size, width), (high, wide) = rows.shape, TILE
    held = np.empty((high, wide + PAD), out.dtype)
    for first in range(0, size, high):
        for left in range(0, width, wide):
            part = rows[first : first + high, left : left + wide]
            tile = held[: part.shape[0], : part.shape[1]]
            tile[...] = part
            out[left : left + wide, first : first + high] = tile.T


class Part(NamedTuple):
    """Rows of a tensor that holds more than one of our leaves: of `groups` blocks of `width` rows
    each those from `begin` to `end`. paired: they are rotated in neighbouring pairs (2i, 2i + 1),
    ours in halves (i, i + R/2)."""

    groups: int
    width: int
    begin: int
    end: int
    paired: bool = False

    def _order(self) -> np.ndarray:
        rows = np.arange(self.begin, self.end)
        return np.concatenate([rows[0::2], rows[1::2]]) if self.paired else rows

    def take(self, theirs: np.ndarray) -> np.ndarray:
        """These rows of their tensor [groups width, ...]."""
        blocks = theirs.reshape(self.groups, self.width, *theirs.shape[1:])
        return blocks[:, self._order()].reshape(-1, *theirs.shape[1:])

    def put(self, theirs: np.ndarray, rows: np.ndarray) -> None:
        """The inverse: writes them where they belong."""
        blocks = theirs.reshape(self.groups, self.width, *theirs.shape[1:])
        blocks[:, self._order()] = rows.reshape(self.groups, -1, *theirs.shape[1:])


class Row(NamedTuple):
    """One leaf of ours and where it stands in theirs.

    ours: its path, in a layer or outside. theirs: the tensor's name, with {layer} and {expert}.
    inputs: how many of our leading axes are inputs, so that theirs is the transposed [out, in]; 0:
    the same order. part: the rows of theirs that it is. experts: it has an axis of experts, which
    are tensors of their own where the name has {expert}, and else the first axis of theirs.
    collection: of the variables.
    """

    ours: str
    theirs: str
    inputs: int = 0
    part: Part | None = None
    experts: bool = False
    collection: str = "params"

    def to_ours(self, theirs: np.ndarray, out: np.ndarray) -> None:
        """Writes our array, without layers and experts, into `out`, whose entries are one after
        another in memory."""
        rows = theirs if self.part is None else self.part.take(theirs)
        if self.inputs:
            transpose(rows, out.reshape(rows.shape[::-1]))
        else:
            out[...] = rows.reshape(out.shape)

    def to_theirs(self, ours: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """The inverse: the rows of their tensor that this leaf is."""
        if not self.inputs:
            rows = ours.reshape(-1) if self._is_bias(ours.shape) else ours
            return rows.astype(dtype, copy=False)
        rows = ours.reshape(math.prod(ours.shape[: self.inputs]), -1)
        transpose(rows, out := np.empty(rows.shape[::-1], dtype))
        return out

    def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the tensor, for one layer and expert of ours."""
        if not self.inputs:
            flat = (math.prod(shape),) if self._is_bias(shape) else shape
            return flat if self.part is None else (self.part.groups * self.part.width, *flat[1:])
        inner, outer = math.prod(shape[: self.inputs]), math.prod(shape[self.inputs :])
        rows = outer if self.part is None else self.part.groups * self.part.width
        return rows, inner

    def _is_bias(self, shape: tuple[int, ...]) -> bool:
        return self.theirs.endswith(".bias")


class Link(NamedTuple):
    """A row at one place. leaf: path of ours. at: its layer and expert, of those that it has. name:
    of their tensor. index: of the expert along the first axis of theirs, where it is fused. shape:
    of ours there; whole: of their tensor."""

    row: Row
    leaf: str
    at: tuple[int, ...]
    name: str
    index: int | None
    shape: tuple[int, ...]
    whole: tuple[int, ...]


def links(
    model: ModelConfig, outer: list[Row], layers: dict[str, list[Row]], shapes: dict[str, tuple]
) -> list[Link]:
    """Every place of every row. layers: the rows of each segment. shapes: of our leaves by path."""
    found = []
    for row in outer:
        shape = shapes[path := f"{row.collection}/{row.ours}"]
        found.append(Link(row, path, (), row.theirs, None, shape, row.their_shape(shape)))
    first = 0
    for segment in model.segments():
        for row in layers[segment.name]:
            path = f"{row.collection}/{segment.name}/{row.ours}"
            for layer in range(segment.layers):
                found += _in_layer(row, path, layer, first + layer, shapes[path])
        first += segment.layers
    return found


def _in_layer(row: Row, path: str, own: int, layer: int, shape: tuple[int, ...]) -> Iterator[Link]:
    """own: the layer within its segment."""
    if not row.experts:
        inner = shape[1:]
        whole, name = row.their_shape(inner), row.theirs.format(layer=layer)
        yield Link(row, path, (own,), name, None, inner, whole)
        return
    experts, *rest = shape[1:]
    whole, inner, split = row.their_shape(tuple(rest)), tuple(rest), "{expert}" in row.theirs
    for expert in range(experts):
        name = row.theirs.format(layer=layer, expert=expert)
        at, index = (own, expert), None if split else expert
        yield Link(row, path, at, name, index, inner, whole if split else (experts, *whole))


def check(where: str, tensors: dict[str, Tensor], expected: list[Link], skipped: set[str]) -> None:
    """Compares names and shapes, both ways.

    Raises:
        DataError: names up to five that are missing, not expected, or of another shape.
    """
    shapes = {link.name: link.whole for link in expected}
    wrong = [f"{name} is missing" for name in shapes if name not in tensors]
    wrong += [f"{n} is not expected" for n in tensors if n not in shapes and n not in skipped]
    wrong += [
        f"{name} is {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if wrong:
        more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise DataError(f"{where}: does not fit its config.json: {'; '.join(wrong[:NAMED])}{more}")
