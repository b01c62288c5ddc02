"""Checkpoints that count only once they are whole: Orbax arrays, then a manifest with the checksum
of every file.

Layout: `<workdir>/checkpoints/<step>/state/...`, then `<step>/MANIFEST.json`, then
`checkpoints/NEWEST`, which holds the step; `checkpoints/VERIFIED.json` says what needs no second
reading. Each process sums what it has written itself, and reads its share when a run is opened. A
folder without a manifest is a leftover of an interrupted save; a writer removes it. Where NEWEST
is, a checkpoint has been whole, so that a run which finds none any more does not start again.
"""

import concurrent.futures
import contextlib
import errno
import functools
import itertools
import json
import logging
import os
import re
from pathlib import Path
from typing import Any, Callable, Sequence

import jax
import orbax.checkpoint as ocp

from kha_jax.errors import CheckpointError, SilentError, StorageError
from kha_jax.runs import arrays, faults, processes
from kha_jax.runs.arrays import state_bytes
from kha_jax.runs.manifest import (
    MANIFEST,
    compare_sizes,
    folder_name,
    read_manifest,
    room,
    sealed,
    sums,
    verify,
    why,
)
from kha_jax.runs.verified import NEWEST, VERIFY_SECONDS, Verified, candidates, stamps
from kha_jax.storage import (
    address,
    check_answers,
    in_bucket,
    remove,
    rename,
    write_json,
)

REJECTED = "MANIFEST.rejected"
LOOKS = 1.0  # seconds between two looks at whether a bucket still answers
WAIT_SECONDS = 1800  # that processes wait for one another around a save
log = logging.getLogger("kha_jax")
_saves = itertools.count()  # equal in all processes


class Checkpoints:
    """The checkpoints of one run folder. Saves run in the background; their errors are raised by
    the next call, or on leaving the `with` block. On a CPU a copy of the state is kept from the
    first save on, as much memory as the state takes.

    Args:
        folder: created when the first checkpoint is saved.
        keep: newest verified checkpoints that retention leaves.
        about: entries of the manifest of a step; called in the background.
        accepts: see verify.
        keep_every: steps whose multiples retention leaves for good; 0: none.
        ours: raises StorageError where another process writes there by now; called by process 0
            before anything is written or removed.
    """

    def __init__(
        self,
        folder: Path,
        keep: int = 1,
        about: Callable[[int], dict[str, Any]] = lambda step: {},
        accepts: Sequence[dict[str, Any]] = ({},),
        keep_every: int = 0,
        ours: Callable[[], None] = lambda: None,
    ):
        self.folder, self.keep = Path(folder).absolute(), keep
        self.keep_every, self.ours = keep_every, ours
        self.about, self.accepts = about, accepts
        self.checkpointer = ocp.StandardCheckpointer()
        self.background = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: concurrent.futures.Future | None = None
        self.saved_step: int | None = None
        self.copy: Any = None
        self.given_up = False
        self.written: set[int] = set()  # by this process, whose word is good for what they hold
        self.verified = Verified(self.folder)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self.close()
            return
        try:  # the first error is the one to show; other processes may not come to wait
            self.wait()
        except StorageError as second:
            log.error("besides: %s", second)
        finally:
            self._free()

    def path(self, step: int) -> Path:
        """The folder of a step."""
        return self.folder / folder_name(step)

    def folders(self) -> list[Path]:
        """Those that have the name of a step, oldest first."""
        named = (p for p in self.folder.glob("*") if re.fullmatch("[0-9]{8,9}", p.name))
        return sorted((p for p in named if p.is_dir()), key=lambda p: int(p.name))

    def steps(self) -> list[int]:
        """Steps that have a manifest, oldest first."""
        return [int(p.name) for p in self.folders() if (p / MANIFEST).exists()]

    def save(self, step: int, state: Any, copy: bool = True) -> None:
        """Starts saving `state`; its arrays are copied before this returns. The step saved or
        restored last is left alone.

        copy: False for arrays that stay as they are until the save has ended, on a CPU too.

        Raises:
            CheckpointError: this save could not start, or the previous one failed.
        """
        target = self.path(step)
        with processes.together(f"start of the checkpoint of step {step}", WAIT_SECONDS):
            self.wait()
            if step == self.saved_step:
                return
            try:
                if jax.process_index() == 0:
                    self.ours()
                    with contextlib.suppress(OSError):
                        remove(target)
                    target.mkdir(parents=True)
                    faults.at("save", step, self.folder)
            except (OSError, StorageError) as error:
                raise self._failure(step, state_bytes(state), error) from error
        if jax.default_backend() == "cpu" and copy:
            # From an accelerator Orbax copies before it returns. On a CPU it reads the arrays
            # themselves, and the next step could not reuse those that are donated to it.
            state = self.copy = arrays.copied(state, self.copy)
        try:
            self.checkpointer.save(self._state(step), state)
        except Exception if in_bucket(target) else (OSError, ValueError) as error:
            raise self._failure(step, state_bytes(state), error) from error
        self.saved_step = step
        self.pending = self.background.submit(self._commit, step, state_bytes(state), next(_saves))

    def _failure(self, step: int, size: int, error: Exception) -> CheckpointError:
        """The error of a save, whose half-written files are removed, but not from a bucket, where
        they take no room that is missing and may be another trainer's."""
        reason, hint = why(error), "; raise the limit, as by `ulimit -n 4096`"
        with contextlib.suppress(OSError, StorageError):
            if in_bucket(self.folder):
                hint = ""
            elif reason != os.strerror(errno.EMFILE):
                hint = f"; about {size:,} bytes are needed, {room(self.folder)}"
            if jax.process_index() == 0 and not in_bucket(self.folder):
                remove(self.path(step))
        return CheckpointError(f"{address(self.path(step))} could not be written: {reason}{hint}")

    def _commit(self, step: int, size: int, number: int) -> None:
        """Waits for the arrays, then makes them count and removes what is too old."""
        target = self.path(step)
        mine = functools.partial(sums, target, jax.process_index(), jax.process_count())
        try:
            self.checkpointer.wait_until_finished()
            faults.at("arrays_written", step, self.folder)
            found = processes.to_leader(
                f"checksums of save {number}", lambda: json.dumps(mine()), WAIT_SECONDS
            )
            if jax.process_index() != 0:
                return
            files = [(name, entry) for part in found for name, entry in json.loads(part).items()]
            self.ours()
            about = {"step": step, **self.about(step), "files": dict(sorted(files))}
            write_json(target / MANIFEST, sealed(about))
            self.written.add(step)
            faults.at("manifest_written", step, self.folder)
            write_json(self.folder / NEWEST, step)
        except Exception as error:
            raise self._failure(step, size, error) from error
        self._retain()

    def _retain(self) -> None:
        """Removes what is older than the newest `keep` verified checkpoints, and none of those that
        stay for good."""
        kept = 0
        self.ours()
        for step in reversed(self.steps()):
            if kept < self.keep:
                kept += self._is_good(step)
                continue
            if self.keep_every and step % self.keep_every == 0:
                continue
            try:  # the new checkpoint counts, whatever becomes of an old one
                self.remove(step)
            except (OSError, StorageError) as error:
                log.warning("%s is too old and stays: %s", self.path(step), why(error))

    def remove(self, step: int) -> None:
        """Removes a checkpoint; one that is a link leads to what others keep, and stays.

        Raises:
            OSError: it could not be removed, at least not as a whole.
        """
        path = self.path(step)
        if path.is_symlink():
            raise OSError(errno.ELOOP, "it is a link to another folder", str(path))
        # The manifest goes first, so that a half-removed checkpoint never counts.
        remove(path / MANIFEST)
        faults.at("retention", step, self.folder)
        remove(path)

    def _is_good(self, step: int) -> bool:
        """Whether a checkpoint verifies; the content of one that has before is not read again."""
        try:
            if step in self.written or step in self.verified:
                compare_sizes(self.path(step), read_manifest(self.path(step))["files"])
                return True
            before = stamps(self.path(step))
            verify(self.path(step), self.accepts)
            self.verified.add(step, before)
            return True
        except (CheckpointError, OSError) as error:
            log.warning("checkpoint %d does not count: %s", step, error)
            return False

    def wait(self) -> None:
        """Returns once the save under way is on disk.

        Raises:
            StorageError: it failed.
        """
        pending, self.pending = self.pending, None
        try:
            if pending is not None:
                self._finished(pending)
                pending.result()
        except StorageError:
            self.saved_step = None
            raise
        except Exception as error:
            raise CheckpointError(f"{self.folder}: {error}") from error

    def _finished(self, pending: concurrent.futures.Future) -> None:
        """Returns once it is done. Orbax itself would ask a bucket that is silent for minutes; what
        else is written there tells when it is (the lock of a run is, all the time)."""
        look = LOOKS if in_bucket(self.folder) else None
        try:
            while not concurrent.futures.wait([pending], look).done:
                check_answers(self.folder)
        except SilentError:
            self.given_up = True
            raise

    def close(self) -> None:
        """Waits, then frees the threads."""
        try:
            with processes.together("end of the last checkpoint", WAIT_SECONDS):
                self.wait()
        finally:
            self._free()

    def _free(self) -> None:
        self.background.shutdown(wait=not self.given_up)
        if self.given_up:
            return
        with contextlib.suppress(Exception):  # `wait` has told of a save that failed
            self.checkpointer.close()

    def newest_good(self, set_aside: bool = True) -> int | None:
        """The newest step that verifies, logging each one that is passed over; None when there has
        been no checkpoint yet.

        set_aside: damaged ones that are newer no longer count from here on and leftovers are
        removed, as a writer needs; a reader changes nothing.

        Raises:
            CheckpointError: there are checkpoints, or have been, but none is good. Training never
                restarts from scratch over them.
        """
        leader = jax.process_index() == 0
        good, before, queue = None, {}, iter(())
        if leader:
            queue = candidates(self.folder, self.steps(), self.accepts)
        while good is None:
            step = processes.from_leader("newest checkpoint", lambda: next(queue, -1), WAIT_SECONDS)
            if step < 0:
                break
            if leader:
                before = stamps(self.path(step))
            problem = self.verified.problem(step)
            if problem:
                log.warning("passed over checkpoint %d: %s", step, problem)
            if processes.from_leader("verification", lambda: not problem, VERIFY_SECONDS):
                good = step
        if leader and set_aside:
            if good is not None:
                self.verified.add(good, before)
            self._set_aside([s for s in self.steps() if good is None or s > good])
        return good

    def _set_aside(self, rejected: list[int]) -> None:
        self.ours()
        for step in rejected:
            # It stays for whoever wants to look, but retention must not count it.
            path = self.path(step)
            try:
                if path.is_symlink():  # what it leads to is not this run's to change
                    path.rename(path.with_suffix(".rejected"))
                else:
                    rename(path / MANIFEST, path / REJECTED)
            except OSError as error:
                log.warning("%s could not be set aside: %s", path, why(error))
        for path in self.folders():
            if not (path / MANIFEST).exists() and not (path / REJECTED).exists():
                with contextlib.suppress(OSError):
                    remove(path)

    def restore(self, step: int, abstract: Any) -> Any:
        """The state saved at `step`, laid out as the ShapeDtypeStructs in `abstract` say.

        Raises:
            CheckpointError: the files do not hold exactly such a tree.
        """
        state = arrays.read(self.checkpointer, self._state(step), abstract)
        self.saved_step = step
        return state

    def restore_all(self, step: int) -> Any:
        """The state saved at `step` as it is: dicts and lists of arrays on the first device.

        Raises:
            CheckpointError: the files cannot be read.
        """
        return arrays.read_all(self.checkpointer, self._state(step))

    def restore_part(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        """Some fields of the state saved at `step`, such as {"params": ...}, without reading the
        others.

        Raises:
            CheckpointError: the files do not hold them.
        """
        return arrays.read_part(self.checkpointer, self._state(step), abstract)

    def _state(self, step: int) -> Any:
        """Where the arrays of a step are, also in a bucket."""
        return address(self.path(step)) / "state"
