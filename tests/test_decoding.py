"""The decoder against whole forward passes, its sampling, its cost by XLA's count, and the commands
that use it."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kha_jax.accounting import account
from kha_jax.attention import AttentionConfig
from kha_jax.attention.mixers import HeadComposition, KnockingLinear, KnockingMLP
from kha_jax.attention.outputs import HeadGroupNorm, MixtureOfHeads
from kha_jax.attention.projections import GroupedQuery, GroupedTied, Latent
from kha_jax.attention.scores import TalkingHeads
from kha_jax.config import ConfigError
from kha_jax.data.tokenizers import ByteTokenizer
from kha_jax.feed_forward import MoE, SwiGLU
from kha_jax.inference.decoding import Decoder, Session, extend, prefill
from kha_jax.inference.folding import fold_model
from kha_jax.inference.layers import unstack
from kha_jax.inference.sampling import Sampling, sample
from kha_jax.inference.text import Continuation
from kha_jax.mesh import MeshConfig, make_mesh
from kha_jax.model import AttentionFrom, ModelConfig
from kha_jax.modules import Numerics
from kha_jax.sharding import tree_shardings
from tests.commands import run_all

ROOT = Path(__file__).resolve().parent.parent
V = 61
LINEAR = {slot: KnockingLinear() for slot in ("query", "key", "value")}
ATTENTION = {
    "gqa": AttentionConfig(
        projection=GroupedQuery(query_heads=4, kv_heads=2, head_dim=8), value=KnockingMLP()
    ),
    "gta": AttentionConfig(
        projection=GroupedTied(query_heads=4, kv_heads=2, head_dim=8), value=KnockingMLP()
    ),
    "gla": AttentionConfig(
        projection=Latent(query_heads=4, head_dim=8, value_dim=8, rope_dim=4, kv_lora=12, groups=2),
        **LINEAR,
    ),
}
MIXTURE = MoE(experts=8, top_k=2, width=8, dense_layers=1, dense_width=24)
# Heads meet and are routed in the first layer; in the second two cached heads are read as four.
ATTENTION["everything"] = AttentionConfig(
    projection=GroupedQuery(query_heads=4, kv_heads=4, head_dim=8),
    logits=TalkingHeads(),
    output=MixtureOfHeads(shared_heads=1, top_k=2),
)
VIRTUAL = AttentionConfig(
    projection=GroupedQuery(query_heads=4, kv_heads=2, head_dim=8),
    key=HeadComposition(heads_read=4),
    value=HeadComposition(heads_read=4),
    output=HeadGroupNorm(),
)
MODELS = {name: {} for name in ATTENTION} | {"moe": {"layers": 3, "feed_forward": MIXTURE}}
MODELS["everything"] = {"later": AttentionFrom(layer=1, attention=VIRTUAL)}
ATTENTION["moe"] = ATTENTION["gqa"]
PROMPTS = [[5, 17, 3], [1], [9, 9, 2, 40, 41, 7, 7]]


def model(attention, **changes):
    fields = {
        "layers": 2,
        "width": 16,
        "vocabulary_size": V,
        "feed_forward": SwiGLU(width=24),
        "numerics": Numerics(dtype="float32"),
    }
    return ModelConfig(attention=attention, **{**fields, **changes})


def named(name):
    return model(ATTENTION[name], **MODELS[name])


@functools.cache
def random(config):
    shapes = jax.eval_shape(config.build().init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    draw = np.random.default_rng(0)

    def about(path):
        return 1.0 if path[-1].key == "scale" else 0.0

    def fill(path, z):
        return jnp.float32(about(path) + 0.4 * draw.normal(size=z.shape))

    return jax.tree_util.tree_map_with_path(fill, nn.unbox(shapes))


@functools.cache
def decoder(name):
    return Decoder(named(name), random(named(name)))


def greedy(config, prompt, count):
    """The same by whole forward passes over a row of fixed length."""
    forward, row = jax.jit(config.build().apply), list(prompt)
    for _ in range(count):
        padded = jnp.array([row + [0] * (len(prompt) + count - len(row))])
        row.append(int(jnp.argmax(forward(random(config), padded)[0, len(row) - 1])))
    return row[len(prompt) :]


@pytest.mark.parametrize("name", ATTENTION)
def test_ragged_greedy_decoding_is_that_of_whole_forward_passes(name):
    rows = decoder(name).generate(PROMPTS, 12)
    assert rows == [greedy(named(name), prompt, 12) for prompt in PROMPTS]


FEW = ["everything", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gta", "gla", "moe"))]
CHUNK = 8


@pytest.mark.parametrize("name", FEW)
def test_a_prompt_in_chunks_gives_the_logits_and_the_cache_of_the_whole(name):
    """One row fills it, one begins in the first chunk and one in the last."""
    config, pad = named(name), np.array([0, 5, 19])
    tokens = np.random.default_rng(3).integers(0, V, (3, 3 * CHUNK))
    weights = unstack(config, random(config))
    run = jax.jit(functools.partial(prefill, config), static_argnums=(3, 4))
    (ours, cache), (expected, other) = (
        run(weights, tokens, pad, 32, chunk) for chunk in (CHUNK, None)
    )
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(other), strict=True):
        for row, first in enumerate(pad):
            rows = (np.split(np.asarray(z), 3)[row] for z in (a, b))
            left, right = (np.moveaxis(z, z.shape.index(32), 0)[first:] for z in rows)
            np.testing.assert_allclose(left, right, rtol=0, atol=1e-5 * np.abs(right).max())


@pytest.mark.parametrize("name", FEW)
def test_more_tokens_may_follow_at_any_slot(name):
    """Not at multiples of their number alone, which are all that a prompt in chunks asks for: the
    last block of keys may hold one key, or be whole."""
    config, pad, size = named(name), np.array([0, 2]), 4
    tokens = np.random.default_rng(3).integers(0, V, (2, 3 * size))
    weights = unstack(config, random(config))
    whole = jax.jit(functools.partial(prefill, config), static_argnums=3)
    more = jax.jit(functools.partial(extend, config))
    _, cache = whole(weights, tokens, pad, 16)
    for slot in range(size, 2 * size + 1):
        behind = 2 * size - slot
        padded = np.roll(tokens, behind, axis=1)  # of one length, so that one program makes them
        expected = whole(weights, padded, pad + behind, 16)[0]
        # what stands behind the slot is overwritten or not looked at
        ours, _ = more(weights, cache, tokens[:, slot : slot + size], jnp.int32(slot), pad)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_prompt_in_chunks_takes_no_more_memory_for_being_longer():
    """By XLA's count, what is neither weights nor cache."""
    config = named("everything")
    weights = jax.eval_shape(functools.partial(unstack, config), random(config))
    pad = jax.ShapeDtypeStruct((3,), jnp.int32)

    def temporaries(length, chunk):
        tokens = jax.ShapeDtypeStruct((3, length), jnp.int32)
        run = jax.jit(lambda w, t, p: prefill(config, w, t, p, length + 32, chunk))
        return run.lower(weights, tokens, pad).compile().memory_analysis().temp_size_in_bytes

    few, many, whole = (temporaries(n * CHUNK, c) for n, c in ((4, CHUNK), (16, CHUNK), (16, None)))
    assert few == many < whole


@pytest.mark.slow
def test_prompts_of_one_number_of_chunks_share_what_is_compiled():
    drawn = np.random.default_rng(4).integers(0, V, 64).tolist()
    chunked = Decoder(named("moe"), random(named("moe")), prompt_chunk=32)
    for rows in ([drawn[:40], drawn[:3]], [drawn, drawn[:33]]):
        assert chunked.generate(rows, 4) == decoder("moe").generate(rows, 4)
    assert chunked._start._cache_size() == 1
    with pytest.raises(
        ValueError, match="prompt_chunk: must be a positive multiple of 32, found 8"
    ):
        Decoder(named("moe"), random(named("moe")), prompt_chunk=8)


def placed(config, mesh):
    """Its random variables on the mesh."""
    shapes = jax.eval_shape(config.build().init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    return jax.device_put(random(config), tree_shardings(shapes, mesh))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gqa", "gta", "moe", "everything"])
def test_a_model_over_several_devices_generates_the_same(name):
    """Also in a conversation; none of them holds all of the weights."""
    config = named(name).replace(vocabulary_size=64)
    mesh = make_mesh(MeshConfig(model=4), jax.devices()[:4])
    many = Decoder(config, placed(config, mesh), mesh=mesh)
    expected = Decoder(config, random(config)).generate(PROMPTS, 10)
    assert many.generate(PROMPTS, 10) == expected
    assert sum(Session(many, 64).stream(PROMPTS[0], 10), []) == expected[0]
    leaves = jax.tree.leaves(many.weights)
    held = sum(leaf.addressable_shards[0].data.size for leaf in leaves)
    assert held < 0.6 * sum(leaf.size for leaf in leaves)


def test_a_mesh_that_splits_rows_is_refused():
    mesh = make_mesh(MeshConfig(data=2), jax.devices()[:2])
    with pytest.raises(ValueError, match="mesh: splits rows over 2 devices"):
        Decoder(named("gqa"), random(named("gqa")), mesh=mesh)


def test_streaming_yields_the_same_tokens_in_pieces():
    pieces = list(decoder("gqa").stream(PROMPTS, 12, chunk=5))
    assert [piece.shape[1] for piece in pieces] == [1, 5, 5, 1]
    assert np.concatenate(pieces, axis=1).tolist() == decoder("gqa").generate(PROMPTS, 12)


TEXT = "def naïve(größe): # 長さ 🙂🙂 — ok\n    return 'é' * größe\n\nclass Ω: ...\n"


class Bytes:
    """A byte tokenizer, and what the tests know of its text."""

    end_of_document = 256
    decode = staticmethod(ByteTokenizer().decode)


def spelt(ids, cuts, stops=()):
    """(pieces in the order in which they are shown, the continuation) of ids, whose first part is
    the prompt."""
    prompt, *parts = np.split(ids, sorted(cuts))
    text = Continuation(Bytes, prompt.tolist(), stops)
    pieces = [text.take()]
    for part in parts:
        text.add(part.tolist())
        pieces.append(text.take())
    text.finish()
    return [*pieces, text.take()], text


def test_no_split_of_a_text_shows_a_part_of_a_character():
    ids, draw = np.frombuffer(TEXT.encode(), np.uint8), np.random.default_rng(0)
    for _ in range(300):
        pieces, _ = spelt(ids, draw.integers(0, len(ids) + 1, draw.integers(1, 9)))
        assert "".join(pieces) == TEXT and not any("\ufffd" in piece for piece in pieces)
    invalid = np.frombuffer("é".encode() + b"\xff\xe9a\xc3", np.uint8)
    for cut in range(len(invalid)):  # what is no text is shown as such once that is known
        assert "".join(spelt(invalid, [cut])[0]) == "é\ufffd\ufffda\ufffd"


STOPS = [("größe", "\n\n"), ("🙂🙂 ", "🙂"), ("\nclass", "\n\nclass", "zzz"), ("e", "eturn")]


@pytest.mark.parametrize("stops", STOPS)
def test_a_stop_ends_the_text_however_it_is_split(stops):
    """Before the first one to be whole, as characters one by one show; none begins in the prompt,
    and nothing is shown that is taken back."""
    ids, draw = np.frombuffer(TEXT.encode(), np.uint8), np.random.default_rng(1)
    for _ in range(200):
        cuts = np.sort(draw.integers(0, len(ids) + 1, draw.integers(1, 9)))
        begins = len(TEXT.encode()[: cuts[0]].decode(errors="ignore"))
        whole = (n for n in range(begins, len(TEXT) + 1) if TEXT[begins:n].endswith(stops))
        end = next(whole, None)
        longest = max((len(s) for s in stops if end and TEXT[begins:end].endswith(s)), default=0)
        expected = TEXT if end is None else TEXT[: end - longest]
        pieces, text = spelt(ids, cuts, stops)
        assert "".join(pieces) == expected == text.text and text.done


def test_the_end_of_a_document_ends_the_text():
    text = Continuation(Bytes, [104], ("y",))
    text.add([105, 256, 121])
    assert (text.text, text.ids, text.done, text.take()) == ("hi", [105], True, "hi")


def test_a_row_stops_at_the_end_and_the_batch_when_all_have():
    free = decoder("gqa").generate(PROMPTS, 12)
    end = free[0][4]
    stopped = decoder("gqa").generate(PROMPTS, 12, end=end)
    assert stopped == [row[: row.index(end)] if end in row else row for row in free]
    assert sum(p.shape[1] for p in decoder("gqa").stream(PROMPTS[:1], 1000, end=end, chunk=8)) < 20


def test_the_likeliest_token_is_the_first_of_the_largest():
    logits = np.random.default_rng(5).integers(0, 4, (50, V)).astype(np.float32)
    tokens = sample(jnp.asarray(logits), jax.random.key(0), Sampling())
    np.testing.assert_array_equal(tokens, np.argmax(logits, axis=-1))


def test_sampling_stays_within_top_k_and_top_p_and_follows_the_seed():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, axis=0)

    def drawn(**settings):
        return (
            np.bincount(sample(logits, jax.random.key(1), Sampling(**settings)), minlength=4) / 4000
        )

    np.testing.assert_allclose(drawn(temperature=1.0), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    np.testing.assert_allclose(drawn(temperature=1.0, top_k=2), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(drawn(temperature=1.0, top_p=0.75), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(drawn(temperature=1.0, top_p=0.1), [1, 0, 0, 0])
    np.testing.assert_allclose(
        drawn(temperature=0.5), np.square([0.5, 0.3, 0.15, 0.05]) / 0.365, atol=0.03
    )
    np.testing.assert_allclose(drawn(temperature=1.0, top_k=99), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    hot = {"sampling": Sampling(temperature=5.0)}
    one, again, other = (
        decoder("gqa").generate(PROMPTS, 12, seed=seed, **hot) for seed in (3, 3, 4)
    )
    assert one == again != other


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature: must be at least 0"),
        ({"top_k": 3}, "top_k: does nothing with temperature=0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p: must be in"),
        ({"temperature": 1.0, "top_k": 0}, "top_k: must be at least 1"),
    ],
)
def test_sampling_that_cannot_work_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**settings)


@pytest.mark.parametrize(
    ("prompts", "count", "message"),
    [
        ([], 3, "there is none"),
        ([[1], []], 3, r"prompts\[1\]: is empty"),
        ([[1, V]], 3, "found 1 to 61"),
        ([[1]], 0, "at least 1, found 0"),
    ],
)
def test_prompts_that_cannot_be_decoded_are_refused(prompts, count, message):
    with pytest.raises(ValueError, match=message):
        decoder("gqa").generate(prompts, count)


@pytest.mark.parametrize("name", ATTENTION)
def test_the_cache_holds_what_the_accounting_says(name):
    config = named(name)
    cost, slots = account(config, 64), 32
    tokens, pad = jax.ShapeDtypeStruct((3, 8), jnp.int32), jax.ShapeDtypeStruct((3,), jnp.int32)
    weights = jax.eval_shape(functools.partial(unstack, config), random(config))
    logits, cache = jax.eval_shape(
        lambda w, t, p: prefill(config, w, t, p, slots), weights, tokens, pad
    )
    chex.assert_shape(logits, (3, V))
    assert sum(leaf.size for leaf in jax.tree.leaves(cache)) == 3 * slots * cost.cache_floats


def step_flops(attention):
    """XLA's count for one token in two rows."""
    config = model(attention, width=64, feed_forward=SwiGLU(width=128))
    variables = jax.eval_shape(config.build().init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    if isinstance(attention.query, KnockingLinear):
        variables = jax.eval_shape(lambda v: fold_model(config, v)[1], nn.unbox(variables))
        config = config.replace(attention=AttentionConfig(projection=attention.projection))
    weights = jax.eval_shape(functools.partial(unstack, config), nn.unbox(variables))
    ids, slot = jax.ShapeDtypeStruct((2,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    _, cache = jax.eval_shape(
        lambda w, t, p: prefill(config, w, t, p, 64),
        weights,
        jax.ShapeDtypeStruct((2, 8), jnp.int32),
        ids,
    )
    return (
        jax.jit(functools.partial(extend, config))
        .lower(weights, cache, jax.ShapeDtypeStruct((2, 1), jnp.int32), slot, ids)
        .compile()
        .cost_analysis()["flops"]
    )


def test_folded_decoding_costs_exactly_the_baseline_and_an_mlp_its_matrices_for_one_token():
    plain = AttentionConfig(projection=GroupedQuery(query_heads=4, kv_heads=2, head_dim=64))
    baseline, linear, mlp = (
        step_flops(plain.replace(**slots)) for slots in ({}, LINEAR, {"value": KnockingMLP()})
    )
    assert linear == baseline
    # rows, layers, heads, multiply-adds of three matrices
    matrices = 2 * 2 * plain.projection.kv_heads * 2 * 3 * 64**2
    # what is above one: the gate's sigmoid and product
    assert 1 <= (mlp - baseline) / matrices < 1.03


SMALL = (
    "--config.steps=4",
    "--config.batch_size=4",
    "--config.seq_len=64",
    "--config.model.layers=2",
    "--config.model.width=32",
    "--config.model.attention.projection.head_dim=8",
    "--config.model.feed_forward.width=64",
    "--config.evaluation.every=0",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a short run of KHA-Linear, and the cache that all commands share."""
    base = tmp_path_factory.mktemp("runs")
    code, _, err = command(
        base, "train", "--config=configs/kha_tiny.py:linear", *SMALL, f"--workdir={base / 'linear'}"
    )
    assert code == 0, err
    return base


def command(base, name, *arguments):
    environment = {**os.environ, "KHA_JAX_CACHE": str(base / "cache"), "XLA_FLAGS": ""}
    line = [sys.executable, "-m", f"experiments.{name}", *map(str, arguments)]
    done = subprocess.run(
        line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout, done.stderr


def test_a_folded_run_is_a_baseline_that_generates_the_same(runs):
    code, out, err = command(
        runs, "convert", "fold", f"--workdir={runs / 'linear'}", f"--out={runs / 'folded'}"
    )
    assert code == 0 and "folded query, key, value: largest logit change" in out, err
    assert json.loads((runs / "folded" / "config.json").read_text())["model"]["attention"][
        "query"
    ] == {"kind": "none"}
    flags = ("--tokens=20", "--prompt=def f(", "--prompt=é")
    texts = []
    for folder, said in (
        ("linear", "folded linear mixers of query, key, value"),
        ("folded", "step 4"),
    ):
        code, out, err = command(runs, "generate", f"--workdir={runs / folder}", *flags)
        assert code == 0 and said in err, err
        texts.append(out)
    assert texts[0] == texts[1] and texts[0].startswith("--- 'def f('\ndef f(")
    again = (
        "--config=configs/kha_tiny.py:baseline",
        *SMALL,
        "--config.steps=5",
        "--allow_changes=steps",
    )
    code, out, err = command(runs, "train", *again, f"--workdir={runs / 'folded'}")
    assert code == 0 and "resuming after step 4" in out, err
    refused = {
        ("fold", f"--workdir={runs / 'folded'}", f"--out={runs / 'other'}"): "nothing to fold; no",
        ("fold", f"--workdir={runs / 'linear'}", f"--out={runs / 'folded'}"): "already holds",
        ("fodl",): "did you mean 'fold'?",
    }
    one_line(runs, "convert", refused)


def one_line(runs, name, refused):
    """refused: arguments -> what the line says."""
    results = run_all([(name, list(arguments)) for arguments in refused], runs / "cache")
    for message, (code, _, err, _) in zip(refused.values(), results):
        assert code == 2 and message in err and len(err.strip().splitlines()) == 1, err


def test_one_prompt_streams_and_bad_ones_are_one_line(runs):
    sampled = ("--prompt=é", "--tokens=20", "--temperature=1", "--nofold")
    code, out, err = command(runs, "generate", f"--workdir={runs / 'linear'}", *sampled)
    assert code == 0 and out.startswith("é") and "20 new tokens" in err, err
    stop = next(character for character in out[3:] if character.isascii() and character != "\n")
    stopped = (*sampled, f"--stop={stop}", "--stop=nowhere")
    code, cut, err = command(runs, "generate", f"--workdir={runs / 'linear'}", *stopped)
    assert code == 0 and cut == out[: out.index(stop, 1)] + "\n", err
    linear, none = f"--workdir={runs / 'linear'}", f"--workdir={runs / 'none'}"
    refused = {
        (linear, "--prompt="): "--prompt: is empty",
        (linear, "--prompt=a", "--stop="): "--stop: is empty",
        (none, "--prompt=a"): "no run there",
        (linear, "--prompt=a", "--step=3"): "step 3 is not kept",
    }
    one_line(runs, "generate", refused)


def test_a_compression_that_cannot_be_says_which_flag_and_writes_nothing(runs):
    (runs / "file").write_text("no folder")
    said = {
        ("--kv_heads=9",): "--kv_heads=9: must be 1 to 4, the heads that there are, found 9",
        ("--kv_heads=2", "--layers=7-"): "--layers=7-: must be below layers=2, found 7",
        ("--kv_heads=1", "--tolerance=0.001"): "--tolerance=0.001: a logit changes by ",
        ("--kv_heads=9", f"--out={runs / 'file' / 'a'}"): "/file/a cannot be written: Not a dir",
    }
    given = "compress", f"--workdir={runs / 'linear'}", f"--out={runs / 'none'}"
    one_line(runs, "convert", {(*given, *more): message for more, message in said.items()})
    assert not (runs / "none").exists()


@pytest.mark.slow
def test_a_compressed_run_trains_on_and_says_what_its_cache_takes(runs):
    code, out, err = command(
        runs,
        *("convert", "compress", f"--workdir={runs / 'linear'}"),
        *("--kv_heads=2", "--layers=1-", f"--out={runs / 'fewer'}"),
    )
    assert code == 0 and "a token's cache takes 400 bytes, before 512 (78.1%)" in out, err
    assert re.search(r"warning: the logits change by \d+% of their spread", err), err
    settings = re.search(r"add (--workdir=.*)", out)[1].split()
    again = ("--config=configs/kha_tiny.py:linear", *SMALL, "--allow_changes=steps")
    code, out, err = command(runs, "train", *again, *settings, "--config.steps=5")
    assert code == 0 and "resuming after step 4" in out, err
    code, out, err = command(
        runs, "generate", f"--workdir={runs / 'fewer'}", "--prompt=def", "--tokens=4"
    )
    assert code == 0 and "a token's cache takes 400 bytes" in err, err
