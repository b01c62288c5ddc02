"""Scores of tasks, and what may be said of their differences: from each document's own."""

import logging
import math
from typing import Any, Callable, Mapping, NamedTuple, Sequence

import numpy as np

from kha_jax.errors import DataError

log = logging.getLogger("kha_jax")
DRAWS = 2000  # of the bootstrap
SLOW_DRAWS = 200  # of it, where a score is no mean or sum
AT_ONCE = 100
Aggregation = Callable[[Sequence[Any]], float]


class Measured(NamedTuple):
    """One metric of one task. values: of each document, [n] or [n, 2]; documents: their hashes, in
    the same order; aggregation: what makes a score of the values, called as in SCORES, or as the
    task has it."""

    task: str
    metric: str
    values: np.ndarray
    documents: tuple[str, ...]
    aggregation: str | Aggregation = "mean"

    @property
    def score(self) -> float:
        """Of all documents."""
        return float(self.scores(self.values[None])[0])

    def scores(self, values: np.ndarray) -> np.ndarray:
        """Scores [draws] of values [draws, n] or [draws, n, 2]."""
        if isinstance(self.aggregation, str):
            return SCORES[self.aggregation](values)
        return np.array([self.aggregation(some.tolist()) for some in values], float)

    @property
    def draws(self) -> int:
        """Of a bootstrap."""
        return DRAWS if isinstance(self.aggregation, str) else SLOW_DRAWS


def _rate(values: np.ndarray) -> np.ndarray:
    """Nats by weight, of (log-probability, weight)."""
    sums = values.sum(axis=1)
    return -sums[:, 0] / sums[:, 1]


def _exp(nats: np.ndarray) -> np.ndarray:
    return np.exp(np.minimum(nats, 700))


# By lm-eval's names of aggregations, many draws at once.
SCORES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean": lambda values: values.mean(axis=1),
    "perplexity": lambda values: _exp(-values.mean(axis=1)),
    "weighted_perplexity": lambda values: _exp(_rate(values)),
    "bits_per_byte": lambda values: _rate(values) / math.log(2),
}


def measured(
    samples: dict[str, list[dict[str, Any]]],
    aggregations: Mapping[str, Mapping[str, Aggregation]],
) -> dict[tuple[str, str], Measured]:
    """By (task, metric), from lm-eval's samples and what each task makes a score with; metrics that
    are no number of each document are left out, which is logged. A metric behind a filter other
    than the first is called metric/filter."""
    out = {}
    for task, some in samples.items():
        filters = list(dict.fromkeys(sample["filter"] for sample in some))
        for kind in filters:
            own = [sample for sample in some if sample["filter"] == kind]
            hashes = tuple(sample["doc_hash"] for sample in own)
            for metric in own[0]["metrics"]:
                values = _numbers([sample[metric] for sample in own])
                name = metric if kind == filters[0] else f"{metric}/{kind}"
                if values is None:
                    log.info("%s: %s is no number of each document, and left out", task, name)
                    continue
                how = _named(aggregations[task][metric])
                out[task, name] = Measured(task, name, values, hashes, how)
    return out


def _named(aggregation: Aggregation) -> str | Aggregation:
    """One of lm-eval's own by its name."""
    name = getattr(aggregation, "__name__", "")
    own = getattr(aggregation, "__module__", "").startswith("lm_eval.api")
    return name if own and name in SCORES else aggregation


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
        how = parts[0].aggregation
        values = np.concatenate([part.values for part in parts])
        documents = tuple(name for part in parts for name in part.documents)
        out[group, metric] = Measured(group, metric, values, documents, how)
    return out


def interval(one: Measured, other: Measured | None = None, seed: int = 0) -> tuple[float, float]:
    """95% bootstrap interval over documents, of the score, or of other minus one, where both are
    drawn together.

    Raises:
        DataError: the two were not asked the same documents.
    """
    if other is not None and one.documents != other.documents:
        raise DataError(f"--tasks={one.task}: the two runs were not asked the same documents")
    draw, n, found = np.random.default_rng(seed), len(one.values), []
    for _ in range(one.draws // AT_ONCE):
        chosen = draw.integers(0, n, (AT_ONCE, n))
        scores = one.scores(one.values[chosen])
        if other is not None:
            scores = other.scores(other.values[chosen]) - scores
        found.append(scores)
    return tuple(np.percentile(np.concatenate(found), [2.5, 97.5]).tolist())
