"""Many command lines in little more than the time of one: a process imports what takes seconds,
then forks for each of them. What is left to a fork is all that a command does by itself.

    python -m tests.commands < cases.json > results.json
"""

import contextlib
import functools
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 300  # seconds, after which a command hangs, also on a machine that is busy
SLOW_IMPORTS = (
    "experiments.evaluating.models",
    "kha_jax.inference.decoding",
    "kha_jax.analysis",
    "experiments.train_loop.reporter",
    "experiments.train_loop.replay",
    "configs.base",
)


def left() -> Any:
    """The end of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w")


# What a last argument says of the output, as a shell would have it. What is closed at the start
# cannot be written to from then on.
REDIRECTED = {
    ">/dev/full": lambda: open("/dev/full", "w"),
    "| true": left,
    ">&-": lambda: open(os.devnull),
}


class Result(NamedTuple):
    """What a command left with and said, and its seconds of computing after the imports."""

    code: int
    out: str
    err: str
    seconds: float


class Defined(NamedTuple):
    """What a command takes: its flags, but for --config, and the words that it knows."""

    flags: Any
    words: list[str]
    takes_config: bool


def defined() -> dict[str, Defined]:
    """Of each command, made by its own source."""
    from absl import flags

    from experiments.cli import command_line

    for name in SLOW_IMPORTS:  # some of which define flags of their own
        __import__(name)
    makers = [maker for maker in dir(flags) if maker.startswith("DEFINE_")]
    before = {name: getattr(flags, name) for name in makers}, command_line.define_config
    found = {}
    for path in sorted((ROOT / "experiments").glob("[a-z]*.py")):
        values, asked = flags.FlagValues(), []
        command_line.define_config = lambda *default, of_run=False, asked=asked: asked.append(
            default
        )
        for name, maker in before[0].items():
            setattr(flags, name, functools.partial(maker, flag_values=values))
        try:
            made = runpy.run_path(str(path))
        finally:
            vars(flags).update(before[0])
            command_line.define_config = before[1]
        found[path.stem] = Defined(values, sorted(made.get("COMMANDS", ())), bool(asked))
    return found


def run_all(cases: list[tuple], cache: Path) -> list[Result]:
    """Runs (command, arguments) one after another; a command such as `train` is experiments.train.
    Arguments may hold bytes that are no UTF-8, as sys.argv does. A third entry is the folder that
    it is typed in and the user's home, a fourth the seconds of computing after which SIGXCPU ends
    it."""
    environment = {**os.environ, "KHA_JAX_CACHE": str(cache), "XLA_FLAGS": ""}
    made = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.commands"],
        input=json.dumps(cases),
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    return [Result(*result) for result in json.loads(made.stdout)]


def one(
    command: str, arguments: list[str], folder: str = "", seconds: int = 0
) -> tuple[int, str, str, float]:
    """Runs one in a fork of this process; see run_all."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            os.setsid()
            if folder:
                os.chdir(folder)
                os.environ["HOME"] = folder
            if seconds:
                used = int(sum(os.times()[:2])) + 1
                resource.setrlimit(resource.RLIMIT_CPU, (used + seconds, resource.RLIM_INFINITY))
            _become(command, arguments, out, err)
        began = time.monotonic()
        while not (ended := os.wait4(child, os.WNOHANG))[0]:
            if time.monotonic() - began > LIMIT:
                os.killpg(child, signal.SIGKILL)
            time.sleep(0.005)
        out.seek(0), err.seek(0)
        said = (stream.read().decode(errors="replace") for stream in (out, err))
        return os.waitstatus_to_exitcode(ended[1]), *said, ended[2].ru_utime


def _become(command: str, arguments: list[str], out: Any, err: Any) -> None:
    *others, last = ["", *arguments]
    if last in REDIRECTED:
        arguments, out = others[1:], REDIRECTED[last]()
    for number, file in ((0, open(os.devnull)), (1, out), (2, err)):
        os.dup2(file.fileno(), number)
    sys.argv, code = [f"experiments/{command}.py", *arguments], 0
    try:
        runpy.run_module(f"experiments.{command}", run_name="__main__")
    except SystemExit as leaving:
        code = leaving.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    for name in SLOW_IMPORTS:
        __import__(name)
    json.dump([one(*case) for case in json.load(sys.stdin)], sys.stdout)
