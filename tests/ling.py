"""Ling 2.0 (BailingMoeV2), for which transformers has no class: a small folder of random weights,
and what it computes, in float64 from the tensors as they are named and laid out there.

Source: the architecture's README (github.com/inclusionAI/Ling-V2) and the names in public ports.
"""

import json
from pathlib import Path

import numpy as np

from tests.reference import mixture, rms_norm
from tests.reference_parts import attend, float64, rotate, sigmoid

D, N, K, H, F, V, LAYERS, DENSE, EXPERTS, INNER = 48, 6, 2, 16, 80, 280, 3, 1, 8, 40
CONFIG = {
    "architectures": ["BailingMoeV2ForCausalLM"],
    "model_type": "bailing_moe",
    "auto_map": {"AutoModelForCausalLM": "modeling_bailing_moe_v2.BailingMoeV2ForCausalLM"},
    "embedding_dropout": 0.0,
    "first_k_dense_replace": DENSE,
    "head_dim": H,
    "hidden_act": "silu",
    "hidden_size": D,
    "intermediate_size": F,
    "max_position_embeddings": 512,
    "moe_intermediate_size": INNER,
    "moe_router_enable_expert_bias": True,
    "moe_shared_expert_intermediate_size": INNER,
    "n_group": 4,
    "norm_head": False,
    "norm_softmax": False,
    "norm_topk_prob": True,
    "num_attention_heads": N,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": K,
    "num_nextn_predict_layers": 0,
    "num_shared_experts": 1,
    "output_dropout": 0.0,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 600000,
    "rotary_dim": H // 2,
    "routed_scaling_factor": 2.5,
    "router_dtype": "fp32",
    "score_function": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 2,
    "torch_dtype": "float32",
    "use_bias": False,
    "use_qk_norm": True,
    "use_qkv_bias": False,
    "use_rmsnorm": True,
    "vocab_size": V,
}


def shapes() -> dict[str, tuple[int, ...]]:
    """Of every tensor, [out, in]."""
    found = {"model.word_embeddings.weight": (V, D), "model.norm.weight": (D,)}
    found["lm_head.weight"] = (V, D)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        found |= {
            f"{at}.input_layernorm.weight": (D,),
            f"{at}.post_attention_layernorm.weight": (D,),
            f"{at}.attention.query_key_value.weight": ((N + 2 * K) * H, D),
            f"{at}.attention.query_layernorm.weight": (H,),
            f"{at}.attention.key_layernorm.weight": (H,),
            f"{at}.attention.dense.weight": (D, N * H),
        }
        if layer < DENSE:
            found |= _swiglu(f"{at}.mlp", F)
            continue
        found[f"{at}.mlp.gate.weight"] = (EXPERTS, D)
        found[f"{at}.mlp.gate.expert_bias"] = (EXPERTS,)
        for inside in ("shared_experts", *(f"experts.{e}" for e in range(EXPERTS))):
            found |= _swiglu(f"{at}.mlp.{inside}", INNER)
    return found


def _swiglu(at: str, width: int) -> dict[str, tuple[int, ...]]:
    wide = {f"{at}.{name}_proj.weight": (width, D) for name in ("gate", "up")}
    return {**wide, f"{at}.down_proj.weight": (D, width)}


def make(folder: Path) -> Path:
    """Writes the folder."""
    from safetensors.numpy import save_file

    random, tensors = np.random.default_rng(0), {}
    for name, shape in shapes().items():
        start = 1.0 if "norm" in name else 0.0
        tensors[name] = (start + 0.1 * random.normal(size=shape)).astype(np.float32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    return folder


def logits(folder: Path, ids_BT: np.ndarray) -> np.ndarray:
    """[B, T, V], in float64."""
    from safetensors.numpy import load_file

    p = float64(load_file(folder / "model.safetensors"))
    x_BTD = p["model.word_embeddings.weight"][ids_BT]
    for layer in range(LAYERS):
        own = {
            name.removeprefix(f"model.layers.{layer}."): tensor
            for name, tensor in p.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        x_BTD = x_BTD + _attention(_norm(x_BTD, own, "input_layernorm"), own)
        inner_BTD = _norm(x_BTD, own, "post_attention_layernorm")
        x_BTD = x_BTD + (_dense if layer < DENSE else _routed)(inner_BTD, own)
    return rms_norm(x_BTD, p["model.norm.weight"], 1e-6) @ p["lm_head.weight"].T


def _norm(x, own, name):
    return rms_norm(x, own[f"{name}.weight"], 1e-6)


def _attention(x_BTD, own):
    B, T, _ = x_BTD.shape
    heads = (x_BTD @ own["attention.query_key_value.weight"].T).reshape(B, T, N + 2 * K, H)
    q, k, v = np.split(heads, [N, N + K], axis=2)
    positions = np.tile(np.arange(T), (B, 1))
    q = rotate(_norm(q, own, "attention.query_layernorm"), positions, 6e5, width=H // 2)
    k = rotate(_norm(k, own, "attention.key_layernorm"), positions, 6e5, width=H // 2)
    o = attend(q, k, v, None)
    return o.reshape(B, T, N * H) @ own["attention.dense.weight"].T


def _dense(x, own, at="mlp"):
    gate = x @ own[f"{at}.gate_proj.weight"].T
    return (gate * sigmoid(gate) * (x @ own[f"{at}.up_proj.weight"].T)) @ own[
        f"{at}.down_proj.weight"
    ].T


def _routed(x, own):
    parameters = {
        name: [own[f"mlp.experts.{e}.{name}_proj.weight"].T for e in range(EXPERTS)]
        for name in ("gate", "up", "down")
    }
    parameters["router"] = own["mlp.gate.weight"].T
    settings = {"scores": "sigmoid", "top_k": 2, "scaling": 2.5, "groups": 4, "groups_used": 2}
    routed, _ = mixture(x, parameters, own["mlp.gate.expert_bias"], settings)
    return routed + _dense(x, own, "mlp.shared_experts")
