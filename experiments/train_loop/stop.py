"""How a run is asked to stop, by signals, and to save, by the clock: in one process and in many."""

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.cli import codes, command_line
from kha_jax.runs import processes

log = logging.getLogger("kha_jax")
SAVE_DUE = "save_due"  # among the metrics of a step


def asking() -> list[int]:
    """Signals that ask a command to save and leave; a closed terminal is none under nohup."""
    numbers = [signal.SIGTERM, signal.SIGINT]
    return (
        numbers if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [*numbers, signal.SIGHUP]
    )


class Stop:
    """SIGTERM, Ctrl-C and a terminal that is closed: the first asks the loop to save and leave, the
    second leaves at once. Where there are several processes it is enough to tell one of them.

    grace: seconds after SIGTERM in which the process leaves, saved or not. Who sends it kills what
    is left then, with no word and another exit code. Nobody is behind the other signals.

    A handler in Python waits until the main thread comes back from the runtime, which may hang; a
    thread therefore counts the signals too.
    """

    def __init__(self, grace: float):
        self.asked, self.handled, self.grace = False, 0, grace
        self.since: float | None = None  # the first signal, by time.monotonic
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
            os._exit(codes.PREEMPTED)

    def _listen(self) -> None:
        (number,) = self.numbers.recv(1)
        self.since, self.asked = time.monotonic(), True
        self.runtime(signal.SIGTERM)
        log.info(
            "%s: saving after this step; once more leaves at once", signal.Signals(number).name
        )
        self.numbers.settimeout(self.grace if number == signal.SIGTERM else None)
        with contextlib.suppress(TimeoutError):
            self.numbers.recv(1)
            os._exit(codes.PREEMPTED)
        command_line.give_up(
            f"not saved within {self.grace:g} s of SIGTERM (config.checkpoint.grace); the same "
            "command goes on from the newest checkpoint",
            codes.PREEMPTED,
        )

    def told(self) -> str:
        """How long it took to leave, after a signal to this process."""
        if self.since is None:
            return "left as another process was told to"
        return f"left {time.monotonic() - self.since:.1f} s after the signal"

    def now(self, step: int) -> bool:
        return (
            self.asked
            if jax.process_count() == 1
            else multihost_utils.reached_preemption_sync_point(step)
        )


class SaveVote:
    """Asks for a save when so many minutes have passed by the clock of process 0. The clocks of the
    others differ, and all have to save the same step: the answer is computed on the devices after a
    step, and read with its metrics.

    minutes: 0 for no votes.
    """

    def __init__(self, minutes: float, mesh: Mesh):
        self.seconds, self.shape = 60 * minutes, (mesh.size,)
        devices, here = mesh.devices.flat, jax.process_index()
        self.local = sum(device.process_index == here for device in devices)
        self.split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self.any = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self.saved()

    def saved(self) -> None:
        """A save begins."""
        self.since = time.monotonic()

    def cast(self) -> dict[str, jax.Array]:
        """To be added to the metrics of the step that was dispatched last."""
        if not self.seconds:
            return {}
        due = jax.process_index() == 0 and time.monotonic() - self.since >= self.seconds
        mine = np.full(self.local, due, np.int32)
        votes = jax.make_array_from_process_local_data(self.split, mine, self.shape)
        return {SAVE_DUE: self.any(votes)}
