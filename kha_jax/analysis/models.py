"""What needs a run's config besides its arrays: its streams on its own data, and its costs.

Legend: L layers, R rows (tokens), N heads, H head width.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from kha_jax.accounting import Accounting
from kha_jax.analysis.reading import MIXER, Run
from kha_jax.attention.mixers import StreamMixerModule
from kha_jax.ops.linear import affine


class Stream(NamedTuple):
    """One stream of a model on some tokens, before and after its mixer, both [L, R, N, H]."""

    before: np.ndarray
    after: np.ndarray


def streams(run: Run, rows: int = 4) -> dict[str, Stream]:
    """The mixable streams (query, key, value) of every layer on the first `rows` sequences of the
    run's validation data, padding left out. Reads all parameters and runs the model once."""
    config = run.run_config()
    source = config.data.open("validation", config.seq_len, config.seed)
    examples = [source[index] for index in range(min(rows, len(source)))]
    batch = {name: np.stack([example[name] for example in examples]) for name in examples[0]}
    model = config.model.replace(numerics=config.model.numerics.replace(dtype="float32")).build()
    variables = {name: run.checkpoint.tree(name) for name in ("params", "balance")}
    real = batch["weights"].astype(bool)
    seen: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}

    def keep(slot, before, after):
        seen.setdefault(slot, []).append((np.asarray(before)[real], np.asarray(after)[real]))

    def watch(call, arguments, keywords, context):
        out = call(*arguments, **keywords)
        if isinstance(context.module, StreamMixerModule) and context.method_name == "project":
            slot = context.module.name.removesuffix(MIXER)
            jax.debug.callback(keep, slot, affine(*arguments), out, ordered=True)
        return out

    def forward(variables, tokens, positions, segment_ids):
        with nn.intercept_methods(watch):
            return model.apply(variables, tokens, positions, segment_ids, method="hidden")[0]

    inputs = (batch[name] for name in ("tokens", "positions", "segment_ids"))
    jax.block_until_ready(jax.jit(forward)(variables, *inputs))
    jax.effects_barrier()
    layers = sum(run.segments().values())
    return {slot: Stream(*(_by_layer(z, layers) for z in zip(*seen[slot]))) for slot in seen}


def _by_layer(parts: tuple[np.ndarray, ...], layers: int) -> np.ndarray:
    """Streams [R, some of the heads, H] in the order in which the model made them, as
    [L, R, N, H]."""
    several = len(parts) // layers
    made = [parts[first : first + several] for first in range(0, len(parts), several)]
    return np.stack([np.concatenate(heads, axis=1) for heads in made])


class Variant(NamedTuple):
    """One row of the table of variants. tokens: trained on. loss: nats per token on validation
    data, the last that was measured; bits_per_byte: the same per byte of text, NaN for other data.
    """

    name: str
    cost: Accounting
    tokens: int
    loss: float
    bits_per_byte: float


def variants(runs: list[Run]) -> list[Variant]:
    """What each run costs by the accounting, and where it has come to."""
    return [_variant(run) for run in runs]


def _variant(run: Run) -> Variant:
    config, rows = run.run_config(), run.metrics()
    last: dict[str, Any] = {}
    for row in rows:
        last |= row
    loss, bits = (
        math.nan if last.get(name) is None else last[name]
        for name in ("val_loss", "val_bits_per_byte")
    )
    return Variant(
        name=run.name,
        cost=config.cost(),
        tokens=last.get("step", 0) * config.tokens_per_step,
        loss=loss,
        bits_per_byte=bits,
    )
