"""From a run folder, or a bare checkpoint, to arrays: only the leaves that are asked for are read.

Paths may be local or remote (gs://, s3://), as Orbax takes them.
"""

import functools
import math
import re
from typing import Any, Iterator, NamedTuple

import numpy as np
from etils import epath

from kha_jax.analysis.leaves import Checkpoint
from kha_jax.attention import AttentionConfig
from kha_jax.attention.mixers import (
    HeadComposition,
    KnockingGate,
    KnockingLinear,
    KnockingMLP,
    UnsharedLinear,
    repetition,
)
from kha_jax.attention.scores import TalkingHeads
from kha_jax.errors import CheckpointError, RunError
from kha_jax.metrics import plain_row, read_lines
from kha_jax.model import ModelConfig
from kha_jax.runs.manifest import MANIFEST, check_whose, folder_name, read_manifest
from kha_jax.storage import address, is_file
from kha_jax.training.run_config import RunConfig
from kha_jax.training.run_folder import CONFIG, read_config, read_lineage
from kha_jax.training.trace import TRACE

MIXER = "_mixer"  # every small matrix between heads lives at .../SLOT_mixer/NAME
STREAMS = ("query", "key", "value")
ORDER = (*STREAMS, "kernel", "residual", "up", "gate", "down")  # that places are shown in

# names of a mixer's parameters -> the mixer, for checkpoints without a config
BARE = {
    ("kernel",): KnockingLinear(),
    ("residual",): KnockingLinear(parameterization="residual"),
    ("gate",): KnockingGate(),
    ("down", "gate", "up"): KnockingMLP(),
}
Values = dict[str, np.ndarray]


class Stack(NamedTuple):
    """One matrix of a model over the layers that have it.

    T: [L, n, m], float32. layers: their numbers, from 0. start: [L, n, m] that training began with,
    by the run's config and seed; for a bare checkpoint zeros for a gate, heads repeated where their
    number changes, and the identity otherwise. axis: what it mixes, `feature` or `head`. rotary:
    the features that are rotated after it, from and to; none for a bare checkpoint.
    """

    T: np.ndarray
    layers: tuple[int, ...]
    start: np.ndarray
    axis: str
    rotary: tuple[int, int] = (0, 0)

    @property
    def change(self) -> np.ndarray:
        """T - start, [L, n, m]."""
        return self.T - self.start


def saved_steps(workdir: epath.PathLike) -> list[int]:
    """Steps of a run folder whose checkpoint has a manifest, oldest first."""
    folder = epath.Path(workdir) / "checkpoints"
    names = [p.name for p in folder.iterdir()] if folder.exists() else []
    return sorted(int(n) for n in names if n.isdigit() and (folder / n / MANIFEST).exists())


def bare_checkpoint(path: epath.PathLike) -> epath.Path | None:
    """Where the arrays of a bare checkpoint lie, in its folder or the `state` in it; None of any
    other folder."""
    places = [address(p) for p in (epath.Path(path), epath.Path(path) / "state")]
    return next((p for p in places if (p / "_METADATA").exists()), None)


class Run:
    """What can be looked at in a run folder, or in a bare checkpoint (a step's folder, or the
    `state` in it, without metrics and config).

    step: the newest with a manifest by default. Files are not verified here: a reader of a few
    megabytes must not read the rest.

    Raises:
        CheckpointError: there is no checkpoint, or it is of another run.
        RunError: the step is not kept; see also `read_config`.
        DataError: see `read_config`.
    """

    def __init__(self, path: epath.PathLike, step: int | None = None):
        self.folder, self.name = epath.Path(path), epath.Path(path).name
        found = bare_checkpoint(path)
        self.steps = [] if found else saved_steps(self.folder)
        if found is None and not self.steps:
            raise CheckpointError(f"{self.folder}: holds no checkpoint yet")
        if found and step is not None:
            raise RunError(f"{self.folder}: is a bare checkpoint of one step; leave out --step")
        if step is not None and step not in self.steps:
            raise RunError(f"{self.folder}: step {step} is not kept; it has {self.steps}")
        self.step = step if found or step is not None else self.steps[-1]
        self.checkpoint = Checkpoint(
            found or address(self.folder / "checkpoints" / folder_name(self.step)) / "state"
        )
        self.config: RunConfig | None = None
        if is_file(self.folder / CONFIG):
            self.config = read_config(self.folder)
            if found is None:
                saved = self.folder / "checkpoints" / folder_name(self.step)
                check_whose(saved, read_manifest(saved), read_lineage(self.folder, self.config))

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
        """Every matrix that mixers' parameters stand for by place, such as `value/kernel`, or
        `value/kernel/0` where each head has its own; segments of equal shapes are one stack, others
        are named apart as `SEGMENT/value/kernel`."""
        found = {}
        for segment, slot, mixer, layers, own, start in self._mixers():
            starts = mixer.effective(start)
            for name, T in mixer.effective(own).items():
                if T.ndim < 3:
                    continue
                heads = {f"/{head}": (slice(None), head) for head in range(T.shape[1])}
                for head, at in ({"": ()} if T.ndim == 3 else heads).items():
                    stack = Stack(T[at], layers, starts[name][at], mixer.axis)
                    if mixer.axis == "feature":
                        stack = stack._replace(rotary=self._rotary(layers[0], slot))
                    found[segment, f"{slot}/{name}{head}"] = stack
        return _joined(found)

    def transforms(self) -> dict[str, Stack]:
        """The linear map of each mixed stream at small z, [L, H, H] by slot, where all heads share
        one: see `StreamMixer.linear_map`."""
        found = {}
        for segment, slot, mixer, layers, own, start in self._mixers():
            T = mixer.linear_map(own) if slot in STREAMS else None
            if T is not None:
                found[segment, slot] = Stack(T, layers, mixer.linear_map(start), "feature")
        return _joined(found)

    def _mixers(self) -> Iterator[tuple[str, str, Any, tuple[int, ...], Values, Values]]:
        """(segment, slot, mixer, its layers, its parameters, those that training began with) of
        all mixers with matrices."""
        inside = re.compile(rf"params/(.+)/attention/([^/]+){MIXER}/([^/]+)$")
        found: dict[tuple[str, str], dict[str, str]] = {}
        for place in self.checkpoint.leaves:
            if match := inside.match(place):
                segment, slot, name = match.groups()
                found.setdefault((segment, slot), {})[name] = place
        # what mixes outputs reads the block's input: it maps no heads or features to themselves
        found = {key: own for key, own in found.items() if key[1] != "output"}
        arrays = self.checkpoint.read(place for own in found.values() for place in own.values())
        born, offset = self._born() if found else {}, 0
        for segment, length in self.segments().items():
            layers = tuple(range(offset, offset + length))
            offset += length
            for slot in [slot for at, slot in found if at == segment]:
                own = {
                    name: arrays[place].astype(np.float32)
                    for name, place in found[segment, slot].items()
                }
                if self.config is None:
                    mixer, start = self._guessed(segment, slot, own)
                else:
                    mixer = getattr(self._attention(layers[0]), slot)
                    start = born[segment]["attention"][f"{slot}{MIXER}"]
                    start = {name: np.asarray(leaf, np.float32) for name, leaf in start.items()}
                yield segment, slot, mixer, layers, own, start

    def _guessed(self, segment: str, slot: str, own: Values) -> tuple[Any, Values]:
        """The mixer that has these parameters, and its start as most configs have it: a bare
        checkpoint tells neither."""
        (first, *_), names = own.values(), tuple(sorted(own))
        output = self.checkpoint.leaves.get(f"params/{segment}/attention/output")
        heads, width = output.shape[1:3] if output else (0, first.shape[-1])
        mixer: Any = BARE.get(names, KnockingLinear())
        if slot not in STREAMS:
            mixer = TalkingHeads()
        elif first.ndim == 4:
            mixer = UnsharedLinear()
        elif width != first.shape[1] <= heads:
            mixer = HeadComposition()

        def started(name, T):
            zero = name in ("gate", "residual")
            start = 0 if zero else repetition(None, T.shape[-2:], np.float32)
            return np.broadcast_to(np.asarray(start, np.float32), T.shape)

        return mixer, {name: started(name, T) for name, T in own.items()}

    def _born(self) -> dict[str, Any]:
        """The parameters of mixers that training began with, see `training.step`."""
        if self.config is None:
            return {}
        config = self.run_config()
        return _initial(config.model, config.seed)

    def run_config(self) -> RunConfig:
        """The run's config.

        Raises:
            CheckpointError: a bare checkpoint has none.
        """
        if self.config is None:
            raise CheckpointError(f"{self.folder}: a bare checkpoint has no config.json")
        return self.config

    def _attention(self, layer: int) -> AttentionConfig:
        """The attention of a layer, by the run's config."""
        model = self.run_config().model
        later = model.later
        return later.attention if layer >= getattr(later, "layer", math.inf) else model.attention

    def _rotary(self, layer: int, slot: str) -> tuple[int, int]:
        if self.config is None:
            return 0, 0
        return self._attention(layer).projection.rotary().get(slot, (0, 0))

    def stream_weights(
        self, slot: str, widest: float = math.inf
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """(W [D, heads, H], scale [D]) of the layers, first to last: what makes a stream out of the
        normalised input, without its mixer; a bias is one more row, of scale 1. Nothing is read,
        and the list is empty, where the projection goes through a latent or has more than `widest`
        features in all its heads."""
        alias = {"query": ("query",), "key": ("key",), "value": ("value", "state")}[slot]
        out = []
        for segment in self.segments():
            places = [f"params/{segment}/attention/projection/{name}" for name in alias]
            place = next((p for p in places if p in self.checkpoint.leaves), None)
            norm = f"params/{segment}/attention_norm/scale"
            shape = self.checkpoint.leaves[place].shape if place else ()
            if len(shape) != 4 or math.prod(shape[2:]) > widest:
                return []
            bias = {f"{place}_bias"} & self.checkpoint.leaves.keys()
            arrays = self.checkpoint.read([place, norm, *bias])
            arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
            weights, scales = arrays[place], arrays[norm]
            for name in bias:
                weights = np.append(weights, arrays[name][:, None], axis=1)
                scales = np.append(scales, np.ones((len(scales), 1), np.float32), axis=1)
            out += list(zip(weights, scales))
        return out


@functools.lru_cache(maxsize=1)
def _initial(model: ModelConfig, seed: int) -> Any:
    from kha_jax.training.step import initial_mixers  # optax, where matrices are read

    return initial_mixers(model, seed)


def _shown(place: str) -> list[Any]:
    parts = place.split("/")
    known = [ORDER.index(part) if part in ORDER else len(ORDER) for part in parts]
    return [known, _natural(place)]


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
        start = np.concatenate([stack.start for stack in stacks.values()])
        out[place] = first._replace(T=T, layers=layers, start=start)
    return out


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics.jsonl, without what was not finite.

    Raises:
        CheckpointError: the folder holds none with a loss.
    """
    path = epath.Path(workdir) / "metrics.jsonl"
    try:
        lines = [plain_row(row) for row in read_lines(path)]
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; train it first") from None
    rows = [{name: value for name, value in row.items() if _drawable(value)} for row in lines]
    if not any("loss" in row for row in rows):
        raise CheckpointError(f"{path} holds no loss; train it first")
    return rows


def _drawable(value: Any) -> bool:
    """Whether a value, or every one of a list, is a finite number."""
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(one, (int, float)) for one in values)


def trace(rows: list[dict[str, Any]]) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """{place: {measure: (steps, values [steps, L])}} of what training logged of its matrices,
    segments one after another; see `training.trace`."""
    logged: dict[tuple[str, str], dict[str, list[tuple[int, list[float]]]]] = {}
    names = {name: None for row in rows for name in row if name.startswith(TRACE)}
    for name in sorted(names, key=_natural):
        *_, slot, matrix, measure = name.split("/")
        found = [(row["step"], row[name]) for row in rows if name in row]
        logged.setdefault((f"{slot}/{matrix}", measure), {})[name] = found
    out: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for (place, measure), segments in sorted(logged.items(), key=lambda entry: _shown(entry[0][0])):
        by_step = [dict(found) for found in segments.values()]
        # one segment may be without a step: what is not finite is no line
        if steps := sorted(set.intersection(*map(set, by_step))):
            values = [np.array([own[step] for step in steps]) for own in by_step]
            out.setdefault(place, {})[measure] = np.array(steps), np.concatenate(values, axis=1)
    return out
