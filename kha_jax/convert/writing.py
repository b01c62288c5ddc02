"""From a model of ours to the keys of a config.json, by family; in both dialects, see `keys`."""

import dataclasses
from typing import Any

from kha_jax.attention import AttentionConfig
from kha_jax.config import kind_of
from kha_jax.feed_forward import MoE
from kha_jax.model import ModelConfig

Values = dict[str, Any]
ROTARY = {"rope_theta", "rope_scaling", "rope_parameters"}


def common(model: ModelConfig) -> Values:
    """The keys that all families have."""
    return {
        "hidden_size": model.width,
        "num_hidden_layers": model.layers,
        "vocab_size": model.vocabulary_size,
        "tie_word_embeddings": model.embeddings == "tied",
        "rms_norm_eps": model.numerics.norm_eps,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
    }


def grouped(attention: AttentionConfig) -> Values:
    """Those of grouped queries."""
    projection = attention.projection
    return {
        "num_attention_heads": projection.query_heads,
        "num_key_value_heads": projection.kv_heads,
        "head_dim": projection.head_dim,
        "attention_bias": projection.bias == "qkv",
        **rotary(projection),
    }


def rotary(projection: Any) -> Values:
    """The base and the scaling, for either version of transformers."""
    theta, scaling = projection.rope_theta, projection.rope_scaling
    kind = kind_of(type(projection).__dataclass_fields__["rope_scaling"], scaling)
    if kind == "none":
        new = {"rope_type": "default"}
    else:
        given = ((f.name, getattr(scaling, f.name)) for f in dataclasses.fields(scaling))
        new = {"rope_type": kind, **{name: value for name, value in given if value is not None}}
    return {
        "rope_theta": theta,
        "rope_scaling": None if kind == "none" else new,
        "rope_parameters": {"rope_theta": theta, **new},
    }


def sigmoid_mixture(mixture: MoE) -> Values:
    """DeepSeek-V3's, GLM-4.5's and dots.llm1's."""
    return {
        "intermediate_size": mixture.dense_width or mixture.width,
        "moe_intermediate_size": mixture.width,
        "n_routed_experts": mixture.experts,
        "num_experts_per_tok": mixture.top_k,
        "n_shared_experts": mixture.shared_experts,
        "first_k_dense_replace": mixture.dense_layers,
        "norm_topk_prob": mixture.normalise,
        "routed_scaling_factor": mixture.routed_scaling,
        "n_group": mixture.groups,
        "topk_group": mixture.groups_used,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }


def deepseek_v3(model: ModelConfig) -> Values:
    """DeepSeek-V3's."""
    projection = model.attention.projection
    heads = projection.query_heads
    return {
        **common(model),
        **sigmoid_mixture(model.feed_forward),
        **rotary(projection),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "qk_nope_head_dim": projection.head_dim,
        "qk_rope_head_dim": projection.rotary_width,
        "v_head_dim": projection.value_width,
        "kv_lora_rank": projection.latent_width,
        "q_lora_rank": projection.q_lora,
        "rope_interleave": True,
        "attention_bias": False,
    }


def partly_rotated(attention: AttentionConfig) -> Values:
    """Those of grouped queries with norms, of which some features are rotated."""
    projection, keys = attention.projection, grouped(attention)
    share = projection.rotary_width / projection.head_dim
    keys["use_qk_norm"] = projection.qk_norm == "rms"
    keys["partial_rotary_factor"] = share
    keys["rope_parameters"] = {**keys["rope_parameters"], "partial_rotary_factor": share}
    return keys


def glm4_moe(model: ModelConfig) -> Values:
    """GLM-4.5's."""
    attention, mixture = model.attention, model.feed_forward
    return {**common(model), **partly_rotated(attention), **sigmoid_mixture(mixture)}


def bailing(model: ModelConfig) -> Values:
    """Ling 2.0's, which has names of its own for some."""
    keys = {**common(model), **partly_rotated(model.attention)}
    mixture = sigmoid_mixture(model.feed_forward)
    own = {
        "use_qkv_bias": keys.pop("attention_bias"),
        "use_bias": model.attention.output_bias,
        "num_experts": mixture.pop("n_routed_experts"),
        "num_shared_experts": mixture.pop("n_shared_experts"),
        "score_function": mixture.pop("scoring_func"),
        "moe_router_enable_expert_bias": mixture.pop("topk_method") == "noaux_tc",
    }
    return {**keys, **mixture, **own}


def dots1(model: ModelConfig) -> Values:
    """Those of dots.llm1."""
    keys = {**common(model), **grouped(model.attention), **sigmoid_mixture(model.feed_forward)}
    return {**keys, "sliding_window": None}


def both_dialects(config: Values) -> Values:
    """The rotary keys of the dialect that a config.json does not have, from the one that it has."""
    new = config.get("rope_parameters")
    if new:
        others = ("rope_theta", "partial_rotary_factor")
        scaling = {name: value for name, value in new.items() if name not in others}
        plain = scaling.get("rope_type", "default") == "default"
        there = {name: new[name] for name in others if name in new}
        made = {**there, "rope_scaling": None if plain else scaling}
    else:
        theta, scaling = config.get("rope_theta"), config.get("rope_scaling") or {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        there = {} if theta is None else {"rope_theta": theta}
        made = {"rope_parameters": {**there, **scaling, "rope_type": kind}}
    return {name: value for name, value in made.items() if name not in config}


def dense(model: ModelConfig) -> Values:
    """Llama's."""
    return {
        **common(model),
        **grouped(model.attention),
        "intermediate_size": model.feed_forward.width,
        "mlp_bias": False,
    }


def mistral(model: ModelConfig) -> Values:
    """Mistral's."""
    return {**dense(model), "sliding_window": None}


def unwindowed(model: ModelConfig) -> Values:
    """Those of Qwen's dense models."""
    return {**dense(model), "sliding_window": None, "use_sliding_window": False}


def qwen2(model: ModelConfig) -> Values:
    """Qwen2's, whose biases are no choice."""
    return {name: value for name, value in unwindowed(model).items() if name != "attention_bias"}


def seed_oss(model: ModelConfig) -> Values:
    """Seed-OSS's."""
    dropout = {"attention_dropout": 0.0, "residual_dropout": 0.0}
    return {**dense(model), "attention_out_bias": model.attention.output_bias, **dropout}


def mixtral(model: ModelConfig) -> Values:
    """Mixtral's."""
    mixture = model.feed_forward
    return {
        **common(model),
        **grouped(model.attention),
        "intermediate_size": mixture.width,
        "num_local_experts": mixture.experts,
        "num_experts_per_tok": mixture.top_k,
        "sliding_window": None,
    }


def qwen3_moe(model: ModelConfig) -> Values:
    """Qwen3-MoE's."""
    mixture = model.feed_forward
    return {
        **common(model),
        **grouped(model.attention),
        "intermediate_size": mixture.dense_width or mixture.width,
        "moe_intermediate_size": mixture.width,
        "num_experts": mixture.experts,
        "num_local_experts": mixture.experts,
        "num_experts_per_tok": mixture.top_k,
        "norm_topk_prob": mixture.normalise,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(mixture.dense_layers)),
        "sliding_window": None,
        "use_sliding_window": False,
    }
