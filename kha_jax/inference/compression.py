"""Fewer cached heads for a trained model, by MEA's virtual heads (arXiv 2601.19611).

The K key (value) heads of a layer are combinations of K' basis heads, W_k = sum_j B_j C[j, k]: the
best ones by the singular vectors of W as a matrix [K, D H], whose singular values go into the
composition C, as in the paper's appendix F. The projection then makes and caches the basis heads,
and a HeadComposition makes the K heads of them when they are read.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from kha_jax.attention import AttentionConfig
from kha_jax.attention.mixers import HeadComposition
from kha_jax.attention.projections import GroupedQuery, GroupedTied
from kha_jax.config import ConfigError, under
from kha_jax.inference.folding import fold_model
from kha_jax.inference.layers import Variables, restack, unstack
from kha_jax.model import AttentionFrom, ModelConfig


class Basis(NamedTuple):
    """heads [D, K', H] and kernel [K', K], with which heads . kernel is nearest to W; errors [K]:
    |W - heads . kernel| / |W| with 1, 2, ... K heads."""

    heads: np.ndarray
    kernel: np.ndarray
    errors: np.ndarray


def basis(W_DKH: np.ndarray, heads: int) -> Basis:
    """The best `heads` basis heads of W, in float64; they are orthonormal over D and H."""
    D, K, H = W_DKH.shape
    flat = np.asarray(W_DKH, np.float64).transpose(1, 0, 2).reshape(K, D * H)
    U, s, V = np.linalg.svd(flat, full_matrices=False)
    left = np.append(np.cumsum(np.square(s)[::-1])[::-1][1:], 0.0)
    best = V[:heads].reshape(heads, D, H).transpose(1, 0, 2)
    kernel = (U[:, :heads] * s[:heads]).T
    return Basis(best, kernel, np.sqrt(left / np.sum(np.square(s))))


def compressed(attention: AttentionConfig, kv_heads: int) -> AttentionConfig:
    """The attention that caches kv_heads and reads as many as before.

    Raises:
        ConfigError: its projection caches no heads, or cannot have this number.
    """
    projection = attention.projection
    if not isinstance(projection, (GroupedQuery, GroupedTied)):
        name = type(projection).__name__
        raise ConfigError("projection.kind", f"{name} has no key/value heads to make fewer")
    if getattr(projection, "bias", "none") != "none":
        problem = "keys and values with a bias are no combinations of fewer heads of weights"
        raise ConfigError("projection.bias", problem)
    read = projection.kv_heads
    if not 1 <= kv_heads <= read:
        problem = f"must be 1 to {read}, the heads that there are, found {kv_heads}"
        raise ConfigError("projection.kv_heads", problem)
    init = "identity" if read % kv_heads == 0 else "normal"
    mixer = HeadComposition(heads_read=read, init=init)
    slots = dict.fromkeys(_slots(attention), mixer)
    return attention.replace(projection=projection.replace(kv_heads=kv_heads), **slots)


def _slots(attention: AttentionConfig) -> list[str]:
    return [slot for slot in ("key", "value") if slot in attention.projection.stream_weights]


class Compression(NamedTuple):
    """The model, its variables, and by stream and layer the errors of `Basis`."""

    model: ModelConfig
    variables: Variables
    profiles: dict[str, dict[int, np.ndarray]]


def compress(
    model: ModelConfig, variables: Variables, kv_heads: int, first: int = 0
) -> Compression:
    """A trained model whose layers from `first` on cache kv_heads key/value heads; linear mixers
    are folded before. Exact where it caches as many as before.

    Raises:
        ConfigError: a mixer does not fold, or the model has no such form.
    """
    with under("attention"):
        model, variables = fold_model(model, variables)
        fewer = compressed(model.attention, kv_heads)
    if first == 0:
        made = model.with_attention(lambda attention: compressed(attention, kv_heads))
    else:
        if isinstance(model.later, AttentionFrom):
            problem = (
                f"layers differ from number {model.later.layer} on already; leave out --layers"
            )
            raise ConfigError("later.layer", problem)
        later = AttentionFrom(layer=first, attention=fewer)
        made = model.replace(later=later)
    outer, layers = unstack(model, variables)
    profiles: dict[str, dict[int, np.ndarray]] = {}
    for number in range(first, model.layers):
        params = dict(layers[number]["params"])
        params["attention"] = dict(params["attention"])
        projection = dict(params["attention"]["projection"])
        for slot in _slots(made.segments()[-1].attention):
            name = made.attention.projection.stream_weights[slot]
            found = basis(np.asarray(projection[name]), kv_heads)
            dtype = projection[name].dtype
            projection[name] = jnp.asarray(found.heads, dtype)
            params["attention"][f"{slot}_mixer"] = {"kernel": jnp.asarray(found.kernel, dtype)}
            profiles.setdefault(slot, {})[number] = found.errors
        params["attention"]["projection"] = projection
        layers[number] = {**layers[number], "params": params}
    return Compression(made, restack(made, outer, layers), profiles)
