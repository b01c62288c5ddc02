"""What came of runs elsewhere, and the commit that runs are trained by."""

import contextlib
import subprocess
from typing import Sequence

from experiments.cli import config_files
from experiments.run_folders import stored
from kha_jax.runs.results import RunResult, read_results


def known(paths: Sequence[str]) -> list[RunResult]:
    """The lines of several files runs.csv, those of --known."""
    files = (stored.local_folder("known", path) for path in paths)
    return [result for file in files for result in read_results(file)]


def commit() -> str:
    """Of this code, with a + where it was changed since; empty outside of git."""

    def git(*words: str) -> str:
        line = ["git", "-C", str(config_files.REPOSITORY), *words]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    with contextlib.suppress(OSError):
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + "+" * bool(changed)
    return ""
