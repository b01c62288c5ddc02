"""From the keys of a config.json to a model of ours, by family."""

import dataclasses
from typing import Any

from kha_jax.attention import AttentionConfig
from kha_jax.attention.projections import GroupedQuery, Latent
from kha_jax.attention.projections.rotary import ROPE_SCALINGS, NoScaling, RopeScaling, YarnScaling
from kha_jax.convert.keys import Keys
from kha_jax.feed_forward import FeedForward, MoE, SwiGLU
from kha_jax.model import ModelConfig
from kha_jax.modules import Numerics

ORIGINAL = "original_max_position_embeddings"
SIGMOID = "only sigmoid scores with a bias, in each layer that is not dense, can be computed here"


def model(
    keys: Keys, attention: AttentionConfig, feed_forward: FeedForward, norm_eps: float = 1e-6
) -> ModelConfig:
    """The parts that all families have. Ids and lengths are never trimmed. norm_eps: what the
    family's class takes where the key is not there."""
    keys.take("model_type")
    keys.longest()
    layers = keys.count("num_hidden_layers")
    kinds = keys.items("layer_types", ["full_attention"] * layers)
    if kinds != ["full_attention"] * layers:
        raise keys.refuse("layer_types", "only full attention in all layers can be computed here")
    tied = keys.flag("tie_word_embeddings", False)
    return ModelConfig(
        layers=layers,
        width=keys.count("hidden_size"),
        vocabulary_size=keys.count("vocab_size"),
        embeddings="tied" if tied else "untied",
        attention=attention,
        feed_forward=feed_forward,
        numerics=Numerics(norm_eps=keys.number("rms_norm_eps", default=norm_eps)),
    )


def grouped(
    keys: Keys,
    qk_norm: str = "none",
    theta: float = 10_000.0,
    window: int | None = None,
    head_dim: int | None = None,
    biases: tuple[bool, bool] | None = None,
    **more: Any,
) -> AttentionConfig:
    """theta, window, head_dim: what this family's class in transformers takes where the keys are
    not there; head_dim None: width / heads. biases: of q, k and v, and of the output; None: as
    `attention_bias` says. more: fields of the projection."""
    heads, width = keys.count("num_attention_heads"), keys.count("hidden_size")
    if head_dim is None and keys.values.get("head_dim") is None and width % heads:
        raise keys.refuse("num_attention_heads", f"must divide hidden_size={width}")
    no_window(keys, window)
    base, scaling = keys.rotary(theta)
    if biases is None:
        biases = (keys.flag("attention_bias", False),) * 2
    projection = GroupedQuery(
        query_heads=heads,
        kv_heads=keys.count("num_key_value_heads", default=heads),
        head_dim=keys.count("head_dim", default=head_dim or width // heads),
        qk_norm=qk_norm,
        rope_theta=base,
        rope_scaling=rope_scaling(keys, scaling),
        bias="qkv" if biases[0] else "none",
        **more,
    )
    return AttentionConfig(projection=projection, output_bias=biases[1])


def seed_oss(keys: Keys) -> AttentionConfig:
    """Seed-OSS's, whose dropout is that of its own training."""
    keys.take("attention_dropout", "residual_dropout")
    biases = keys.flag("attention_bias", True), keys.flag("attention_out_bias", False)
    return grouped(keys, head_dim=128, biases=biases)


def rope_scaling(keys: Keys, values: dict[str, Any]) -> RopeScaling:
    """What a `rope_scaling`, or the same in `rope_parameters`, says."""
    if not values:
        return NoScaling()
    name = "rope_scaling" if keys.values.get("rope_scaling") else "rope_parameters"
    kind = values["rope_type"]
    known = {name: scaling for name, scaling in ROPE_SCALINGS.items() if name != "none"}
    if not isinstance(kind, str) or kind not in known:
        raise keys.refuse(name, f"of the scalings {', '.join(known)} can be computed here")
    given = {k: v for k, v in values.items() if k != "rope_type" and v is not None}
    fields = {field.name for field in dataclasses.fields(known[kind])}
    if ORIGINAL in fields and ORIGINAL not in given:
        given[ORIGINAL] = keys.count("max_position_embeddings")
    elif ORIGINAL not in fields:
        given.pop(ORIGINAL, None)
    if known[kind] is YarnScaling and not (given.get("mscale") and given.get("mscale_all_dim")):
        given.pop("mscale", None)  # which alone changes nothing
    if unknown := sorted(given.keys() - fields):
        raise keys.refuse(name, f"what {unknown[0]} does is not known here")
    return known[kind](**given)


def no_window(keys: Keys, default: int | None) -> None:
    """A window that is as long as the text reaches changes nothing."""
    switched_off = keys.values.get("use_sliding_window", None) is False
    missing = "sliding_window" not in keys.values
    window = keys.take("sliding_window", default=default if missing else None)
    longest = keys.longest()
    reaches = type(window) is int and window >= longest > 0
    if window is not None and not switched_off and not reaches:
        raise keys.refuse(
            "sliding_window",
            f"windows of attention are not computed here, and max_position_embeddings={longest}",
        )


def swiglu(keys: Keys) -> SwiGLU:
    """The feed-forward of dense families."""
    return SwiGLU(width=keys.count("intermediate_size"))


def softmax_mixture(keys: Keys, width: str, *experts: str, **more: Any) -> MoE:
    """experts: names of the key for their number, whose width is that of the key `width`."""
    return MoE(
        experts=keys.count(*experts),
        top_k=keys.count("num_experts_per_tok"),
        width=keys.count(width),
        scores="softmax",
        balancing="none",
        **more,
    )


def mixtral_mixture(keys: Keys) -> MoE:
    """Mixtral's."""
    return softmax_mixture(keys, "intermediate_size", "num_local_experts")


def qwen3_mixture(keys: Keys) -> MoE:
    """Qwen3-MoE's."""
    keys.only(
        "decoder_sparse_step", 1, default=1, why="only experts in each layer can be computed here"
    )
    dense, width = keys.items("mlp_only_layers", []), keys.take("intermediate_size")
    if dense != list(range(len(dense))):
        raise keys.refuse("mlp_only_layers", "only the first layers can be dense here")
    more = {"dense_layers": len(dense), "dense_width": width} if dense else {}
    more["normalise"] = keys.flag("norm_topk_prob", False)
    names = "num_experts", "num_local_experts"
    return softmax_mixture(keys, "moe_intermediate_size", *names, **more)


def sigmoid_mixture(keys: Keys, dense: int, normalise: bool) -> MoE:
    """DeepSeek-V3's, GLM-4.5's and dots.llm1's. dense, normalise: what the family's class takes
    where the keys are not there."""
    keys.count("num_nextn_predict_layers", "num_mtp_layers", default=0, least=0)
    why = SIGMOID
    keys.only("scoring_func", "sigmoid", default="sigmoid", why=why)
    keys.only("topk_method", "noaux_tc", default="noaux_tc", why=why)
    keys.only("moe_layer_freq", 1, default=1, why=why)
    dense, width = keys.take("first_k_dense_replace", default=dense), keys.take("intermediate_size")
    return MoE(
        experts=keys.count("n_routed_experts"),
        top_k=keys.count("num_experts_per_tok"),
        width=keys.count("moe_intermediate_size"),
        shared_experts=keys.take("n_shared_experts", default=0),
        dense_layers=dense,
        dense_width=width if dense else None,
        scores="sigmoid",
        balancing="sign",
        normalise=keys.flag("norm_topk_prob", normalise),
        routed_scaling=keys.number("routed_scaling_factor", default=1.0),
        groups=keys.count("n_group", default=1),
        groups_used=keys.count("topk_group", default=1),
    )


def bailing_mixture(keys: Keys) -> MoE:
    """Ling 2.0's."""
    keys.count("num_nextn_predict_layers", default=0, least=0)
    keys.only("score_function", "sigmoid", why=SIGMOID)
    keys.only("moe_router_enable_expert_bias", True, why=SIGMOID)
    keys.only("router_type", "topN", default="topN", why=SIGMOID)
    why = "the weights of the chosen experts are divided by their sum whatever it says"
    keys.only("norm_topk_prob", True, default=True, why=why)
    width, shared = (
        keys.count("moe_intermediate_size"),
        keys.count("num_shared_experts", default=0, least=0),
    )
    why = f"expected that of {shared} experts of moe_intermediate_size={width}"
    both = shared * width
    keys.only("moe_shared_expert_intermediate_size", both, default=both, why=why)
    dense, inner = keys.take("first_k_dense_replace", default=0), keys.take("intermediate_size")
    return MoE(
        experts=keys.count("num_experts"),
        top_k=keys.count("num_experts_per_tok"),
        width=width,
        shared_experts=shared,
        dense_layers=dense,
        dense_width=inner if dense else None,
        scores="sigmoid",
        balancing="sign",
        routed_scaling=keys.number("routed_scaling_factor", default=2.5),
        groups=keys.count("n_group", default=8),
        groups_used=keys.count("topk_group", default=4),
    )


def glm(keys: Keys) -> AttentionConfig:
    """GLM-4.5's."""
    return partly_rotated(keys, (keys.flag("attention_bias", False), False))


def bailing(keys: Keys) -> AttentionConfig:
    """Ling 2.0's."""
    biases = keys.flag("use_qkv_bias", False), keys.flag("use_bias", True)
    attention = partly_rotated(keys, biases)
    turned = attention.projection.rotary_width
    why = f"expected {turned}, as partial_rotary_factor says"
    keys.only("rotary_dim", turned, default=turned, why=why)
    return attention


def partly_rotated(keys: Keys, biases: tuple[bool, bool]) -> AttentionConfig:
    """Of each head the first features are rotated, half of them by default."""
    norm = "rms" if keys.flag("use_qk_norm", False) else "none"
    share, heads = keys.rotated(0.5), keys.count("num_attention_heads")
    head_dim = keys.count("head_dim", default=keys.count("hidden_size") // heads)
    turned = int(head_dim * share)
    rope_dim = None if turned == head_dim else turned
    return grouped(keys, norm, biases=biases, rope_dim=rope_dim)


def latent(keys: Keys) -> AttentionConfig:
    """DeepSeek-V3's, whose latents have an epsilon of their own in transformers."""
    heads, rotary = keys.count("num_attention_heads"), keys.count("qk_rope_head_dim")
    keys.only(
        "num_key_value_heads", heads, default=heads, why="latents serve as many heads as there are"
    )
    keys.only("head_dim", rotary, default=rotary, why="expected that of qk_rope_head_dim")
    keys.take("qk_head_dim", "rope_interleave")
    base, scaling = keys.rotary(10_000.0)
    projection = Latent(
        query_heads=heads,
        head_dim=keys.count("qk_nope_head_dim"),
        value_dim=keys.count("v_head_dim"),
        rope_dim=rotary,
        kv_lora=keys.count("kv_lora_rank"),
        q_lora=keys.take("q_lora_rank"),
        norm_eps=1e-6,
        rope_theta=base,
        rope_scaling=rope_scaling(keys, scaling),
    )
    return AttentionConfig(projection=projection)
