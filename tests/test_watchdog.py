"""The watchdog by itself; on a run in test_faults, between processes in test_distributed."""

import queue
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


@pytest.mark.parametrize("seconds", [0, -1, 0.5, float("inf"), float("nan")])
def test_a_timeout_that_means_nothing_is_refused(seconds):
    with pytest.raises(ConfigError, match="hang_timeout"):
        RunConfig(hang_timeout=seconds)
