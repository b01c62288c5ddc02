"""What importing and exporting a stock checkpoint costs: seconds beside those of a copy with a
checksum on the same disk, and memory beside the arrays themselves."""

import hashlib
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator

import jax
import numpy as np

from kha_jax import convert
from kha_jax.attention import AttentionConfig
from kha_jax.attention.projections import GroupedQuery
from kha_jax.errors import PeerError
from kha_jax.feed_forward import SwiGLU
from kha_jax.mesh import MeshConfig, make_mesh
from kha_jax.model import ModelConfig
from kha_jax.runs.arrays import leaves as by_path
from kha_jax.runs.arrays import state_bytes
from kha_jax.training.step import abstract_variables

ROUNDS = 3
SIZE = 2 * 10**9  # bytes of the folder, in bfloat16
WIDTH, INNER, VOCABULARY = 1024, 4096, 64_000


def measured(save_to: str | None, size: int = SIZE) -> dict[str, Any]:
    """Seconds and peaks of memory by what is done, medians of ROUNDS, memory of the first;
    `largest`: bytes of the largest tensor in float32."""
    model = of_size(size)
    like = by_path(abstract_variables(model, make_mesh(MeshConfig(), jax.devices()[:1])))
    with tempfile.TemporaryDirectory(dir=save_to) as scratch:
        folder = Path(scratch, "stock")
        # elsewhere, so that no memory is left here of what made it
        maker = multiprocessing.get_context("spawn").Process(target=written, args=(folder, model))
        maker.start(), maker.join()
        if maker.exitcode:
            raise PeerError(f"the folder to measure was not made: code {maker.exitcode}")
        (weights,) = folder.glob("*.safetensors")
        out: dict[str, Any] = {"bytes": weights.stat().st_size, "largest": VOCABULARY * WIDTH * 4}
        turns = [turn(folder, weights, Path(scratch), model, like) for _ in range(ROUNDS)]
        out |= {what: statistics.median(one[what] for one in turns) for what in turns[0]}
        # of later turns it says less: what they take, the C library has kept
        out |= {what: turns[0][what] for what in out if what.endswith("_memory")}
        out["command"] = command(Path(scratch))
    return out


def turn(
    folder: Path, weights: Path, scratch: Path, model: ModelConfig, like: dict[str, Any]
) -> dict[str, float]:
    """Seconds of each, one after another, and peaks of memory over the arrays."""
    out, held, before = {}, [], own_memory()
    (back := scratch / "back").mkdir()
    out["copy"], _ = timed(lambda: copied(weights, scratch / "copy"))
    out["copy_to_disk"], _ = timed(lambda: copied(weights, scratch / "copy", to_disk=True))

    def read() -> Any:
        stock = convert.open_stock(folder)
        return convert.nested((leaf.path, leaf.on(like[leaf.path])) for leaf in stock.leaves())

    out["import"], peak = timed(lambda: held.append(jax.block_until_ready(read())))
    arrays = before + state_bytes(held[0])
    out["import_memory"] = peak - arrays
    out["export"], peak = timed(lambda: convert.write(back, model, held[0], dtype="bfloat16"))
    out["export_memory"] = peak - arrays
    shutil.rmtree(back)
    return out


def command(scratch: Path) -> float:
    """Seconds of `convert import --noverify` of a model of SmolLM2-135M's shape, from the command
    to a run folder that is whole."""
    projection = GroupedQuery(query_heads=9, kv_heads=3, head_dim=64, qk_norm="none")
    model = ModelConfig(
        layers=30,
        width=576,
        vocabulary_size=49_152,
        embeddings="tied",
        attention=AttentionConfig(projection=projection),
        feed_forward=SwiGLU(width=1536),
    )
    written(folder := scratch / "small", model)
    line = [sys.executable, "-m", "experiments.convert", "import", "--noverify"]
    began = time.perf_counter()
    subprocess.run(
        [*line, f"--model={folder}", f"--out={scratch}/run"], check=True, capture_output=True
    )
    return time.perf_counter() - began


def of_size(size: int) -> ModelConfig:
    """A Llama whose folder has about so many bytes."""
    projection = GroupedQuery(query_heads=16, kv_heads=4, head_dim=64, qk_norm="none")
    fields = {
        "width": WIDTH,
        "vocabulary_size": VOCABULARY,
        "attention": AttentionConfig(projection=projection),
        "feed_forward": SwiGLU(width=INNER),
    }
    one = ModelConfig(layers=1, **fields)
    layer = one.attention.parameters(WIDTH) + one.feed_forward.parameters(WIDTH)
    layers = (size // 2 - VOCABULARY * WIDTH) // layer
    return ModelConfig(layers=max(1, layers), **fields)


def written(folder: Path, model: ModelConfig) -> None:
    """Makes a stock folder with random weights in bfloat16."""
    folder.mkdir()
    like = by_path(abstract_variables(model))
    convert.write(folder, model, convert.nested(random_leaves(like)), dtype="bfloat16")


def random_leaves(like: dict[str, Any]) -> Iterator[tuple[str, jax.Array]]:
    """One block of random numbers again and again: to draw them all would take minutes."""
    noise = np.random.default_rng(0).standard_normal(2**20, np.float32)
    for path, leaf in like.items():
        yield path, jax.device_put(np.resize(noise, leaf.shape))


def copied(source: Path, target: Path, to_disk: bool = False) -> None:
    """A copy whose checksum is taken. to_disk: it is there in the end, as what is exported is."""
    target.unlink(missing_ok=True)
    shutil.copyfile(source, target)
    with open(target, "rb+") as file:
        if to_disk:
            os.fsync(file.fileno())
        hashlib.file_digest(file, "sha256").hexdigest()


def timed(work: Callable[[], Any]) -> tuple[float, int]:
    """(seconds, the process's own memory at its peak, file pages not counted)."""
    peak, done = [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], own_memory())

    watcher = threading.Thread(target=sample, daemon=True)
    watcher.start()
    began = time.perf_counter()
    try:
        work()
    finally:
        seconds = time.perf_counter() - began
        done.set()
        watcher.join()
    return seconds, max(peak[0], own_memory())


def own_memory() -> int:
    """Bytes in memory that are no file's."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024
