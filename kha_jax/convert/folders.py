"""Folders of Hugging Face's on disk: config.json, safetensors files with their index, and what lies
beside them. Read strictly and without executing anything; written one tensor at a time.

A safetensors file is the length of a header (8 bytes), the header (JSON: of each tensor its dtype,
shape and place) and the tensors. Neither transformers nor torch is needed for it.
"""

import collections
import json
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, NamedTuple

import ml_dtypes
import numpy as np

from kha_jax.errors import DataError
from kha_jax.storage import open_regular, read_json, write_json

CONFIG, ONE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": np.dtype("<f4"), "BF16": np.dtype(ml_dtypes.bfloat16)}
NAMES = {"float32": "F32", "bfloat16": "BF16"}
LARGEST_HEADER = 10**8
BLOCK = 2**23  # bytes that are read or written at once where rows can be taken apart
THREADS = min(4, os.cpu_count() or 1)  # each of them holds a tensor
# What is copied byte for byte, there and back.
BESIDE = (
    "tokenizer.json tokenizer_config.json tokenizer.model special_tokens_map.json "
    "added_tokens.json vocab.json merges.txt chat_template.jinja chat_template.json "
    "generation_config.json"
).split()
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.bin")


class Tensor(NamedTuple):
    """One that a folder holds. begin: its place in the file, in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    path: Path
    begin: int = 0

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def read(self, first: int = 0, last: int | None = None) -> np.ndarray:
        """Entries [first, last) along the first axis, all by default, as they are stored.

        Raises:
            DataError: the file ends before.
        """
        inner, dtype = math.prod(self.shape[1:]), DTYPES[self.dtype]
        shape = self.shape if last is None else (last - first, *self.shape[1:])
        count = math.prod(shape)
        try:
            with open_regular(self.path, "rb", largest=2**63) as file:
                place = self.begin + first * inner * dtype.itemsize
                found = np.fromfile(file, dtype, count, offset=place)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror or error}") from None
        if found.size != count:
            raise DataError(f"{self.path}: ends within {self.name}; it was cut")
        return found.reshape(shape)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """(first row, the one after the last) of at most BLOCK bytes each, or of one row."""
        rows = max(1, BLOCK // max(1, self.bytes // max(1, self.shape[0])))
        for first in range(0, self.shape[0], rows):
            yield first, min(first + rows, self.shape[0])


class Folder(NamedTuple):
    """config: of its config.json. tensors: by name, in the order of the files."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def beside(self) -> list[str]:
        """The files that are kept as they are."""
        return [name for name in BESIDE if (self.path / name).is_file()]

    def unknown(self) -> list[str]:
        """The files that are not."""
        known = {CONFIG, INDEX, *BESIDE, *(tensor.file for tensor in self.tensors.values())}
        return sorted(p.name for p in self.path.iterdir() if p.name not in known)


def open_folder(path: Path) -> Folder:
    """The folder, of whose tensors nothing is read yet.

    Raises:
        DataError: names the file that is missing or wrong, and what would work.
    """
    if not path.is_dir():
        raise DataError(f"{path}: is no folder; name one with config.json and model.safetensors")
    config = _json(path / CONFIG)
    tensors: dict[str, Tensor] = {}
    for file, listed in _files(path).items():
        found = {tensor.name: tensor for tensor in _tensors(path / file)}
        if listed is not None and listed != set(found):
            name = min(listed ^ set(found))
            where = "does not hold it" if name in listed else "holds it too, or it alone"
            raise DataError(f"{path / INDEX}: {name} is not where it says; {file} {where}")
        if twice := set(found) & set(tensors):
            raise DataError(f"{path / file}: holds {min(twice)}, which another file holds too")
        tensors |= found
    return Folder(path, config, tensors)


def _json(path: Path) -> dict[str, Any]:
    try:
        values = read_json(path)
    except FileNotFoundError:
        raise DataError(f"{path.parent}: holds no {path.name}; name a folder as of Hugging Face")
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not readable: {error}") from None
    if not isinstance(values, dict):
        raise DataError(f"{path}: holds a {type(values).__name__}, expected keys with values")
    return values


def _files(path: Path) -> dict[str, set[str] | None]:
    """The files with tensors, and the names that the index has for each."""
    one, index = (path / ONE).exists(), (path / INDEX).exists()
    if one and index:
        raise DataError(f"{path}: holds {ONE} and {INDEX}; remove the one that is not meant")
    if one:
        return {ONE: None}
    if not index:
        pickle = next((name for name in PICKLES if (path / name).exists()), None)
        if pickle:
            raise DataError(
                f"{path / pickle}: is a pickle, which runs code when it is read; save the model as "
                "safetensors"
            )
        raise DataError(f"{path}: holds no {ONE} and no {INDEX}")
    listed = _json(path / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise DataError(f"{path / INDEX}: has no weight_map of names and files")
    files: dict[str, set[str] | None] = {}
    for name, file in listed.items():
        if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", file):
            raise DataError(f"{path / INDEX}: {name} is in {file!r}, no safetensors file beside it")
        files.setdefault(file, set()).add(name)
    if missing := next((file for file in files if not (path / file).is_file()), None):
        raise DataError(f"{path / missing}: is missing; {INDEX} names it")
    return files


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a name stands there twice")
    return dict(pairs)


def _tensors(path: Path) -> list[Tensor]:
    """Those of one file, in their order, checked to fill it without gap or overlap."""
    try:
        with open_regular(path, "rb", largest=2**63) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, LARGEST_HEADER):
                raise ValueError(f"its header would have {length:,} bytes of the file's {size:,}")
            header = json.loads(file.read(length), object_pairs_hook=_unique)
        header.pop("__metadata__", None)
        found = [_tensor(path, name, entry, 8 + length) for name, entry in header.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: is no safetensors file: {error}") from None
    found.sort(key=lambda tensor: (tensor.begin, tensor.bytes))
    at = 8 + length
    for tensor in found:
        if tensor.begin != at:
            raise DataError(f"{path}: {tensor.name} does not begin where the one before it ends")
        at += tensor.bytes
    if at != size:
        raise DataError(f"{path}: holds {size:,} bytes, its header says {at:,}; it was cut")
    return found


def _tensor(path: Path, name: str, entry: dict[str, Any], base: int) -> Tensor:
    shape, dtype = tuple(entry["shape"]), entry["dtype"]
    if dtype not in DTYPES:
        problem = f"{name} is {dtype}; F32 and BF16 are read"
        raise DataError(f"{path}: {problem}; save it as one of them")
    if not all(type(size) is int and 0 < size < 2**40 for size in shape):
        raise ValueError(f"the shape of {name} is {list(shape)}")
    begin, end = entry["data_offsets"]
    tensor = Tensor(name, dtype, shape, path.name, path, base + begin)
    if end - begin != tensor.bytes:
        raise ValueError(f"{name} has {end - begin} bytes, its shape takes {tensor.bytes}")
    return tensor


def in_files(tensors: list[Tensor], shard_bytes: int) -> list[Tensor]:
    """The same with file names of their own, none larger than so many bytes but for a single
    tensor."""
    shards, size = [[]], 0
    for tensor in tensors:
        if shards[-1] and size + tensor.bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.bytes
    if len(shards) == 1:
        return [tensor._replace(file=ONE) for tensor in tensors]
    return [
        tensor._replace(file=f"model-{number:05}-of-{len(shards):05}.safetensors")
        for number, shard in enumerate(shards, 1)
        for tensor in shard
    ]


def write_tensors(
    folder: Path, tensors: list[Tensor], values: Callable[[Tensor], Iterable[Callable]]
) -> None:
    """Writes the files that the tensors name, in their order.

    values: of a tensor, what makes its parts along the first axis, one after another, in its dtype.

    Raises:
        OSError: as the system says.
    """
    by_file: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        by_file.setdefault(tensor.file, []).append(tensor)
    for name, inside in by_file.items():
        with open(folder / name, "xb") as file:
            file.write(_header(inside))
            for part in _made(made for tensor in inside for made in values(tensor)):
                whole = np.ascontiguousarray(part)
                file.write(whole.reshape(-1).view(np.uint8))  # tofile does not say why it fails
            file.flush()
            os.fsync(file.fileno())
    if set(by_file) != {ONE}:
        total = sum(tensor.bytes for tensor in tensors)
        listed = {tensor.name: tensor.file for tensor in tensors}
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(listed.items()))}
        write_json(folder / INDEX, content)


def _made(makers: Iterable[Callable[[], np.ndarray]]) -> Iterator[np.ndarray]:
    """What they make, in their order; others are made while one is used."""
    waiting: collections.deque = collections.deque()
    with ThreadPoolExecutor(THREADS) as pool:
        for maker in makers:
            waiting.append(pool.submit(maker))
            if len(waiting) > THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _header(tensors: list[Tensor]) -> bytes:
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for tensor in tensors:
        places = [at, at + tensor.bytes]
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": places,
        }
        at += tensor.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
