"""Runs one program, in a Python of its own that reads nothing but standard input.

`code_runner` hands over this file's text. What the program may take is limited first, then it is
run, and only where its last line was reached is the secret written to what was standard output.
"""

import ctypes
import json
import os
import resource
import signal
import sys

NEW_USER, NEW_PIDS, NEW_NETWORK = 0x10000000, 0x20000000, 0x40000000
DIES_WITH_PARENT = 1  # of prctl
NOBODY = 65534
REFUSED = 97  # exit code: the system does not allow what was asked for


def apart(libc: ctypes.CDLL) -> None:
    """Goes on in a process of a namespace without a network, whose processes all die with it."""
    flags = NEW_PIDS | NEW_NETWORK | (NEW_USER if os.geteuid() else 0)
    if libc.unshare(flags):
        os._exit(REFUSED)
    first = os.fork()
    if first:
        leave(first)
    libc.prctl(DIES_WITH_PARENT, signal.SIGKILL)
    # the first process of a namespace ignores what would stop it
    second = os.fork()
    if second:
        leave(second)


def leave(child: int) -> None:
    """Ends as the child does."""
    os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 127)


def limit(limits: dict) -> None:
    """Hard limits by the names that the module resource has for them."""
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def main() -> None:
    """Reads what to run, and how, from standard input."""
    told = json.loads(sys.stdin.buffer.read())
    answer, nothing = os.dup(1), os.open(os.devnull, os.O_RDWR)
    if told["apart"]:
        apart(ctypes.CDLL(None, use_errno=True))
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    if told["user"]:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    limit(told["limits"])
    exec(compile(told["program"], "program", "exec"), {"__name__": "__main__"})
    os.write(answer, told["secret"].encode())


if __name__ == "__main__":
    main()
