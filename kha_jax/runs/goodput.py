"""Where the time of a run goes, over all its starts: seconds by kind, which sum to the time since
the run first began."""

import contextlib
import json
import logging
import os
import time
from pathlib import Path
from typing import Any, Iterator, Sequence

from kha_jax.metrics import read_lines
from kha_jax.storage import not_followed

# `lost`: steps that a restart did again, with all that came between them. `down`: from the last
# word of one start to the beginning of the next.
DONE_AGAIN = ("steps", "data_wait", "evaluation", "save")
KINDS = ("start", "compile", *DONE_AGAIN, "lost", "down")
PREFIX = "goodput/"  # of their names in metrics.jsonl
log = logging.getLogger("kha_jax")


def process_began() -> float:
    """When the process began, by time.time(): before the first import. Where the system does not
    tell, now."""
    with contextlib.suppress(OSError, ValueError, IndexError, AttributeError):
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        began = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # after the boot
        return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - began)
    return time.time()


def carried(rows: Sequence[dict[str, Any]], step: int) -> tuple[dict[str, float], float | None]:
    """(seconds by kind, time of the last word) that a run has behind it when it goes on after this
    step. rows: of its metrics the timed ones and the last, also of steps that it does again."""
    told = [row for row in rows if of(row)]
    if not told:
        return dict.fromkeys(KINDS, 0.0), None
    last = max(row["time"] for row in rows if "time" in row)
    kept = next((of(row) for row in reversed(told) if row["step"] <= step), {})
    seconds = {kind: of(told[-1]).get(kind, 0.0) for kind in KINDS}
    for kind in DONE_AGAIN:
        behind = kept.get(kind, 0.0)
        seconds["lost"] += seconds[kind] - behind
        seconds[kind] = behind
    seconds["lost"] += last - told[-1]["time"]
    return seconds, last


def of(row: dict[str, Any]) -> dict[str, float]:
    """Seconds by kind of a line of metrics; empty where it has none."""
    if not isinstance(row.get("time"), float):
        return {}
    found = {kind: row.get(PREFIX + kind) for kind in KINDS}
    return {kind: seconds for kind, seconds in found.items() if isinstance(seconds, float)}


def share(seconds: dict[str, float]) -> float:
    """Of the time, what went into steps that count."""
    return seconds["steps"] / (sum(seconds.values()) or 1.0)


class Goodput:
    """A stopwatch of which one kind runs at any time. Leaving it as a context writes the last line
    of metrics.jsonl and says where the time went, once `go_on` has been called.

    began: when the process did, by time.time().
    """

    def __init__(self, began: float):
        self.seconds = dict.fromkeys(KINDS, 0.0)
        self.kind, self.since = "start", began
        self.path: Path | None = None
        self.step = 0

    def go_on(self, path: Path, step: int) -> None:
        """Adds what the run has behind it after this step, as its metrics tell. path: of them."""
        self.path, self.step = path, step
        timed, row = [], {}
        with contextlib.suppress(OSError):  # there is none yet, or nobody can read it
            for row in read_lines(path):  # far more than are timed
                if of(row):
                    timed.append(row)
        before, last = carried([*timed, row], step)
        if last is not None:
            began = self.since - self.seconds["start"]
            before["down"] += max(0.0, began - last)
        self.seconds = {kind: before[kind] + self.seconds[kind] for kind in KINDS}

    def enter(self, kind: str) -> None:
        """From now on this kind runs."""
        now = time.time()
        self.seconds[self.kind] += now - self.since
        self.kind, self.since = kind, now

    @contextlib.contextmanager
    def at(self, kind: str) -> Iterator[None]:
        """This kind runs within, and what ran before after it."""
        before = self.kind
        self.enter(kind)
        try:
            yield
        finally:
            self.enter(before)

    def read(self) -> dict[str, float]:
        """Seconds by kind until now."""
        self.enter(self.kind)
        return dict(self.seconds)

    def values(self) -> dict[str, float]:
        """The same as metrics."""
        return {PREFIX + kind: round(seconds, 3) for kind, seconds in self.read().items()}

    def __enter__(self) -> "Goodput":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        if self.path is None:
            return
        values = self.values()
        row = {"step": self.step, "time": round(self.since, 3), **values}
        with contextlib.suppress(OSError), open(self.path, "ab", opener=not_followed) as file:
            file.write(json.dumps(row).encode() + b"\n")
        if kind is None:  # an error has one line, its own
            log.info("%s", spelt(self.seconds))


def spelt(seconds: dict[str, float]) -> str:
    """Where the time went, in one line."""
    spent = ", ".join(
        f"{kind.replace('_', ' ')} {seconds[kind]:.1f}" for kind in KINDS if seconds[kind] >= 0.05
    )
    whole = sum(seconds.values())
    return f"goodput {share(seconds):.1%} of {whole:.1f} s since the run began: {spent}"
