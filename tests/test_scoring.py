"""Log-probabilities of continuations: answers known by arithmetic, whole forward passes as the
reference, and what the batches cost."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kha_jax.attention import AttentionConfig
from kha_jax.attention.projections import GroupedQuery
from kha_jax.feed_forward import SwiGLU
from kha_jax.inference.rows import PROGRAMS, Request, Row, plan, rows_of, windows
from kha_jax.inference.scoring import Score, Scorer
from kha_jax.mesh import MeshConfig, make_mesh
from kha_jax.model import ModelConfig
from kha_jax.modules import Numerics
from tests.test_decoding import FEW, V, named, placed, random

# P[a, b]: the probability that b follows a, whatever stands before.
P = np.array([[0.5, 0.25, 0.125, 0.125], [0.1, 0.6, 0.2, 0.1], [0.25] * 4, [0.7, 0.1, 0.1, 0.1]])


def bigrams(table=P):
    """A model whose layers add nothing and whose next token has these probabilities."""
    attention = AttentionConfig(projection=GroupedQuery(query_heads=2, kv_heads=1, head_dim=4))
    config = ModelConfig(
        layers=1,
        width=4,
        vocabulary_size=4,
        embeddings="untied",
        attention=attention,
        feed_forward=SwiGLU(width=8),
        numerics=Numerics(dtype="float32"),
    )
    zeros = jax.tree.map(jnp.zeros_like, random(config))
    outer = {
        "embedding": 1e4 * jnp.eye(4),  # against the norm's epsilon
        "unembedding": jnp.log(table).T / 2,  # the norm makes ones of the width's root
        "final_norm": {"scale": jnp.ones(4)},
    }
    return config, {"params": {**zeros["params"], **outer}}


def log_p(*tokens):
    return sum(math.log(P[a, b]) for a, b in zip(tokens, tokens[1:]))


def close(found, expected):
    np.testing.assert_allclose([s[0] for s in found], [s[0] for s in expected], atol=1e-5)
    assert [s.greedy for s in found] == [s[1] for s in expected]


def test_scores_are_those_of_the_table():
    """Alone and behind one context; of one token and of more; what is empty; in order."""
    scorer = Scorer(*bigrams(), max_length=8)
    requests = [
        Request([2, 0], [0, 0, 1]),
        Request([1], [1]),
        Request([3, 1], [1, 1]),
        Request([3, 1], [0]),
        Request([3, 1], [1]),
        Request([0, 0], []),
        Request([3], [0, 0]),
    ]
    expected = [
        (log_p(0, 0, 0, 1), False),
        (log_p(1, 1), True),
        (log_p(1, 1, 1), True),
        (log_p(1, 0), False),
        (log_p(1, 1), True),
        (0.0, False),
        (log_p(3, 0, 0), True),
    ]
    close(scorer.score(requests), expected)
    close(scorer.score(requests[::-1]), expected[::-1])
    assert scorer.score([]) == [] and scorer.counts.requests == 14
    assert scorer.counts.tokens == 2 * (4 + 1 + 3 + 2)  # [3, 1] and its one branch once


def test_a_text_in_windows_is_scored_token_by_token():
    """Three windows of four tokens, and of one behind three; a token is predicted from the one
    before it, the first from the one that is given."""
    text, scorer = [0, 1, 1, 2, 3, 0, 0, 1, 2, 2], Scorer(*bigrams(), max_length=4)
    for stride, sizes in ((None, [4, 4, 2]), (1, [4, *6 * [1]])):
        parts = list(windows(text, 3, 4, stride))
        assert [len(part.continuation) for part in parts] == sizes
        assert np.concatenate([part.continuation for part in parts]).tolist() == text
        begin = 0
        for part in parts:
            whole = [3, *text][begin + len(part.continuation) + 1 - 5 if begin else 0 :]
            assert [*part.context, *part.continuation] == whole[: min(5, len(part.context) + 4)]
            begin += len(part.continuation)
        scores = scorer.score(parts)
        assert sum(s.log_probability for s in scores) == pytest.approx(log_p(3, *text), abs=1e-5)
    assert list(windows([], 3, 4)) == []


def reference(config, requests, max_length):
    """By a whole forward pass for each request."""
    forward, out = jax.jit(config.build().apply), []
    for context, continuation in requests:
        whole = [*context, *continuation][-max_length - 1 :]
        padded = jnp.array([whole[:-1] + [0] * (max_length + 1 - len(whole))])
        logits = forward(random(config), padded)[0, len(whole) - 1 - len(continuation) :]
        logits = np.asarray(jax.nn.log_softmax(logits))[: len(continuation)]
        own = logits[np.arange(len(continuation)), list(continuation)]
        out.append(Score(own.sum(), (logits.argmax(-1) == continuation).all()))
    return out


def drawn(longest=20):
    """Contexts with one to four continuations, some of them too long, in any order."""
    draw = np.random.default_rng(7)
    requests = []
    for choices in (1, 4, 2, 1, 3):
        context = draw.integers(0, V, draw.integers(1, longest)).tolist()
        sizes = draw.integers(1, 7, choices)
        requests += [Request(context, draw.integers(0, V, n).tolist()) for n in sizes]
    return [requests[i] for i in draw.permutation(len(requests))]


@pytest.mark.parametrize("name", FEW)
def test_scores_are_those_of_whole_forward_passes(name):
    """Whatever is in one batch: contexts that are shared, of other lengths, and cut from the
    left."""
    config, requests = named(name), drawn()
    scorer = Scorer(config, random(config), max_length=16, batch_tokens=64)
    found, expected = scorer.score(requests), reference(config, requests, 16)
    np.testing.assert_allclose(
        [s[0] for s in found], [s[0] for s in expected], rtol=1e-5, atol=1e-4
    )
    assert [s.greedy for s in found] == [s.greedy for s in expected]
    assert 0 < scorer.counts.truncated < len(requests) and scorer.counts.programs == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gqa", "everything"])
def test_a_model_on_a_mesh_scores_as_on_one_device(name):
    """Of which each holds a part of the heads, the feed-forward width and the vocabulary, or
    computes all queries where heads meet and lengths do not divide."""
    config, requests = named(name).replace(vocabulary_size=64), drawn()
    mesh = make_mesh(MeshConfig(data=2, model=4))
    one = Scorer(config, random(config), max_length=64).score(requests)
    many = Scorer(config, placed(config, mesh), max_length=64, mesh=mesh).score(requests)
    np.testing.assert_allclose([s[0] for s in many], [s[0] for s in one], rtol=1e-5)
    assert [s.greedy for s in many] == [s.greedy for s in one]


def shapes_of(batches):
    return {shape for shape, _ in batches}


@pytest.mark.parametrize(("choices", "longest", "most"), [(1, 2000, 9), (4, 2000, 9), (4, 100, 30)])
def test_little_is_padded_and_few_shapes_are_compiled(choices, longest, most):
    """Contexts from 20 tokens on, fewer than `most` are scored: less than 12% is padding, of short
    questions less than a quarter, as there contexts and answers vary alike. Every request is in one
    row, and no batch has more tokens than are asked for."""
    draw = np.random.default_rng(0)
    requests = [
        Request(np.full(length, at), np.zeros(draw.integers(1, most), int))
        for at, length in enumerate(draw.integers(20, longest + 1, 300))
        for _ in range(choices)
    ]
    rows = rows_of(list(enumerate(requests)))
    for multiple in (1, 4):
        batches = plan(rows, 16384, multiple)
        assert sorted(id(r) for _, batch in batches for r in batch) == sorted(map(id, rows))
        assert len(shapes_of(batches)) <= PROGRAMS
        assert max(shape.tokens for shape, _ in batches) <= 16384
        assert all(len(batch) <= s.rows and s.rows % multiple == 0 for s, batch in batches)
        real = sum(len(row.prefix) + row.branched for row in rows)
        padded = sum(shape.tokens for shape, _ in batches)
        assert multiple > 1 or real / padded > (0.88 if longest > 100 else 0.75)
    once = sum(len(context) for context, _ in requests[::choices])
    assert real < once + (most - 1) * len(requests)


def test_a_row_that_fits_nowhere_is_a_batch_alone():
    rows = [Row([1] * 100, [], []), Row([1] * 10, [], [])]
    (first, _), (second, _) = plan(rows, 64)
    assert (first.rows, first.prefix, second.rows) == (1, 104, 1)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (([], [1]), "the context is empty"),
        (([1], [1] * 9), "a continuation of 9 tokens is longer than the 8"),
        (([1], [4]), r"ids must be in \[0, 4\), found 4 to 4"),
        (([-1], [1]), r"ids must be in \[0, 4\), found -1 to -1"),
    ],
)
def test_requests_that_cannot_be_scored_are_refused(request_, message):
    with pytest.raises(ValueError, match=rf"requests\[1\]: {message}"):
        Scorer(*bigrams(), max_length=8).score([Request([1], [1]), Request(*request_)])


def test_what_is_no_number_is_no_score():
    """Since an accuracy made of it would look like chance."""
    config, variables = bigrams(np.where(np.eye(4), 0.25, np.nan))
    with pytest.raises(FloatingPointError, match=r"requests\[1\]: its log-probability is nan"):
        Scorer(config, variables, max_length=8).score([Request([1], []), Request([1], [2])])


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="max_length: must be at least 1, found 0"):
        Scorer(*bigrams(), max_length=0)
    with pytest.raises(ValueError, match="stride: must be between 1 and 4, found 5"):
        list(windows([1], 3, 4, 5))
