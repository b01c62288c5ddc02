"""What lies below a URL: a bucket's objects (gs://BUCKET/KEY); and files (file:///FOLDER) or what
this process has written to memory (memory://NAME), which need neither a network nor an extra.

    shards = Objects("gs://bucket/shards")
    sizes = {name: found.bytes for name, found in shards.listing().items()}
    about = json.loads(shards.read("meta.json"))
    first, second = shards.ranges([("train-00000.bin", 0, 4096), ("train-00001.bin", 8192, 4096)])
    shards.copy("train-00000.bin", Path("cache/train-00000.bin"))

Ranges are read side by side, by TensorStore; it and gcsfs try again what fails in passing. No call
takes longer than its deadline, so that a watchdog never has to wait for a store: name one below
`hang_timeout`. A store that has not answered for so long is gone: until it answers, no call waits
for more than AGAIN seconds, and what still has to be tidied up there takes no deadline each.
Threads may share an `Objects`.

Stores of a test: STORAGE_EMULATOR_HOST and TENSORSTORE_GCS_HTTP_URL name its address.
"""

import base64
import contextlib
import errno
import functools
import logging
import math
import os
import re
import time
from pathlib import Path
from typing import Any, Iterator, NamedTuple, Sequence

import google_crc32c

from kha_jax.errors import SilentError, StorageError
from kha_jax.storage.files import replacing

SCHEMES = ("gs", "file", "memory")
DEADLINE, AGAIN = 60.0, 3.0  # seconds
STALLED = 20  # seconds without a byte of an answer, after which TensorStore asks again
RETRIES = {"max_retries": 8, "initial_delay": "500ms", "max_delay": "8s"}  # 40 seconds in all
PIECE = 2**24  # bytes of a copy that are read at once
ODD = r"[%#?|;*\[\]\\\x00-\x1f\x7f]"  # what TensorStore and gcsfs take for different things
SAID = 200  # characters of what a library says
_silent: dict[str, float] = {}  # of a bucket, since when it does not answer, by time.monotonic


def is_url(name: str) -> bool:
    """Whether a name is that of a store and not of a folder."""
    return "://" in name


class Stored(NamedTuple):
    """What a store knows of an object without reading it. crc32c: as `crc32c` writes it; empty
    where the store keeps none. changed: another one after each write."""

    bytes: int
    crc32c: str = ""
    changed: str = ""


class Objects:
    """The objects below a URL, each by its name from there on, such as `state/d/1f`.

    deadline: seconds that a call may take.

    Raises, as all methods do:
        StorageError: the store cannot be reached, refuses or is none; names the URL and the reason.
        FileNotFoundError: there is no such object.
    """

    def __init__(self, url: str, deadline: float = DEADLINE):
        self.url, self.deadline = checked(url), deadline
        self.scheme, _, self.path = self.url.partition("://")
        self.bucket = f"{self.scheme}://{self.path.partition('/')[0]}"
        import tensorstore  # whoever names no store does not wait for it

        opened = tensorstore.KvStore.open(f"{self.url}/", context=_context())
        self.store = self._done(opened, self.url)

    def listing(self) -> dict[str, Stored]:
        """All of them, by name."""
        if self.scheme == "gs":
            return self._listing()
        names = sorted(name.decode() for name in self._done(self.store.list(), self.url))
        if self.scheme == "file":
            return {name: Stored((Path(self.path) / name).stat().st_size) for name in names}
        return {name: Stored(len(self.read(name))) for name in names}

    def read(self, name: str) -> bytes:
        """A whole object."""
        return self._values([self.store.read(name)], [name])[0]

    def ranges(self, asked: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """The bytes of each (name, start, size), which are read at the same time; an object that
        ends before is an error."""
        reads = [self.store.read(n, byte_range=slice(at, at + size)) for n, at, size in asked]
        found = self._values(reads, [name for name, _, _ in asked])
        for value, (name, at, size) in zip(found, asked):
            if len(value) != size:
                raise StorageError(f"{self.url}/{name}: holds no {size:,} bytes at {at:,}")
        return found

    def copy(self, name: str, target: Path) -> None:
        """Makes a file of an object: whole, compared with the store's checksum, or not at all. One
        that is replaced meanwhile is read again."""
        stored = self.about(name)
        while True:
            try:
                return self._copy(name, stored, target)
            except StorageError:
                before, stored = stored, self.about(name)
                if stored == before:
                    raise

    def _copy(self, name: str, stored: Stored, target: Path) -> None:
        found = google_crc32c.Checksum()
        with replacing(target) as temporary, open(temporary, "xb") as file:
            for piece in self._pieces(name, stored):
                found.update(piece)
                file.write(piece)
            if stored.crc32c not in ("", found.digest().hex()):
                raise StorageError(f"{self.url}/{name}: differs from the checksum of its store")

    def pieces(self, name: str) -> Iterator[bytes]:
        """A whole object, one part after the other."""
        return self._pieces(name, self.about(name))

    def _pieces(self, name: str, stored: Stored) -> Iterator[bytes]:
        for at in range(0, stored.bytes, PIECE):
            yield self.ranges([(name, at, min(PIECE, stored.bytes - at))])[0]

    def about(self, name: str) -> Stored:
        """What the store knows of one."""
        if self.scheme == "gs":
            return _stored(self._ask("_info", f"{self.path}/{name}"))
        return Stored(len(self.read(name)))

    def write(self, name: str, value: bytes | None, only_over: str | None = None) -> None:
        """Makes an object of bytes, whole or not at all; of None, removes it.

        only_over: the content that it must have; empty for an object that must not be there.

        Raises:
            FileExistsError: it has another one, or is there.
        """
        before = None if only_over is None else self._generation(name, only_over.encode())
        written = self._done(self.store.write(name, value, if_equal=before), f"{self.url}/{name}")
        if not written.generation:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), f"{self.url}/{name}")

    def write_all(self, values: dict[str, bytes]) -> None:
        """Makes objects of bytes, side by side."""
        for name, written in [(n, self.store.write(n, value)) for n, value in values.items()]:
            self._done(written, f"{self.url}/{name}")

    def delete(self, name: str) -> None:
        """Removes an object; one that is not there is none to remove."""
        self._done(self.store.write(name, None), f"{self.url}/{name}")

    def delete_below(self, folder: str) -> None:
        """Removes all objects whose names begin with FOLDER/; all there are, for the empty name."""
        below = f"{folder}/" if folder else ""
        names = [name for name in self.listing() if name.startswith(below)]
        for name, gone in [(name, self.store.write(name, None)) for name in names]:
            self._done(gone, f"{self.url}/{name}")

    def _generation(self, name: str, content: bytes) -> bytes:
        """TensorStore's word for the state of an object with this content."""
        found = self._done(self.store.read(name), f"{self.url}/{name}")
        if found.value != content:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), f"{self.url}/{name}")
        return found.stamp.generation

    def _values(self, reads: Sequence[Any], names: Sequence[str]) -> list[bytes]:
        late, values = time.monotonic() + self.deadline, []
        for read, name in zip(reads, names):
            url = f"{self.url}/{name}"
            found = self._done(read, url, late)
            if found.state != "value":
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url)
            values.append(found.value)
        return values

    def _done(self, future: Any, url: str, late: float = math.inf) -> Any:
        """What TensorStore finds. late: by time.monotonic, when to give up if not before."""
        with self._answering(url) as seconds:
            try:
                return future.result(timeout=max(0.0, min(seconds, late - time.monotonic())))
            except TimeoutError:  # which is an OSError
                raise
            except (ValueError, RuntimeError, OSError, NotImplementedError) as error:
                raise StorageError(f"{url}: {_short(error)}") from None

    @contextlib.contextmanager
    def _answering(self, url: str) -> Iterator[float]:
        """Gives the seconds that a call may take, which raises TimeoutError after them or
        StorageError before."""
        began = time.monotonic()
        left = _silent.get(self.bucket, began) + self.deadline - began
        seconds = min(self.deadline, max(AGAIN, left))
        try:
            yield seconds
        except TimeoutError:
            _silent.setdefault(self.bucket, began)
            raise StorageError(f"{url}: no answer within {seconds:.0f} s") from None
        except StorageError:
            _silent.setdefault(self.bucket, began)
            raise
        _silent.pop(self.bucket, None)

    def check_answers(self) -> None:
        """Raises SilentError where the bucket has not answered for a deadline; asks nothing."""
        now = time.monotonic()
        if (silent := now - _silent.get(self.bucket, now)) >= self.deadline:
            raise SilentError(f"{self.url}: no answer for {silent:.0f} s")

    def _listing(self) -> dict[str, Stored]:
        found, below = self._ask("_find", self.path, detail=True), f"{self.path}/"
        names = {about["name"]: _stored(about) for about in found.values()}
        return {n.removeprefix(below): names[n] for n in sorted(names) if n.startswith(below)}

    def _ask(self, call: str, path: str, **how: Any) -> Any:
        """What gcsfs finds: sizes and checksums, which TensorStore does not tell."""
        fsspec, system = _gcsfs()
        with self._answering(url := f"gs://{path}") as seconds:
            try:
                system.invalidate_cache()
                return fsspec.asyn.sync(
                    system.loop, getattr(system, call), path, timeout=seconds, **how
                )
            except FileNotFoundError:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url) from None
            except fsspec.exceptions.FSTimeoutError:
                raise TimeoutError from None
            except Exception as error:  # HttpError is no OSError; aiohttp and Google have their own
                raise StorageError(f"{url}: {_short(error)}") from None


def checked(url: str) -> str:
    """The URL without a slash at its end.

    Raises:
        StorageError: names what is not supported, or no store.
    """
    scheme, _, path = url.partition("://")
    path = path.rstrip("/")
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise StorageError(f"{url}: {scheme}:// is not supported; there are {known}")
    parts = path.removeprefix("/" if scheme == "file" else "").split("/")
    if not set(parts).isdisjoint(("", ".", "..")):
        raise StorageError(f"{url}: is no name of a store; write {scheme}://BUCKET/NAME")
    if odd := re.search(ODD, path):
        raise StorageError(f"{url}: {odd[0]!r} has a meaning of its own in URLs; use another name")
    if scheme == "gs" and not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]", parts[0]):
        raise StorageError(f"{url}: {parts[0]!r} is no name of a bucket")
    return f"{scheme}://{path}"


def retries() -> dict[str, Any]:
    """TensorStore's own would go on for a quarter of an hour where a store is gone."""
    return {"gcs_request_retries": dict(RETRIES)}


@functools.cache
def _context() -> Any:
    """One for all: it holds what memory:// holds."""
    import tensorstore

    # a server that is there and says nothing; Orbax asks by the same means, and has no deadline
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", str(STALLED))
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
    os.environ.setdefault("TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS", str(STALLED))
    return tensorstore.Context(retries())


@functools.cache
def _gcsfs() -> tuple[Any, Any]:
    # what tells kinds of buckets apart asks for longer than a deadline where it is not answered
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL + 1)  # pages of what is one line of ours
    try:
        import aiohttp
        import fsspec
        import gcsfs.core
    except ImportError:
        raise StorageError("gs:// needs the extra: pip install -e '.[gcs]'") from None
    patience = aiohttp.ClientTimeout(total=DEADLINE)  # of Orbax's calls, which have none
    fsspec.config.conf.setdefault("gcs", {}).setdefault("requests_timeout", patience)
    token = {"token": "anon"} if os.environ.get("STORAGE_EMULATOR_HOST") else {}
    return fsspec, gcsfs.core.GCSFileSystem(**token)


def _stored(about: dict[str, Any]) -> Stored:
    checksum = base64.b64decode(about.get("crc32c") or "").hex()
    return Stored(int(about["size"]), checksum, str(about.get("generation", "")))


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:SAID] or type(error).__name__
