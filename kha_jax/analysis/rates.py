"""What a sweep over learning rates says of its rows: who bears a large one."""

import math
from typing import NamedTuple, Sequence

from kha_jax.analysis.significance import bootstrap, mean
from kha_jax.runs.results import RunResult

NEAR = 0.05  # nats from the best loss, within which a rate still does


class AtRate(NamedTuple):
    """The runs of a row at one learning rate. losses: by seed, at most the loss at the start, which
    stands for one that is not finite. diverged: runs that end no better than they started.
    largest_logit: the largest of all runs and steps; spikes: per 1000 steps. NaN where no run tells
    them."""

    losses: dict[int, float]
    diverged: int
    largest_logit: float
    spikes: float

    @property
    def loss(self) -> float:
        """Mean over seeds."""
        return mean(self.losses.values())


class Curve(NamedTuple):
    """A row over learning rates.

    sensitivity: the mean over the rates of how far the loss is above that of the best rate,
    E[min(l(rate), l_0) - min l], l_0 the loss at the start (Wortsman and others, arXiv 2309.14322);
    low, high: its 95% interval over resampled seeds, NaN for one seed. seeds: those that every rate
    has, of which all of this is made. largest: the largest rate within NEAR of the best loss.
    """

    rates: dict[float, AtRate]
    seeds: tuple[int, ...]
    sensitivity: float
    low: float
    high: float
    largest: float

    @property
    def diverged(self) -> float:
        """Share of all runs."""
        runs = sum(len(at.losses) for at in self.rates.values())
        return sum(at.diverged for at in self.rates.values()) / runs


def over_rates(runs: Sequence[RunResult], loss: str) -> dict[str, Curve]:
    """The rows that have runs at several learning rates, by name.

    loss: the field of a run that is compared. Where runs do not tell their loss at the start (those
    of older tables), no loss is cut to it, and only one that is not finite has diverged.
    """
    by_row: dict[str, list[RunResult]] = {}
    for run in runs:
        by_row.setdefault(run.row, []).append(run)
    several = {
        name: of for name, of in by_row.items() if len({run.learning_rate for run in of}) > 1
    }
    return {name: _curve(of, loss) for name, of in several.items()}


def _curve(runs: list[RunResult], loss: str) -> Curve:
    rates = {
        rate: _at_rate([run for run in runs if run.learning_rate == rate], loss)
        for rate in sorted({run.learning_rate for run in runs})
    }
    seeds = tuple(sorted(set.intersection(*(set(at.losses) for at in rates.values()))))
    if not seeds:
        return Curve(rates, seeds, math.nan, math.nan, math.nan, math.nan)
    return Curve(
        rates,
        seeds,
        sensitivity(rates, seeds),
        *bootstrap(seeds, lambda drawn: sensitivity(rates, drawn)),
        largest_rate(rates, seeds),
    )


def _at_rate(runs: list[RunResult], loss: str) -> AtRate:
    ends, diverged = {}, 0
    for run in runs:
        start, end = run.number("first_loss"), run.number(loss)
        start = start if math.isfinite(start) else math.inf
        lost = not math.isfinite(end) or end >= start
        ends[run.seed] = start if lost else end
        diverged += lost
    logits = [z for run in runs if math.isfinite(z := run.number("largest_logit"))]
    spikes = [1000 * z for run in runs if math.isfinite(z := run.number("spike_share"))]
    return AtRate(ends, diverged, max(logits, default=math.nan), mean(spikes))


def _means(rates: dict[float, AtRate], seeds: Sequence[int]) -> dict[float, float]:
    return {rate: mean(at.losses[seed] for seed in seeds) for rate, at in rates.items()}


def sensitivity(rates: dict[float, AtRate], seeds: Sequence[int]) -> float:
    """See Curve; of the mean loss over these seeds, in nats."""
    losses = _means(rates, seeds).values()
    return mean(losses) - min(losses)


def largest_rate(rates: dict[float, AtRate], seeds: Sequence[int]) -> float:
    """The largest rate whose mean loss over these seeds is within NEAR of the best."""
    losses = _means(rates, seeds)
    return max(rate for rate, loss in losses.items() if loss <= min(losses.values()) + NEAR)
