"""Several processes of one run: how they find each other, and how they wait for one another, always
by name and not for ever."""

import contextlib
import hashlib
import itertools
import logging
import os
import threading
from typing import Any, Callable, Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from kha_jax.config import ConfigError

log = logging.getLogger("kha_jax")
HINT_SECONDS = 60
_waits = itertools.count()


class WaitError(Exception):
    """Processes that did not come together in time. The message names what was waited for."""


class PeerError(Exception):
    """Another process of the run cannot go on. The message says which."""


def join(
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    seconds: int,
    give_up: Callable[[str], Any],
) -> None:
    """Connects the processes of a run: by the arguments, or without them under SLURM and on TPU
    pods; one process needs nothing.

    give_up: is called with a message, from another thread, when they have not come together within
    so many seconds; it must end the process, since nothing else interrupts the runtime's own wait.

    Raises:
        WaitError: the runtime refuses.
    """
    slurm = int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in os.environ
    pod = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    if coordinator_address is None and not slurm and not pod:
        return
    where = (
        f"at {coordinator_address}"
        if coordinator_address
        else "that SLURM started"
        if slurm
        else "of this TPU slice"
    )
    late = (
        f"the processes {where} did not come together within {seconds} s; does each run this "
        "command and reach process 0?"
    )
    with (
        _after(HINT_SECONDS, log.warning, f"still waiting for the processes {where}"),
        _after(seconds, give_up, late),
    ):
        try:
            jax.distributed.initialize(
                coordinator_address, num_processes, process_id, initialization_timeout=seconds + 60
            )
        except (RuntimeError, ValueError) as error:
            raise WaitError(f"the processes {where} did not come together: {error}") from None


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
        PeerError: another process raised.
        WaitError: not every process was at its end within so many seconds.
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
        failed = np.flatnonzero(multihost_utils.process_allgather(np.array(problem is not None)))
        if problem is None and len(failed):
            raise PeerError(f"{name}: process {failed[0]} cannot go on; it says why")
    if problem is not None:
        raise problem


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
    return (
        int(multihost_utils.broadcast_one_to_all(np.array(found, np.int32)))
        if jax.process_count() > 1
        else found
    )


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
