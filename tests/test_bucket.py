"""Runs in a bucket: what holds of a folder holds there, whenever they are killed."""

import concurrent.futures
import hashlib
import json
import os
import signal
import sys
import threading
import time
import types

import jax.numpy as jnp
import pytest

from experiments.cli.codes import UsageError
from experiments.converting import stock
from experiments.run_folders import grace
from experiments.run_folders import stored as stored_runs
from kha_jax import analysis
from kha_jax.data import Shards, shard_copy, shard_reader
from kha_jax.data.shard_files import read_meta
from kha_jax.data.tokenizers import ByteTokenizer
from kha_jax.errors import CheckpointError, DataError, SilentError, StorageError
from kha_jax.runs import checkpoint, faults
from kha_jax.runs.checkpoint import Checkpoints
from kha_jax.runs.manifest import MANIFEST, read_manifest, sealed
from kha_jax.storage import (
    READ,
    WRITTEN,
    Lease,
    Objects,
    Stored,
    address,
    buckets,
    fetch,
    lease,
    mirror,
    put_all,
    remove,
    rename,
    stored,
    write_text,
)

mirrors = sys.modules[mirror.__module__]
pytest.importorskip("gcp_storage_emulator")
pytest.importorskip("gcsfs")

from tests import test_stock_commands  # noqa: E402
from tests.commands import run_all  # noqa: E402
from tests.emulator import emulator  # noqa: E402
from tests.runs import assert_same_end, finish, joined, start  # noqa: E402
from tests.test_shards import assert_same_windows, put, written  # noqa: E402

URL = "gs://bucket/run"
STEPS = 6
TINY = (
    f"--config.steps={STEPS}",
    "--config.batch_size=2",
    "--config.seq_len=32",
    "--config.model.layers=1",
    "--config.model.width=16",
    "--config.model.attention.projection.head_dim=4",
    "--config.model.feed_forward.width=32",
    "--config.evaluation.every=3",
    "--config.evaluation.batches=1",
    "--config.checkpoint.every=2",
)


@pytest.fixture(scope="module")
def server():
    """One for all: the libraries ask for its address once in a process."""
    with emulator() as running:
        yield running


@pytest.fixture
def bucket(server):
    server.empty()
    return server


@pytest.fixture
def here(bucket, tmp_path, monkeypatch):
    """A mirror of an empty run."""
    monkeypatch.setenv("KHA_JAX_CACHE", str(tmp_path))
    return mirror(URL, WRITTEN)


def test_a_mirror_becomes_what_the_bucket_holds_but_for_arrays(here, bucket):
    objects = Objects(URL)
    there = {"config.json": b"{}", "checkpoints/00000002/MANIFEST.json": b"m", "lock": b"theirs"}
    there |= {"stock/config.json": b"{}", "stock/tensors.json": b"[]"}
    arrays = ("checkpoints/00000002/state/d/1", "checkpoints/00000004/state/d/1")
    for name, value in {**there, **dict.fromkeys(arrays, b"x" * 9)}.items():
        objects.write(name, value)
    (here / "old").mkdir()
    (here / "old" / "file").write_text("gone there")
    (here / "config.json").write_text("[]")
    (here / "lock").write_text("mine")
    fetch(here)
    files = {p.relative_to(here).as_posix(): p.read_bytes() for p in here.rglob("*") if p.is_file()}
    assert files == {**there, "lock": b"mine"}
    steps = sorted(p.name for p in (here / "checkpoints").iterdir())
    assert steps == ["00000002", "00000004"] and not list(
        (here / "checkpoints" / steps[1]).iterdir()
    )
    assert not (here / "old").exists()
    assert stored(here / "checkpoints" / steps[0])["state/d/1"].bytes == 9
    assert str(address(here / "checkpoints")) == f"{URL}/checkpoints"


@pytest.mark.parametrize("name", ["../out", "a/../../out", "a//b", "a/./b", "/etc/passwd", ""])
def test_a_strangers_object_lands_in_the_mirror_or_nowhere(tmp_path, monkeypatch, name):
    monkeypatch.setenv("KHA_JAX_CACHE", str(tmp_path))
    folder, copied = mirror("gs://stranger/run", READ), []
    fake = types.SimpleNamespace(
        listing=lambda: {name: Stored(1), "fine": Stored(1)},
        copy=lambda name, path: copied.append(path),
    )
    monkeypatch.setattr(mirrors, "_objects", lambda url: fake)
    fetch(folder)
    assert copied == [folder / "fine"]


def test_a_run_below_another_is_no_part_of_it(here, bucket):
    """Not fetched, not overwritten by what was fetched, and its mirror is elsewhere."""
    inner = mirror(f"{URL}/inner", WRITTEN)
    (inner / "metrics.jsonl").write_text("a line that is not brought yet")
    Objects(URL).write("inner/config.json", b"{}")
    Objects(URL).write("inner/metrics.jsonl", b"old")
    Objects(URL).write("inner/file", b"old")
    fetch(here)
    Objects(URL).write("inner/file", b"new")
    put_all(here)
    assert bucket.read("run/inner/file") == b"new" and not (here / "inner").exists()
    assert (inner / "metrics.jsonl").read_text() == "a line that is not brought yet"


def test_many_fetch_at_once_while_what_is_there_changes(here):
    """A run that trains removes, renames and writes again while others read it."""
    objects = Objects(URL)
    for number in range(30):
        objects.write(f"{number % 3}/{number}", bytes(number + 1))
    for number in range(100):
        (here / "old" / str(number)).mkdir(parents=True)
        (here / "old" / str(number) / "file").write_text("gone there")
    failed = []

    def read():
        try:
            fetch(here)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(0, 30, 2):
        objects.delete(f"{number % 3}/{number}")
        objects.write(f"{(number + 1) % 3}/{number + 1}", b"again")
    for thread in threads:
        thread.join()
    fetch(here)
    files = {p.relative_to(here).as_posix(): p.read_bytes() for p in here.rglob("*") if p.is_file()}
    assert not failed and len(files) == 15 and set(files.values()) == {b"again"}


def test_an_object_that_is_replaced_while_it_is_copied_is_read_again(here, monkeypatch):
    objects, ranges = Objects(URL), Objects.ranges
    objects.write("metrics.jsonl", b"one line")

    def replaced(self, asked):
        found = ranges(self, asked)
        if self.read("metrics.jsonl") == b"one line":
            self.write("metrics.jsonl", b"two lines\n")
            return [found[0][:4] + b"mixed"[: len(found[0]) - 4]]
        return found

    monkeypatch.setattr(Objects, "ranges", replaced)
    objects.copy("metrics.jsonl", here / "copy")
    assert (here / "copy").read_bytes() == b"two lines\n"


def test_what_is_no_folder_of_a_bucket_is_one_line(here, bucket, monkeypatch):
    with pytest.raises(StorageError, match="gs://nobody/run: there is no such bucket"):
        fetch(mirror("gs://nobody/run", READ))
    Objects("gs://bucket").write("file", b"an object, and no folder")
    fetch(folder := mirror("gs://bucket/file", READ))
    assert not list(folder.iterdir())


def test_a_rate_is_measured_in_the_bucket_and_leaves_nothing(here, bucket, monkeypatch):
    monkeypatch.setattr(grace, "SAMPLE", 2**16)
    before = bucket.writes
    assert grace.write_rate(here) > 0
    assert bucket.writes - before >= 2 * grace.PARTS and not bucket.names()


def test_what_is_written_renamed_and_removed_here_is_so_there(here, bucket):
    write_text(here / "a", "one")
    rename(here / "a", here / "b")
    (here / "metrics.jsonl").write_text("line")
    (here / "checkpoints").mkdir()
    (here / "checkpoints" / "x").write_text("not brought")
    put_all(here)
    assert bucket.names() == ["run/b", "run/metrics.jsonl"] and bucket.read("run/b") == b"one"
    Objects(URL).write("checkpoints/00000002/state/d", b"x")
    remove(here / "checkpoints")
    remove(here / "b")
    assert bucket.names() == ["run/metrics.jsonl"] and not (here / "b").exists()


def test_one_holder_at_a_time_and_a_dead_one_is_taken_over(here, bucket, monkeypatch):
    monkeypatch.setattr(lease, "BEAT", 0.1)
    monkeypatch.setattr(lease, "STALE", 0.5)
    first = Lease(URL)
    with pytest.raises(BlockingIOError, match=f"{os.getpid()} on "):
        Lease(URL)
    monkeypatch.setattr(lease, "machine", lambda: "another")
    with pytest.raises(BlockingIOError):  # it sees signs of life
        Lease(URL)
    first.left.set()
    first.thread.join()
    second = Lease(URL)  # none for long enough
    with pytest.raises(StorageError, match="took it over"):
        first.check()
    first.close()  # leaves the other's
    second.check()
    second.close()
    assert not bucket.names()
    Objects(URL).write("lock", json.dumps({"machine": "another", "pid": 1, "began": ""}).encode())
    Lease(URL).close()  # of a process that is gone, at once
    assert not bucket.names()


def test_signs_of_life_go_on_after_one_that_was_refused(here, monkeypatch):
    monkeypatch.setattr(lease, "BEAT", 0.05)
    first, refused = Lease(URL), []

    def refuse(*_, **__):
        refused.append(1)
        raise FileExistsError if len(refused) == 1 else StorageError

    write, read = first.objects.write, first.objects.read
    first.objects.write, first.objects.read = refuse, refuse
    while len(refused) < 4:
        time.sleep(0.01)
    first.objects.write, first.objects.read = write, read
    beat = first.beat
    while first.beat < beat + 3:
        assert first.thread.is_alive()
        time.sleep(0.01)
    first.close()
    with pytest.raises(StorageError, match="lock was removed"):
        first.check()


@pytest.mark.parametrize("lost", ["save", "arrays_written"])
def test_who_has_lost_the_lock_removes_and_overwrites_nothing(here, bucket, lost, monkeypatch):
    """Before its save or during it. By then the checkpoint of that step is another trainer's."""
    theirs = {f"checkpoints/00000002/{name}": b"theirs" for name in ("MANIFEST.json", "state/x")}

    def take_over(point, *_):
        for name, content in theirs.items() if point == lost else ():
            Objects(URL).write(name, content)

    def ours():
        if bucket.names("run/checkpoints/00000002/MANIFEST.json"):
            raise StorageError("process 7 took it over")

    monkeypatch.setattr(faults, "at", take_over)
    if lost == "save":
        take_over(lost)
    with pytest.raises(CheckpointError, match="took it over"):
        with Checkpoints(here / "checkpoints", ours=ours) as checkpoints:
            checkpoints.save(2, {"a": jnp.ones(3)})
    assert {name: bucket.read(f"run/{name}") for name in theirs} == theirs


def test_a_save_that_waits_for_a_silent_bucket_is_given_up(here, monkeypatch):
    """The lock's thread has noticed; Orbax would ask for longer."""
    monkeypatch.setattr(checkpoint, "LOOKS", 0.05)
    checkpoints = Checkpoints(here / "checkpoints")
    checkpoints.pending = concurrent.futures.Future()
    threading.Timer(0.2, buckets._silent.update, [{"gs://bucket": time.monotonic() - 60}]).start()
    with pytest.raises(SilentError, match=f"{URL}: no answer for 60 s"):
        checkpoints.close()
    Objects(URL).listing()  # it answers again
    Objects(URL).check_answers()


def test_a_run_that_is_copied_from_a_bucket_is_verified_again(here, bucket, tmp_path):
    """By the same manifest, also where the copy is damaged and the record of it was copied too; and
    by one with sha256, as older ones are, which no bucket keeps."""
    with Checkpoints(here / "checkpoints") as checkpoints:
        checkpoints.save(2, {"a": jnp.arange(999.0)})
        checkpoints.wait()
        assert checkpoints.newest_good() == 2
    assert "run/checkpoints/VERIFIED.json" in bucket.names()
    copy = brought(bucket, tmp_path) / "checkpoints"
    with Checkpoints(copy) as copied:
        assert copied.newest_good(set_aside=False) == 2
    largest = max(copy.rglob("d/*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1] + b"?")
    with Checkpoints(copy) as copied, pytest.raises(CheckpointError, match="is intact"):
        copied.newest_good(set_aside=False)
    manifest = read_manifest(here / "checkpoints" / "00000002")
    for name, entry in manifest["files"].items():
        content = bucket.read(f"run/checkpoints/00000002/{name}")
        entry["sha256"] = hashlib.sha256(content).hexdigest()
        del entry["crc32c"]
    write_text(here / "checkpoints" / "00000002" / MANIFEST, json.dumps(sealed(manifest)))
    with Checkpoints(here / "checkpoints") as older:
        assert older.newest_good(set_aside=False) == 2
        bucket.flip(f"run/checkpoints/{largest.relative_to(copy).as_posix()}")
        with pytest.raises(CheckpointError, match="is intact"):
            older.newest_good(set_aside=False)


def test_of_many_who_take_over_one_does(here, monkeypatch):
    Objects(URL).write("lock", b"{")
    monkeypatch.setattr(lease, "STALE", 0.2)
    held, refused = [], []

    def take():
        try:
            held.append(Lease(URL))
        except BlockingIOError as error:
            refused.append(error)

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(held), len(refused)) == (1, 5)
    held[0].close()


SHARDS = "gs://bucket/shards"


@pytest.fixture
def shards(bucket, tmp_path):
    """Shards in a folder, which are also in the bucket."""
    folder = tmp_path / "shards"
    folder.mkdir()
    texts = [[b"one document", b"and another"], [b"x" * 300_000], [b"the last one"]]
    written(folder, ByteTokenizer(), {"train": texts, "validation": [[b"held out " * 30]]})
    put(folder, SHARDS)
    return folder


def test_shards_in_a_bucket_are_read_as_those_of_a_folder(bucket, shards, tmp_path):
    """By ranges and as a copy, though some reads fail in passing."""
    there = Shards(folder=f"{SHARDS}/")
    copy = there.replace(cache_dir=str(tmp_path / "copy"))
    bucket.bad_reads_every = 9
    assert_same_windows(Shards(folder=str(shards)), there, copy)
    assert bucket.failed >= 3
    bucket.bad_reads_every, before = 0, bucket.reads
    copy.open("train", 512, 0).rows(range(100))
    assert bucket.reads - before == 2  # meta.json and the tokenizer.json, which is not there


def test_a_store_that_does_not_answer_is_named_in_time(bucket, shards, monkeypatch):
    """Long before a watchdog: `hang_timeout` is above the seconds that a config says."""
    monkeypatch.setattr(shard_reader, "DEADLINE", 0.4)
    meta, source = read_meta(SHARDS), Shards(folder=SHARDS).open("train", 512, 0)
    bucket.answers.clear()
    try:
        for ask in (
            lambda: source.rows([0, 100]),
            lambda: shard_reader.ShardReader(SHARDS, "train", meta),
        ):
            began = time.monotonic()
            with pytest.raises(StorageError, match=f"{SHARDS}.*: no answer within 0 s"):
                ask()
            assert time.monotonic() - began < shard_reader.CALLS * 0.4
    finally:
        bucket.answers.set()
    assert len(source.rows([0, 100])["tokens"]) == 2


def test_a_copy_is_whole_and_right_or_not_there(bucket, shards, tmp_path, monkeypatch):
    config = Shards(folder=SHARDS, cache_dir=str(tmp_path / "copy"))
    bucket.flip("shards/train-00001.bin")
    with pytest.raises(DataError, match="train-00001.bin differs from the sha256"):
        config.open("validation", 64, 0)
    assert not list((tmp_path / "copy").iterdir())
    monkeypatch.setattr(shard_copy, "LARGEST", 600_000)
    with pytest.raises(DataError, match="too many for a copy in config.data.cache_dir; leave that"):
        config.open("validation", 64, 0)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def golden(cache, tmp_path_factory):
    """An uninterrupted run in a folder."""
    folder = tmp_path_factory.mktemp("golden") / "run"
    assert finish(start(cache, folder, base=TINY), 900)[0] == 0
    return folder


def run(cache, *flags, fault="", url=URL):
    code, out, err = finish(start(cache, url, *flags, base=TINY, fault=fault), 900)
    assert "Traceback" not in err, err
    return code, out, err


def brought(bucket, tmp_path):
    """The run as a folder of files."""
    folder = tmp_path / "brought"
    for name in bucket.names("run/"):
        path = folder / name.removeprefix("run/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bucket.read(name))
    return folder


POINTS = ("step:3", "save:4", "arrays_written:4", "manifest_written:4", "retention:2")


@pytest.mark.slow
@pytest.mark.parametrize("point", [*POINTS, "none"])
def test_a_run_that_is_killed_ends_as_one_in_a_folder(bucket, cache, golden, tmp_path, point):
    if point != "none":
        assert run(cache, fault=f"kill:{point}")[0] == -signal.SIGKILL
        kept = [json.loads(row)["step"] for row in published(bucket)]
        saved = [int(n.split("/")[2]) for n in bucket.names("run/") if n.endswith("MANIFEST.json")]
        assert max(kept, default=0) >= max(saved, default=0)
    code, _, err = run(cache)
    assert code == 0, err
    folder = brought(bucket, tmp_path)
    assert_same_end(folder, golden, STEPS)
    assert not (folder / "lock").exists()
    kept = sorted(p.name for p in (folder / "checkpoints").glob("0*"))
    assert kept == ["00000004", "00000006"]


def published(bucket):
    names = bucket.names("run/metrics.jsonl")
    return bucket.read(names[0]).decode().splitlines() if names else []


@pytest.mark.slow
def test_writes_that_fail_in_passing_are_tried_again(bucket, cache, golden, tmp_path):
    bucket.bad_every = 5
    assert run(cache)[0] == 0 and bucket.failed > 5
    assert_same_end(brought(bucket, tmp_path), golden, STEPS)


@pytest.mark.slow
def test_a_flipped_object_is_passed_over_and_a_second_trainer_refused(
    bucket, cache, golden, tmp_path
):
    assert run(cache, "--config.checkpoint.keep=3")[0] == 0
    arrays = [n for n in bucket.names("run/checkpoints/00000006/state/") if "/d/" in n]
    bucket.flip(max(arrays, key=lambda name: len(bucket.read(name))))
    first = start(cache, URL, base=TINY, fault="rest:step:5,rest:step:6")
    deadline = time.monotonic() + 200
    while "run/lock" not in bucket.names() and time.monotonic() < deadline:
        time.sleep(0.05)
    code, _, err = run(cache)
    assert code == 2 and f"--workdir={URL} is in use by process {first.pid} on" in err, err
    code, _, err = finish(first, 400)
    assert code == 0 and "passed over checkpoint 6: gs://" in err, err
    assert_same_end(brought(bucket, tmp_path), golden, STEPS)


@pytest.mark.slow
def test_every_command_that_reads_runs_reads_them(bucket, cache, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    assert run(cache, "--config.model.attention.value.kind=linear")[0] == 0
    monkeypatch.setenv("KHA_JAX_CACHE", str(tmp_path / "mine"))
    read = analysis.Run(stored_runs.readable_folder("workdir", URL))  # as `analyze` does
    assert read.step == STEPS and read.matrices() and read.metrics()
    with pytest.raises(UsageError, match=f"{URL}/none: no run there"):
        stored_runs.run_folder("workdir", f"{URL}/none")
    text = tmp_path / "text"
    text.write_text("import os\n" * 40)
    lines = {
        "generate --prompt=import --tokens=3": "import",
        f"evaluate --text={text}": "bits",
        f"convert fold --out={tmp_path}/folded": "at step 6",
        f"report --out={tmp_path}/curves.png": "wrote",
        "train --replay_step=5": "losses of the checkpoint of step 4",
        "checkpoints --verify": "yes",
        "checkpoints --leaves=6": "params/",
        "checkpoints --diff=4,6": "changes by",
        "checkpoints --prune=4": f"removed {URL}/checkpoints/00000004",
    }
    asked = [(words[0], [*words[1:], f"--workdir={URL}"]) for words in map(str.split, lines)]
    for line, (code, out, err, seconds) in zip(lines, run_all(asked, cache)):
        print(f"{line}: {code} after {seconds:.1f} s")
        assert code == 0 and lines[line] in out and "Traceback" not in err, (line, out, err)
    assert not bucket.names("run/checkpoints/00000004") and "run/lock" not in bucket.names()


@pytest.mark.slow
def test_an_imported_run_in_a_bucket_goes_back_as_what_it_came_from(bucket, tmp_path, monkeypatch):
    """With the dtype of its record, and fold keeps that too."""
    monkeypatch.setenv("KHA_JAX_CACHE", str(tmp_path / "cache"))
    (folder := tmp_path / "stock").mkdir()
    test_stock_commands.written(folder)
    stock.import_run(str(folder), str(tmp_path / "run"), [], False)
    for path in (p for p in (tmp_path / "run").rglob("*") if p.is_file()):
        Objects(URL).write(path.relative_to(tmp_path / "run").as_posix(), path.read_bytes())
    stock.export_run(URL, str(tmp_path / "back"), *(None,) * 5, verify=False)
    first, back = map(test_stock_commands.content, (folder, tmp_path / "back"))
    assert first == back


@pytest.mark.slow
def test_two_processes_in_a_bucket_end_as_two_in_a_folder(bucket, cache, tmp_path):
    """Killed once, between the arrays and the manifest, and started again."""
    for workdir, fault in {tmp_path / "local": "", URL: "kill:arrays_written:4"}.items():
        both = [
            start(cache, workdir, *flags, base=TINY, fault=one)
            for flags, one in zip(joined(2), (fault, ""))
        ]
        ends = [finish(process, 900) for process in both]
        assert [code for code, _, _ in ends] == ([-signal.SIGKILL, 70] if fault else [0, 0]), ends
    assert not bucket.names("run/checkpoints/00000004/MANIFEST")
    both = [start(cache, URL, *flags, base=TINY) for flags in joined(2)]
    ends = [finish(process, 900) for process in both]
    assert [code for code, _, _ in ends] == [0, 0], ends
    folder = brought(bucket, tmp_path)
    assert any("process_1" in name for name in bucket.names("run/checkpoints/00000006/state/"))
    assert_same_end(folder, tmp_path / "local", STEPS)


BOUND = 90  # seconds, as docs/pods.md has it


@pytest.mark.slow
@pytest.mark.parametrize(
    "how, there",
    [("gone", "00000002/MANIFEST"), ("silent", "00000002/MANIFEST"), ("gone", "00000004/state/")],
)
def test_a_store_that_is_gone_is_one_line_and_74(cache, how, there):
    """From the moment on when that is there: between two saves, or in one."""
    with emulator() as bucket:
        process = start(cache, URL, base=TINY, fault="rest:step:3")
        deadline = time.monotonic() + 300
        while not bucket.names(f"run/checkpoints/{there}"):
            assert time.monotonic() < deadline and process.poll() is None, process.communicate()
            time.sleep(0.05)
        if how == "gone":
            bucket.shutdown()
            bucket.server_close()
        else:
            bucket.lock.acquire()  # it takes requests, and answers none
        began = time.monotonic()
        code, _, err = finish(process, 300)
        seconds = time.monotonic() - began
        print(f"\n{how} once {there} is there: left after {seconds:.1f} s")
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert code == 74 and len(errors) == 1 and URL in errors[0] and "Traceback" not in err, err
        assert seconds < BOUND, err
