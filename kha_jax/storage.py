"""Files as a run writes them: whole or not at all."""

import contextlib
import fcntl
import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any, Iterator

from kha_jax.errors import StorageError

PROBE = bytes(2**16)


def cache_folder(name: str) -> Path:
    """A folder for what can be made again: $KHA_JAX_CACHE/name, by default below the user's cache
    folder.

    Raises:
        StorageError: it is no folder of this machine.
    """
    base = (
        os.environ.get("KHA_JAX_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kha_jax"
    )
    if "://" in str(base):
        raise StorageError(f"KHA_JAX_CACHE={base}: object stores are not supported; name a folder")
    return Path(base) / name


def write_json(path: Path, content: Any) -> None:
    """The file appears whole or not at all, and is on disk when this returns; several processes may
    write it."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with open(temporary, "w") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def writable(folder: Path) -> None:
    """Makes the folder and writes to it.

    Raises:
        OSError: as the system says.
    """
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".probe-{os.getpid()}"
    try:
        with open(probe, "wb") as file:
            file.write(PROBE)
            file.flush()
            os.fsync(file.fileno())
    finally:
        probe.unlink(missing_ok=True)


@contextlib.contextmanager
def being_built(base: Path, name: str) -> Iterator[Path]:
    """A new folder below `base`, for this process to fill and to rename. It is removed at the end,
    and so are those of processes that were killed, where folders can be locked. Its mode is that of
    any new folder, unlike what tempfile makes: other users may read what comes of it.

    Raises:
        OSError: as the system says.
    """
    with contextlib.ExitStack() as held:
        with _folder(base) as handle:  # until a new folder is locked, nobody looks for dead ones
            _lock(handle, fcntl.LOCK_EX)
            for left in base.glob(f".{name}.*"):
                with _folder(left) as other:
                    if _lock(other, fcntl.LOCK_EX | fcntl.LOCK_NB):
                        shutil.rmtree(left, ignore_errors=True)
            folder = base / f".{name}.{secrets.token_hex(8)}"
            folder.mkdir()
            _lock(held.enter_context(_folder(folder)), fcntl.LOCK_EX)
        held.callback(shutil.rmtree, folder, ignore_errors=True)
        yield folder


@contextlib.contextmanager
def _folder(path: Path) -> Iterator[int]:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield handle
    finally:
        os.close(handle)


def _lock(handle: int, how: int) -> bool:
    """Whether it was locked; some network file systems lock no folders."""
    with contextlib.suppress(OSError):
        fcntl.flock(handle, how)
        return True
    return False
