"""Data: batches depend on (seed, step) alone; windows, documents and recall examples are what they
say."""

import errno
import hashlib
import json
import os
import shutil
import stat
import time

import google_crc32c
import grain
import numpy as np
import pytest

from kha_jax.config import ConfigError
from kha_jax.data import (
    TASKS,
    Draws,
    PythonSource,
    batch_hash,
    batches,
    python_source,
    window_order,
)
from kha_jax.data.python_source import open_shard, write_shard
from kha_jax.data.tokenizers import ByteTokenizer
from kha_jax.errors import DataError, StorageError

BIN, CRC = "train-00000.bin", "train-00000.crc"
DOCUMENTS = [b"first document", b"", b"second", b"the third is longer than a window of eight"]


@pytest.fixture
def stream(tmp_path):
    return write_shard(tmp_path, "train", DOCUMENTS)


def read(source, start=0, stop=6, rows=range(4), seed=0, shuffle=True):
    reader = batches(
        source,
        draws=Draws([(0, 4)]),
        rows=np.array(rows),
        seed=seed,
        start=start,
        stop=stop,
        shuffle=shuffle,
    )
    return [batch["tokens"] for batch in reader]


def test_a_whole_stream_is_left_to_its_readers_and_a_broken_one_made_again(tmp_path):
    """Two processes that tokenise at once: the slower one must not pull the files from under the
    faster."""
    folder = write_shard(tmp_path, "train", DOCUMENTS)
    (folder / "meta.json").unlink()
    (folder / BIN).write_bytes(b"half")
    write_shard(tmp_path, "train", DOCUMENTS)
    before = {path.name: path.stat().st_ino for path in folder.iterdir()}
    write_shard(tmp_path, "train", DOCUMENTS)
    assert {
        path.name: path.stat().st_ino for path in folder.iterdir()
    } == before and "meta.json" in before
    assert list(tmp_path.iterdir()) == [folder]


def test_tokens_are_found_by_content_and_never_by_what_looks_alike(tmp_path, monkeypatch):
    """Equal names, sizes and times of writing, in place or below another root; and a write in the
    tick of the last one, which changes no time."""
    here, there = tmp_path / "here", tmp_path / "there"

    def write(root, content):
        root.mkdir(exist_ok=True)
        (root / "module.py").write_text(content)
        os.utime(root / "module.py", ns=(1, 1))

    def opened(root):
        config = PythonSource(cache_dir=str(tmp_path / "cache"), roots=(str(root),), held_out=1e-9)
        source = config.open("train", 4, 0)
        return ByteTokenizer().decode(source.read(0, source.length))

    index = tmp_path / "cache" / "python_shards-1" / "index"
    for tick, indexed in ((10**18, 0), (0, 1)):
        monkeypatch.setattr(python_source, "TICK", tick)
        for root, content in ((here, "a = 1\n"), (here, "a = 2\n"), (there, "a = 3\n")):
            write(root, content)
            time.sleep(0.02)  # a tick of most kernels has 4 ms
            assert opened(root) == content == opened(root)
        assert len(list(index.glob("*"))) == 3 * indexed
    entry = max(index.iterdir(), key=os.path.getmtime)
    other = next(p for p in index.parent.glob("train-*") if p.name not in entry.read_text())
    folder = index.parent / json.loads(entry.read_text())["folder"]
    for harm in ("", "{", '{"folder": "../x"}', '{"folder": "train-0123456789abcdef"}'):
        entry.write_text(harm)
        assert opened(there) == "a = 3\n"
    shutil.rmtree(folder)
    other.rename(folder)
    with pytest.raises(DataError, match=f"{folder} holds other tokens than its name says"):
        opened(there)


def test_a_batch_depends_on_seed_and_step_alone(stream):
    source = open_shard(stream, "train", 4)
    everything = read(source)
    for start in range(1, 6):  # also at the edge of an epoch, after four steps
        np.testing.assert_array_equal(read(source, start=start), everything[start:])
    assert any((a != b).any() for a, b in zip(everything, read(source, seed=1)))


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_read_parts_of_one_global_batch(stream, processes):
    source = open_shard(stream, "train", 4)
    parts = [read(source, rows=rows) for rows in np.split(np.arange(4), processes)]
    for step, whole in enumerate(read(source)):
        np.testing.assert_array_equal(np.concatenate([part[step] for part in parts]), whole)


def test_every_epoch_holds_each_window_once_in_an_order_of_its_own(stream):
    source = open_shard(stream, "train", 4)
    length = len(source) // 4 * 4
    assert length == len(source) == 16  # so that epochs end on batch edges here
    epochs = [np.concatenate(read(source, start=s, stop=s + 4)) for s in (0, 4)]
    rows = [[tuple(row) for row in epoch] for epoch in epochs]
    assert (
        sorted(rows[0]) == sorted(rows[1]) == sorted(tuple(source[i]["tokens"]) for i in range(16))
    )
    assert rows[0] != rows[1]


def test_order_is_that_of_grain():
    for length, seed in ((1, 3), (7, 0), (1000, 2**32 - 1)):
        order = window_order(length, seed)
        theirs = grain.MapDataset.range(length).seed(seed).shuffle().repeat()
        draws = (0, 1, length - 1, length, 5 * length + 3, 10**12)
        assert [order[draw] for draw in draws] == [theirs[draw] for draw in draws]
        assert [window_order(length, seed, shuffle=False)[d] for d in draws] == [
            d % length for d in draws
        ]


def test_text_and_batches_are_what_they_were_before_there_were_shards(stream):
    """Manifests hold these since 66038df; test_sweep has the hashes of data of then."""
    source = open_shard(stream, "train", 4)
    assert len(source) == 16
    for seed, step, before in ((0, 0, "6ddef188229df569"), (7, 9, "54acc2650fa5fdc4")):
        now = batch_hash(source, draws=Draws([(0, 4)]), seed=seed, step=step)
        assert now.startswith(before)


def test_no_draw_is_skipped_or_repeated_when_the_batch_size_changes():
    """Whatever was decided, also after walks back to steps before a change."""
    random = np.random.default_rng(0)
    for _ in range(200):
        decided = [(0, 4), *((int(s), int(b)) for s, b in random.integers(1, 9, (5, 2)) * [2, 1])]
        sizes, place = [4] * 30, 0
        for step, size in decided:
            sizes[step:] = [size] * len(sizes[step:])
        for step, size in enumerate(sizes):
            assert Draws(decided)(step) == range(place, place + size), decided
            place += size


def test_unshuffled_batches_are_in_order(stream):
    source = open_shard(stream, "train", 4)
    np.testing.assert_array_equal(
        np.concatenate(read(source, stop=2, shuffle=False)), [source[i]["tokens"] for i in range(8)]
    )


def test_windows_cover_the_stream_and_respect_documents(stream):
    T, tokenizer = 8, ByteTokenizer()
    flat = np.concatenate(
        [np.append(tokenizer.encode(text), tokenizer.end_of_document) for text in DOCUMENTS]
    )
    owner = np.repeat(np.arange(len(DOCUMENTS)), [len(text) + 1 for text in DOCUMENTS])
    source = open_shard(stream, "train", T)
    assert len(source) == (len(flat) - 1) // T
    for i in range(len(source)):
        example, span = source[i], slice(i * T, (i + 1) * T)
        np.testing.assert_array_equal(example["tokens"], flat[span])
        np.testing.assert_array_equal(example["targets"], flat[i * T + 1 : (i + 1) * T + 1])
        np.testing.assert_array_equal(
            example["weights"], owner[span] == owner[i * T + 1 : (i + 1) * T + 1]
        )
        np.testing.assert_array_equal(example["segment_ids"], owner[span] - owner[i * T])
        for document in set(owner[span]):
            inside = example["positions"][owner[span] == document]
            np.testing.assert_array_equal(inside, np.arange(len(inside)))


def test_tokenizer_round_trip():
    text = "knöcking\n"
    assert ByteTokenizer().decode([*ByteTokenizer().encode(text.encode()), 256]) == text


def rewritten(name, change):
    def rewrite(stream):
        path = stream / name
        path.write_bytes(change(path.read_bytes()))

    return rewrite


def meta(**changes):
    return rewritten("meta.json", lambda b: json.dumps({**json.loads(b), **changes}).encode())


def beyond(stream):
    """An id that no tokenizer wrote, with the checksum that goes with it."""
    path = stream / BIN
    ids = np.frombuffer(path.read_bytes(), "<u2").copy()
    ids[5] = 300
    path.write_bytes(ids.tobytes())
    checksum = google_crc32c.value(ids.tobytes())
    (stream / CRC).write_bytes(checksum.to_bytes(4, "little"))


HARM = {
    "reversed": (rewritten(BIN, lambda b: b[::-1]), f"{BIN} differs from its checksum in bytes 0"),
    "one bit": (rewritten(BIN, lambda b: bytes([b[0] ^ 1]) + b[1:]), f"{BIN} differs"),
    "cut": (rewritten(BIN, lambda b: b[:-2]), f"{BIN} holds .* meta.json says"),
    "empty": (rewritten(BIN, lambda b: b""), f"{BIN} holds 0 bytes"),
    "missing": (lambda stream: (stream / BIN).unlink(), f"{BIN} is missing"),
    "beyond the vocabulary": (beyond, f"{BIN} holds id 300 at token 5, .* vocabulary of 264"),
    "checksums": (rewritten(CRC, lambda b: b[::-1]), f"{BIN} differs"),
    "checksums cut": (rewritten(CRC, lambda b: b[:-1]), f"{CRC} is cut"),
    "no checksums": (lambda stream: (stream / CRC).unlink(), f"{CRC} is missing"),
    "meta is a list": (rewritten("meta.json", lambda b: b"[]"), "meta.json is no object"),
    "meta is no JSON": (rewritten("meta.json", lambda b: b"\xff\0"), "meta.json cannot be read"),
    "another end": (meta(end_of_document=7), "another tokenizer than bytes"),
    "another tokenizer": (meta(tokenizer="bpe"), "another tokenizer than bytes"),
}


@pytest.mark.parametrize("name", HARM)
def test_a_harmed_stream_is_refused_by_name(stream, name):
    harm, message = HARM[name]
    harm(stream)
    with pytest.raises(DataError, match=message) as caught:
        open_shard(stream, "train", 4).rows(range(16))
    assert "remove the folder to make it again" in str(caught.value) or "meta" in message


def test_a_stream_that_is_cut_while_it_is_read_is_an_error_and_not_a_signal(stream):
    source = open_shard(stream, "train", 4)
    reader = batches(source, draws=Draws([(0, 4)]), rows=np.arange(4), seed=0, start=0, stop=6)
    os.truncate(stream / BIN, 20)
    with pytest.raises(DataError, match=f"{BIN} ends before (token|byte)"):
        list(reader)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file/.* cannot be written: Not a directory"):
        PythonSource(cache_dir=str(tmp_path / "file")).open("train", 64, 0)


def test_another_user_reads_the_tokens(tmp_path):
    """Folders have the mode that the user's umask gives to any folder."""
    before = os.umask(0o027)
    try:
        folder = write_shard(tmp_path / "cache", "train", DOCUMENTS)
    finally:
        os.umask(before)
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (folder, folder / BIN)]
    assert modes == [0o750, 0o640]


def test_what_a_killed_tokenisation_leaves_is_removed_and_what_another_writes_is_not(tmp_path):
    left = tmp_path / ".train.of_one_that_is_gone"

    def documents():
        yield b"text"
        left.mkdir()
        (left / BIN).write_bytes(b"half")
        write_shard(tmp_path, "train", DOCUMENTS)
        assert not left.exists() and len(list(tmp_path.glob(".train.*"))) == 1
        yield b"more"

    assert open_shard(write_shard(tmp_path, "train", documents()), "train", 4)
    assert not list(tmp_path.glob(".train.*"))


def test_less_than_one_batch_is_refused(stream):
    with pytest.raises(DataError, match="fewer than the 4 that are needed"):
        read(open_shard(stream, "train", 40))


def test_python_source_is_real_split_text_and_is_cached(tmp_path):
    config = PythonSource(cache_dir=str(tmp_path))
    train, validation = (config.open(split, 64, 0) for split in ("train", "validation"))
    assert train.length > 5 * validation.length > 100_000
    assert 0.99 < train.bytes_per_token <= 1
    assert "def " in ByteTokenizer().decode(train.read(0, 20000))

    def first(source):
        tokens = source.read(0, source.length)
        starts = np.append(0, np.flatnonzero(tokens == 256)[:-1] + 1)
        return {bytes(tokens[s : s + 200]) for s in starts}

    assert len(first(train) & first(validation)) < 5  # modules may share a licence header, not more
    written = (train.folder / BIN).stat().st_mtime_ns
    again = config.open("train", 64, 0)
    assert (again.folder / BIN).stat().st_mtime_ns == written
    tokens = (train.folder / BIN).read_bytes()  # as it was before there were shards
    assert hashlib.sha256(tokens).hexdigest() == again.fingerprint


def solve_recall(row, asked, _):
    known = dict(zip(row[:12:2], row[1:12:2]))
    assert len(known) == len(asked) == 6 and asked.min() >= 12
    assert sorted(row[asked]) == sorted(known)
    # keys appear later only where they are asked
    assert set(row[12:]) & set(range(16)) == set(known)
    return [known[row[place]] for place in asked]


def solve_composition(row, asked, _):
    facts = dict(zip(row[:16:2], row[1:16:2]))
    return [facts[facts[row[place]]] for place in asked]


def solve_hops(row, asked, _):
    def back(i):
        return max((j for j in range(1, i + 1) if row[j - 1] == row[i]), default=None)

    def hops(i):
        first = back(i)
        return None if first is None else back(first)

    assert list(asked) == [i for i in range(len(row) - 1) if hops(i) is not None]
    return [row[hops(place)] for place in asked]


def solve_copy(row, asked, _):
    assert row[asked[0]] == 1 and 1 not in row[: asked[0]]
    return [token for token in row[: asked[0]] if token]


def solve_needles(row, asked, _):
    places = [i for i in range(asked[0] - 2) if (row[i], row[i + 1]) == (0, row[asked[0]])]
    assert len(places) == 1 and (row == 0).sum() == 4
    return list(row[places[0] + 2 : places[0] + 2 + len(asked)])


def solve_graph(row, asked, task):
    graph = task.graph(5)
    assert all(sorted(column) == list(range(64)) for column in graph.T)
    listed = [set(row[:8]) & set(graph[row[place]]) for place in asked]
    assert {len(found) for found in listed} == {1} and len(set(row[asked])) == 8
    return [found.pop() for found in listed]


@pytest.mark.parametrize(
    ("task", "seq_len", "solve"),
    [
        (TASKS["mqar"](pairs=6, vocabulary=32), 48, solve_recall),
        (TASKS["compositional_recall"](pairs=4, vocabulary=24), 40, solve_composition),
        (TASKS["k_hop"](hops=2, symbols=5), 40, solve_hops),
        (TASKS["selective_copy"](copied=6), 30, solve_copy),
        (TASKS["needle"](needles=3, values=2), 40, solve_needles),
        (TASKS["relational_graph"](), 40, solve_graph),
    ],
    ids=list(TASKS),
)
def test_tasks_are_answerable_and_reproducible(task, seq_len, solve):
    """What stands before a question gives its answer, and both splits go their own ways; the
    shortest row that a task says it needs asks something."""
    train, validation = (task.open(split, seq_len, 5) for split in ("train", "validation"))
    for index in range(20):
        example = train[index]
        row = np.append(example["tokens"], example["targets"][-1])
        asked = np.flatnonzero(example["weights"])
        assert list(example["targets"][asked]) == solve(row, asked, task)
        assert 0 <= row.min() and row.max() < task.vocabulary_size()
        for name, value in train[index].items():
            np.testing.assert_array_equal(value, example[name])
    assert (train[0]["tokens"] != validation[0]["tokens"]).any()
    assert (train[0]["tokens"] != task.open("train", seq_len, 6)[0]["tokens"]).any()
    shortest = task.open("train", task.minimum_seq_len(), 5)
    assert sum(shortest[index]["weights"].sum() for index in range(20)) > 0


def huge(path):
    path.write_text("")
    os.truncate(path, 2**40)


HAZARDS = {
    "a dangling link": (lambda path: path.symlink_to("nowhere"), "No such file"),
    "a loop": (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
    "a pipe": (os.mkfifo, "no regular file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "no regular file"),
    "a huge file": (huge, "it holds 1,099,511,627,776 bytes"),
    "no UTF-8": (lambda path: path.with_name("\udcff.py").write_text(""), "is not UTF-8"),
}


@pytest.mark.parametrize("name", HAZARDS)
def test_a_module_that_cannot_be_read_is_named(tmp_path, name):
    make, why = HAZARDS[name]
    make(tmp_path / "module.py")
    with pytest.raises(DataError, match=f"\\.py' cannot be read: .*{why}") as caught:
        PythonSource(cache_dir=str(tmp_path), roots=(str(tmp_path),)).open("train", 4, 0)
    str(caught.value).encode()


def test_folders_are_read_or_said_to_be_left_out(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "kha_jax")
    root = tmp_path / "root"
    for name in ("kept", "config", "kept/tests"):
        (root / name).mkdir(parents=True)
        (root / name / "module.py").write_text(name)
    (root / "link").symlink_to("kept")
    config = PythonSource(cache_dir=str(tmp_path), roots=(str(root),), held_out=1e-9)
    source = config.open("train", 4, 0)
    assert ByteTokenizer().decode(source.read(0, source.length)) == "kept"
    for left_out in ("'config'", "'link'", "'kept/tests'"):
        assert left_out in caplog.text

    def scandir(path, real=os.scandir):
        if str(path).endswith("kept"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)  # since no folder is closed to root
    with pytest.raises(DataError, match="kept' cannot be read: Permission denied"):
        config.open("train", 4, 0)


def test_roots_add_text_and_keep_the_split(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / "more" / name).mkdir(parents=True)
        (tmp_path / "more" / name / "__init__.py").write_text(f"{name} = 1\n" * 50)
    cache = str(tmp_path / "cache")
    plain, more = (
        PythonSource(cache_dir=cache, roots=roots).open("train", 64, 0)
        for roots in (("stdlib",), ("stdlib", str(tmp_path / "more")))
    )
    assert plain.documents < more.documents <= plain.documents + 3
    np.testing.assert_array_equal(plain.read(0, plain.length), more.read(0, plain.length))
    with pytest.raises(ConfigError, match="roots: must be stdlib, packages or folders, found 'x'"):
        PythonSource(roots=("x",))
    with pytest.raises(ConfigError, match="roots: must name each root once"):
        PythonSource(roots=("stdlib", "stdlib"))
