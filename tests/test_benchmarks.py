"""Benchmarks: what lm-eval is answered, by arithmetic and beside its own back end for Hugging Face
models; bootstrap; the paper's table."""

import json
from collections import defaultdict
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from experiments.cli.codes import UsageError
from experiments.evaluating import adapter, scores, tables, tasks
from experiments.evaluating.models import Asked
from kha_jax.config import to_dict
from kha_jax.data import tokenizer_files, tokenizers
from kha_jax.errors import DataError
from kha_jax.inference.decoding import Decoder
from kha_jax.inference.scoring import Scorer
from kha_jax.mesh import make_mesh
from kha_jax.runs.checkpoint import Checkpoints
from kha_jax.storage import write_json
from kha_jax.training.run_config import RunConfig
from kha_jax.training.run_folder import config_hash
from kha_jax.training.step import make_trainer
from tests.commands import run_all
from tests.test_evaluate import born, drawn
from tests.test_scoring import bigrams, log_p

# ---------------------------------------------------------------- answers known by arithmetic
CHAIN = np.array([[0.1, 0.7, 0.1, 0.1], [0.1, 0.1, 0.7, 0.1], [0.7, 0.1, 0.1, 0.1], [0.25] * 4])


class Letters:
    """Four tokens, of which one is two letters and one ends a text."""

    spelt, ends, prefix, template = ["a", "bc", "d", ""], (3,), 3, None

    def encode(self, text, special=None):
        return [i for letter in text for i, own in enumerate(self.spelt) if letter == own[:1]]

    def decode(self, ids):
        return "".join(self.spelt[i] for i in ids)


class Base:
    """lm-eval's TemplateLM as far as it is asked here."""

    def loglikelihood(self, requests, disable_tqdm):
        encoded = [[self.tok_encode(part) for part in request.args] for request in requests]
        return self._loglikelihood_tokens([(None, *pair) for pair in encoded])


class Letterwise(adapter.Answers, Base):
    pass


def answers(max_length=16, **table):
    model = bigrams(**table)
    scorer = Scorer(*model, max_length=max_length)
    fields = {"max_length": max_length, "scorer": scorer, "decoder": Decoder(*model)}
    return Letterwise(SimpleNamespace(workdir="runs/a", dialect=Letters(), **fields))


def ask(*arguments):
    return [SimpleNamespace(args=given) for given in arguments]


def test_log_probabilities_are_those_of_the_table():
    """Behind an empty context, of an empty continuation, and in windows."""
    ours = answers(4)
    found = ours.loglikelihood(ask(("ab", "bd"), ("", "ab"), ("d", ""), ("", "")))
    expected = [log_p(1, 1, 2), log_p(3, 0, 1), 0, 0]
    np.testing.assert_allclose([f[0] for f in found], expected, atol=1e-5)
    assert [f[1] for f in found] == [False, False, False, False]
    text = "abbdabbdabd"
    whole, nothing = ours.loglikelihood_rolling(ask((text,), ("",)))
    assert whole == pytest.approx(log_p(3, *Letters().encode(text)), abs=1e-5) and nothing == 0
    with pytest.raises(DataError, match="a continuation of 5 tokens is longer than the 4 that"):
        ours.loglikelihood(ask(("a", "abdab")))


def test_texts_stop_where_the_first_stop_is_whole(monkeypatch):
    """Also inside a token; after so many; in the order asked; in rounds of two tokens."""
    monkeypatch.setattr(adapter, "ROUND", 2)
    ours = answers(table=CHAIN)
    how = {"max_gen_toks": 5}
    requests = ask(
        ("a", {**how, "until": "c"}),
        ("aabd", {**how, "until": ["da", "zz"]}),
        ("d", {**how, "until": ["cd"]}),
        ("b", how),
        ("abdabdabdabdabd", {**how, "until": ["c"]}),
    )
    assert ours.generate_until(requests) == ["b", "abc", "ab", "dabcda", "ab"]
    assert (ours.generated, ours.cut) == (5, 1)
    with pytest.raises(UsageError, match="asks for 16 new tokens, the model reads 16"):
        ours.generate_until(ask(("a", {"max_new_tokens": 16})))


def test_texts_of_many_lengths_compile_little_and_keep_their_order():
    """Each as it would be alone, however the last batch is filled."""
    ours, draw = answers(128, table=CHAIN), np.random.default_rng(0)
    ours.asked.scorer.batch_tokens = 400
    follows = {"a": "bcda", "b": "dabc", "d": "abcd"}
    ends = draw.choice(list(follows), 25).tolist()
    prompts = ["a" * int(draw.integers(0, 60)) + end for end in ends]
    found = ours.generate_until(ask(*((p, {"max_gen_toks": 3, "until": []}) for p in prompts)))
    assert found == [follows[end] for end in ends]
    assert ours.asked.decoder._start._cache_size() == len(ours.shapes) == 1


def test_batches_of_texts_are_as_large_as_they_are_computed():
    """Within batch_tokens, at the columns that the decoder makes of their prompts."""
    ours, lengths = answers(2048), (20, 300, 600, 1020, 1030, 1500)
    ours.asked.scorer.batch_tokens = 8000
    going = [SimpleNamespace(prompt=range(n), ids=range(3)) for n in lengths for _ in range(9)]
    for tokens in (44, 128):
        batches = list(ours._batches(going, adapter.Asking((), tokens, adapter.Sampling())))
        assert sum(len(batch) for _, batch in batches) == len(going)
        for shape, batch in batches:
            columns = ours.asked.decoder.columns(shape.prefix)
            assert columns >= max(len(one.prompt) + 3 for one in batch)
            assert shape.rows * (columns + tokens) <= 8000


@pytest.mark.parametrize(
    ("said", "temperature"),
    [
        ({}, 0),
        ({"temperature": 0.7}, 0.7),
        ({"temperature": 0.7, "do_sample": False, "top_p": 0.9}, 0),
        ({"do_sample": True}, 1),
        ({"do_sample": True, "temperature": 0.0, "top_k": 3}, 0),
        ({"temperature": 0.0, "top_p": 0.95}, 0),
    ],
)
def test_what_is_drawn_is_what_a_task_says(said, temperature):
    """As lm-eval reads generation_kwargs; the likeliest token is never drawn among others."""
    assert answers()._asking({**said, "max_gen_toks": 2}).sampling.temperature == temperature


# ---------------------------------------------------------------- statistics
def sample(task, values, metric="acc"):
    return {
        task: [
            {
                "filter": "none",
                "metrics": [metric, "text"],
                metric: v,
                "text": "x",
                "doc_hash": str(i),
            }
            for i, v in enumerate(values)
        ]
    }


def measured(samples, aggregation="mean"):
    """scores.measured where all metrics are aggregated in one way."""
    return scores.measured(samples, defaultdict(lambda: defaultdict(lambda: aggregation)))


def test_intervals_are_those_of_the_normal_distribution():
    """Of a mean of many; paired where documents are answered alike; ratios of sums."""
    draw = np.random.default_rng(0)
    first = draw.random(400) < 0.6
    second = first ^ (draw.random(400) < 0.1)
    (one,), (other,) = (measured(sample("t", v)).values() for v in (first, second))
    wide = 1.96 * np.std(first) / 20
    assert one.score == first.mean() and (one.task, one.metric) == ("t", "acc")
    np.testing.assert_allclose(
        scores.interval(one), first.mean() + np.array([-wide, wide]), atol=0.01
    )
    narrow = 1.96 * np.std(second.astype(float) - first) / 20
    low, high = scores.interval(one, other)
    assert high - low == pytest.approx(2 * narrow, rel=0.1) and high - low < 0.7 * 2 * wide
    pairs = [(-8.0, 2), (-2.0, 2)]
    for how, score in (("bits_per_byte", 2.5 / np.log(2)), ("weighted_perplexity", np.exp(2.5))):
        (found,) = measured(sample("t", pairs), how).values()
        assert found.score == pytest.approx(score)
    with pytest.raises(DataError, match="--tasks=t: the two runs were not asked the same"):
        scores.interval(one, one._replace(documents=one.documents[1:]))


def test_scores_are_made_as_the_task_makes_them():
    """By lm-eval's own functions and by others: also where each document's value is a pair that is
    no (log-probability, weight), or a log-probability."""
    pytest.importorskip("lm_eval", reason="needs the extra: pip install -e '.[eval]'")
    from lm_eval.api import metrics

    draw = np.random.default_rng(0)
    values = {
        "mean": draw.random(30).tolist(),
        "perplexity": (-draw.random(30)).tolist(),
        "weighted_perplexity": [(-3.0 * n, n) for n in draw.integers(1, 9, 30).tolist()],
        "bits_per_byte": [(-3.0 * n, n) for n in draw.integers(1, 9, 30).tolist()],
        "matthews_corrcoef": draw.integers(0, 2, (30, 2)).tolist(),
        "median": draw.random(30).tolist(),
    }
    assert set(scores.SCORES) < set(values)
    for name, some in values.items():
        (found,) = measured(sample("t", some), getattr(metrics, name)).values()
        assert found.score == pytest.approx(getattr(metrics, name)(some)), name
        assert (found.aggregation == name) == (name in scores.SCORES)
        low, high = scores.interval(found)
        assert low <= found.score <= high, name


def test_a_group_is_all_of_its_documents():
    found = measured(sample("a", [1, 0, 0]) | sample("b", [1]))
    pooled = scores.pooled(found, "both", ["a", "b"])
    assert pooled["both", "acc"].score == 0.5 and len(pooled["both", "acc"].documents) == 4


def text_of(table):
    return [[str(cell) for cell in column.cells] for column in table.columns]


def test_the_papers_table_has_its_averages():
    """As printed in table 4; ours over what was run."""
    lines = tasks.paper()
    found = {}
    for task, values in (("arc_challenge", [1, 0]), ("piqa", [1, 1])):
        found |= measured(sample(task, values, "acc_norm"))
    table = tables.of_paper(lines, [tables.Run("a", found)], {"piqa": 3})
    rows = [cells for cells in zip(*text_of(table)) if cells[1] == "Average"]
    assert [row[4:7] for row in rows] == [
        ("57.24", "57.47", "+0.23"),
        ("42.76", "42.34", "-0.42"),
        ("65.48", "69.81", "+4.32"),
        ("38.23", "42.13", "+3.90"),
        ("48.38", "50.00", "+1.62"),
        ("49.13", "50.39", "+1.25"),
    ]
    assert [row[7] for row in rows] == ["75.00", "-", "-", "-", "-", "75.00"]
    begun = tables.as_json([tables.Run("a", found), tables.Run("b", {})], {})
    assert [list(row["scores"]) for row in begun] == [["a"], ["a"]]


# ---------------------------------------------------------------- local tasks
QUESTIONS = [
    {
        "q": f"Item {i} of {'many ' * (i % 5)}is",
        "choices": ["red", "blue green", f"{i}"],
        "gold": i % 3,
    }
    for i in range(9)
]
TEXTS = [{"text": "Small words. " * n} for n in (1, 4, 9)]
YAML = {
    "choose": """output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
metric_list:
  - metric: acc
  - metric: acc_norm""",
    "write": """output_type: generate_until
num_fewshot: 1
fewshot_split: test
doc_to_text: "Q: {{q}}\\nA:"
doc_to_target: "{{choices[gold]}}"
generation_kwargs:
  until: ["e", "\\n"]
  max_gen_toks: 12
metric_list:
  - metric: exact_match""",
    "read": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte""",
}


def local_tasks(folder):
    """A folder with a task of each kind, and their documents."""
    folder.mkdir()
    for name, content in YAML.items():
        rows = TEXTS if name == "read" else QUESTIONS
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = f"dataset_path: json\ndataset_kwargs:\n  data_files: {{test: {folder}/{name}.jsonl}}"
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{data}\ntest_split: test\n{content}\n")
    return folder


def byte_tokenizer(folder):
    """A tokenizer.json of bytes with some merges, a token that begins texts and one that ends
    them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<bos>"]
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=special, initial_alphabet=alphabet)
    made.train_from_iterator([q["q"] for q in QUESTIONS] + [t["text"] for t in TEXTS], trainer)
    made.save(str(folder / "tokenizer.json"))
    words = {"bos_token": "<bos>", "eos_token": "<|endoftext|>"}
    write_json(folder / "tokenizer_config.json", words)
    return words


def stock_pair(folder):
    """(a run of ours, the same model of transformers, its tokenizer)."""
    import torch
    import transformers

    from tests import test_interop as interop

    stock = folder / "run" / "stock"
    stock.mkdir(parents=True)
    words = byte_tokenizer(stock)
    config = transformers.Qwen3Config(
        vocab_size=296,
        hidden_size=interop.D,
        intermediate_size=interop.F,
        num_hidden_layers=interop.LAYERS,
        num_attention_heads=interop.N,
        num_key_value_heads=interop.K,
        head_dim=interop.H,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )
    torch.manual_seed(0)
    theirs = transformers.Qwen3ForCausalLM(config).float().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    spelt = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(stock / "tokenizer.json"), **words
    )
    model = interop.ours().config.replace(vocabulary_size=296)
    ours = RunConfig(seq_len=64, model=model)
    trainer = make_trainer(ours, make_mesh(ours.mesh, jax.devices()[:1]))
    state = drawn(trainer.abstract, 0)._replace(params=interop.params_from(theirs))
    write_json(folder / "run" / "config.json", to_dict(ours))
    tokenizer_files.keep(folder / "run", tokenizers.load(stock, end="<|endoftext|>"))
    about = {"config": config_hash(ours), "tokenizer": "bytes-v1"}
    with Checkpoints(folder / "run" / "checkpoints", about=lambda step: about) as checkpoints:
        checkpoints.save(0, state)
    return str(folder / "run"), theirs, spelt


@pytest.mark.slow
def test_scores_are_those_of_lm_evals_own_back_end(tmp_path, monkeypatch):
    """On a random stock model: choices, texts, log-probabilities, and every metric."""
    for name in ("torch", "transformers", "lm_eval", "accelerate", "tokenizers"):
        pytest.importorskip(name, reason="needs the extras eval, hf and interop")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tasks.check()
    from lm_eval.models.huggingface import HFLM

    folder, theirs, spelt = stock_pair(tmp_path)
    asked = Asked(folder, batch_tokens=512)
    assert asked.dialect.prefix == spelt.bos_token_id == 1
    loaded = tasks.load(list(YAML), local_tasks(tmp_path / "tasks"))
    found = []
    for lm in (
        adapter.model(asked),
        HFLM(pretrained=theirs, tokenizer=spelt, max_length=64, batch_size=2, device="cpu"),
    ):
        found.append(tasks.run(lm, loaded, None, None, False))
    ours, expected = found
    assert asked.scorer.counts.truncated == 0 and tasks.shots_of(loaded)["write"] == 1
    for task in YAML:
        for a, b in zip(ours[task], expected[task], strict=True):
            assert a["doc_hash"] == b["doc_hash"] and a["prompt_hash"] == b["prompt_hash"]
            if task == "write":
                assert a["resps"] == b["resps"]
                continue
            values = [np.array(z["resps"], float)[..., :1].ravel() for z in (a, b)]
            np.testing.assert_allclose(*values, rtol=0, atol=1e-3 if task == "read" else 1e-4)
    a, b = (scores.measured(samples, tasks.aggregations(loaded)) for samples in found)
    assert a.keys() == b.keys() and len(a) == 5
    for key in a:
        assert a[key].score == pytest.approx(b[key].score, rel=1e-4), key


@pytest.mark.slow
def test_the_command_runs_local_tasks_and_refuses_in_one_line(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="needs the extra: pip install -e '.[eval]'")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for seed, name in enumerate("ab"):
        born(tmp_path / name, seed)
    include, out = local_tasks(tmp_path / "tasks"), tmp_path / "out.json"
    a, own = f"--workdir={tmp_path}/a", f"--include={include}"
    both = f"{a},{tmp_path}/b", "--tasks=choose,write", own, f"--out={out}", "--max_context=200"
    both += ("--shots=2",)
    (include / "gone.yaml").write_text(
        (include / "choose.yaml").read_text().replace("choose", "gone")
    )
    said = {
        both: (0, "choose"),
        (a, "--tasks=chose", own): (2, "--tasks=chose: is no task; did you mean 'choose'?"),
        (a, "--tasks=gone", own): (65, "--tasks=gone: cannot be loaded, nor its data fetched"),
        (a, "--tasks=piqa"): (65, "--tasks=piqa: cannot be loaded"),
        (a, "--tasks=choose", "--include=nowhere"): (2, "--include=nowhere: is no folder"),
        (a, "--tasks=choose", own, "--limit=0"): (2, "limit"),
        (a, "--tasks=choose", own, "--chat"): (2, "has no chat template; leave it out"),
        (a, "--tasks=", own): (2, "--tasks: is empty"),
        (a, "--text=x", "--shots=1"): (2, "--shots: does nothing without --tasks"),
    }
    cases = [("evaluate", list(arguments)) for arguments in said]
    for (code, message), result in zip(said.values(), run_all(cases, tmp_path / "cache")):
        assert result.code == code and message in result.out + result.err, result
        assert "Traceback" not in result.err and result.err.count("error: ") == bool(code), result
    rows = json.loads(out.read_text())
    found = {row["metric"]: row for row in rows["tasks"]}
    assert set(found) == {"acc", "acc_norm", "exact_match"} and found["acc"]["documents"] == 9
    assert {row["shots"] for row in rows["tasks"]} == {2}
    assert set(found["acc"]["scores"]) == {f"{tmp_path}/a", f"{tmp_path}/b"}
    low, high = found["acc"]["difference"]["interval"]
    assert low <= found["acc"]["difference"]["score"] <= high
