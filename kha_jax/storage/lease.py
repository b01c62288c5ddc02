"""The lock of a run in a bucket, where nothing can be locked: an object that its holder writes
again and again."""

import contextlib
import errno
import json
import os
import secrets
import threading
import time
from pathlib import Path

from kha_jax.errors import StorageError
from kha_jax.storage.buckets import Objects

BEAT, STALE = 10.0, 45.0  # seconds between two signs of life; without one for so long it is dead


class Lease:
    """One holder of the object `lock` of a run, until `close`. That of a dead one is taken over: at
    once where it was a process of this machine, otherwise after STALE seconds without a sign of
    life, by nobody's clock but this process's own.

    Raises:
        BlockingIOError: somebody holds it; with the name of the process.
        StorageError: the bucket cannot be written.
    """

    def __init__(self, url: str, name: str = "lock"):
        self.objects, self.name, self.beat = Objects(url), name, 0
        self.mark, self.alive, self.left = secrets.token_hex(8), 0.0, threading.Event()
        self.content, self.machine, self.turn = "", machine(), threading.Lock()
        self._take()
        self.thread = threading.Thread(target=self._live, name="lease", daemon=True)
        self.thread.start()

    def _take(self) -> None:
        began, found = time.monotonic(), self._read()
        while found and (lives := _lives(found)) is not False:
            if lives:
                self._refuse(found)
            time.sleep(min(BEAT, STALE) / 4)
            before, found = found, self._read()
            if found not in ("", before):
                self._refuse(found)
            if time.monotonic() - began > STALE:
                break
        try:
            self._write(found)
        except FileExistsError:
            self._refuse(self._read())

    def _refuse(self, found: str) -> None:
        holder = _about(found).get("holder", "of somebody")
        raise BlockingIOError(errno.EWOULDBLOCK, f"{holder}", self.objects.url)

    def _read(self) -> str:
        try:
            return self.objects.read(self.name).decode(errors="replace")
        except FileNotFoundError:
            return ""

    def _write(self, before: str) -> None:
        self.beat += 1
        about = {
            "holder": f"{os.getpid()} on {os.uname().nodename}",
            "machine": self.machine,
            "pid": os.getpid(),
            "began": _began(os.getpid()),
            "mark": self.mark,
            "beat": self.beat,
        }
        content = json.dumps(about)
        self.objects.write(self.name, content.encode(), only_over=before)
        self.content, self.alive = content, time.monotonic()

    def _live(self) -> None:
        while not self.left.wait(BEAT):
            with contextlib.suppress(StorageError):  # `check` says so once it matters
                if not self._is_ours():
                    return

    def _is_ours(self) -> bool:
        """Gives a sign of life; False where it is no longer this one's to give."""
        with self.turn:
            try:
                self._write(self.content)
            except FileExistsError:  # perhaps as an answer to our own write was lost
                found = self._read()
                if _about(found).get("mark") != self.mark:
                    return False
                self.content = found
            return True

    def check(self) -> None:
        """Gives a sign of life, so that nobody takes it over for STALE seconds from now.

        Raises:
            StorageError: somebody has, or may have.
        """
        if self._is_ours():
            return
        who = _about(self._read()).get("holder")
        found = "its lock was removed"
        if who:
            found = f"process {who} took it over when this one gave no sign of life"
        raise StorageError(f"{self.objects.url}: {found}; nothing is written there any more")

    def close(self) -> None:
        """Gives it back, if it is still this one's."""
        self.left.set()
        self.thread.join()
        try:
            self.objects.write(self.name, None, only_over=self.content)
        except (FileExistsError, StorageError):
            return


def holder(url: str, name: str = "lock") -> str:
    """The mark of who holds it now: the same for all who ask."""
    try:
        return str(_about(Objects(url).read(name).decode(errors="replace")).get("mark"))
    except FileNotFoundError:
        return ""


def _about(content: str) -> dict:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def machine() -> str:
    """Where a process number means the same process: a machine since it was started, and on it one
    world of process numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return secrets.token_hex(8)  # equal to no other


def _began(pid: int) -> str:
    """When a process of this machine was started, in its clock's ticks; empty where it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _lives(content: str) -> bool | None:
    """Whether the process that wrote a lock is there; None where only time can tell."""
    about = _about(content)
    if about.get("machine") != machine() or not isinstance(about.get("pid"), int):
        return None
    return _began(about["pid"]) == about.get("began")
