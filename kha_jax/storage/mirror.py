"""Run folders in a bucket: each has a mirror on this machine, a folder like any other.

Small files are written there and put into the bucket at once; whoever reads a run fetches them
first. The arrays, below `state`, go to the bucket alone, and `address` says where that is. For a
path that lies in no mirror, all this does what one does to a file.
"""

import functools
import json
import os
import shutil
from pathlib import Path
from typing import Any, Iterator

from kha_jax.errors import StorageError
from kha_jax.storage.buckets import Objects, Stored, checked, is_url
from kha_jax.storage.files import BLOCK, alone, as_written, cache_folder, crc32c, replacing

STATE, LOCK = "state", "lock"  # what lies in the bucket alone, what on each side alone
CONFIG = "config.json"  # which each run has
STOCK = "stock/config.json"  # and what came with an imported run's weights, which is a part of it
WRITTEN, READ = "written", "read"  # a run that trains here does not lose what somebody fetches
_mirrors: dict[Path, str] = {}


def mirror(url: str, use: str) -> Path:
    """The folder that stands for one of a bucket. use: WRITTEN or READ.

    Raises:
        StorageError: it is no folder of a bucket.
    """
    if not url.startswith("gs://"):
        raise StorageError(f"{url}: object stores but gs://BUCKET/NAME are not supported")
    url = checked(url)
    above, _, name = url.removeprefix("gs://").rpartition("/")
    # no mirror lies in another one; a % is in no URL
    folder = (cache_folder("mirrors") / use / f"%{above.replace('/', '%')}" / name).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{url}: its mirror {folder}: {error.strerror}") from None
    _mirrors[folder] = url
    return folder


def opened(name: str | os.PathLike) -> Path:
    """The folder of a run to read: that of the name, or for gs:// a mirror with what the bucket has
    now.

    Raises:
        StorageError: the bucket cannot be read.
    """
    if not is_url(os.fspath(name)):
        return as_written(os.fspath(name))
    folder = mirror(os.fspath(name), READ)
    fetch(folder)
    return folder


def _place(path: Path) -> tuple[str, str] | None:
    """(URL of the run, name below it) of a path in a mirror."""
    for folder, url in _mirrors.items():
        if path.is_relative_to(folder):
            below = path.relative_to(folder).as_posix()
            return url, "" if below == "." else below
    return None


@functools.lru_cache(maxsize=64)
def _objects(url: str) -> Objects:
    return Objects(url)


def address(path: Path) -> Any:
    """Where the path really is: itself, or one of etils.epath."""
    if (place := _place(path)) is None:
        return path
    from etils import epath

    return epath.Path("/".join(filter(None, place)))


def in_bucket(path: Path) -> bool:
    """Whether it is a path of a mirror."""
    return _place(path) is not None


def check_answers(path: Path) -> None:
    """Raises SilentError where it lies in a bucket that does not answer, as far as is known."""
    if place := _place(path):
        _objects(place[0]).check_answers()


def put(path: Path) -> None:
    """Brings a file of a mirror into the bucket."""
    if place := _place(path):
        url, name = place
        _objects(url).write(name, path.read_bytes())


def put_all(folder: Path) -> None:
    """Brings all that a mirror holds besides checkpoints into the bucket, where it differs."""
    if (place := _place(folder)) is None:
        return
    there = _objects(place[0]).listing()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        own = name != LOCK and not name.startswith(("checkpoints/", "."))
        if own and not _is(path, there.get(name)):
            put(path)


def write_text(path: Path, text: str) -> None:
    """The file appears whole or not at all, and is on disk when this returns; several processes may
    write it."""
    with replacing(path) as temporary, open(temporary, "x") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    put(path)


def write_json(path: Path, content: Any) -> None:
    """See write_text."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def rename(path: Path, target: Path) -> None:
    """Gives a file another name, over what has that name."""
    path.replace(target)
    put(target)
    if place := _place(path):
        _objects(place[0]).delete(place[1])


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there.

    Raises:
        OSError: it could not be removed.
    """
    if place := _place(path):
        url, name = place
        _objects(url).delete(name)
        _objects(url).delete_below(name)
    _remove_here(path)


def _remove_here(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def stored(folder: Path) -> dict[str, Stored]:
    """The files below a folder, by name, without reading one. A checksum is known where the store
    keeps it; `changed` is a generation, or the change time, which no program can set, and inode."""
    if place := _place(folder):
        return _objects("/".join(filter(None, place))).listing()
    found = {}
    for top, _, names in os.walk(folder, followlinks=True):
        for path in (Path(top) / name for name in names):
            if path.is_file():
                about = path.stat()
                changed = f"{about.st_ctime_ns} {about.st_ino}"
                found[path.relative_to(folder).as_posix()] = Stored(about.st_size, "", changed)
    return found


def pieces(path: Path) -> Iterator[bytes]:
    """What a file holds, or the object that it stands for, one part after the other."""
    if place := _place(path):
        yield from _objects(place[0]).pieces(place[1])
        return
    with open(path, "rb") as file:
        while piece := file.read(BLOCK):
            yield piece


def fetch(folder: Path) -> None:
    """Makes a mirror what the bucket holds, but for arrays, the lock and other runs below this one;
    a folder of checkpoints whose arrays are all that there is of it is there, and empty.

    Raises:
        StorageError: the bucket cannot be read.
    """
    if (place := _place(folder)) is None:
        return
    with alone(folder):
        _fetch(folder, _objects("/".join(filter(None, place))))


def _fetch(folder: Path, objects: Objects) -> None:
    try:
        known = objects.listing()
        others = (n for n in known if n.endswith(f"/{CONFIG}") and n != STOCK)
        runs = tuple(name.removesuffix(CONFIG) for name in others)
        there = {n: known[n] for n in known if _is_name(n) and not n.startswith(runs)}
    except FileNotFoundError:
        raise StorageError(f"{objects.url}: there is no such bucket") from None
    parents = {folder / part for name in there for part in Path(name).parents}
    for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder comes before it
        name = path.relative_to(folder).as_posix()
        if path.name != LOCK and (path not in parents if path.is_dir() else name not in there):
            _remove_here(path)
    for name, found in there.items():
        before, state, _ = f"/{name}".partition(f"/{STATE}/")
        here = folder / before[1:] if state else folder / name
        (here if state else here.parent).mkdir(parents=True, exist_ok=True)
        if state or name == LOCK or _is(here, found):
            continue
        try:
            objects.copy(name, here)
        except FileNotFoundError:  # by now; a run that trains removes and renames
            here.unlink(missing_ok=True)


def _is(path: Path, found: Stored | None) -> bool:
    """Whether a file is what the bucket holds."""
    same = found is not None and path.is_file() and path.stat().st_size == found.bytes
    return same and crc32c(path) == found.crc32c


def _is_name(name: str) -> bool:
    """Whether a stranger's object has the name of a file below a folder."""
    return set(name.split("/")).isdisjoint(("", ".", ".."))
