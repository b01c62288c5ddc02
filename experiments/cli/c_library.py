"""What has to be right before a program begins: its streams, and settings of the C library, for
which a command starts itself again. It imports nothing that takes time, since it runs before
everything else."""

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


def open_streams() -> None:
    """Opens the streams that were closed, as by `>&-`: the next file would take such a number, and
    whoever prints would write into it. What cannot be written to fails, but for errors."""
    for number, way in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, way), True)  # the lowest free number
    sys.stdout = sys.stdout or open(1, "w", closefd=False)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)


def prepare() -> None:
    """For a command that is run with `python -m`: starts it again with the settings, where there
    are none yet, and makes Ctrl-C during the seconds of imports leave without a traceback; a
    command that can save installs its own handlers later."""
    if sys.argv[0] != "-m":  # what Python says while it looks for the command
        return
    open_streams()
    if sys.platform == "linux" and MALLOC not in os.environ:
        os.environ[MALLOC] = KEPT + (ONE_ARENA if os.cpu_count() <= FEW_CORES else "")
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    signal.signal(signal.SIGINT, signal.SIG_DFL)
