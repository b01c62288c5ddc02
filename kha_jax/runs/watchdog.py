"""Notices that a run does not go on: what waits for a device, a disk or another process may wait
for ever, and nothing else would tell."""

import logging
import threading
import time
from typing import Any, Callable

ALLOWANCE = 3600.0  # seconds for what is no step: compilation, an evaluation, a checkpoint
LOOKS = 1.0  # seconds between two looks at the clock, at most
STOPPED = 10.0  # seconds that a look comes late, from which on it is mentioned
log = logging.getLogger("kha_jax")


class Watchdog:
    """Calls `hung` with a message, from a thread of its own, when what the run is at takes longer
    than it may. Within a `with` block only. The time in which the whole process was stopped, as by
    Ctrl-Z or with its control group, does not count.

    seconds: that a step may take; ALLOWANCE is added for what is none. hung: must end the process.
    """

    def __init__(self, seconds: float, hung: Callable[[str], Any]):
        self.seconds, self.hung = seconds, hung
        self.changed, self.done = threading.Condition(), False
        self.look = min(seconds / 4, LOOKS)
        self.clock = 0.0, time.monotonic()  # seconds that counted so far, and when that was
        self.allow("the start")
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def step(self, number: int) -> None:
        """The run is at this step from now on."""
        self._expect(f"step {number}", self.seconds)

    def allow(self, what: str) -> None:
        """The run is at something that takes longer than a step from now on."""
        self._expect(what, self.seconds + ALLOWANCE)

    def _expect(self, what: str, seconds: float) -> None:
        # The thread looks at these when it wakes; a step that begins need not wake it.
        self.expected = what, seconds, self._counted() + seconds

    def _counted(self) -> float:
        """Seconds in which this process could run: a look that comes much later than it should was
        kept from coming, and the time in between from being used."""
        counted, looked = self.clock
        return counted + min(time.monotonic() - looked, 2 * self.look)

    def _watch(self) -> None:
        with self.changed:
            while not self.done:
                what, seconds, deadline = self.expected
                late = time.monotonic() - self.clock[1] - self.look
                if late > STOPPED:
                    log.warning("stopped for %.0f s during %s, which do not count", late, what)
                self.clock = self._counted(), time.monotonic()
                left = deadline - self.clock[0]
                if left <= 0:
                    break
                self.changed.wait(min(left, self.look))
        if not self.done:
            self.hung(
                f"no end of {what} within {seconds:g} s (config.hang_timeout={self.seconds:g}); "
                "the stacks of all threads are above"
            )

    def __enter__(self) -> "Watchdog":
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        with self.changed:
            self.done = True
            self.changed.notify()
