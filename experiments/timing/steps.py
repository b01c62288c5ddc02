"""Steps of any run: each function makes one that is called again and again."""

import jax
import numpy as np
from flax import linen as nn

from experiments.timing.turns import Step
from kha_jax import sharding
from kha_jax.inference.decoding import Decoder
from kha_jax.inference.folding import fold_if_linear
from kha_jax.mesh import MeshConfig, make_mesh
from kha_jax.model import ModelConfig
from kha_jax.training.run_config import RunConfig
from kha_jax.training.step import make_trainer

PROMPT, NEW, ROWS = 32, 64, 8  # of what is decoded


class TrainingStep:
    """The trainer's own step on one device and random tokens; each call takes the state of the last
    one. temporaries: bytes that it holds beside its arguments and results."""

    def __init__(self, config: RunConfig):
        mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        trainer = make_trainer(config.replace(mesh=MeshConfig()), mesh)
        self._compiled = trainer.lower().compile()
        self._batch = jax.device_put(random_batch(config), sharding.batch_sharding(mesh))
        self._state = trainer.init(jax.random.key(0))
        self.temporaries = self._compiled.memory_analysis().temp_size_in_bytes

    def __call__(self) -> None:
        self._state, _ = self._compiled(self._state, self._batch)
        jax.block_until_ready(self._state)


def random_batch(config: RunConfig) -> dict[str, np.ndarray]:
    """A batch of random tokens, a document a row."""
    shape = config.batch_size, config.seq_len
    draw = np.random.default_rng(0)
    ids = draw.integers(0, config.model.vocabulary_size, (shape[0], shape[1] + 1)).astype(np.int32)
    return {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "positions": np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1)),
        "segment_ids": np.zeros(shape, np.int32),
        "weights": np.ones(shape, np.float32),
    }


def decoding_step(
    model: ModelConfig, rows: int = ROWS, prompt: int = PROMPT, new: int = NEW
) -> Step:
    """So many greedy tokens after the prompt of each row, linear mixers folded."""
    variables = nn.unbox(jax.jit(model.build().init)(jax.random.key(0), np.zeros((1, 8), np.int32)))
    decoder = Decoder(*fold_if_linear(model, variables))
    ids = np.random.default_rng(1).integers(0, model.vocabulary_size, (rows, prompt)).tolist()
    return lambda: decoder.generate(ids, new)
