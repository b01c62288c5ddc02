"""Causal attention in query chunks, for platforms without a fused kernel.

Legend: B batch, T query position, S key position, N query heads, K key/value heads, G = N/K, H
query and key width, U value width, P = B*K, C query positions of one chunk, R = C*G rows.
"""

import functools

import jax
import jax.numpy as jnp

from kha_jax.ops.checkpoint_names import ATTENTION, checkpoint_name

MASKED = -1e30  # finite, so that a row without any visible key gives numbers and not NaN


def _fold(z_BTND: jax.Array, kv_heads: int) -> jax.Array:
    """[B, T, K*G, D] -> [B*K, T*G, D]: the query group becomes rows, so that each product is one
    batched matmul."""
    B, T, N, D = z_BTND.shape
    return (
        z_BTND.reshape(B, T, kv_heads, N // kv_heads, D)
        .transpose(0, 2, 1, 3, 4)
        .reshape(B * kv_heads, -1, D)
    )


def _unfold(z_PRD: jax.Array, batch: int, length: int) -> jax.Array:
    """The inverse of _fold."""
    P, R, D = z_PRD.shape
    z_BKTGD = z_PRD.reshape(batch, P // batch, length, R // length, D)
    return z_BKTGD.transpose(0, 2, 1, 3, 4).reshape(batch, length, -1, D)


def _chunk_logits(q_PRH, k_PSH, segment_ids_BT, start, length, scale):
    """Masked logits [P, R, S] of the chunk of queries that starts at `start`, against the keys up
    to its end."""
    P, R, S = *q_PRH.shape[:2], k_PSH.shape[1]
    s_PRS = jnp.einsum("PRH,PSH->PRS", q_PRH, k_PSH, preferred_element_type=jnp.float32) * scale
    mask_BCS = (jnp.arange(start, S)[:, None] >= jnp.arange(S))[None]
    if segment_ids_BT is not None:
        mask_BCS = mask_BCS & (segment_ids_BT[:, start:S, None] == segment_ids_BT[:, None, :S])
    batch = P if segment_ids_BT is None else segment_ids_BT.shape[0]
    s_BKCGS = s_PRS.reshape(batch, P // batch, length, R // length, S)
    return jnp.where(mask_BCS[:, None, :, None], s_BKCGS, MASKED).reshape(P, R, S)


def chunks(length: int) -> list[tuple[int, int]]:
    """(start, stop) of the query chunks: 128 rows, more only where that would unroll beyond 32
    chunks."""
    size = max(128, -(-length // 32))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def chunked(q_BTNH, k_BSKH, v_BSKU, segment_ids_BT, scale):
    """Query chunks that touch only the keys before them, so the upper causal half is never
    computed.

    The backward pass recomputes the probabilities from their log-partition, as flash attention does
    (arXiv 2205.14135): what is kept for it grows with T and not with T^2. The gradient is written
    out because XLA's CPU backend otherwise fuses the exponentials into the matrix products and
    evaluates them many times over.
    """
    return _chunked_forward(q_BTNH, k_BSKH, v_BSKU, segment_ids_BT, scale)[0]


def _chunked_forward(q_BTNH, k_BSKH, v_BSKU, segment_ids_BT, scale):
    B, T, N, _ = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_PRH, k_PSH, v_PSU = (_fold(z, K) for z in (q_BTNH, k_BSKH, v_BSKU))
    G, out, log_z = N // K, [], []
    for start, stop in chunks(T):
        s = _chunk_logits(
            q_PRH[:, start * G : stop * G],
            k_PSH[:, :stop],
            segment_ids_BT,
            start,
            stop - start,
            scale,
        )
        # softmax; e is kept apart from the product below, see `chunked`
        top = s.max(axis=-1, keepdims=True)
        e = jax.lax.optimization_barrier(jnp.exp(s - top))
        z = e.sum(axis=-1, keepdims=True)
        out.append(
            jnp.einsum("PRS,PSU->PRU", e.astype(v_PSU.dtype), v_PSU[:, :stop])
            / z.astype(v_PSU.dtype)
        )
        log_z.append(top + jnp.log(z))
    o_BTNU, log_z = checkpoint_name((_unfold(jnp.concatenate(out, axis=1), B, T), log_z), ATTENTION)
    return o_BTNU, (q_BTNH, k_BSKH, v_BSKU, segment_ids_BT, o_BTNU, log_z)


def _chunked_backward(scale, residuals, d_o_BTNU):
    q_BTNH, k_BSKH, v_BSKU, segment_ids_BT, o_BTNU, log_z = residuals
    B, T, N, _ = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_PRH, k_PSH, v_PSU, d_o_PRU = (_fold(z, K) for z in (q_BTNH, k_BSKH, v_BSKU, d_o_BTNU))
    row_sum_BTN1 = jnp.sum((d_o_BTNU * o_BTNU).astype(jnp.float32), axis=-1, keepdims=True)
    row_sum_PR1 = _fold(row_sum_BTN1, K)
    G, d_q = N // K, []
    d_k_PHS, d_v_PUS = (jnp.zeros(z.transpose(0, 2, 1).shape, jnp.float32) for z in (k_PSH, v_PSU))
    for (start, stop), log_z_PR1 in zip(chunks(T), log_z):
        rows = slice(start * G, stop * G)
        q, d_o, k, v = q_PRH[:, rows], d_o_PRU[:, rows], k_PSH[:, :stop], v_PSU[:, :stop]
        # the probabilities again, from their log-partition
        s = _chunk_logits(q, k, segment_ids_BT, start, stop - start, scale)
        p = jax.lax.optimization_barrier(jnp.exp(s - log_z_PR1))
        # through the softmax: d_s = p (d_p - sum of d_p p), and that sum is the one of d_o o
        d_p = jnp.einsum("PRU,PSU->PRS", d_o, v, preferred_element_type=jnp.float32)
        d_s = jax.lax.optimization_barrier(
            (p * (d_p - row_sum_PR1[:, rows]) * scale).astype(q.dtype)
        )
        d_q.append(jnp.einsum("PRS,PSH->PRH", d_s, k))
        # Transposed products: XLA's CPU matmul runs these up to twice as fast as contracting over
        # rows into [S, H].
        d_k_PHS = d_k_PHS.at[..., :stop].add(
            jnp.einsum("PRH,PRS->PHS", q, d_s, preferred_element_type=jnp.float32)
        )
        d_v = jnp.einsum(
            "PRU,PRS->PUS", d_o, p.astype(d_o.dtype), preferred_element_type=jnp.float32
        )
        d_v_PUS = d_v_PUS.at[..., :stop].add(d_v)
    d_k_BSKH, d_v_BSKU = (
        _unfold(z.transpose(0, 2, 1), B, T).astype(k_BSKH.dtype) for z in (d_k_PHS, d_v_PUS)
    )
    return _unfold(jnp.concatenate(d_q, axis=1), B, T), d_k_BSKH, d_v_BSKU, None


chunked.defvjp(_chunked_forward, _chunked_backward)
