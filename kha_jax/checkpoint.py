"""Checkpoints that count only once they are whole: Orbax arrays, then a manifest with the checksum
of every file.

Layout: `<workdir>/checkpoints/<step>/state/...` and, written last, `<step>/MANIFEST.json`. A folder
without a manifest is a leftover of an interrupted save; it is passed over and removed by the next
save of that step.
"""

import concurrent.futures
import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from kha_jax import processes

MANIFEST = "MANIFEST.json"
WAIT_SECONDS = 1800  # that processes wait for one another around a save
VERIFY_SECONDS = 3600  # that other processes wait for process 0 to read every file of a checkpoint
log = logging.getLogger("kha_jax")


class CheckpointError(Exception):
    """A checkpoint that could not be written or read. The message names the folder and the
    reason."""


def _checksum(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all as it says.

    Raises:
        CheckpointError: names the first file that is missing or differs.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        expected = manifest["files"]
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no {MANIFEST}; the save was interrupted") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is not readable: {error!r}") from None
    for name, entry in expected.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if _checksum(path) != entry:
            raise CheckpointError(f"{path} differs from its checksum")
    return manifest


class Checkpoints:
    """The checkpoints of one run folder. Saves run in the background; their errors are raised by
    the next call.

    Args:
        folder: created when the first checkpoint is saved.
        keep: newest verified checkpoints that retention leaves.
        about: entries that go into every manifest (config hash, data hash, versions).
    """

    def __init__(self, folder: Path, keep: int, about: dict[str, Any]):
        self.folder, self.keep, self.about = Path(folder).absolute(), keep, about
        self.checkpointer = ocp.StandardCheckpointer()
        self.background = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: concurrent.futures.Future | None = None
        self.saved_step: int | None = None

    def steps(self) -> list[int]:
        """Steps that have a manifest, oldest first."""
        return sorted(
            int(p.parent.name) for p in self.folder.glob(f"*/{MANIFEST}") if p.parent.name.isdigit()
        )

    def save(self, step: int, state: Any) -> None:
        """Starts saving `state`; its arrays are copied before this returns. The step saved or
        restored last is left alone.

        Raises:
            CheckpointError: this save could not start, or the previous one failed.
        """
        target = self.folder / f"{step:08d}"
        with processes.together(f"start of the checkpoint of step {step}", WAIT_SECONDS):
            self.wait()
            if step == self.saved_step:
                return
            try:
                if jax.process_index() == 0:
                    shutil.rmtree(target, ignore_errors=True)
                    target.mkdir(parents=True)
            except OSError as error:
                raise CheckpointError(f"{target} could not be written: {error}") from error
        try:
            self.checkpointer.save(target / "state", state)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{target} could not be written: {error}") from error
        self.saved_step = step
        self.pending = self.background.submit(self._commit, target, step)

    def _commit(self, target: Path, step: int) -> None:
        self.checkpointer.wait_until_finished()
        if jax.process_index() != 0:
            return
        files = {p.relative_to(target).as_posix(): _checksum(p) for p in _files(target)}
        temporary = target / f"{MANIFEST}.tmp"
        with open(temporary, "w") as file:
            json.dump({"step": step, **self.about, "files": files}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(target / MANIFEST)
        for old in self.steps()[: -self.keep]:
            # The manifest goes first, so that a half-removed checkpoint never counts.
            (self.folder / f"{old:08d}" / MANIFEST).unlink()
            shutil.rmtree(self.folder / f"{old:08d}")

    def wait(self) -> None:
        """Returns once the save under way is on disk.

        Raises:
            CheckpointError: it failed.
        """
        pending, self.pending = self.pending, None
        try:
            if pending is not None:
                pending.result()
        except Exception as error:
            self.saved_step = None
            raise CheckpointError(f"saving to {self.folder} failed: {error}") from error

    def close(self) -> None:
        """Waits, then frees the threads."""
        try:
            with processes.together("end of the last checkpoint", WAIT_SECONDS):
                self.wait()
        finally:
            self.background.shutdown()
            self.checkpointer.close()

    def newest_good(self, set_aside: bool = True) -> int | None:
        """The newest step whose files verify, logging each one that is passed over; None when there
        is no checkpoint yet.

        set_aside: damaged ones that are newer no longer count from here on, as a writer needs; a
        reader changes nothing.

        Raises:
            CheckpointError: there are checkpoints, but none is good. Training never restarts from
                scratch over them.
        """
        step = processes.from_leader(
            "newest checkpoint", lambda: self._newest_good(set_aside), VERIFY_SECONDS
        )
        return None if step < 0 else step

    def _newest_good(self, set_aside: bool) -> int:
        for leftover in sorted(p for p in self.folder.glob("*") if not (p / MANIFEST).exists()):
            log.warning("passed over %s: no %s; the save was interrupted", leftover, MANIFEST)
        steps = self.steps()
        for step in reversed(steps):
            try:
                verify(self.folder / f"{step:08d}")
            except CheckpointError as error:
                log.warning("passed over checkpoint %d: %s", step, error)
                continue
            for rejected in (s for s in steps if set_aside and s > step):
                # It stays for whoever wants to look, but retention must not count it.
                path = self.folder / f"{rejected:08d}" / MANIFEST
                path.rename(path.with_suffix(".rejected"))
            return step
        if steps:
            raise CheckpointError(
                f"{self.folder}: none of the checkpoints {steps} is intact; move the folder to "
                "start again"
            )
        return -1

    def restore(self, step: int, abstract: Any) -> Any:
        """The state saved at `step`, laid out as the ShapeDtypeStructs in `abstract` say.

        Raises:
            CheckpointError: the files do not hold such a tree.
        """
        path = self.folder / f"{step:08d}" / "state"
        try:
            state = self.checkpointer.restore(path, abstract)
        except Exception as error:
            raise CheckpointError(
                f"{path} does not hold the state of this config: {error}"
            ) from error
        self.saved_step = step
        return state

    def restore_part(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        """Some fields of the state saved at `step`, such as {"params": ...}, without reading the
        others.

        Raises:
            CheckpointError: the files do not hold them.
        """
        path = self.folder / f"{step:08d}" / "state"
        placed = ocp.checkpoint_utils.construct_restore_args(abstract)
        arguments = ocp.args.PyTreeRestore(item=abstract, restore_args=placed, partial_restore=True)
        try:
            with ocp.PyTreeCheckpointer() as reader:
                part = reader.restore(path, args=arguments)
        except Exception as error:
            raise CheckpointError(
                f"{path} does not hold {', '.join(abstract)} of this config: {error}"
            ) from error
        for name, leaf in jax.tree_util.tree_leaves_with_path(part):
            # orbax hands back the description of what it does not find
            if not isinstance(leaf, jax.Array):
                raise CheckpointError(
                    f"{path} does not hold {jax.tree_util.keystr(name, simple=True, separator='/')}"
                )
        return part
