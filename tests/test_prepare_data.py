"""prepare_data: the same documents make the same shards, whatever they lie in, however many
processes work and wherever one is killed."""

import contextlib
import os
import signal

import numpy as np
import pytest

from experiments.cli.codes import UsageError
from experiments.preparing import preparation, processes, texts, units, workers
from experiments.preparing.describe import describe
from experiments.preparing.duplicates import later_ones
from experiments.preparing.folder import ShardFolder
from experiments.preparing.preparation import Preparation
from experiments.preparing.workers import Job
from kha_jax.data import shard_files, tokenizers
from kha_jax.data.shard_files import SPLITS
from kha_jax.data.tokenizers import ByteTokenizer, JsonTokenizer
from kha_jax.errors import DataError, PeerError, StorageError
from kha_jax.runs import faults
from tests.test_readers import as_jsonl, every_form, some_documents
from tests.test_tokenizers import trained


class Silent:
    """A `processes.Report` that nobody reads."""

    def __init__(self):
        self.notes = {}

    def seen(self, seen):
        pass

    def say(self, kind, text):
        self.notes[kind] = text


def inline(count, function, tasks, told, threads=1):
    """`processes.run_all` in this process."""
    for index, arguments in enumerate(tasks):
        yield index, function(*arguments, Silent())


@pytest.fixture
def here(monkeypatch):
    """No processes, whose start is what takes long."""
    monkeypatch.setattr(preparation, "run_all", inline)


def prepare(out, *inputs, tokenizer=None, drop=False, count=1, share=0.1, skip_bad=0):
    """What the command does with these flags; meta.json."""
    files, _ = units.find(map(str, inputs))
    said = {"val_fraction": share, "drop_duplicates": drop}
    with ShardFolder(out) as folder:
        folder.begin(said, files)
        job = Job((tokenizers.BYTES,), "text", share, skip_bad)
        work = Preparation(folder, units.cut(files), job, count)
        work.run(tokenizer or ByteTokenizer(), drop, said)
    return shard_files.read_meta(out)


def content(out):
    """Every file of shards, by name, and meta.json's entries of them."""
    found = {path.name: path.read_bytes() for path in sorted(out.glob("*-*"))}
    return found, shard_files.read_meta(out).shards


def documents_of(out):
    """The documents of each split, in order."""
    found = {}
    for split, shards in shard_files.read_meta(out).shards.items():
        ids = [np.fromfile(out / f"{shard.name}.bin", "<u2") for shard in shards]
        ended = np.concatenate([*ids, []]).astype(np.uint8).tobytes()  # the end, 256, becomes 0
        found[split] = ended.split(b"\0")[:-1]
    return found


def documents(count, seed=0, longest=60):
    """Without the byte that ends documents in `documents_of`."""
    return [text.replace(b"\0", b"") for text in some_documents(count, seed, longest)]


@pytest.fixture
def six_units(tmp_path, monkeypatch):
    """The name of an input that is cut in six."""
    data = as_jsonl(documents(60))
    (tmp_path / "a.jsonl").write_bytes(data)
    monkeypatch.setattr(units, "SMALL", 0)
    monkeypatch.setattr(units, "LARGE", len(data) // 6 + 1)
    return tmp_path / "a.jsonl"


def test_the_same_documents_make_the_same_shards(tmp_path, here):
    """In every form that they are found in."""
    inputs = every_form(tmp_path / "in", documents(40))
    made = {form: tmp_path / f"of_{form}" for form in inputs}
    for form, name in inputs.items():
        prepare(made[form], name)
    first, *others = map(content, made.values())
    assert len(others) == 10 and all(other == first for other in others)
    found = documents_of(made["a.jsonl"])
    assert min(map(len, found.values())) > 0
    assert sorted(sum(found.values(), [])) == sorted(documents(40))


def test_processes_change_nothing(tmp_path, six_units, monkeypatch):
    """Neither those that share units, nor those that share the texts of one."""
    for count in (1, 2):
        prepare(tmp_path / f"by_{count}", six_units, count=count)
    with monkeypatch.context() as patched:
        patched.setattr(preparation, "run_all", inline)
        prepare(tmp_path / "here", six_units)
    assert content(tmp_path / "by_1") == content(tmp_path / "by_2") == content(tmp_path / "here")
    some = documents(9, longest=90_000)  # several batches, and pieces of one document
    (tmp_path / "b.jsonl").write_bytes(as_jsonl([*some, b"".join(some)]))
    monkeypatch.setattr(units, "SMALL", 2**26)
    prepare(tmp_path / "shared", tmp_path / "b.jsonl", count=2)
    monkeypatch.setattr(preparation, "run_all", inline)
    prepare(tmp_path / "alone", tmp_path / "b.jsonl")
    assert content(tmp_path / "shared") == content(tmp_path / "alone")


def killed(work):
    """Does the work in a process that is killed in it."""
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            work()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


POINTS = ("unit_written", "unit_renamed", "unit_recorded", "meta")


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_run_goes_on_to_the_same_shards(tmp_path, six_units, here, monkeypatch, point):
    """After unit 3 of 6; the finished ones are not made again."""
    golden, out = tmp_path / "golden", tmp_path / "out"
    prepare(golden, six_units, drop=True)
    with monkeypatch.context() as planted:
        planted.setattr(faults, "WANTED", [("kill", point, 6 if point == "meta" else 3)])
        killed(lambda: prepare(out, six_units, drop=True))
    assert not (out / "meta.json").exists()
    made = []
    write = workers.write
    monkeypatch.setattr(
        workers, "write", lambda job, n, *rest: made.append(n) or write(job, n, *rest)
    )
    prepare(out, six_units, drop=True)
    assert content(out) == content(golden)
    assert made == {"unit_recorded": [4, 5], "meta": []}.get(point, [3, 4, 5])
    assert sorted(os.listdir(out / ".preparing")) == sorted(os.listdir(golden / ".preparing"))


def test_a_record_that_was_cut_is_made_again(tmp_path, six_units, here):
    """So is a unit whose shard is not what its record says."""
    golden, out = tmp_path / "golden", tmp_path / "out"
    prepare(golden, six_units)
    prepare(out, six_units)
    (out / "meta.json").unlink()
    records = out / ".preparing" / "units.jsonl"
    records.write_bytes(records.read_bytes()[:-20])
    (out / "train-00001.bin").write_bytes(b"other")
    prepare(out, six_units)
    assert content(out) == content(golden)


def test_units_by_another_version_of_the_tokenizer_are_made_again(tmp_path, six_units, here):
    """Though its file is the same: no folder holds ids of two."""
    golden, out = tmp_path / "golden", tmp_path / "out"
    prepare(golden, six_units)
    with pytest.MonkeyPatch.context() as other:
        encode = ByteTokenizer.encode
        other.setattr(ByteTokenizer, "encode", lambda self, text: encode(self, text) ^ 1)
        prepare(out, six_units)
    (out / "meta.json").unlink()
    prepare(out, six_units)
    assert content(out) == content(golden)


def test_a_tokenizer_that_loses_text_is_said_to(tmp_path, here, caplog):
    path, said = tmp_path / "a.jsonl", "does not give text back as it was: 'The 3 quick-' becomes"
    path.write_bytes(as_jsonl(documents(9)))
    for normalizer in (None, {"type": "Lowercase"}):
        tokenizer = JsonTokenizer(trained(normalizer=normalizer))
        prepare(tmp_path / f"out_{normalizer is None}", path, tokenizer=tokenizer)
        assert (said in caplog.text) == (normalizer is not None)


def test_what_was_begun_with_other_input_or_flags_is_refused(tmp_path, six_units, here):
    out, other = tmp_path / "out", tmp_path / "b.jsonl"
    prepare(out, six_units)
    other.write_bytes(as_jsonl(documents(3)))
    with pytest.raises(UsageError, match="--val_fraction: was 0.1, is 0.2 since .* was begun"):
        prepare(out, six_units, share=0.2)
    with pytest.raises(UsageError, match="--input: .*b.jsonl is new"):
        prepare(out, six_units, other)
    with pytest.raises(UsageError, match="b.jsonl stands where .*a.jsonl was"):
        prepare(out, other)
    os.utime(six_units, ns=(0, 0))
    with pytest.raises(UsageError, match="a.jsonl has another time"):
        prepare(out, six_units)
    two = tmp_path / "two"
    prepare(two, six_units, other)
    with pytest.raises(UsageError, match="b.jsonl is gone"):
        prepare(two, six_units)
    with pytest.raises(UsageError, match=f"--out={tmp_path}: holds something else"):
        prepare(tmp_path, six_units)


def test_input_may_be_mended_until_a_unit_is_finished(tmp_path, here):
    """And the tokenizer is trained again then."""
    pytest.importorskip("tokenizers", reason="needs the extra: pip install -e '.[hf]'")
    path, some = tmp_path / "a.jsonl", documents(20)
    path.write_bytes(as_jsonl(some) + b"{")
    with pytest.raises(DataError, match="a.jsonl:21: "):
        prepare(tmp_path / "out", path, drop=True)
    path.write_bytes(as_jsonl(some))
    prepare(tmp_path / "out", path, tokenizer=280)
    prepare(tmp_path / "new", path, tokenizer=280)
    assert content(tmp_path / "out") == content(tmp_path / "new")


def test_a_second_process_is_refused(tmp_path):
    with ShardFolder(tmp_path / "out"):
        with pytest.raises(UsageError, match=f"is in use by process {os.getpid()} on "):
            ShardFolder(tmp_path / "out")
    ShardFolder(tmp_path / "out").lock.close()


def test_duplicates_fall_on_one_side_and_the_first_one_stays(tmp_path, here, monkeypatch):
    """Whatever file they stand in."""
    some = documents(30)
    for name, part in (("a", some), ("b", some[::-1] + documents(5, seed=9)), ("c", some[:3])):
        (tmp_path / f"{name}.jsonl").write_bytes(as_jsonl(part))
    monkeypatch.setattr(units, "SMALL", 1000)
    inputs = [tmp_path / f"{name}.jsonl" for name in "abc"]
    prepare(tmp_path / "all", *inputs, share=0.3)
    found = documents_of(tmp_path / "all")
    assert not {*found["train"]} & {*found["validation"]}
    assert sum(map(len, found.values())) == 68
    meta = prepare(tmp_path / "once", *inputs, share=0.3, drop=True)
    first = {split: list(dict.fromkeys(texts)) for split, texts in found.items()}
    assert documents_of(tmp_path / "once") == first
    assert meta.left_out == {"bad": 0, "empty": 0, "duplicates": 68 - len({*some}) - 5}


def test_later_ones_are_those_that_a_set_finds(tmp_path):
    random = np.random.default_rng(0)
    files = [random.integers(0, 20, random.integers(0, 40)) for _ in range(7)]
    known, expected = set(), []
    for number, keys in enumerate(files):
        (tmp_path / str(number)).write_bytes(b"".join(int(k).to_bytes(16) for k in keys))
        later = [k in known or known.add(k) is not None for k in map(int, keys)]
        expected.append(np.packbits(np.array(later, bool)).tobytes())
    assert later_ones([tmp_path / str(number) for number in range(7)]) == expected


def test_one_document_is_held_out_where_the_share_chooses_none(tmp_path, here, six_units):
    """The one of the smallest key, with all that equal it; of equal ones none."""
    some = documents(60)
    least = min(some, key=texts.key_of)
    meta = prepare(tmp_path / "out", six_units, share=0.0)
    assert documents_of(tmp_path / "out")["validation"] == [least]
    assert sum(meta.total(split, "documents") for split in SPLITS) == 60
    (tmp_path / "b.jsonl").write_bytes(as_jsonl([least, some[0], least]))
    prepare(tmp_path / "twice", six_units, tmp_path / "b.jsonl", share=0.0)
    assert documents_of(tmp_path / "twice")["validation"] == [least] * 3
    (tmp_path / "c.jsonl").write_bytes(as_jsonl([least] * 2))
    prepare(tmp_path / "same", tmp_path / "c.jsonl", share=0.0)
    assert documents_of(tmp_path / "same") == {"train": [least] * 2, "validation": []}


def test_the_split_takes_its_share(tmp_path, here):
    (tmp_path / "a.jsonl").write_bytes(as_jsonl([b"%d" % i for i in range(4000)]))
    small, large = (prepare(tmp_path / str(s), tmp_path / "a.jsonl", share=s) for s in (0.05, 0.2))
    for meta, share in ((small, 0.05), (large, 0.2)):
        assert abs(meta.total("validation", "documents") / 4000 - share) < 0.02
    inner, outer = (documents_of(tmp_path / str(share))["validation"] for share in (0.05, 0.2))
    assert {*inner} < {*outer}
    with pytest.raises(DataError, match="--val_fraction=0.9999: leaves no document for training"):
        (tmp_path / "b.jsonl").write_bytes(as_jsonl([b"one", b"two"]))
        prepare(tmp_path / "none", tmp_path / "b.jsonl", share=0.9999)


def test_bad_records_of_all_units_count(tmp_path, here, monkeypatch, caplog):
    monkeypatch.setattr(units, "SMALL", 0)
    for number in range(4):
        (tmp_path / f"{number}.jsonl").write_bytes(as_jsonl(documents(3, number)) + b"{\n")
    name = tmp_path / "*.jsonl"
    with pytest.raises(DataError, match="2.jsonl:4: is no JSON.*one more than --skip_bad=2"):
        prepare(tmp_path / "two", name, skip_bad=2)
    meta = prepare(tmp_path / "two", name, skip_bad=4)  # what is finished is used
    assert meta.left_out["bad"] == 4 and sum(meta.total(s, "documents") for s in SPLITS) == 12


def test_a_worker_that_is_killed_is_said_to_be(tmp_path):
    with processes.Worker() as worker:
        os.kill(worker.process.pid, signal.SIGKILL)
        with pytest.raises(PeerError, match="a worker ended by signal 9; the same command goes on"):
            worker.result()
    with processes.Worker() as worker:  # what a task raises is raised here
        worker.send(
            workers.keys, Job(("bytes",), "text", 0.1, 0), _unit(b"{", tmp_path), tmp_path / "k"
        )
        with pytest.raises(DataError, match="bad.jsonl:1: is no JSON"):
            worker.result()
        pid = worker.process.pid
    with pytest.raises(StorageError, match="nowhere cannot be written"):
        one = _unit(b'{"text": "a"}', tmp_path)
        workers.keys(Job(("bytes",), "text", 0.1, 0), one, tmp_path / "nowhere" / "k", None)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def _unit(data, folder):
    (folder / "bad.jsonl").write_bytes(data)
    return units.cut(units.find([str(folder / "bad.jsonl")])[0])[0]


# what GPT-2 and Llama 3 take for words
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize("pattern", [GPT_2, LLAMA_3], ids=["gpt_2", "llama_3"])
def test_pieces_have_the_ids_of_the_whole(pattern):
    library = pytest.importorskip("tokenizers", reason="needs the extra: pip install -e '.[hf]'")
    split = library.pre_tokenizers.Split(library.Regex(pattern), "isolated")
    level = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.Sequence([split, level])
    some = [text.decode() for text in some_documents(30, seed=3)]
    some += ["她说。\n字字字。\n" * 40, "a_b  c\r\n\r\nd 12 345\n6", "don't  stop\n\n\n"]
    trainer = library.trainers.BpeTrainer(vocab_size=600, show_progress=False)
    tokenizer.train_from_iterator(some, trainer)
    random, cuts = np.random.default_rng(0), 0
    for _ in range(60):
        text = "".join(random.choice(some, 5)).encode()
        parts = list(texts.pieces(text, int(random.integers(200, 600))))
        assert b"".join(parts) == text and all(parts)
        ids = [tokenizer.encode(part.decode()).ids for part in parts]
        assert sum(ids, []) == tokenizer.encode(text.decode()).ids
        cuts += len(parts) - 1
    assert cuts > 100


def test_pieces_end_where_a_place_is_or_between_characters():
    assert list(texts.pieces(b"one two three", 9)) == [b"one two", b" three"]
    assert list(texts.pieces(b"one, two,\nthree", 12)) == [b"one, two,\n", b"three"]
    assert list(texts.pieces("字字字".encode(), 4)) == ["字".encode()] * 3
    assert list(texts.pieces(b"", 4)) == [b""]


def test_batches_are_small_and_keep_the_order(monkeypatch):
    monkeypatch.setattr(texts, "BATCH", 100)
    monkeypatch.setattr(texts, "PIECE", 100)
    monkeypatch.setattr(texts, "TEXTS", 8)
    random = np.random.default_rng(0)
    sizes = random.choice([1, 5, 40, 99, 100, 101, 250], 200)
    some = [(SPLITS[random.integers(2)], bytes([65 + i % 26]) * s) for i, s in enumerate(sizes)]
    for in_pieces in (True, False):
        made = list(texts.batches(some, in_pieces))
        for split in SPLITS:
            joined = b"".join(text for b in made if b.split == split for text in b.texts)
            assert joined == b"".join(text for s, text in some if s == split)
        whole = [batch for batch in made if not batch.piece]
        assert all(len(b.texts) <= 8 for b in made)
        assert all(sum(map(len, b.texts)) <= 100 or len(b.texts) == 1 for b in whole)
        assert all(len(b.texts[0]) <= 100 for b in made if b.piece)
        last = [len(b.texts) for b in whole] + [b.last for b in made if b.piece]
        assert sum(map(int, last)) == len(some)
        assert bool(len(whole) - len(made)) == in_pieces


def test_a_tokenizer_is_trained_on_the_input_and_kept(tmp_path, here):
    """The same as by the library alone; a second run takes it as it is."""
    library = pytest.importorskip("tokenizers", reason="needs the extra: pip install -e '.[hf]'")
    some = documents(80)
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(some))
    meta = prepare(tmp_path / "out", tmp_path / "a.jsonl", tokenizer=300)
    assert meta.vocabulary_size == 300 and meta.dtype == np.dtype("<u2")
    alone = library.ByteLevelBPETokenizer()
    alone.train_from_iterator(
        (text.decode() for text in some), 300, min_frequency=0, show_progress=False,
        special_tokens=["<|endoftext|>"],
    )  # fmt: skip
    kept = tokenizers.load(tmp_path / "out")
    assert kept.library.get_vocab() == alone.get_vocab()
    first = content(tmp_path / "out")
    (tmp_path / "out" / "meta.json").unlink()
    prepare(tmp_path / "out", tmp_path / "a.jsonl", tokenizer=300)
    assert content(tmp_path / "out") == first
    ids = np.fromfile(tmp_path / "out" / "train-00000.bin", "<u2")
    end = kept.end_of_document
    decoded = [kept.decode(part) for part in np.split(ids, np.flatnonzero(ids == end) + 1)[:-1]]
    assert {*decoded} <= {text.decode() for text in some} and len(decoded) > 60


def described(path, capsys, tokenizer=None):
    describe(path, tokenizer)
    return capsys.readouterr().out


def test_shards_are_described(tmp_path, here, capsys):
    some = [b"x" * n for n in (9, 99, 2999, 8999)] + [b"Hello\x1b[31m\nthere " + b"z" * 80]
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(some))
    prepare(tmp_path / "out", tmp_path / "a.jsonl", share=0.0)
    told = described(tmp_path / "out", capsys)
    assert "tokenizer bytes-v1, vocabulary 264 (uint16), end 256, begin None" in told
    assert "train: 4 documents" in told and "validation: 1 document, " in told
    assert "% longer than 2,048" in told and "longest 9,000" in told
    assert "  xxxxxxxxx\n" in told and "every shard is as it was written" in told
    assert "\x1b" not in told
    with open(tmp_path / "out" / "train-00000.bin", "r+b") as file:
        file.write(b"y")
    with pytest.raises(DataError, match="train-00000.bin differs from the sha256"):
        describe(tmp_path / "out", None)


def foreign(folder, name, ids, dtype, magic=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic or 0, 1, len(ids)
    path = folder / name
    path.write_bytes((header.tobytes() if magic else b"") + np.array(ids, dtype).tobytes())
    return path


def test_tokens_of_other_programs_are_described(tmp_path, capsys):
    ids = [5] * 9 + [50256] + [7] * 3000 + [50256] + [8]
    llm_c = foreign(tmp_path, "llm.bin", ids, "<u2", 20240520)
    told = described(llm_c, capsys)
    assert (
        "llm.bin: llm.c, uint16" in told and "3 documents" in told and "largest id 50,256" in told
    )
    assert "longest 3,001; 33.3% longer than 2,048, 0.0% longer than 8,192" in told
    assert "nanoGPT, uint16, raw" in described(foreign(tmp_path, "nano.bin", ids, "<u2"), capsys)
    olmo = described(foreign(tmp_path, "part-0.npy", [*ids, 70000], "<u4"), capsys)
    assert "OLMo, uint32, raw" in olmo and "the largest id 70,000" in olmo
    told = described(tmp_path, capsys)
    assert [word for word in ("llm.c", "nanoGPT", "OLMo") if word not in told] == []
    (tmp_path / "llm.bin").write_bytes(llm_c.read_bytes()[:-2])
    with pytest.raises(DataError, match="llm.bin has 3,011 ids, its header says 3,012; it was cut"):
        describe(llm_c, None)
    for path in (tmp_path / "nano.bin", tmp_path / "part-0.npy"):
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(DataError, match=f"{path.name} holds .* no whole number of uint.* cut"):
            describe(path, None)
    np.save(tmp_path / "array.npy", np.arange(9))
    with pytest.raises(DataError, match="array.npy is an array of numpy"):
        describe(tmp_path / "array.npy", None)
    text = b"Hello\0there\0"
    raw = foreign(tmp_path, "bytes.bin", [b or 256 for b in text], "<u2")
    assert "  Hello\n  there\n" in described(raw, capsys, ByteTokenizer())
    beyond = foreign(tmp_path, "beyond.bin", [1, 2, 999], "<u2")
    with pytest.raises(DataError, match="id 999 is beyond the tokenizer's 264"):
        describe(beyond, ByteTokenizer())
