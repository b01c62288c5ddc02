"""Runs programs that nobody has read: each in a process, a folder and limits of its own.

It keeps accidents small and is no jail: a program reads what its user may read.
"""

import contextlib
import functools
import json
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Iterator, NamedTuple, Sequence

log = logging.getLogger("kha_jax")
DRIVER = Path(__file__).with_name("code_driver.py")
WALL = 15.0  # seconds
PASSED, FAILED, LATE = "passed", "failed", "late"  # late: still running after WALL
NOBODY = 65534
LIMITS = {
    "CPU": 10,  # seconds
    "AS": 2**30,  # bytes of memory
    "FSIZE": 2**20,  # bytes of a file
    "NPROC": 32,
    "NOFILE": 64,
    "CORE": 0,
}
TRIAL = "import collections, heapq, itertools, math, re, string, typing"


class Means(NamedTuple):
    """How programs can be run here. python: what runs them; apart: in namespaces without a network,
    whose processes die together; user: as a user that owns nothing."""

    python: str
    apart: bool
    user: bool

    @property
    def missing(self) -> list[str]:
        """What is not limited."""
        out = [] if self.apart else ["the network", "processes that leave their group"]
        root = os.geteuid() == 0 and not self.user
        return out + (["the number of processes", "files of root"] if root else [])


@functools.cache
def means() -> Means:
    """The most that works here, by trial. Where root's own Python is hidden from other users, the
    system's runs the programs."""
    root, own, system = os.geteuid() == 0, sys.executable, shutil.which("python3", path="/usr/bin")
    users = [own, system] if root and system else [own]
    trials = [Means(python, apart, root) for apart in (True, False) for python in users]
    for one in [*trials, Means(own, True, False)]:
        if passes(TRIAL, one):
            return one
    return Means(own, False, False)


def passes(program: str, how: Means | None = None, wall: float = WALL) -> bool:
    """Whether a program reaches its end: leaving early with exit code 0 is not that."""
    return outcome(program, how, wall) == PASSED


def outcome(program: str, how: Means | None = None, wall: float = WALL) -> str:
    """PASSED, FAILED or LATE."""
    how, secret = means() if how is None else how, secrets.token_hex(16)
    told = {"program": program, "secret": secret, "limits": LIMITS, **how._asdict()}
    line = [how.python, "-I", "-c", DRIVER.read_text()]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with _folder(how.user) as folder:
        started = subprocess.Popen(line, cwd=folder, env={}, start_new_session=True, **pipes)
        try:
            said, _ = started.communicate(json.dumps(told).encode(), timeout=wall)
        except subprocess.TimeoutExpired:
            return LATE
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
            started.wait()
            started.stdout.close()
    return PASSED if said == secret.encode() else FAILED


@contextlib.contextmanager
def _folder(users: bool) -> Iterator[str]:
    """An empty folder, which goes away with what was written into it."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        if users:
            os.chown(folder, NOBODY, NOBODY)
        yield folder


def run_all(programs: Sequence[str]) -> list[bool]:
    """`passes` of each, as many at once as there are cores. Logs how many the clock has stopped,
    which on a busy machine need not be their fault."""
    how = means()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(lambda program: outcome(program, how), programs))
    if late := found.count(LATE):
        log.warning(
            "%d of %d programs were stopped after %g s of wall time, and count as failed; where "
            "the machine was busy, run it again alone",
            *(late, len(found), WALL),
        )
    return [one == PASSED for one in found]
