"""Synthetic tasks: every example is a pure function of (seed, index), so nothing is stored."""

import hashlib

import numpy as np

from kha_jax.data.loader import DataConfig, Example


class MultiQueryAssociativeRecall(DataConfig):
    """Key-value pairs, then queries that must be answered with the value last seen (MQAR; Arora et
    al., arXiv 2312.04927).

    The row starts with `pairs` key-value pairs. In the rest, each key is asked again once, at gaps
    drawn from a power law with exponent `gap_power` (small gaps are likelier), and its value must
    be predicted there; other places hold random tokens. Keys and values come from halves of a
    vocabulary of `vocabulary` ids; only answers count in the loss. Many pairs with few key/value
    heads and small heads make it hard; softmax attention with room to spare solves it.
    """

    pairs: int = 16
    vocabulary: int = 256
    gap_power: float = 0.01
    examples: int = 100_000
    validation_examples: int = 1_024

    def validate(self):
        self.at_least(1, "pairs", "examples", "validation_examples")
        for field in ("examples", "validation_examples"):
            count = getattr(self, field)
            self.require(count <= 10**18, field, f"must be at most 10^18, found {count}")
        problem = (
            f"must be even and hold pairs={self.pairs} distinct keys besides id 0, so at least "
            f"{2 * self.pairs + 2}, "
        )
        enough = self.vocabulary % 2 == 0 and self.vocabulary // 2 > self.pairs
        self.require(enough, "vocabulary", problem + f"found {self.vocabulary}")
        self.require(self.gap_power > 0, "gap_power", f"must be positive, found {self.gap_power}")

    def vocabulary_size(self) -> int:
        return self.vocabulary

    def minimum_seq_len(self) -> int:
        """The shortest row that holds the pairs and every query with its answer."""
        return 4 * self.pairs

    def open(self, split: str, seq_len: int, seed: int) -> "RecallExamples":
        """Examples of the `train` or `validation` split, which share no random stream."""
        return RecallExamples(self, split, seq_len, seed)


class RecallExamples:
    """See MultiQueryAssociativeRecall; a `loader.Source`."""

    bytes_per_token = None

    def __init__(self, config: MultiQueryAssociativeRecall, split: str, seq_len: int, seed: int):
        self.config, self.seq_len = config, seq_len
        self.stream = (seed, 0 if split == "train" else 1)
        self.length = config.examples if split == "train" else config.validation_examples
        self.fingerprint = hashlib.sha256(f"{config} {seq_len} {self.stream}".encode()).hexdigest()

    def __str__(self):
        return "data.source=mqar"

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Example:
        c, T = self.config, self.seq_len
        random = np.random.default_rng((*self.stream, int(index)))
        half = c.vocabulary // 2
        keys = random.choice(np.arange(1, half), c.pairs, replace=False)
        values = random.integers(half, c.vocabulary, c.pairs)
        row = random.integers(0, c.vocabulary, T + 1)
        row[: 2 * c.pairs : 2], row[1 : 2 * c.pairs : 2] = keys, values
        gaps = (T - 2 * c.pairs) // 2
        likelihood = np.arange(1, gaps + 1, dtype=np.float64) ** (c.gap_power - 1)
        places = 2 * c.pairs + 2 * random.choice(
            gaps, c.pairs, replace=False, p=likelihood / likelihood.sum()
        )
        noise = np.ones(T + 1, bool)
        noise[: 2 * c.pairs] = False
        row[places], row[places + 1] = keys, values
        noise[places] = noise[places + 1] = False
        # A key among the noise would be a query without an answer; values there are harmless.
        row[noise] = random.integers(half, c.vocabulary, noise.sum())
        weights = np.zeros(T, np.float32)
        weights[places] = 1.0
        return {
            "tokens": row[:T].astype(np.int32),
            "targets": row[1:].astype(np.int32),
            "positions": np.arange(T, dtype=np.int32),
            "segment_ids": np.zeros(T, np.int32),
            "weights": weights,
        }
