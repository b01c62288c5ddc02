"""Commands: flags and loops only."""

import os
import signal
import sys

NO_TPU = "TPU_SKIP_MDS_QUERY"  # which jax sets when it is imported and finds none
TOLD_OF_NO_TPU = NO_TPU in os.environ  # by somebody else, before
# Ctrl-C during the seconds of imports leaves as any signal does, without a traceback; a command
# that can save installs its own handlers later. Python says "-m" while it looks for the command.
if sys.argv[0] == "-m":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
