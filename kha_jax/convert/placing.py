"""Arrays on devices, made piece by piece: no host holds a whole one beside it."""

import functools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Iterable, Iterator, NamedTuple

import jax
import numpy as np

from kha_jax.convert.folders import THREADS

ALIGNED = 64  # bytes, of what XLA takes as it is


class Piece(NamedTuple):
    """A part of an array. begin: along each axis. write: writes its entries into an array of this
    shape."""

    begin: tuple[int, ...]
    shape: tuple[int, ...]
    write: Callable[[np.ndarray], None]

    def entries(self, dtype: Any = np.float32) -> np.ndarray:
        """They, in an array of their own."""
        self.write(out := np.empty(self.shape, dtype))
        return out


class Leaf(NamedTuple):
    """One array of a model. path: with the collection, such as params/layers/attention/output.
    pieces: makes its entries anew at every call."""

    path: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[Piece]]

    def array(self) -> np.ndarray:
        """All of it, on the host, in float32."""
        out = np.empty(self.shape, np.float32)
        for piece in self.pieces():
            inside = (slice(b, b + n) for b, n in zip(piece.begin, piece.shape))
            out[tuple(inside)] = piece.entries()
        return out

    def on(self, like: jax.ShapeDtypeStruct) -> jax.Array:
        """It in this dtype, on the devices of this sharding."""
        return grown(like, self.pieces())


def grown(like: jax.ShapeDtypeStruct, pieces: Iterable[Piece]) -> jax.Array:
    """An array laid out as `like`, from pieces that cover it."""
    indices = like.sharding.addressable_devices_indices_map(like.shape)
    shards = []
    for device, index in indices.items():
        kind = HostShard if device.platform == "cpu" else DeviceShard
        ranges = [one.indices(size)[:2] for one, size in zip(index, like.shape)]
        shards.append(kind(device, ranges, like.dtype))

    def place(piece: Piece) -> None:
        covers = [cover for shard in shards if (cover := shard.cover(piece))]
        if len(covers) == 1 and covers[0].direct is not None:
            piece.write(covers[0].direct)
            return
        entries = piece.entries(like.dtype)
        for cover in covers:
            cover.shard.put(cover.at, entries[cover.inside])

    threads = THREADS if all(shard.threads for shard in shards) else 1
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(place, pieces):
            pass
    arrays = [shard.array() for shard in shards]
    return jax.make_array_from_single_device_arrays(like.shape, like.sharding, arrays)


class Cover(NamedTuple):
    """What a shard and a piece have in common. inside: of the piece. at: where that begins in the
    shard. direct: a place where the piece, all of it, can be written."""

    shard: Any
    inside: tuple[slice, ...]
    at: tuple[int, ...]
    direct: np.ndarray | None


class HostShard:
    """The part of an array that belongs to a device whose memory is the host's: it is made in place
    and handed over without a copy. threads: whether several of them may write to it at once."""

    threads = True

    def __init__(self, device: jax.Device, ranges: list[tuple[int, int]], dtype: Any):
        self.device, self.ranges = device, ranges
        self.shape = tuple(end - begin for begin, end in ranges)
        self.own = self.allocated(np.dtype(dtype))

    def allocated(self, dtype: np.dtype) -> Any:
        """Room for it, so aligned that it is not copied."""
        size = math.prod(self.shape) * dtype.itemsize
        room = np.empty(size + ALIGNED, np.uint8)
        first = -room.ctypes.data % ALIGNED
        return room[first : first + size].view(dtype).reshape(self.shape)

    def cover(self, piece: Piece) -> Cover | None:
        """What it has in common with a piece, or None."""
        lows = [max(b, low) for b, (low, _) in zip(piece.begin, self.ranges)]
        ends = zip(piece.begin, piece.shape, self.ranges)
        highs = [min(b + n, high) for b, n, (_, high) in ends]
        if not all(low < high for low, high in zip(lows, highs)):
            return None
        spans = list(zip(piece.begin, lows, highs))
        inside = tuple(slice(low - b, high - b) for b, low, high in spans)
        at = tuple(low - begin for low, (begin, _) in zip(lows, self.ranges))
        whole = all(high - low == n for (_, low, high), n in zip(spans, piece.shape))
        return Cover(self, inside, at, self.place(at, piece.shape) if whole else None)

    def place(self, at: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray | None:
        """The entries there, where they are one after another in memory."""
        view = self.own[tuple(slice(b, b + n) for b, n in zip(at, shape))]
        return view if view.flags.c_contiguous else None

    def put(self, at: tuple[int, ...], entries: np.ndarray) -> None:
        """Writes entries."""
        self.own[tuple(slice(b, b + n) for b, n in zip(at, entries.shape))] = entries

    def array(self) -> jax.Array:
        """It, on its device; nothing may be written to it any more."""
        return jax.device_put(self.own, self.device)


class DeviceShard(HostShard):
    """That of a device with memory of its own: it grows there."""

    threads = False

    def allocated(self, dtype: np.dtype) -> Any:
        return jax.numpy.zeros(self.shape, dtype, device=self.device)

    def place(self, at: tuple[int, ...], shape: tuple[int, ...]) -> None:
        return None

    def put(self, at: tuple[int, ...], entries: np.ndarray) -> None:
        new = jax.device_put(entries, self.device)
        self.own = _written(self.own, new, tuple(map(np.int32, at)))

    def array(self) -> jax.Array:
        return self.own


@functools.partial(jax.jit, donate_argnums=0)
def _written(array: jax.Array, piece: jax.Array, at: tuple) -> jax.Array:
    return jax.lax.dynamic_update_slice(array, piece, at)


def nested(leaves: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Variables of leaves with their paths."""
    out: dict[str, Any] = {"params": {}, "balance": {}}
    for path, leaf in leaves:
        *groups, name = path.split("/")
        node = out
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = leaf
    return out
