"""Exit codes of the contract, which error has which, and an error in one line."""

import errno
from typing import Any

from kha_jax.config import ConfigError

DONE, USAGE, DATA, HANG, STORAGE, PREEMPTED, NON_FINITE = 0, 2, 65, 70, 74, 75, 76


# What the system says of a disk, not of a mistake in this code.
OF_THE_MACHINE = {
    getattr(errno, name) for name in ("ENOSPC EDQUOT EFBIG EROFS EACCES EPERM EIO ELOOP".split())
}


class UsageError(Exception):
    """A command line that cannot be used; shown as one line, exit code 2."""


def one_line(said: Any) -> str:
    """What an error says in one line, whose characters a terminal shows and does not obey."""
    words = " ".join(str(said).split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in words)


def code_of(error: BaseException) -> int | None:
    """The contract's exit code of an expected error."""
    from kha_jax.errors import DataError, PeerError, RunError, StorageError, SweepError, WaitError

    codes = {
        (UsageError, ConfigError, RunError, SweepError): USAGE,
        DataError: DATA,
        (PeerError, WaitError): HANG,
        StorageError: STORAGE,
    }
    if isinstance(error, OSError) and error.errno in OF_THE_MACHINE:
        return STORAGE
    return next((code for kinds, code in codes.items() if isinstance(error, kinds)), None)
