"""Steps that take turns, each in a process of its own, so that a noisy machine is noisy for all."""

import multiprocessing
import os
import random
import statistics
import time
from typing import Any, Callable

from experiments.cli.c_library import MALLOC
from experiments.timing.peers import Step

SETTLED = 4  # steps until a process has the memory that it keeps
REST = 0.2  # seconds before a turn, in which the threads of the one before it stop spinning


def _serve(connection: Any, make: Callable[..., Step], arguments: tuple, settled: int) -> None:
    """A worker: makes the step, then times it once for every message; (wall seconds, CPU seconds)
    each."""
    try:
        began = time.perf_counter()
        step = make(*arguments)
        step()
        first = time.perf_counter() - began
        for _ in range(settled):
            step()
        connection.send(first)
        while connection.recv():
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            connection.send((time.perf_counter() - wall, time.process_time() - cpu))
    except ImportError as error:
        connection.send(f"needs the extra: pip install -e '.[interop]' ({error})")


def _start(process: Any, plain: bool) -> None:
    """plain: without what experiments/__init__.py tells the C library."""
    kept = os.environ.pop(MALLOC, None) if plain else None
    process.start()
    if kept:
        os.environ[MALLOC] = kept


def interleave(
    makers: dict[str, tuple], rounds: int, plain: tuple[str, ...] = (), settled: int = SETTLED
) -> dict[str, dict[str, float]]:
    """Median, minimum and CPU seconds of each step, taken in turns, in another order every time;
    what cannot run is printed with its reason.

    plain: names of steps whose process allocates as the C library does by itself. settled: steps
    that do not count, after the first.
    """
    context, workers = multiprocessing.get_context("spawn"), {}
    for name, (make, *arguments) in makers.items():
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_serve, args=(theirs, make, tuple(arguments), settled), daemon=True
        )
        _start(process, name in plain)
        theirs.close()
        try:
            first = ours.recv()
        except EOFError:
            first = "its process died"
        if isinstance(first, str):
            print(f"left out {name}: {first}")  # not by rich, to which .[interop] is markup
        else:
            workers[name] = (ours, process, first, [])
    order = random.Random(0)  # what runs after what is worth a tenth of a step
    for _ in range(rounds):
        for ours, _, _, times in order.sample(list(workers.values()), len(workers)):
            time.sleep(REST)
            ours.send(True)
            times.append(ours.recv())
    out = {}
    for name, (ours, process, first, times) in workers.items():
        ours.send(False)
        process.join()
        wall, cpu = zip(*times)
        out[name] = {
            "median": statistics.median(wall),
            "minimum": min(wall),
            "cpu": statistics.median(cpu),
            "first": first,
        }
    return out
