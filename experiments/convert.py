"""Turns one run folder into another.

    python -m experiments.convert fold --workdir=runs/linear --out=runs/linear_folded
    python -m experiments.convert compress --workdir=runs/baseline --kv_heads=2 --out=runs/two

fold: folds linear mixers into the weights around them in float32, compares the logits with those
of the mixers applied to the activations, on random tokens, prints the largest change, and writes a
baseline run (config.json and a checkpoint of the same step) that every command reads.

compress: MEA's compression. Keys and values of each layer (of those from the twelfth on, with
--layers=12-) become combinations of --kv_heads basis heads, which alone are cached, by a singular
value decomposition over heads. Prints how far each layer's weights are from what they were and how
much the logits change, draws the former for all numbers of heads (compression.png, extra: plots),
and writes a run that every command reads and training continues.

The optimiser's moments start anew in what is written; its schedule does not.
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
from experiments.cli.command_line import UsageError
from experiments.run_folders import identity, stored
from kha_jax.accounting import cache_bytes
from kha_jax.analysis import costs, style
from kha_jax.attention import AttentionConfig
from kha_jax.attention.mixers import LinearMixer
from kha_jax.config import ConfigError, near, to_dict
from kha_jax.inference import compression
from kha_jax.inference.folding import fold_model, foldable_slots
from kha_jax.mesh import make_mesh
from kha_jax.model import ModelConfig
from kha_jax.runs.checkpoint import Checkpoints
from kha_jax.runs.manifest import folder_name, read_manifest
from kha_jax.storage import being_built, writable, write_json
from kha_jax.training.run_config import RunConfig
from kha_jax.training.run_folder import config_hash, write_registrations
from kha_jax.training.step import TrainState, make_trainer

WORKDIR = flags.DEFINE_string("workdir", None, "Required: run folder to read.")
OUT = flags.DEFINE_string("out", None, "Required: run folder to write; must not hold checkpoints.")
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


def write_run(
    folder: Path, config: RunConfig, step: int, variables: dict[str, Any], source: str
) -> None:
    """A run folder with one checkpoint, whose optimiser has no moments yet. It goes on with the
    text of the run that it was made from."""
    manifest = read_manifest(Path(source) / "checkpoints" / folder_name(step))
    trainer = make_trainer(config, make_mesh(config.mesh, jax.devices()[:1]))
    fresh = trainer.init(jax.random.key(config.seed)).optimizer
    schedule = fresh[-1]._replace(count=jnp.int32(step))
    state = TrainState(step=jnp.int32(step), optimizer=(*fresh[:-1], schedule), **variables)
    about = {**manifest, "config": config_hash(config), "converted_from": source}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with being_built(folder.parent, folder.name) as made:  # a run that is there is whole
            write_registrations(made, config)
            write_json(made / "config.json", to_dict(config))
            with Checkpoints(made / "checkpoints", about=lambda step: about) as checkpoints:
                checkpoints.save(step, state)
            made.rename(folder)
    except OSError as error:
        raise UsageError(f"--out={folder} cannot be written: {error.strerror}") from None


def on_activations(attention: AttentionConfig) -> AttentionConfig:
    """The attention with its linear mixers applied to activations: what folding has to equal."""
    linear = {s: m for s, m in attention.mixers().items() if isinstance(m, LinearMixer)}
    apart = {slot: mixer.replace(apply="activations") for slot, mixer in linear.items()}
    return attention.replace(**apart)


def new_folder() -> Path:
    """The folder of --out, tried before there is work to lose and left as it was.

    Raises:
        UsageError: it holds a run, or cannot be written.
    """
    out = stored.own_folder("out", OUT.value)
    try:
        if any((out / "checkpoints").glob("*")):
            raise UsageError(f"--out={out}: already holds checkpoints; name another folder")
        if there := out.exists():
            for one in out.iterdir():
                raise UsageError(f"--out={out}: already holds {one.name}; name another folder")
        writable(out)
        if not there:
            out.rmdir()
    except OSError as error:
        raise UsageError(f"--out={out} cannot be written: {error.strerror}") from None
    return out


def fold() -> None:
    """See the module's docstring."""
    out = new_folder()
    config, step, variables = stored.read_run(WORKDIR.value, STEP.value)
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
    write_run(out, config.with_model(model), step, folded, WORKDIR.value)
    print(
        f"folded {', '.join(slots)}: largest logit change {change.largest:.3g} of "
        f"{change.logit:.3g}, in float32; {out} is without them at step {step}"
    )


def compress() -> None:
    """See the module's docstring."""
    out, layers = new_folder(), re.fullmatch(r"(\d+)-", LAYERS.value)
    if KV_HEADS.value is None:
        raise UsageError("--kv_heads: is required; name fewer than the run has, such as 2")
    if not layers:
        raise UsageError(f"--layers={LAYERS.value}: write the first one and a dash, such as 12-")
    config, step, variables = stored.read_run(WORKDIR.value, STEP.value)
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
    write_run(out, written, step, changed, WORKDIR.value)
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


COMMANDS = {"fold": fold, "compress": compress}


def main(command: str = "") -> None:
    """Runs one command."""
    if command not in COMMANDS:
        raise UsageError(
            f"{command or 'no command'!r}: is not a command; {near(command, COMMANDS)}"
        )
    COMMANDS[command]()


if __name__ == "__main__":
    command_line.run(main, words=1)
