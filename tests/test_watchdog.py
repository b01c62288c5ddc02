"""The watchdog by itself; on a run in test_faults, between processes in test_distributed."""

import queue
import signal
import subprocess
import sys
import time

import pytest

from kha_jax.config import ConfigError
from kha_jax.runs import watchdog
from kha_jax.runs.watchdog import Watchdog
from kha_jax.training.run_config import RunConfig


def test_what_takes_too_long_is_named_once():
    said = queue.Queue()
    with Watchdog(0.2, said.put) as guard:
        for number in range(1, 5):
            guard.step(number)
            time.sleep(0.1)
        assert said.empty()
        assert "no end of step 4 within 0.2 s" in said.get(timeout=10)
        time.sleep(0.3)
    assert said.empty()


def test_what_is_no_step_has_its_own_allowance(monkeypatch):
    said = queue.Queue()
    with Watchdog(0.1, said.put) as guard:
        guard.allow("the first compilation")
        time.sleep(0.4)
    assert said.empty()
    monkeypatch.setattr(watchdog, "ALLOWANCE", 0.1)
    with Watchdog(0.1, said.put) as guard:
        guard.allow("the first compilation")
        assert "no end of the first compilation within 0.2 s" in said.get(timeout=10)


STOPPED = """
import os, runpy, sys, time
def hung(message):
    print(message, flush=True)
    os._exit(70)
with runpy.run_path(sys.argv[1])["Watchdog"](2.0, hung) as guard:
    guard.step(7)
    print("begun", flush=True)
    for _ in range(10):
        time.sleep(0.05)
    print("went on", flush=True)
    time.sleep(60)
"""


def test_time_in_which_the_process_was_stopped_does_not_count():
    line = [sys.executable, "-c", STOPPED, watchdog.__file__]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(2.5)
        process.send_signal(signal.SIGCONT)
        said = process.stdout.read()  # a real hang is still seen
        assert said.startswith("went on\nno end of step 7") and process.wait() == 70


@pytest.mark.parametrize("seconds", [0, -1, 0.5, float("inf"), float("nan")])
def test_a_timeout_that_means_nothing_is_refused(seconds):
    with pytest.raises(ConfigError, match="hang_timeout"):
        RunConfig(hang_timeout=seconds)
