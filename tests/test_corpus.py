"""prepare_data as people use it: a real corpus in one command, memory that does not grow with the
input, a command that is killed with its processes. All of it takes minutes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from kha_jax.data.shard_files import read_meta
from tests.runs import ROOT, SMALL, lines
from tests.test_prepare_data import content, documents
from tests.test_readers import as_jsonl, as_parquet

pytestmark = pytest.mark.slow
PACKAGES = "linux-doc-6.1", "perl-doc", "python3.11-doc"
PARTS = (
    "doc/linux-doc-6.1/Documentation",
    "doc/linux-doc-6.1/html/_sources",
    "perl",
    "doc/python3.11",
)
# A unit in a process of its own: its memory at the start, and the most that it ever had, in kB.
PEAK = """
import sys
from pathlib import Path
from experiments.preparing import units, workers

class Silent:
    def seen(self, seen): pass
    def say(self, kind, text): print(text, file=sys.stderr)

def memory(name):
    said = Path("/proc/self/status").read_text()
    return int(said.partition(f"{name}:")[2].split()[0])

path, out, *tokenizer = sys.argv[1:]
if path.endswith(".parquet"):
    import pyarrow.parquet
job = workers.Job(tuple(tokenizer), "text", 0.001, 0)
workers.tokenizers.load(*tokenizer)
(unit,) = units.cut(units.find([path])[0])
before = memory("VmRSS")
workers.write(job, 0, unit, Path(out), b"", None, 0, Silent())
print(before, memory("VmHWM"))
"""
# The command, with units that are small.
SMALL_UNITS = """
import runpy, sys
from experiments.preparing import units

units.SMALL, units.LARGE = 0, int(sys.argv.pop(1))
sys.argv[0] = "prepare_data"
runpy.run_module("experiments.prepare_data", run_name="__main__")
"""


def python(*line):
    settings = {**os.environ, "XLA_FLAGS": ""}  # one device, as a person has it
    done = subprocess.run(
        [sys.executable, *map(str, line)], cwd=ROOT, env=settings, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def peak(path, tmp_path, *tokenizer):
    """(MB at the start, MB at most) of a worker that writes the shards of this file."""
    out = tmp_path / f"of_{path.name}"
    out.mkdir()
    before, most = python("-c", PEAK, path, out, *tokenizer or ("bytes",)).split()
    shutil.rmtree(out)
    return int(before) / 1024, int(most) / 1024


def large_jsonl(megabytes, longest):
    """Lines of text, of which one has `longest` MB."""
    text = (ROOT / "kha_jax" / "attention" / "mixers.py").read_text() * 20
    line = json.dumps({"text": text}) + "\n"
    middle = megabytes * 10**6 // 2 // len(line) + 1
    once = json.dumps({"text": text * (longest * 10**6 // len(text))}) + "\n"
    return (line * middle).encode(), once.encode()


def test_memory_does_not_grow_with_the_input(tmp_path):
    """A tenth of it takes as much, with the same line of 100 MB in it."""
    zstandard = pytest.importorskip("zstandard", reason="needs the extra: pip install -e '.[data]'")
    found = {}
    for size in (40, 400):
        path = tmp_path / f"{size}.jsonl.zst"
        half, once = large_jsonl(size, 100)
        with zstandard.open(path, "wb") as file:
            for part in (half, once, half):
                file.write(part)
        found[size] = peak(path, tmp_path)[1]
    assert found[400] < 1.2 * found[40] and found[400] < 700, found


def test_a_large_row_group_is_read_in_parts(tmp_path):
    pytest.importorskip("pyarrow", reason="needs the extra: pip install -e '.[data]'")
    import pyarrow

    random, path = np.random.default_rng(0), tmp_path / "a.parquet"
    words = np.array(["kernel", "lock", "page", "of", "the", "reader", "\n"])
    some = [" ".join(random.choice(words, 800)).encode() for _ in range(64)]
    as_parquet(path, [some[i % 64] + b"%d" % i for i in range(65_000)], 10**6, pyarrow.string())
    before, most = peak(path, tmp_path)
    assert most - before < 200, (before, most)


def test_a_command_that_is_killed_leaves_no_process_and_goes_on(tmp_path):
    data = as_jsonl(documents(600))
    (tmp_path / "a.jsonl").write_bytes(data)

    def command(out, workers, fault=""):
        line = [sys.executable, "-c", SMALL_UNITS, str(len(data) // 6 + 1)]
        line += [f"--input={tmp_path / 'a.jsonl'}", f"--out={out}", f"--workers={workers}"]
        return subprocess.Popen(
            [*line, "--val_fraction=0.1"], cwd=ROOT, start_new_session=True,
            env={**os.environ, "KHA_JAX_FAULT": fault}, stderr=subprocess.PIPE,
        )  # fmt: skip

    golden, out = tmp_path / "golden", tmp_path / "out"
    assert command(golden, 1).wait() == 0
    for number, fault in enumerate(("kill:unit_renamed:1", "kill:unit_recorded:3", "kill:meta:6")):
        process = command(out, 2, fault)
        assert process.wait() == -signal.SIGKILL
        end = time.monotonic() + 60
        while time.monotonic() < end:  # its workers see that it is gone
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                break
            time.sleep(0.2)
        else:
            pytest.fail(f"processes are left after {fault}")
        assert not (out / "meta.json").exists(), number
    assert command(out, 2).wait() == 0
    assert content(out) == content(golden) and len(read_meta(out).shards["train"]) == 6
    left = sorted(path.name for path in (out / ".preparing").iterdir())
    assert left == ["inputs.jsonl", "lock", "plan.json", "units.jsonl"]


def test_what_a_person_prepares_is_what_a_run_learns(tmp_path):
    """A file with a bad line is refused by name; mended, it becomes shards that kha_tiny reads."""
    path, out, run = tmp_path / "a.jsonl", tmp_path / "shards", tmp_path / "run"
    command = ["-m", "experiments.prepare_data", f"--input={path}", f"--out={out}"]
    good = as_jsonl(documents(3000))
    path.write_bytes(good + b'{"text": 3}\n')
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 65 and f"{path}:3001: 'text' is a number" in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("error: ") == 1
    path.write_bytes(good)
    told = python(*command, "--val_fraction=0.05")
    assert told.splitlines()[-1].startswith(
        f"python -m experiments.train --config.data.source={out}/ --workdir="
    )
    python("-m", "experiments.train", *SMALL, f"--config.data.source={out}", f"--workdir={run}")
    first, *_, last = [row["val_bits_per_byte"] for row in lines(run) if "val_loss" in row]
    assert 8 > first > last
    python("-m", "experiments.prepare_data", f"--describe={out}")


@pytest.fixture(scope="module")
def debian(tmp_path_factory):
    """The documentation of Linux, Perl and Python, as Debian packs it."""
    folder = tmp_path_factory.mktemp("debian")
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        pytest.skip("needs Debian's apt-get and dpkg")
    try:
        got = subprocess.run(
            ["apt-get", "download", *PACKAGES], cwd=folder, capture_output=True, timeout=300
        )
    except subprocess.TimeoutExpired:
        pytest.skip("Debian's archive does not answer")
    if got.returncode:
        pytest.skip(f"Debian's archive is not reached: {got.stderr.decode()[-200:]}")
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package, folder / "text"], check=True)
    return folder


def test_a_real_corpus_in_one_command(debian):
    """kha_tiny learns it, by tokens of its own and by bytes; both say bits per byte."""
    pytest.importorskip("tokenizers", reason="needs the extra: pip install -e '.[hf]'")
    share = debian / "text" / "usr" / "share"
    inputs = ",".join(str(share / part) for part in PARTS)
    found = {}
    for name in ("bpe:16384", "bytes"):
        out, run = debian / name.partition(":")[0], debian / f"run_{name.partition(':')[0]}"
        python(
            *("-m", "experiments.prepare_data", f"--input={inputs}", f"--out={out}"),
            *(f"--tokenizer={name}", "--drop_duplicates", "--val_fraction=0.01"),
        )
        meta = read_meta(out)
        assert meta.left_out["duplicates"] > 3000 and meta.total("train", "bytes") > 90e6
        python(
            *("-m", "experiments.train", f"--config.data.source={out}", f"--workdir={run}"),
            *("--config.steps=200", "--config.evaluation.every=100"),
            f"--config.model.vocabulary_size={meta.vocabulary_size}",
        )
        found[name] = [row["val_bits_per_byte"] for row in lines(run) if "val_bits_per_byte" in row]
    assert all(8 > first > last > 0 for first, *_, last in found.values()), found
