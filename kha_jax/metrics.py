"""Metrics of a run: one JSON object a line, optional TensorBoard, and the meter that turns times
into rates."""

import collections
import errno
import json
import logging
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Sequence

import numpy as np

SPIKING = ("loss", "grad_norm")  # what the spike score looks at
log = logging.getLogger("kha_jax")


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """Cross-entropy in bits per byte of text, from nats per token."""
    return loss / math.log(2) / bytes_per_token


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics.jsonl that are whole: objects with a step."""
    with open(path, errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue  # a line that a kill or a full disk cut short
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                yield row


def plain(value: Any) -> Any:
    """The value with None in place of what JSON cannot say: nan and infinities."""
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plain_row(values: dict[str, Any]) -> dict[str, Any]:
    """See plain."""
    return {name: plain(value) for name, value in values.items()}


class MetricsFile:
    """`metrics.jsonl`: one object a line with its step, null for what is not finite. Opening it at
    a step cuts it back to the lines up to that step; `last` is the last line that was kept.

    Raises:
        OSError: from any method. A line that was written in part is ended before the next one.
    """

    def __init__(self, path: Path, from_step: int):
        self.last: dict[str, Any] = {}
        temporary = path.with_suffix(".tmp")
        if path.exists():
            with open(temporary, "w") as file:
                for row in read_lines(path):
                    if row["step"] <= from_step:
                        self.last = row
                        file.write(json.dumps(plain_row(row)) + "\n")
            temporary.rename(path)
        self.file, self.torn = open(path, "ab", buffering=0), False

    def write(self, step: int, values: dict[str, Any]) -> None:
        line = json.dumps({"step": step, **plain_row(values)}, allow_nan=False).encode() + b"\n"
        line = b"\n" + line if self.torn else line
        self.torn = True
        written = self.file.write(line)
        if written != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.torn = False

    def close(self) -> None:
        self.file.close()


class TensorBoard:
    """The same metrics as TensorBoard scalars, written at once: the package's own writer has a
    queue that waits for ever once its thread has met a full disk.

    Raises:
        ImportError: names the extra that brings tensorboardX.
        OSError: from any method.
    """

    def __init__(self, folder: Path):
        try:
            from tensorboardX import summary
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event
        except ImportError:
            raise ImportError(
                "TensorBoard needs the extra: pip install -e '.[tensorboard]'"
            ) from None
        self.scalar, self.event = summary.scalar, Event
        folder.mkdir(parents=True, exist_ok=True)
        self.writer = EventsWriter(str(folder / "events"))

    def write(self, step: int, values: dict[str, Any]) -> None:
        for name, value in values.items():
            for layer, number in enumerate(value) if isinstance(value, list) else ():
                self._add(f"{name}/layer_{layer:02d}", number, step)
            if isinstance(value, (int, float)):
                self._add(name, value, step)
        self.writer.flush()

    def _add(self, name: str, value: float, step: int) -> None:
        event = self.event(summary=self.scalar(name, value), wall_time=time.time(), step=step)
        self.writer.write_event(event)

    def close(self) -> None:
        self.writer.close()


class Spared:
    """Something that a run can do without: what it raises does not stop the run. The first failure
    is logged, all are counted in `lost`.

    Args:
        name: what a person calls it.
        make: opens it; where that fails, every use counts as lost.
    """

    def __init__(self, name: str, make: Callable[[], Any]):
        self.name, self.lost, self.inner = name, 0, None
        self.inner = self._attempt(make)

    def _attempt(self, action: Callable, *arguments: Any) -> Any:
        try:
            return action(*arguments)
        except Exception as error:
            self.lost += 1
            if self.lost == 1:
                reason = " ".join(str(error).split())
                log.warning("%s cannot be written, training goes on: %s", self.name, reason)
            return None

    def call(self, method: str, *arguments: Any) -> None:
        """Calls a method of it."""
        if self.inner is None:
            self.lost += 1
        else:
            self._attempt(getattr(self.inner, method), *arguments)

    def close(self) -> None:
        """Closes it and says how much was lost."""
        if self.inner is not None:
            self.call("close")
        if self.lost:
            log.warning("%s: %d failures, training went on", self.name, self.lost)


class Spikes:
    """Notices a value far above its recent ones: by more than `far` times the median distance from
    the median of the last `window`, which is taken as 1% of the median at least."""

    def __init__(self, window: int = 100, enough: int = 20, far: float = 15.0):
        self.recent: collections.deque[float] = collections.deque(maxlen=window)
        self.enough, self.far = enough, far

    def median_below(self, value: float) -> float | None:
        """The recent median if the value is far above it, else None; the value is recent from now
        on."""
        recent = sorted(self.recent)
        if math.isfinite(value):
            self.recent.append(value)
        if len(recent) < self.enough or not math.isfinite(value):
            return None
        median = statistics.median(recent)
        spread = statistics.median(abs(one - median) for one in recent)
        return median if value > median + self.far * max(spread, 0.01 * abs(median)) else None


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

    def away(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(distance in spreads, centre, spread) of each value, NaN where history is missing; the
        distance of a value that is not finite is infinite."""
        centre, spread = np.full((2, len(values)), np.nan)
        finite = np.isfinite(values)
        for i in range(len(values)):
            since = max(0, i - self.window)
            recent = values[since:i][finite[since:i]]
            if len(recent) < self.history:
                continue
            if self.robust:
                centre[i] = middle = np.median(recent)
                scale = 1.4826 * np.median(np.abs(recent - middle))
                spread[i] = max(scale, self.least * abs(middle))
            else:
                centre[i], spread[i] = recent.mean(), recent.std()
        with np.errstate(divide="ignore", invalid="ignore"):
            distance = np.where(values == centre, 0.0, (values - centre) / spread)
        return np.where(finite | np.isnan(centre), distance, np.inf), centre, spread

    def marks(self, distance: np.ndarray) -> np.ndarray:
        """Which distances are those of a spike."""
        return (distance if self.robust else np.abs(distance)) >= self.far


def spike_rule(length: int) -> SpikeRule:
    """OLMo 2's rule where a series is longer than its window, else the robust one over 40 values,
    few enough that a falling loss moves little within them: it calls less than one in 10^4 values
    of white noise a spike."""
    full = SpikeRule()
    return full if length > full.window else SpikeRule(window=40, history=20, robust=True)


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


def column(rows: Iterable[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the lines that have the name, the largest entry of a list; NaN for what is
    no number. Of lines with one step the last counts."""
    found = {}
    for row in rows:
        if name in row:
            value = row[name]
            listed = value if isinstance(value, list) else [value]
            numbers = [z for z in listed if isinstance(z, (int, float))]
            found[row["step"]] = max(numbers) if len(numbers) == len(listed) > 0 else math.nan
    steps = sorted(found)
    return np.array(steps, np.int64), np.array([found[step] for step in steps], np.float64)


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


class Meter:
    """Rates between two readings."""

    def __init__(self, training_flops_per_token: float, peak_flops: float):
        self.flops, self.peak = training_flops_per_token, peak_flops
        self.waited = 0.0
        self.since = time.perf_counter()

    def wait(self, seconds: float) -> None:
        """Adds time spent waiting for data."""
        self.waited += seconds

    def pause(self, seconds: float) -> None:
        """Leaves out time that was not training: evaluation, checkpoints."""
        self.since += seconds

    def read(self, tokens: float) -> dict[str, float]:
        """tokens_per_second, data_wait_fraction and, where the peak is known,
        model_flops_utilization since the last reading."""
        now = time.perf_counter()
        elapsed = max(now - self.since, 1e-9)
        rates = {
            "tokens_per_second": tokens / elapsed,
            "data_wait_fraction": min(1.0, self.waited / elapsed),
        }
        if not math.isnan(self.peak):
            rates["model_flops_utilization"] = tokens / elapsed * self.flops / self.peak
        self.waited, self.since = 0.0, now
        return rates
