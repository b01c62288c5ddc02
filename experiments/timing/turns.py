"""Steps that take turns, so that a noisy machine is noisy for all: each in a process of its own, or
all in this one."""

import contextlib
import functools
import multiprocessing
import os
import random
import statistics
import time
from typing import Any, Callable, Iterator, Mapping, NamedTuple, Sequence

from experiments.cli.c_library import MALLOC
from kha_jax.errors import PeerError

Step = Callable[[], Any]
SETTLED = 4  # steps until a process has the memory that it keeps
REST = 0.2  # seconds before a turn, in which the threads of the one before it stop spinning


class Turn(NamedTuple):
    """Seconds of one call of a step."""

    wall: float
    cpu: float


def interleave(turns: Mapping[str, Callable[[], Turn]], rounds: int) -> dict[str, dict[str, float]]:
    """Median, minimum and CPU seconds of steps that take turns, in another order every time."""
    taken: dict[str, list[Turn]] = {name: [] for name in turns}
    order = random.Random(0)  # what runs after what is worth a tenth of a step
    for _ in range(rounds):
        for name in order.sample(list(turns), len(turns)):
            taken[name].append(turns[name]())
    return {name: _summary(of) for name, of in taken.items()}


def _summary(turns: list[Turn]) -> dict[str, float]:
    wall, cpu = zip(*turns)
    middle = statistics.median
    return {"median": middle(wall), "minimum": min(wall), "cpu": middle(cpu)}


def timed(step: Step) -> Turn:
    """Calls a step."""
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return Turn(time.perf_counter() - wall, time.process_time() - cpu)


def here(steps: Mapping[str, Step], rounds: int) -> dict[str, float]:
    """Median seconds of steps of this process, after two calls of each that do not count."""
    for step in [*steps.values()] * 2:
        step()
    taken = interleave(
        {name: functools.partial(timed, step) for name, step in steps.items()}, rounds
    )
    return {name: seconds["median"] for name, seconds in taken.items()}


def apart(
    makers: Mapping[str, Sequence],
    rounds: int,
    plain: Sequence[str] = (),
    settled: int = SETTLED,
) -> dict[str, dict[str, float]]:
    """What `interleave` says of steps that have a process each, and `first`: the seconds until
    their first call had ended. What cannot run is printed with its reason.

    makers: a function that makes the step, and its arguments. plain: names of steps whose process
    allocates as the C library does by itself. settled: calls that do not count, after the first.
    """
    workers = {}
    with contextlib.ExitStack() as running:
        for name, maker in makers.items():
            try:
                started = _process(maker, settled, name in plain)
                workers[name] = running.enter_context(started)
            except _CannotRun as error:
                print(f"left out {name}: {error}")  # not by rich, to which .[interop] is markup
        taken = interleave({name: worker.turn for name, worker in workers.items()}, rounds)
    return {name: {**taken[name], "first": worker.first} for name, worker in workers.items()}


class _CannotRun(Exception):
    """Why a step cannot be made."""


class _Worker(NamedTuple):
    """A step in a process of its own."""

    connection: Any
    first: float

    def turn(self) -> Turn:
        """Calls the step there.

        Raises:
            PeerError: its process died.
        """
        time.sleep(REST)
        try:
            self.connection.send(True)
            return self.connection.recv()
        except (EOFError, OSError):
            raise PeerError("a process that was measured died; was the memory used up?") from None


@contextlib.contextmanager
def _process(maker: Sequence, settled: int, plain: bool) -> Iterator[_Worker]:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_serve, args=(theirs, settled, *maker), daemon=True
    )
    _start(process, plain)
    theirs.close()
    try:
        first = ours.recv()
    except EOFError:
        raise _CannotRun("its process died") from None
    if isinstance(first, str):
        raise _CannotRun(first)
    yield _Worker(ours, first)
    with contextlib.suppress(OSError):  # it may be gone
        ours.send(False)
    process.join()


def _serve(connection: Any, settled: int, make: Callable[..., Step], *arguments: Any) -> None:
    """The other process: makes the step, then takes a turn for every message."""
    try:
        began = time.perf_counter()
        step = make(*arguments)
        step()
        first = time.perf_counter() - began
        for _ in range(settled):
            step()
        connection.send(first)
        while connection.recv():
            connection.send(timed(step))
    except ImportError as error:
        connection.send(f"needs the extra: pip install -e '.[interop]' ({error})")


def _start(process: Any, plain: bool) -> None:
    """plain: without what experiments/__init__.py tells the C library."""
    kept = os.environ.pop(MALLOC, None) if plain else None
    process.start()
    if kept:
        os.environ[MALLOC] = kept
