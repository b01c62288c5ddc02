"""Metrics of a run: one JSON object a line, optional TensorBoard, and the meter that turns times
into rates."""

import errno
import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator

import numpy as np

from kha_jax.storage import not_followed, open_regular, replacing

log = logging.getLogger("kha_jax")


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """Cross-entropy in bits per byte of text, from nats per token."""
    return loss / math.log(2) / bytes_per_token


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics.jsonl that are whole: objects with a step."""
    with open_regular(path, errors="replace") as file:
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
    a step cuts it back to the lines up to that step; `last` is what was kept of its last step.

    Raises:
        OSError: from any method. A line that was written in part is ended before the next one.
    """

    def __init__(self, path: Path, from_step: int):
        self.last: dict[str, Any] = {}
        if path.exists():
            with replacing(path) as temporary, open(temporary, "x") as file:
                for row in read_lines(path):
                    if row["step"] <= from_step:
                        same = row["step"] == self.last.get("step")
                        self.last = {**self.last, **row} if same else row
                        file.write(json.dumps(plain_row(row)) + "\n")
        self.file, self.torn = open(path, "ab", buffering=0, opener=not_followed), False

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
    queue that waits for ever once its thread has met a full disk. Opening it at a step begins a
    session, for which TensorBoard drops what an earlier one wrote after that step.

    Raises:
        ImportError: names the extra that brings tensorboardX.
        OSError: from any method.
    """

    def __init__(self, folder: Path, from_step: int):
        try:
            from tensorboardX import summary
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog
        except ImportError:
            raise ImportError(
                "TensorBoard needs the extra: pip install -e '.[tensorboard]'"
            ) from None
        self.scalar, self.event = summary.scalar, Event
        folder.mkdir(parents=True, exist_ok=True)
        self.writer = EventsWriter(str(folder / "events"))
        start = SessionLog(status=SessionLog.START)
        self.writer.write_event(Event(session_log=start, wall_time=time.time(), step=from_step + 1))
        self.writer.flush()

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
