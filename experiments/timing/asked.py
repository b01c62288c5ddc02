"""Requests of benchmarks, answered here and by lm-eval's back end for transformers: both read one
stock folder, in float32, each in a process of its own, in turns."""

import json
import multiprocessing
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, NamedTuple, Sequence

import numpy as np
from rich.table import Table

from experiments.timing import peers, turns
from experiments.timing.converting import timed
from experiments.timing.turns import Step

LONGEST = 2048
BATCH = 8  # requests at once, there; texts at once here, too
NEW = 64  # tokens of a text
PEER = "lm-eval, transformers"


class Kind(NamedTuple):
    """What is asked: so many contexts, each of `least` to `most` tokens, and for each so many
    continuations of `few` to `many` tokens."""

    contexts: int
    least: int
    most: int
    choices: int = 1
    few: int = 4
    many: int = 16


KINDS = {
    "one continuation, 100 to 1,000 tokens": Kind(12, 100, 1000),
    "4 choices, 5 shots": Kind(4, 480, 560, 4),
}
TEXTS = f"texts of {NEW} tokens, {BATCH} prompts of 100 to 200"
VARIED = Kind(300, 20, 2000)  # lengths as a list of benchmarks has them
MANY = 100, 1000  # requests, of which both take several batches
SHORT, AT_ONCE = Kind(0, 20, 200), 4096  # such requests; tokens of their batches


def measured(
    stock: Path | None, rounds: int, machine: str, tell: Callable[[Any], None]
) -> dict[str, Any]:
    """Times beside the peer's, what is padded and compiled, and peaks of memory; tells tables and
    lines as they come. stock: a folder of Hugging Face's with a tokenizer; by default one of random
    weights in the peer shape."""
    out: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder, run = stock or random_stock(Path(scratch, "stock")), Path(scratch, "run")
        imported(folder, run)
        for kind in (*KINDS, TEXTS):
            out[kind] = _times(kind, folder, run, rounds)
            tell(_table(f"{kind}; {stock or 'peer shape'}, {machine}", kind, out[kind]))
        for count in MANY:
            out[f"peak memory, {count}"] = peak = _peak(run, count)
            what = f"{count:,} requests of {SHORT.least} to {SHORT.most} tokens"
            tell(f"{what}, {AT_ONCE:,} at once: at most {peak / 1e6:.0f} MB beside the model")
    _, own, padded, shapes = counted(VARIED)
    out["padding"], out["shapes"] = 1 - own / padded, shapes
    what = f"{VARIED.contexts} requests of {VARIED.least} to {VARIED.most:,} tokens"
    tell(f"{what}: {out['padding']:.1%} padding in {shapes} compiled shapes")
    return out


def _times(kind: str, folder: Path, run: Path, rounds: int) -> dict[str, dict[str, float]]:
    makers: dict[str, tuple[Any, ...]]
    if kind == TEXTS:
        makers = {"kha_jax": (our_texts, str(run)), PEER: (their_texts, str(folder))}
    else:
        makers = {"kha_jax": (ours, str(run), kind), PEER: (theirs, str(folder), kind)}
    return turns.apart(makers, rounds, settled=1)


def _table(title: str, kind: str, results: dict[str, dict[str, float]]) -> Table:
    """A row for each of both. The first call compiles."""
    table = Table(title=title)
    columns = "tokens", "padded", "shapes", "first s", "median s", "CPU s", "times lm-eval's"
    for column in ("", *columns):
        table.add_column(column, justify="right")
    for name, row in results.items():
        counts: tuple[Any, ...] = (BATCH * NEW, "", "")
        if kind in KINDS:
            there, own, padded, shapes = counted(KINDS[kind])
            counts = ("", there, "") if name == PEER else (own, padded, shapes)
        seconds = [f"{row[key]:.2f}" for key in ("first", "median", "cpu")]
        times = f"{results[PEER]['median'] / row['median']:.2f}" if PEER in results else "?"
        table.add_row(name, *map(str, counts), *seconds, times)
    return table


# ---------------------------------------------------------------- the model
def random_stock(folder: Path) -> Path:
    """A folder of the peer shape with random weights, whose tokens are words."""
    import jax
    import jax.numpy as jnp
    from flax import linen as nn

    from kha_jax import convert

    folder.mkdir()
    model = peers.peer_run("baseline").model.replace(stack="scan")
    variables = nn.unbox(model.build().init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))
    convert.write(folder, model, variables, dtype="float32")
    _words(folder)
    return folder


def _words(folder: Path) -> None:
    """A tokenizer of as many words as the model has ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    end, *words = ["<|endoftext|>", *(f"w{i}" for i in range(1, peers.VOCABULARY))]
    ids = {word: i for i, word in enumerate([end, *words])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=end))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))


def imported(folder: Path, run: Path) -> None:
    """The folder as a run, which computes in float32."""
    from experiments.converting.stock import import_run

    import_run(str(folder), str(run), ["config.model.numerics.dtype=float32"], verify=False)


# ---------------------------------------------------------------- what is asked
def requests(kind: Kind, vocabulary: int) -> list[tuple[list[int], list[int]]]:
    """(context, continuation) of each, the same every time."""
    draw, out = np.random.default_rng(0), []

    def ids(low, high):
        return draw.integers(3, vocabulary, draw.integers(low, high + 1)).tolist()

    for _ in range(kind.contexts):
        context = ids(kind.least, kind.most)
        out += [(context, ids(kind.few, kind.many)) for _ in range(kind.choices)]
    return out


def prompts(folder: Path) -> list[Any]:
    """lm-eval's requests of texts."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    asked = requests(Kind(BATCH, 100, 200), tokenizer.get_vocab_size())
    how = {"until": [], "max_gen_toks": NEW, "do_sample": False}
    return [SimpleNamespace(args=(tokenizer.decode(context), how)) for context, _ in asked]


def _asked(run: str, tokens: int = 16384) -> Any:
    from experiments.evaluating.models import Asked

    return Asked(run, batch_tokens=tokens, max_length=LONGEST)


def ours(run: str, kind: str) -> Step:
    """By kha_jax.inference.scoring."""
    asked = _asked(run)
    pairs = _requests(requests(KINDS[kind], asked.model.vocabulary_size))
    return lambda: asked.scorer.score(pairs)


def _requests(pairs: Sequence[tuple[list[int], list[int]]]) -> list[Any]:
    from kha_jax.inference.rows import Request

    return [Request(*pair) for pair in pairs]


def our_texts(run: str) -> Step:
    """By the same adapter as `evaluate`."""
    from experiments.evaluating.adapter import Answers

    answers, asked = Answers(_asked(run)), prompts(Path(run))
    return lambda: answers.generate_until(asked)


def theirs(folder: str, kind: str) -> Step:
    """By lm_eval.models.huggingface.HFLM."""
    lm = _peer(folder)
    asked = [(None, *pair) for pair in requests(KINDS[kind], lm.model.config.vocab_size)]
    return lambda: lm._loglikelihood_tokens(asked, disable_tqdm=True)


def their_texts(folder: str) -> Step:
    """By the same."""
    lm, asked = _peer(folder), prompts(Path(folder))
    return lambda: lm.generate_until(asked, disable_tqdm=True)


def _peer(folder: str) -> Any:
    import transformers
    from lm_eval.models.huggingface import HFLM

    transformers.utils.logging.disable_progress_bar()
    how: dict[str, Any] = {"batch_size": BATCH, "max_length": LONGEST, "device": "cpu"}
    return HFLM(pretrained=folder, dtype="float32", **how)


# ---------------------------------------------------------------- what is counted
def counted(kind: Kind) -> tuple[int, int, int, int]:
    """(tokens that their batches compute, ours, ours with padding, our shapes) of a kind."""
    from kha_jax.inference.rows import plan, rows_of

    asked = _requests(requests(kind, peers.VOCABULARY))
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


def _peak(run: Path, count: int) -> int:
    """Bytes that so many requests take beside the model, in a process of their own."""
    with multiprocessing.get_context("spawn").Pool(1) as process:
        return process.apply(peak, (str(run), count))


def peak(run: str, count: int) -> int:
    """Bytes by which this process grows at most while it scores so many requests."""
    asked = _asked(run, AT_ONCE)
    pairs = _requests(requests(SHORT._replace(contexts=count), asked.model.vocabulary_size))
    return timed(lambda: asked.scorer.score(pairs))[1]
