"""Spikes of a curve: what one is, and how many a run has."""

import collections
import math
from typing import Any, Iterable, NamedTuple, Sequence

import numpy as np

from kha_jax.metrics import column

SPIKING = ("loss", "grad_norm")  # what the spike score looks at


class SpikeRule(NamedTuple):
    """When a value of a series is a spike: it is `far` spreads or more from the centre of the
    `window` values before it, of which there must be `history`.

    The mean and the standard deviation, and a fall counts like a rise, are the spike score of OLMo
    2 (arXiv 2501.00656); what history a value needs is not said there. `robust`, for runs shorter
    than that window: the median and 1.4826 times the median absolute deviation (at least `least`
    of the median), which a first spike does not widen; rises alone, since the fall of a loss at the
    start of training is none. A value that is not finite is a spike.
    """

    window: int = 1000
    history: int = 100
    far: float = 7.0
    robust: bool = False
    least: float = 1e-3

    def describe(self) -> str:
        """The rule in words."""
        centre, spread, side = "mean", "standard deviations", "from"
        if self.robust:
            centre, spread, side = "median", "1.4826 x median absolute deviations", "above"
        return (
            f"at least {self.far:g} {spread} {side} the rolling {centre} of the last "
            f"{self.window} values, of which {self.history} are needed"
        )

    def away_from(self, value: float, recent: np.ndarray) -> tuple[float, float, float]:
        """(distance in spreads, centre, spread) of a value that comes after these finite ones; NaN
        where they are too few, an infinite distance where it is not finite."""
        if len(recent) < self.history:
            return math.nan, math.nan, math.nan
        if self.robust:
            centre = float(np.median(recent))
            scale = 1.4826 * float(np.median(np.abs(recent - centre)))
            spread = max(scale, self.least * abs(centre))
        else:
            centre, spread = float(recent.mean()), float(recent.std())
        if not math.isfinite(value):
            return math.inf, centre, spread
        away = value - centre
        distance = away / spread if spread else math.copysign(math.inf, away)
        return distance if away else 0.0, centre, spread

    def away(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same of each value of a series, after those of its window."""
        finite, found = np.isfinite(values), np.full((3, len(values)), np.nan)
        for i in range(len(values)):
            since = max(0, i - self.window)
            found[:, i] = self.away_from(values[i], values[since:i][finite[since:i]])
        return tuple(found)

    def marks(self, distance: float | np.ndarray) -> bool | np.ndarray:
        """Which distances are those of a spike."""
        return (distance if self.robust else abs(distance)) >= self.far


def spike_rule(length: int) -> SpikeRule:
    """OLMo 2's rule where a series is longer than its window, else the robust one over 40 values,
    few enough that a falling loss moves little within them: it calls less than one in 10^4 values
    of white noise a spike."""
    full = SpikeRule()
    return full if length > full.window else SpikeRule(window=40, history=20, robust=True)


class Spikes:
    """Notices the spikes of a series that is still growing, by the rule of `find_spikes`."""

    def __init__(self, rule: SpikeRule):
        self.rule = rule
        self.recent: collections.deque[float] = collections.deque(maxlen=rule.window)

    def centre_before(self, value: float) -> float | None:
        """The recent centre if the value is a spike, else None; it is recent from now on. A value
        that is not finite is told elsewhere."""
        recent = np.array(self.recent)
        self.recent.append(value)
        if not math.isfinite(value):
            return None
        distance, centre, _ = self.rule.away_from(value, recent[np.isfinite(recent)])
        return centre if self.rule.marks(distance) else None


class Spike(NamedTuple):
    """One excursion of a series.

    step: its first. peak: the value that is furthest out, NaN where one was not finite. centre:
    before it. spreads: how many of them the peak is away, NaN likewise. recovery: steps until a
    value is within 2 spreads of that centre again, or better (below it, for a rise); None where
    none is within a window of values.
    """

    name: str
    step: int
    peak: float
    centre: float
    spreads: float
    recovery: int | None

    @property
    def size(self) -> float:
        """The peak over the centre, in the series' unit (nats for a loss)."""
        return self.peak - self.centre

    @property
    def times(self) -> float:
        """The peak in multiples of the centre."""
        return self.peak / self.centre if self.centre else math.nan


def find_spikes(
    steps: Sequence[int], values: Sequence[float], name: str = "", rule: SpikeRule | None = None
) -> list[Spike]:
    """The spikes of a series, first to last. Values that spike before the series has recovered
    belong to the first of them.

    rule: `spike_rule` of the length by default.
    """
    values = np.asarray(values, np.float64)
    rule = rule or spike_rule(len(values))
    distance, centres, spreads = rule.away(values)
    found, end = [], 0
    for at in np.flatnonzero(rule.marks(distance)):
        if at < end:
            continue
        sign = -1.0 if distance[at] < 0 else 1.0
        after = sign * (values[at : at + rule.window] - centres[at])
        back = np.flatnonzero(after <= 2 * spreads[at])  # NaN is not back
        end = at + (int(back[0]) if back.size else len(after))
        furthest = float(after[: end - at].max())
        peak, out = centres[at] + sign * furthest, furthest / spreads[at] if spreads[at] else np.inf
        recovery = int(steps[end] - steps[at]) if back.size else None
        numbers = float(peak), float(centres[at]), float(out)
        found.append(Spike(name, int(steps[at]), *numbers, recovery))
    return found


def spikes_in(rows: Sequence[dict[str, Any]], names: Sequence[str] = SPIKING) -> list[Spike]:
    """The spikes of the named series of a log, each series by itself, first to last; see
    `spike_score` for rows."""
    found = [find_spikes(*column(rows, name), name) for name in names]
    return sorted(sum(found, []), key=lambda spike: spike.step)


def spike_score(rows: Iterable[dict[str, Any]], names: Sequence[str] = SPIKING) -> float:
    """Share of steps at which one of the named series is a spike (`spike_rule` of its length), of
    the steps with enough history; NaN where there are none.

    rows: objects with `step` and the names, such as `read_lines` gives of any JSONL log. Windows
    count logged lines.
    """
    rows, scored, spiked = list(rows), set(), set()
    for name in names:
        steps, values = column(rows, name)
        rule = spike_rule(len(values))
        distance, *_ = rule.away(values)
        scored.update(steps[~np.isnan(distance)].tolist())
        spiked.update(steps[rule.marks(distance)].tolist())
    return len(spiked) / len(scored) if scored else math.nan
