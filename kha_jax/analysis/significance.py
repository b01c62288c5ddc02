"""What repeated runs say: paired differences with their intervals, and whether an order of rows is
that of another list. Numpy and nothing else."""

import functools
import itertools
import math
from typing import Callable, Iterable, Mapping, NamedTuple, Sequence

import numpy as np

LEVEL = 0.95  # of intervals
POWER = 0.8  # with which an effect that can be detected is found


def _within(angle: float, freedom: int) -> float:
    """The probability of |t| < sqrt(freedom) tan(angle) under Student's distribution, by its finite
    series (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = total = cosine if odd else 1.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    if not odd:
        return sine * total
    return 2 / math.pi * (angle + (sine * total if freedom > 1 else 0))


def student_tails(t: float, freedom: int) -> float:
    """The probability of a value at least as far from 0 under Student's distribution."""
    return 1 - _within(math.atan(abs(t) / math.sqrt(freedom)), freedom)


@functools.cache
def student_quantile(probability: float, freedom: int) -> float:
    """The t below which Student's distribution with these degrees of freedom has this
    probability, by bisection.

    Raises:
        ValueError: a probability outside (0, 1), or freedom below 1.
    """
    if not 0 < probability < 1 or freedom < 1:
        raise ValueError(f"needs 0 < probability < 1 and freedom >= 1: {probability}, {freedom}")
    if probability < 0.5:
        return -student_quantile(1 - probability, freedom)

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        below = _within(middle, freedom) < 2 * probability - 1
        low, high = (middle, high) if below else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def mean(values: Iterable[float]) -> float:
    """NaN of none."""
    values = list(values)
    return math.fsum(values) / len(values) if values else math.nan


class Difference(NamedTuple):
    """A mean of paired differences.

    count: pairs. error: standard error of the mean; it and the bounds of the 95% interval are NaN
    for a single pair.
    """

    count: int
    mean: float
    error: float
    low: float
    high: float

    @property
    def distinguishable(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0

    @property
    def p(self) -> float:
        """Of a mean at least as far from 0 where there is no difference (two-sided paired t-test);
        NaN for a single pair."""
        if self.count < 2:
            return math.nan
        if not self.error:
            return 0.0 if self.mean else 1.0
        return student_tails(self.mean / self.error, self.count - 1)


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> Difference:
    """values - baseline over the seeds that both have, with the interval of Student's t."""
    seeds = sorted(values.keys() & baseline.keys())
    differences = np.array([values[seed] - baseline[seed] for seed in seeds], np.float64)
    count = len(differences)
    mean = float(differences.mean()) if count else math.nan
    if count < 2:
        return Difference(count, mean, math.nan, math.nan, math.nan)
    error = float(differences.std(ddof=1)) / math.sqrt(count)
    half = student_quantile((1 + LEVEL) / 2, count - 1) * error
    return Difference(count, mean, error, mean - half, mean + half)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values adjusted so that, where a row is called different at an adjusted p of at most a,
    any false call among all rows has a probability of at most a (Holm 1979): the k-th smallest of m
    times m - k + 1, at least the one before it, at most 1. NaN, for what has no p value, stays and
    does not count."""
    known = sorted((p, at) for at, p in enumerate(p_values) if not math.isnan(p))
    adjusted, least = [math.nan] * len(p_values), 0.0
    for passed, (p, at) in enumerate(known):
        least = max(least, min(1.0, (len(known) - passed) * p))
        adjusted[at] = least
    return adjusted


def bootstrap(
    seeds: Sequence[int], statistic: Callable[[list[int]], float], draws: int = 2000
) -> tuple[float, float]:
    """The central 95% of a statistic over sets of seeds drawn with replacement (Efron's percentile
    interval); the same each time, coarse for few seeds, NaN for one.

    statistic: of a list of seeds, in which some stand twice.
    """
    if len(seeds) < 2:
        return math.nan, math.nan
    drawn = np.random.default_rng(0).choice(seeds, (draws, len(seeds)))
    found = [statistic(one.tolist()) for one in drawn]
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(found, [tail, 1 - tail])
    return float(low), float(high)


def pooled_deviation(differences: Sequence[Difference]) -> tuple[float, int]:
    """(standard deviation of one paired difference, degrees of freedom) over rows whose noise is
    taken as equal; NaN and 0 where no row has two pairs."""
    known = [one for one in differences if one.count > 1]
    freedom = sum(one.count - 1 for one in known)
    squares = sum((one.count - 1) * one.count * one.error**2 for one in known)
    return (math.sqrt(squares / freedom) if freedom else math.nan), freedom


def detectable(deviation: float, count: int) -> float:
    """The difference that `count` pairs find with probability POWER: (t_0.975 + t_0.8) s / sqrt(n),
    with count - 1 degrees of freedom; infinite for one pair. A little too small for few pairs (at 3
    it is found with probability 0.77)."""
    if count < 2:
        return math.inf
    t = student_quantile((1 + LEVEL) / 2, count - 1) + student_quantile(POWER, count - 1)
    return t * deviation / math.sqrt(count)


def pairs_needed(deviation: float, effect: float, most: int = 100) -> int | None:
    """The fewest pairs that detect an effect; None where `most` do not."""
    return next((n for n in range(2, most + 1) if detectable(deviation, n) <= effect), None)


def ranks(values: Sequence[float]) -> np.ndarray:
    """From 1; equal values share the mean of theirs."""
    values = np.asarray(values, np.float64)
    below = (values[None] < values[:, None]).sum(1)
    return below + ((values[None] == values[:, None]).sum(1) + 1) / 2


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Correlation of the ranks; NaN where one side is constant."""
    x, y = (ranks(z) - (len(z) + 1) / 2 for z in (a, b))
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / scale if scale else math.nan


def kendall(a: Sequence[float], b: Sequence[float]) -> float:
    """Kendall's tau-b: (concordant - discordant) / sqrt(untied in a * untied in b), over pairs."""
    x, y = (np.sign(np.subtract.outer(z, z)) for z in (np.asarray(a), np.asarray(b)))
    scale = math.sqrt(float((x * x).sum()) * float((y * y).sum()))
    return float((x * y).sum()) / scale if scale else math.nan


class Agreement(NamedTuple):
    """How a measured list stands to a printed one.

    rows: compared. same_sign: of them, with one sign. spearman, kendall: rank correlations. low,
    high: of Spearman's over resampled seeds (NaN with one seed). chance: share of random orders
    that correlate at least as well.
    """

    rows: int
    same_sign: int
    spearman: float
    kendall: float
    low: float
    high: float
    chance: float


def agreement(
    measured: Sequence[Mapping[int, float]], printed: Sequence[float], draws: int = 2000
) -> Agreement:
    """Compares rows of differences per seed with the printed differences.

    The interval is the central 95% over `draws` sets of seeds, drawn with replacement and alike for
    all rows (they are paired): the noise of the seeds, not of which rows there are, and coarse for
    few seeds. `chance` takes all orders of up to 7 rows, else `draws` random ones. Both are the
    same each time.
    """
    means = np.array([np.mean(list(row.values())) for row in measured])
    same = int((np.sign(means) == np.sign(printed)).sum())
    if len(means) < 3:
        nothing = math.nan
        return Agreement(len(means), same, nothing, nothing, nothing, nothing, nothing)
    random = np.random.default_rng(0)
    found = spearman(means, printed)
    seeds = sorted(set().union(*measured))
    correlations = []
    for _ in range(draws if len(seeds) > 1 else 0):
        drawn = random.choice(seeds, len(seeds)).tolist()
        rows = [[row[seed] for seed in drawn if seed in row] for row in measured]
        if all(rows):
            correlations.append(spearman([np.mean(row) for row in rows], printed))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(correlations, [tail, 1 - tail]) if correlations else (math.nan,) * 2
    chance = _chance(lambda order: spearman(means[order], printed), len(means), found, draws)
    return Agreement(
        len(means), same, found, kendall(means, printed), float(low), float(high), chance
    )


def _chance(
    correlate: Callable[[np.ndarray], float], count: int, found: float, draws: int
) -> float:
    random = np.random.default_rng(1)
    if count <= 7:
        orders = (np.array(order) for order in itertools.permutations(range(count)))
    else:
        orders = (random.permutation(count) for _ in range(draws))
    reached = [correlate(order) >= found - 1e-12 for order in orders]
    own = count > 7  # of random orders, the one that was found is one more
    return (sum(reached) + own) / (len(reached) + own)
