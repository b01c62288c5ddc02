"""Turns one run folder into another, a stock checkpoint into a run, and a run into a stock one.

    python -m experiments.convert import --model=Qwen3-0.6B --out=runs/qwen3
    python -m experiments.convert export --workdir=runs/qwen3 --out=Qwen3-0.6B-trained
    python -m experiments.convert fold --workdir=runs/linear --out=runs/linear_folded
    python -m experiments.convert compress --workdir=runs/baseline --kv_heads=2 --out=runs/two

`python -m experiments.convert import --help` lists the flags of import, and so on. What is written
has no optimiser: training goes on with new moments, and with the schedule of its step.
"""

import logging
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.table import Table

from experiments.cli import command_line, terminal
from experiments.cli.codes import UsageError
from experiments.cli.commands import Command, command_of
from experiments.converting import stock
from experiments.converting.written import being_written, carry, new_folder, write_run
from experiments.run_folders import identity, stored
from kha_jax.accounting import cache_bytes
from kha_jax.analysis import costs, style
from kha_jax.attention import AttentionConfig
from kha_jax.attention.mixers import LinearMixer
from kha_jax.config import ConfigError
from kha_jax.inference import compression
from kha_jax.inference.folding import fold_model, foldable_slots
from kha_jax.model import ModelConfig
from kha_jax.runs.arrays import leaves
from kha_jax.runs.manifest import folder_name, read_manifest
from kha_jax.training.run_config import RunConfig
from kha_jax.training.run_folder import read_run

WORKDIR = flags.DEFINE_string("workdir", None, "Required: run folder to read.")
OUT = flags.DEFINE_string("out", None, "Required: folder to write; holds nothing yet.")
MODEL = flags.DEFINE_string(
    "model", None, "Required: folder with config.json and safetensors, as of Hugging Face."
)
SET = flags.DEFINE_multi_string(
    "set", [], "config.FIELD=VALUE of the run, such as mixers to insert; may be repeated."
)
VERIFY = flags.DEFINE_bool(
    "verify", True, "Compare the logits with those of transformers first (extra: interop)."
)
DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "Of all tensors; as they were imported by default."
)
SHARD_SIZE = flags.DEFINE_string(
    "shard_size", None, "Largest file, such as 5GB; the files that were imported by default."
)
EXPERTS = flags.DEFINE_enum(
    "experts", None, ["split", "fused"], "A tensor each, or one a layer; as imported by default."
)
TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "Folder whose tokenizer files are written; those imported by default."
)
STEP = flags.DEFINE_integer("step", None, "Checkpoint to read; the newest good one by default.")
TOLERANCE = flags.DEFINE_float(
    "tolerance",
    None,
    "Largest accepted change of a logit, relative to the largest one; 1e-3 by default in fold, "
    "any in compress.",
    lower_bound=0,
)
KV_HEADS = flags.DEFINE_integer(
    "kv_heads", None, "Required by compress: heads that it leaves in the cache."
)
LAYERS = flags.DEFINE_string("layers", "0-", "N-: compress the layers from number N on.")

FOLDED = 1e-3  # of the largest logit, that folding may change
LARGE = 0.1  # of the logits' spread, from which on a compressed run is said to need training
FLAG_OF = {"attention.projection.kv_heads": "kv_heads", "later.layer": "layers"}

log = logging.getLogger("kha_jax")


class Change(NamedTuple):
    """Of the logits. largest: change of one. logit: the largest one. share: spread of the changes
    over the vocabulary by the spread of the logits, both root mean squares around their means."""

    largest: float
    logit: float
    share: float

    def check(self, tolerance: float) -> None:
        """Raises UsageError where a logit changes by more than this share of the largest one."""
        if not self.largest <= tolerance * self.logit:
            raise UsageError(
                f"--tolerance={tolerance}: a logit changes by {self.largest:.3g} of "
                f"{self.logit:.3g}; nothing written"
            )


def logit_change(
    before: tuple[ModelConfig, Any], after: tuple[ModelConfig, Any], seq_len: int
) -> Change:
    """Over two rows of random tokens, both models computed in float32."""
    ids = (
        np.random.default_rng(0)
        .integers(0, before[0].vocabulary_size, (2, min(seq_len, 256)))
        .astype(np.int32)
    )

    def logits(model, variables):
        exact = model.replace(numerics=model.numerics.replace(dtype="float32"))
        return np.asarray(jax.jit(exact.build().apply)(variables, jnp.asarray(ids)))

    first, second = logits(*before), logits(*after)
    change = second - first
    share = _spread(change) / (_spread(first) or 1.0)
    return Change(float(np.abs(change).max()), float(np.abs(first).max()), share)


def _spread(z: np.ndarray) -> float:
    """Over the last axis, around its mean."""
    return float(np.sqrt(z.var(axis=-1).mean()))


def made_of(
    source: Path, out: Path, config: RunConfig, step: int, variables: dict[str, Any]
) -> None:
    """Writes a run made of that of --workdir, with whose text it goes on."""
    about = read_manifest(source / "checkpoints" / folder_name(step))
    about["converted_from"] = WORKDIR.value
    with being_written(out) as made:
        carry(source, made)
        write_run(made, config, step, leaves(variables).items(), about)


def on_activations(attention: AttentionConfig) -> AttentionConfig:
    """The attention with its linear mixers applied to activations: what folding has to equal."""
    linear = {s: m for s, m in attention.mixers().items() if isinstance(m, LinearMixer)}
    apart = {slot: mixer.replace(apply="activations") for slot, mixer in linear.items()}
    return attention.replace(**apart)


def fold() -> None:
    """Folds linear mixers into the weights around them.

        python -m experiments.convert fold --workdir=runs/linear --out=runs/linear_folded

    In float32; compares the logits with those of the mixers applied to the activations, on random
    tokens, prints the largest change, and writes a baseline run of the same step.
    """
    out, source = new_folder(OUT.value), stored.run_folder("workdir", WORKDIR.value)
    config, step, variables = read_run(source, STEP.value)
    try:
        slots = foldable_slots(config.model)
    except ConfigError as error:
        raise UsageError(str(error.under("config.model"))) from None
    if not slots:
        raise UsageError(f"--workdir={WORKDIR.value}: nothing to fold; no mixer of q, k or v")
    model, folded = fold_model(config.model, variables)
    unfolded = config.model.with_attention(on_activations)
    change = logit_change((unfolded, variables), (model, folded), config.seq_len)
    change.check(FOLDED if TOLERANCE.value is None else TOLERANCE.value)
    made_of(source, out, config.with_model(model), step, folded)
    print(
        f"folded {', '.join(slots)}: largest logit change {change.largest:.3g} of "
        f"{change.logit:.3g}, in float32; {out} is without them at step {step}"
    )


def compress() -> None:
    """Makes keys and values of each layer combinations of fewer heads, which alone are cached.

        python -m experiments.convert compress --workdir=runs/baseline --kv_heads=2 --out=runs/two

    MEA's compression, by a singular value decomposition over heads; with --layers=12- of the layers
    from the twelfth on. Prints how far each layer's weights are from what they were and how much
    the logits change, draws the former for all numbers of heads (compression.png, extra: plots),
    and writes a run that every command reads and training continues.
    """
    out, layers = new_folder(OUT.value), re.fullmatch(r"(\d+)-", LAYERS.value)
    if KV_HEADS.value is None:
        raise UsageError("--kv_heads: is required; name fewer than the run has, such as 2")
    if not layers:
        raise UsageError(f"--layers={LAYERS.value}: write the first one and a dash, such as 12-")
    source = stored.run_folder("workdir", WORKDIR.value)
    config, step, variables = read_run(source, STEP.value)
    if config.optimizer.mixer.decay == "to_identity":
        problem = "pulls the composition to where it did not start; use weights or none"
        raise UsageError(f"config.optimizer.mixer.decay: 'to_identity' {problem}")
    try:
        first = int(layers[1])
        model, changed, profiles = compression.compress(
            config.model, variables, KV_HEADS.value, first
        )
    except ConfigError as error:
        if flag := FLAG_OF.get(error.field):
            raise UsageError(f"--{flag}={flags.FLAGS[flag].value}: {error.problem}") from None
        raise UsageError(f"--workdir={WORKDIR.value}: {error.under('config.model')}") from None
    change = logit_change((config.model, variables), (model, changed), config.seq_len)
    if TOLERANCE.value is not None:
        change.check(TOLERANCE.value)
    written = config.with_model(model)
    made_of(source, out, written, step, changed)
    show_profiles(profiles, KV_HEADS.value)
    before, after = (cache_bytes(m) for m in (config.model, model))
    print(
        f"largest logit change {change.largest:.3g} of {change.logit:.3g}, in float32; a token's "
        f"cache takes {after:,} bytes, before {before:,} ({after / before:.1%})"
    )
    if change.share > LARGE:
        log.warning(
            "warning: the logits change by %.0f%% of their spread over the vocabulary (root mean "
            "square); train on before it is used, or compress less",
            100 * change.share,
        )
    settings = " ".join(identity.settings(config, written))
    print(f"{out} is compressed at step {step}; to train on, add --workdir={out} {settings}")
    try:
        style.save(lambda: costs.compression(profiles, KV_HEADS.value), out / "compression")
    except style.PlotsMissing as error:
        log.info("no figure: %s", error)


def show_profiles(profiles: dict[str, dict[int, np.ndarray]], heads: int) -> None:
    """What each layer loses with each number of heads."""
    table = Table(title=f"relative error of the weights of {heads} heads, and of one more and less")
    for name in ("layer", *profiles):
        table.add_column(name, justify="right")
    for layer in next(iter(profiles.values())):
        cells = []
        for of in profiles.values():
            around = range(max(heads - 1, 1), min(heads + 1, len(of[layer])) + 1)
            cells.append(", ".join(f"{n}: {of[layer][n - 1]:.3f}" for n in around))
        table.add_row(str(layer), *cells)
    terminal.show(table)


def import_stock() -> None:
    """Makes a run of a stock checkpoint.

        python -m experiments.convert import --model=Qwen3-0.6B --out=runs/qwen3
        python -m experiments.convert import --model=Qwen3-0.6B --out=runs/qwen3_mlp
            --set=config.model.attention.value.kind=mlp

    Reads a folder of Hugging Face's (config.json, safetensors) of the families that
    docs/stock_checkpoints.md lists. Mixers that --set inserts start as the identity, so that the
    run begins as the stock model; --verify shows it against transformers, in float32. What came
    beside the weights is kept in RUN/stock, for the way back.
    """
    stock.import_run(MODEL.value, OUT.value, SET.value, VERIFY.value)


def export_stock() -> None:
    """Makes a stock checkpoint of a run.

        python -m experiments.convert export --workdir=runs/qwen3 --out=Qwen3-0.6B-trained

    Linear mixers are folded into the weights in float32, which are then cast to the dtype that they
    were imported with, or --dtype. transformers reads the folder without code of its own; --verify
    compares the logits, and shows what folding and the cast change.
    """
    layout = DTYPE.value, SHARD_SIZE.value, EXPERTS.value, TOKENIZER.value
    stock.export_run(WORKDIR.value, OUT.value, STEP.value, *layout, verify=VERIFY.value)


COMMANDS = {
    "import": Command(import_stock, ("model", "out", "set", "verify")),
    "export": Command(
        export_stock,
        ("workdir", "out", "step", "dtype", "shard_size", "experts", "tokenizer", "verify"),
    ),
    "fold": Command(fold, ("workdir", "out", "step", "tolerance")),
    "compress": Command(compress, ("workdir", "out", "step", "tolerance", "kv_heads", "layers")),
}


def main(command: str = "") -> None:
    """Runs one command."""
    command_of(COMMANDS, [command] if command else []).main()


if __name__ == "__main__":
    command_line.run(main, words=1, commands=COMMANDS)
