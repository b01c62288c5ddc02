"""A model of ours as a folder of Hugging Face's."""

import functools
import itertools
import json
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator

import jax
import numpy as np

from kha_jax.config import ConfigError
from kha_jax.convert import own_code, writing
from kha_jax.convert.families import FAMILIES, function_of, read_config, why_not
from kha_jax.convert.folders import CONFIG, DTYPES, NAMES, Tensor, in_files, write_tensors
from kha_jax.convert.rows import Link
from kha_jax.convert.stock import HEAD, Record, layout_of, links_of
from kha_jax.errors import DataError
from kha_jax.model import ModelConfig
from kha_jax.runs.arrays import leaves as by_path

TABLE = "params/embedding"


def kind_for(model: ModelConfig, record: Record | None) -> str:
    """The model_type that a model is written as: that of its record where it still fits, else the
    first that fits; `kha_` before it where mixers are left that `own_code` computes.

    Raises:
        ConfigError: none fits; names the field.
    """
    kinds = [own_code.kept(attention) for attention in model.attentions().values()]
    if any(one != kinds[0] for one in kinds):
        raise ConfigError(
            "later.attention", "layers with mixers of several kinds have no such form"
        )
    bare = model.with_attention(own_code.without_kept)
    own = base_of(record.config["model_type"]) if record else None
    order = [own, *(kind for kind in FAMILIES if kind != own)] if own else list(FAMILIES)
    reasons = {kind: why_not(kind, bare) for kind in order}
    fitting = next((kind for kind, reason in reasons.items() if reason is None), None)
    if fitting is None:
        raise ConfigError("", f"no stock weights stand for it: {_nearest(bare, reasons)}")
    if not kinds[0]:
        return fitting
    if FAMILIES[fitting].names.merged:
        problem = f"is not linear, and {fitting} has no projection that modeling_kha.py replaces"
        raise ConfigError(f"attention.{own_code.slots(model.attention)[0]}", problem)
    return own_code.PREFIX + fitting


def base_of(kind: str) -> str:
    """The stock model_type."""
    return kind.removeprefix(own_code.PREFIX)


def _nearest(model: ModelConfig, reasons: dict[str, str | None]) -> str:
    """The reason of the family that has most in common with the model."""
    feed_forward = type(function_of(model).feed_forward)
    alike = [r for kind, r in reasons.items() if FAMILIES[kind].feed_forward is feed_forward]
    return str(next(iter(alike), None) or next(iter(reasons.values())))


def config_for(
    kind: str, model: ModelConfig, record: Record | None, dtype: str, length: int
) -> dict[str, Any]:
    """The config.json: every key of the record, of those that are ours the values that the model
    has now, both dialects."""
    base = base_of(kind)
    family, bare = FAMILIES[base], model.with_attention(own_code.without_kept)
    stands = {
        "architectures": [family.architecture],
        "model_type": base,
        "max_position_embeddings": length,
        "dtype": dtype,
        "torch_dtype": dtype,
        **family.write(function_of(bare)),
    }
    own = own_code.keys(base, model.attention) if kind != base else {}
    if record is None or base_of(record.config["model_type"]) != base:
        return stands | own
    old, kept = record.config, {"architectures", "model_type", "max_position_embeddings"}
    before = read_config(record.path / CONFIG, old).with_attention(own_code.without_kept)
    before = family.write(function_of(before))
    kept |= {name for name in before if stands[name] == before[name]}
    new = {name: value for name, value in stands.items() if name not in kept or name not in old}
    if not new.keys() & writing.ROTARY & old.keys():
        new |= writing.both_dialects(old)
    return {**old, **new, **own}


def tensors_for(
    found: list[Link], record: Record | None, dtype: str | None, shard_bytes: int | None
) -> list[Tensor]:
    """The tensors to write: in the order, the dtype and the files of the record, but for what is
    given."""
    shapes = {link.name: link.whole for link in found}
    known = {t.name: t for t in record.tensors} if record else {}
    if HEAD in known and HEAD not in shapes:  # a tied table that stands there twice
        shapes[HEAD] = next(link.whole for link in found if link.leaf == TABLE)
    usual = NAMES[dtype or "float32"]
    tensors = []
    for name in [*(n for n in known if n in shapes), *(n for n in shapes if n not in known)]:
        stored = known[name].dtype if name in known and dtype is None else usual
        tensors.append(Tensor(name, stored, shapes[name], "", Path()))
    if shard_bytes is None and set(known) == set(shapes):
        return [tensor._replace(file=known[tensor.name].file) for tensor in tensors]
    return in_files(tensors, shard_bytes or 5 * 10**9)


def values_for(
    found: list[Link], variables: dict[str, Any]
) -> Callable[[Tensor], Iterator[Callable[[], np.ndarray]]]:
    """Of a tensor, what makes its parts; see `write_tensors`."""
    leaves, by_name = by_path(variables), {}
    for link in found:
        by_name.setdefault(link.name, []).append(link)
    by_name.setdefault(HEAD, [link for link in found if link.leaf == TABLE])

    def values(tensor: Tensor) -> Iterator[Callable[[], np.ndarray]]:
        first, dtype = by_name[tensor.name][0], DTYPES[tensor.dtype]
        if not first.row.inputs and first.row.part is None and not first.at:
            for begin, end in tensor.blocks():
                yield functools.partial(_rows, leaves[first.leaf], slice(begin, end), dtype)
            return
        by_expert = sorted(by_name[tensor.name], key=lambda link: link.index or 0)
        for _, group in itertools.groupby(by_expert, lambda link: link.index):
            yield functools.partial(_joined, list(group), leaves, dtype)

    return values


def _rows(leaf: jax.Array, rows: slice, dtype: np.dtype) -> np.ndarray:
    return _on_host(leaf, rows).astype(dtype, copy=False)


def _joined(group: list[Link], leaves: dict[str, jax.Array], dtype: np.dtype) -> np.ndarray:
    """The tensor that these leaves make, or one expert of it."""
    rows = [link.row.to_theirs(_on_host(leaves[link.leaf], link.at), dtype) for link in group]
    if group[0].row.part is None:
        return rows[0]
    whole = group[0].whole if group[0].index is None else group[0].whole[1:]
    out = np.empty(whole, dtype)
    for link, own in zip(group, rows):
        link.row.part.put(out, own)
    return out


def _on_host(leaf: jax.Array, at: Any) -> np.ndarray:
    """These entries; of an array in the memory of this machine without a copy."""
    there = isinstance(leaf, jax.Array) and [d.platform for d in leaf.devices()] == ["cpu"]
    return np.asarray(leaf)[at] if there else np.asarray(leaf[at])


def write(
    path: Path | str,
    model: ModelConfig,
    variables: dict[str, Any],
    record: Record | None = None,
    *,
    dtype: str | None = None,
    shard_bytes: int | None = None,
    fused: bool | None = None,
    length: int = 2048,
) -> str:
    """Writes a model without linear mixers as a stock folder, config.json and weights, and our file
    for mixers that are not linear; the model_type that it has there.

    Args:
        path: a folder that is there and empty.
        record: of the folder that the model was imported from, whose dtypes, files and keys stay.
        dtype: of all tensors instead, float32 or bfloat16.
        shard_bytes: largest size of a file.
        fused: whether experts are one tensor a layer, by default as the record has them.
        length: longest text that the model is meant for, where no record says it.

    Raises:
        ConfigError: no stock weights stand for the model.
        DataError: it has biases of routers that the family has no place for.
        OSError: as the system says.
    """
    path, kind = Path(path), kind_for(model, record)
    base = base_of(kind)
    names = {tensor.name for tensor in record.tensors} if record else set()
    layout = layout_of(names, record.config if record else {})
    layout = layout if fused is None else layout._replace(fused=fused)
    found = links_of(base, model, layout)
    _check_all_written(kind, variables, found)
    tensors = tensors_for(found, record, dtype, shard_bytes)
    write_tensors(path, tensors, values_for(found, variables))
    most = max(tensors, key=lambda tensor: tensor.bytes).dtype
    said = next(name for name, short in NAMES.items() if short == most)
    config = config_for(kind, model, record, said, length)
    (path / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    if kind != base:
        own_code.write(path, FAMILIES[base].architecture, base)
    return kind


def _check_all_written(kind: str, variables: dict[str, Any], found: Iterable[Link]) -> None:
    """Raises DataError where a leaf would be lost; a router's bias of zeros is none."""
    written = {link.leaf for link in found}
    for path, leaf in by_path(variables).items():
        if path not in written and (not path.startswith("balance/") or bool((leaf != 0).any())):
            raise DataError(f"{path}: {kind} has no place for it, so it would be lost")
