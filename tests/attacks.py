"""What `python -m tests.soak --attack=NAME` does besides killing one run: a sweep started twice,
what writes killed in the middle, flipped bytes, and two processes of which one is hurt in each
phase. Each says whether all was as it has to be, and prints what it counted."""

import argparse
import collections
import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable

from tests.commands import run_all
from tests.runs import ROOT, finish, joined, leaf_hashes, lines, manifests, start, steps_done

CONFIG = "tests/soaked.py:"
BASE = (f"--config={CONFIG}mixture",)
REFUSED = {2, 65, 74}


def command(place: Path, name: str, *words: str) -> subprocess.Popen:
    """A command as a user starts it, in a group of its own."""
    environment = {**os.environ, "KHA_JAX_CACHE": str(place / "cache"), "XLA_FLAGS": ""}
    line = [sys.executable, "-m", f"experiments.{name}", *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        line, cwd=ROOT, env=environment, text=True, stdout=pipe, stderr=pipe, process_group=0
    )


def killed(process: subprocess.Popen) -> None:
    """Kills it and all that it has started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def trained(place: Path, name: str, *flags: str) -> Path:
    """A run that is done."""
    code, _, err = finish(start(place / "cache", place / name, *flags, base=BASE), 3600)
    assert code == 0, err
    return place / name


def sweep(place: Path, wanted: argparse.Namespace) -> bool:
    """Started twice at once, one of the two killed each time; its table is that of one that nothing
    happened to."""
    chance, files = random.Random(wanted.seed), ",".join(CONFIG + v for v in ("talking", "mea"))
    flags = (f"--configs={files}", "--seeds=2")
    code, _, err = finish(command(place, "sweep", *flags, f"--out={place / 'whole'}"), 3600)
    assert code == 0, err
    for number in range(wanted.kills):
        two = [command(place, "sweep", *flags, f"--out={place / 'killed'}") for _ in range(2)]
        time.sleep(chance.uniform(1, 12))
        for one in chance.sample(two, 2):
            killed(one)
        done = len(_rows(place / "killed"))
        print(f"kill {number + 1:3d}: of both, {done} runs in the table", flush=True)
    two = [command(place, "sweep", *flags, f"--out={place / 'killed'}") for _ in range(2)]
    codes = [finish(one, 3600)[0] for one in two]
    ours, theirs = _rows(place / "killed"), _rows(place / "whole")
    print(
        f"sweep: {wanted.kills} kills of two at once, then codes {codes}; "
        f"{sum(ours.get(k) == v for k, v in theirs.items())} of {len(theirs)} losses are equal"
    )
    return ours == theirs and not any(codes)


def _rows(folder: Path) -> dict[str, str]:
    path = folder / "runs.csv"
    if not path.exists():
        return {}
    return {row["name"]: row["val_loss"] for row in csv.DictReader(path.open())}


def writers(place: Path, wanted: argparse.Namespace) -> bool:
    """Commands that write are killed at random moments. What they leave is not there, whole, or
    refused."""
    chance, counts = random.Random(wanted.seed), collections.Counter()
    run = trained(place, "run")
    written: dict[str, tuple[list[str], Callable[[Path], bool]]] = {
        "convert": (["compress", "--kv_heads=1"], lambda out: _opens(place, out)),
        "report": ([], lambda out: _figures(out.parent)),
        "analyze": (["--watch=1"], lambda out: _figures(out)),
    }
    for number in range(wanted.kills):
        for name, (words, whole) in written.items():
            out = place / f"{name}{number}" / "made"
            out.parent.mkdir()
            to = f"--out={out}.png" if name == "report" else f"--out={out}"
            process = command(place, name, *words, f"--workdir={run}", to)
            time.sleep(chance.uniform(0, wanted.longest))
            killed(process)
            left = any(p.is_file() and p.name[0] != "." for p in out.parent.rglob("*"))
            fate = "nothing" if not left else "whole" if whole(out) else "torn"
            counts[name, fate] += 1
            print(f"{name} killed: {fate}", flush=True)
            shutil.rmtree(out.parent)
    print(", ".join(f"{name} {fate} {n}" for (name, fate), n in sorted(counts.items())))
    return not any(fate == "torn" for _, fate in counts)


def _opens(place: Path, out: Path) -> bool:
    """A run that is there has its checkpoint."""
    if not (out / "config.json").exists():
        return True
    (found,) = run_all([("checkpoints", [f"--workdir={out}", "--verify"])], place / "cache")
    return found.code == 0 and bool(manifests(out))


ENDS = {
    ".png": b"IEND\xaeB`\x82",
    ".svg": b"</svg>",
    ".pdf": b"%%EOF",
    ".html": b"</html>",
}


def _figures(folder: Path) -> bool:
    """Every file is written to its end."""
    files = (p for p in folder.rglob("*") if p.suffix in ENDS and p.name[0] != ".")
    return all(p.read_bytes().rstrip().endswith(ENDS[p.suffix]) for p in files)


def flips(place: Path, wanted: argparse.Namespace) -> bool:
    """A byte is flipped in some place of a run folder: going on with the run is refused in one
    line, or ends as it would have. Every file has its turn."""
    chance, counts = random.Random(wanted.seed), collections.Counter()
    half = trained(place, "half", "--config.steps=30")
    whole = leaf_hashes(_prolonged(place, half, "whole")[0])
    files = sorted(p for p in half.rglob("*") if p.is_file() and p.stat().st_size)
    for number in range(wanted.kills):
        path = files[number % len(files)] if number < len(files) else chance.choice(files)
        name = path.relative_to(half)
        damaged = place / f"flipped{number}"
        shutil.copytree(half, damaged)
        content = bytearray((damaged / name).read_bytes())
        at, bit = chance.randrange(len(content)), 1 << chance.randrange(8)
        content[at] ^= bit
        (damaged / name).write_bytes(content)
        ended, code, err = _prolonged(place, damaged, f"ended{number}")
        detected = "passed over" in err or "differs" in err
        if code == 0:
            equal = leaf_hashes(ended) == whole
            fate = "WRONG" if not equal else "detected, and went back" if detected else "harmless"
        else:
            fate = "refused" if code in REFUSED and "Traceback" not in err else "WRONG"
        counts[fate] += 1
        print(f"{name}, byte {at} ^ {bit}: {code}, {fate}", flush=True)
        if fate == "WRONG":
            print(err[-600:], flush=True)
        for left in (damaged, ended):
            shutil.rmtree(left, ignore_errors=True)
    print(f"{wanted.kills} flips: " + ", ".join(f"{fate} {n}" for fate, n in counts.items()))
    return not counts["WRONG"]


def _prolonged(place: Path, run: Path, name: str) -> tuple[Path, int, str]:
    """The run after another 30 steps, in a copy of its folder."""
    shutil.copytree(run, place / name)
    flags = [*BASE, "--config.steps=60", "--allow_changes=steps", f"--workdir={place / name}"]
    (found,) = run_all([("train", flags)], place / "cache")
    return place / name, found.code, found.err


# phase: how far a process has come when it is hurt
PHASES = {
    "start": "",
    "compile": "batch:1",
    "step": "step:7",
    "save": "arrays_written:15",
    "evaluation": "evaluation:20",
}
STOPPED = 20.0


def phases(place: Path, wanted: argparse.Namespace) -> bool:
    """Two processes: one is killed in each phase, and once one is stopped for a while. The other
    leaves by itself or waits, and both end as two that nothing happened to."""
    expected = _together(place, place / "two", "")
    assert expected == [0, 0], expected
    whole, good = leaf_hashes(place / "two"), True
    for phase, point in PHASES.items():
        for hurt in (0, 1):
            run, fault = place / f"{phase}{hurt}", f"kill:{point}" if point else ""
            codes = _together(place, run, fault, hurt, 1.0 if not point else None)
            again = _together(place, run, "")
            equal = leaf_hashes(run) == whole
            good &= again == [0, 0] and equal and all(code for code in codes)
            print(
                f"{phase}, process {hurt} killed: {codes}, then {again}, equal {equal}", flush=True
            )
    pair = _pair(place, place / "stopped", "", 0)
    while steps_done(place / "stopped") < 10:
        time.sleep(0.05)
    pair[1].send_signal(signal.SIGSTOP)
    time.sleep(STOPPED)
    pair[1].send_signal(signal.SIGCONT)
    codes = [finish(one, 3600)[0] for one in pair]
    equal = leaf_hashes(place / "stopped") == whole
    print(
        f"stopped for {STOPPED:.0f} s: {codes}, equal {equal}, {len(lines(place / 'stopped'))} rows"
    )
    return good and codes == [0, 0] and equal


def _pair(place: Path, run: Path, fault: str, hurt: int) -> list[subprocess.Popen]:
    base = (*BASE, "--config.hang_timeout=120", "--wait_seconds=60")
    return [
        start(place / "cache", run, *flags, base=base, fault=fault if number == hurt else "")
        for number, flags in enumerate(joined(2))
    ]


def _together(
    place: Path, run: Path, fault: str, hurt: int = 0, after: float | None = None
) -> list[int]:
    """What two processes leave with, of which one is killed: by a fault, or after some seconds."""
    pair = _pair(place, run, fault, hurt)
    if after is not None:
        time.sleep(after)
        pair[hurt].kill()
    return [finish(one, 3600)[0] for one in pair]


ATTACKS = {"sweep": sweep, "writers": writers, "flips": flips, "phases": phases}
