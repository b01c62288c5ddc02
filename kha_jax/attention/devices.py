"""Scores and outputs of the heads, computed by every device for its part of them.

Every device has its rows of the batch, so that fused kernels need not know of the mesh: for its
heads, or, where heads mix in the scores, for its queries, if they divide over the devices.

Legend: B batch, T query position, S key position, N query heads, K key/value heads, H query and key
width, U value width.
"""

import jax
import jax.numpy as jnp

from kha_jax.ops import attention as ops
from kha_jax.sharding import axis_size, constrain, index_along, per_device, platform

SAMPLE = 64  # queries whose logits are looked at for the largest one


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKU: jax.Array,
    segment_ids_BS: jax.Array | None,
    maps: ops.ScoreMaps,
    scale: float,
    kernel: str,
) -> tuple[jax.Array, jax.Array]:
    """What the heads read [B, T, N, U], and the largest logit.

    maps: of logits and probabilities over heads. kernel: one of `ops.KERNELS`, or `auto`.
    """
    fixed = {"scale": scale, "kernel": kernel, "platform": platform()}
    rows, whole = ("batch", "length"), ("batch", "length", None, None)
    queries = keys = ("batch", "length", "heads", None)
    split = q_BTNH.shape[1] % axis_size("query_length") == 0
    if maps.mix_heads:
        queries, keys = ("batch", "query_length", None, None) if split else whole, whole
    elif k_BSKH.shape[2] < axis_size("heads"):
        # A copy for each device that holds some of a key head's queries.
        copies = axis_size("heads") // k_BSKH.shape[2]
        k_BSKH, v_BSKU = (jnp.repeat(z, copies, axis=2) for z in (k_BSKH, v_BSKU))

    def local(q_BTNH, k_BSKH, v_BSKU, ids_BS, maps):
        parts = maps.mix_heads and split
        start = index_along("query_length") * q_BTNH.shape[1] if parts else 0
        return ops.attention(q_BTNH, k_BSKH, v_BSKU, ids_BS, maps=maps, start=start, **fixed)

    on_each = jax.tree.map(lambda leaf: (None,) * leaf.ndim, maps)
    run = per_device(local, (queries, keys, keys, rows, on_each), queries)
    o_BTNU = run(q_BTNH, k_BSKH, v_BSKU, segment_ids_BS, maps)
    largest = _largest_logit(q_BTNH, k_BSKH, segment_ids_BS, maps, scale, keys)
    return constrain(o_BTNU, "batch", "length", "heads", None), largest


@jax.named_scope("largest_logit")
def _largest_logit(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    segment_ids_BS: jax.Array | None,
    maps: ops.ScoreMaps,
    scale: float,
    keys: tuple[str | None, ...],
) -> jax.Array:
    """The largest logit, over all heads and the keys that they may see, of up to SAMPLE evenly
    spaced queries of the batch's first row, the last one among them: exact for these, and from
    below for all. Scaled, and mixed where heads mix in the scores. No gradient passes.

    keys: logical axes of the keys. Every device takes its own first row and heads, so that two
    numbers a head are all that devices exchange.
    """
    T = q_BTNH.shape[1]
    stride = -(-T // SAMPLE)
    q_BTNH, k_BSKH, maps = jax.lax.stop_gradient((q_BTNH, k_BSKH, maps))

    def local(q_BRNH, k_BSKH, ids_BS, maps):
        ids_1S = None if ids_BS is None else ids_BS[:1]
        places = jnp.arange((T - 1) % stride, T, stride)
        return ops.largest_logit(q_BRNH[:1], k_BSKH[:1], ids_1S, places, scale, maps)

    on_each = jax.tree.map(lambda leaf: (None,) * leaf.ndim, maps)
    axes = ("batch", None, keys[2], None), keys, ("batch", "length"), on_each
    run = per_device(local, axes, ("batch", keys[2]))
    q_BRNH = q_BTNH[:, (T - 1) % stride :: stride]
    return jnp.max(run(q_BRNH, k_BSKH, segment_ids_BS, maps)[0])
