"""Causal scaled dot-product attention behind one function, with a kernel for every platform.

Legend: B batch, T query position, S key position, N query heads, K key/value heads, G = N/K, H
query and key width, U value width.
"""

import functools
import math
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp

from kha_jax.ops.attention_chunked import MASKED, chunked
from kha_jax.ops.attention_splash import LARGE, splash

ROWS = 128  # queries whose scores over all heads exist at once


class ScoreMaps(NamedTuple):
    """Maps s[B, N, ...] -> s over the heads of the logits, before the mask, and of the
    probabilities; None is the identity. Where one is set, heads mix in the scores.

    Each is a `jax.tree_util.Partial` of its arrays, so that it can be taken to a device and be
    recomputed.
    """

    logits: Callable | None = None
    probabilities: Callable | None = None

    @property
    def mix_heads(self) -> bool:
        return self != ScoreMaps()


class Case(NamedTuple):
    """What decides which kernels can compute an attention."""

    platform: str
    dtype: Any
    length: int
    key_width: int
    value_width: int
    mixes_scores: bool = False


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKU: jax.Array,
    segment_ids_BS: jax.Array | None = None,
    *,
    scale: float | None = None,
    maps: ScoreMaps = ScoreMaps(),
    start: int | jax.Array = 0,
    kernel: str = "auto",
    platform: str | None = None,
) -> jax.Array:
    """softmax(scale * q k^T + causal mask) v, query head n reading key/value head n // G.

    Args:
        q_BTNH: queries.
        k_BSKH: keys; N must be a multiple of K.
        v_BSKU: values; U may differ from H.
        segment_ids_BS: document number of every token; attention never crosses documents. None: one
            document.
        scale: factor on the logits, 1/sqrt(H) by default.
        maps: what heads do to each other's scores.
        start: place in the row of the first query. Fewer queries than keys and another start than
            0 need maps that mix heads.
        kernel: a key of KERNELS, or `auto` for the platform's best.
        platform: where this will run; jax's default backend by default.

    Returns:
        o_BTNU in the dtype of the queries; the softmax is float32 in every kernel.

    Raises:
        ValueError: the kernel cannot compute this case; see `why_not`.
    """
    scale = 1.0 / math.sqrt(q_BTNH.shape[-1]) if scale is None else scale
    platform = jax.default_backend() if platform is None else platform
    widths = q_BTNH.shape[-1], v_BSKU.shape[-1]
    case = Case(platform, q_BTNH.dtype, k_BSKH.shape[1], *widths, maps.mix_heads)
    kernel = best_kernel(case) if kernel == "auto" else kernel
    problem = why_not(kernel, case)
    if problem:
        raise ValueError(f"attention kernel {problem}")
    with jax.named_scope(f"attention_{kernel}"):
        if maps.mix_heads:
            return MEETING[kernel](q_BTNH, k_BSKH, v_BSKU, segment_ids_BS, start, scale, maps)
        return KERNELS[kernel].run(q_BTNH, k_BSKH, v_BSKU, segment_ids_BS, scale)


def softmax(s: jax.Array, visible: jax.Array, maps: ScoreMaps) -> jax.Array:
    """probabilities(softmax(logits(s), masked)) over the last axis of s[B, N, ...], in float32."""
    s = s if maps.logits is None else maps.logits(s)
    p = jax.nn.softmax(jnp.where(visible, s, MASKED), axis=-1)
    return p if maps.probabilities is None else maps.probabilities(p)


def visible_keys(
    segment_ids_BS: jax.Array | None, queries: int, keys: int, start: int | jax.Array = 0
) -> jax.Array:
    """[B or 1, T, S]: True where a query may look; the queries are those from `start` on."""
    causal = (start + jnp.arange(queries)[:, None] >= jnp.arange(keys))[None]
    if segment_ids_BS is None:
        return causal
    ids_BT = jax.lax.dynamic_slice_in_dim(segment_ids_BS, start, queries, axis=1)
    return causal & (ids_BT[:, :, None] == segment_ids_BS[:, None, :keys])


def largest_logit(
    q_BRNH: jax.Array,
    k_BSKH: jax.Array,
    segment_ids_BS: jax.Array | None,
    positions_R: jax.Array,
    scale: float,
    maps: ScoreMaps = ScoreMaps(),
) -> jax.Array:
    """The largest logit of each head [B, N], as the softmax is given it, of the queries at these
    places of the row and the keys that they may see; float32."""
    (B, R, N, _), (_, S, K, _) = q_BRNH.shape, k_BSKH.shape
    q_BRKGH = q_BRNH.reshape(B, R, K, N // K, -1)
    s_BKGRS = jnp.einsum("BRKGH,BSKH->BKGRS", q_BRKGH, k_BSKH, preferred_element_type=jnp.float32)
    s_BNRS = s_BKGRS.reshape(B, N, R, S) * scale
    s_BNRS = s_BNRS if maps.logits is None else maps.logits(s_BNRS)
    visible_BRS = (positions_R[:, None] >= jnp.arange(S))[None]
    if segment_ids_BS is not None:
        ids_BS = jnp.asarray(segment_ids_BS)
        visible_BRS = visible_BRS & (ids_BS[:, positions_R, None] == ids_BS[:, None])
    return jnp.max(s_BNRS, (2, 3), where=visible_BRS[:, None], initial=-jnp.inf)


def _formula(q_BTNH, k_BSKH, v_BSKU, segment_ids_BS, start, scale, maps):
    """The formula as written: every logit exists at once, in float32."""
    (B, T, N, _), (_, S, K, _) = q_BTNH.shape, k_BSKH.shape
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, -1)
    s_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    visible_B1TS = visible_keys(segment_ids_BS, T, S, start)[:, None]
    p_BNTS = softmax(s_BKGTS.reshape(B, N, T, S) * scale, visible_B1TS, maps)
    p_BKGTS = p_BNTS.astype(v_BSKU.dtype).reshape(s_BKGTS.shape)
    return jnp.einsum("BKGTS,BSKU->BTKGU", p_BKGTS, v_BSKU).reshape(B, T, N, -1)


def _formula_in_chunks(q_BTNH, k_BSKH, v_BSKU, segment_ids_BS, start, scale, maps):
    """The formula for ROWS queries after another, recomputed for the gradient, so that their scores
    alone exist at a time. Where the queries' place is known when this is compiled, each quarter of
    them touches only the keys up to its end."""
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    quarter = -(-T // (4 * ROWS)) * ROWS
    out = []
    for first in range(0, T, quarter):
        last = min(first + quarter, T)
        keys = min(start + last, S) if isinstance(start, int) else S
        ids_BS = None if segment_ids_BS is None else segment_ids_BS[:, :keys]
        fixed = k_BSKH[:, :keys], v_BSKU[:, :keys], ids_BS, maps
        out.append(_rows_in_turn(q_BTNH[:, first:last], start + first, scale, *fixed))
    return jnp.concatenate(out, axis=1)


def _rows_in_turn(q_BTNH, start, scale, k_BSKH, v_BSKU, segment_ids_BS, maps):
    @jax.checkpoint
    def rows(q_BCNH, start):
        return _formula(q_BCNH, k_BSKH, v_BSKU, segment_ids_BS, start, scale, maps)

    B, T, N, H = q_BTNH.shape
    whole = T - T % ROWS
    if whole <= ROWS:
        return rows(q_BTNH, start)
    q_XBCNH = q_BTNH[:, :whole].reshape(B, -1, ROWS, N, H).swapaxes(0, 1)
    starts_X = start + ROWS * jnp.arange(len(q_XBCNH))
    o_XBCNU = jax.lax.map(lambda chunk: rows(*chunk), (q_XBCNH, starts_X))
    o_BTNU = o_XBCNU.swapaxes(0, 1).reshape(B, whole, N, -1)
    if whole == T:
        return o_BTNU
    return jnp.concatenate([o_BTNU, rows(q_BTNH[:, whole:], start + whole)], axis=1)


def _reference(q_BTNH, k_BSKH, v_BSKU, segment_ids_BS, scale):
    return _formula(q_BTNH, k_BSKH, v_BSKU, segment_ids_BS, 0, scale, ScoreMaps())


def _jax_nn(implementation):
    def kernel(q_BTNH, k_BSKH, v_BSKU, segment_ids_BS, scale):
        length = q_BTNH.shape[1]
        mask = None
        if segment_ids_BS is not None:
            mask = visible_keys(segment_ids_BS, length, length)[:, None]
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


class Rule(NamedTuple):
    """What a kernel asks of a Case, and what to say where it is not met."""

    holds: Callable[[Case], bool]
    problem: str


class Kernel(NamedTuple):
    """run(q, k, v, segment_ids, scale) -> o, and the rules that a case has to meet."""

    run: Callable
    rules: tuple[Rule, ...]


HEADS_APART = Rule(
    lambda case: not case.mixes_scores,
    "never holds the scores of all heads at once, which mixing them needs",
)
EQUAL_WIDTHS = Rule(
    lambda case: case.key_width == case.value_width,
    "needs values as wide as keys, found {value_width} and {key_width}",
)
ON_TPU = Rule(lambda case: case.platform == "tpu", "runs on a tpu, found {platform}")
ON_GPU = Rule(lambda case: case.platform == "gpu", "runs on a gpu, found {platform}")
SPLASH_ROWS = Rule(
    lambda case: case.length % 128 == 0, "needs rows divisible by 128, found seq_len={length}"
)
SPLASH_WIDTHS = Rule(
    lambda case: all(w % 64 == 0 and w <= 512 for w in (case.key_width, case.value_width)),
    "needs heads of a multiple of 64 up to 512, found {key_width} and {value_width}",
)
LARGE_ROWS = Rule(
    lambda case: case.length % 2048 == 0, "needs rows divisible by 2048, found seq_len={length}"
)
LARGE_WIDTHS = Rule(
    lambda case: max(case.key_width, case.value_width) <= max(LARGE),
    f"needs heads of up to {max(LARGE)}, found {{key_width}} and {{value_width}}",
)
CUDNN_DTYPE = Rule(
    lambda case: jnp.dtype(case.dtype).itemsize == 2, "needs bfloat16, found {dtype}"
)
CUDNN_WIDTHS = Rule(
    lambda case: case.key_width % 8 == 0 and case.key_width <= 128,
    "needs heads of a multiple of 8 up to 128, found {key_width}",
)
SPLASH = HEADS_APART, ON_TPU, SPLASH_ROWS, SPLASH_WIDTHS
# In the order in which `auto` prefers them; the chunked kernel takes everything.
KERNELS = {
    "splash": Kernel(splash, SPLASH),
    "splash_2048": Kernel(
        functools.partial(splash, limits=LARGE), (*SPLASH, LARGE_ROWS, LARGE_WIDTHS)
    ),
    "cudnn": Kernel(
        _jax_nn("cudnn"), (HEADS_APART, ON_GPU, CUDNN_DTYPE, EQUAL_WIDTHS, CUDNN_WIDTHS)
    ),
    "chunked": Kernel(chunked, ()),
    "xla": Kernel(_jax_nn("xla"), (HEADS_APART, EQUAL_WIDTHS)),
    "reference": Kernel(_reference, ()),
}
MEETING = {"chunked": _formula_in_chunks, "reference": _formula}


def why_not(kernel: str, case: Case) -> str | None:
    """Why a kernel cannot compute this case, or None; `auto` always can."""
    rules = KERNELS[kernel].rules if kernel != "auto" else ()
    broken = next((rule for rule in rules if not rule.holds(case)), None)
    if broken is None:
        return None
    named = case._replace(dtype=jnp.dtype(case.dtype).name)
    return f"{kernel!r} {broken.problem.format(**named._asdict())}; use 'auto'"


def best_kernel(case: Case) -> str:
    """The kernel that `auto` stands for: the first of KERNELS that does not refuse."""
    return next(name for name in KERNELS if why_not(name, case) is None)
