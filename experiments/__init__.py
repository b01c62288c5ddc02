"""Commands: flags and loops only."""

import signal
import sys

# Ctrl-C during the seconds of imports leaves as any signal does, without a traceback; a command
# that can save installs its own handlers later. Python says "-m" while it looks for the command.
if sys.argv[0] == "-m":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
