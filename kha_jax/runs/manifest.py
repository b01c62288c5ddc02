"""What makes a folder of files a checkpoint: a manifest, written last, with the step, whose it is,
and the size and checksum of every file."""

import errno
import functools
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, Callable, Iterable, Sequence

import google_crc32c

from kha_jax.errors import CheckpointError
from kha_jax.storage import address, crc32c, pieces, read_json, stored

MANIFEST, SEAL = "MANIFEST.json", "own_checksum"
WEIGHTS = "weights"  # what the entry `holds` says of a checkpoint without an optimiser's state
REASONS = errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EMFILE, errno.ENFILE


def why(error: Exception) -> str:
    """What the system said, out of the many lines that a storage library makes of it."""
    said = " ".join(str(error).split()) or type(error).__name__
    known = map(os.strerror, REASONS)
    return next((reason for reason in known if reason in said), said[:300])


def room(folder: Path) -> str:
    """What is free on the disk of a folder: bytes, or no file where those are used up first."""
    found = os.statvfs(folder)
    if found.f_files and not found.f_favail:
        return f"no file can be added there: all {found.f_files:,} inodes are in use"
    return f"{found.f_bavail * found.f_frsize:,} bytes are free"


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with a checksum of its own."""
    return {**manifest, SEAL: _digest(manifest)}


def _digest(manifest: dict[str, Any]) -> str:
    rest = {name: value for name, value in manifest.items() if name != SEAL}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def folder_name(step: int) -> str:
    """The folder of a step below `checkpoints`."""
    return f"{step:08d}"


def _sum(algorithm: Callable[[], Any], path: Path) -> str:
    """The checksum of a file, or of an object that no disk here need have room for."""
    found = algorithm()
    for piece in pieces(path):
        found.update(piece)
    return found.digest().hex()


ALGORITHMS = {
    "crc32c": functools.partial(_sum, google_crc32c.Checksum),
    "sha256": functools.partial(_sum, hashlib.sha256),  # in manifests of older runs
}


def _algorithm(entry: dict[str, Any]) -> str:
    """The name of the checksum that an entry of a manifest has."""
    return "sha256" if "sha256" in entry else "crc32c"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, whatever its files hold.

    Raises:
        CheckpointError: there is none, it is no manifest, or not as it was written.
    """
    path = folder / MANIFEST
    try:
        manifest = read_json(path)
        files = {name: (e["bytes"], e[_algorithm(e)]) for name, e in manifest["files"].items()}
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no {MANIFEST}; the save was interrupted") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable: {error!r}") from None
    if not files:
        raise CheckpointError(f"{path} names no file")
    if manifest.get(SEAL, found := _digest(manifest)) != found:  # older ones have none
        raise CheckpointError(f"{path} differs from its own checksum")
    return manifest


def verify(
    folder: Path, accepts: Sequence[dict[str, Any]] = ({},), thorough: bool = True
) -> dict[str, Any]:
    """The manifest of a checkpoint of this run and step whose files are all as it says.

    accepts: entries that its manifest may have; all those of one element must be equal. thorough:
    False compares sizes and not what the files hold.

    Raises:
        CheckpointError: names what is foreign, or the first file that is missing or differs.
    """
    manifest = read_manifest(folder)
    if manifest.get("step") != int(folder.name):
        raise CheckpointError(f"{folder} holds step {manifest.get('step')}")
    check_whose(folder, manifest, accepts)
    compare_sizes(folder, manifest["files"])  # what costs nothing first
    if thorough:
        compare_content(folder, manifest["files"])
    return manifest


def check_whose(folder: Path, manifest: dict[str, Any], accepts: Sequence[dict[str, Any]]) -> None:
    """Raises CheckpointError where a manifest is of another run; accepts: see verify."""
    differing = [[k for k in one if manifest.get(k) != one[k]] for one in accepts]
    if all(differing):
        name = differing[-1][0]
        raise CheckpointError(
            f"{folder} is of another run: its {name} is {manifest.get(name)}, this run's is "
            f"{accepts[-1][name]}"
        )


def compare_sizes(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Raises CheckpointError where a file is missing or has another size; reads none."""
    known = stored(folder)
    for name, entry in files.items():
        if name not in known:
            raise CheckpointError(f"{address(folder / name)} is missing")
        if known[name].bytes != entry["bytes"]:
            raise CheckpointError(f"{address(folder / name)} differs from its checksum")


def compare_content(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Raises CheckpointError where a file differs from its checksum; reads all of them, but of a
    bucket none whose checksum the bucket keeps."""
    known = stored(folder)
    for name, entry in files.items():
        algorithm = _algorithm(entry)
        found = known[name].crc32c if algorithm == "crc32c" else ""
        if not found:
            found = ALGORITHMS[algorithm](folder / name)
        if found != entry[algorithm]:
            raise CheckpointError(f"{address(folder / name)} differs from its checksum")


def own(names: Iterable[str], process: int, processes: int) -> list[str]:
    """Of the files of a state, those that a process has written: what Orbax names after it; process
    0 also what belongs to none."""

    def writer(name: str) -> int:
        found = re.search(r"process_(\d+)(/|$)", name)
        return int(found[1]) if found and int(found[1]) < processes else 0

    return [name for name in names if writer(name) == process]


def sums(folder: Path, process: int, processes: int) -> dict[str, dict[str, Any]]:
    """Size and checksum of the files that a process, this one, has written: still in its page
    cache, or known to the bucket."""
    known = stored(folder)
    return {
        name: {"bytes": known[name].bytes, "crc32c": known[name].crc32c or crc32c(folder / name)}
        for name in own(known, process, processes)
    }


def share(
    files: dict[str, dict[str, Any]], process: int, processes: int
) -> dict[str, dict[str, Any]]:
    """Those of the files that a process verifies, so that all have about as many bytes to read."""
    bytes_of, shares = [0] * processes, [{} for _ in range(processes)]
    for name, entry in sorted(files.items(), key=lambda item: (-item[1]["bytes"], item[0])):
        least = bytes_of.index(min(bytes_of))
        bytes_of[least] += entry["bytes"]
        shares[least][name] = entry
    return shares[process]
