"""Small stock folders, made by transformers with random weights: one row a family. Widths are odd
on purpose: none is another or its double, so that a transposed tensor has another shape. What has
no class there is made in tests/ling.py, or is another's under its own name."""

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

from tests import ling

D, N, K, H, F, V, LAYERS = 48, 6, 2, 16, 80, 280, 3
BASE = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": N,
    "num_key_value_heads": K,
    "max_position_embeddings": 512,
}
HEADS = {"head_dim": H}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40, **HEADS}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
ROUTED = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
DEEPSEEK = {
    **ROUTED,
    "num_key_value_heads": N,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "rms_norm_eps": 1e-5,
}
MSCALE = {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}
KIMI = {**YARN, "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
SAME = {"kimi_k2": "deepseek_v3"}  # the class that computes it
# Name of the row: (model_type, what differs from BASE).
FOLDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rms_norm_eps": 1e-5, "num_key_value_heads": N}),
    "llama3": ("llama", {"rms_norm_eps": 1e-5, "rope_parameters": LLAMA3}),
    "smollm2": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {**HEADS, "sliding_window": None}),
    "qwen3": ("qwen3", {**HEADS, "tie_word_embeddings": True}),
    "qwen3_yarn": ("qwen3", {**HEADS, "rope_parameters": YARN}),
    "qwen3_moe": ("qwen3_moe", {**MIXTURE, "norm_topk_prob": True}),
    "qwen3_moe_dense": ("qwen3_moe", {**MIXTURE, "norm_topk_prob": True, "mlp_only_layers": [0]}),
    "llama_biased": ("llama", {"attention_bias": True}),
    "qwen2": ("qwen2", {}),
    "seed_oss": ("seed_oss", {**HEADS, "attention_dropout": 0.0, "residual_dropout": 0.0}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe_raw": ("qwen3_moe", {**MIXTURE, "norm_topk_prob": False}),
    "deepseek_v3": (
        "deepseek_v3",
        {**DEEPSEEK, "q_lora_rank": 24, "n_group": 4, "topk_group": 2, "rope_parameters": MSCALE},
    ),
    "deepseek_v3_direct": (
        "deepseek_v3",
        {**DEEPSEEK, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "rope_interleave": False},
    ),
    "kimi_k2": (
        "kimi_k2",
        {**DEEPSEEK, "q_lora_rank": 24, "n_group": 1, "topk_group": 1, "rope_parameters": KIMI},
    ),
    "bailing_moe": ("bailing_moe", {}),
    "glm4_moe": ("glm4_moe", {**ROUTED, **HEADS, "use_qk_norm": True, "attention_bias": True}),
    "dots1": ("dots1", {**ROUTED, "norm_topk_prob": True, "sliding_window": None}),
}


@functools.cache
def folder(name: str) -> Path:
    """The folder of a row."""
    import torch
    import transformers

    kind, fields = FOLDERS[name]
    path = Path(tempfile.mkdtemp(prefix=f"stock_{name}_"))
    if kind == "bailing_moe":
        return ling.make(path)
    transformers.utils.logging.disable_progress_bar()
    config = transformers.AutoConfig.for_model(SAME.get(kind, kind), **{**BASE, **fields})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for tensor, buffer in model.named_buffers():
            if tensor.endswith("e_score_correction_bias"):
                buffer.add_(0.1 * torch.randn_like(buffer))
    model.save_pretrained(path)
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**values, "model_type": kind}, indent=2))
    return path


@functools.cache
def logits(path: Path, seed: int = 0, length: int = 100) -> Any:
    """(ids [2, length], what transformers computes of them, or the reference)."""
    from kha_jax.convert import agreement

    ids = tokens(seed, length)
    if json.loads((path / "config.json").read_text())["model_type"] == "bailing_moe":
        return ids, ling.logits(path, ids)
    return ids, agreement.their_logits(path, [ids])[0]


def tokens(seed: int = 0, length: int = 100) -> Any:
    import numpy as np

    return np.random.default_rng(seed).integers(0, V, (2, length)).astype(np.int32)


def edited(source: Path, target: Path, **changes: Any) -> Path:
    """A copy whose config.json has other values; None takes a key away."""
    import shutil

    shutil.copytree(source, target)
    values = json.loads((source / "config.json").read_text()) | changes
    kept = {name: value for name, value in values.items() if value is not None}
    (target / "config.json").write_text(json.dumps(kept))
    return target
