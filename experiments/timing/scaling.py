"""Step time and memory of ways for heads to interact against the length of a row."""

import logging
import re
from pathlib import Path
from typing import Any

from rich.table import Table

from configs import base
from experiments.cli import terminal
from experiments.cli.codes import UsageError
from experiments.timing import turns
from experiments.timing.steps import TrainingStep
from kha_jax.analysis import costs, style
from kha_jax.attention import AttentionConfig
from kha_jax.config import ConfigError
from kha_jax.storage import write_json
from kha_jax.training.run_config import RunConfig

WAYS = ("baseline", "linear", "mlp", "talking", "mea", "mixture", "gated_elements")
log = logging.getLogger("kha_jax")


def lengths_of(texts: list[str]) -> list[int]:
    """Raises UsageError where one is no length."""
    for text in texts:
        if not re.fullmatch("[0-9]{1,9}", text) or int(text) < 2:
            problem = f"{text!r} is no length of a row; write numbers from 2 on, such as 256,512"
            raise UsageError(f"--lengths={','.join(texts)}: {problem}")
    if not texts:
        raise UsageError("--lengths: names none; write numbers from 2 on, such as 256,512")
    return sorted(set(map(int, texts)))


def runs_of(config: RunConfig, length: int) -> dict[str, RunConfig]:
    """The config in each of WAYS, with rows of this length and as many tokens a step as before, or
    one row."""
    rows = max(1, config.tokens_per_step // length)
    sizes = {"seq_len": length, "batch_size": rows, "accumulation": 1}

    def varied(way):
        def change(attention):
            return base.varied(AttentionConfig(projection=attention.projection), way)

        return config.replace(model=config.model.with_attention(change), **sizes)

    return {way: varied(way) for way in WAYS}


def measure(config: RunConfig, length: int, rounds: int) -> dict[str, costs.Cost]:
    """What a step of each way costs; they take turns."""
    runs = runs_of(config, length)
    log.info("compiling %d steps of %d tokens a row", len(runs), length)
    steps = {way: TrainingStep(run) for way, run in runs.items()}
    seconds = turns.here(steps, rounds)
    return {
        way: costs.Cost(seconds[way], steps[way].temporaries, run.cost().training_flops)
        for way, run in runs.items()
    }


def run(config: RunConfig, lengths: list[str], rounds: int, out: Path) -> dict[str, Any]:
    """Measures, prints, writes `scaling.json` and the figure, and returns what the file holds.

    Raises:
        UsageError: the lengths, the folder, or an extra that is missing.
    """
    checked = lengths_of(lengths)
    try:
        found = {length: measure(config, length, rounds) for length in checked}
    except ConfigError as error:
        raise UsageError(str(error.under("config"))) from None
    show(found, rounds)
    as_json = {str(n): {way: c._asdict() for way, c in of.items()} for n, of in found.items()}
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "scaling.json", as_json)
        style.save(lambda: costs.scaling(found), out / "scaling")
    except OSError as error:
        raise UsageError(f"--out={out} cannot be written: {error.strerror}") from None
    except style.PlotsMissing as error:
        raise UsageError(str(error)) from None
    print(f"wrote {out / 'scaling.png'}, .pdf, .svg and .json")
    return as_json


def show(found: dict[int, dict[str, costs.Cost]], rounds: int) -> None:
    """The ratios to the baseline as a table."""
    title = f"over the baseline: step time (predicted), temporaries; medians of {rounds} turns"
    table = Table(title=title)
    for name in ("", *map(str, found)):
        table.add_column(name, justify="right")
    for way in WAYS:
        cells = []
        for of in found.values():
            ours, first = of[way], of["baseline"]
            time = f"{ours.seconds / first.seconds:.2f} ({ours.flops / first.flops:.2f})"
            cells.append(f"{time}, {ours.temporaries / first.temporaries:.2f}")
        table.add_row(way, *cells)
    absolute = [
        f"{of['baseline'].seconds * 1e3:.0f} ms, {of['baseline'].temporaries / 2**20:.0f} MiB"
        for of in found.values()
    ]
    table.add_row("the baseline's", *absolute)
    terminal.show(table)
