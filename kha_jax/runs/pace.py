"""Who is slow, and who does not answer: what the processes of a run tell one another in the
runtime's table of words, from a thread of their own, so that no step waits for it."""

import contextlib
import json
import logging
import statistics
import threading
import time
from typing import Any, Iterator

import jax
from jax._src import distributed

log = logging.getLogger("kha_jax")
KEY = "kha_jax pace/"
BEAT = 2.0  # seconds between two words of a process
SILENT = 10.0  # seconds without a word, from which on process 0 mentions it
STEPS = 20  # in a report
SLOW = 1.5  # times the median


def stragglers(own: dict[int, float], step: float) -> set[int]:
    """Processes that keep the others waiting. All steps take equally long, since all wait for the
    slowest: what tells them apart is the part of a step in which a process does not wait.

    own: seconds of that part, by process. step: seconds of a step; who takes less than half of it
    does not decide how long it is.
    """
    usual = statistics.median_low(own.values())
    return {who for who, mine in own.items() if mine > SLOW * usual and mine > step / 2}


class Pace:
    """The steps of this process, and what the others tell of theirs. Within a `with` block it tells
    them every BEAT seconds; process 0 listens, and logs who is silent or slow. A process that is
    alone tells nobody.

    client: of the runtime's table of words. Private, but the one way to it.
    """

    def __init__(self, client: Any = None, index: int | None = None, count: int | None = None):
        self.client = client or distributed.global_state.client
        self.index = jax.process_index() if index is None else index
        self.count = jax.process_count() if count is None else count
        self.at, self.waits, self.words = 0, False, 0
        self.began, self.waited = None, 0.0
        self.times: list[tuple[float, float]] = []
        self.report: tuple[int, float, float] | None = None
        # What process 0 has heard, by process: the last word, and when it was new.
        self.heard: dict[int, tuple[int, float]] = {}
        self.silent: set[int] = set()
        self.judged: dict[int, int] = {}
        self.slow_once: set[int] = set()
        self.slow: set[int] = set()
        self.left = threading.Event()

    def step(self, number: int) -> None:
        """This step begins."""
        now = time.perf_counter()
        if self.began is not None:
            whole = now - self.began
            self.times.append((whole - self.waited, whole))
        self.at, self.began, self.waited = number, now, 0.0
        if len(self.times) == STEPS:
            own, whole = map(statistics.median, zip(*self.times))
            self.report, self.times = (number, own, whole), []

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Within, the process computes with the others or waits for them."""
        began, self.waits = time.perf_counter(), True
        try:
            yield
        finally:
            self.waits = False
            self.waited += time.perf_counter() - began

    def __enter__(self) -> "Pace":
        if self.count > 1:
            threading.Thread(target=self._talk, name="pace", daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.left.set()

    def _talk(self) -> None:
        while not self.left.wait(BEAT):
            with contextlib.suppress(RuntimeError):  # the table is gone, as the runtime will tell
                self.tell()
                if self.index == 0:
                    self.listen(self.told(), time.monotonic())

    def tell(self) -> None:
        """Says where this process is."""
        self.words += 1
        word = json.dumps([self.words, self.at, self.waits, self.report])
        self.client.key_value_set(f"{KEY}{self.index}", word, allow_overwrite=True)

    def told(self) -> dict[int, list[Any]]:
        """The last word of every process that has said one."""
        found = self.client.key_value_dir_get(KEY)
        return {int(key.rsplit("/", 1)[1]): json.loads(word) for key, word in found}

    def listen(self, told: dict[int, list[Any]], now: float) -> None:
        """Logs who is silent or slow, once until that changes."""
        for who, (number, *_) in told.items():
            if number != self.heard.get(who, (None,))[0]:
                if who in self.silent:
                    for_ = now - self.heard[who][1]
                    log.warning("process %d answers again, after %.0f s", who, for_)
                self.heard[who] = number, now
        silent = {who for who, (_, since) in self.heard.items() if now - since > SILENT}
        for who in sorted(silent - self.silent):
            log.warning("process %d has not answered for %.0f s: it is stopped", who, SILENT)
        self.silent = silent
        reports = {who: word[3] for who, word in told.items() if word[3]}
        fresh = [who for who in reports if reports[who][0] > self.judged.get(who, 0)]
        if len(fresh) == self.count:
            self._judge(reports)

    def _judge(self, reports: dict[int, list[Any]]) -> None:
        self.judged = {who: report[0] for who, report in reports.items()}
        own = {who: report[1] for who, report in reports.items()}
        now = stragglers(own, statistics.median(report[2] for report in reports.values()))
        slow = now & self.slow_once  # in two reports, one after the other
        for who in sorted(slow - self.slow):
            log.warning(
                "process %d is slow: %.3g s of its own in a step, %.3g s is usual; the others wait "
                "for it (%d steps until step %d)",
                who,
                own[who],
                statistics.median_low(own.values()),
                STEPS,
                reports[who][0],
            )
        self.slow, self.slow_once = slow, now

    def who_hangs(self) -> str:
        """Which processes do not wait for the others, as far as they tell; takes a few seconds."""
        if self.count == 1:
            return ""
        found: list[dict[int, list[Any]]] = []

        def look() -> None:
            with contextlib.suppress(RuntimeError):
                for seconds in (0.0, 2.5 * BEAT):
                    time.sleep(seconds)
                    found.append(self.told())

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        thread.join(5 * BEAT)  # the table is process 0's, which may be the one
        if len(found) < 2:
            return "; process 0 does not answer"
        if self.index == 0:  # the runtime aborts who misses it, before they have said this
            time.sleep(BEAT)
        return hanging(*found)


def hanging(before: dict[int, list[Any]], after: dict[int, list[Any]]) -> str:
    """The same from two looks at what they tell."""
    gone = [who for who in sorted(after) if before.get(who, [None])[0] == after[who][0]]
    busy = [who for who in sorted(after) if who not in gone and not after[who][2]]
    said = [f"process {who} does not answer" for who in gone]
    said += [f"process {who} is at step {after[who][1]} by itself" for who in busy]
    return "; " + (", ".join(said) or "all processes answer, and wait for one another")
