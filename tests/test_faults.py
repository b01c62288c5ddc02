"""The fault table on a real run: it is killed, filled, fed and starved at named places (see
kha_jax.runs.faults), and the end is compared leaf by leaf, by hash, with a run that nothing
happened to.

Golden runs and programs are shared; rows that one process can meet. Damage to files is in
test_checkpoint, to data in test_data, to what a folder says in test_run_folder.
"""

import json
import os
import shutil
import signal
import subprocess

import pytest

from tests.commands import run_all
from tests.runs import (
    SMALL,
    STEPS,
    assert_same_end,
    final_state,
    finish,
    leaf_hashes,
    lines,
    manifests,
    start,
    steps_done,
)

KILLED, STOPPED, FULL = -signal.SIGKILL, 75, 74


@pytest.fixture(scope="module")
def golden(cache, tmp_path_factory):
    """An undisturbed run for each base, made on first use."""
    made = {}

    def run(base=SMALL):
        if base not in made:
            made[base] = tmp_path_factory.mktemp("golden")
            code, _, err = finish(start(cache, made[base], base=base))
            assert code == 0, err
        return made[base]

    return run


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB: a checkpoint has 0.4."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system can only be mounted as root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def read_only(tmp_path):
    """Makes a copy of a folder that cannot be written to: permissions do not bind root, a mount
    does."""
    place, root = tmp_path / "read_only", os.geteuid() == 0

    def make(folder):
        shutil.copytree(folder, place)
        close = (
            ["mount", "--bind", "-o", "ro", place, place] if root else ["chmod", "-R", "a-w", place]
        )
        if subprocess.run(close, capture_output=True).returncode:
            pytest.skip("root can write to every folder, and cannot mount one read-only here")
        return place

    yield make
    subprocess.run(["umount", "-l", place] if root else ["chmod", "-R", "u+w", place])


def before_the_last_save(run, place):
    """A copy of a run as if it had been killed when its last save began: told of, not yet there."""
    shutil.copytree(run, place, dirs_exist_ok=True)
    shutil.rmtree(manifests(place)[-1].parent)


def ends_as(process, expected, *said):
    """The process left with this code, said so in words, and showed no traceback."""
    code, out, err = finish(process)
    assert code == expected and "Traceback" not in err, err
    for text in said:
        assert text in out + err, out + err
    return err


# ---------------------------------------------------------------- rows 1 and 2: kills and stops
# In a step and as a save begins: test_train, and the row of a changed config.
POINTS = ("evaluation:40", "arrays_written:30", "manifest_written:30")


@pytest.mark.slow
@pytest.mark.parametrize("point", [*POINTS, "arrays_written:15", "retention:15"])
def test_a_run_killed_anywhere_ends_bit_equal(golden, cache, tmp_path, point):
    ends_as(start(cache, tmp_path, fault=f"kill:{point}"), KILLED)
    ends_as(start(cache, tmp_path), 0)
    assert_same_end(tmp_path, golden())
    assert len(manifests(tmp_path)) == len(list((tmp_path / "checkpoints").glob("*/"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("point", ["batch:1", *POINTS, "step:59"])
def test_a_run_stopped_anywhere_saves_and_ends_bit_equal(golden, cache, tmp_path, point):
    """Also at the first step and before the last one."""
    ends_as(start(cache, tmp_path, fault=f"terminate:{point}"), STOPPED, "the same command goes on")
    stopped = steps_done(tmp_path)
    assert stopped >= int(point.split(":")[1])
    ends_as(start(cache, tmp_path), 0, f"matches the checkpoint of step {stopped}")
    assert_same_end(tmp_path, golden())


@pytest.mark.slow
def test_a_second_signal_leaves_at_once(golden, cache, tmp_path):
    ends_as(start(cache, tmp_path, fault="terminate:save:30,terminate:save:30"), STOPPED)
    assert [int(p.parent.name) for p in manifests(tmp_path)] == [15]
    ends_as(start(cache, tmp_path), 0, "resuming after step 15")
    assert_same_end(tmp_path, golden())


# ---------------------------------------------------------------- row 3: a run that hangs
def test_a_step_that_hangs_shows_all_stacks_and_is_70(cache, tmp_path):
    code, _, err = finish(start(cache, tmp_path, "--config.hang_timeout=6", fault="hang:step:17"))
    assert code == 70 and "in _hang" in err and "no end of step 17 within 6 s" in err, err
    assert err.strip().splitlines()[-1].startswith("error: ") and "Traceback" not in err
    assert [int(p.parent.name) for p in manifests(tmp_path)] == [15]


# ---------------------------------------------------------------- row 4: the disk is full
@pytest.mark.slow
@pytest.mark.parametrize("when", ["save:30", "arrays_written:60"])
def test_a_full_disk_leaves_the_old_checkpoint_and_74(golden, cache, small_disk, when):
    """At a save, before its arrays are written, and at the last one, after."""
    run = small_disk / "run"
    ends_as(start(cache, run, fault=f"fill:{when}"), FULL, f"{run}/checkpoints", "bytes are needed")
    kept = [int(p.parent.name) for p in manifests(run)]
    assert kept[-1] == int(when.split(":")[1]) - 15
    (run / "checkpoints" / "fill").unlink()
    ends_as(start(cache, run), 0, f"resuming after step {kept[-1]}")
    assert_same_end(run, golden())


@pytest.mark.slow
def test_a_disk_that_is_full_at_the_start_is_74_before_anything_compiles(cache, small_disk):
    (small_disk / "other").write_bytes(bytes(3 * 2**20))
    err = ends_as(start(cache, small_disk / "run"), FULL, "3 checkpoints of", "bytes are free")
    assert len(err.strip().splitlines()) == 1
    with open(small_disk / "fill", "wb", buffering=0) as file:
        file.write(bytes(2**22))
    err = ends_as(start(cache, small_disk / "new"), FULL, str(small_disk))
    assert len(err.strip().splitlines()) == 1


@pytest.mark.slow
def test_a_cache_that_is_full_costs_only_time_or_one_line(small_disk, tmp_path):
    """One that is a file: test_run_folder and test_data."""
    (small_disk / "fill").write_bytes(bytes(2**22 - 2**14))
    short = ("--config.steps=2", "--config.evaluation.every=0")
    data = (f"--config.data.cache_dir={tmp_path / 'data'}",)
    ends_as(start(small_disk, tmp_path / "run", *short, *data), 0, "compiled programs are not kept")
    said = f"{small_disk}/", "cannot be written"
    err = ends_as(start(small_disk, tmp_path / "other", *short), FULL, *said)
    assert len([line for line in err.splitlines() if line.startswith("error")]) == 1


# ---------------------------------------------------------------- rows 5 and 6: the run folder
@pytest.mark.slow
def test_a_run_whose_manifests_are_gone_is_74_and_not_step_0(golden, cache, tmp_path):
    run = shutil.copytree(golden(), tmp_path / "run")
    for manifest in manifests(run):
        manifest.unlink()
    ends_as(start(cache, run), FULL, "no manifest is left", "start again")
    assert len(list(run.glob("checkpoints/*/state"))) == 2 and lines(run) == lines(golden())


@pytest.mark.slow
def test_a_read_only_folder_is_refused_by_name_before_anything_compiles_and_still_read(
    golden, cache, read_only
):
    """That of a run, and one that a run would be made in."""
    place = read_only(golden())
    flags = [f"--workdir={run}" for run in (place, place / "new")]
    *refused, verified, told = run_all(
        [
            *(("train", [*SMALL, flag]) for flag in flags),
            ("checkpoints", [flags[0], "--verify"]),
            ("generate", [flags[0], "--tokens=2", "--prompt=a"]),
        ],
        cache,
    )
    for flag, result in zip(flags, refused):
        assert result.code == 2 and result.err.startswith(f"error: {flag} cannot be written: ")
        assert len(result.err.splitlines()) == 1
    assert (verified.code, verified.out.count("yes"), told.code) == (0, 2, 0), (verified, told)


@pytest.mark.slow
def test_another_seeds_checkpoint_is_passed_over(golden, cache, tmp_path):
    """Copied into the folder, or renamed within it."""
    ends_as(start(cache, tmp_path / "theirs", "--config.seed=1", "--config.steps=30"), 0)
    ends_as(start(cache, tmp_path / "ours", fault="kill:save:30"), KILLED)
    place = tmp_path / "ours" / "checkpoints"
    shutil.rmtree(place / "00000030")
    shutil.copytree(manifests(tmp_path / "theirs")[-1].parent, place / "00000030")
    shutil.copytree(place / "00000015", place / "00000045")
    said = "is of another run: its config", "00000045 holds step 15", "resuming after step 15"
    ends_as(start(cache, tmp_path / "ours"), 0, *said)
    assert_same_end(tmp_path / "ours", golden())


# ---------------------------------------------------------------- row 7: every kind
PROJECTION = "--config.model.attention.projection"
KINDS = {
    "grouped_query, 1 group": (f"{PROJECTION}.kv_heads=1",),
    "grouped_query, 2 groups": (f"{PROJECTION}.kv_heads=2",),
    "grouped_tied, 1 group": (f"{PROJECTION}.kind=grouped_tied", f"{PROJECTION}.kv_heads=1"),
    "grouped_tied, 2 groups": (f"{PROJECTION}.kind=grouped_tied", f"{PROJECTION}.kv_heads=2"),
    "latent, 1 group": ("--config=configs/kha_tiny.py:linear", f"{PROJECTION}.kind=latent"),
    "latent, 2 groups": (
        "--config=configs/kha_tiny.py:linear",
        f"{PROJECTION}.kind=latent",
        f"{PROJECTION}.groups=2",
    ),
    "mixture": ("--config=configs/kha_moe_tiny.py", "--config.model.feed_forward.width=16"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_resumes_bit_equal_with_micro_batches_and_rematerialisation(
    golden, cache, tmp_path, kind
):
    """With the routers' biases, the optimiser's counts and the schedule."""
    both = "--config.accumulation=2", "--config.model.remat=full"
    small = (flag for flag in SMALL if kind != "mixture" or "feed_forward" not in flag)
    base = (*KINDS[kind], *small, *both)  # --config comes first
    before_the_last_save(golden(base), tmp_path)
    ends_as(start(cache, tmp_path, base=base), 0, "resuming after step 45")
    assert_same_end(tmp_path, golden(base))
    if kind == "mixture":
        assert final_state(tmp_path)[1]["balance"]["layers"]["feed_forward"]["bias"].any()


# ---------------------------------------------------------------- row 9: meshes
@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "mesh"), [(4, ("--config.mesh.data=4",)), (2, ("--config.mesh.model=2",))]
)
def test_a_resume_on_another_mesh_reads_the_same_batches(golden, cache, tmp_path, devices, mesh):
    before_the_last_save(golden(), tmp_path)
    ends_as(start(cache, tmp_path, *mesh, devices=devices), 0, "matches the checkpoint of step 45")
    assert len(lines(tmp_path)) == len(lines(golden()))
    ours, theirs = (
        {row["step"]: row["loss"] for row in lines(run) if "loss" in row}
        for run in (tmp_path, golden())
    )
    assert ours == pytest.approx(theirs, rel=1e-4)


# ---------------------------------------------------------------- row 11: another config
@pytest.mark.slow
def test_what_cannot_change_does_not_lock_the_run(golden, cache, tmp_path):
    ends_as(start(cache, tmp_path, fault="kill:step:22"), KILLED)
    wider = "--config.model.width=64", "--allow_changes=model.width"
    ends_as(start(cache, tmp_path, *wider), 2, "began with 32, found 64; the model cannot change")
    rate = "--config.optimizer.learning_rate=0.001"
    ends_as(start(cache, tmp_path, rate), 2, "this run began with 0.003, found 0.001")
    other = shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-other")
    ends_as(start(cache, tmp_path), 0)
    assert_same_end(tmp_path, golden())
    allowed = rate, "--allow_changes=optimizer.learning_rate"
    ends_as(start(cache, other, *allowed), 0, "0.003 -> 0.001")
    assert leaf_hashes(other) != leaf_hashes(golden())


# ---------------------------------------------------------------- row 15: what is not finite
@pytest.mark.slow
def test_a_poisoned_batch_is_skipped_and_named(golden, cache, tmp_path):
    process = start(cache, tmp_path, fault="poison:batch:31,terminate:step:31")
    ends_as(process, STOPPED, "step 31 not applied", "examples 120 to 123, windows")
    skipped = next(row for row in lines(tmp_path) if row["step"] == 31)
    assert skipped["nonfinite"] == 1 and skipped["loss"] is None
    step, state = final_state(tmp_path)
    assert step == 31 and state["optimizer"][1]["count"] == 30


@pytest.mark.slow
def test_endless_poison_is_76_again_and_again(cache, tmp_path):
    """Also at the last step, which is not saved as if all were well."""
    fault = ",".join(f"poison:batch:{step}" for step in range(STEPS - 2, STEPS + 1))
    for _ in range(2):
        process = start(cache, tmp_path, "--config.max_nonfinite_steps=3", fault=fault)
        ends_as(process, 76, "stopped after 3 consecutive non-finite steps")
        assert int(manifests(tmp_path)[-1].parent.name) == 45


# ---------------------------------------------------------------- row 18: optional sinks
@pytest.mark.slow
def test_a_closed_pipe_and_a_profile_that_cannot_be_written_do_not_stop_a_run(cache, tmp_path):
    (tmp_path / "profile").write_text("")
    flags = "--config.steps=20", "--config.profile.start=1", "--config.profile.stop=3"
    process = start(cache, tmp_path, *flags)
    assert process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=120) == 0 and "Traceback" not in err, err
    assert "the profile cannot be written" in err and "the terminal: " in err, err
    assert len(lines(tmp_path)) == 21 and len(manifests(tmp_path)) == 2


@pytest.mark.slow
def test_a_full_terminal_and_sinks_that_cannot_be_kept_do_not_stop_a_run(golden, cache, tmp_path):
    pytest.importorskip("tensorboardX")
    (tmp_path / "metrics.jsonl").mkdir()
    (tmp_path / "tensorboard").write_text("")
    with open("/dev/full", "w") as full:
        process = start(cache, tmp_path, "--tensorboard", stdout=full)
        err = process.communicate(timeout=240)[1]
    assert process.returncode == 0 and "Traceback" not in err, err
    for name in ("metrics.jsonl", "tensorboard"):
        assert f"{name} cannot be written" in err and f"{name}: 6" in err, err
    assert leaf_hashes(tmp_path) == leaf_hashes(golden())


# ---------------------------------------------------------------- tools
@pytest.mark.slow
def test_checkpoints_are_listed_verified_compared_and_removed_by_name(golden, cache, tmp_path):
    run = shutil.copytree(golden(), tmp_path / "run")

    def tool(*each):
        return run_all([("checkpoints", [f"--workdir={run}", *flags]) for flags in each], cache)

    verified, listed, compared, same, refused, pruned = tool(
        ["--verify"], [], ["--diff=45,60"], ["--diff=60,60"], ["--prune=45,60"], ["--prune=45"]
    )
    assert verified.code == 0 and "60" in listed.out
    assert "step: changes by up to 15" in compared.out
    assert "params/embedding: changes by" in compared.out
    assert set(same.out.replace(": ", "\n").splitlines()[1::2]) == {"equal"}
    assert refused.code == 2
    assert "removed" in pruned.out and len(manifests(run)) == 1
    content = json.loads(manifests(run)[0].read_text())
    manifests(run)[0].write_text(json.dumps({**content, "step": 3}))
    (result,) = tool(["--verify"])
    assert result.code == FULL and "MANIFEST.json differs from its own checksum" in result.err


@pytest.mark.slow
def test_a_step_is_replayed_by_document(golden, cache):
    process = start(cache, golden(), "--replay_step=46")
    _, out, _ = finish(process)
    rows = out.splitlines()[1:]
    assert "losses of the checkpoint of step 45" in out and len(rows) >= 4
    tokens = [(float(r.split()[5]), float(r.split()[7])) for r in rows]
    mean = sum(n * loss for n, loss in tokens if n) / sum(n for n, _ in tokens)
    told = next(row["loss"] for row in lines(golden()) if row["step"] == 46)
    assert mean == pytest.approx(told, rel=1e-4)  # the step begins where the checkpoint ends
