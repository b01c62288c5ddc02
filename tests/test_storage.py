"""Stores by URL: what is read is what lies there, by ranges and whole; every error is one line."""

import concurrent.futures
import time

import pytest

from kha_jax.errors import StorageError
from kha_jax.storage import Objects, buckets, crc32c

CONTENT = {
    "meta.json": b"{}",
    "state/d/1f": bytes(range(256)) * 5,
    "state/d0": b"",
    "statement": b"s",
}


@pytest.fixture(params=["file", "memory"])
def objects(request, tmp_path):
    store = Objects(
        f"file://{tmp_path}" if request.param == "file" else f"memory://{tmp_path.name}"
    )
    for name, value in CONTENT.items():
        store.write(name, value)
    return store


def test_objects_are_listed_read_and_copied(objects, tmp_path):
    assert {n: found.bytes for n, found in objects.listing().items()} == {
        name: len(value) for name, value in CONTENT.items()
    }
    assert [objects.read(name) for name in CONTENT] == list(CONTENT.values())
    asked = [("state/d/1f", at, 7) for at in range(0, 1270, 63)] + [("statement", 0, 1)]
    assert objects.ranges(asked) == [CONTENT[name][at : at + size] for name, at, size in asked]
    copies = tmp_path / "copies"
    copies.mkdir()
    for name in CONTENT:
        objects.copy(name, copies / "one")
        assert (copies / "one").read_bytes() == CONTENT[name]
    assert [path.name for path in copies.iterdir()] == ["one"]


def test_a_folder_is_removed_and_no_neighbour(objects):
    objects.delete_below("state")
    objects.delete("not there")
    assert list(objects.listing()) == ["meta.json", "statement"]
    objects.delete("meta.json")
    objects.delete_below("")
    assert not objects.listing()


def test_a_write_may_depend_on_what_is_there(objects):
    objects.write("lock", b"a", only_over="")
    for before in ("", "b"):
        with pytest.raises(FileExistsError):
            objects.write("lock", b"b", only_over=before)
    objects.write("lock", b"b", only_over="a")
    assert objects.read("lock") == b"b"


@pytest.mark.parametrize("start, size", [(1280, 1), (1279, 2), (0, 1281)])
def test_a_range_beyond_the_end_is_an_error(objects, start, size):
    with pytest.raises(StorageError, match="state/d/1f"):
        objects.ranges([("state/d/1f", start, size)])


def test_what_is_missing_or_no_store_is_named(objects):
    for ask in (objects.read, lambda name: objects.ranges([(name, 0, 1)])):
        with pytest.raises(FileNotFoundError, match="none"):
            ask("none")
    for url, said in {
        "s3://bucket/run": "s3:// is not supported",
        "gs://": "no name of a store",
        "gs://bucket//run": "no name of a store",
        "gs://bucket/../run": "no name of a store",
        "gs://B/run": "'B' is no name of a bucket",
        **{f"gs://bucket/a{odd}b": "a meaning of its own" for odd in "%#?|;*[]\\\n"},
    }.items():
        with pytest.raises(StorageError, match=said):
            Objects(url)


def test_a_store_that_is_gone_costs_one_deadline(monkeypatch):
    """However many calls still have to be made there, and until it answers again."""
    monkeypatch.setattr(buckets, "AGAIN", 0.02)
    store, took = Objects("memory://gone", deadline=0.4), []
    for answers in (False, False, False, True, False):
        began = time.monotonic()
        future = concurrent.futures.Future()
        if answers:
            future.set_result(None)
            store._done(future, "there")
            continue
        with pytest.raises(StorageError, match="gone: no answer within"):
            store._done(future, "gone")
        took.append(time.monotonic() - began)
    assert min(took[0], took[3]) >= 0.4 and max(took[1:3]) < 0.3, took


def test_the_checksum_is_that_of_the_standard(tmp_path):
    (tmp_path / "file").write_bytes(b"123456789")  # the check value of CRC-32C
    assert crc32c(tmp_path / "file") == "e3069283"
