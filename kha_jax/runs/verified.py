"""Which checkpoints are whole, and which have been found so and are not read again.

`checkpoints/VERIFIED.json`: {step: {file: [size, change time and inode]}}, of the manifest and of
each file that it names; of a bucket the object's generation. A file that was written to, replaced
or copied has others, and its step is then as good as never read; so is everything where the record
itself is damaged.
"""

import contextlib
import itertools
import logging
from pathlib import Path
from typing import Any, Iterator, Sequence

import jax

from kha_jax.errors import CheckpointError
from kha_jax.runs import processes
from kha_jax.runs.manifest import (
    MANIFEST,
    compare_content,
    folder_name,
    read_manifest,
    share,
    verify,
)
from kha_jax.storage import address, read_json, stored, write_json

VERIFIED, NEWEST = "VERIFIED.json", "NEWEST"
VERIFY_SECONDS = 3600  # that processes wait for one another to read their shares of a checkpoint
log = logging.getLogger("kha_jax")
_verifications = itertools.count()  # equal in all processes
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

    def problem(self, step: int) -> str:
        """What is wrong with the content of a checkpoint; empty where nothing is, and on all
        processes but 0. Each reads its share, and none of a step that was verified before."""
        path = self.folder / folder_name(step)

        def found() -> str:
            try:
                if step not in self:
                    files = read_manifest(path)["files"]
                    part = share(files, jax.process_index(), jax.process_count())
                    compare_content(path, part)
            except (CheckpointError, OSError) as error:
                return str(error)
            return ""

        name = f"verification {next(_verifications)}"
        return next(filter(None, processes.to_leader(name, found, VERIFY_SECONDS)), "")

    def _is_there(self, step: str) -> bool:
        return step.isdecimal() and (self.folder / folder_name(int(step)) / MANIFEST).exists()


def _recorded(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def candidates(folder: Path, steps: Sequence[int], accepts: Sequence[dict]) -> Iterator[int]:
    """Steps whose manifests are of this run, with files of their sizes, newest first.

    steps: that have a manifest. accepts: see manifest.verify.

    Raises:
        CheckpointError: there are checkpoints, or have been, but none is good.
    """
    for path in (p for p in folder.glob("*/") if not (p / MANIFEST).exists()):
        where = address(path)
        log.warning("passed over %s: no %s; the save was interrupted", where, MANIFEST)
    for step in reversed(steps):
        try:
            verify(folder / folder_name(step), accepts, thorough=False)
        except (CheckpointError, OSError) as error:
            log.warning("passed over checkpoint %d: %s", step, error)
            continue
        yield step
    if steps or (folder / NEWEST).exists():
        found = f"none of the checkpoints {steps} is intact" if steps else "no manifest is left"
        raise CheckpointError(
            f"{address(folder)}: {found} (the reasons are above); put one back, or move the "
            "folder away to start again"
        )
