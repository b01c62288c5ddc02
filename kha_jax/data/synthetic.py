"""Synthetic tasks: every example is a pure function of (seed, index), so nothing is stored."""

import hashlib

import numpy as np

from kha_jax.data.loader import DataConfig, Example

Made = tuple[np.ndarray, np.ndarray, np.ndarray]


class SyntheticTask(DataConfig):
    """Base of the tasks; the splits share no random stream."""

    vocabulary: int = 256
    """Ids are below it."""
    examples: int = 100_000
    """Examples of the training split."""
    validation_examples: int = 1_024
    """Examples of the validation split."""

    def validate(self):
        self.at_least(1, "examples", "validation_examples")
        for field in ("examples", "validation_examples"):
            count = getattr(self, field)
            self.require(count <= 10**18, field, f"must be at most 10^18, found {count}")

    def vocabulary_size(self) -> int:
        return self.vocabulary

    def open(self, split: str, seq_len: int, seed: int) -> "SyntheticExamples":
        """Examples of the `train` or `validation` split, which share no random stream."""
        return SyntheticExamples(self, split, seq_len, seed)

    def make(self, random: np.random.Generator, T: int, seed: int) -> Made:
        """(tokens, targets, weights), all [T]. seed: of the run, for what all examples share."""
        raise NotImplementedError

    def holds(self, needed: int, what: str) -> None:
        """Raises ConfigError where the vocabulary is smaller than `needed`."""
        problem = f"must be at least {needed} for {what}, found {self.vocabulary}"
        self.require(self.vocabulary >= needed, "vocabulary", problem)


def answered(row: np.ndarray, places: np.ndarray) -> Made:
    """A row [T + 1] whose next token counts at these places."""
    weights = np.zeros(len(row) - 1, np.float32)
    weights[places] = 1.0
    return row[:-1], row[1:], weights


class SyntheticExamples:
    """See SyntheticTask; a `loader.Source`."""

    bytes_per_token = None

    def __init__(self, config: SyntheticTask, split: str, seq_len: int, seed: int):
        self.config, self.seq_len = config, seq_len
        self.stream = (seed, 0 if split == "train" else 1)
        self.length = config.examples if split == "train" else config.validation_examples
        self.fingerprint = hashlib.sha256(f"{config} {seq_len} {self.stream}".encode()).hexdigest()

    def __str__(self):
        return f"data.source ({type(self.config).__name__})"

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Example:
        T, (seed, _) = self.seq_len, self.stream
        random = np.random.default_rng((*self.stream, int(index)))
        tokens, targets, weights = self.config.make(random, T, seed)
        return {
            "tokens": tokens.astype(np.int32),
            "targets": targets.astype(np.int32),
            "positions": np.arange(T, dtype=np.int32),
            "segment_ids": np.zeros(T, np.int32),
            "weights": weights.astype(np.float32),
        }


class MultiQueryAssociativeRecall(SyntheticTask):
    """Key-value pairs, then queries that must be answered with the value last seen (MQAR; Arora et
    al., arXiv 2312.04927).

    The row starts with the pairs. In the rest, each key is asked again once, at gaps drawn from a
    power law, and its value must be predicted there; other places hold random tokens. Keys and
    values come from halves of the vocabulary; only answers count in the loss. Many pairs with few
    key/value heads and small heads make it hard; softmax attention with room to spare solves it.
    """

    pairs: int = 16
    """Key-value pairs, each asked again once."""
    gap_power: float = 0.01
    """A gap g before a key is asked again has the likelihood g^(gap_power - 1)."""

    def validate(self):
        super().validate()
        self.at_least(1, "pairs")
        problem = (
            f"must be even and hold pairs={self.pairs} distinct keys besides id 0, so at least "
            f"{2 * self.pairs + 2}, "
        )
        enough = self.vocabulary % 2 == 0 and self.vocabulary // 2 > self.pairs
        self.require(enough, "vocabulary", problem + f"found {self.vocabulary}")
        self.require(self.gap_power > 0, "gap_power", f"must be positive, found {self.gap_power}")

    def minimum_seq_len(self) -> int:
        """The shortest row that holds the pairs and every query with its answer."""
        return 4 * self.pairs

    def make(self, random, T, seed):
        half = self.vocabulary // 2
        keys = random.choice(np.arange(1, half), self.pairs, replace=False)
        values = random.integers(half, self.vocabulary, self.pairs)
        row = random.integers(0, self.vocabulary, T + 1)
        row[: 2 * self.pairs : 2], row[1 : 2 * self.pairs : 2] = keys, values
        gaps = (T - 2 * self.pairs) // 2
        likelihood = np.arange(1, gaps + 1, dtype=np.float64) ** (self.gap_power - 1)
        places = 2 * self.pairs + 2 * random.choice(
            gaps, self.pairs, replace=False, p=likelihood / likelihood.sum()
        )
        noise = np.ones(T + 1, bool)
        noise[: 2 * self.pairs] = False
        row[places], row[places + 1] = keys, values
        noise[places] = noise[places + 1] = False
        # A key among the noise would be a query without an answer; values there are harmless.
        row[noise] = random.integers(half, self.vocabulary, noise.sum())
        return answered(row, places)


class CompositionalRecall(SyntheticTask):
    """Recall in two steps: facts a -> b and b -> c in one random order, then every a must be
    answered with its c (the form of two-hop questions; compare arXiv 2402.16837).

    The letters a, b and c come from thirds of the vocabulary, and every a is asked once. The rest
    of the row repeats the questions in other orders.
    """

    pairs: int = 8
    """Chains a -> b -> c."""

    def validate(self):
        super().validate()
        self.at_least(1, "pairs")
        self.holds(3 * self.pairs, f"{self.pairs} chains of three")

    def minimum_seq_len(self) -> int:
        """Two facts and a question with its answer for each chain."""
        return 6 * self.pairs

    def make(self, random, T, seed):
        third = self.vocabulary // 3
        a, b, c = (n * third + random.permutation(third)[: self.pairs] for n in range(3))
        facts = np.concatenate([np.stack([a, b], 1), np.stack([b, c], 1)])
        row = [random.permutation(facts).ravel()]
        questions = np.stack([a, c], 1)
        for _ in range((T - 4 * self.pairs) // (2 * self.pairs) + 1):
            row.append(random.permutation(questions).ravel())
        return answered(np.concatenate(row)[: T + 1], np.arange(4 * self.pairs, T, 2))


class KHopInduction(SyntheticTask):
    """k-hop induction heads (Sanford et al., arXiv 2402.09268): from each token go back to what
    followed its last occurrence, `hops` times, and name the token there.

    find(i) = the largest j <= i with token[j - 1] = token[i]; the target of i is the token at
    find applied k times, and places without one do not count. Tokens are random among `symbols`,
    no two neighbours equal. Depth grows with log k at best; one hop is the plain induction head.
    """

    vocabulary: int = 16
    hops: int = 2
    """Times that find is applied, k."""
    symbols: int = 8
    """Tokens that occur."""

    def validate(self):
        super().validate()
        self.at_least(1, "hops")
        self.at_least(3, "symbols")
        self.holds(self.symbols, f"symbols={self.symbols}")

    def minimum_seq_len(self) -> int:
        """So that some places have a target: two tokens a hop and symbol."""
        return 2 * self.symbols * self.hops

    def make(self, random, T, seed):
        steps = random.integers(1, self.symbols, T)
        tokens = np.cumsum(steps) % self.symbols
        found, last = np.full(T, -1), {}
        for i, token in enumerate(tokens):
            found[i] = last.get(token, -1)
            last[token] = i + 1
        at = np.arange(T)
        for _ in range(self.hops):
            at = np.where(at >= 0, found[at], -1)
        return tokens, np.where(at >= 0, tokens[at], 0), at >= 0


class SelectiveCopy(SyntheticTask):
    """Selective copying (Gu and Dao, arXiv 2312.00752): `copied` tokens stand at random places
    among blanks, and must be written in order after the mark that ends the row's first part.

    Ids: 0 is the blank, 1 the mark, the others are copied.
    """

    vocabulary: int = 32
    copied: int = 16
    """Tokens to be copied."""

    def validate(self):
        super().validate()
        self.at_least(1, "copied")
        self.holds(4, "a blank, a mark and two symbols")

    def minimum_seq_len(self) -> int:
        """The tokens, the mark, and the tokens again."""
        return 2 * self.copied + 1

    def make(self, random, T, seed):
        row = np.zeros(T + 1, np.int64)
        first = T - self.copied
        places = np.sort(random.choice(first, self.copied, replace=False))
        row[places] = row[first + 1 :] = random.integers(2, self.vocabulary, self.copied)
        row[first] = 1
        return answered(row, np.arange(first, T))


class NeedleRetrieval(SyntheticTask):
    """Needles in a haystack of noise, token by token (the forms of RULER, arXiv 2404.06654).

    Each of `needles` is a mark, a key and `values` values at a random place; the row ends with a
    mark and the key of one of them, whose values must follow. needles=1, values=1 is the single
    needle, more needles are its multi-key, more values its multi-value form. Ids: 0 is the mark,
    then thirds of the rest are keys, values and noise.
    """

    needles: int = 4
    """Needles in a row, of which one is asked for."""
    values: int = 1
    """Values of a needle."""

    def validate(self):
        super().validate()
        self.at_least(1, "needles", "values")
        self.holds(3 * max(self.needles, 2) + 1, f"needles={self.needles}")

    def minimum_seq_len(self) -> int:
        """The needles, and the question with its answer."""
        return (self.needles + 1) * (2 + self.values)

    def make(self, random, T, seed):
        third, size = (self.vocabulary - 1) // 3, 2 + self.values
        row = random.integers(1 + 2 * third, 1 + 3 * third, T + 1)
        keys = 1 + random.choice(third, self.needles, replace=False)
        values = 1 + third + random.integers(0, third, (self.needles, self.values))
        needles = np.column_stack([np.zeros_like(keys), keys, values])
        # places as if needles had no length, then moved apart by those before them
        free = T + 1 - (self.needles + 1) * size
        at = np.sort(random.integers(0, free + 1, self.needles)) + size * np.arange(self.needles)
        row[at[:, None] + np.arange(size)] = needles
        row[-size:] = random.permutation(needles)[0]
        return answered(row, np.arange(T - self.values, T))


class RelationalGraph(SyntheticTask):
    """Relational graph recognition (Adler, arXiv 2509.22840): a fixed directed graph over items
    must be learnt by the weights, so that in a context of items each asked one finds its
    neighbour.

    The graph is `degree` random permutations of the vocabulary, drawn from the run's seed and
    shared by all examples. A row lists items; then each of `asked` items is followed by the one of
    its neighbours that was listed, which must be predicted. The larger the graph, the more width
    of queries and keys over all heads it takes.
    """

    vocabulary: int = 64
    """Items of the graph; ids are below it."""
    degree: int = 4
    """Neighbours of an item."""
    asked: int = 8
    """Items of a row that are asked for their neighbour."""

    def validate(self):
        super().validate()
        self.at_least(1, "degree", "asked")
        needed = 2 * self.asked * self.degree
        self.holds(needed, f"asked={self.asked} items with degree={self.degree}")

    def minimum_seq_len(self) -> int:
        """The list, and each question with its answer."""
        return 3 * self.asked

    def graph(self, seed: int) -> np.ndarray:
        """The neighbours of each item, [vocabulary, degree]."""
        random = np.random.default_rng((seed, 2))
        return np.stack([random.permutation(self.vocabulary) for _ in range(self.degree)], 1)

    def make(self, random, T, seed):
        graph, listed, asked = self.graph(seed), set(), []
        while len(asked) < self.asked:
            asked, listed = [], set()
            for item in random.permutation(self.vocabulary):
                answer = int(random.choice(graph[item]))
                others = [graph[one] for one, _ in asked]
                alone = listed.isdisjoint(graph[item]) and not any(answer in o for o in others)
                if alone and len(asked) < self.asked:
                    asked.append((int(item), answer))
                    listed.add(answer)
        questions = np.array(asked)
        row = [random.permutation(questions[:, 1])]
        while sum(map(len, row)) < T + 1:
            row.append(random.permutation(questions).ravel())
        return answered(np.concatenate(row)[: T + 1], np.arange(self.asked, T, 2))
