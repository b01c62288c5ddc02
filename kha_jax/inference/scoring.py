"""Scoring: the log-probability of continuations, token ids in and numbers out.

What requests have in common is computed once (`rows.rows_of`), the output embedding is read for
the tokens alone that are scored, and few shapes are compiled (`rows.plan`).

Legend: B batch, L prefix position, T position in the branches behind it, D model width, V
vocabulary, P scored tokens of a batch, C those of one chunk.
"""

import functools
import logging
import time
from typing import Any, Callable, NamedTuple, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kha_jax.inference.layers import Variables
from kha_jax.inference.rows import Request, Row, Shape, plan, rows_of
from kha_jax.inference.sampling import likeliest
from kha_jax.model import Block, ModelConfig, block_fields
from kha_jax.sharding import axis_size_of, on_mesh

log = logging.getLogger("kha_jax")
BATCH_TOKENS = 16384
CHUNK = 256  # scored tokens whose logits exist at once
SAID = 30.0  # seconds between two lines that say how far it is


class Score(NamedTuple):
    """Of a continuation: the sum of its tokens' log-probabilities, and whether each of them is the
    likeliest."""

    log_probability: float
    greedy: bool


class Counts(NamedTuple):
    """What was scored so far. truncated: requests that lost the beginning of their context; tokens:
    computed ones without, padded: with padding; programs: compiled shapes."""

    requests: int = 0
    truncated: int = 0
    tokens: int = 0
    padded: int = 0
    programs: int = 0

    @property
    def padding(self) -> float:
        """The share of the computed tokens that is padding."""
        return 1 - self.tokens / self.padded if self.padded else 0.0


class Branches(NamedTuple):
    """Behind prefixes that are padded on the left. pad_B: their padding; first_BT: the slot where
    each token's branch begins."""

    pad_B: np.ndarray
    tokens_BT: np.ndarray
    positions_BT: np.ndarray
    first_BT: np.ndarray


class Arrays(NamedTuple):
    """A batch as the program takes it. Prefixes without branches are padded on the right, where no
    token looks. Targets are predicted from (row_P, column_P): a column of the prefix, or, with
    branches, of its last token and theirs."""

    prefix_BL: np.ndarray
    branches: Branches | None
    row_P: np.ndarray
    column_P: np.ndarray
    target_P: np.ndarray


class Scorer:
    """Scores continuations by one model.

    Args:
        model: its config; attention is computed by the platform's best kernel whatever it says.
        variables: as trained, {"params": ...}. Linear mixers are best folded before
            (`fold_if_linear`); any model works as it is.
        max_length: tokens that the model reads at most.
        batch_tokens: tokens that are computed at once. What is held beside the model grows with it,
            and not with the number of requests.
        mesh: the devices that hold the variables, where it is more than one.
    """

    def __init__(
        self,
        model: ModelConfig,
        variables: Variables,
        *,
        max_length: int,
        batch_tokens: int = BATCH_TOKENS,
        mesh: Mesh | None = None,
    ):
        for name, value in (("max_length", max_length), ("batch_tokens", batch_tokens)):
            if value < 1:
                raise ValueError(f"{name}: must be at least 1, found {value}")
        self.model, self.variables = model, variables
        self.max_length, self.batch_tokens = max_length, batch_tokens
        self.counts, self._shapes = Counts(), set[Shape]()
        auto = model.with_attention(lambda attention: attention.replace(kernel="auto"))
        self.multiple = axis_size_of(mesh.shape, "batch") if mesh else 1
        whole = {"out_shardings": NamedSharding(mesh, PartitionSpec())} if mesh else {}
        self._run = jax.jit(on_mesh(mesh, lambda *given: log_probabilities(auto, *given)), **whole)

    def score(self, requests: Sequence[Request]) -> list[Score]:
        """Scores in the order of the requests. Of one that is longer than the model reads, the
        beginning of the context is left out; an empty continuation is (0, False).

        Raises:
            ValueError: an empty context, a continuation longer than the model reads, or an id
                outside the vocabulary.
            FloatingPointError: a score is no number.
        """
        fitted = [self._fitted(at, request) for at, request in enumerate(requests)]
        asked = [(at, request) for at, request in enumerate(fitted) if len(request.continuation)]
        batches = plan(rows_of(asked), self.batch_tokens, self.multiple)
        sums, greedy = np.zeros(len(requests)), np.ones(len(requests), bool)
        greedy[[at for at, request in enumerate(fitted) if not len(request.continuation)]] = False
        running, said = None, time.monotonic()
        for done, (shape, rows) in enumerate([*batches, (None, [])]):
            coming = shape and (rows, self._run(self.variables, arrays(shape, rows)))
            if running:
                _collect(*running, sums, greedy)  # while the device computes the next one
            running = coming
            if time.monotonic() - said > SAID:
                said = time.monotonic()
                log.info("scored %d of %d batches", done, len(batches))
        self._count(requests, fitted, batches)
        if (lost := np.flatnonzero(~np.isfinite(sums))).size:
            raise FloatingPointError(
                f"requests[{lost[0]}]: its log-probability is {sums[lost[0]]}; the weights are "
                "damaged, or the run has diverged"
            )
        return [Score(*both) for both in zip(sums.tolist(), greedy.tolist())]

    def _fitted(self, at: int, request: Request) -> Request:
        """The request as the model can read it."""
        context, continuation = request
        _check(at, request, self.max_length, self.model.vocabulary_size)
        room = self.max_length + 1 - len(continuation)  # the last token is not read
        return Request(context[-room:], continuation)

    def _count(self, requests, fitted, batches) -> None:
        shapes = {shape for shape, _ in batches}
        before, self._shapes = self.counts, self._shapes | shapes
        rows = [row for _, rows in batches for row in rows]
        cut = sum(len(a.context) > len(b.context) for a, b in zip(requests, fitted))
        self.counts = Counts(
            before.requests + len(requests),
            before.truncated + cut,
            before.tokens + sum(len(row.prefix) + row.branched for row in rows),
            before.padded + sum(shape.tokens for shape, _ in batches),
            len(self._shapes),
        )


def _check(at: int, request: Request, max_length: int, vocabulary_size: int) -> None:
    context, continuation = request
    if not len(context):
        raise ValueError(
            f"requests[{at}]: the context is empty; begin with a token, such as the end of a "
            "document"
        )
    if len(continuation) > max_length:
        raise ValueError(
            f"requests[{at}]: a continuation of {len(continuation)} tokens is longer than the "
            f"{max_length} that the model reads"
        )
    for ids in (part for part in request if len(part)):
        if not 0 <= min(ids) <= max(ids) < vocabulary_size:
            raise ValueError(
                f"requests[{at}]: ids must be in [0, {vocabulary_size}), found {min(ids)} to "
                f"{max(ids)}"
            )


def _collect(rows: list[Row], computed: Any, sums: np.ndarray, greedy: np.ndarray) -> None:
    """Adds what was computed for these rows to their requests."""
    of = np.array([target.request for row in rows for target in row.targets])
    log_p, likely = (np.asarray(z)[: len(of)] for z in computed)
    np.add.at(sums, of, log_p.astype(np.float64))
    np.logical_and.at(greedy, of, likely)


def arrays(shape: Shape, rows: list[Row]) -> Arrays:
    """The rows as arrays of the shape; rows that are missing are like the first."""
    filled = [*rows, *(shape.rows - len(rows)) * rows[:1]]
    left = bool(shape.branches)
    prefix = np.stack([_padded(row.prefix, shape.prefix, left) for row in filled])
    target = np.zeros((shape.targets, 3), np.int32)
    found = [
        (at, t.column - left * (len(row.prefix) - 1), t.token)
        for at, row in enumerate(rows)
        for t in row.targets
    ]
    target[: len(found)] = found
    branches = _branches(shape, filled) if left else None
    return Arrays(prefix, branches, *target.T)


def _padded(ids: Sequence[int], length: int, left: bool = False) -> np.ndarray:
    room = length - len(ids)
    return np.pad(np.asarray(ids, np.int32), (room, 0) if left else (0, room))


def _branches(shape: Shape, rows: list[Row]) -> Branches:
    """Padding is a branch of its own for each token."""
    pad = np.array([shape.prefix - len(row.prefix) for row in rows], np.int32)
    tokens = [
        _padded([i for branch in row.branches for i in branch], shape.branches) for row in rows
    ]
    first = np.tile(np.arange(shape.branches, dtype=np.int32), (shape.rows, 1))
    for at, row in enumerate(rows):
        sizes = [len(branch) for branch in row.branches]
        first[at, : row.branched] = np.repeat(np.cumsum([0, *sizes[:-1]]), sizes)
    within = np.arange(shape.branches, dtype=np.int32) - first
    positions = (shape.prefix - pad)[:, None] + within
    return Branches(pad, np.stack(tokens), positions, shape.prefix + first)


def log_probabilities(
    model: ModelConfig, variables: Variables, batch: Arrays
) -> tuple[jax.Array, jax.Array]:
    """The log-probability [P] of each target, float32, and whether it is the likeliest token."""
    transformer = model.build()
    hidden = _prefixes if batch.branches is None else _with_branches
    h_PD = hidden(model, variables, batch)[batch.row_P, batch.column_P]

    def one(given):
        h_D, target = given
        logits_V = transformer.apply(variables, h_D[None], method="next_token_logits")[0]
        log_p = logits_V[target] - jax.nn.logsumexp(logits_V)
        return log_p, likeliest(logits_V) == target

    return jax.lax.map(one, (h_PD, batch.target_P), batch_size=CHUNK)


def _prefixes(model: ModelConfig, variables: Variables, batch: Arrays) -> jax.Array:
    """The last block's outputs [B, L, D]."""
    positions_BL = jnp.broadcast_to(jnp.arange(batch.prefix_BL.shape[1]), batch.prefix_BL.shape)

    def layer(block, own, x_BLD):
        return block.apply(own, x_BLD, positions_BL, None)[0]

    x_BLD = model.build().apply(variables, batch.prefix_BL, method="embed")
    return _through(model, variables, layer, x_BLD)


def _with_branches(model: ModelConfig, variables: Variables, batch: Arrays) -> jax.Array:
    """The last block's outputs [B, 1 + T, D] of the prefixes' last tokens and of the branches. The
    cache of one layer is all that exists at a time."""
    pad_B, tokens_BT, positions_BT, first_BT = batch.branches
    L, T = batch.prefix_BL.shape[1], tokens_BT.shape[1]
    positions_BL = jnp.maximum(jnp.arange(L) - pad_B[:, None], 0)
    real_BL = (jnp.arange(L) >= pad_B[:, None]).astype(jnp.int32)  # padding as another document

    def layer(block, own, both):
        x_BLD, x_BTD = both
        x_BLD, cache = block.apply(own, x_BLD, positions_BL, real_BL, L + T, method="prefill")
        behind = positions_BT, cache, L, pad_B, first_BT
        x_BTD, _ = block.apply(own, x_BTD, *behind, method="extend")
        return x_BLD, x_BTD

    embed = functools.partial(model.build().apply, variables, method="embed")
    both = embed(batch.prefix_BL), embed(tokens_BT)
    x_BLD, x_BTD = _through(model, variables, layer, both)
    return jnp.concatenate([x_BLD[:, -1:], x_BTD], axis=1)


def _through(model: ModelConfig, variables: Variables, layer: Callable, x: Any) -> Any:
    """x after all layers, each of them layer(block, its variables, x)."""
    for segment in model.segments():
        block = Block(**block_fields(model, segment))
        stacked = {c: tree[segment.name] for c, tree in variables.items() if segment.name in tree}
        x, _ = jax.lax.scan(lambda x, own, block=block: (layer(block, own, x), None), x, stacked)
    return x
