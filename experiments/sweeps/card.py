"""The card of one run: what it is, what it cost, where it came to, its spikes, what it writes."""

import logging
import statistics
from pathlib import Path
from typing import Any, Iterator

from rich.table import Table

from experiments.cli.codes import UsageError
from experiments.run_folders import stored
from experiments.run_folders.folder import use_compilation_cache
from experiments.train_loop.progress import clock
from kha_jax.accounting import account, cache_bytes
from kha_jax.analysis.reading import saved_steps
from kha_jax.config import ConfigError, to_dict
from kha_jax.errors import CheckpointError, DataError, StorageError
from kha_jax.metrics import column
from kha_jax.runs import goodput
from kha_jax.runs.manifest import folder_name, read_manifest
from kha_jax.spikes import SPIKING, find_spikes, spike_score
from kha_jax.training.run_config import RunConfig
from kha_jax.training.run_folder import read_tokenizer

WRITES = 100_000_000  # parameters of the largest model that a CPU writes with in seconds
PROMPT, WRITTEN = 48, 96  # tokens
SHORT = 600  # seconds
NAMED = 8  # steps with spikes
LATE = 0.1  # of the steps, over which the training loss is averaged
EVALUATED = {
    "val_loss": ("nats a token", ".4f"),
    "val_bits_per_byte": ("bits a byte", ".4f"),
    "val_accuracy": ("accuracy", ".1%"),
}
log = logging.getLogger("kha_jax")


def table(folder: Path, config: RunConfig, rows: list[dict[str, Any]]) -> Table:
    """What there is to say of a run with these lines of metrics."""
    made = Table("run", str(folder))
    for name, said in {
        **_what(config),
        **_cost(folder, config, rows),
        **_came_to(config, rows),
    }.items():
        made.add_row(name, said)
    return made


def _what(config: RunConfig) -> dict[str, str]:
    """The model and its data."""
    values, model = to_dict(config), config.model
    attention, own = values["model"]["attention"], account(model, config.seq_len)
    slots = {name: of["kind"] for name, of in attention.items() if isinstance(of, dict)}
    kinds = ", ".join(f"{name} {kind}" for name, kind in slots.items() if kind != "none")
    active = f", {own.active:,} active" if own.active != own.parameters else ""
    return {
        "data": values["data"]["source"],
        "model": f"layers {model.layers}, width {model.width}, ids {model.vocabulary_size:,}",
        "attention": kinds,
        "feed-forward": values["model"]["feed_forward"]["kind"],
        "parameters": f"{own.parameters:,}{active}, {own.mixing:,} in mixers",
        "batch": f"{config.batch_size} x {config.seq_len} tokens, seed {config.seed}",
    }


def _cost(folder: Path, config: RunConfig, rows: list[dict[str, Any]]) -> dict[str, str]:
    """What a token costs, and what training took."""
    own = account(config.model, config.seq_len, tokens=config.tokens_per_step)
    rates = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    steps = max(row["step"] for row in rows)
    tokens, cached = steps * config.tokens_per_step, cache_bytes(config.model)
    out = {
        "a token": f"{own.training_flops / 1e6:,.1f} MFLOP to train, {cached:,} bytes of cache",
        "trained": f"{steps} of {config.steps} steps, {tokens / 1e6:,.1f}M tokens, "
        f"{own.training_flops * tokens / 1e15:,.3g} PFLOP",
    }
    if rates:
        middle = statistics.median(rates)
        seconds = sum(config.tokens_per_step / rate for rate in rates)
        took = f"{clock(seconds)} h" if seconds > SHORT else f"{seconds:.0f} s"
        out["speed"] = f"{middle:,.0f} tokens a second, {took} of training"
    if timed := [found for found in map(goodput.of, rows) if found]:
        out["time"] = goodput.spelt(timed[-1])
    if hardware := _hardware(folder):
        out["on"] = hardware
    return out


def _hardware(folder: Path) -> str:
    """What the newest checkpoint was made on."""
    try:
        step = saved_steps(folder)[-1]
        return str(read_manifest(folder / "checkpoints" / folder_name(step))["hardware"])
    except (IndexError, KeyError, CheckpointError):
        return ""


def _came_to(config: RunConfig, rows: list[dict[str, Any]]) -> dict[str, str]:
    """Losses and spikes."""
    steps, losses = column(rows, "loss")
    late = losses[steps > (1 - LATE) * steps[-1]]
    out = {"training loss": f"{late.mean():.4f} over the last {len(late)} steps"}
    evaluated = [row for row in rows if row.get("val_loss") is not None]
    if evaluated:
        last = evaluated[-1]
        there = {name: form for name, form in EVALUATED.items() if last.get(name) is not None}
        said = (f"{last[name]:{form}} {what}" for name, (what, form) in there.items())
        best = min(evaluated, key=lambda row: row["val_loss"])
        out["validation"] = f"{', '.join(said)} at step {last['step']}; best at {best['step']}"
    found = [spike for name in SPIKING for spike in find_spikes(*column(rows, name), name)]
    named = ", ".join(f"{one.name} at {one.step}" for one in found[:NAMED])
    more = ", ..." if len(found) > NAMED else ""
    score = spike_score(rows)
    share = f", {score:.2%} of steps" if score == score else ""
    out["spikes"] = f"{len(found)}{share}{': ' if named else ''}{named}{more}"
    if lost := sum(bool(row.get("nonfinite")) for row in rows):
        out["not applied"] = f"{lost} steps that were not finite"
    return out


def samples(folder: Path, config: RunConfig) -> Iterator[str]:
    """How the newest checkpoint goes on with text that it was not trained on: what is likeliest,
    and a draw; nothing where that would take long or is not possible."""
    if account(config.model, 1).parameters > WRITES or not saved_steps(folder):
        return
    from kha_jax.inference.decoding import Decoder
    from kha_jax.inference.folding import fold_if_linear
    from kha_jax.inference.sampling import Sampling

    try:
        if (tokenizer := read_tokenizer(folder, config)) is None:
            return
        source = config.data.open("validation", config.seq_len, config.seed)
        prompt = source[0]["tokens"][: min(PROMPT, config.seq_len // 2)].tolist()
        _, step, variables = stored.read_run(str(folder))
    except (ConfigError, DataError, StorageError, UsageError) as error:
        log.info("no samples: %s", error)
        return
    use_compilation_cache()
    decoder = Decoder(*fold_if_linear(config.model, variables))
    for name, temperature in (("likeliest", 0.0), ("drawn at temperature 0.8", 0.8)):
        sampling = Sampling(temperature=temperature)
        end = tokenizer.end_of_document
        (row,) = decoder.generate([prompt], WRITTEN, sampling=sampling, seed=0, end=end)
        text = f"{tokenizer.decode(prompt)}[...]{tokenizer.decode(row)}"
        yield f"{name}, step {step}, after [...]:\n{text}"
