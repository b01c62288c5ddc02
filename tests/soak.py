"""A long run in small: python -m tests.soak [--kills=30] [--seed=0]

A tiny run is killed at random moments and started again by a supervisor until it is done; its last
state is then compared, leaf by leaf by hash, with that of a run that nothing happened to. Prints
one line for each kill and a last one with the counts; exit code 1 when they differ.
"""

import argparse
import random
import shutil
import tempfile
import time
from pathlib import Path

from tests.runs import SMALL, finish, leaf_hashes, lines, manifests, start, steps_done

STEPS = 3000
RUN = (*SMALL, f"--config.steps={STEPS}", "--config.evaluation.every=500")


def disturbed(cache: Path, workdir: Path, kills: int, chance: random.Random) -> list[int]:
    """Runs to the end; the steps that had been done at each kill."""
    at = []
    while True:
        process = start(cache, workdir, base=RUN)
        begun = steps_done(workdir)
        # Anywhere from the imports on; most fall into the steps, some into start-up and saves.
        wanted = begun + chance.randrange(STEPS // max(kills, 1) + 1)
        deadline = time.monotonic() + chance.choice([chance.uniform(0, 8), 600.0])
        while process.poll() is None and len(at) < kills:
            if time.monotonic() > deadline or (steps_done(workdir) > max(wanted, begun)):
                process.kill()
                break
            time.sleep(chance.uniform(0, 0.02))
        code, _, err = finish(process)
        if code == 0:
            return at
        if code != -9:
            raise SystemExit(f"after {len(at)} kills the run left with {code}: {err}")
        at.append(steps_done(workdir))
        count = len(manifests(workdir))
        print(f"kill {len(at):3d}: {at[-1]} steps told of, {count} checkpoints", flush=True)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    wanted = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="soak-"))
    try:
        code, _, err = finish(start(place / "cache", place / "whole", base=RUN))
        assert code == 0, err
        began = time.monotonic()
        chance = random.Random(wanted.seed)
        at = disturbed(place / "cache", place / "killed", wanted.kills, chance)
        ours, theirs = leaf_hashes(place / "killed"), leaf_hashes(place / "whole")
        losses = [
            [(row["step"], row["loss"]) for row in lines(place / name) if "loss" in row]
            for name in ("killed", "whole")
        ]
        differing = [name for name in theirs if ours.get(name) != theirs[name]]
        equal = not differing and losses[0] == losses[1]
        print(
            f"{len(at)} kills in {time.monotonic() - began:.0f} s over {STEPS} steps: "
            f"{len(theirs) - len(differing)} of {len(theirs)} leaves and "
            f"{sum(a == b for a, b in zip(*losses))} of {STEPS} losses are bit-equal"
        )
        raise SystemExit(not equal)
    finally:
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
