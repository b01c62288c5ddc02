"""One batch of a run again, document by document: what `--replay_step` shows."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.cli.codes import UsageError
from experiments.run_folders import stored
from kha_jax import data
from kha_jax.runs.checkpoint import Checkpoints
from kha_jax.training.run_config import RunConfig
from kha_jax.training.run_folder import batch_sizes

POSITIONS = 256  # whose logits exist at once
SHOWN = 60  # characters of a document; of one that is no text, a quarter as many ids


def show(workdir: Path, step: int) -> None:
    """Prints a line for each document of the batch that step `step` of a run trains on: its row,
    window, number of predicted tokens, mean loss and beginning. The losses are those of the newest
    checkpoint before the step, or of the oldest that is kept. One device computes them, row by row.

    Raises:
        UsageError: there is no such run, or no such step of it, or it has no checkpoint.
        CheckpointError: the checkpoint is damaged.
    """
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        kept = checkpoints.steps()
    used = max((s for s in kept if s < step), default=kept[0] if kept else None)
    config, used, variables = stored.read_run(str(workdir), used)
    if step > config.steps:
        raise UsageError(f"--replay_step={step}: the run has {config.steps} steps")
    source = config.data.open("train", config.seq_len, config.seed)
    print(f"batch of step {step}, losses of the checkpoint of step {used}")
    order = data.window_order(len(source), config.seed)
    losses_of = jax.jit(lambda example: token_losses(config, variables, example))
    draws = data.Draws(batch_sizes(workdir, config))
    for row, draw in enumerate(draws(step - 1)):
        window = order[draw]
        example = source[window]
        losses, weights = np.asarray(losses_of(example)), example["weights"]
        for number in np.unique(example["segment_ids"]):
            inside = example["segment_ids"] == number
            tokens = weights[inside].sum()
            loss = (losses * weights)[inside].sum() / (tokens or np.nan)
            begin = _begin(config, example["tokens"][inside])
            print(f"row {row} window {window} tokens {tokens:.0f} loss {loss:.4f} {begin}")


def token_losses(config: RunConfig, variables: dict[str, Any], example: data.Example) -> jax.Array:
    """Nats of cross-entropy at each position of one window."""
    model = config.model.build()
    inputs = (example[name][None] for name in ("tokens", "positions", "segment_ids"))
    x_TD = model.apply(variables, *inputs, method="hidden")[0][0]

    def one(position):
        x_D, target = position
        logits_V = model.apply(variables, x_D[None, None], method="logits")[0, 0]
        return jax.nn.logsumexp(logits_V) - logits_V[target]

    return jax.lax.map(one, (x_TD, jnp.asarray(example["targets"])), batch_size=POSITIONS)


def _begin(config: RunConfig, ids: np.ndarray) -> Any:
    tokenizer = config.data.tokenizer()
    if tokenizer is not None:
        return repr(tokenizer.decode(ids[: 4 * SHOWN].tolist())[:SHOWN])
    return ids[: SHOWN // 4].tolist()
