"""A folder of Hugging Face's as a model of ours, and what a run keeps of it for the way back."""

import functools
import itertools
import shutil
from pathlib import Path
from typing import Any, Iterable, Iterator, NamedTuple

import numpy as np

from kha_jax.convert import own_code
from kha_jax.convert.families import (
    FAMILIES,
    family_of,
    read_config,
)
from kha_jax.convert.folders import (
    CONFIG,
    Folder,
    Tensor,
    open_folder,
)
from kha_jax.convert.placing import Leaf, Piece
from kha_jax.convert.rows import Link, check, links
from kha_jax.convert.tables import Layout, layer_rows, outer_rows
from kha_jax.errors import DataError
from kha_jax.model import ModelConfig
from kha_jax.runs.arrays import leaves as by_path
from kha_jax.storage import read_json, write_json
from kha_jax.training.step import abstract_variables

TENSORS = (
    "tensors.json"  # beside the stock config.json: name, dtype, shape and file of every tensor
)
HEAD, FUSED = "lm_head.weight", "experts.gate_up_proj"


class Stock(NamedTuple):
    """A folder that has been opened and checked. kind: its model_type. model: it, computed as any
    new model. skipped: names of tensors that are not read."""

    folder: Folder
    kind: str
    model: ModelConfig
    skipped: list[str]
    layout: Layout

    def leaves(self, model: ModelConfig | None = None) -> Iterator[Leaf]:
        """What the folder holds of a model, its own by default; one with mixers has more."""
        model = model or self.model
        found = self._links(model)
        for path, of_leaf in itertools.groupby(found, lambda link: link.leaf):
            yield _leaf(path, model, list(of_leaf), self.folder.tensors)

    def _links(self, model: ModelConfig) -> list[Link]:
        every = links_of(self.kind, model, self.layout)  # of mixers that are inserted there is none
        return [link for link in every if link.name in self.folder.tensors]


def open_stock(path: Path) -> Stock:
    """A folder whose names, shapes and dtypes are those that its config.json asks for.

    Raises:
        DataError: names the file, the key or the tensor that is wrong, and what would work.
    """
    folder = open_folder(path)
    where = folder.path / CONFIG
    kind, _ = family_of(where, folder.config)
    model = read_config(where, folder.config)
    skipped = [name for name in folder.tensors if _skipped(name, model, folder.config)]
    layout = layout_of(folder.tensors, folder.config)
    expected = links_of(kind, model, layout)
    tied_copy = model.embeddings == "tied" and HEAD in folder.tensors
    check(str(path), folder.tensors, expected, {*skipped, *([HEAD] if tied_copy else [])})
    if tied_copy:
        table = folder.tensors[FAMILIES[kind].names.embedding]
        _same(path, table, folder.tensors[HEAD])
    return Stock(folder, kind, model, skipped, layout)


def read(path: Path | str) -> tuple[ModelConfig, Iterator[Leaf]]:
    """(model, its leaves) of a stock folder; see `Leaf`. Leaves are read when they are asked for.

    Raises:
        DataError: names the file, the key or the tensor that is wrong, and what would work.
    """
    stock = open_stock(Path(path))
    return stock.model, stock.leaves()


def _skipped(name: str, model: ModelConfig, config: dict[str, Any]) -> bool:
    """Whether a tensor is none of the model's: tables of frequencies that old folders hold, and
    layers that predict further tokens."""
    if name.endswith("rotary_emb.inv_freq"):
        return True
    more = config.get("num_nextn_predict_layers") or 0
    beyond = range(model.layers, model.layers + more)
    return any(name.startswith(f"model.layers.{layer}.") for layer in beyond)


def _same(path: Path, table: Tensor, copy: Tensor) -> None:
    """Raises DataError where a tied table has a copy that differs."""
    same = (table.dtype, table.shape) == (copy.dtype, copy.shape)
    pairs = ([one.read(*block).view(np.uint8) for one in (table, copy)] for block in table.blocks())
    if not same or any((a != b).any() for a, b in pairs):
        raise DataError(
            f"{path}: {HEAD} differs from {table.name}, and tie_word_embeddings says that they are "
            "one; set it to false"
        )


def layout_of(names: Iterable[str], config: dict[str, Any]) -> Layout:
    """Of a folder with tensors of these names."""
    fused = any(name.endswith(FUSED) for name in names)
    return Layout(fused=fused, paired=config.get("rope_interleave", True) is not False)


def links_of(kind: str, model: ModelConfig, layout: Layout) -> list[Link]:
    """Every leaf of a model and its tensors in this family."""
    family, shapes = FAMILIES[kind], shapes_of(model)
    layers = {
        s.name: [*layer_rows(family.names, s, layout), *own_code.rows(s.attention)]
        for s in model.segments()
    }
    return links(model, outer_rows(family.names, model), layers, shapes)


def shapes_of(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every leaf by its path."""
    return {path: leaf.shape for path, leaf in by_path(abstract_variables(model)).items()}


def _leaf(path: str, model: ModelConfig, of: list[Link], tensors: dict[str, Tensor]) -> Leaf:
    stacked = [max(link.at[axis] for link in of) + 1 for axis in range(len(of[0].at))]
    shape = (*stacked, *of[0].shape)

    def pieces() -> Iterator[Piece]:
        for link in of:
            yield from _pieces(link, tensors[link.name])

    return Leaf(path, shape, pieces)


def _pieces(link: Link, tensor: Tensor) -> Iterator[Piece]:
    zeros = (0,) * len(link.shape)
    if not link.row.inputs and link.row.part is None and not link.at:
        for first, last in tensor.blocks():
            write = functools.partial(_copy, tensor, first, last)
            yield Piece((first, *zeros[1:]), (last - first, *link.shape[1:]), write)
        return
    shape = (*(1 for _ in link.at), *link.shape)
    yield Piece((*link.at, *zeros), shape, functools.partial(_laid_out, link, tensor))


def _copy(tensor: Tensor, first: int, last: int, out: np.ndarray) -> None:
    out[...] = tensor.read(first, last)


def _laid_out(link: Link, tensor: Tensor, out: np.ndarray) -> None:
    one = link.index
    theirs = tensor.read() if one is None else tensor.read(one, one + 1)[0]
    link.row.to_ours(theirs, out.reshape(link.shape))


# ------------------------------------------------------------------ what a run keeps of it


class Record(NamedTuple):
    """What a stock folder has beside its weights, as RUN/stock keeps it. tensors: the name, dtype,
    shape and file of each."""

    path: Path
    config: dict[str, Any]
    tensors: list[Tensor]


def keep(stock: Stock, path: Path) -> None:
    """Writes the folder of `Record`.

    Raises:
        OSError: as the system says.
    """
    path.mkdir(parents=True)
    skipped = set(stock.skipped)
    for name in [CONFIG, *stock.folder.beside()]:
        shutil.copyfile(stock.folder.path / name, path / name)
    entries = [
        {"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "file": t.file}
        for t in stock.folder.tensors.values()
        if t.name not in skipped
    ]
    write_json(path / TENSORS, entries)


def read_record(path: Path) -> Record | None:
    """What `keep` has written, or None where there is nothing.

    Raises:
        DataError: it is damaged.
    """
    if not (path / TENSORS).exists():
        return None
    try:
        entries = read_json(path / TENSORS)
        tensors = [
            Tensor(e["name"], e["dtype"], tuple(e["shape"]), e["file"], path / e["file"])
            for e in entries
        ]
        return Record(path, read_json(path / CONFIG), tensors)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: is damaged ({error!r}); import the folder again") from None
