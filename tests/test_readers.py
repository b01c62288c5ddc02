"""What prepare_data reads: every form gives the same documents, cut wherever, and each fault is
named by file and line."""

import gzip
import json
import os

import numpy as np
import pytest

from experiments.cli.codes import UsageError
from experiments.preparing import readers, units
from experiments.preparing.readers import Reader
from kha_jax.errors import DataError

pyarrow = pytest.importorskip("pyarrow", reason="needs the extra: pip install -e '.[data]'")
zstandard = pytest.importorskip("zstandard", reason="needs the extra: pip install -e '.[data]'")
from pyarrow import parquet  # noqa: E402


def some_documents(count, seed=0, longest=400):
    """Texts of words, some with newlines, accents, characters beyond 16 bits and NUL."""
    random = np.random.default_rng(seed)
    words = ["the", "Größe", "kernel", "\n", "naïve", "𝒳", "x = 1;", '"\\quoted"', "\t", "\0"]
    return [
        " ".join(random.choice(words, random.integers(1, longest))).encode() for _ in range(count)
    ]


def as_jsonl(documents, key="text"):
    return b"".join(
        json.dumps({"id": i, key: t.decode()}).encode() + b"\n" for i, t in enumerate(documents)
    )


def frames(data, count):
    """Packed by zstandard in so many frames."""
    step = -(-len(data) // count)
    pack = zstandard.ZstdCompressor().compress
    return b"".join(pack(data[i : i + step]) for i in range(0, len(data), step))


def as_files(folder, documents, suffix):
    folder.mkdir()
    for i, text in enumerate(documents):
        data = gzip.compress(text) if suffix.endswith(".gz") else text
        (folder / f"{i:05}{suffix}").write_bytes(data)


def as_parquet(path, documents, row_group_size, kind):
    column = pyarrow.array([t.decode() for t in documents], pyarrow.string()).cast(kind)
    table = pyarrow.table({"n": list(range(len(documents))), "text": column})
    parquet.write_table(table, path, row_group_size=row_group_size)


def every_form(folder, documents):
    """The same documents as whatever people own; the name to give to --input, by form."""
    folder.mkdir()
    data = as_jsonl(documents)
    for suffix in (".txt", ".md", ".py.gz"):
        as_files(folder / suffix[1:], documents, suffix)
    packed = {
        "a.jsonl": data,
        "a.jsonl.gz": gzip.compress(data),
        "two.jsonl.gz": gzip.compress(data[:1000]) + gzip.compress(data[1000:]),
        "a.jsonl.zst": frames(data, 1),
        "three.jsonl.zst": frames(data, 3),
    }
    for name, content in packed.items():
        (folder / name).write_bytes(content)
    for name, size, kind in (
        ("one", 10**6, pyarrow.string()),
        ("many", 3, pyarrow.large_string()),
        ("dictionary", 7, pyarrow.dictionary(pyarrow.int32(), pyarrow.string())),
    ):
        as_parquet(folder / f"{name}.parquet", documents, size, kind)
    return {path.name: str(path) for path in sorted(folder.iterdir())}


def read(*names, **how):
    """All documents of the input, unit by unit."""
    files, _ = units.find(names)
    return [text for unit in units.cut(files) for text in Reader(unit, "text", **how)]


def test_every_form_gives_the_same_documents(tmp_path):
    documents = some_documents(23)
    inputs = every_form(tmp_path / "in", documents)
    assert len(inputs) == 11
    for form, name in inputs.items():
        assert read(name) == documents, form
    assert read(str(tmp_path / "in" / "*.jsonl*")) == documents * 5


@pytest.mark.parametrize("large", [1, 29, 200, 10**6])
def test_units_of_a_large_file_hold_each_document_once(tmp_path, monkeypatch, large):
    """Wherever a range ends: in a line, at its end, in a long one that spans several."""
    documents = [text for size in (3, 90, 3) for text in some_documents(5, size, longest=size)]
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(documents).rstrip(b"\n"))
    as_parquet(tmp_path / "a.parquet", documents, 2, pyarrow.string())
    monkeypatch.setattr(units, "SMALL", 0)
    monkeypatch.setattr(units, "LARGE", large)
    monkeypatch.setattr(readers, "CHUNK", 64)
    for name in ("a.jsonl", "a.parquet"):
        path = str(tmp_path / name)
        made = units.cut(units.find([path])[0])
        size = os.path.getsize(path)
        assert len(made) == (-(-size // large) if name == "a.jsonl" else {10**6: 1}.get(large, 8))
        assert read(path) == documents
        assert abs(sum(part.size for unit in made for part in unit) - size) <= len(made)


def test_small_files_share_units_in_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr(units, "SMALL", 100)
    sizes = [40, 60, 1, 99, 1, 300, 20]
    for i, size in enumerate(sizes):
        (tmp_path / f"{i}.txt").write_bytes(b"x" * size)
    made = units.cut(units.find([str(tmp_path)])[0])
    assert [[part.size for part in unit] for unit in made] == [[40, 60], [1, 99], [1], [300], [20]]


def test_of_a_folder_what_is_text_is_read_and_of_a_glob_everything(tmp_path):
    for name in ("b.py", "a.c", "Makefile", "x.rst.gz", "picture.png", ".hidden.py", "odd.name"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "dangling.py").symlink_to("nowhere")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "a.py").write_bytes(b"x")
    files, left_out = units.find([str(tmp_path)])
    names = [os.path.basename(file.path) for file in files]
    assert (names, left_out) == (["Makefile", "a.c", "b.py", "x.rst.gz"], 3)
    files, left_out = units.find([str(tmp_path / "[op]*"), str(tmp_path / "odd.name")])
    assert [os.path.basename(file.path) for file in files] == ["odd.name", "picture.png"]
    for wrong in ("none*.txt", "nothing.jsonl"):
        with pytest.raises(UsageError, match="--input"):
            units.find([str(tmp_path / wrong)])


GOOD = b'{"text": "good"}\n'
LONG = b'{"text": "good", "n": "%s"}\n' % (b"x" * 500)
PACKED = LONG * 600  # several blocks
BAD_LINES = {
    b'{"text": "cut': "is no JSON: Unterminated string",
    b"[" * 200_000: "is nested too deeply",
    b'{"text": "\\ud800"}': r"'text' holds half a character, '\\ud800'",
    b'{"text": null}': "'text' is null, expected text",
    b'{"text": 3}': "'text' is a number, expected text",
    b'{"texts": "a", "b": 1}': "has no 'text'; its keys: 'texts', 'b'",
    b'["text"]': "is a list, expected an object",
    b'"text"': "is text, expected an object",
    b'{"text": "\xff"}': "is not UTF-8: byte 0xff",
    b"\0\0\0\0": "is no JSON",
    b'{"n": ' + b"1" * 5000 + b"}": "is no JSON that is read",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_is_named_or_left_out(tmp_path, monkeypatch, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD * 2 + line + b"\n" + GOOD)
    with pytest.raises(DataError, match=f"a.jsonl:3: {BAD_LINES[line]}.*--skip_bad"):
        read(str(path))
    reader = Reader(units.cut(units.find([str(path)])[0])[0], "text", skip_bad=1)
    assert list(reader) == [b"good"] * 3 and reader.bad == 1
    assert reader.samples[0].startswith(f"{path}:3: ")
    # in a later range too
    monkeypatch.setattr(units, "SMALL", 0)
    monkeypatch.setattr(units, "LARGE", len(GOOD) + 3)
    with pytest.raises(DataError, match="a.jsonl:3: "):
        read(str(path))


def cut_frames(keep):
    """Two frames, of which the second one is cut after a part of its bytes: at a block's end too,
    where the library's own stream ends without a word."""
    first, second = frames(PACKED, 1), zstandard.ZstdCompressor(level=1).compress(PACKED * 4)
    return first + second[: int(len(second) * keep)]


DAMAGED = [
    ("a.jsonl", b"", 1, "holds no document"),
    ("a.jsonl", b"\n \n", 1, "holds no document"),
    ("a.jsonl", GOOD + b'{"text": "x', 2, "the file ends in this line"),
    ("a.jsonl.gz", gzip.compress(PACKED)[:-9], None, "is cut here"),
    ("a.jsonl.gz", gzip.compress(GOOD)[:-5] + b"12345", 1, "is damaged here"),
    ("a.jsonl.gz", b"no gzip", 1, "is damaged here"),
    ("a.jsonl.zst", b"no zstd", 1, "is damaged here"),
    ("a.jsonl.zst", frames(PACKED, 1)[:-1], None, "is cut here"),
    ("a.jsonl.zst", cut_frames(0.5), None, "is cut here"),
    ("a.jsonl.zst", cut_frames(0.99), None, "is cut here"),
    ("a.txt", "ä\nö\n".encode() + b"\xff", 3, "is not UTF-8: byte 0xff"),
    ("a.txt", "ä\nö".encode()[:-1], 2, "is not UTF-8: byte 0xc3"),
    ("a.txt.gz", gzip.compress(b"a\nb" * 999)[:-9], None, "is cut here"),
    ("a.parquet", b"PAR1 it is not", 1, "is no parquet"),
]


@pytest.mark.parametrize("name, content, line, reason", DAMAGED, ids=range(len(DAMAGED)))
def test_a_file_that_is_cut_or_damaged_is_named(tmp_path, name, content, line, reason):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{name}:{line or '[0-9]+'}: .*{reason}"):
        read(str(path))
    assert {*read(str(path), skip_bad=1)} <= {b"good"}


def test_what_is_no_fault(tmp_path):
    """A byte order mark, blank lines, NUL in a text, a last line without an end, empty documents,
    padding after what is packed."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "a"}\r\n\n{"text": "b\\u0000"}\n{"text": ""}\n{"text": "c"}'
    )
    reader = Reader(units.cut(units.find([str(path)])[0])[0], "text")
    assert list(reader) == [b"a", b"b\0", b"c"]
    assert (reader.nul, reader.empty, reader.done) == (f"{path}:3", 1, path.stat().st_size)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(GOOD) + bytes(512) + gzip.compress(GOOD))
    assert read(str(tmp_path / "b.jsonl.gz")) == [b"good"] * 2


def test_frames_that_look_far_back_are_read(tmp_path):
    how = zstandard.ZstdCompressionParameters.from_level(1, window_log=30, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=how).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(packer.compress(GOOD) + packer.flush())
    assert read(str(tmp_path / "a.jsonl.zst")) == [b"good"]


def test_rows_that_are_no_text_are_named(tmp_path):
    path = str(tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"text": ["a", None, "b", ""]}), path, row_group_size=1)
    with pytest.raises(DataError, match="a.parquet:2: 'text' is null"):
        read(path)
    assert read(path, skip_bad=1) == [b"a", b"b"]
    parquet.write_table(pyarrow.table({"text": [b"a", b"\xff"]}), path)
    with pytest.raises(DataError, match="a.parquet:2: is not UTF-8"):
        read(path)
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), path)
    with pytest.raises(DataError, match="a.parquet:1: the file holds no document"):
        read(path)
    for column, reason in (
        ({"texts": ["a"]}, "no column 'text'; its columns: texts"),
        ({"text": [1]}, "int64"),
    ):
        parquet.write_table(pyarrow.table(column), path)
        with pytest.raises(DataError, match=f"a.parquet: .*{reason}"):
            read(path, skip_bad=9)


def test_what_is_too_long_is_named(tmp_path, monkeypatch):
    """Nothing of it stays in memory."""
    monkeypatch.setattr(readers, "LONGEST", 100)
    monkeypatch.setattr(readers, "CHUNK", 16)
    (tmp_path / "a.jsonl").write_bytes(GOOD + b'{"text": "%s"}\n' % (b"x" * 300) + GOOD)
    (tmp_path / "b.txt").write_bytes(b"x" * 101)
    with pytest.raises(DataError, match="a.jsonl:2: is longer than"):
        read(str(tmp_path / "a.jsonl"))
    assert read(str(tmp_path), skip_bad=2) == [b"good"] * 2


def test_a_file_that_changes_meanwhile_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a")
    made = units.cut(units.find([str(path)])[0])
    path.write_bytes(b"other")
    with pytest.raises(DataError, match="was written to meanwhile"):
        list(Reader(made[0], "text"))
