"""python -m experiments.train as a user runs it: subprocesses that finish, are stopped, are killed,
and go on."""

import json
import logging
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.train_loop.reporter import Profile
from kha_jax.analysis.leaves import Checkpoint
from kha_jax.training.run_config import ProfileConfig, RunConfig
from tests.commands import run_all
from tests.runs import (
    STEPS,
    assert_same_end,
    finish,
    lines,
    manifests,
    start,
    steps_done,
    wait_for,
)


@pytest.fixture(scope="module")
def golden(cache, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("golden")
    code, out, err = finish(start(cache, workdir))
    assert code == 0, err
    return workdir, out, err


def test_a_run_leaves_what_the_readme_promises(golden, cache):
    workdir, out, err = golden
    rows = lines(workdir)
    training = [row for row in rows if "grad_norm" in row]
    assert [row["step"] for row in training] == list(range(1, STEPS + 1))
    assert {
        "loss",
        "grad_norm",
        "learning_rate",
        "epoch",
        "tokens_per_second",
        "data_wait_fraction",
    } <= set(training[0])
    traced = [row["step"] for row in training if any(n.startswith("knocking/") for n in row)]
    assert traced == list(range(10, STEPS + 1, 10))
    evaluations = [row for row in rows if "val_loss" in row]
    assert [row["step"] for row in evaluations] == [20, 40, 60]
    assert evaluations[-1]["val_bits_per_byte"] < evaluations[0]["val_bits_per_byte"]
    assert training[-1]["loss"] < training[0]["loss"]
    assert json.loads((workdir / "config.json").read_text())["model"]["attention"]["value"] == {
        "kind": "mlp"
    }
    assert "try" in out and "from scratch" in out
    assert "Warning" not in err
    assert list(cache.glob("compiled/jit_train_step-*"))  # so that the next start is a warm one


def test_running_a_finished_run_again_does_nothing(golden, cache):
    workdir = golden[0]
    before = (workdir / "metrics.jsonl").read_text()
    code, out, _ = finish(start(cache, workdir))
    assert code == 0 and "already has its 60 steps" in out and "--allow_changes=steps" in out
    fewer = "--config.steps=50", "--allow_changes=steps"
    code, _, err = finish(start(cache, workdir, *fewer))
    assert code == 2 and "has 60 already" in err and len(err.splitlines()) == 1, err
    assert (workdir / "metrics.jsonl").read_text() == before


def test_a_stopped_run_saves_exits_75_and_resumes_bit_equal(golden, cache, tmp_path):
    process = start(cache, tmp_path)
    wait_for(lambda: steps_done(tmp_path) >= 17, process)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 75, err
    assert "the same command goes on" in err
    stopped = max(int(p.parent.name) for p in tmp_path.glob("checkpoints/*/MANIFEST.json"))
    assert stopped == lines(tmp_path)[-1]["step"] < STEPS
    code, out, err = finish(start(cache, tmp_path))
    assert code == 0 and f"resuming after step {stopped}" in out, err
    assert_same_end(tmp_path, golden[0])


@pytest.mark.slow
def test_a_run_stopped_on_an_evaluation_step_evaluates_when_it_resumes(golden, cache, tmp_path):
    """The stop leaves at once; the evaluation it skipped comes first after the resume."""
    flags = ("--config.evaluation.every=1",)
    code, _, err = finish(start(cache, tmp_path, *flags, fault="terminate:step:3"))
    assert code == 75, err
    assert lines(tmp_path)[-1]["step"] == 3 and "val_loss" not in lines(tmp_path)[-1]
    code, _, err = finish(start(cache, tmp_path, *flags, fault="kill:step:5"))
    assert code == -signal.SIGKILL, err
    assert [row["step"] for row in lines(tmp_path) if "val_loss" in row] == [1, 2, 3, 4]


def test_a_killed_run_resumes_bit_equal(golden, cache, tmp_path):
    """Killed as a save begins; its half is removed."""
    code, _, err = finish(start(cache, tmp_path, fault="kill:save:30"))
    assert code == -signal.SIGKILL, err
    assert (tmp_path / "checkpoints" / "00000030").is_dir() and len(manifests(tmp_path)) == 1
    code, out, err = finish(start(cache, tmp_path))
    assert code == 0 and "passed over" in err, err
    assert "resuming after step 15" in out and "matches the checkpoint of step 15" in out
    assert_same_end(tmp_path, golden[0])
    assert len(list((tmp_path / "checkpoints").glob("*/"))) == 2


def test_one_writer_per_run_folder(cache, tmp_path):
    first = start(cache, tmp_path, "--config.steps=1000000")
    wait_for(lambda: steps_done(tmp_path) >= 1, first)
    code, _, err = finish(start(cache, tmp_path))
    assert code == 2 and f"in use by process {first.pid}" in err
    first.kill()
    first.wait()


def test_print_config_shows_the_resolved_config(cache, tmp_path):
    """Two kinds are switched; the file's kv_heads, which latents do not have, is dropped."""
    kinds = ("value.kind=linear", "projection.kind=latent")
    switched = (f"--config.model.attention.{kind}" for kind in kinds)
    line = ("--config=configs/mqar_tiny.py", "--print_config", *switched)
    code, out, err = finish(start(cache, tmp_path, base=line))
    assert code == 0, err
    attention = json.loads(out)["model"]["attention"]
    assert attention["projection"]["kind"] == "latent" and "kv_heads" not in attention["projection"]
    assert attention["value"] == {
        "kind": "linear",
        "diag_init": 1.0,
        "parameterization": "direct",
        "init": "diagonal",
        "apply": "auto",
    }
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_profile_is_written(cache, tmp_path):
    flags = (
        "--config.profile.start=1",
        "--config.profile.stop=3",
        "--config.checkpoint.every=2",
        "--config.checkpoint.keep=9",
    )
    code, _, err = finish(start(cache, tmp_path, "--config.steps=4", *flags))
    assert code == 0 and list((tmp_path / "profile").rglob("*.xplane.pb")), err
    shutil.rmtree(tmp_path / "checkpoints" / "00000004")  # resume in the middle of the traced steps
    code, _, err = finish(start(cache, tmp_path, "--config.steps=4", *flags))
    assert code == 0 and "config.profile.start=1: no trace, steps 3 to 4 are left" in err, err


@pytest.mark.parametrize(
    ("begin", "stop", "first_step", "traced"),
    [(1, 3, 0, (2, 3)), (0, 1, 0, (1, 1)), (2, 9, 0, (3, 4)), (1, 3, 2, None), (6, 8, 0, None)],
)
def test_steps_are_traced_while_the_run_has_them_and_none_is_said(
    begin, stop, first_step, traced, monkeypatch, caplog, tmp_path
):
    """A trace ends with the run; one whose first step has passed, or never comes, is none."""
    at, found = [0], []
    for method in ("start_trace", "stop_trace"):
        monkeypatch.setattr(jax.profiler, method, lambda *_: found.append(at[0]))
    monkeypatch.setattr(logging.getLogger("kha_jax"), "propagate", True)
    config = RunConfig(steps=4, profile=ProfileConfig(start=begin, stop=stop))
    profile = Profile(config, tmp_path, first_step)
    for at[0] in range(first_step + 1, config.steps + 1):
        profile.before(at[0])
        profile.after(at[0], ())
    assert found == list(traced or ())
    assert ("no trace" in caplog.text) == (traced is None)


def test_steps_that_are_never_finite_stop_the_run_with_its_own_code(cache, tmp_path):
    rate = "--config.optimizer.learning_rate=999", "--config.optimizer.weight_decay=3.4e38"
    rate = *rate, "--config.optimizer.warmup_fraction=0"
    flags = *rate, "--config.max_nonfinite_steps=3"
    code, _, err = finish(start(cache, tmp_path, *flags))
    assert code == 76 and "not applied" in err and "examples" in err
    assert sum(row.get("nonfinite", 0) for row in lines(tmp_path)) >= 3
    # The first step's loss and gradient are fine, and yet what it leaves must not be saved.
    code, _, err = finish(start(cache, tmp_path, *flags, "--config.checkpoint.every=1"))
    assert code == 76 and "stopped at step 1: parameters or moments are not finite" in err
    assert not manifests(tmp_path)


OLD = Path(__file__).parent / "fixtures" / "run_66038df"
OLD_FLAGS = (
    "--config=configs/mqar_tiny.py",
    "--config.steps=12",
    "--config.checkpoint.every=6",
    "--config.batch_size=8",
    "--config.model.width=16",
    "--config.model.attention.projection.query_heads=2",
    "--config.model.attention.projection.kv_heads=1",
    "--config.model.attention.projection.head_dim=8",
    "--config.model.attention.query.kind=linear",
    "--config.model.feed_forward.width=16",
    "--config.optimizer.mixer.decay=to_identity",
    "--config.optimizer.mixer.learning_rate_multiplier=2.0",
    "--config.evaluation.every=0",
)


def test_a_run_folder_of_an_older_commit_is_read_and_goes_on(tmp_path):
    """Written by 66038df, before the packages were rearranged: six of twelve steps, and the state
    that the same run had at the end. Bit-equal on the processor that wrote it; others may round
    the last digits of a product otherwise."""
    run = tmp_path / "old"
    shutil.copytree(OLD, run, ignore=shutil.ignore_patterns("step_12.npz"))
    commands = [
        ("checkpoints", [f"--workdir={run}", "--verify"]),
        ("checkpoints", [f"--workdir={run}", "--leaves=6"]),
        ("train", [*OLD_FLAGS, f"--workdir={run}", "--replay_step=6"]),
    ]
    for found in run_all(commands, tmp_path / "cache"):
        assert found.code == 0, found.err
    code, out, err = finish(start(tmp_path / "cache", run, base=OLD_FLAGS))
    assert code == 0 and "matches the checkpoint of step 6" in out, err
    ended = Checkpoint(run / "checkpoints" / "00000012" / "state")
    with np.load(OLD / "step_12.npz") as before:
        assert set(before.files) == set(ended.leaves)
        for name, leaf in ended.read(before.files).items():
            np.testing.assert_allclose(leaf, before[name], rtol=1e-4, atol=1e-7, err_msg=name)
