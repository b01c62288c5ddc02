"""Whether a save fits into the seconds that a preemption leaves."""

import logging
import os
import secrets
import time
from pathlib import Path

import jax

from kha_jax.storage import Objects, address, in_bucket

SLOWEST = 20e6  # bytes a second of a disk; what such a one takes in time is not worth measuring
SAMPLE, PARTS = 2**26, 8  # bytes that are written to measure one; objects that a bucket gets
PROBE = ".rate"  # where, below a run: there again after a kill, until the next one measures
log = logging.getLogger("kha_jax")


def write_rate(folder: Path) -> float:
    """Bytes a second that reach the disk of a folder, or its bucket.

    Raises:
        OSError: as the system says.
        StorageError: the bucket does not take them.
    """
    if in_bucket(folder):
        return _rate_of_bucket(Objects(str(address(folder))))
    sample, probe = os.urandom(SAMPLE), folder / f".{secrets.token_hex(8)}"
    try:
        began = time.perf_counter()
        with open(probe, "xb", buffering=0) as file:
            file.write(sample)
            os.fsync(file.fileno())
        return SAMPLE / (time.perf_counter() - began)
    finally:
        probe.unlink(missing_ok=True)


def _rate_of_bucket(objects: Objects) -> float:
    """Of several objects at once, as arrays are written."""
    parts = {f"{PROBE}/{part}": os.urandom(SAMPLE // PARTS) for part in range(PARTS)}
    try:
        began = time.perf_counter()
        objects.write_all(parts)
        return SAMPLE / (time.perf_counter() - began)
    finally:
        objects.delete_below(PROBE)


def check(folder: Path, size: int, seconds: float) -> None:
    """Warns where saving so many bytes, each process its share, takes longer than that."""
    share = size / jax.process_count()
    if share <= SLOWEST * seconds:
        return
    rate = write_rate(folder)
    if share / rate > seconds:
        log.warning(
            "config.checkpoint.grace=%g: a save of %s bytes in each of %d processes takes about "
            "%.0f s here, at %.2f GB/s; after SIGTERM it would be lost. Raise it, and what the "
            "platform gives: xpk -tgps=%d, SLURM --signal=TERM@%d",
            seconds,
            f"{share:,.0f}",
            jax.process_count(),
            share / rate,
            rate / 1e9,
            *[2 * share // rate] * 2,
        )
