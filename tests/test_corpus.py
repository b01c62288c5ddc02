"""prepare_data as people use it: a real corpus in one command, memory that does not grow with the
input, a command that is killed with its processes. All of it takes minutes."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from experiments.timing import corpora
from kha_jax.data.shard_files import read_meta
from tests.runs import ROOT, SMALL, lines
from tests.test_prepare_data import content, documents
from tests.test_readers import as_jsonl
from tests.test_tokenizers import trained

pytestmark = pytest.mark.slow
PACKAGES = "linux-doc-6.1", "perl-doc", "python3.11-doc"
PARTS = (
    "doc/linux-doc-6.1/Documentation",
    "doc/linux-doc-6.1/html/_sources",
    "perl",
    "doc/python3.11",
)
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


def test_memory_does_not_grow_with_the_input(tmp_path):
    """A tenth of it takes as much: 2 GB as bytes, and 200 MB by a BPE with one line of 100 MB in
    both."""
    for extra, name in (("data", "zstandard"), ("hf", "tokenizers")):
        pytest.importorskip(name, reason=f"needs the extra: pip install -e '.[{extra}]'")
    (tmp_path / "tokenizer.json").write_bytes(trained(vocab_size=400))
    for row in corpora.memory(tmp_path, 50):
        print(row)
        assert row.here < 700 and row.ratio < 1.2, row


def test_a_large_row_group_is_read_in_parts(tmp_path):
    pytest.importorskip("pyarrow", reason="needs the extra: pip install -e '.[data]'")
    row = corpora.row_group(tmp_path, 256)
    print(row)
    assert row.here < 200, row


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
    print(found)
    assert all(8 > first > last > 0 for first, *_, last in found.values()), found
