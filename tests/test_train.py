"""python -m experiments.train as a user runs it: subprocesses that finish, are stopped, are killed,
and go on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

ROOT = Path(__file__).resolve().parent.parent
STEPS = 60
SMALL = (
    f"--config.steps={STEPS}",
    "--config.batch_size=4",
    "--config.seq_len=64",
    "--config.model.layers=2",
    "--config.model.width=32",
    "--config.model.attention.projection.head_dim=8",
    "--config.model.feed_forward.width=64",
    "--config.evaluation.every=20",
    "--config.evaluation.batches=2",
    "--config.checkpoint.every=15",
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def start(cache, workdir, *flags, base=SMALL):
    environment = {**os.environ, "KHA_JAX_CACHE": str(cache), "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "experiments.train", *base, f"--workdir={workdir}", *flags]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def lines(workdir):
    path = Path(workdir) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def steps_done(workdir):
    path = Path(workdir) / "metrics.jsonl"
    return path.read_text().count("grad_norm") if path.exists() else 0


def final_state(workdir):
    step = max(p.parent.name for p in Path(workdir).glob("checkpoints/*/MANIFEST.json"))
    folder = Path(workdir).absolute() / "checkpoints" / step / "state"
    return int(step), jax.tree.map(np.asarray, ocp.StandardCheckpointer().restore(folder))


def assert_same_end(workdir, golden):
    (step, state), (golden_step, golden_state) = final_state(workdir), final_state(golden)
    assert step == golden_step == STEPS
    jax.tree.map(np.testing.assert_array_equal, state, golden_state)

    def strip(rows):
        return [
            {k: v for k, v in row.items() if k in ("step", "loss", "grad_norm", "val_loss")}
            for row in rows
        ]

    assert strip(lines(workdir)) == strip(lines(golden))


@pytest.fixture(scope="module")
def golden(cache, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("golden")
    code, out, err = finish(start(cache, workdir))
    assert code == 0, err
    return workdir, out, err


def test_a_run_leaves_what_the_readme_promises(golden):
    workdir, out, _ = golden
    rows = lines(workdir)
    training = [row for row in rows if "grad_norm" in row]
    assert [row["step"] for row in training] == list(range(1, STEPS + 1))
    assert {"loss", "grad_norm", "learning_rate", "tokens_per_second", "data_wait_fraction"} <= set(
        training[0]
    )
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


def test_running_a_finished_run_again_does_nothing(golden, cache):
    workdir = golden[0]
    before = (workdir / "metrics.jsonl").read_text()
    code, out, _ = finish(start(cache, workdir))
    assert code == 0 and "already has its 60 steps" in out
    assert (workdir / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_saves_exits_75_and_resumes_bit_equal(golden, cache, tmp_path, number):
    process = start(cache, tmp_path)
    wait_for(lambda: steps_done(tmp_path) >= 17, process)
    process.send_signal(number)
    code, _, err = finish(process)
    assert code == 75, err
    assert "the same command goes on" in err
    stopped = max(int(p.parent.name) for p in tmp_path.glob("checkpoints/*/MANIFEST.json"))
    assert stopped == lines(tmp_path)[-1]["step"] < STEPS
    code, out, err = finish(start(cache, tmp_path))
    assert code == 0 and f"resuming after step {stopped}" in out, err
    assert_same_end(tmp_path, golden[0])


def test_a_run_stopped_on_an_evaluation_step_evaluates_when_it_resumes(golden, cache, tmp_path):
    """The stop leaves at once; the evaluation it skipped comes first after the resume."""
    process = start(cache, tmp_path, "--config.evaluation.every=1", "--config.steps=1000000")
    wait_for(lambda: steps_done(tmp_path) >= 3, process)
    process.terminate()
    code, _, err = finish(process)
    assert code == 75, err
    stopped = lines(tmp_path)[-1]["step"]
    assert "val_loss" not in lines(tmp_path)[-1]
    process = start(cache, tmp_path, "--config.evaluation.every=1", "--config.steps=1000000")
    wait_for(lambda: steps_done(tmp_path) > stopped, process)
    process.kill()
    process.wait()
    assert [row["step"] for row in lines(tmp_path) if "val_loss" in row][:stopped] == list(
        range(1, stopped + 1)
    )


def test_a_killed_run_resumes_bit_equal(golden, cache, tmp_path):
    process = start(cache, tmp_path)
    wait_for(lambda: steps_done(tmp_path) >= 22, process)
    process.kill()
    process.wait()
    (
        tmp_path / "checkpoints" / "00000777"
    ).mkdir()  # as a save leaves it when it is killed at its start
    code, out, err = finish(start(cache, tmp_path))
    assert code == 0, err
    assert "passed over" in err
    assert_same_end(tmp_path, golden[0])


@pytest.mark.slow
def test_a_killed_mixture_with_micro_batches_resumes_bit_equal(cache, tmp_path):
    """The routers' biases, recomputed layers and accumulated counts come back too."""
    flags = (
        "--config=configs/kha_moe_tiny.py",
        *(flag for flag in SMALL if "feed_forward" not in flag),
        "--config.model.feed_forward.width=16",
        "--config.accumulation=2",
        "--config.model.remat=full",
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, _, err = finish(start(cache, whole, base=flags))
    assert code == 0, err
    process = start(cache, killed, base=flags)
    wait_for(lambda: steps_done(killed) >= 22, process)
    process.kill()
    process.wait()
    code, out, err = finish(start(cache, killed, base=flags))
    assert code == 0 and "resuming after step" in out, err
    assert_same_end(killed, whole)
    assert np.abs(final_state(killed)[1]["balance"]["layers"]["feed_forward"]["bias"]).max() > 0


def test_a_damaged_newest_checkpoint_is_passed_over(golden, cache, tmp_path):
    process = start(cache, tmp_path)
    wait_for(
        lambda: (
            len(list(tmp_path.glob("checkpoints/*/MANIFEST.json"))) == 2
            or steps_done(tmp_path) > 50
        ),
        process,
    )
    process.kill()
    process.wait()
    newest = max(tmp_path.glob("checkpoints/*/MANIFEST.json")).parent
    victim = max(
        (p for p in newest.rglob("*") if p.is_file() and p.name != "MANIFEST.json"),
        key=lambda p: p.stat().st_size,
    )
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    code, out, err = finish(start(cache, tmp_path))
    assert code == 0 and "differs from its checksum" in err
    assert "resuming after step" in out
    assert_same_end(tmp_path, golden[0])


def test_checkpoints_that_are_all_damaged_stop_the_run(golden, cache, tmp_path):
    process = start(cache, tmp_path)
    wait_for(lambda: list(tmp_path.glob("checkpoints/*/MANIFEST.json")), process)
    process.kill()
    process.wait()
    for manifest in tmp_path.glob("checkpoints/*/MANIFEST.json"):
        manifest.write_text("{")
    code, _, err = finish(start(cache, tmp_path))
    assert code == 74 and "none of the checkpoints" in err and "Traceback" not in err


def test_resuming_with_another_config_is_refused_unless_allowed(golden, cache, tmp_path):
    process = start(cache, tmp_path)
    wait_for(lambda: list(tmp_path.glob("checkpoints/*/MANIFEST.json")), process)
    process.terminate()
    finish(process)
    flag = "--config.optimizer.learning_rate=0.001"
    code, _, err = finish(start(cache, tmp_path, flag))
    assert (
        code == 2
        and "config.optimizer.learning_rate: this run began with 0.003, found 0.001" in err
    )
    code, _, err = finish(start(cache, tmp_path, flag, "--allow_changes=optimizer.learning_rate"))
    assert code == 0 and "0.003 -> 0.001" in err


def test_one_writer_per_run_folder(cache, tmp_path):
    first = start(cache, tmp_path, "--config.steps=1000000")
    wait_for(lambda: steps_done(tmp_path) >= 1, first)
    code, _, err = finish(start(cache, tmp_path))
    assert code == 2 and f"in use by process {first.pid}" in err
    first.kill()
    first.wait()


BAD = [
    ("--config.stepz=3", "config.stepz: is not a known field; did you mean 'steps'?"),
    ("--config.model.attention.valeu.kind=mlp", "did you mean 'value'?"),
    ("--config.steps=many", "config.steps: expected int, found 'many'"),
    ("--config.model.attention.projection.kv_heads=3", "must divide query_heads=8, found 3"),
    ("--config.model.attention.value.kind=mpl", "did you mean 'mlp'?"),
    ("--config.batch_size=-4", "config.batch_size: must be at least 1, found -4"),
    ("--config.data.source=python", "did you mean 'python_source'?"),
    ("--config.mesh.data=3", "does not make 1 devices"),
    ("--config=configs/none.py", "no file configs/none.py"),
    ("--config=configs/kha_tiny.py:mlpp", "config variant 'mlpp' is not known"),
    (
        "--config.model.attention.kernel=cudnn",
        "config.model.attention.kernel: 'cudnn' runs on a gpu, found cpu",
    ),
    ("--workdirs=x", "did you mean 'workdir'?"),
]


@pytest.mark.parametrize(("flag", "message"), BAD)
def test_bad_flags_are_one_line_and_exit_2(cache, tmp_path, flag, message):
    code, out, err = finish(start(cache, tmp_path / "run", flag))
    assert code == 2 and message in err
    assert len(err.strip().splitlines()) == 1 and not out


def test_print_config_shows_the_resolved_config(cache, tmp_path):
    code, out, _ = finish(
        start(cache, tmp_path, "--print_config", "--config.model.attention.value.kind=linear")
    )
    assert code == 0
    assert json.loads(out)["model"]["attention"]["value"] == {
        "kind": "linear",
        "diag_init": 1.0,
        "parameterization": "direct",
        "apply": "auto",
    }
    assert not list(tmp_path.iterdir())


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
    assert code == 0, err


def test_steps_that_are_never_finite_stop_the_run_with_its_own_code(cache, tmp_path):
    code, _, err = finish(
        start(
            cache,
            tmp_path,
            "--config.optimizer.learning_rate=1e38",
            "--config.max_nonfinite_steps=3",
        )
    )
    assert code == 76 and "not applied" in err and "examples" in err
    assert sum(row.get("nonfinite", 0) for row in lines(tmp_path)) >= 3
