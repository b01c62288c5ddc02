"""The leaves of a saved state: what they are, and some of them without the rest."""

import functools
import math
from typing import Any, Iterable, Iterator, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from kha_jax.errors import CheckpointError


class Leaf(NamedTuple):
    """What a checkpoint says of one array before it is read."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class Checkpoint:
    """The arrays of one saved state.

    Raises:
        CheckpointError: the folder holds no state that can be read.
    """

    def __init__(self, state: epath.PathLike):
        path = epath.Path(state)
        # Orbax takes no relative path
        self.path = path if "://" in str(state) else path.absolute()
        try:
            with ocp.PyTreeCheckpointer() as reader:
                self._tree = reader.metadata(self.path).item_metadata.tree
        except Exception as error:
            raise CheckpointError(f"{self.path} does not hold a state: {error}") from None
        self.leaves = {
            name: Leaf(tuple(leaf.shape), str(np.dtype(leaf.dtype)))
            for name, leaf in _named(self._tree)
        }

    def read(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """These leaves, and no others.

        Raises:
            CheckpointError: names one that is not there, or could not be read.
        """
        wanted = list(names)
        missing = [name for name in wanted if name not in self.leaves]
        if missing:
            raise CheckpointError(f"{self.path} has no leaf {missing[0]}")
        item = jax.tree_util.tree_map_with_path(
            lambda path, _: 0 if _name(path) in wanted else ocp.PLACEHOLDER, self._tree
        )
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), self._tree)
        arguments = ocp.args.PyTreeRestore(item=item, restore_args=as_numpy)
        try:
            with ocp.PyTreeCheckpointer() as reader:
                found = dict(_named(reader.restore(self.path, args=arguments)))
        except Exception as error:
            raise CheckpointError(f"{self.path} could not be read: {error}") from error
        return {name: found[name] for name in wanted}

    def tree(self, top: str) -> dict[str, Any]:
        """All leaves below a top name such as `params`, nested as the model takes them."""
        out: dict[str, Any] = {}
        for name, leaf in self.read(n for n in self.leaves if n.startswith(f"{top}/")).items():
            *parents, last = name.split("/")[1:]
            functools.reduce(lambda node, key: node.setdefault(key, {}), parents, out)[last] = leaf
        return out

    def norms(self) -> dict[str, float]:
        """Frobenius norms of all leaves, read a part at a time."""
        parts = (self.read(names) for names in in_parts(self.leaves))
        return {name: _norm(leaf) for part in parts for name, leaf in part.items()}


def in_parts(leaves: dict[str, Leaf], most: int = 2**28) -> Iterator[list[str]]:
    """The names of leaves in groups of `most` bytes, or of one leaf that is larger."""
    group, size = [], 0
    for name, leaf in leaves.items():
        if group and size + leaf.bytes > most:
            yield group
            group, size = [], 0
        group.append(name)
        size += leaf.bytes
    if group:
        yield group


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _named(tree: Any) -> list[tuple[str, Any]]:
    return [(_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _norm(leaf: np.ndarray) -> float:
    return float(np.linalg.norm(leaf.astype(np.float64).ravel()))
