"""Token shards: whatever is written is read again once, and what was harmed is named."""

import hashlib
import json

import numpy as np
import pytest

from kha_jax.data import shard_files
from kha_jax.data.shard_files import ShardWriter, read_meta, verify, write_meta
from kha_jax.data.tokenizers import ByteTokenizer
from kha_jax.errors import DataError, StorageError


class Numbers(ByteTokenizer):
    """Ids of which a test says how many there are, and whether documents have a begin."""

    fingerprint = "numbers"

    def __init__(self, size, begin=None):
        self.vocabulary_size, self.begin_of_document, self.end_of_document = size, begin, size - 1

    def encode(self, text):
        return np.frombuffer(text, np.uint8) % (self.vocabulary_size - 2)


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
    import google_crc32c

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
