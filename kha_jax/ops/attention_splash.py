"""Causal attention by the TPU flash kernel of jax.experimental.pallas.

Legend: B batch, T position, N query heads, K key/value heads, G = N/K, H key width, U value width.
"""

import math
from typing import NamedTuple

import jax

from kha_jax.ops.checkpoint_names import ATTENTION


class Blocks(NamedTuple):
    """Rows of a block: queries, keys and values, and the keys of one product. fused: the gradients
    of queries, keys and values come from one kernel, of five products, instead of two of seven in
    all; it writes a part of the queries' gradient for every block of keys."""

    queries: int
    keys: int
    product: int
    fused: bool = False


# Head width up to which: the largest blocks. Keys and values are read from HBM once for every block
# of queries, so that at 1024 even a v6e computes longer on a block than it loads.
BLOCKS = {192: Blocks(1024, 1024, 512), 512: Blocks(512, 512, 512)}
# With fewer and longer turns; these want more of the VMEM than libtpu gives by itself, see
# `kha_jax.hardware.tpu`.
LARGE = {192: Blocks(2048, 2048, 2048, fused=True)}
# By the names of `kha_jax.ops.attention.KERNELS`.
LIMITS = {"splash": BLOCKS, "splash_2048": LARGE}
# Blocks of keys, at most, whose parts of the queries' gradient are worth their memory.
PARTS = 8


def splash_blocks(length: int, width: int, limits: dict[int, Blocks] = BLOCKS) -> Blocks:
    """The entry of `limits` for this head width, each size cut to the largest power of two that
    divides the length."""
    largest = next(blocks for widest, blocks in limits.items() if width <= widest)
    rows = (math.gcd(limit, length) for limit in largest[:3])
    return Blocks(*rows, fused=largest.fused and length <= PARTS * largest.keys)


def splash(
    q_BTNH, k_BTKH, v_BTKU, segment_ids_BT, scale, limits=BLOCKS, interpret=False
) -> jax.Array:
    """See `kha_jax.ops.attention.attention`. interpret: for tests on other platforms."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    B, T, N, _ = q_BTNH.shape
    K = k_BTKH.shape[2]
    blocks = splash_blocks(T, max(q_BTNH.shape[-1], v_BTKU.shape[-1]), limits)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=blocks.queries,
        block_kv=blocks.keys,
        block_kv_compute=blocks.product,
        block_q_dkv=blocks.queries,
        block_kv_dkv=blocks.keys,
        block_kv_dkv_compute=blocks.product,
        block_q_dq=None if blocks.fused else blocks.queries,
        block_kv_dq=None if blocks.fused else blocks.keys,
        use_fused_bwd_kernel=blocks.fused,
    )
    mask = splash_attention_mask.MultiHeadMask(
        [splash_attention_mask.CausalMask((T, T)) for _ in range(N // K)]
    )
    make = splash_attention_kernel.make_splash_mqa_single_device
    run = make(mask, block_sizes=sizes, interpret=interpret, residual_checkpoint_name=ATTENTION)
    q_BKGTH = (q_BTNH * scale).reshape(B, T, K, N // K, -1).transpose(0, 2, 3, 1, 4)
    ids = (
        None
        if segment_ids_BT is None
        else splash_attention_kernel.SegmentIds(segment_ids_BT, segment_ids_BT)
    )
    over_heads = jax.vmap(run, in_axes=(0, 0, 0, None))
    ids_axis = None if ids is None else 0
    o = jax.vmap(over_heads, in_axes=(0, 0, 0, ids_axis))(
        q_BKGTH, k_BTKH.transpose(0, 2, 1, 3), v_BTKU.transpose(0, 2, 1, 3), ids
    )
    return o.transpose(0, 3, 1, 2, 4).reshape(B, T, N, -1).astype(q_BTNH.dtype)
