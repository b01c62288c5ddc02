"""The contract with what starts a run again: the documented commands name our exit codes, the time
after SIGTERM is bounded, and whoever is killed, the processes that are left ask for a restart."""

import argparse
import re
import subprocess
import time

import pytest

from experiments.cli.codes import HANG, PREEMPTED
from experiments.run_folders import grace
from kha_jax.training.run_config import CheckpointConfig
from tests import soak
from tests.runs import (
    ROOT,
    SMALL,
    finish,
    joined,
    manifests,
    start,
    steps_done,
    wait_for,
)

PODS = (ROOT / "docs" / "pods.md").read_text()
ENDLESS = (*SMALL, "--config.steps=4000", "--config.evaluation.every=0")


def test_documented_commands_restart_on_our_codes_and_give_the_grace():
    (codes,) = re.findall(r"--restart-on-exit-codes=([\d,]+)", PODS)
    assert {int(code) for code in codes.split(",")} == {HANG, PREEMPTED}
    (slurm,) = re.findall(r"case \$\? in ([\d|]+)\)", PODS)
    assert {int(code) for code in slurm.split("|")} == {HANG, PREEMPTED}
    given = re.findall(r"-tgps=(\d+)|--signal=TERM@(\d+)", PODS)
    assert len(given) == 2
    for seconds in given:
        assert int("".join(seconds)) > CheckpointConfig().grace


@pytest.mark.parametrize("codes, runs", [([75, 70, 0], 3), ([70, 76, 0], 2), ([0], 1), ([2, 0], 1)])
def test_the_documented_loop(codes, runs, tmp_path):
    (loop,) = re.findall(r"^    (while .*?^    done.*?)$", PODS, re.MULTILINE | re.DOTALL)
    script = tmp_path / "train"
    script.write_text("#!/bin/sh\necho run >> ran; n=$(wc -l < ran); exit $(sed -n ${n}p codes)\n")
    script.chmod(0o755)
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
    loop, here = re.subn(r"while .*?; code", "while ./train; code", loop)
    loop, rest = re.subn(r"sleep \d+", "sleep 0", loop)
    assert here == rest == 1
    ended = subprocess.run(["sh", "-c", loop], cwd=tmp_path)
    assert (tmp_path / "ran").read_text().count("run") == runs
    assert ended.returncode == codes[runs - 1]


@pytest.mark.parametrize("size, rate, warned", [(73e9, 1e9, True), (25e9, 1e9, False), (6e8, 0, 0)])
def test_a_save_that_does_not_fit_is_warned_of(size, rate, warned, tmp_path, caplog, monkeypatch):
    """What the slowest disk takes in time is not even measured."""

    def measured(folder):
        assert rate
        return rate

    monkeypatch.setattr(grace, "write_rate", measured)
    monkeypatch.setattr(grace.log, "propagate", True)
    grace.check(tmp_path, int(size), 30.0)
    assert warned == ("takes about 73 s here, at 1.00 GB/s" in caplog.text)
    assert warned == ("xpk -tgps=146, SLURM --signal=TERM@146" in caplog.text)


def test_a_measured_rate_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(grace, "SAMPLE", 2**16)
    assert grace.write_rate(tmp_path) > 0 and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_after_sigterm_a_run_leaves_in_time_saved_or_not(cache, tmp_path):
    """A save that hangs is given up with 75, and the run goes on from the one before."""
    fault = "terminate:step:20,hang:arrays_written:20"
    process = start(cache, tmp_path, "--config.checkpoint.grace=3", fault=fault)
    code, _, err = finish(process)
    assert code == PREEMPTED and "not saved within 3 s of SIGTERM" in err.splitlines()[-1], err
    assert [int(path.parent.name) for path in manifests(tmp_path)] == [15]
    code, _, err = finish(start(cache, tmp_path, fault="terminate:step:17"))
    said = re.search(r"left ([\d.]+) s after the signal; config.checkpoint.grace=3", err)
    assert code == PREEMPTED and said and float(said[1]) < 30, err


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_whoever_is_killed_the_other_asks_for_a_restart(killed, cache, tmp_path):
    """With 70 and our line last; where it is process 0, the runtime of the other would abort."""
    both = [start(cache, tmp_path, *flags, base=ENDLESS) for flags in joined(2)]
    wait_for(lambda: steps_done(tmp_path) > 3, both[killed])
    both[killed].kill()
    began = time.monotonic()
    code, _, err = finish(both[1 - killed])
    seconds = time.monotonic() - began
    finish(both[killed])
    print(f"\nprocess {killed} killed: the other left after {seconds:.1f} s with {code}")
    last = err.strip().splitlines()[-1]
    assert code == HANG and "error: another process of the run is gone" in last, err
    assert seconds < 60


@pytest.mark.slow
def test_a_supervisor_restarts_two_processes_through_five_kills(tmp_path):
    """Either of them, at random moments; the other has to leave by itself with a code that asks for
    a restart of both. The end is that of a run which nothing happened to."""
    wanted = argparse.Namespace(kills=5, processes=2, seed=3, config="")
    assert soak.kills(tmp_path, wanted)
