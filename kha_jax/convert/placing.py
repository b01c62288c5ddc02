"""Arrays that grow on their devices, piece by piece: no host holds a whole one."""

import functools
from typing import Any, Iterable, Iterator, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Piece = tuple[tuple[int, ...], np.ndarray]  # where it begins, along each axis; the entries there


class Leaf(NamedTuple):
    """One array of a model. path: with the collection, such as params/layers/attention/output.
    pieces: makes its entries anew at every call, in float32."""

    path: str
    shape: tuple[int, ...]
    pieces: Any

    def array(self) -> np.ndarray:
        """All of it, on the host."""
        out = np.empty(self.shape, np.float32)
        for begin, piece in self.pieces():
            out[tuple(slice(b, b + n) for b, n in zip(begin, piece.shape))] = piece
        return out

    def on(self, like: jax.ShapeDtypeStruct) -> jax.Array:
        """It in this dtype, on the devices of this sharding."""
        return grown(like, self.pieces())


def grown(like: jax.ShapeDtypeStruct, pieces: Iterator[Piece]) -> jax.Array:
    """An array laid out as `like`, from pieces that cover it."""
    shape, own = like.shape, {}
    places = like.sharding.addressable_devices_indices_map(shape)
    places = {
        device: [one.indices(size)[:2] for one, size in zip(index, shape)]
        for device, index in places.items()
    }
    for device, ranges in places.items():
        size = tuple(end - begin for begin, end in ranges)
        own[device] = jnp.zeros(size, like.dtype, device=device)
    for begin, piece in pieces:
        for device, ranges in places.items():
            lows = [max(b, low) for b, (low, _) in zip(begin, ranges)]
            highs = [min(b + n, high) for b, n, (_, high) in zip(begin, piece.shape, ranges)]
            if all(low < high for low, high in zip(lows, highs)):
                inside = tuple(slice(lo - b, hi - b) for b, lo, hi in zip(begin, lows, highs))
                at = tuple(np.int32(lo - low) for lo, (low, _) in zip(lows, ranges))
                new = jax.device_put(piece[inside].astype(like.dtype, copy=False), device)
                own[device] = _written(own[device], new, at)
    return jax.make_array_from_single_device_arrays(shape, like.sharding, list(own.values()))


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
