"""Attention of new tokens to cached ones: of one token a row, and of many against a block of keys
at a time.

Legend: B batch, T query position, S key position, N query heads, K key/value heads, G = N/K, H
query and key width, U value width, R = B K rows of a cache, C keys of one block.
"""

from typing import Callable

import jax
import jax.numpy as jnp

from kha_jax.ops.attention import ScoreMaps, softmax
from kha_jax.ops.attention_chunked import MASKED


def one_query(
    parts: list[tuple[jax.Array, jax.Array]],
    v_RSU: jax.Array,
    visible_BS: jax.Array,
    scale: float,
    maps: ScoreMaps = ScoreMaps(),
) -> jax.Array:
    """Attention of one token to cached ones: softmax(scale * sum over the parts of q k^T) v.

    Caches have R = B K rows, one for each key head of each row of the batch: on a CPU both products
    take eight times as long when slots come before heads, and a K = 1 of its own makes XLA copy the
    cache.

    Args:
        parts: pieces (q_B1NH, k_RHS) whose products add up to the logits, as if concatenated over
            H. Each has its own number of key heads, so that a key shared by all heads is read once.
        v_RSU: cached values.
        visible_BS: True where a row may look.
        scale: factor on the logits.
        maps: what heads do to each other's scores.

    Returns:
        o_B1NU in the dtype of the values; the softmax is float32.
    """
    (B, _, N, _), (R, S, U) = parts[0][0].shape, v_RSU.shape

    def logits(q_B1NH, k_RHS):
        q_RGH = q_B1NH.reshape(k_RHS.shape[0], -1, q_B1NH.shape[-1])
        s_RGS = jnp.einsum("RGH,RHS->RGS", q_RGH, k_RHS, preferred_element_type=jnp.float32)
        return s_RGS.reshape(B, N, S)

    s_BNS = sum(logits(*part) for part in parts) * scale
    p_BNS = softmax(s_BNS, visible_BS[:, None], maps).astype(v_RSU.dtype)
    return jnp.einsum("RGS,RSU->RGU", p_BNS.reshape(R, -1, S), v_RSU).reshape(B, 1, N, U)


def _logits(q_BNTH, k_BKCH):
    """q k^T, float32 [B, N, T, C]; the query group becomes rows of its key head."""
    (B, N, T, H), (_, K, C, _) = q_BNTH.shape, k_BKCH.shape
    q_BKRH = q_BNTH.reshape(B, K, -1, H)
    s_BKRC = jnp.einsum("BKRH,BKCH->BKRC", q_BKRH, k_BKCH, preferred_element_type=jnp.float32)
    return s_BKRC.reshape(B, N, T, C)


def _weigh(p_BNTC, v_BKCU):
    """p v, float32 [B, N, T, U]."""
    (B, N, T, C), (_, K, _, U) = p_BNTC.shape, v_BKCU.shape
    p_BKRC = p_BNTC.astype(v_BKCU.dtype).reshape(B, K, -1, C)
    product = jnp.einsum("BKRC,BKCU->BKRU", p_BKRC, v_BKCU, preferred_element_type=jnp.float32)
    return product.reshape(B, N, T, U)


def many_queries(
    q_BTNH: jax.Array,
    read: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    visible: Callable[[jax.Array], jax.Array],
    keys: tuple[int, int, jax.Array],
    scale: float,
    maps: ScoreMaps = ScoreMaps(),
) -> jax.Array:
    """softmax(scale q k^T) v over cached tokens, a block of keys at a time, so that no scores but a
    block's exist at once.

    One pass keeps the sums of exp(s - the largest s so far) and of its products with the values
    (online softmax, arXiv 1805.02867). Where heads exchange probabilities, a first pass makes the
    sums and a second one the products.

    Args:
        read: place of a block's first key -> its keys [B, C, K, H] and values [B, C, K, U].
        visible: places of keys [C] -> [B, T, C], where each query may look.
        keys: (C, all slots of the cache, how many of them hold a key): as many blocks are read.
        maps: what heads do to each other's scores, key by key.

    Returns:
        o_BTNU in the dtype of the queries; scores, sums and products are float32.
    """
    (B, T, N, _), (size, slots, filled) = q_BTNH.shape, keys
    q_BNTH = q_BTNH.swapaxes(1, 2)
    _, v_BCKU = jax.eval_shape(read, jnp.int32(0))
    U = v_BCKU.shape[-1]

    def block(i):
        """Masked logits [B, N, T, C] of one block of keys, and its values [B, K, C, U]."""
        first = jnp.minimum(i * size, slots - size)
        k_BKCH, v_BKCU = (z.swapaxes(1, 2) for z in read(first))
        places_C = first + jnp.arange(size)
        s_BNTC = _logits(q_BNTH, k_BKCH) * scale
        s_BNTC = s_BNTC if maps.logits is None else maps.logits(s_BNTC)
        # the last block reaches back into the one before it
        seen_BTC = visible(places_C) & (places_C >= i * size)
        return jnp.where(seen_BTC[:, None], s_BNTC, MASKED), v_BKCU

    def sums(i, carry):
        top, total, o_BNTU = carry
        s_BNTC, v_BKCU = block(i)
        higher = jnp.maximum(top, jnp.max(s_BNTC, axis=-1, keepdims=True))
        e_BNTC, fade = jnp.exp(s_BNTC - higher), jnp.exp(top - higher)
        total = total * fade + jnp.sum(e_BNTC, axis=-1, keepdims=True)
        if maps.probabilities is None:
            o_BNTU = o_BNTU * fade + _weigh(e_BNTC, v_BKCU)
        return higher, total, o_BNTU

    # first pass: the largest score, the sum of exp, and the products where heads do not mix
    start = jnp.full((B, N, T, 1), MASKED), jnp.zeros((B, N, T, 1)), jnp.zeros((B, N, T, U))
    blocks = -(-filled // size)
    top, total, o_BNTU = jax.lax.fori_loop(0, blocks, sums, start)

    def products(i, o_BNTU):
        s_BNTC, v_BKCU = block(i)
        return o_BNTU + _weigh(maps.probabilities(jnp.exp(s_BNTC - top) / total), v_BKCU)

    # second pass, where heads mix probabilities: those need the sums of all heads
    if maps.probabilities is None:
        o_BNTU /= total
    else:
        o_BNTU = jax.lax.fori_loop(0, blocks, products, o_BNTU)
    return o_BNTU.swapaxes(1, 2).astype(q_BTNH.dtype)
