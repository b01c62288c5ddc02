"""Requests of benchmarks, scored here and by lm-eval's back end for transformers: of the peer
shape, as token ids, so that no tokenizer is timed."""

from typing import Any

import numpy as np

from experiments.timing import peers
from experiments.timing.turns import Step

LONGEST = 2048
# name -> (contexts, their lengths from and to, continuations of each, tokens of those from and to)
KINDS = {
    "one continuation, 100 to 1,000 tokens": (24, 100, 1000, 1, 4, 16),
    "4 choices, 5 shots": (8, 480, 560, 4, 4, 16),
}
BATCH = 8  # requests at once, there


def requests(kind: str) -> list[tuple[list[int], list[int]]]:
    """(context, continuation) of each, the same every time."""
    contexts, least, most, choices, few, many = KINDS[kind]
    draw, out = np.random.default_rng(0), []

    def ids(low, high):
        return draw.integers(2, peers.VOCABULARY, draw.integers(low, high + 1)).tolist()

    for _ in range(contexts):
        context = ids(least, most)
        out += [(context, ids(few, many)) for _ in range(choices)]
    return out


def ours(kind: str, variant: str = "baseline") -> Step:
    """By kha_jax.inference.scoring, linear mixers folded."""
    import jax
    import jax.numpy as jnp
    from flax import linen as nn

    from kha_jax.inference.folding import fold_if_linear
    from kha_jax.inference.rows import Request
    from kha_jax.inference.scoring import Scorer

    model = peers.peer_run(variant).model
    variables = nn.unbox(model.build().init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))
    scorer = Scorer(*fold_if_linear(model, variables), max_length=LONGEST)
    asked = [Request(*pair) for pair in requests(kind)]
    return lambda: scorer.score(asked)


def theirs(kind: str) -> Step:
    """By lm_eval.models.huggingface.HFLM."""
    from lm_eval.models.huggingface import HFLM

    how: dict[str, Any] = {"batch_size": BATCH, "max_length": LONGEST, "device": "cpu"}
    lm = HFLM(pretrained=peers.transformers_model().eval(), tokenizer=_tokenizer(), **how)
    asked = [(None, *pair) for pair in requests(kind)]
    return lambda: lm._loglikelihood_tokens(asked, disable_tqdm=True)


def _tokenizer() -> Any:
    """One that lm-eval accepts; nothing is encoded."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<end>": 0, "<unknown>": 1}, unk_token="<unknown>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")


def counted(kind: str) -> tuple[int, int, int, int]:
    """(tokens that their batches compute, ours, ours with padding, our shapes) of a kind."""
    from kha_jax.inference.rows import Request, plan, rows_of

    asked = [Request(*pair) for pair in requests(kind)]
    lengths = sorted((len(c) + len(a) - 1 for c, a in asked), reverse=True)
    batches = [lengths[at : at + BATCH] for at in range(0, len(lengths), BATCH)]
    rows = rows_of(list(enumerate(asked)))
    planned = plan(rows, 16384)
    return (
        sum(max(batch) * len(batch) for batch in batches),
        sum(len(row.prefix) + row.branched for row in rows),
        sum(shape.tokens for shape, _ in planned),
        len({shape for shape, _ in planned}),
    )
