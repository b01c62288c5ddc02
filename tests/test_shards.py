"""Token shards: whatever is written is read again once, and what was harmed is named."""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments.cli.codes import UsageError
from experiments.run_folders.folder import RunFolder
from experiments.timing import loading
from kha_jax.config import ConfigError, from_dict, to_dict
from kha_jax.data import Draws, Shards, batch_hash, batches, shard_files, shard_reader, window_order
from kha_jax.data.shard_files import read_meta, verify
from kha_jax.data.shard_writer import ShardWriter, write_meta
from kha_jax.data.shards import TokenWindows
from kha_jax.data.tokenizers import ByteTokenizer, JsonTokenizer
from kha_jax.errors import DataError, StorageError
from kha_jax.storage import Objects
from kha_jax.training.run_config import RunConfig
from kha_jax.training.run_folder import read_config, read_tokenizer
from tests.commands import run_all
from tests.runs import SMALL
from tests.test_tokenizers import trained


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Thousands of small files need not be on disk."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


class Numbers(ByteTokenizer):
    """Ids of which a test says how many there are, and whether documents have a begin."""

    fingerprint = "numbers"

    def __init__(self, size, begin=None):
        self.vocabulary_size, self.begin_of_document, self.end_of_document = size, begin, size - 1

    def encode(self, text):
        return np.frombuffer(text, np.uint8).astype(np.int64) % (self.vocabulary_size - 2)


def documents(count, size, seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(0, size - 2, n) for n in random.integers(0, 50, count)]


@pytest.mark.parametrize("size, begin", [(264, None), (2**16, None), (2**16 + 1, None), (99, 97)])
def test_a_shard_is_the_same_however_documents_come(tmp_path, size, begin):
    """One by one, all at once, in pieces; and its files are what the format says."""
    tokenizer, texts = Numbers(size, begin), documents(40, size)
    first = [] if begin is None else [begin]
    flat = np.concatenate([[*first, *ids, size - 1] for ids in texts])
    entries = []
    for way in ("alone", "at once", "in pieces"):
        (tmp_path / way).mkdir()
        with ShardWriter(tmp_path / way, "train", 12, tokenizer) as writer:
            for ids in texts if way == "alone" else []:
                writer.add(ids, 3)
            if way == "at once":
                writer.add_all(np.concatenate(texts), [len(ids) for ids in texts], 3 * len(texts))
            for ids in texts if way == "in pieces" else []:
                writer.add_piece(ids[:9], 1, last=False)
                writer.add_piece(ids[9:9], 0, last=False)
                writer.add_piece(ids[9:], 2, last=True)
            entries.append(writer.finish())
        names = sorted(path.name for path in (tmp_path / way).iterdir())
        assert names == ["train-00012.bin", "train-00012.crc", "train-00012.documents"]
    assert entries[0] == entries[1] == entries[2]
    data = (tmp_path / "alone/train-00012.bin").read_bytes()
    found = np.frombuffer(data, "<u2" if size <= 2**16 else "<u4")
    np.testing.assert_array_equal(found, flat)
    starts = np.frombuffer((tmp_path / "in pieces/train-00012.documents").read_bytes(), "<u8")
    lengths = [len(ids) + 1 + len(first) for ids in texts]
    np.testing.assert_array_equal(starts, np.append(0, np.cumsum(lengths)[:-1]))
    sha256 = hashlib.sha256(data).hexdigest()
    assert entries[0] == ("train-00012", len(flat), 40, 120, sha256)


def test_each_block_has_its_checksum(tmp_path):
    ids = np.arange(3 * shard_files.BLOCK // 4, dtype=np.uint32) % 2**17
    with ShardWriter(tmp_path, "train", 0, Numbers(2**18)) as writer:
        for part in np.array_split(ids, 7):
            writer.add_piece(part, 0, last=False)
        writer.add_piece(ids[:0], 0, last=True)
        writer.finish()
    data = (tmp_path / "train-00000.bin").read_bytes()
    blocks = [data[at : at + 2**18] for at in range(0, len(data), 2**18)]
    found = np.frombuffer((tmp_path / "train-00000.crc").read_bytes(), "<u4")
    assert list(found) == list(map(google_crc32c.value, blocks)) and len(found) == 4


def test_a_document_that_holds_its_end_or_no_id_is_refused_and_leaves_nothing(tmp_path):
    for ids, message in (
        ([1, 98], "encodes to id 98 at its token 1, which begins or ends documents"),
        ([97], "encodes to id 97"),
        ([99], "id 99 is beyond the vocabulary of 99"),
    ):
        with pytest.raises(DataError, match=message):
            with ShardWriter(tmp_path, "train", 0, Numbers(99, begin=97)) as writer:
                writer.add(np.array(ids), 1)
        assert not list(tmp_path.iterdir())
    with pytest.raises(StorageError, match="nowhere cannot be written: No such file"):
        ShardWriter(tmp_path / "nowhere", "train", 0, ByteTokenizer())
    with pytest.raises(StorageError, match="cannot be written: No space left"):
        with ShardWriter(tmp_path, "train", 0, ByteTokenizer()) as writer:
            writer.files[".bin"] = open("/dev/full", "wb")
            writer.add(np.zeros(2**17, np.uint16), 1)
            writer.finish()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_writer_left_is_overwritten_and_a_link_is_not_followed(tmp_path):
    (tmp_path / "train-00000.bin.part").write_bytes(bytes(100))
    with ShardWriter(tmp_path, "train", 0, ByteTokenizer()) as writer:
        writer.add(ByteTokenizer().encode(b"text"), 4)
        assert writer.finish().tokens == 5
    assert (tmp_path / "train-00000.bin").stat().st_size == 10
    (tmp_path / "train-00001.crc.part").symlink_to(tmp_path / "train-00000.bin")
    with pytest.raises(StorageError, match="is a link"):
        ShardWriter(tmp_path, "train", 1, ByteTokenizer())


@pytest.fixture
def folder(tmp_path):
    """Three shards, one of them empty, for training, and one for validation."""
    tokenizer, shards = ByteTokenizer(), {"train": [], "validation": []}
    texts = [[b"first", b"second"], [], [b"the third one is longer"], [b"fourth"]]
    for number, some in enumerate(texts):
        split = "train" if number < 3 else "validation"
        with ShardWriter(tmp_path, split, number, tokenizer) as writer:
            for text in some:
                writer.add(tokenizer.encode(text), len(text))
            shards[split].append(writer.finish())
    write_meta(tmp_path, tokenizer, shards, {"input": "x"}, {"empty": 2})
    return tmp_path


def test_meta_says_what_was_written(folder):
    meta = read_meta(folder)
    verify(folder)
    assert meta.total("train", "tokens") == 37 and meta.total("train", "documents") == 3
    assert [shard.name for shard in meta.shards["validation"]] == ["validation-00003"]
    assert (meta.flags, meta.left_out) == ({"input": "x"}, {"empty": 2})
    values = json.loads((folder / "meta.json").read_text())
    assert values["dtype"] == "uint16" and values["begin_of_document"] is None
    other = write_meta(folder, ByteTokenizer(), meta.shards, {"input": "elsewhere"})
    assert other.fingerprint("train") == meta.fingerprint("train") != meta.fingerprint("validation")


def harmed(values, path, value):
    *groups, last = path.split(".")
    node = values
    for name in groups:
        node = node[int(name) if name.isdecimal() else name]
    node[int(last) if last.isdecimal() else last] = value
    return values


@pytest.mark.parametrize(
    "path, value",
    [
        *(("version", v) for v in (0, 2, None)),
        *(("dtype", v) for v in ("uint32", "int16", 3)),
        *(("vocabulary_size", v) for v in (-1, 0, 2**40, "264", True, 100)),
        *(("end_of_document", v) for v in (264, -1, None)),
        *(("begin_of_document", v) for v in (256, 999, "x")),
        *(("probe_ids", v) for v in ({}, [-1], ["a"])),
        *(("shards", v) for v in ([], {}, {"train": [], "validation": [], "test": []})),
        *(("shards.train", v) for v in ({}, [1], [{}], [])),
        *(("shards.train.0.name", v) for v in ("../x", "train-1", "train-00001", 3)),
        *(("shards.train.0.tokens", v) for v in (-1, 2**63, 1.5, 11)),
        *(("shards.train.0.documents", v) for v in (10**6, None)),
        ("shards.train.0.sha256", "abc"),
        *(("totals", v) for v in ([], {}, {"train": []})),
        *(("left_out", v) for v in ([], {"bad": -1})),
    ],
    ids=str,
)
def test_a_meta_that_nobody_wrote_is_refused(folder, path, value):
    values = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(harmed(values, path, value)))
    with pytest.raises(DataError, match="meta.json (holds|is of version)"):
        read_meta(folder)


def test_a_folder_without_a_meta_or_with_another_file_says_so(folder):
    for content in (b"\xff\0", b"[" * 10**6, b"[]"):
        (folder / "meta.json").write_bytes(content)
        with pytest.raises(DataError, match="meta.json (cannot be read|is no object)"):
            read_meta(folder)
    (folder / "meta.json").unlink()
    with pytest.raises(DataError, match="holds no meta.json: no shards, or not finished"):
        read_meta(folder)


def test_verify_names_the_shard_that_differs(folder):
    path = folder / "train-00002.bin"
    whole = path.read_bytes()
    path.write_bytes(b"\1" + whole[1:])
    with pytest.raises(DataError, match="train-00002.bin differs from the sha256"):
        verify(folder)
    path.write_bytes(whole[:-2])
    with pytest.raises(DataError, match="train-00002.bin holds 46 bytes, meta.json says 48"):
        verify(folder)
    path.unlink()
    with pytest.raises(DataError, match="train-00002.bin cannot be read: No such file"):
        verify(folder)


def test_verify_names_whichever_file_has_one_byte_changed(folder):
    """Of the ids, of their checksums and of the places of documents; or one more, or one less."""
    for path in sorted(p for p in folder.iterdir() if p.suffix in shard_files.SUFFIXES):
        whole = path.read_bytes()
        flipped = [whole[:i] + bytes([b ^ 1]) + whole[i + 1 :] for i, b in enumerate(whole)]
        for changed in (*flipped, whole + b"\0", *([whole[:-1]] if whole else ())):
            path.write_bytes(changed)
            with pytest.raises(DataError, match=f"{path.name} (differs|holds|does not belong)"):
                verify(folder)
        path.write_bytes(whole)
    verify(folder)


def written(folder, tokenizer, splits):
    """Shards of documents: of each split, of each shard, texts or ids."""
    shards = {}
    for split, parts in splits.items():
        shards[split] = []
        for number, texts in enumerate(parts):
            with ShardWriter(folder, split, number, tokenizer) as writer:
                for text in texts:
                    ids = tokenizer.encode(text) if isinstance(text, bytes) else np.array(text)
                    writer.add(ids, len(text))
                shards[split].append(writer.finish())
    return write_meta(folder, tokenizer, shards)


def read(source, batch_size, rows, start, stop):
    draws = Draws([(0, batch_size)])
    return batches(source, draws=draws, rows=rows, seed=3, start=start, stop=stop)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_in_an_epoch_every_token_is_read_once(data):
    """Over any shards, also empty ones and such as are smaller than a window: each token is an
    input once, and each that does not begin a document is a target of weight 1 once, on however
    many processes and wherever the run was resumed. What a window says of documents is what the
    documents were."""
    size = data.draw(st.sampled_from([50, 2**17]))
    begin = data.draw(st.sampled_from([None, size - 2]))
    tokenizer = Numbers(size, begin)
    lengths = data.draw(st.lists(st.lists(st.integers(0, 12), max_size=4), min_size=1, max_size=5))
    T, batch_size = data.draw(st.integers(1, 20)), data.draw(st.sampled_from([1, 2, 4]))
    processes = data.draw(st.sampled_from([n for n in (1, 2, 4) if batch_size % n == 0]))
    random = np.random.default_rng(0)
    parts = [[random.integers(0, size - 3, n).tolist() for n in some] for some in lengths]
    with tempfile.TemporaryDirectory() as folder:
        meta = written(Path(folder), tokenizer, {"train": parts})
        source = TokenWindows(Path(folder), meta, "train", T)
        first = [] if begin is None else [begin]
        whole = [[*first, *ids, size - 1] for some in parts for ids in some]
        flat = np.concatenate([*whole, []]).astype(int)
        owner = np.repeat(np.arange(len(whole)), [len(ids) for ids in whole])
        place = np.concatenate([*map(np.arange, map(len, whole)), []]).astype(int)
        assert len(source) == -(-len(flat) // T) and source.length == len(flat)
        if len(source) < batch_size:
            return
        # an epoch from its first step to a point, and from there on, each process for itself
        steps = -(-len(source) // batch_size)
        stop = data.draw(st.integers(0, steps))
        order = window_order(len(source), 3)
        rows = [
            (order[draw], {name: values[row] for name, values in batch.items()})
            for own in np.split(np.arange(batch_size), processes)
            for start, end in ((0, stop), (stop, steps))
            for step, batch in enumerate(read(source, batch_size, own, start, end), start)
            for row, draw in enumerate((own + step * batch_size).tolist())
            if draw < len(source)
        ]
        inputs, targets = np.zeros(len(flat), int), np.zeros(len(flat), int)
        padded = np.append(flat, [size - 1] * (T + 1))
        for index, row in rows:
            np.testing.assert_array_equal(row["tokens"], padded[index * T : index * T + T])
            np.testing.assert_array_equal(row["targets"], padded[index * T + 1 :][:T])
            there = np.arange(index * T, min(index * T + T, len(flat)))
            inputs[there] += 1
            assert not row["weights"][len(there) :].any()
            counted = there[row["weights"][: len(there)] == 1]
            targets[counted + 1] += 1
            n = len(there)
            np.testing.assert_array_equal(row["segment_ids"][:n], owner[there] - owner[there[0]])
            seen = np.minimum(place[there], np.arange(n))
            np.testing.assert_array_equal(row["positions"][:n], seen)
        assert (inputs == 1).all()
        np.testing.assert_array_equal(targets, place > 0)


@pytest.fixture
def corpus(tmp_path):
    """Shards of bytes, a config that reads them, and a window that spans two of them."""
    texts = [[b"one document", b"and another"], [b"x" * 300_000], [b"the last one"]]
    written(tmp_path, ByteTokenizer(), {"train": texts, "validation": [[b"held out " * 30]]})
    return tmp_path, Shards(folder=str(tmp_path))


def cut(path):
    os.truncate(path, path.stat().st_size - 2)


def one_byte(path):
    data = bytearray(path.read_bytes())
    data[300_000] ^= 1
    path.write_bytes(data)


def foreign(path):
    """An id beyond the vocabulary, whose checksum is right."""
    data = bytearray(path.read_bytes())
    data[300_000:300_002] = (999).to_bytes(2, "little")
    path.write_bytes(data)
    blocks = [bytes(data[at : at + 2**18]) for at in range(0, len(data), 2**18)]
    sums = [google_crc32c.value(block).to_bytes(4, "little") for block in blocks]
    path.with_suffix(".crc").write_bytes(b"".join(sums))


@pytest.mark.parametrize(
    "harm, message",
    [
        (cut, "train-00001.bin holds 600,000 bytes, meta.json says 600,002"),
        (Path.unlink, "train-00001.bin is missing"),
        (one_byte, "train-00001.bin differs from its checksum in bytes 262,144 to 524,288"),
        (foreign, "train-00001.bin holds id 999 at token 150,000, beyond the vocabulary of 264"),
    ],
)
def test_a_shard_that_is_not_as_it_was_written_is_named(corpus, harm, message):
    folder, config = corpus
    harm(folder / "train-00001.bin")
    with pytest.raises(DataError, match=f"{folder}/{message}; copy the shards again"):
        source = config.open("train", 512, 0)
        source.rows(range(len(source)))


def test_a_shard_that_is_cut_or_removed_while_it_is_read_is_named(corpus, monkeypatch):
    folder, config = corpus
    source = config.open("train", 512, 0)
    source.rows(range(len(source)))
    os.truncate(folder / "train-00001.bin", 100_000)
    with pytest.raises(DataError, match="train-00001.bin ends before token 51,"):
        source.rows([100])
    monkeypatch.setattr(shard_reader, "OPEN", 0)
    source = config.replace().open("validation", 64, 0)
    source[0]
    (folder / "validation-00000.bin").unlink()
    with pytest.raises(DataError, match="validation-00000.bin is missing"):
        source[0]


def test_a_few_files_stay_open_however_many_there_are(tmp_path):
    texts = [[b"text of shard %d" % number] for number in range(100)]
    meta = written(tmp_path, ByteTokenizer(), {"train": texts})
    source = TokenWindows(tmp_path, meta, "train", 8)
    before = len(os.listdir("/proc/self/fd"))
    found = source.rows(range(len(source)))["tokens"].ravel()
    assert len(os.listdir("/proc/self/fd")) - before <= shard_reader.OPEN
    expected = np.concatenate([[*text, 256] for (text,) in texts])
    np.testing.assert_array_equal(found[: len(expected)], expected)


def test_there_are_as_many_windows_as_are_said(corpus):
    """One more is an error and not a window of nothing, so that a loop over them ends."""
    source = corpus[1].open("validation", 64, 0)
    assert len(list(source)) == len(source) == 5
    for index in (-1, len(source)):
        with pytest.raises(IndexError, match="has windows 0 to 4"):
            source.rows([0, index])
    assert source.rows([])["tokens"].shape == (0, 64)


def test_ids_are_read_with_the_tokenizer_that_wrote_them_or_not_at_all(tmp_path):
    tokenizer = JsonTokenizer(trained())
    texts = {"train": [[b"Knocking heads"]], "validation": [[b"12345"]]}
    written(tmp_path, tokenizer, texts)
    config = Shards(folder=str(tmp_path))
    source = config.open("train", 4, 0)
    assert config.vocabulary_size() == tokenizer.vocabulary_size
    assert config.tokenizer().decode(source.read(0, source.length)) == "Knocking heads"
    path = tmp_path / "meta.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps({**meta, "probe_ids": meta["probe_ids"][1:]}))
    with pytest.raises(DataError, match="gives other ids for the probe text"):
        config.open("train", 4, 0)
    path.write_text(json.dumps(meta))
    (tmp_path / "tokenizer.json").write_bytes(trained(vocab_size=290))
    with pytest.raises(DataError, match="tokenizer.json is not the one of its ids"):
        config.open("train", 4, 0)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="lacks the tokenizer.json"):
        config.open("train", 4, 0)


def test_identity_is_what_is_read_and_not_where(corpus, tmp_path_factory):
    folder, config = corpus
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "shards"
    shutil.copytree(folder, elsewhere)
    source, copy = (c.open("train", 64, 0) for c in (config, config.replace(folder=str(elsewhere))))
    assert source.fingerprint == copy.fingerprint
    about = {"draws": Draws([(0, 4)]), "seed": 1, "step": 3}
    assert batch_hash(source, **about) == batch_hash(copy, **about)
    assert config.open("validation", 64, 0).fingerprint != source.fingerprint


def test_a_folder_stands_for_the_source(corpus, monkeypatch):
    folder, config = corpus
    values = {"data": {"source": str(folder)}}
    run = from_dict(RunConfig, values, typed={"config.data.source"})
    assert run.data == config and to_dict(run)["data"]["source"] == "shards"
    assert from_dict(RunConfig, to_dict(run)) == run
    monkeypatch.chdir(folder.parent)
    near = from_dict(RunConfig, {"data": {"source": folder.name, "pairs": None}})
    assert near.data == Shards(folder=folder.name)
    with pytest.raises(ConfigError, match="'shard' is not known; did you mean 'shards'"):
        from_dict(RunConfig, {"data": {"source": "shard"}})
    both = {"data": {"source": str(folder), "folder": "other"}}
    with pytest.raises(ConfigError, match="is a folder, and config.data.folder another"):
        from_dict(RunConfig, both, typed={"config.data.source", "config.data.folder"})


def test_a_config_is_valid_where_its_folder_is_not(tmp_path, corpus):
    """What the folder decides is checked where it is there."""
    small = to_dict(RunConfig())["model"] | {"vocabulary_size": 100}
    away = {"source": "shards", "folder": str(tmp_path / "nowhere")}
    run = from_dict(RunConfig, {"data": away, "model": small})
    with pytest.raises(DataError, match="nowhere holds no meta.json: no shards"):
        run.data.open("train", 64, 0)
    with pytest.raises(ConfigError, match="must be at least the data's 264, found 100"):
        run.replace(data=corpus[1])
    with pytest.raises(DataError, match="folder: names no folder"):
        Shards().open("train", 64, 0)


def test_validation_reads_windows_from_all_over(corpus):
    _, config = corpus
    assert list(config.evaluated(100, 4)) == [0, 25, 50, 75]
    assert list(config.evaluated(5, 5)) == [0, 1, 2, 3, 4]
    assert len(set(config.evaluated(10**9, 1000))) == 1000


def put(folder, url):
    for path in folder.iterdir():
        Objects(url).write(path.name, path.read_bytes())


def assert_same_windows(config, *others):
    """All of them read the same: windows in any order, that span shards, and the last one."""
    for split in ("train", "validation"):
        expected = config.open(split, 512, 0)
        some = [index % len(expected) for index in (9, 0, len(expected) - 1, 8, 8)]
        for source in (other.open(split, 512, 0) for other in others):
            assert (len(source), source.fingerprint) == (len(expected), expected.fingerprint)
            for name, rows in source.rows(some).items():
                np.testing.assert_array_equal(rows, expected.rows(some)[name])


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_shards_below_a_url_are_read_as_those_of_a_folder(corpus, scheme, tmp_path_factory):
    folder, config = corpus
    url = f"file://{folder}" if scheme == "file" else "memory://shards"
    if scheme == "memory":
        put(folder, url)
    there = Shards(folder=f"{url}/")
    copy = there.replace(cache_dir=str(tmp_path_factory.mktemp("copy")))
    assert_same_windows(config, there, copy)
    assert there.vocabulary_size() == 264 and there.tokenizer().end_of_document == 256
    Objects(url).delete("train-00001.crc")
    with pytest.raises(DataError, match="train-00001.crc is missing"):
        there.open("train", 512, 0).rows([100])
    copy.open("train", 512, 0).rows([100])
    Objects(url).delete("train-00001.bin")
    with pytest.raises(DataError, match="train-00001.bin is missing"):
        there.open("train", 512, 0)


def test_a_bucket_is_not_asked_before_it_is_opened():
    run = RunConfig(data=Shards(folder="gs://nobodys-bucket/shards"))
    assert run.data.vocabulary_size() is None
    with pytest.raises(ConfigError, match="hang_timeout: must be above the 60 s that data may"):
        run.replace(hang_timeout=60.0)
    with pytest.raises(ConfigError, match="folder: .*is not supported"):
        Shards(folder="s3://bucket/shards")
    with pytest.raises(ConfigError, match="cache_dir: does nothing with shards on this machine"):
        Shards(folder="here", cache_dir="there")
    with pytest.raises(ConfigError, match="cache_dir: must be a folder of this machine"):
        Shards(folder="gs://bucket/shards", cache_dir="gs://bucket/copy")


@pytest.fixture
def words(tmp_path):
    """Shards of a trained tokenizer, and a run config on them."""
    folder = tmp_path / "shards"
    folder.mkdir()
    text = [b"Knocking heads knock on heads. " * 40] * 40
    written(folder, JsonTokenizer(trained()), {"train": [text, text], "validation": [text[:4]]})
    values = {"data": {"source": str(folder)}, "model": {**MODEL, "vocabulary_size": 512}}
    return folder, from_dict(RunConfig, values)


MODEL = to_dict(RunConfig())["model"]


def test_a_run_keeps_its_tokenizer_and_goes_on_with_shards_that_were_moved(words, tmp_path, caplog):
    folder, config = words
    caplog.set_level("INFO", "kha_jax")

    def begun(config, allowed=(), step=0):
        run = RunFolder(tmp_path / "run", config, list(allowed))
        sources = [config.data.open(split, config.seq_len, 0) for split in ("train", "validation")]
        run.identify(*sources)
        run.begin_at(step)
        run.keep(step)
        run.close()

    begun(config)
    (tmp_path / "run" / "checkpoints" / "00000004").mkdir(parents=True)
    folder.rename(tmp_path / "moved")
    copy = shutil.copytree(tmp_path / "run", tmp_path / "copy")
    tokenizer = read_tokenizer(copy, read_config(copy))
    assert tokenizer.decode(tokenizer.encode(b"knock")) == "knock"
    moved = config.replace(data=Shards(folder=str(tmp_path / "moved")))
    begun(moved, step=4)
    begun(moved.replace(seq_len=128), ["seq_len"], step=4)
    windows = len(moved.data.open("train", 128, 0))
    said = f"a new order begins: {100 * 4 * 16 * 256 / (windows * 128) % 100:.0f}% of this epoch"
    assert said in caplog.text
    other = tmp_path / "other"
    other.mkdir()
    written(other, ByteTokenizer(), {"train": [[b"x" * 9999]], "validation": [[b"y" * 999]]})
    with pytest.raises(UsageError, match="this run began with the tokenizer .* found bytes-v1"):
        begun(moved.replace(data=Shards(folder=str(other)), seq_len=128))


@pytest.mark.slow
def test_a_run_on_shards_speaks_where_they_are_not(words, tmp_path):
    folder, _ = words
    flags = [*SMALL, "--config.steps=20", f"--config.data.source={folder}"]
    run, copy = tmp_path / "run", tmp_path / "copy"
    size = "--config.model.vocabulary_size"
    (
        refused,
        trained_,
    ) = run_all(
        [
            ("train", [*flags, f"--workdir={tmp_path / 'no'}", f"{size}=100"]),
            ("train", [*flags, f"--workdir={run}", f"{size}=512"]),
        ],
        tmp_path,
    )
    assert refused.code == 2 and "must be at least the data's" in refused.err
    assert trained_.code == 0, trained_.err
    assert f"epochs of {folder}" in trained_.out and "80 documents" in trained_.out
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("val_bits_per_byte" in row for row in rows)
    epochs = [row["epoch"] for row in rows if "epoch" in row]
    assert len(epochs) == 20 and epochs[0] * 20 == pytest.approx(epochs[-1])
    shutil.copytree(run, copy)
    folder.rename(tmp_path / "gone")
    spoke, again = run_all(
        [
            ("generate", [f"--workdir={copy}", "--prompt=Knocking", "--tokens=8"]),
            ("train", [*flags, f"--workdir={run}", f"{size}=512"]),
        ],
        tmp_path,
    )
    assert spoke.code == 0 and spoke.out.startswith("Knocking"), spoke.err
    assert again.code == 65 and "holds no meta.json" in again.err and len(again.err.split("\n")) < 4


@pytest.mark.slow
def test_a_thousand_shards_open_at_once_and_a_few_of_them_stay_open(tmp_path):
    """10 M documents: opening reads none of their places."""
    found = loading.opening(tmp_path)
    print(found)
    assert found["seconds"] < 0.5 and found["bytes"] < 2 * 10**7 and found["files"] < 200


@pytest.mark.slow
def test_memory_is_flat_over_a_large_shard(tmp_path):
    grown = loading.reading(tmp_path)
    print(f"{grown / 1e6:.1f} MB after 6,400 windows of a file of 10 GB")
    assert grown < 5 * 10**6
