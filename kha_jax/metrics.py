"""Metrics of a run: one JSON object a line, optional TensorBoard, and the meter that turns times
into rates."""

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

log = logging.getLogger("kha_jax")


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """Cross-entropy in bits per byte of text, from nats per token."""
    return loss / math.log(2) / bytes_per_token


class MetricsFile:
    """`metrics.jsonl`: one object a line with its step. Opening it at a step cuts it back to the
    lines up to that step.

    A failing disk costs metrics and not the run: the first failure is logged, all are counted in
    `lost`. `last` is the last line that was kept.
    """

    def __init__(self, path: Path, from_step: int):
        self.lost = 0
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        temporary = path.with_suffix(".tmp")
        kept = [line for line in lines if _step(line) is not None and _step(line) <= from_step]
        self.last = json.loads(kept[-1]) if kept else {}
        temporary.write_text("".join(kept))
        temporary.rename(path)
        self.file = open(path, "a", buffering=1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        try:
            self.file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            self.lost += 1
            if self.lost == 1:
                log.warning("metrics.jsonl cannot be written, training goes on: %s", error)

    def close(self) -> None:
        try:
            self.file.close()
        except OSError:
            self.lost += 1


def _step(line: str) -> int | None:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None  # the line that a kill cut short


class TensorBoard:
    """The same metrics as TensorBoard scalars.

    Raises:
        ImportError: names the extra that brings tensorboardX.
    """

    def __init__(self, folder: Path):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise ImportError(
                "TensorBoard needs the extra: pip install -e '.[tensorboard]'"
            ) from None
        self.writer = SummaryWriter(str(folder))

    def write(self, step: int, values: dict[str, Any]) -> None:
        for name, value in values.items():
            for layer, number in enumerate(value) if isinstance(value, list) else ():
                self.writer.add_scalar(f"{name}/layer_{layer:02d}", number, step)
            if isinstance(value, (int, float)):
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


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
