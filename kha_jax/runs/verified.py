"""Checkpoints that have been read and found whole, so that they are not read again.

`checkpoints/VERIFIED.json`: {step: {file: [size, change time and inode]}}, of the manifest and of
each file that it names; of a bucket the object's generation. A file that was written to, replaced
or copied has others, and its step is then as good as never read; so is everything where the record
itself is damaged.
"""

import contextlib
from pathlib import Path
from typing import Any

from kha_jax.errors import CheckpointError
from kha_jax.runs.manifest import MANIFEST, folder_name, read_manifest
from kha_jax.storage import address, read_json, stored, write_json

VERIFIED = "VERIFIED.json"
Stamps = dict[str, list[int | str]]


def stamps(folder: Path) -> Stamps:
    """What the file system or bucket says of the files of a checkpoint.

    Raises:
        CheckpointError: there is no whole checkpoint.
    """
    known, names = stored(folder), (MANIFEST, *read_manifest(folder)["files"])
    for name in names:
        if name not in known:
            raise CheckpointError(f"{address(folder / name)} is missing")
    return {name: [known[name].bytes, known[name].changed] for name in names}


class Verified:
    """The record of a folder of checkpoints."""

    def __init__(self, folder: Path):
        self.folder, self.known = folder, _recorded(folder / VERIFIED)

    def __contains__(self, step: int) -> bool:
        """Whether the files of a step are those that were verified."""
        try:
            known = self.known.get(str(step))
            return known is not None and known == stamps(self.folder / folder_name(step))
        except (CheckpointError, OSError):
            return False

    def add(self, step: int, found: Stamps) -> None:
        """found: from before the files were read."""
        there = {s: known for s, known in self.known.items() if self._is_there(s)}
        self.known = {**there, str(step): found}
        with contextlib.suppress(OSError):  # it will be read once more
            write_json(self.folder / VERIFIED, self.known)

    def _is_there(self, step: str) -> bool:
        return step.isdecimal() and (self.folder / folder_name(int(step)) / MANIFEST).exists()


def _recorded(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
