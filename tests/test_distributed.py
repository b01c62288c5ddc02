"""Two processes with four devices each against one process with eight: the same losses, also after
a stop and a resume."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from jax._src import distributed

from kha_jax.config import ConfigError
from kha_jax.runs import processes
from tests.runs import joined

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


def start(workdir, cache, devices, *flags, base=RUN, fault="", root=ROOT):
    environment = {
        **os.environ,
        "KHA_JAX_CACHE": str(cache),
        "KHA_JAX_FAULT": fault,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    line = [sys.executable, "-m", "experiments.train", *base, f"--workdir={workdir}", *flags]
    return subprocess.Popen(
        line, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def start_two(workdir, cache, *flags_of_each):
    """cache: one for both, or one for each."""
    caches = cache if isinstance(cache, tuple) else (cache, cache)
    each = zip(joined(2), caches, flags_of_each or ((), ()))
    return [start(workdir, place, 4, *join, *more) for join, place, more in each]


def finish(process):
    out, err = process.communicate(timeout=240)
    return process.returncode, err


def losses(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}, {
        row["step"]: row["val_loss"] for row in rows if "val_loss" in row
    }


@pytest.mark.slow
def test_two_processes_train_stop_and_resume_as_one(cache, tmp_path):
    one = start(tmp_path / "one", cache, 8)
    code, err = finish(one)
    assert code == 0, err
    both = start_two(tmp_path / "two", cache)
    wait_for_steps(tmp_path / "two", 2, both)
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


def wait_for_steps(workdir, count, both):
    metrics = workdir / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("grad_norm") < count:
        assert all(p.poll() is None for p in both), [finish(process) for process in both]
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_process_that_is_stuck_or_killed_ends_the_other_with_70(cache, tmp_path, number):
    """Where it is alive but stopped, nothing but the watchdog notices. A restart goes on."""
    flags = ("--config.hang_timeout=8", "--config.steps=400", "--config.evaluation.every=0")
    both = start_two(tmp_path / "run", cache, flags, flags)
    wait_for_steps(tmp_path / "run", 2, both)
    both[1].send_signal(number)
    began = time.monotonic()
    code, err = finish(both[0])
    both[1].kill()
    finish(both[1])
    assert code == 70 and time.monotonic() - began < 60, err
    stuck = "within 8 s (config.hang_timeout=8)" in err and "most recent call first" in err
    assert stuck or number == signal.SIGKILL and "another process of the run is gone" in err, err
    again = ("--config.steps=8", "--allow_changes=steps")
    codes = [finish(p) for p in start_two(tmp_path / "run", cache, again, again)]
    assert [code for code, _ in codes] == [0, 0], codes


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_one_of_two_saves_in_both_and_a_second_leaves_at_once(cache, tmp_path, number):
    flags = ("--config.steps=400", "--config.evaluation.every=0", "--config.checkpoint.every=0")
    both = start_two(tmp_path / "run", cache, flags, flags)
    wait_for_steps(tmp_path / "run", 2, both)
    both[0].send_signal(number)
    codes = [finish(process) for process in both]
    assert [code for code, _ in codes] == [75, 75], codes
    assert "Traceback" not in "".join(err for _, err in codes)
    (saved,) = tmp_path.glob("run/checkpoints/*/MANIFEST.json")
    assert int(saved.parent.name) == max(losses(tmp_path / "run")[0])
    both = start_two(tmp_path / "run", cache, flags, flags)
    wait_for_steps(tmp_path / "run", int(saved.parent.name) + 2, both)
    both[1].send_signal(signal.SIGSTOP)  # so that no step ends, and the main thread hangs
    time.sleep(3)
    both[0].send_signal(number)
    time.sleep(1)
    both[0].send_signal(number)
    assert finish(both[0])[0] == 75
    both[1].kill()
    finish(both[1])


@pytest.mark.slow
def test_a_data_error_of_one_ends_both_with_65(cache, tmp_path):
    """Its copy of the tokens is cut, first while it reads them, then before it starts."""
    flags = ("--config.steps=4000", "--config.evaluation.every=0")
    caches = tmp_path / "mine", tmp_path / "yours"
    (cache / "compiled").mkdir(exist_ok=True)
    for own in caches:
        own.mkdir()
        (own / "compiled").symlink_to(cache / "compiled")
    both = start_two(tmp_path / "run", caches, flags, flags)
    wait_for_steps(tmp_path / "run", 2, both)
    (tokens,) = caches[1].glob("data/python_shards-1/train-*/*.bin")
    os.truncate(tokens, 20)
    for started, other in ((both, "process 1: "), (None, "set-up: process 1 cannot go on")):
        both = started or start_two(tmp_path / "run", caches, flags, flags)
        (code, err), (own_code, own_err) = (finish(process) for process in both)
        assert own_code == 65 and str(tokens) in own_err and "Traceback" not in own_err, own_err
        assert code == 65 and other in err, err


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(cache, tmp_path):
    """1, then 2, then 4 on the same four devices, with the same losses as one has. The
    evaluations of the steps where they stop are made up for."""
    base = (*RUN, "--config.mesh.data=4", "--config.mesh.expert=1", "--config.evaluation.every=1")
    run = tmp_path / "run"
    assert finish(start(tmp_path / "whole", cache, 4, base=base))[0] == 0
    for count, fault in {1: "terminate:step:3", 2: "terminate:step:6,rest:step:7", 4: ""}.items():
        each = [(run, cache, 4 // count, *join) for join in joined(count)]
        ends = [finish(p) for p in [start(*one, base=base, fault=fault) for one in each]]
        assert [code for code, _ in ends] == [75 if fault else 0] * count, ends
    ours, theirs = losses(run), losses(tmp_path / "whole")
    assert [rows.keys() for rows in ours] == [rows.keys() for rows in theirs]
    for one, other in zip(ours, theirs):
        np.testing.assert_allclose(list(one.values()), list(other.values()), rtol=1e-5)


class Table:
    """The runtime's table of words, for threads in place of processes."""

    def __init__(self, count):
        self.words, self.all_here = {}, threading.Barrier(count)

    def key_value_set(self, key, value, allow_overwrite=False):
        assert allow_overwrite or key not in self.words
        self.words[key] = value

    def blocking_key_value_get(self, key, timeout_in_ms):
        while key not in self.words:
            time.sleep(0.01)
        return self.words[key]

    def key_value_try_get(self, key):
        if key not in self.words:
            raise RuntimeError("NOT_FOUND")
        return self.words[key]

    def wait_at_barrier(self, name, timeout_in_ms):
        self.all_here.wait(timeout_in_ms / 1000)


@pytest.mark.parametrize("name", [None, *processes.program()])
def test_every_process_hears_of_the_one_whose_program_differs(name, monkeypatch):
    monkeypatch.setattr(distributed, "global_state", state := threading.local())
    table, mine, said = Table(3), processes.program(), {}

    def process(number):
        state.client, state.process_id = table, number
        try:
            other = {name: "another"} if name and number == 1 else {}
            processes.same_program({**mine, **other}, 20)
            said[number] = None
        except ConfigError as error:
            said[number] = str(error)

    threads = [threading.Thread(target=process, args=[number]) for number in range(3)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    told = name and (
        f"the program: process 1 has {name} another, not {mine[name]} as process 0; start all of "
        "them with the same"
    )
    assert said == dict.fromkeys(range(3), told)


@pytest.mark.slow
def test_processes_with_different_code_leave_and_say_which(cache, tmp_path):
    copy = tmp_path / "copy"
    for name in ("kha_jax", "experiments", "configs"):
        shutil.copytree(ROOT / name, copy / name)
    with open(copy / "kha_jax" / "metrics.py", "a") as file:
        file.write("# another version\n")
    both = [
        start(tmp_path / "run", cache, 4, *join, root=root)
        for join, root in zip(joined(2), (ROOT, copy))
    ]
    for process in both:
        code, err = finish(process)
        assert code == 2 and "the program: process 1 has the code " in err, err


@pytest.mark.slow
def test_a_process_that_cannot_go_on_takes_the_others_with_it(cache, tmp_path):
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
            finish(p) for p in start_two(tmp_path / "run", cache, (), (wrong,))
        )
        assert wrong_code == 2 and here in wrong_err, wrong_err
        assert code == (2 if "that of" in elsewhere else 70) and elsewhere in err, err
        assert time.monotonic() - began < 60
    alone = start_two(tmp_path / "run", cache, ("--wait_seconds=4",), ("--help",))
    code, err = finish(alone[0])
    finish(alone[1])
    assert code == 70 and "did not come together within 4 s" in err, err


WATCH = """
import os, sys

def told(event, about):
    if event == "open" and "/checkpoints/" in str(about[0]) and about[1] in ("r", "rb"):
        with open(os.environ["OPENED"] + sys.argv[-1], "a") as file:
            print(about[0], file=file)

if "OPENED" in os.environ:
    sys.addaudithook(told)
"""


@pytest.mark.slow
def test_no_process_reads_back_what_another_has_written(cache, tmp_path, monkeypatch):
    """Each sums its own files, verifies its share when the run is opened, and reads nothing when it
    is opened again."""
    (tmp_path / "sitecustomize.py").write_text(WATCH)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.setenv("OPENED", f"{tmp_path}/opened")
    state = tmp_path / "run" / "checkpoints" / "00000002" / "state"

    def read():
        """The files of the state that each of the two has read, when both have ended."""
        flags = [("--config.steps=2", f"--tensorboard={name}") for name in ("false", "0")]
        ends = [finish(process) for process in start_two(tmp_path / "run", cache, *flags)]
        assert [code for code, _ in ends] == [0, 0], ends
        found = []
        for name in ("false", "0"):
            path = tmp_path / f"opened--tensorboard={name}"
            lines = path.read_text().splitlines() if path.exists() else []
            path.unlink(missing_ok=True)
            found.append([one for one in lines if one.startswith(str(state))])
        return found

    first, second = read()
    files = {str(path) for path in state.rglob("*") if path.is_file()}
    theirs = {path for path in files if "process_1" in path}
    assert set(second) & files == theirs and theirs
    assert not set(first) & theirs and set(first) | set(second) >= files
    first, second = read()
    assert sorted(first + second) == sorted(files)
    sizes = [sum(os.path.getsize(path) for path in part) for part in (first, second)]
    assert min(sizes) > 0.2 * sum(sizes), sizes
    assert read() == [[], []]
