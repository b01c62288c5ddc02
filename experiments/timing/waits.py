"""How long one waits for a run: for its first step, and for its saves."""

import os
import subprocess
import sys
import tempfile
import time
from typing import Any, Callable, Iterator


def first_steps() -> Iterator[tuple[str, float]]:
    """Seconds from the command to the first step of configs/kha_tiny.py: `cold`, then `cached`,
    with the compilation cache that the first one left."""
    with tempfile.TemporaryDirectory() as cache:
        for run in ("cold", "cached"):
            line = [sys.executable, "-m", "experiments.train", "--config.steps=2"]
            began, environment = time.perf_counter(), {**os.environ, "KHA_JAX_CACHE": cache}
            with subprocess.Popen(
                [*line, f"--workdir={cache}/{run}"],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            ) as process:
                seconds = [
                    time.perf_counter() - began
                    for said in process.stderr
                    if said.startswith("first step after")
                ]
            yield run, seconds[0]


def saves(rounds: int, folder: str | None) -> dict[str, Any]:
    """Seconds of saves of 100M parameters with AdamW's moments below the folder, of each round:
    `call`, how long the call holds training up; `step`, by how much the step after it is longer;
    `total`, until all is written; `checksums` of what was. `bytes`: of the state."""
    import jax
    import numpy as np

    from kha_jax.runs.arrays import state_bytes
    from kha_jax.runs.checkpoint import Checkpoints
    from kha_jax.storage import crc32c

    def timed(action: Callable, *arguments: Any) -> tuple[float, Any]:
        began = time.perf_counter()
        result = jax.block_until_ready(action(*arguments))
        return time.perf_counter() - began, result

    noise = np.random.default_rng(0).standard_normal((16, 2500, 2500), np.float32)
    state = {name: jax.device_put(noise * i) for i, name in enumerate(("params", "mu", "nu"), 1)}
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0.999, tree), donate_argnums=0)
    state = step(state)
    out: dict[str, Any] = {"bytes": state_bytes(state), "call": [], "step": [], "total": []}
    out["checksums"] = []
    with tempfile.TemporaryDirectory(dir=folder) as place:
        with Checkpoints(place, keep=1) as checkpoints:
            for number in range(rounds):
                usual, state = timed(step, state)
                began = time.perf_counter()
                waited, _ = timed(checkpoints.save, number, state)
                # where the save reads the step's own buffers, the next step has to take new ones
                after, state = timed(step, state)
                out["call"].append(waited)
                out["step"].append(max(0.0, after - usual))
                checkpoints.wait()
                out["total"].append(time.perf_counter() - began)
                files = (p for p in checkpoints.path(number).rglob("*") if p.is_file())
                out["checksums"].append(timed(lambda: [crc32c(p) for p in files])[0])
    return out
