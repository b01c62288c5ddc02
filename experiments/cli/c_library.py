"""Settings of the C library, which reads them before a program begins: a command sets them and
starts itself again. It imports nothing that takes time, since it runs before everything else."""

import os
import signal
import sys

NO_TPU = "TPU_SKIP_MDS_QUERY"  # which jax sets when it is imported and finds none
TOLD_OF_NO_TPU = NO_TPU in os.environ  # by somebody else, before
MALLOC = "GLIBC_TUNABLES"
# Large buffers are given back and taken anew at every step of a CPU. In huge pages that costs a
# hundredth of the page faults, and none where the C library keeps what it has. It keeps them in the
# first thread's arena alone, which others share only where it is the one there is; on a host of
# many threads they would wait for each other.
KEPT = (
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:"
    "glibc.malloc.trim_threshold=8589934592"
)
ONE_ARENA, FEW_CORES = ":glibc.malloc.arena_max=1", 16


def prepare() -> None:
    """For a command that is run with `python -m`: starts it again with the settings, where there
    are none yet, and makes Ctrl-C during the seconds of imports leave without a traceback; a
    command that can save installs its own handlers later."""
    if sys.argv[0] != "-m":  # what Python says while it looks for the command
        return
    if sys.platform == "linux" and MALLOC not in os.environ:
        os.environ[MALLOC] = KEPT + (ONE_ARENA if os.cpu_count() <= FEW_CORES else "")
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    signal.signal(signal.SIGINT, signal.SIG_DFL)
