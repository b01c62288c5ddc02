"""Causal scaled dot-product attention behind one function, with a kernel for every platform.

Legend: B batch, T query position, S key position, N query heads, K key/value heads, G = N/K, H
query and key width, U value width. Within the chunked kernel: P = B*K, C query positions of one
chunk, R = C*G rows.
"""

import functools
import math

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that a row without any visible key gives numbers and not NaN


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKU: jax.Array,
    segment_ids_BT: jax.Array | None = None,
    *,
    scale: float | None = None,
    kernel: str = "auto",
    platform: str | None = None,
) -> jax.Array:
    """softmax(scale * q k^T + causal mask) v, query head n reading key/value head n // G.

    Args:
        q_BTNH: queries.
        k_BSKH: keys, S = T; N must be a multiple of K.
        v_BSKU: values; U may differ from H.
        segment_ids_BT: document number of every token; attention never crosses documents. None: one
            document.
        scale: factor on the logits, 1/sqrt(H) by default.
        kernel: a key of KERNELS, or `auto` for the platform's best.
        platform: where this will run; jax's default backend by default.

    Returns:
        o_BTNU in the dtype of the queries; the softmax is float32 in every kernel.

    Raises:
        ValueError: the kernel does not run on this platform or with these shapes.
    """
    scale = 1.0 / math.sqrt(q_BTNH.shape[-1]) if scale is None else scale
    platform = jax.default_backend() if platform is None else platform
    if kernel == "auto":
        kernel = best_kernel(
            platform, q_BTNH.dtype, q_BTNH.shape[1], q_BTNH.shape[-1], v_BSKU.shape[-1]
        )
    with jax.named_scope(f"attention_{kernel}"):
        run = (
            functools.partial(_splash, interpret=platform != "tpu")
            if kernel == "splash"
            else KERNELS[kernel]
        )
        return run(q_BTNH, k_BSKH, v_BSKU, segment_ids_BT, scale)


def cached_attention(
    parts: list[tuple[jax.Array, jax.Array]],
    v_RSU: jax.Array,
    visible_BS: jax.Array,
    scale: float | None = None,
) -> jax.Array:
    """Attention of one token to cached ones: softmax(scale * sum over the parts of q k^T) v.

    Caches have R = B K rows, one for each key head of each row of the batch: on a CPU both products
    take eight times as long when slots come before heads, and a K = 1 of its own makes XLA copy the
    cache.

    Args:
        parts: pieces (q_B1NH, k_RSH) whose products add up to the logits, as if concatenated over
            H. Each has its own number of key heads, so that a key shared by all heads is read once.
        v_RSU: cached values.
        visible_BS: True where a row may look.
        scale: factor on the logits; 1/sqrt(sum of the parts' widths) by default.

    Returns:
        o_B1NU in the dtype of the values; the softmax is float32.
    """
    (B, _, N, _), (R, S, U) = parts[0][0].shape, v_RSU.shape
    scale = 1 / math.sqrt(sum(q.shape[-1] for q, _ in parts)) if scale is None else scale

    def logits(q_B1NH, k_RSH):
        q_RGH = q_B1NH.reshape(k_RSH.shape[0], -1, q_B1NH.shape[-1])
        return jnp.einsum("RGH,RSH->RGS", q_RGH, k_RSH, preferred_element_type=jnp.float32).reshape(
            B, N, S
        )

    s_BNS = sum(logits(*part) for part in parts) * scale
    p_BNS = jax.nn.softmax(jnp.where(visible_BS[:, None], s_BNS, MASKED), axis=-1).astype(
        v_RSU.dtype
    )
    return jnp.einsum("RGS,RSU->RGU", p_BNS.reshape(R, -1, S), v_RSU).reshape(B, 1, N, U)


def best_kernel(
    platform: str, dtype: jnp.dtype, length: int, key_width: int, value_width: int
) -> str:
    """The kernel that `auto` stands for: the fused one where platform, dtype, length and head
    widths allow it."""
    if platform == "tpu" and key_width % 64 == 0 and value_width % 64 == 0 and length % 128 == 0:
        return "splash"
    if (
        platform == "gpu"
        and dtype in (jnp.bfloat16, jnp.float16)
        and key_width == value_width <= 128
    ):
        return "cudnn"
    return "chunked"


def unavailable(kernel: str, platform: str, length: int) -> str | None:
    """Why a kernel cannot train rows of this length on this platform, or None; `auto` always
    can."""
    needed = {"cudnn": "gpu", "splash": "tpu"}.get(kernel, platform)
    if platform != needed:
        return f"{kernel!r} runs on a {needed}, found {platform}; use 'auto'"
    if kernel == "splash" and length % 128:
        return f"'splash' needs rows divisible by 128, found seq_len={length}; use 'auto'"
    return None


def causal_mask(segment_ids_BT: jax.Array | None, length: int) -> jax.Array:
    """[B or 1, T, S]: True where a query may look."""
    causal = jnp.tril(jnp.ones((1, length, length), bool))
    if segment_ids_BT is None:
        return causal
    return causal & (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])


def _reference(q_BTNH, k_BSKH, v_BSKU, segment_ids_BT, scale):
    """The formula as written: every logit exists at once, in float32."""
    groups = q_BTNH.shape[2] // k_BSKH.shape[2]
    k_BSNH, v_BSNU = (jnp.repeat(z, groups, axis=2) for z in (k_BSKH, v_BSKU))
    s_BNTS = (
        jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH, preferred_element_type=jnp.float32) * scale
    )
    mask = causal_mask(segment_ids_BT, q_BTNH.shape[1])[:, None]
    p_BNTS = jax.nn.softmax(jnp.where(mask, s_BNTS, MASKED), axis=-1).astype(v_BSKU.dtype)
    return jnp.einsum("BNTS,BSNU->BTNU", p_BNTS, v_BSNU)


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


def _chunks(length: int) -> list[tuple[int, int]]:
    """(start, stop) of the query chunks: 128 rows, more only where that would unroll beyond 32
    chunks."""
    size = max(128, -(-length // 32))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _chunked(q_BTNH, k_BSKH, v_BSKU, segment_ids_BT, scale):
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
    for start, stop in _chunks(T):
        s = _chunk_logits(
            q_PRH[:, start * G : stop * G],
            k_PSH[:, :stop],
            segment_ids_BT,
            start,
            stop - start,
            scale,
        )
        top = s.max(axis=-1, keepdims=True)
        e = jax.lax.optimization_barrier(jnp.exp(s - top))
        z = e.sum(axis=-1, keepdims=True)
        out.append(
            jnp.einsum("PRS,PSU->PRU", e.astype(v_PSU.dtype), v_PSU[:, :stop])
            / z.astype(v_PSU.dtype)
        )
        log_z.append(top + jnp.log(z))
    o_BTNU = _unfold(jnp.concatenate(out, axis=1), B, T)
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
    for (start, stop), log_z_PR1 in zip(_chunks(T), log_z):
        rows = slice(start * G, stop * G)
        q, d_o, k, v = q_PRH[:, rows], d_o_PRU[:, rows], k_PSH[:, :stop], v_PSU[:, :stop]
        s = _chunk_logits(q, k, segment_ids_BT, start, stop - start, scale)
        p = jax.lax.optimization_barrier(jnp.exp(s - log_z_PR1))
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


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _jax_nn(implementation):
    def kernel(q_BTNH, k_BSKH, v_BSKU, segment_ids_BT, scale):
        if v_BSKU.shape[-1] != q_BTNH.shape[-1]:
            raise ValueError(
                f"attention kernel {implementation!r} needs values as wide as keys, found "
                f"{v_BSKU.shape[-1]} and "
                f"{q_BTNH.shape[-1]}; use kernel 'chunked'"
            )
        mask = (
            None
            if segment_ids_BT is None
            else causal_mask(segment_ids_BT, q_BTNH.shape[1])[:, None]
        )
        return jax.nn.dot_product_attention(
            q_BTNH,
            k_BSKH,
            v_BSKU,
            mask=mask,
            scale=scale,
            is_causal=True,
            implementation=implementation,
        )

    return kernel


# Head width up to which: (queries, keys and values, keys of one product) of a block. Keys and
# values are read from HBM once for every block of queries, so that at 1024 even a v6e computes
# longer on a block than it loads; at 2048 blocks leave no room in a v5p's VMEM.
SPLASH_BLOCKS = {192: (1024, 1024, 512), 512: (512, 512, 512)}


def splash_blocks(length: int, width: int) -> tuple[int, int, int]:
    """The entry of SPLASH_BLOCKS for this head width, each size cut to the largest power of two
    that divides the length."""
    limits = next(blocks for widest, blocks in SPLASH_BLOCKS.items() if width <= widest)
    return tuple(math.gcd(limit, length) for limit in limits)


def _splash(q_BTNH, k_BSKH, v_BSKU, segment_ids_BT, scale, interpret=True):
    """The TPU flash kernel of jax.experimental.pallas; on other platforms it runs in interpret mode
    (slowly)."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    B, T, N, _ = q_BTNH.shape
    K = k_BSKH.shape[2]
    if T % 128:
        raise ValueError(
            f"attention kernel 'splash' needs a sequence length divisible by 128, found {T}; use "
            "kernel 'chunked'"
        )
    q, kv, compute = splash_blocks(T, max(q_BTNH.shape[-1], v_BSKU.shape[-1]))
    sizes = splash_attention_kernel.BlockSizes(
        block_q=q,
        block_kv=kv,
        block_kv_compute=compute,
        block_q_dkv=q,
        block_kv_dkv=kv,
        block_kv_dkv_compute=compute,
        block_q_dq=q,
        block_kv_dq=kv,
    )
    mask = splash_attention_mask.MultiHeadMask(
        [splash_attention_mask.CausalMask((T, T)) for _ in range(N // K)]
    )
    make = splash_attention_kernel.make_splash_mqa_single_device
    run = make(mask, block_sizes=sizes, interpret=interpret)
    q_BKGTH = (q_BTNH * scale).reshape(B, T, K, N // K, -1).transpose(0, 2, 3, 1, 4)
    ids = (
        None
        if segment_ids_BT is None
        else splash_attention_kernel.SegmentIds(segment_ids_BT, segment_ids_BT)
    )
    over_heads = jax.vmap(run, in_axes=(0, 0, 0, None))
    ids_axis = None if ids is None else 0
    o = jax.vmap(over_heads, in_axes=(0, 0, 0, ids_axis))(
        q_BKGTH, k_BSKH.transpose(0, 2, 1, 3), v_BSKU.transpose(0, 2, 1, 3), ids
    )
    return o.transpose(0, 3, 1, 2, 4).reshape(B, T, N, -1).astype(q_BTNH.dtype)


KERNELS = {
    "reference": _reference,
    "chunked": _chunked,
    "xla": _jax_nn("xla"),
    "cudnn": _jax_nn("cudnn"),
    "splash": _splash,
}
