"""python -m experiments.train as a user runs it, for tests: a small run as a subprocess, and what
it leaves."""

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from kha_jax.analysis.leaves import Checkpoint

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = [
    path
    for path in sorted((ROOT / "configs").glob("[!_]*.py"))
    if re.search("^(def )?get_config", path.read_text(), re.MULTILINE)
]
STEPS = 60
SMALL = (
    f"--config.steps={STEPS}",
    "--config.batch_size=4",
    "--config.seq_len=64",
    "--config.model.layers=2",
    "--config.model.width=32",
    "--config.model.attention.projection.head_dim=8",
    "--config.model.feed_forward.width=64",
    "--config.evaluation.every=20",
    "--config.evaluation.batches=2",
    "--config.checkpoint.every=15",
)


def start(cache, workdir, *flags, base=SMALL, fault="", devices=1, **streams):
    """The run as a process. fault: see kha_jax.runs.faults. devices: virtual ones."""
    environment = {
        **os.environ,
        "KHA_JAX_CACHE": str(cache),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}" if devices > 1 else "",
        "KHA_JAX_FAULT": fault,
    }
    command = [sys.executable, "-m", "experiments.train", *base, f"--workdir={workdir}", *flags]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **streams)


def joined(count):
    """The flags of each of so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    where = f"--coordinator_address={address}", f"--num_processes={count}"
    return [(*where, f"--process_id={i}") for i in range(count) if count > 1] or [()]


def finish(process, seconds=240):
    """(exit code, stdout, stderr) of a process that ends within so many seconds."""
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def lines(workdir):
    """The metrics of a run's steps and evaluations."""
    path = Path(workdir) / "metrics.jsonl"
    rows = map(json.loads, path.read_text().splitlines() if path.exists() else [])
    return [row for row in rows if "loss" in row or "val_loss" in row]


def wait_for(condition, process):
    """Returns once the condition holds; fails when the process ends before."""
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def steps_done(workdir):
    """Training steps that metrics.jsonl holds."""
    path = Path(workdir) / "metrics.jsonl"
    return path.read_text().count("grad_norm") if path.exists() else 0


def manifests(workdir):
    """Of the checkpoints that count, oldest first."""
    return sorted(Path(workdir).glob("checkpoints/*/MANIFEST.json"))


def final_state(workdir):
    """(step, state) of the newest checkpoint."""
    folder = manifests(workdir)[-1].parent
    state = ocp.StandardCheckpointer().restore(folder.absolute() / "state")
    return int(folder.name), jax.tree.map(np.asarray, state)


def leaf_hashes(workdir):
    """The hash of each leaf of the newest checkpoint, by path, with its dtype and shape; however
    many processes have saved it."""
    folder = manifests(workdir)[-1].parent
    stored, found = Checkpoint(folder / "state"), {"checkpoint": int(folder.name)}
    for name, leaf in stored.read(stored.leaves).items():
        content = hashlib.sha256(np.ascontiguousarray(leaf).tobytes()).hexdigest()
        found[name] = f"{leaf.dtype}{leaf.shape} {content}"
    return found


def assert_same_end(workdir, golden, steps=STEPS):
    """Both ended at the same step, bit-equal leaf by leaf, with the same metrics."""
    ours, theirs = leaf_hashes(workdir), leaf_hashes(golden)
    assert ours["checkpoint"] == steps and len(ours) > 10
    assert ours == theirs

    def strip(rows):
        kept = ("step", "loss", "grad_norm", "val_loss")
        return [{k: v for k, v in row.items() if k in kept} for row in rows]

    assert strip(lines(workdir)) == strip(lines(golden))
