"""What a person sees of prepare_data: a live line on a terminal, plain lines elsewhere."""

import logging
import time
from typing import Any

from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from experiments.cli.terminal import CONSOLE, say
from experiments.preparing.processes import Seen

SECONDS_BETWEEN_LINES = 10
log = logging.getLogger("kha_jax")


def count(number: float) -> str:
    """4.2 G, 310 M or 12 k."""
    for size, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {name}"
    return f"{number:g}"


def many(number: int, what: str) -> str:
    """1 file, 2 files."""
    return f"{number:,} {what}{'s' * (number != 1)}"


class Progress:
    """Follows tasks over `total` bytes of input, of which `done` were done before; a context."""

    def __init__(self, doing: str, total: int, done: int = 0):
        self.doing, self.total, self.before = doing, total, done
        self.ended = Seen(0)  # sums over the tasks that have ended
        self.now: dict[int, Seen] = {}
        self.began = self.spoke = time.monotonic()
        self.said: set[str] = set()
        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            console=CONSOLE,
            expand=True,
        )
        self.task = None

    def __enter__(self) -> "Progress":
        if CONSOLE.is_interactive:
            self.bar.start()
            self.task = self.bar.add_task(self.doing, total=self.total, completed=self.before)
        return self

    def __exit__(self, *raised: Any) -> None:
        if self.task is not None:
            self.bar.stop()

    def told(self, index: int, kind: str, content: Any) -> None:
        """What a task reports, see `processes.Report`."""
        if kind == "seen":
            self.now[index] = content
            self._show()
        elif content[0] not in self.said:
            self.said.add(content[0])
            log.warning(content[1])

    def end(self, index: int, seen: Seen) -> None:
        """A task has ended, having done this much."""
        self.now.pop(index, None)
        self.ended = _sum(self.ended, seen)
        self._show()

    def _show(self) -> None:
        line, now = self.line(), time.monotonic()
        if self.task is not None:
            all_of_it = self.before + self._so_far().done
            self.bar.update(self.task, completed=all_of_it, description=line)
        elif now - self.spoke > SECONDS_BETWEEN_LINES:
            say(line)
            self.spoke = now

    def _so_far(self) -> Seen:
        return _sum(self.ended, *self.now.values())

    def line(self) -> str:
        """How far it is, how fast, and what is left at this pace."""
        seen, seconds = self._so_far(), time.monotonic() - self.began
        share = (self.before + seen.done) / max(1, self.total)
        parts = [f"{self.doing} {share:.0%}"]
        if seen.bytes and seconds:
            parts.append(f"{seen.bytes / 1e6 / seconds:.1f} MB/s")
        if seen.documents:
            parts.append(f"{count(seen.tokens)} tokens  {count(seen.documents)} documents")
        if seen.done and share < 1:
            left = (self.total - self.before - seen.done) * seconds / seen.done / 60
            parts.append(f"{left / 60:.1f} h left" if left > 90 else f"{left:.0f} min left")
        return "  ".join(parts)


def _sum(*some: Seen) -> Seen:
    return Seen(*map(sum, zip(*some)))
