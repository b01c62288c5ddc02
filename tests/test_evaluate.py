"""What evaluate says of runs: texts here, benchmarks and code in files of their own."""

import json
import math
import re

import jax
import numpy as np
import pytest

from experiments.cli import alone
from experiments.cli.codes import UsageError
from experiments.evaluating import texts
from experiments.evaluating.models import Asked
from kha_jax.attention import AttentionConfig
from kha_jax.attention.mixers import KnockingLinear
from kha_jax.attention.projections import GroupedQuery
from kha_jax.config import to_dict
from kha_jax.data import shard_writer
from kha_jax.data.tokenizers import ByteTokenizer
from kha_jax.errors import DataError
from kha_jax.feed_forward import SwiGLU
from kha_jax.mesh import make_mesh
from kha_jax.model import ModelConfig
from kha_jax.modules import Numerics
from kha_jax.runs import cluster
from kha_jax.runs.checkpoint import Checkpoints
from kha_jax.storage import write_json
from kha_jax.training.run_config import RunConfig
from kha_jax.training.run_folder import config_hash
from kha_jax.training.step import make_trainer
from tests.commands import run_all

TEXT = "Größe: 長さ 🙂\n\n" + "def f(x):\n    return x\n" * 3


def born(folder, seed=0):
    """A run folder with a model of random weights, which reads bytes."""
    projection = GroupedQuery(query_heads=2, kv_heads=1, head_dim=8)
    model = ModelConfig(
        layers=1,
        width=16,
        vocabulary_size=264,
        attention=AttentionConfig(projection=projection, value=KnockingLinear()),
        feed_forward=SwiGLU(width=24),
        numerics=Numerics(dtype="float32"),
    )
    config = RunConfig(steps=3, seq_len=32, seed=seed, model=model)
    trainer = make_trainer(config, make_mesh(config.mesh, jax.devices()[:1]))
    folder.mkdir(parents=True)
    write_json(folder / "config.json", to_dict(config))
    about = {"config": config_hash(config), "tokenizer": ByteTokenizer.fingerprint}
    with Checkpoints(folder / "checkpoints", about=lambda step: about) as checkpoints:
        checkpoints.save(3, drawn(trainer.abstract, seed))
    return folder


def drawn(abstract, seed):
    """A state of random numbers, which compiles nothing."""
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda z: (0.4 * draw.normal(size=z.shape)).astype(z.dtype), abstract)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with two runs, a text, and that text as shards."""
    base = tmp_path_factory.mktemp("evaluate")
    for seed, name in enumerate("ab"):
        born(base / name, seed)
    (base / "text").write_text(TEXT)
    (base / "empty").write_text("")
    (base / "a.jsonl").write_text('{"text": "a"}')
    shards, tokenizer = base / "shards", ByteTokenizer()
    shards.mkdir()
    with shard_writer.ShardWriter(shards, "validation", 0, tokenizer) as writer:
        for part in (TEXT.encode(), b"", b"x"):
            writer.add(tokenizer.encode(part), len(part))
        shard_writer.write_meta(shards, tokenizer, {"validation": [writer.finish()]})
    return base


@pytest.fixture(scope="module")
def asked(runs):
    return Asked(str(runs / "a"), batch_tokens=256)


def by_hand(asked, ids, length, stride):
    """Nats of each token behind the tokens before it, one forward pass for each."""
    forward = jax.jit(asked.model.build().apply)
    text, out = [asked.dialect.prefix, *ids], []
    for at in range(1, len(text)):
        last = max(length, -(-(at - length) // stride) * stride + length)  # of its window
        context = text[max(0, min(last, len(text) - 1) - length) : at]
        padded = np.array([context + [0] * (length - len(context))])
        logits = forward(asked.variables, padded)[0, len(context) - 1]
        out.append(-float(jax.nn.log_softmax(logits)[text[at]]))
    return out


def test_a_text_is_predicted_token_by_token(asked, runs):
    """By windows as by hand; bits per byte count bytes and not tokens or characters."""
    found = texts.loss(asked, str(runs / "text"), 8)
    nats = by_hand(asked, list(TEXT.encode()), 32, 8)
    assert found.tokens == len(nats) == found.bytes
    assert found.loss == pytest.approx(np.mean(nats), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(np.mean(nats)), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(sum(nats) / math.log(2) / found.bytes, rel=1e-5)


def test_shards_are_scored_document_by_document(asked, runs):
    """Without what ends them; one of them is empty."""
    found = texts.loss(asked, str(runs / "shards"), None)
    alone = texts.loss(asked, str(runs / "text"), 16)
    (one,) = by_hand(asked, b"x", 32, 8)
    assert (found.tokens, found.bytes) == (alone.tokens + 1, alone.bytes + 1)
    assert found.loss * found.tokens == pytest.approx(alone.loss * alone.tokens + one, rel=1e-6)


def test_what_cannot_be_scored_says_why(asked, runs):
    meta = json.loads((runs / "shards" / "meta.json").read_text())
    other = runs / "others"
    other.mkdir()
    write_json(other / "meta.json", {**meta, "tokenizer": "somebody's"})
    with pytest.raises(DataError, match="written by the tokenizer somebody's, that of"):
        texts.loss(asked, str(other), None)
    with pytest.raises(DataError, match="empty: holds no text"):
        texts.loss(asked, str(runs / "empty"), None)
    with pytest.raises(DataError, match="holds no meta.json"):
        texts.loss(asked, str(runs), None)
    with pytest.raises(UsageError, match="--stride=33: is more than the 32 tokens that are read"):
        texts.loss(asked, str(runs / "text"), 33)


@pytest.mark.slow
def test_a_model_over_several_devices_says_the_same(asked, runs):
    many = Asked(str(runs / "a"), batch_tokens=256, devices=2)
    found, expected = (texts.loss(a, str(runs / "text"), 8) for a in (many, asked))
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    prompts = [list(b"def f("), list(b"x")]
    assert many.decoder.generate(prompts, 8) == asked.decoder.generate(prompts, 8)


def test_bad_command_lines_are_one_line(runs):
    a, text = f"--workdir={runs}/a", f"--text={runs}/text"
    said = {
        (a,): (2, "--text or --tasks: give one of them"),
        (a, "--text=nowhere"): (2, "--text=nowhere: is not there; name a file of text"),
        (a, f"--text={runs}/a.jsonl"): (2, "a.jsonl: holds records and not plain text"),
        (text,): (2, "--workdir: is required"),
        (f"{a},{runs}/a", text): (2, "name one run, or two different ones"),
        (a, text, "--devices=99"): (2, "--devices=99: there are 1"),
        (a, text, "--out=/nowhere/a"): (2, "--out=/nowhere/a cannot be written: No such file"),
        (a, text, f"--out={runs}/{'x' * 300}"): (2, "xx cannot be written: File name too long"),
        (a, "--text=nowhere", f"--out={runs}/none.json"): (2, "--text=nowhere: is not there"),
    }
    cases = [("evaluate", list(arguments)) for arguments in said]
    for (code, message), result in zip(said.values(), run_all(cases, runs / "cache")):
        assert result.code == code and message in result.err, result
        assert re.fullmatch("(folded .*\n)?error: .*\n", result.err), result
    assert not (runs / "none.json").exists()


def test_it_does_not_run_once_for_each_process_of_a_cluster(monkeypatch):
    here = cluster.Place("SLURM", "host:1", 4, 0)
    monkeypatch.setattr(cluster, "place", lambda seconds: here)
    with pytest.raises(UsageError, match="in one process, and SLURM has started 4; start it once"):
        alone.check("evaluate", "start it once")


@pytest.mark.slow
def test_the_command_compares_two_runs(runs):
    out = runs / "out.json"
    given = f"--workdir={runs}/a,{runs}/b", f"--text={runs}/text", f"--out={out}"
    (done,) = run_all([("evaluate", list(given))], runs / "cache")
    assert done.code == 0 and "bits per byte against" in done.out, done
    rows = json.loads(out.read_text())["runs"]
    assert [row["workdir"] for row in rows] == [f"{runs}/a", f"{runs}/b"]
    assert rows[0]["bits_per_byte"] != rows[1]["bits_per_byte"] and rows[0]["prefix"] == 256
