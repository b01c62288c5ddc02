"""Scores of tasks, and what may be said of their differences: from each document's own."""

import math
from typing import Any, NamedTuple, Sequence

import numpy as np

from kha_jax.errors import DataError

DRAWS = 2000  # of the bootstrap
AT_ONCE = 100


class Measured(NamedTuple):
    """One metric of one task. values: of each document, [n], or [n, 2] where the score is a sum of
    log-probabilities by a sum of weights; documents: their hashes, in the same order."""

    task: str
    metric: str
    values: np.ndarray
    documents: tuple[str, ...]

    @property
    def score(self) -> float:
        """Of all documents."""
        return float(_scores(self.metric, self.values[None])[0])


def measured(samples: dict[str, list[dict[str, Any]]]) -> dict[tuple[str, str], Measured]:
    """By (task, metric), from lm-eval's samples; metrics that are no number of each document are
    left out. A metric behind a filter other than the first is called metric/filter."""
    out = {}
    for task, some in samples.items():
        filters = list(dict.fromkeys(sample["filter"] for sample in some))
        for kind in filters:
            own = [sample for sample in some if sample["filter"] == kind]
            hashes = tuple(sample["doc_hash"] for sample in own)
            for metric in own[0]["metrics"]:
                values = _numbers([sample[metric] for sample in own])
                name = metric if kind == filters[0] else f"{metric}/{kind}"
                if values is not None:
                    out[task, name] = Measured(task, name, values, hashes)
    return out


def _numbers(found: Sequence[Any]) -> np.ndarray | None:
    try:
        values = np.array(found, float)
    except (TypeError, ValueError):
        return None
    return values if values.ndim == 1 or values.shape[1:] == (2,) else None


def pooled(found: dict[tuple[str, str], Measured], group: str, tasks: Sequence[str]):
    """The group's metrics: of all documents of its tasks, for the metrics that all of them have."""
    metrics = [{metric for task, metric in found if task == own} for own in tasks]
    out = {}
    for metric in sorted(set.intersection(*metrics)) if metrics else []:
        parts = [found[task, metric] for task in tasks]
        values = np.concatenate([part.values for part in parts])
        documents = tuple(name for part in parts for name in part.documents)
        out[group, metric] = Measured(group, metric, values, documents)
    return out


def _scores(metric: str, values: np.ndarray) -> np.ndarray:
    """Scores [draws] of values [draws, n] or [draws, n, 2]."""
    if values.ndim == 2:
        return values.mean(axis=1)
    sums = values.sum(axis=1)
    rate = -sums[:, 0] / sums[:, 1]
    if "perplexity" in metric:
        return np.exp(np.minimum(rate, 700))
    return rate / math.log(2) if "bits_per_byte" in metric else rate


def interval(one: Measured, other: Measured | None = None, seed: int = 0) -> tuple[float, float]:
    """95% bootstrap interval over documents, of the score, or of other minus one, where both are
    drawn together.

    Raises:
        DataError: the two were not asked the same documents.
    """
    if other is not None and one.documents != other.documents:
        raise DataError(f"--tasks={one.task}: the two runs were not asked the same documents")
    draw, n, found = np.random.default_rng(seed), len(one.values), []
    for _ in range(DRAWS // AT_ONCE):
        chosen = draw.integers(0, n, (AT_ONCE, n))
        scores = _scores(one.metric, one.values[chosen])
        if other is not None:
            scores = _scores(other.metric, other.values[chosen]) - scores
        found.append(scores)
    return tuple(np.percentile(np.concatenate(found), [2.5, 97.5]).tolist())
