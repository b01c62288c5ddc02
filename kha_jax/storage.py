"""Files as a run writes them: whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any

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
