"""The tables of tensors: of each part of a model which tensors it has in a stock folder."""

from typing import NamedTuple

from kha_jax.attention.projections import GroupedQuery, Latent
from kha_jax.convert.rows import Part, Row
from kha_jax.feed_forward import MoE, SwiGLU
from kha_jax.feed_forward.moe import BIAS_RULES
from kha_jax.model import ModelConfig, Segment

LAYER = "model.layers.{layer}."


class Names(NamedTuple):
    """What differs between families. mixture: where a mixture of experts lies, unless they are
    fused. experts: one expert's gate, up and down. bias: of the router, where it has one. merged:
    the tensor of queries, keys and values one after another, where they are one. norms: of queries
    and keys. output: the projection behind attention. embedding: the table of tokens."""

    mixture: str = "mlp"
    experts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    bias: str | None = None
    merged: str | None = None
    norms: tuple[str, str] = ("self_attn.q_norm", "self_attn.k_norm")
    output: str = "self_attn.o_proj"
    embedding: str = "model.embed_tokens.weight"


class Layout(NamedTuple):
    """What differs between folders of a family. fused: experts are one tensor a layer and not one
    each. paired: rotary features are neighbours and not halves apart."""

    fused: bool = False
    paired: bool = True


def outer_rows(names: Names, model: ModelConfig) -> list[Row]:
    """Those outside of the layers."""
    untied = [Row("unembedding", "lm_head.weight")] if model.embeddings == "untied" else []
    return [
        Row("embedding", names.embedding),
        *untied,
        Row("final_norm/scale", "model.norm.weight"),
    ]


def layer_rows(names: Names, segment: Segment, layout: Layout) -> list[Row]:
    """Those of a layer."""
    projection = segment.attention.projection
    latent = isinstance(projection, Latent)
    rows = [
        Row("attention_norm/scale", "input_layernorm.weight"),
        Row("feed_forward_norm/scale", "post_attention_layernorm.weight"),
        *(_latent(projection, layout.paired) if latent else _grouped(names, projection)),
        Row("attention/output", f"{names.output}.weight", inputs=2),
    ]
    if segment.attention.output_bias:
        rows += [Row("attention/output_bias", f"{names.output}.bias")]
    if isinstance(segment.feed_forward, SwiGLU):
        rows += _swiglu("feed_forward", "mlp")
    else:
        rows += _mixture(names, segment.feed_forward, layout.fused)
    return [row._replace(theirs=LAYER + row.theirs) for row in rows]


def _grouped(names: Names, projection: GroupedQuery) -> list[Row]:
    streams = _streams(names, projection)
    rows = [
        Row(f"attention/projection/{ours}", f"{theirs}.weight", 1, part)
        for ours, (theirs, part) in streams.items()
    ]
    if projection.bias == "qkv":
        rows += [
            Row(f"attention/projection/{ours}_bias", f"{theirs}.bias", 0, part)
            for ours, (theirs, part) in streams.items()
        ]
    if projection.qk_norm == "rms":
        rows += [
            Row(f"attention/projection/{ours}_norm/scale", f"{theirs}.weight")
            for ours, theirs in zip(("query", "key"), names.norms)
        ]
    return rows


def _streams(names: Names, projection: GroupedQuery) -> dict[str, tuple[str, Part | None]]:
    """Of queries, keys and values the module that they are of, and which of its rows they are."""
    streams = "query", "key", "value"
    if names.merged is None:
        return {ours: (f"self_attn.{ours[0]}_proj", None) for ours in streams}
    N, K, H = projection.query_heads, projection.kv_heads, projection.head_dim
    places = zip((0, N, N + K), (N, N + K, N + 2 * K))
    parts = [Part(1, (N + 2 * K) * H, begin * H, end * H) for begin, end in places]
    return {ours: (names.merged, part) for ours, part in zip(streams, parts)}


def _latent(projection: Latent, paired: bool) -> list[Row]:
    """Of queries and keys the part without and with rotation, of the latents' weights keys and
    values stand within each head."""
    N, H, R = projection.query_heads, projection.head_dim, projection.rotary_width
    C, U, at = projection.latent_width, projection.value_width, "attention/projection"
    query = "self_attn.q_b_proj.weight" if projection.q_lora else "self_attn.q_proj.weight"
    down, up = "self_attn.kv_a_proj_with_mqa.weight", "self_attn.kv_b_proj.weight"
    rows = [
        Row(f"{at}/query", query, 1, Part(N, H + R, 0, H)),
        Row(f"{at}/query_rope", query, 1, Part(N, H + R, H, H + R, paired)),
        Row(f"{at}/latent_down", down, 1, Part(1, C + R, 0, C)),
        Row(f"{at}/rotary_key", down, 1, Part(1, C + R, C, C + R, paired)),
        Row(f"{at}/latent_norms_0/scale", "self_attn.kv_a_layernorm.weight"),
        Row(f"{at}/key_up", up, 2, Part(N, H + U, 0, H)),
        Row(f"{at}/value_up", up, 2, Part(N, H + U, H, H + U)),
    ]
    if projection.q_lora:
        rows += [
            Row(f"{at}/query_down", "self_attn.q_a_proj.weight", 1),
            Row(f"{at}/query_norm/scale", "self_attn.q_a_layernorm.weight"),
        ]
    return rows


def _swiglu(ours: str, theirs: str) -> list[Row]:
    return [
        Row(f"{ours}/{name}", f"{theirs}.{name}_proj.weight", inputs=1)
        for name in ("gate", "up", "down")
    ]


def _mixture(names: Names, mixture: MoE, fused: bool) -> list[Row]:
    # fused is what version 5 of transformers has in memory, where all families say `mlp`
    at, F = "mlp" if fused else names.mixture, mixture.width
    rows = [Row("feed_forward/router", f"{at}.gate.weight", inputs=1)]
    if fused:
        rows += [
            Row("feed_forward/gate", f"{at}.experts.gate_up_proj", 1, Part(1, 2 * F, 0, F), True),
            Row("feed_forward/up", f"{at}.experts.gate_up_proj", 1, Part(1, 2 * F, F, 2 * F), True),
            Row("feed_forward/down", f"{at}.experts.down_proj", 1, None, True),
        ]
    else:
        rows += [
            Row(f"feed_forward/{ours}", f"{at}.experts.{{expert}}.{theirs}.weight", 1, None, True)
            for ours, theirs in zip(("gate", "up", "down"), names.experts)
        ]
    if names.bias and mixture.balancing in BIAS_RULES:
        rows.append(Row("feed_forward/bias", f"{at}.{names.bias}", collection="balance"))
    if mixture.shared_experts:
        rows += _swiglu("feed_forward/shared", f"{at}.shared_experts")
    return rows
