"""What `python -m tests.soak --attack=NAME` does besides killing one run: a sweep started twice,
what writes killed in the middle, flipped bytes, and two processes of which one is hurt in each
phase. Each says whether all was as it has to be, and prints what it counted."""

import argparse
import collections
import contextlib
import csv
import importlib.util
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
from tests.runs import ROOT, finish, joined, leaf_hashes, manifests, start, steps_done, wait_for

CONFIG = "tests/soaked.py:"
BASE = (f"--config={CONFIG}talking",)
REFUSED, STOPPED = {2, 65, 74}, 75
LONGEST = 3600  # seconds of one start


def command(place: Path, name: str, *words: str) -> subprocess.Popen:
    """A command as a user starts it; what it says goes where nobody waits for a reader."""
    environment = {**os.environ, "KHA_JAX_CACHE": str(place / "cache"), "XLA_FLAGS": ""}
    line = [sys.executable, "-m", f"experiments.{name}", *words]
    with open(place / "said", "a") as said:
        return subprocess.Popen(line, cwd=ROOT, env=environment, stdout=said, stderr=said)


def kill(process: subprocess.Popen, *, children: bool) -> None:
    """As a supervisor does it, or as memory that runs out does it, which leaves the children."""
    started = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    pids = started.read_text().split() if children and process.poll() is None else []
    process.kill()
    for pid in map(int, pids):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def sweep(place: Path, wanted: argparse.Namespace) -> bool:
    """Started twice at once; one of the two is killed, with its run or without, and started again,
    while the other lives. The table is that of a sweep that nothing happened to."""
    chance, files = random.Random(wanted.seed), ",".join(CONFIG + v for v in ("talking", "mea"))
    flags = (f"--configs={files}", "--seeds=2", "--set=config.steps=30")
    code = command(place, "sweep", *flags, f"--out={place / 'whole'}").wait(LONGEST)
    assert code == 0, (place / "said").read_text()[-2000:]

    def begin() -> subprocess.Popen:
        return command(place, "sweep", *flags, f"--out={place / 'killed'}")

    two, hit = [begin(), begin()], 0
    while hit < wanted.kills:
        time.sleep(chance.uniform(0, wanted.longest))
        if any(one.poll() is not None for one in two):
            break  # there is nothing left to do
        which, children = chance.randrange(2), chance.random() < 0.5
        kill(two[which], children=children)
        hit, other = hit + 1, two[1 - which].poll()
        whom = "with its run" if children else "its run lives on"
        done = len(_rows(place / "killed"))
        print(f"kill {hit:3d}: {whom}, {done} done, the other {other or 'lives'}", flush=True)
        two[which] = begin()
    codes = [one.wait(LONGEST) for one in two]
    ours, theirs = _rows(place / "killed"), _rows(place / "whole")
    print(
        f"sweep: {hit} kills of one of two, then codes {codes}; "
        f"{sum(ours.get(k) == v for k, v in theirs.items())} of {len(theirs)} losses are equal"
    )
    return ours == theirs and not any(codes)


def _rows(folder: Path) -> dict[str, str]:
    path = folder / "runs.csv"
    if not path.exists():
        return {}
    return {row["name"]: row["val_loss"] for row in csv.DictReader(path.open())}


def writers(place: Path, wanted: argparse.Namespace) -> bool:
    """Commands that write are killed: half of the time at any moment, else soon after something is
    there. What they leave is not there, or whole."""
    chance, counts = random.Random(wanted.seed), collections.Counter()
    run = place / "run"
    code, _, err = finish(start(place / "cache", run, base=BASE), LONGEST)
    assert code == 0, err
    written: dict[str, tuple[list[str], Callable[[Path], bool]]] = {
        "convert": (["compress", "--kv_heads=1"], lambda out: _opens(place, out)),
        "report": ([], lambda out: _figures(out.parent)),
        "analyze": (["--watch=1"], _figures),
    }
    if not importlib.util.find_spec("matplotlib"):
        print("analyze is left out: it needs the extra plots", flush=True)
        del written["analyze"]
    for name, (words, whole) in written.items():

        def begin(to: Path) -> tuple[subprocess.Popen, Path]:
            out = place / to / ("made.png" if name == "report" else "made")
            out.parent.mkdir()
            return command(place, name, *words, f"--workdir={run}", f"--out={out}"), out

        began = time.monotonic()
        process, out = begin(place / name)
        assert process.wait(LONGEST) == 0, (place / "said").read_text()[-2000:]
        seconds = time.monotonic() - began
        assert _left(out.parent) and whole(out), f"{name} is not whole where nobody killed it"
        for number in range(wanted.kills):
            process, out = begin(place / f"{name}{number}")
            if number % 2:
                deadline = time.monotonic() + chance.uniform(0, seconds)
                while process.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.005)
            else:
                while process.poll() is None and not any(out.parent.iterdir()):
                    time.sleep(0.005)
                time.sleep(chance.uniform(0, seconds / 4))
            late = process.poll() is not None
            kill(process, children=True)
            fate = "nothing" if not _left(out.parent) else "whole" if whole(out) else "torn"
            counts[name, "ended before" if late and fate == "whole" else fate] += 1
            print(f"{name} killed: {fate}{', it had ended' if late else ''}", flush=True)
            shutil.rmtree(out.parent)
    print("writers: " + ", ".join(f"{name} {fate} {n}" for (name, fate), n in counts.items()))
    return not any(fate == "torn" for _, fate in counts)


def _left(folder: Path) -> list[Path]:
    """The files that somebody sees there."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return [f for f in files if not any(p[0] == "." for p in f.relative_to(folder).parts)]


def _opens(place: Path, out: Path) -> bool:
    """A run that is there has its checkpoint."""
    (found,) = run_all([("checkpoints", [f"--workdir={out}", "--verify"])], place / "cache")
    return found.code == 0 and bool(manifests(out))


ENDS = {
    ".png": b"IEND\xaeB`\x82",
    ".svg": b"</svg>",
    ".pdf": b"%%EOF",
    ".html": b"</html>",
}


def _figures(folder: Path) -> bool:
    """Every file is written to its end; a page, which is written last, has what it names."""
    return all(p.read_bytes().rstrip().endswith(ENDS[p.suffix]) for p in _left(folder))


def flips(place: Path, wanted: argparse.Namespace) -> bool:
    """A bit is flipped in some place of a run folder: going on with the run is refused in one line,
    or ends as it would have. Every file has its turn where there are as many flips."""
    chance, counts = random.Random(wanted.seed), collections.Counter()
    half = place / "half"
    first = start(place / "cache", half, base=BASE, fault="terminate:step:33")
    assert finish(first, LONGEST)[0] == STOPPED, "it does not stop when it is asked to"
    files = sorted(p.relative_to(half) for p in half.rglob("*") if p.is_file() and p.stat().st_size)
    chance.shuffle(files)
    names = (files * (1 + wanted.kills // len(files)))[: wanted.kills]
    flipped = [(name, *_flip(half / name, chance)) for name in names]
    for number, (name, _, _, content) in enumerate(flipped):
        shutil.copytree(half, place / f"flipped{number}")
        (place / f"flipped{number}" / name).write_bytes(content)
    shutil.copytree(half, place / "whole")
    runs = [place / "whole", *(place / f"flipped{number}" for number in range(len(flipped)))]
    ended = run_all([("train", [*BASE, f"--workdir={run}"]) for run in runs], place / "cache")
    assert ended[0].code == 0, ended[0].err
    whole = leaf_hashes(runs[0])
    for run, found, (name, at, bit, _) in zip(runs[1:], ended[1:], flipped):
        detected = "passed over" in found.err or "differs" in found.err
        if found.code:
            told = len(found.err.splitlines()) <= 2 and "error: " in found.err
            fate = "refused" if told and found.code in REFUSED else "WRONG"
        elif leaf_hashes(run) != whole:
            fate = "WRONG"
        else:
            fate = "detected, and went back" if detected else "harmless"
        counts[fate] += 1
        print(f"{name}, byte {at} ^ {bit}: {found.code}, {fate}", flush=True)
        if fate == "WRONG":
            print(found.err[-600:], flush=True)
    told = ", ".join(f"{fate} {n}" for fate, n in counts.items())
    print(f"{len(flipped)} flips in {len(set(names))} of {len(files)} files: {told}")
    return not counts["WRONG"]


def _flip(path: Path, chance: random.Random) -> tuple[int, int, bytes]:
    """Where, which bit, and what the file is then."""
    content = bytearray(path.read_bytes())
    at, bit = chance.randrange(len(content)), 1 << chance.randrange(8)
    content[at] ^= bit
    return at, bit, bytes(content)


# phase: how far a process has come when it is hurt
PHASES = {
    "start": "",
    "compile": "batch:1",
    "step": "step:7",
    "save": "arrays_written:15",
    "evaluation": "evaluation:20",
}
FROZEN = 20.0  # seconds


def phases(place: Path, wanted: argparse.Namespace) -> bool:
    """Two processes: one is killed in each phase, and once one is stopped for a while. The other
    leaves by itself or waits, and both end as two that nothing happened to."""
    expected = _together(place, place / "two", "")
    assert expected == [0, 0], expected
    whole, good = leaf_hashes(place / "two"), True
    for number, (phase, point) in enumerate(PHASES.items()):
        # both in turn; the first of two leads and the second follows
        hurt, run, fault = number % 2, place / phase, f"kill:{point}" if point else ""
        codes = _together(place, run, fault, hurt, 1.0 if not point else None)
        again = _together(place, run, "")
        equal = leaf_hashes(run) == whole
        good &= again == [0, 0] and equal and codes[hurt] == -signal.SIGKILL and all(codes)
        print(f"{phase}, process {hurt} killed: {codes}, then {again}, equal {equal}", flush=True)
    run = place / "stopped"
    pair = _pair(place, run, "", 0)
    wait_for(lambda: steps_done(run) >= 10, pair[1])
    pair[1].send_signal(signal.SIGSTOP)
    time.sleep(FROZEN)
    pair[1].send_signal(signal.SIGCONT)
    codes = [finish(one, LONGEST)[0] for one in pair]
    equal = leaf_hashes(run) == whole
    print(f"stopped for {FROZEN:.0f} s: {codes}, equal {equal}")
    return good and codes == [0, 0] and equal


def _pair(place: Path, run: Path, fault: str, hurt: int) -> list[subprocess.Popen]:
    base = (*BASE, "--config.steps=30", "--config.hang_timeout=120", "--wait_seconds=60")
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
    return [finish(one, LONGEST)[0] for one in pair]


ATTACKS = {"sweep": sweep, "writers": writers, "flips": flips, "phases": phases}
