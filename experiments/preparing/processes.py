"""Processes of ours that carry out tasks, one at a time, and end with whoever started them."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import time
from multiprocessing import connection, forkserver, resource_tracker
from typing import Any, Callable, Iterable, Iterator, NamedTuple

from kha_jax.errors import DataError, PeerError, StorageError

PR_SET_PDEATHSIG = 1  # prctl(2)
REPORTED = 0.3  # seconds between two reports
# What processes of ours have in common is imported once, by one that does nothing else: they are
# forked from that one, which takes no time. It has no threads, and has never encoded.
CONTEXT = multiprocessing.get_context("forkserver")
COMMON = ["experiments.preparing.preparation", "experiments.cli.command_line", "tokenizers"]
# The C library's settings of the commands keep all memory that was ever used. Those of here ask for
# huge pages, since what encodes goes about much memory.
SETTINGS = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "OPENBLAS_NUM_THREADS": "1"}


class Seen(NamedTuple):
    """What a task has done so far: bytes of input, bytes of text, tokens, documents."""

    done: int
    bytes: int = 0
    tokens: int = 0
    documents: int = 0


class Report:
    """How a task tells whoever waits for it."""

    def __init__(self, commands: connection.Connection):
        self.commands, self.spoke = commands, 0.0

    def seen(self, seen: Seen) -> None:
        """What it has done so far; not every time is told."""
        if time.monotonic() - self.spoke > REPORTED:
            self.commands.send(("seen", seen))
            self.spoke = time.monotonic()

    def say(self, kind: str, text: str) -> None:
        """A line for the log, which shows one of each kind."""
        self.commands.send(("note", (kind, text)))


def begin() -> None:
    """Starts what processes are forked from; it gets ready meanwhile."""
    CONTEXT.set_forkserver_preload(COMMON)
    resource_tracker.ensure_running()  # which would let Ctrl-C through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with _environment(SETTINGS):
            forkserver.ensure_running()  # it ignores Ctrl-C once it is ready
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    """A process in the midst of a long document would not see that nobody waits any more."""
    with contextlib.suppress(AttributeError):  # Linux alone has it
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _serve(
    commands: connection.Connection, threads: int, not_ours: connection.Connection | None
) -> None:
    """What a process does: one task after another, until nobody asks for one any more. not_ours:
    the other end, where it came along; only who holds it keeps this process."""
    if not_ours:
        not_ours.close()
        _end_with_parent()
    # Also a single thread is one of their own, whose memory is laid out better than the first's.
    os.environ.update({"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"})
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; who started this one ends it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            function, arguments = commands.recv()
            try:
                answer = "result", function(*arguments, Report(commands))
            except (DataError, StorageError, PeerError) as error:
                answer = "error", error
            commands.send(answer)


class Worker:
    """A process, as a context.

    Args:
        threads: that `tokenizers` may use in it.
        forked: from this process, which must have no threads yet; it takes a hundredth of the time.
    """

    def __init__(self, threads: int = 1, forked: bool = False):
        context = multiprocessing.get_context("fork") if forked else CONTEXT
        if not forked:
            begin()
        self.connection, theirs = context.Pipe()
        arguments = theirs, threads, self.connection if forked else None
        self.process = context.Process(target=_serve, args=arguments)
        self.process.start()
        theirs.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *raised: Any) -> None:
        self.connection.close()
        self.process.terminate()
        self.process.join()

    def send(self, function: Callable, *arguments: Any) -> None:
        """Begins a task: a function of a module, which is also given a `Report`."""
        try:
            self.connection.send((function, arguments))
        except ConnectionError:
            raise self._gone() from None

    def receive(self) -> tuple[str, Any]:
        """("seen", `Seen`), ("note", (kind, text)) or ("result", what) of the task.

        Raises:
            DataError, StorageError: as the task did.
            PeerError: the process is gone.
        """
        try:
            kind, content = self.connection.recv()
        except (EOFError, ConnectionError):
            raise self._gone() from None
        if kind == "error":
            raise content
        return kind, content

    def result(self) -> Any:
        """Of the task, when it is done."""
        while (received := self.receive())[0] != "result":
            pass
        return received[1]

    def _gone(self) -> PeerError:
        self.process.join(timeout=5)
        code = self.process.exitcode
        how = f"by signal {-code}" if code and code < 0 else f"with code {code}"
        return PeerError(
            f"a worker ended {how}; the same command goes on from the finished units, with fewer "
            "--workers if memory ran out"
        )


@contextlib.contextmanager
def _environment(values: dict[str, str | None]) -> Iterator[None]:
    """Variables that are set, or taken away, for processes that start in the block."""
    before = {name: os.environ.get(name) for name in values}
    _set(values)
    try:
        yield
    finally:
        _set(before)


def _set(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def run_all(
    count: int,
    function: Callable,
    tasks: Iterable[tuple[Any, ...]],
    told: Callable[[int, str, Any], None],
    threads: int = 1,
) -> Iterator[tuple[int, Any]]:
    """(index of the task, its result) as they end, of tasks that `count` processes carry out.

    told: is called with the index of a task and what it reports, see `Worker.receive`.
    """
    left, busy = enumerate(tasks), {}
    with contextlib.ExitStack() as held:
        for index, arguments in left:
            worker = held.enter_context(Worker(threads))
            worker.send(function, *arguments)
            busy[worker.connection] = index, worker
            if len(busy) == count:
                break
        while busy:
            for ready in connection.wait(busy):
                index, worker = busy[ready]
                kind, content = worker.receive()
                if kind != "result":
                    told(index, kind, content)
                    continue
                del busy[ready]
                for following, arguments in left:
                    worker.send(function, *arguments)
                    busy[ready] = following, worker
                    break
                yield index, content
