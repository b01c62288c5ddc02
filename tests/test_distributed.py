"""Two processes with four devices each against one process with eight: the same losses, also after
a stop and a resume."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
STEPS = 16
RUN = (
    "--config=configs/kha_moe_tiny.py",
    "--config.batch_size=8",
    "--config.seq_len=256",
    "--config.model.layers=1",
    "--config.model.width=32",
    "--config.model.attention.projection.head_dim=8",
    "--config.evaluation.every=8",
    "--config.evaluation.batches=1",
    "--config.checkpoint.every=4",
    "--config.mesh.data=2",
    "--config.mesh.expert=4",
    f"--config.steps={STEPS}",
)


def start(workdir, cache, devices, *flags):
    environment = {
        **os.environ,
        "KHA_JAX_CACHE": str(cache),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    line = [sys.executable, "-m", "experiments.train", *RUN, f"--workdir={workdir}", *flags]
    return subprocess.Popen(
        line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def start_two(workdir, cache, *flags_of_each):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = [
        (f"--coordinator_address={address}", "--num_processes=2", f"--process_id={i}")
        for i in range(2)
    ]
    return [
        start(workdir, cache, 4, *join, *more)
        for join, more in zip(flags, flags_of_each or ((), ()))
    ]


def finish(process):
    out, err = process.communicate(timeout=240)
    return process.returncode, err


def losses(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}, {
        row["step"]: row["val_loss"] for row in rows if "val_loss" in row
    }


@pytest.mark.slow
def test_two_processes_train_stop_and_resume_as_one(tmp_path):
    cache = tmp_path / "cache"
    one = start(tmp_path / "one", cache, 8)
    code, err = finish(one)
    assert code == 0, err
    both = start_two(tmp_path / "two", cache)
    metrics = tmp_path / "two" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("grad_norm") < 2:
        assert all(process.poll() is None for process in both), [
            finish(process) for process in both
        ]
        time.sleep(0.01)
    both[1].send_signal(signal.SIGTERM)  # one of them is told, all of them save and leave
    codes = [finish(process) for process in both]
    assert [code for code, _ in codes] == [75, 75], codes
    stopped = max(losses(tmp_path / "two")[0])
    assert 2 <= stopped < STEPS
    codes = [finish(process) for process in start_two(tmp_path / "two", cache)]
    assert [code for code, _ in codes] == [0, 0], codes
    for ours, theirs in zip(losses(tmp_path / "two"), losses(tmp_path / "one")):
        assert ours.keys() == theirs.keys()
        np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5)


@pytest.mark.slow
def test_a_process_that_cannot_go_on_takes_the_others_with_it(tmp_path):
    """In seconds, with a reason and the contract's code, instead of a wait in the first
    collective."""
    for wrong, here, elsewhere in (
        (
            "--config.model.width=30",
            "dimension 'embed' of 30 does not divide",
            "set-up: process 1 cannot go on",
        ),
        (
            "--config.steps=3",
            "config: that of process 1 is not that of process 0",
            "config: that of process 1",
        ),
        (
            f"--workdir={tmp_path / 'elsewhere'}",
            "--workdir: that of process 1 is not that of process 0",
            "--workdir: that of process 1",
        ),
    ):
        began = time.monotonic()
        (code, err), (wrong_code, wrong_err) = (
            finish(p) for p in start_two(tmp_path / "run", tmp_path / "cache", (), (wrong,))
        )
        assert wrong_code == 2 and here in wrong_err, wrong_err
        assert code == (2 if "that of" in elsewhere else 70) and elsewhere in err, err
        assert time.monotonic() - began < 60
    alone = start_two(tmp_path / "run", tmp_path / "cache", ("--wait_seconds=4",), ("--help",))
    code, err = finish(alone[0])
    finish(alone[1])
    assert code == 70 and "did not come together within 4 s" in err, err


def test_half_of_the_process_flags_are_refused(tmp_path):
    code, err = finish(start(tmp_path, tmp_path, 1, "--num_processes=2"))
    assert code == 2 and "--coordinator_address: is needed together with --num_processes" in err
