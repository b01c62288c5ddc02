"""Checkpoints: what is damaged, foreign, of another tree or unfinished never counts, and what is
good stays."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kha_jax.errors import CheckpointError
from kha_jax.mesh import MESH_AXES, MeshConfig, make_mesh
from kha_jax.runs import faults
from kha_jax.runs import manifest as manifests
from kha_jax.runs.checkpoint import Checkpoints
from kha_jax.runs.manifest import MANIFEST, SEAL, own, read_manifest, sealed, share, verify
from kha_jax.runs.verified import VERIFIED
from kha_jax.storage import crc32c

STATE = {"params": {"w": jnp.arange(12.0).reshape(3, 4)}, "count": jnp.int32(7)}
OURS = {"config": "ours", "data": "text"}


def described(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def saved(folder, *steps, keep=9, about=OURS, state=STATE):
    with Checkpoints(folder, keep, lambda step: about) as checkpoints:
        for step in steps:
            checkpoints.save(step, state)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Steps 1 and 2, to be copied."""
    return saved(tmp_path_factory.mktemp("two") / "checkpoints", 1, 2)


@pytest.fixture
def folder(two, tmp_path):
    return shutil.copytree(two, tmp_path / "checkpoints")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of half a megabyte."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system can only be mounted as root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def newest(folder, accepts=(OURS,), **options):
    with Checkpoints(folder, accepts=accepts) as checkpoints:
        return checkpoints.newest_good(**options)


def same_tree(one, other):
    """Whether two folders hold the same files."""
    content = [
        {p.relative_to(top): p.read_bytes() for p in top.rglob("*") if p.is_file()}
        for top in (one, other)
    ]
    return content[0] == content[1]


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("harm", [cut, flip, empty, os.unlink])
def test_harm_to_any_file_is_found(folder, harm):
    files = [p for p in (folder / "00000002" / "state").rglob("*") if p.is_file()]
    files = [p for p in files if p.stat().st_size]
    assert len(files) > 5
    for path in files:
        before = path.read_bytes()
        harm(path)
        with pytest.raises(CheckpointError, match=path.name):
            verify(folder / "00000002")
        path.write_bytes(before)
    assert verify(folder / "00000002")["step"] == 2


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1, 2)])
def test_the_next_step_reuses_the_state_while_a_save_reads_its_copy(tmp_path, sizes):
    """The copies of later saves take the same buffers."""

    def places(tree):
        return [shard.data.unsafe_buffer_pointer() for shard in tree["w"].addressable_shards]

    config = MeshConfig(**dict(zip(MESH_AXES, sizes)))
    mesh = make_mesh(config, jax.devices()[: np.prod(sizes)])
    w = np.random.default_rng(0).standard_normal((2**11, 2**11), np.float32)
    # jax would borrow memory of NumPy's that happens to be aligned, and give none of it to a step.
    state = {"w": jax.device_put(jnp.array(w), NamedSharding(mesh, PartitionSpec("data", "model")))}
    step, copies = jax.jit(lambda tree: {"w": tree["w"] + 1}, donate_argnums=0), []
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for number in range(2):
            before = places(state)
            checkpoints.save(number, state)
            state = step(state)
            assert places(state) == before
            copies.append(places(checkpoints.copy))
        checkpoints.wait()
        assert copies[0] == copies[1]
        for number in range(2):
            back = checkpoints.restore(number, described(state))["w"]
            np.testing.assert_array_equal(back, w)
            w += 1


def as_older_runs_sum(folder):
    """Its manifests then hold sha256."""
    for path in folder.glob(f"*/{MANIFEST}"):
        about = json.loads(path.read_text())
        for name, entry in about["files"].items():
            del entry["crc32c"]
            entry["sha256"] = hashlib.sha256((path.parent / name).read_bytes()).hexdigest()
        path.write_text(json.dumps(sealed(about)))


def test_a_manifest_of_an_older_run_is_read(folder):
    as_older_runs_sum(folder)
    assert newest(folder) == 2
    path = max((folder / "00000002" / "state" / "d").iterdir(), key=lambda p: p.stat().st_size)
    flip(path)
    with pytest.raises(CheckpointError, match=path.name):
        verify(folder / "00000002")
    assert newest(folder) == 1


@pytest.fixture
def read(monkeypatch):
    """The names of the files whose content is summed."""
    names = []

    def summed(path):
        names.append(path.name)
        return crc32c(path)

    monkeypatch.setitem(manifests.ALGORITHMS, "crc32c", summed)
    return names


def put_back(path):
    """The same content in a new file, as a copy or an archive makes it."""
    shutil.copy2(path, path.with_suffix(".copy"))
    os.replace(path.with_suffix(".copy"), path)


def hide(path):
    """Damage that keeps the size and pretends to be old."""
    about = path.stat()
    flip(path)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


@pytest.mark.parametrize("change, good", [(put_back, 2), (hide, 1), (cut, 1), (os.unlink, 1)])
def test_what_was_verified_is_not_read_again_until_it_changes(folder, read, change, good):
    assert newest(folder) == 2 and len(read) == len(read_manifest(folder / "00000002")["files"])
    read.clear()
    assert newest(folder) == 2 and newest(folder, set_aside=False) == 2 and not read
    for path in [p for p in (folder / "00000002" / "state").rglob("*") if p.is_file()]:
        if path.stat().st_size:
            change(path)
            break
    assert newest(folder, set_aside=False) == good and read


def test_a_copied_run_is_verified_and_a_reader_records_nothing(folder, read, tmp_path):
    newest(folder)
    copy, files = shutil.copytree(folder, tmp_path / "copy"), len(read)
    before = (copy / VERIFIED).read_bytes()
    assert newest(copy, set_aside=False) == 2 and len(read) == 2 * files
    assert (copy / VERIFIED).read_bytes() == before


@pytest.mark.parametrize("text", ["", "[]", "{", '{"2": 3}', '{"2": {}}', "[" * 10**5])
def test_a_damaged_record_of_what_was_verified_is_none(folder, read, text):
    (folder / VERIFIED).write_text(text)
    assert newest(folder) == 2 and read
    read.clear()
    assert newest(folder) == 2 and not read


def test_retention_reads_an_older_checkpoint_once(folder, read):
    """What this process has written it knows; what it finds it reads, and says so."""
    for step in (3, 4):
        with Checkpoints(folder, 3, lambda step: OURS, [OURS]) as checkpoints:
            checkpoints.save(step, STATE)
    assert set(json.loads((folder / VERIFIED).read_text())) == {"1", "2", "3"}
    assert len(read) == 3 * len(read_manifest(folder / "00000003")["files"])


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_every_file_is_summed_by_one_process_and_verified_by_one(processes):
    random = np.random.default_rng(processes)
    names = [f"state/ocdbt.process_{i}/d/{j}" for i in range(processes) for j in range(7)]
    names += ["state/manifest.ocdbt", "state/_METADATA", "state/array_metadatas/process_0"]
    names += [f"state/ocdbt.process_{processes}/d/0"]  # of no process that is here
    parts = [own(names, process, processes) for process in range(processes)]
    assert sorted(sum(parts, [])) == sorted(names)
    for process, part in enumerate(parts[1:], 1):
        assert all(name.startswith(f"state/ocdbt.process_{process}/") for name in part)
    files = {name: {"bytes": int(random.integers(1, 10**6))} for name in names}
    shares = [share(files, process, processes) for process in range(processes)]
    assert {name: entry for part in shares for name, entry in part.items()} == files
    assert sum(len(part) for part in shares) == len(files)
    sizes = [sum(entry["bytes"] for entry in part.values()) for part in shares]
    assert max(sizes) - min(sizes) <= max(entry["bytes"] for entry in files.values())


def forged(**changes):
    def forge(folder):
        path = folder / "00000002" / MANIFEST
        path.write_text(json.dumps(sealed({**json.loads(path.read_text()), **changes})))

    return forge


def replaced(text):
    def replace(folder):
        (folder / "00000002" / MANIFEST).write_text(text)

    return replace


def renamed(folder):
    (folder / "00000002").rename(folder / "00000009")


FOREIGN = {
    "no manifest": lambda folder: (folder / "00000002" / MANIFEST).unlink(),
    "not JSON": replaced("{"),
    "a list": replaced("[]"),
    "files are a list": forged(files=[]),
    "no files": forged(files={}),
    "a file outside": forged(files={"/dev/zero": {"bytes": 0, "sha256": ""}}),
    "entries of another kind": forged(files={"state/d": 3}),
    "another step": forged(step=1),
    "a step of another kind": forged(step="two"),
    "another config": forged(config="theirs"),
    "another text": forged(data="theirs"),
    "renamed": renamed,
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_checkpoint_is_passed_over_and_alone_refused(folder, name, caplog):
    """With the reason; a reader changes nothing, a writer sets it aside."""
    FOREIGN[name](folder)
    listing = sorted(folder.rglob("*"))
    assert newest(folder, set_aside=False) == 1
    assert "passed over" in caplog.text and sorted(folder.rglob("*")) == listing
    shutil.rmtree(folder / "00000001")
    with pytest.raises(CheckpointError, match="put one back"):
        newest(folder)
    assert (folder / "NEWEST").exists()


def test_every_flipped_digit_of_a_manifest_is_the_manifests_fault(folder):
    """Whatever it stands in; one without a checksum of its own is older and taken as it is."""
    path = folder / "00000002" / MANIFEST
    whole = path.read_text()
    digits = [i for i, character in enumerate(whole) if character.isdigit()]
    for i in digits[:: max(1, len(digits) // 50)]:
        path.write_text(f"{whole[:i]}{(int(whole[i]) + 1) % 10}{whole[i + 1 :]}")
        with pytest.raises(CheckpointError, match=MANIFEST):
            read_manifest(path.parent)
    older = json.loads(whole)
    del older[SEAL]
    path.write_text(json.dumps(older))
    assert newest(folder) == 2


def test_a_run_whose_manifests_are_gone_does_not_start_again(folder):
    for manifest in folder.glob(f"*/{MANIFEST}"):
        manifest.unlink()
    with pytest.raises(CheckpointError, match="no manifest is left"):
        newest(folder)
    assert len(list(folder.glob("*/state"))) == 2  # nothing was removed
    shutil.rmtree(folder)
    assert newest(folder) is None  # what is removed on purpose is a new run


def test_a_first_save_that_was_killed_is_a_new_run(folder):
    (folder / "NEWEST").unlink()
    shutil.rmtree(folder / "00000002")
    (folder / "00000001" / MANIFEST).unlink()
    assert newest(folder) is None and not list(folder.glob("*/"))


def test_a_writer_removes_leftovers_and_leaves_odd_names(folder):
    for name in ("00000003", "15", "notes", "²²²²²²²²"):
        (folder / name).mkdir()
    assert newest(folder) == 2
    assert {p.name for p in folder.glob("*/")} == {"00000001", "00000002", "15", "notes", "²" * 8}


def test_retention_counts_verified_checkpoints(folder):
    """The two that are kept are good ones: a damaged one takes no place of theirs."""
    flip(max((folder / "00000002" / "state" / "d").iterdir(), key=lambda p: p.stat().st_size))
    with Checkpoints(folder, 2, lambda step: OURS, [OURS]) as checkpoints:
        checkpoints.save(3, STATE)
    assert verify(folder / "00000001") and verify(folder / "00000003")
    with Checkpoints(folder, 2, lambda step: OURS, [OURS]) as checkpoints:
        checkpoints.save(4, STATE)
    assert [p.name for p in sorted(folder.glob("*/"))] == ["00000003", "00000004"]


@pytest.mark.parametrize("where", ["busy", "elsewhere"])
def test_an_old_checkpoint_that_cannot_be_removed_stays_and_a_save_goes_on(
    two, folder, tmp_path, monkeypatch, caplog, where
):
    """One that is a link to an archive is never written through."""
    if where == "busy":

        def busy(path, ignore_errors=False):
            if not ignore_errors:
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

        monkeypatch.setattr(shutil, "rmtree", busy)
    else:
        shutil.move(folder / "00000001", tmp_path / "archive")
        (folder / "00000001").symlink_to(tmp_path / "archive")
    with Checkpoints(folder, 2, lambda step: OURS, [OURS]) as checkpoints:
        checkpoints.save(3, STATE)
    assert f"{folder / '00000001'} is too old and stays: " in caplog.text
    assert newest(folder, set_aside=False) == 3
    if where == "elsewhere":
        assert same_tree(tmp_path / "archive", two / "00000001")


def test_a_damaged_checkpoint_behind_a_link_is_set_aside_here_alone(two, folder, tmp_path):
    shutil.move(folder / "00000002", tmp_path / "archive")
    flip(max((tmp_path / "archive" / "state" / "d").iterdir(), key=lambda p: p.stat().st_size))
    shutil.copytree(tmp_path / "archive", tmp_path / "before")
    (folder / "00000002").symlink_to(tmp_path / "archive")
    assert newest(folder) == 1 and newest(saved(folder, 2)) == 2
    assert same_tree(tmp_path / "archive", tmp_path / "before")


OTHER = {
    "params/more is missing, expected float32": {
        **STATE,
        "params": {**STATE["params"], "more": jnp.zeros(2)},
    },
    "count is not expected": {"params": STATE["params"]},
    r"params/w is float32\[3, 4\], expected float32\[4, 3\]": {
        **STATE,
        "params": {"w": jnp.zeros((4, 3))},
    },
    r"params/w is float32\[3, 4\], expected bfloat16\[3, 4\]": {
        **STATE,
        "params": {"w": jnp.zeros((3, 4), jnp.bfloat16)},
    },
    r"count is int32\[\], expected float32\[\]": {**STATE, "count": jnp.float32(0)},
}


@pytest.mark.parametrize("message", OTHER)
def test_another_tree_is_refused_leaf_by_leaf(two, message):
    with Checkpoints(two) as checkpoints, pytest.raises(CheckpointError, match=message):
        checkpoints.restore(2, described(OTHER[message]))


def test_a_small_checkpoint_cannot_inflate(tmp_path, monkeypatch):
    """256 MB of zeros in some kilobytes: refused by their shape, before they are read."""
    folder = saved(tmp_path / "large", 1, state={**STATE, "count": np.zeros(2**26, np.float32)})
    assert sum(p.stat().st_size for p in folder.rglob("*")) < 2**22
    with Checkpoints(folder) as checkpoints:
        monkeypatch.setattr(checkpoints.checkpointer, "restore", None)
        with pytest.raises(CheckpointError, match=r"count is float32\[67108864\]"):
            checkpoints.restore(1, described(STATE))


@pytest.mark.parametrize("point", ["save", "arrays_written", "manifest_written"])
def test_a_save_that_fails_is_told_once_and_leaves_the_old_one(folder, monkeypatch, point):
    monkeypatch.setattr(faults, "WANTED", [["fail", point, "3"]])
    with pytest.raises(CheckpointError, match="No space left.* bytes are needed, .* are free"):
        with Checkpoints(folder, 9, lambda step: OURS) as checkpoints:
            checkpoints.save(3, STATE)
    assert newest(folder) == 2 and not (folder / "00000003").exists()


@pytest.mark.parametrize("inodes", [0, 5])
def test_a_disk_without_inodes_does_not_lack_bytes(tmp_path, monkeypatch, inodes):
    disk = types.SimpleNamespace(f_files=9, f_favail=inodes, f_bavail=7, f_frsize=1000)
    monkeypatch.setattr(os, "statvfs", lambda path: disk)
    monkeypatch.setattr(faults, "WANTED", [["fail", "arrays_written", "3"]])
    said = "7,000 bytes are free" if inodes else "no file can be added there: all 9 inodes are in u"
    with pytest.raises(CheckpointError, match=said):
        saved(tmp_path / "checkpoints", 3)


def test_the_first_error_is_the_one_that_shows(folder, monkeypatch, caplog):
    monkeypatch.setattr(faults, "WANTED", [["fail", "arrays_written", "3"]])
    with pytest.raises(ZeroDivisionError):
        with Checkpoints(folder, 9, lambda step: OURS) as checkpoints:
            checkpoints.save(3, STATE)
            1 / 0
    assert "besides: " in caplog.text
    with pytest.raises(ZeroDivisionError):  # and a save under way is not lost
        with Checkpoints(folder, 9, lambda step: OURS) as checkpoints:
            checkpoints.save(4, STATE)
            1 / 0
    assert newest(folder) == 4


def test_a_full_disk_leaves_the_old_checkpoint(small_disk):
    random = np.random.default_rng(0)
    large = {"w": jnp.asarray(random.integers(0, 2**31, 2**16))}
    folder = saved(small_disk / "checkpoints", 1, state=large)
    with pytest.raises(CheckpointError, match=f"{folder}.*262,144 bytes are needed"):
        saved(folder, 2, state=large)
    assert newest(folder) == 1
    with Checkpoints(folder) as checkpoints:
        np.testing.assert_array_equal(checkpoints.restore(1, described(large))["w"], large["w"])


@pytest.mark.parametrize(
    ("before", "after"), [((1, 1, 1), (4, 1, 1)), ((4, 1, 1), (1, 1, 2)), ((2, 1, 2), (1, 1, 4))]
)
def test_a_state_comes_back_bit_equal_on_another_mesh(tmp_path, before, after):
    random, shardings = np.random.default_rng(0), []
    for sizes in (before, after):
        config = MeshConfig(**dict(zip(MESH_AXES, sizes)))
        mesh = make_mesh(config, jax.devices()[: np.prod(sizes)])
        shardings.append(NamedSharding(mesh, PartitionSpec("data", "model")))
    w = random.standard_normal((8, 16)).astype(np.float32)
    saved(tmp_path, 1, state={"w": jax.device_put(w, shardings[0])})
    with Checkpoints(tmp_path) as checkpoints:
        wanted = {"w": jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=shardings[1])}
        back = checkpoints.restore(1, wanted)["w"]
    assert back.sharding == shardings[1]
    np.testing.assert_array_equal(back, w)


def test_some_checkpoints_stay_for_good(tmp_path):
    with Checkpoints(tmp_path, keep=1, keep_every=4) as checkpoints:
        for step in range(1, 8):
            checkpoints.save(step, {"x": np.full(3, step)})
    assert checkpoints.steps() == [4, 7]
