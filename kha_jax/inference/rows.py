"""What is to be scored, as rows of tokens, and rows as batches of few shapes.

A row is a prefix, computed as a whole, and branches behind it, of which each sees the prefix and
itself. So requests with one context are computed with one prefix, and a request alone is a prefix
without branches.
"""

from typing import Iterator, NamedTuple, Sequence

import numpy as np

PROGRAMS = 12  # shapes at most, all of them compiled
PROGRAM = 256  # tokens of padding that one more shape has to save; it is compiled once for all runs
BRANCHES = 512  # tokens behind one prefix, unless a single branch has more


class Request(NamedTuple):
    """How likely is this continuation behind this context? Token ids."""

    context: Sequence[int]
    continuation: Sequence[int]


class Target(NamedTuple):
    """A token that is scored: of which request, and by which token of its row it is predicted."""

    request: int
    column: int
    token: int


class Row(NamedTuple):
    """Tokens that are computed together. Columns of targets count prefix and branches as one."""

    prefix: Sequence[int]
    branches: list[Sequence[int]]
    targets: list[Target]

    @property
    def branched(self) -> int:
        """Tokens of all branches."""
        return sum(map(len, self.branches))


class Shape(NamedTuple):
    """Of a batch: rows, tokens of their prefixes and of their branches, targets in all."""

    rows: int
    prefix: int
    branches: int
    targets: int

    @property
    def tokens(self) -> int:
        """Tokens that are computed, padding too."""
        return self.rows * (self.prefix + self.branches)


def windows(
    ids: Sequence[int], before: int, length: int, stride: int | None = None
) -> Iterator[Request]:
    """A text as requests that predict each of its tokens once.

    before: the token that the first one is predicted from. length: tokens that a model reads at
    most. stride: tokens that each window but the first predicts, the others being context; `length`
    by default, where all that one window shares with the next is a token.
    """
    stride = length if stride is None else stride
    if not 1 <= stride <= length:
        raise ValueError(f"stride: must be between 1 and {length}, found {stride}")
    text, end = np.concatenate([[before], np.asarray(ids, np.int64)]), length
    begin = 1
    while begin < len(text):
        end = min(begin + (length if begin == 1 else stride), len(text))
        yield Request(text[max(0, end - 1 - length) : begin], text[begin:end])
        begin = end


def rows_of(requests: Sequence[tuple[int, Request]]) -> list[Row]:
    """Rows that score (number, request) pairs, whose contexts and continuations are not empty."""
    same: dict[bytes, list[int]] = {}
    for at, (_, request) in enumerate(requests):
        same.setdefault(np.asarray(request.context, np.int64).tobytes(), []).append(at)
    return [row for group in same.values() for row in _rows([requests[at] for at in group])]


def _rows(group: list[tuple[int, Request]]) -> Iterator[Row]:
    """Those of requests that have one context."""
    (number, (context, continuation)), size = group[0], len(group[0][1].context)
    if len(group) == 1:
        prefix = [*context, *continuation[:-1]]
        columns = range(size - 1, len(prefix))
        yield Row(prefix, [], [Target(number, *pair) for pair in zip(columns, continuation)])
        return
    row = Row(context, [], [])
    for number, (_, continuation) in group:
        branch = continuation[:-1]
        if row.branches and row.branched + len(branch) > BRANCHES:
            yield row
            row = Row(context, [], [])
        first = size + row.branched
        columns = [size - 1, *range(first, first + len(branch))]
        row.targets.extend(Target(number, *pair) for pair in zip(columns, continuation))
        if len(branch):
            row.branches.append(branch)
    yield row


def eighth(size: int) -> int:
    """The size, up to the next of eight steps to the next power of two."""
    step = max(1, 2 ** (size.bit_length() - 1) // 8) if size else 1
    return -(-size // step) * step


def plan(
    rows: Sequence[Row],
    tokens: int,
    multiple: int = 1,
    programs: int = PROGRAMS,
    program: int = PROGRAM,
) -> list[tuple[Shape, list[Row]]]:
    """Batches of at most `tokens` tokens, unless one row has more, of at most `programs` shapes, or
    two where rows are with and without branches; each further one saves more than `program` tokens
    of padding. The longest rows come first. Their number of rows divides by `multiple`."""
    parts = _parts(rows, tokens, multiple, programs, program) if rows else []
    batches = [batch for part in parts for batch in _batches(part, tokens, multiple)]
    return sorted(batches, key=lambda batch: -(batch[0].prefix + batch[0].branches))


def _size(row: Row) -> tuple[int, int]:
    return eighth(len(row.prefix)), eighth(row.branched)


class Cut(NamedTuple):
    """A part in two. saved: tokens; part: which of the sizes it holds; sides: those of either side,
    none where nothing is saved."""

    saved: int
    part: np.ndarray
    sides: tuple[np.ndarray, ...] = ()


def _parts(
    rows: Sequence[Row], tokens: int, multiple: int, parts: int, program: int
) -> list[list[Row]]:
    """Rows of similar sizes, in at most so many parts, with and without branches apart. The cut
    that saves most tokens comes first, be it between two lengths of prefixes or of branches."""
    sizes, which = np.unique([_size(row) for row in rows], axis=0, return_inverse=True)
    counts = np.bincount(which)

    def cost(part: np.ndarray) -> int:
        length = sizes[part].max(axis=0).sum()
        many, each = _split(counts[part].sum(), length, tokens, multiple)
        return int(many * each * length)

    def best(part: np.ndarray) -> Cut:
        cuts, whole = [Cut(0, part)], cost(part)
        for lengths in sizes[part].T:
            for length in np.unique(lengths)[1:]:
                sides = part[lengths < length], part[lengths >= length]
                cuts.append(Cut(whole - sum(map(cost, sides)), part, sides))
        return max(cuts, key=lambda cut: cut.saved)

    whole = sizes[:, 1] == 0
    cuts = [best(part) for part in map(np.flatnonzero, (whole, ~whole)) if part.size]
    while len(cuts) < parts:
        cuts.sort(key=lambda cut: cut.saved)
        if cuts[-1].saved <= program:
            break
        cuts += map(best, cuts.pop().sides)
    return [[rows[at] for at in np.flatnonzero(np.isin(which, cut.part))] for cut in cuts]


def _split(count, length, tokens: int, multiple: int):
    """(batches, rows of each) for so many rows of a length; numbers or arrays."""
    most = np.maximum(tokens // length // multiple, 1) * multiple
    many = -(-count // most)
    return many, -(-(-(-count // many)) // multiple) * multiple


def _batches(rows: list[Row], tokens: int, multiple: int) -> list[tuple[Shape, list[Row]]]:
    """Those of one part, all of one shape."""
    prefix, branches = (max(sizes) for sizes in zip(*map(_size, rows)))
    _, each = _split(len(rows), prefix + branches, tokens, multiple)
    batches = [rows[begin : begin + each] for begin in range(0, len(rows), each)]
    targets = max(sum(len(row.targets) for row in batch) for batch in batches)
    shape = Shape(int(each), prefix, branches, eighth(targets))
    return [(shape, batch) for batch in batches]
