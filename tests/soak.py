"""A long run in small: python -m tests.soak [--kills=30] [--processes=1] [--seed=0]
    [--config=FILE.py:VARIANT] [--attack=kills|sweep|writers|flips|phases]

A tiny run is killed at random moments and started again by a supervisor until it is done; of
several processes one is killed, and the others have to leave by themselves. The last state is then
compared, leaf by leaf by hash, with that of a run that nothing happened to. Prints one line for
each kill and a last one with the counts; exit code 1 when they differ. --config: of the run, as
tests/soaked.py:mea. The other attacks are those of tests.attacks.
"""

import argparse
import os
import random
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import jax

from tests import attacks
from tests.runs import SMALL, finish, joined, leaf_hashes, lines, manifests, start, steps_done

STEPS, STEPS_TOGETHER = 40, 20  # for each kill; several processes take many times as long
ANY = "--config.evaluation.every=500", "--config.hang_timeout=60"
RUN = *SMALL, *ANY


def steps(wanted: argparse.Namespace) -> int:
    """Of the run, for each kill."""
    return STEPS if wanted.processes == 1 else STEPS_TOGETHER


def begin(cache: Path, workdir: Path, wanted: argparse.Namespace) -> list[subprocess.Popen]:
    """The run, as so many processes."""
    run = (f"--config={wanted.config}", *ANY) if wanted.config else RUN
    base = (*run, f"--config.steps={steps(wanted) * wanted.kills}", "--wait_seconds=60")
    return [start(cache, workdir, *flags, base=base) for flags in joined(wanted.processes)]


def disturbed(cache: Path, workdir: Path, wanted: argparse.Namespace) -> list[int]:
    """Runs to the end; the steps that had been done at each kill."""
    at, chance = [], random.Random(wanted.seed)
    while True:
        started = begin(cache, workdir, wanted)
        process = chance.choice(started)
        begun = steps_done(workdir)
        # Anywhere from the imports on; most fall into the steps, some into start-up and saves.
        enough = begun + chance.randrange(steps(wanted) + 1)
        deadline = time.monotonic() + chance.choice([chance.uniform(0, 8), 600.0])
        while process.poll() is None and len(at) < wanted.kills:
            if time.monotonic() > deadline or steps_done(workdir) > enough:
                process.kill()
                break
            time.sleep(chance.uniform(0, 0.02))
        killed = time.monotonic()
        ends = [finish(one, attacks.LONGEST) for one in started]
        codes = [code for code, _, _ in ends]
        if not any(codes):
            return at
        if -9 not in codes or not set(codes) <= {-9, 70}:
            raise SystemExit(f"after {len(at)} kills the run left with {codes}: {ends}")
        at.append(steps_done(workdir))
        count = len(manifests(workdir))
        told = f"{at[-1]} steps told of, {count} checkpoints"
        left = f"all gone after {time.monotonic() - killed:.1f} s with {codes}"
        print(f"kill {len(at):3d}: {told}, {left}", flush=True)


def kills(place: Path, wanted: argparse.Namespace) -> bool:
    """Whether a run that is killed ends as one that nothing happened to."""
    for process in begin(place / "cache", place / "whole", wanted):
        code, _, err = finish(process, attacks.LONGEST)
        assert code == 0, err
    began = time.monotonic()
    at = disturbed(place / "cache", place / "killed", wanted)
    ours, theirs = leaf_hashes(place / "killed"), leaf_hashes(place / "whole")
    losses = [
        [(row["step"], row["loss"]) for row in lines(place / name) if "loss" in row]
        for name in ("killed", "whole")
    ]
    differing = [name for name in theirs if ours.get(name) != theirs[name]]
    print(
        f"{len(at)} kills in {time.monotonic() - began:.0f} s, processes {wanted.processes}, "
        f"{wanted.config or 'dense'}: {len(theirs) - len(differing)} of {len(theirs)} leaves and "
        f"{sum(a == b for a, b in zip(*losses))} of {len(losses[1])} losses are bit-equal"
    )
    return not differing and losses[0] == losses[1]


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config", default="", help="FILE.py:VARIANT")
    parser.add_argument(
        "--longest", type=float, default=12.0, help="seconds until a kill, in a sweep"
    )
    parser.add_argument("--cache", default="", help="folder to keep; a new one by default")
    parser.add_argument("--attack", default="kills", choices=["kills", *attacks.ATTACKS])
    wanted = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"  # for the runs, as in every test
    jax.config.update("jax_platforms", "cpu")  # for what is read here, where jax is imported
    place = Path(tempfile.mkdtemp(prefix="soak-"))
    if wanted.cache:
        (place / "cache").symlink_to(Path(wanted.cache).absolute())
    try:
        attack = attacks.ATTACKS.get(wanted.attack, kills)
        raise SystemExit(not attack(place, wanted))
    finally:
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
