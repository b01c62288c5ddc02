"""Steps that are timed in turns, so that a noisy machine is noisy for all."""

import statistics
import time
from typing import Any, Callable, NamedTuple

import jax
import numpy as np
from flax import linen as nn

from kha_jax import sharding
from kha_jax.inference.decoding import Decoder
from kha_jax.inference.folding import fold_if_linear
from kha_jax.model import ModelConfig
from kha_jax.training.run_config import RunConfig
from kha_jax.training.step import make_trainer

Step = Callable[[], Any]
PROMPT, NEW, ROWS = 32, 64, 8  # of what is decoded


class Compiled(NamedTuple):
    """A step and the bytes of what it holds beside its arguments and results."""

    step: Step
    temporaries: int


def training_step(config: RunConfig) -> Compiled:
    """The trainer's own step on one device and random tokens; each call takes the state of the last
    one."""
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    trainer = make_trainer(config.replace(mesh=sharding.MeshConfig()), mesh)
    compiled = trainer.train_step.lower(trainer.abstract, trainer.abstract_batch).compile()
    shape = config.batch_size, config.seq_len
    ids = np.random.default_rng(0).integers(
        0, config.model.vocabulary_size, (shape[0], shape[1] + 1)
    )
    batch = {
        "tokens": ids[:, :-1].astype(np.int32),
        "targets": ids[:, 1:].astype(np.int32),
        "positions": np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1)),
        "segment_ids": np.zeros(shape, np.int32),
        "weights": np.ones(shape, np.float32),
    }
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    box = [trainer.init(jax.random.key(0))]

    def step():
        state, _ = compiled(box.pop(), batch)
        box.append(jax.block_until_ready(state))

    return Compiled(step, compiled.memory_analysis().temp_size_in_bytes)


def decoding_step(model: ModelConfig) -> Step:
    """NEW greedy tokens after PROMPT in each of ROWS rows, linear mixers folded."""
    variables = nn.unbox(jax.jit(model.build().init)(jax.random.key(0), np.zeros((1, 8), np.int32)))
    decoder = Decoder(*fold_if_linear(model, variables))
    ids = np.random.default_rng(1).integers(0, model.vocabulary_size, (ROWS, PROMPT)).tolist()
    return lambda: decoder.generate(ids, NEW)


def interleaved(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Median seconds of each step over so many turns, after two that are not counted."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(2 + rounds):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            times[name] += [time.perf_counter() - began] if turn > 1 else []
    return {name: statistics.median(of) for name, of in times.items()}
