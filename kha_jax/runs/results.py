"""What came of runs: `runs.csv`, a line for each run of a sweep that has ended well."""

import csv
import io
import math
from pathlib import Path
from typing import Any, NamedTuple, Sequence

from kha_jax.errors import SweepError
from kha_jax.storage import open_regular, write_text


class RunResult(NamedTuple):
    """A line of runs.csv. Losses in nats per token: val_* of the last evaluation, None for what it
    or an older file does not have; train_loss the mean over the last tenth of the steps.
    step_seconds: median. data, validation: hashes of the texts. spike_share: see
    spikes.spike_score. nonfinite: steps that were not applied. first_loss: of training, before the
    first update. largest_logit: of attention, over all layers and steps. curve: validation losses
    by step."""

    name: str
    row: str
    seed: int
    learning_rate: float
    hash: str
    data: str
    validation: str | None
    steps: int
    parameters: int
    active_parameters: int
    flops_per_token: float
    val_loss: float
    val_bits_per_byte: float | None
    val_accuracy: float | None
    train_loss: float
    step_seconds: float
    spike_share: float
    nonfinite: int
    first_loss: float | None
    largest_logit: float | None
    hardware: str
    commit: str
    curve: dict[int, float]

    def number(self, field: str) -> float:
        """The field as a float, NaN for None."""
        value = getattr(self, field)
        return math.nan if value is None else float(value)


def _optional(text: str | None) -> float | None:
    return float(text) if text else None


def _curve(text: str) -> dict[int, float]:
    pairs = (pair.split(":") for pair in text.split())
    return {int(step): float(loss) for step, loss in pairs}


READERS = {
    float | None: _optional,
    str | None: lambda text: text or None,
    dict[int, float]: _curve,
}  # the other types read themselves


def read_results(path: Path) -> list[RunResult]:
    """The lines of a runs.csv.

    Raises:
        SweepError: it is not one, or one of its lines is damaged.
    """
    types = RunResult.__annotations__
    optional = {name for name, kind in types.items() if kind in (float | None, str | None)}
    results, at = [], 1

    def read(name: str, text: str | None) -> Any:
        return READERS.get(types[name], types[name])(text)

    try:
        with open_regular(path, newline="", errors="replace") as file:
            lines = csv.DictReader(file)
            if lacking := types.keys() - optional - set(lines.fieldnames or ()):
                raise SweepError(f"{path}: is no table of runs: it lacks {min(lacking)}")
            for at, line in enumerate(lines, 2):
                if None in line.values():
                    raise ValueError("it is cut off")
                results.append(RunResult(**{name: read(name, line.get(name)) for name in types}))
    except OSError as error:
        raise SweepError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, csv.Error) as error:
        raise SweepError(f"{path}: line {at} is damaged ({error!r})") from None
    return results


def write_results(path: Path, results: Sequence[RunResult]) -> None:
    """Writes a runs.csv, whole or not at all."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(RunResult._fields)
    for result in results:
        curve = " ".join(f"{step}:{loss:.5f}" for step, loss in result.curve.items())
        writer.writerow(result._replace(curve=curve))
    write_text(path, text.getvalue())
