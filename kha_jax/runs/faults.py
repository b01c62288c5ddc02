"""Faults on purpose, so that tests meet them at a known place: KHA_JAX_FAULT=ACTION:POINT:STEP,
several joined by commas.

The code calls `at` where a run may be hurt. Without the variable that does nothing.
"""

import errno
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

REST = 8.0  # seconds; JAX looks every five whether another process was told to stop
DRAG = 1.0  # seconds that a slow process takes longer for a step
SMALL_DISK = 2**30  # bytes of the largest file system that a test may fill


def _fill(folder: Path) -> None:
    """Leaves no byte on the file system, which must be a small one made for this."""
    if shutil.disk_usage(folder).total > SMALL_DISK:
        raise RuntimeError(f"{folder} is not on a small file system of its own")
    with open(folder / "fill", "wb", buffering=0) as file:
        size = 2**20
        while size:
            try:
                file.write(bytes(size))
            except OSError:
                size //= 2


def _fail(where: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(where))


def _hang(_: Any) -> None:
    while True:
        time.sleep(1)


def _rest(_: Any) -> None:
    time.sleep(REST)


def _drag(_: Any) -> None:
    time.sleep(DRAG)


def _poison(batch: dict[str, Any]) -> None:
    batch["weights"][...] = float("nan")


def _send(number: int) -> Any:
    def send(_: Any) -> None:
        os.kill(os.getpid(), number)

    return send


ACTIONS = {
    "kill": _send(signal.SIGKILL),
    "terminate": _send(signal.SIGTERM),
    "stop": _send(signal.SIGSTOP),
    "hang": _hang,
    "rest": _rest,
    "drag": _drag,
    "fill": _fill,
    "fail": _fail,
    "poison": _poison,
}
WANTED = [fault.split(":") for fault in os.environ.get("KHA_JAX_FAULT", "").split(",") if fault]


def at(point: str, step: int, subject: Any = None) -> None:
    """Carries out what KHA_JAX_FAULT wants at this point of this step.

    subject: the folder that `fill` fills, the batch that `poison` makes non-finite.
    """
    for action, where, when in WANTED:
        if (where, int(when)) == (point, step):
            ACTIONS[action](subject)
