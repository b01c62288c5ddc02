"""How a run is asked to stop: by signals, in one process and in many."""

import logging
import os
import signal
import socket
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

from experiments.cli import command_line
from kha_jax.runs import processes

log = logging.getLogger("kha_jax")


def asking() -> list[int]:
    """Signals that ask a command to save and leave; a closed terminal is none under nohup."""
    numbers = [signal.SIGTERM, signal.SIGINT]
    return (
        numbers if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [*numbers, signal.SIGHUP]
    )


class Stop:
    """SIGTERM, Ctrl-C and a terminal that is closed: the first asks the loop to save and leave, the
    second leaves at once. Where there are several processes it is enough to tell one of them.

    A handler in Python waits until the main thread comes back from the runtime, which may hang; a
    thread therefore counts the signals too.
    """

    def __init__(self):
        self.asked, self.handled = False, 0
        self.numbers, writing = socket.socketpair()
        writing.setblocking(False)
        signal.set_wakeup_fd(writing.detach(), warn_on_full_buffer=False)
        self.runtime = processes.handler_of(signal.SIGTERM)
        for number in asking():
            signal.signal(number, self._ask)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def _ask(self, *_: Any) -> None:
        self.asked, self.handled = True, self.handled + 1
        if self.handled > 1:
            os._exit(command_line.PREEMPTED)

    def _listen(self) -> None:
        (number,) = self.numbers.recv(1)
        self.asked = True
        self.runtime(signal.SIGTERM)
        log.info(
            "%s: saving after this step; once more leaves at once", signal.Signals(number).name
        )
        self.numbers.recv(1)
        os._exit(command_line.PREEMPTED)

    def now(self, step: int) -> bool:
        return (
            self.asked
            if jax.process_count() == 1
            else multihost_utils.reached_preemption_sync_point(step)
        )
