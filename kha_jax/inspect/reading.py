"""From a run folder, or a bare checkpoint, to arrays: only the leaves that are asked for are read.

Paths may be local or remote (gs://, s3://), as Orbax takes them.
"""

import functools
import json
import math
import re
from typing import Any, Iterable, Iterator, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from kha_jax.attention.mixers import STREAM_MIXERS, repetition
from kha_jax.checkpoint import MANIFEST, CheckpointError
from kha_jax.optimizer import TRACE

MIXER = "_mixer"  # every small matrix between heads lives at .../SLOT_mixer/NAME
STREAMS = ("query", "key", "value")
ORDER = (*STREAMS, "kernel", "residual", "up", "gate", "down")  # that places are shown in


class Leaf(NamedTuple):
    """What a checkpoint says of one array before it is read."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class Stack(NamedTuple):
    """One matrix of a model over the layers that have it.

    T: [L, n, m], float32. layers: their numbers, from 0. start: [n, m] that training began with:
    zeros for a gate, heads repeated where their number changes, the identity otherwise (also where
    the config asked for a random start, which no checkpoint tells). axis: what it mixes, `feature`
    or `head`.
    """

    T: np.ndarray
    layers: tuple[int, ...]
    start: np.ndarray
    axis: str

    @property
    def change(self) -> np.ndarray:
        """T - start, [L, n, m]."""
        return self.T - self.start


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


class Difference(NamedTuple):
    """A leaf of two checkpoints. before, after: what each says of it, None where it is missing.
    change: |after - before|, relative to |before|; NaN where they cannot be compared."""

    before: Leaf | None
    after: Leaf | None
    change: float
    relative: float


def differences(before: Checkpoint, after: Checkpoint) -> dict[str, Difference]:
    """Leaf by leaf, what changed from one checkpoint to another; equal leaves have change 0."""
    out = {
        name: Difference(before.leaves.get(name), after.leaves.get(name), math.nan, math.nan)
        for name in {**before.leaves, **after.leaves}
    }
    both = {
        name: found.before
        for name, found in out.items()
        if found.before and found.after and found.before.shape == found.after.shape
    }
    for names in in_parts(both):
        first, second = before.read(names), after.read(names)
        for name in names:
            old, new = (part[name].astype(np.float64) for part in (first, second))
            change, size = _norm(new - old), _norm(old)
            relative = change / size if size else math.inf if change else 0.0
            out[name] = out[name]._replace(change=change, relative=relative)
    return out


def saved_steps(workdir: epath.PathLike) -> list[int]:
    """Steps of a run folder whose checkpoint has a manifest, oldest first."""
    folder = epath.Path(workdir) / "checkpoints"
    names = [p.name for p in folder.iterdir()] if folder.exists() else []
    return sorted(int(n) for n in names if n.isdigit() and (folder / n / MANIFEST).exists())


class Run:
    """What can be looked at in a run folder, or in a bare checkpoint (a step's folder, or the
    `state` in it, without metrics and config).

    step: the newest with a manifest by default. Files are not verified here: a reader of a few
    megabytes must not read the rest.

    Raises:
        CheckpointError: there is no such checkpoint.
    """

    def __init__(self, path: epath.PathLike, step: int | None = None):
        self.folder, self.name = epath.Path(path), epath.Path(path).name
        bare = [self.folder, self.folder / "state"]
        found = next((p for p in bare if (p / "_METADATA").exists()), None)
        self.steps = [] if found else saved_steps(self.folder)
        if found is None and not self.steps:
            raise CheckpointError(f"{self.folder}: holds no checkpoint yet")
        if step is not None and step not in self.steps:
            raise CheckpointError(f"{self.folder}: step {step} is not kept; it has {self.steps}")
        self.step = step if found or step is not None else self.steps[-1]
        self.checkpoint = Checkpoint(
            found or self.folder / "checkpoints" / f"{self.step:08d}" / "state"
        )
        config = self.folder / "config.json"
        self.config: dict[str, Any] | None = (
            json.loads(config.read_text()) if config.exists() else None
        )

    def metrics(self) -> list[dict[str, Any]]:
        """See `read_metrics`."""
        return read_metrics(self.folder)

    def segments(self) -> dict[str, int]:
        """Layers of every scanned segment, in the model's order."""
        sizes = {}
        for name, leaf in self.checkpoint.leaves.items():
            found = re.match(r"params/(.+?)/attention/", name)
            if found:
                sizes[found[1]] = leaf.shape[0]
        return {name: sizes[name] for name in sorted(sizes, key=_natural)}

    def matrices(self) -> dict[str, Stack]:
        """Every mixer matrix by place, such as `value/kernel`; segments of equal shapes are one
        stack, others are told apart as `SEGMENT/value/kernel`. A `residual` D is returned as the T
        that it stands for."""
        offset, found = 0, {}
        # what mixes outputs reads the block's input: it maps no heads or features to themselves
        mixing = re.compile(rf"params/.+/(?!output)[^/]+{MIXER}/[^/]+$")
        names = [name for name in self.checkpoint.leaves if mixing.match(name)]
        arrays = self.checkpoint.read(n for n in names if len(self.checkpoint.leaves[n].shape) == 3)
        for segment, length in self.segments().items():
            layers = tuple(range(offset, offset + length))
            offset += length
            for name, T in arrays.items():
                if name.startswith(f"params/{segment}/attention/"):
                    slot, matrix = name.split("/")[-2:]
                    stack = self._stack(segment, slot.removesuffix(MIXER), matrix, T, layers)
                    found[segment, f"{slot.removesuffix(MIXER)}/{matrix}"] = stack
        return _joined(found)

    def _stack(self, segment, slot, matrix, T, layers):
        T, shape = T.astype(np.float32), T.shape[1:]
        mixer = self._attention(layers[0]).get(slot, {})
        if matrix == "residual":
            T = T + mixer.get("diag_init", 1.0) * np.eye(*shape, dtype=np.float32)
        if mixer.get("kind") in STREAM_MIXERS:
            on_heads = STREAM_MIXERS[mixer["kind"]].over_heads
        else:
            output = self.checkpoint.leaves.get(f"params/{segment}/attention/output")
            heads, width = output.shape[1:3] if output else (0, shape[0])
            on_heads = slot not in STREAMS or width != shape[0] <= heads
        start = np.asarray(repetition(None, shape, np.float32))
        return Stack(
            T, layers, 0 * start if matrix == "gate" else start, "head" if on_heads else "feature"
        )

    def _attention(self, layer: int) -> dict[str, Any]:
        """The fields of a layer's attention; none for a bare checkpoint."""
        model = (self.config or {}).get("model", {})
        later = model.get("later", {})
        changed = "attention" in later and layer >= later["layer"]
        return later["attention"] if changed else model.get("attention", {})

    def transforms(self) -> dict[str, Stack]:
        """The linear map of each mixed stream at small z, [L, H, H] by slot: T of a linear mixer,
        W_up W_down of an MLP (whose gate is 1 there)."""
        stacks, out = self.matrices(), {}
        for place, stack in stacks.items():
            prefix, _, matrix = place.rpartition("/")
            down = stacks.get(f"{prefix}/down")
            if stack.axis == "feature" and matrix in ("kernel", "residual"):
                out[prefix] = stack
            elif matrix == "up" and down is not None:
                out[prefix] = stack._replace(T=stack.T @ down.T)
        return out

    def stream_weights(
        self, slot: str, widest: float = math.inf
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """(W [D, heads, H], scale [D]) of the layers, first to last: what makes a stream out of the
        normalised input, without its mixer. Nothing is read, and the list is empty, where the
        projection goes through a latent or has more than `widest` features in all its heads."""
        alias = {"query": ("query",), "key": ("key",), "value": ("value", "state")}[slot]
        out = []
        for segment in self.segments():
            places = [f"params/{segment}/attention/projection/{name}" for name in alias]
            place = next((p for p in places if p in self.checkpoint.leaves), None)
            norm = f"params/{segment}/attention_norm/scale"
            shape = self.checkpoint.leaves[place].shape if place else ()
            if len(shape) != 4 or math.prod(shape[2:]) > widest:
                return []
            arrays = self.checkpoint.read([place, norm])
            out += list(zip(arrays[place].astype(np.float32), arrays[norm].astype(np.float32)))
        return out


def _shown(place: str) -> list[Any]:
    parts = place.split("/")
    return [ORDER.index(part) if part in ORDER else len(ORDER) for part in parts] + [place]


def _natural(name: str) -> list[Any]:
    return [(part.isdigit(), int(part) if part.isdigit() else part) for part in _parts(name)]


def _parts(name: str) -> list[str]:
    return [part for part in re.split(r"(\d+)", name) if part]


def _joined(found: dict[tuple[str, str], Stack]) -> dict[str, Stack]:
    out: dict[str, Stack] = {}
    for place in sorted({place for _, place in found}, key=_shown):
        stacks = {segment: stack for (segment, p), stack in found.items() if p == place}
        if len({stack.T.shape[1:] for stack in stacks.values()}) > 1:
            out |= {f"{segment}/{place}": stack for segment, stack in stacks.items()}
            continue
        layers = sum((stack.layers for stack in stacks.values()), ())
        first = next(iter(stacks.values()))
        T = np.concatenate([stack.T for stack in stacks.values()])
        out[place] = Stack(T, layers, first.start, first.axis)
    return out


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a last line that is still being written is left out.

    Raises:
        CheckpointError: the folder holds none.
    """
    path = epath.Path(workdir) / "metrics.jsonl"
    if not path.exists():
        raise CheckpointError(f"{workdir} holds no metrics.jsonl; train it first")
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def trace(rows: list[dict[str, Any]]) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """{place: {measure: (steps, values [steps, L])}} of what training logged of its matrices,
    segments one after another; see `optimizer.trace`."""
    logged: dict[tuple[str, str], dict[str, list[tuple[int, list[float]]]]] = {}
    names = {name: None for row in rows for name in row if name.startswith(TRACE)}
    for name in sorted(names, key=_natural):
        *_, slot, matrix, measure = name.split("/")
        found = [(row["step"], row[name]) for row in rows if name in row]
        logged.setdefault((f"{slot}/{matrix}", measure), {})[name] = found
    out: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for (place, measure), segments in sorted(logged.items(), key=lambda entry: _shown(entry[0][0])):
        steps = np.array([step for step, _ in next(iter(segments.values()))])
        values = [np.array([value for _, value in found]) for found in segments.values()]
        out.setdefault(place, {})[measure] = (steps, np.concatenate(values, axis=1))
    return out
