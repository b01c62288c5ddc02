"""Files as a run writes them: whole or not at all, and never through a link."""

import contextlib
import errno
import fcntl
import json
import os
import pwd
import secrets
import shutil
import stat
import time
from pathlib import Path
from typing import IO, Any, Iterator

import google_crc32c

from kha_jax.errors import StorageError

PROBE = bytes(2**16)
LARGEST = 2**32  # bytes of a log; what is larger is no log
LARGEST_JSON = 2**26
REMOVALS = 50  # tries to remove a folder, a tenth of a second apart
BLOCK = 2**20  # bytes that are summed at once: other threads wait for no longer than that takes


def as_written(name: str) -> Path:
    """The path that a person has written, with ~ for the home folder.

    Raises:
        StorageError: there is no home folder.
    """
    if name == "~" or name.startswith("~/"):
        return _home() / name[2:]
    return Path(os.path.expanduser(name))  # somebody else's


def cache_folder(name: str) -> Path:
    """A folder for what can be made again: $KHA_JAX_CACHE/name, by default below the user's cache
    folder.

    Raises:
        StorageError: it is no folder of this machine, or the user has none.
    """
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    base = os.environ.get("KHA_JAX_CACHE") or f"{caches}/kha_jax"
    if "://" in base:
        raise StorageError(f"KHA_JAX_CACHE={base}: object stores are not supported; name a folder")
    return as_written(base) / name


def _home() -> Path:
    """The user's folder. HOME= is none: Path.home() makes / of it."""
    try:
        return Path(os.environ.get("HOME") or pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:  # an id without a name, as in containers
        raise StorageError("this user has no home folder; name one with KHA_JAX_CACHE") from None


def open_regular(path: Path, mode: str = "r", largest: int = LARGEST, **how: Any) -> IO:
    """Opens a file that a user names, to read it.

    Raises:
        OSError: as the system says; it is a pipe or a device, which one may wait for or read for
            ever; it is absurdly large.
    """

    def opener(name: str, flags: int) -> int:
        handle = os.open(name, flags | os.O_NONBLOCK)  # a pipe's other end is not waited for
        about = os.fstat(handle)
        try:
            if not stat.S_ISREG(about.st_mode) and not stat.S_ISDIR(about.st_mode):
                raise OSError(errno.EINVAL, "it is no regular file", name)
            if about.st_size > largest:
                size = f"it holds {about.st_size:,} bytes, more than {largest:,}"
                raise OSError(errno.EFBIG, size, name)
        except OSError:
            os.close(handle)
            raise
        return handle

    return open(path, mode, opener=opener, **how)


def is_file(path: Path) -> bool:
    """Whether there is such a file; False also where the name is no name."""
    return path.is_file() if _is_remote(path) else os.path.isfile(path)


def _is_remote(path: Path) -> bool:
    """Of an object store, as etils.epath names it."""
    return "://" in os.fspath(path)


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        OSError: see open_regular.
        ValueError, RecursionError: it is no JSON.
    """
    if _is_remote(path):
        return json.loads(path.read_text())
    # of what is no text, an error of decoding would show all
    with open_regular(path, largest=LARGEST_JSON, errors="replace") as file:
        return json.load(file)


def crc32c(path: Path) -> str:
    """The checksum of a file, in eight hexadecimal digits: that which buckets keep of an object.

    Raises:
        OSError: it cannot be read.
    """
    found = google_crc32c.Checksum()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            found.update(block)
    return found.digest().hex()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside it, of a name that nobody can guess, to write: what is there at the end of the
    block takes the place of `path`, whole or not at all. A link is replaced and not followed."""
    temporary = path.with_name(f".{secrets.token_hex(8)}{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def not_followed(path: str, flags: int) -> int:
    """An opener for files of fixed names in a folder that may be a stranger's.

    Raises:
        OSError: the name is a link, or no regular file.
    """
    try:
        opened = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        name = os.path.basename(path)
        raise OSError(errno.ELOOP, f"{name} is a link, which is not followed", path) from None
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise OSError(errno.EINVAL, f"{os.path.basename(path)} is no regular file", path)
    return opened


def writable(folder: Path) -> None:
    """Makes the folder and writes to it.

    Raises:
        OSError: as the system says.
    """
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".{secrets.token_hex(8)}"
    try:
        with open(probe, "xb") as file:
            file.write(PROBE)
            file.flush()
            os.fsync(file.fileno())
    finally:
        probe.unlink(missing_ok=True)


def synced(folder: Path) -> None:
    """Renames within the folder are on disk when this returns."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
        held.callback(_remove, folder)
        yield folder


def _remove(folder: Path) -> None:
    """Also where threads that have failed still write to it for a moment."""
    for _ in range(REMOVALS):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process of this machine at a time is within, where folders can be locked."""
    with _folder(folder) as handle:
        _lock(handle, fcntl.LOCK_EX)
        yield


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
