"""Several processes of one run: how they find each other, and how they wait for one another, always
by name and not for ever."""

import contextlib
import ctypes
import hashlib
import importlib.metadata
import itertools
import json
import logging
import platform
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from kha_jax.config import ConfigError
from kha_jax.errors import DataError, PeerError, WaitError
from kha_jax.runs import cluster

log = logging.getLogger("kha_jax")
HINT_SECONDS = 60
HEARTBEAT_SECONDS = 100  # the runtime's own default
FAILED, LISTENS = "kha_jax failed", 1.0  # where a process says so; seconds between two looks
PROGRAM, OTHER_PROGRAM = "kha_jax program", "kha_jax other program"
_waits = itertools.count()
_handlers: list[Any] = []  # in Python for C, which does not keep them


def join(
    given: cluster.Place | None,
    seconds: int,
    silence: float,
    give_up: Callable[[str], Any],
) -> int | None:
    """Connects the processes of a run, those that the cluster has started where none is given; the
    number of this one. One that is alone needs nothing and has none.

    silence: seconds after which a process that hangs leaves by itself; only later does the runtime
    abort those that hear nothing of another one.
    give_up: is called with a message, from another thread, when they have not come together in
    time; it must end the process, since nothing else interrupts the runtime's own wait.

    Raises:
        ConfigError: the cluster tells what cannot be, or process 0 cannot listen at the address.
        WaitError: the runtime refuses.
    """
    with _after(HINT_SECONDS, log.warning, "still waiting for the other processes of the run"):
        here = given or cluster.place(seconds)
        if here is None:
            return None
        if here.index == 0:
            _check_port(here.address)
        leave_instead_of_aborting(give_up)
        where = f"at {here.address} ({here.cluster})"
        late = (
            f"the {here.count} processes {where} did not come together within {seconds} s; does "
            "each run this command and reach process 0?"
        )
        with _after(seconds, give_up, late):
            try:
                jax.distributed.initialize(
                    here.address,
                    here.count,
                    here.index,
                    initialization_timeout=seconds + 60,
                    heartbeat_timeout_seconds=max(HEARTBEAT_SECONDS, int(silence) + 60),
                )
            except (RuntimeError, ValueError) as error:
                raise WaitError(f"the processes {where} did not come together: {error}") from None
    log.info("process %d of %d, process 0 %s", here.index, here.count, where)
    return here.index


def _check_port(address: str) -> None:
    """The runtime's own server dies without a word where the port is taken.

    Raises:
        ConfigError: names the address.
    """
    try:
        with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.bind(("", int(address.rsplit(":", 1)[1])))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"--coordinator_address={address}",
            f"process 0 cannot listen there: {reason}; name a free port, on a cluster with "
            "JAX_COORDINATOR_PORT",
        ) from None


def leave_instead_of_aborting(leave: Callable[[str], Any]) -> None:
    """From here on, where the runtime ends this process with abort(), `leave` does, with a message.
    A process whose coordinator is gone hears of it in the runtime's own thread, which prints why
    and aborts at once; neither an exception nor a callback comes before.

    leave: must end the process. It runs in that thread, and waits for no other.
    """

    def aborted(number: int) -> None:
        leave(
            "another process of the run is gone, or the runtime has failed, and says so above; "
            "start all of them again and they go on from the newest checkpoint"
        )

    _handlers.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted))
    _set_handler(signal.SIGABRT, ctypes.cast(_handlers[-1], ctypes.c_void_p))


def _set_handler(number: int, handler: ctypes.c_void_p | None) -> int | None:
    """C's `signal`: the handler before, which Python neither shows nor keeps."""
    take = ctypes.CDLL(None).signal
    take.restype, take.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    return take(number, handler)


def handler_of(number: int) -> Callable[[int], Any]:
    """Takes the runtime's handler of a signal, to be called from one of our own: joined processes
    hear of a preemption by a handler in C. One process has none, so that nothing is called."""
    found = _set_handler(number, None) if jax.process_count() > 1 else None
    return ctypes.CFUNCTYPE(None, ctypes.c_int)(found) if found else lambda number: None


@contextlib.contextmanager
def _after(seconds: float, action: Callable[[str], Any], message: str) -> Iterator[None]:
    """Calls action(message) when the block takes longer."""
    timer = threading.Timer(seconds, action, [message])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def together(name: str, seconds: int) -> Iterator[None]:
    """All processes leave the block, or none does: where one of them raises, the others raise too,
    and nobody waits for it.

    Raises:
        PeerError: another process raised; DataError where its data are the reason.
        WaitError: not every process was at its end in time.
    """
    problem = None
    try:
        yield
    except Exception as raised:
        problem = raised
    if jax.process_count() > 1:
        with _after(
            HINT_SECONDS, log.warning, f"still waiting for every process to finish {name!r}"
        ):
            try:
                multihost.get_barrier_sync_fn()(
                    key=f"kha_jax {next(_waits)}: {name}", timeout_ms=1000 * seconds
                )
            except RuntimeError as raised:
                raise WaitError(
                    f"not every process finished {name!r} within {seconds} s: {problem or raised}"
                ) from None
        kind = (problem is not None) + isinstance(problem, DataError)
        kinds = multihost_utils.process_allgather(np.array(kind))
        if problem is None and kinds.any():
            raise (DataError if kinds.max() == 2 else PeerError)(
                f"{name}: process {np.argmax(kinds)} cannot go on; it says why"
            )
    if problem is not None:
        raise problem


@contextlib.contextmanager
def one_fate(
    code_of: Callable[[Exception], int | None], leave: Callable[[str, int], Any]
) -> Iterator[None]:
    """An error of one process within the block ends all of them with its exit code; they would wait
    for it in a collective, where nothing else reaches them.

    code_of: the exit code of an error, None where it is not an expected one; that is raised. leave:
    ends this process at once with a message and a code.
    """
    if jax.process_count() == 1:
        yield
        return
    # Private, but the one way to the runtime's own table of words; Orbax takes it too.
    client, left = distributed.global_state.client, threading.Event()

    def leave_last(message: str, code: int) -> None:
        if jax.process_index() == 0:  # the table is there, and the runtime aborts who misses it
            time.sleep(3 * LISTENS)
        leave(message, code)

    def listen() -> None:
        while not left.wait(LISTENS):
            with contextlib.suppress(RuntimeError):  # nobody has failed
                code, message = client.key_value_try_get(FAILED).split(" ", 1)
                leave_last(message, int(code))

    threading.Thread(target=listen, name="listener", daemon=True).start()
    try:
        yield
    except Exception as error:
        if isinstance(error, PeerError) or lost_peer(error):
            time.sleep(6 * LISTENS)  # the one that failed says why, and the listener leaves
            raise
        left.set()
        code, reason = code_of(error), " ".join(str(error).split())
        with contextlib.suppress(RuntimeError):  # another one was faster
            word = f"{code or code_of(PeerError())} process {jax.process_index()}: {reason}"
            client.key_value_set(FAILED, word)
        if code is None:
            raise
        leave_last(str(error), code)
    finally:
        left.set()


def lost_peer(error: Exception) -> bool:
    """Whether the runtime failed because another process is gone, as far as its message tells."""
    gone = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED", "UNKNOWN: Gloo")
    return (
        isinstance(error, jax.errors.JaxRuntimeError)
        and jax.process_count() > 1
        and str(error).startswith(gone)
    )


def from_leader(name: str, compute: Callable[[], int], seconds: int) -> int:
    """What process 0 computes, on every process; raises as `together` does."""
    found = 0
    with together(name, seconds):
        if jax.process_index() == 0:
            found = compute()
    if jax.process_count() > 1:
        found = multihost_utils.broadcast_one_to_all(np.array(found, np.int32))
    return int(found)


def to_leader(name: str, compute: Callable[[], str], seconds: int) -> list[str]:
    """What each process computes, on process 0; nothing on the others. It goes through the
    runtime's own table: no collective, so that a thread beside the steps may ask.

    name: another one for each call.

    Raises:
        PeerError: another process raised.
        WaitError: not every process had an answer in time.
    """
    if jax.process_count() == 1:
        return [compute()]
    # Private, as in one_fate.
    client, index, word = distributed.global_state.client, jax.process_index(), "failed"
    keys = [f"kha_jax {name}: {process}" for process in range(jax.process_count())]
    try:
        word = f"found {compute()}"
    finally:
        if index != 0:
            client.key_value_set(keys[index], word)
    if index != 0:
        return []
    try:
        others = [client.blocking_key_value_get(key, 1000 * seconds) for key in keys[1:]]
    except RuntimeError as raised:
        raise WaitError(
            f"not every process answered to {name!r} within {seconds} s: {raised}"
        ) from None
    for process, answer in enumerate(others, 1):
        client.key_value_delete(keys[process])
        if answer == "failed":
            raise PeerError(f"{name}: process {process} cannot go on; it says why")
    return [answer.removeprefix("found ") for answer in (word, *others)]


def program(*commands: Path) -> dict[str, str]:
    """What computes: a hash of the sources of this package and those in folders of commands, the
    interpreter and the libraries."""
    digest, folders = hashlib.sha256(), (Path(__file__).parents[1], *commands)
    for path in (path for folder in folders for path in sorted(folder.rglob("*.py"))):
        digest.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return {
        "the code": digest.hexdigest()[:12],
        "Python": ".".join(platform.python_version_tuple()[:2]),
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
    }


def same_program(mine: dict[str, str], seconds: int) -> None:
    """Checks that all processes run the same program, before they compute anything together: with
    different ones a collective waits for ever, or computes what neither of them means.

    Raises:
        ConfigError: names a process and what it has that process 0 has not, in every process.
        WaitError: not every process was here in time.
    """
    client, index = distributed.global_state.client, distributed.global_state.process_id
    if client is None:
        return
    if index == 0:
        client.key_value_set(PROGRAM, json.dumps(mine))
    try:
        first = json.loads(client.blocking_key_value_get(PROGRAM, 1000 * seconds))
        differing = [name for name in mine if mine[name] != first.get(name)]
        if differing:
            found = ", ".join(f"{name} {mine[name]}, not {first.get(name)}" for name in differing)
            said = f"process {index} has {found} as process 0"
            client.key_value_set(OTHER_PROGRAM, said, allow_overwrite=True)
        client.wait_at_barrier(PROGRAM, 1000 * seconds)
    except RuntimeError as raised:
        raise WaitError(
            f"not every process said within {seconds} s what program it runs: {raised}"
        ) from None
    with contextlib.suppress(RuntimeError):  # where there is none
        told = client.key_value_try_get(OTHER_PROGRAM)
        raise ConfigError("the program", f"{told}; start all of them with the same")


def same(name: str, content: str, remedy: str) -> None:
    """Checks that all processes hold the same text.

    Raises:
        ConfigError: names the first process whose text is not that of process 0.
    """
    if jax.process_count() == 1:
        return
    digests = multihost_utils.process_allgather(
        np.frombuffer(hashlib.sha256(content.encode()).digest(), np.int32)
    )
    different = np.flatnonzero((digests != digests[0]).any(axis=-1))
    if len(different):
        raise ConfigError(
            name, f"that of process {different[0]} is not that of process 0; {remedy}"
        )
