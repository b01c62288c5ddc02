"""Measures this machine: python -m experiments.benchmark [--suite=dense|startup]

dense: one training step of the peer shape (4 layers, D 256, 8 query and 4 key/value heads of 64, SwiGLU 768, vocabulary 4096,
tied, float32, batch 8 x 256, AdamW) here and in transformers on PyTorch (extra: interop), each in a process of its own, taking
turns, so that a noisy machine is noisy for all. startup: seconds from the command to the first step of configs/kha_tiny.py, cold
and with a warm compilation cache. Nothing here is a test; the figures go into the README with the machine's name.
"""

import json
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, Callable

import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from experiments import command_line
from experiments.command_line import UsageError

SUITE = flags.DEFINE_enum("suite", "dense", ["dense", "startup"], "What to measure.")
ROUNDS = flags.DEFINE_integer("rounds", 12, "Turns of each implementation.", lower_bound=1)
TORCH_COMPILE = flags.DEFINE_bool("torch_compile", True, "Also measure torch.compile (about 30 s to compile).")
JSON = flags.DEFINE_string("json", None, "Also write the figures to this file.")

LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, FEED_FORWARD, VOCABULARY = 4, 256, 8, 4, 64, 768, 4096
BATCH, LENGTH = 8, 256
CONSOLE = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 140)
Step = Callable[[], Any]


def peer_run(variant: str) -> Any:
    """The peer shape as a RunConfig; `variant` is a key of configs.base.KNOCKING."""
    from configs import base
    from kha_jax.attention import AttentionConfig
    from kha_jax.attention.projections import GroupedQuery
    from kha_jax.feed_forward import SwiGLU
    from kha_jax.model import LossConfig, ModelConfig
    from kha_jax.parameters import Numerics
    from kha_jax.training import RunConfig

    attention = AttentionConfig(projection=GroupedQuery(query_heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM))
    model = ModelConfig(
        layers=LAYERS, width=WIDTH, vocabulary_size=VOCABULARY, attention=base.with_knocking(attention, variant),
        feed_forward=SwiGLU(width=FEED_FORWARD), numerics=Numerics(dtype="float32"), loss=LossConfig(chunk_tokens=512),
    )  # fmt: skip
    return RunConfig(batch_size=BATCH, seq_len=LENGTH, model=model)


def tokens() -> np.ndarray:
    """The same [B, T + 1] ids for every implementation."""
    return np.random.default_rng(0).integers(0, VOCABULARY, (BATCH, LENGTH + 1))


def kha_jax_step(variant: str) -> Step:
    """The trainer's own step, compiled, with its state donated."""
    import jax

    from kha_jax import sharding
    from kha_jax.training import make_trainer

    config = peer_run(variant)
    trainer = make_trainer(config, sharding.make_mesh(config.mesh))
    box = [jax.jit(trainer.init, out_shardings=trainer.shardings)(jax.random.key(0))]
    ids = tokens().astype(np.int32)
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (BATCH, 1))
    batch = {
        "tokens": ids[:, :-1], "targets": ids[:, 1:], "positions": positions, "segment_ids": np.zeros_like(positions),
        "weights": np.ones((BATCH, LENGTH), np.float32),
    }  # fmt: skip
    compiled = jax.jit(trainer.train_step, donate_argnums=0)

    def step():
        state, metrics = compiled(box.pop(), batch)
        box.append(jax.block_until_ready(state))

    return step


def transformers_step(compiled: bool) -> Step:
    """Qwen3 of the same shape in transformers: loss, backward, clipping and AdamW, as its Trainer does them."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.set_num_threads(os.cpu_count())
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=FEED_FORWARD, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).float()
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=7.5e-4, betas=(0.9, 0.95), weight_decay=0.1)
    ids = torch.from_numpy(tokens()[:, :-1].copy())

    def step():
        forward(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def matmul_step(size: int = 2048) -> Step:
    """One square float32 product in JAX, for the machine's matmul rate."""
    import jax
    import jax.numpy as jnp

    x, product = jnp.ones((size, size)), jax.jit(jnp.matmul)
    return lambda: product(x, x).block_until_ready()


def _serve(connection: Any, make: Callable[..., Step], arguments: tuple) -> None:
    """A worker: makes the step, then times it once for every message; (wall seconds, CPU seconds) each."""
    try:
        began = time.perf_counter()
        step = make(*arguments)
        step()
        connection.send(time.perf_counter() - began)
        step()
        while connection.recv():
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            connection.send((time.perf_counter() - wall, time.process_time() - cpu))
    except ImportError as error:
        connection.send(f"needs the extra: pip install -e '.[interop]' ({error})")


def interleave(makers: dict[str, tuple], rounds: int) -> dict[str, dict[str, float]]:
    """Median, minimum and CPU seconds of each step, taken in turns; what cannot run is printed with its reason."""
    context, workers = multiprocessing.get_context("spawn"), {}
    for name, (make, *arguments) in makers.items():
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, make, tuple(arguments)), daemon=True)
        process.start()
        theirs.close()
        try:
            first = ours.recv()
        except EOFError:
            first = "its process died"
        if isinstance(first, str):
            CONSOLE.print(f"left out {name}: {first}")
        else:
            workers[name] = (ours, process, first, [])
    for _ in range(rounds):
        for ours, _, _, times in workers.values():
            ours.send(True)
            times.append(ours.recv())
    out = {}
    for name, (ours, process, first, times) in workers.items():
        ours.send(False)
        process.join()
        wall, cpu = zip(*times)
        out[name] = {"median": statistics.median(wall), "minimum": min(wall), "cpu": statistics.median(cpu), "first": first}
    return out


def dense() -> dict[str, Any]:
    """See the module's docstring."""
    from kha_jax.accounting import account

    makers = {
        "matmul 2048^3": (matmul_step,), "baseline": (kha_jax_step, "baseline"), "KHA-MLP on v": (kha_jax_step, "mlp"),
        "KHA-Linear on q, k, v": (kha_jax_step, "linear"), "transformers eager": (transformers_step, False),
    }  # fmt: skip
    if TORCH_COMPILE.value:
        makers["transformers torch.compile"] = (transformers_step, True)
    results = interleave(makers, ROUNDS.value)
    matmul = results.pop("matmul 2048^3")
    rate = 2 * 2048**3 / matmul["median"]
    flops = {name: account(peer_run(v).model, LENGTH, tokens=BATCH * LENGTH).training_flops * BATCH * LENGTH for name, v in
             {"baseline": "baseline", "KHA-MLP on v": "mlp", "KHA-Linear on q, k, v": "linear"}.items()}  # fmt: skip
    table = Table(title=f"training step, peer shape, {machine()}; matmul rate {rate / 1e9:.0f} GFLOP/s")
    for column in ("", "median ms", "minimum ms", "CPU ms", "first step s", "GFLOP/s", "of matmul rate", "time / baseline"):
        table.add_column(column, justify="right")
    for name, row in results.items():
        achieved = flops.get(name, flops["baseline"]) / row["median"]
        row.update(gflops=achieved / 1e9, matmul_share=achieved / rate, ratio=row["median"] / results["baseline"]["median"])
        cells = [f"{row[key] * 1e3:.0f}" for key in ("median", "minimum", "cpu")]
        table.add_row(name, *cells, f"{row['first']:.1f}", f"{row['gflops']:.0f}", f"{row['matmul_share']:.0%}", f"{row['ratio']:.3f}")
    CONSOLE.print(table)
    return {"matmul_gflops": rate / 1e9, **results}


def startup() -> dict[str, Any]:
    """See the module's docstring."""
    out = {}
    with tempfile.TemporaryDirectory() as cache:
        for run in ("cold", "cached"):
            command = [sys.executable, "-m", "experiments.train", "--config.steps=2", f"--workdir={cache}/{run}"]
            began, environment = time.perf_counter(), {**os.environ, "KHA_JAX_CACHE": cache}
            with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
                for line in process.stderr:
                    if re.match("first step after", line):
                        out[run] = time.perf_counter() - began
            CONSOLE.print(f"{run}: first step {out[run]:.1f} s after the command, {machine()}")
    return out


def machine() -> str:
    """Processor, cores and versions that the figures belong to."""
    import jax

    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), name)
    return f"{os.cpu_count()} cores of {name}, jax {jax.__version__}"


def main() -> None:
    """Runs one suite."""
    figures = {"dense": dense, "startup": startup}[SUITE.value]()
    if JSON.value:
        try:
            with open(JSON.value, "w") as file:
                json.dump(figures, file, indent=1)
        except OSError as error:
            raise UsageError(f"--json={JSON.value} cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    command_line.run(main)
