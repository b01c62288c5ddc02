"""Compares ways for heads to interact under one budget.

    python -m experiments.zoo --config=configs/kha_tiny.py --match=params
    python -m experiments.zoo --match=cache,flops --add=mine.py:variant --csv=zoo.csv
    python -m experiments.zoo --check
    python -m experiments.zoo --scaling --out=figures

Every projection and every mechanism of configs/base.py, and what --add names, is brought to the
parameters, training FLOPs per token or cached numbers per token of the config without mixers, by
the one size that is free: the feed-forward's width, or what the cache is made of. The table says
what each has then; --measure times a training step and decoding. --check measures what every
variant has to keep (kha_jax/properties.py), a line each; exit code 1 names what fails. --scaling
draws step time and memory against the length, with what the accounting predicts.
"""

import csv
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any, Iterator, NamedTuple

import jax
from absl import flags
from rich.console import Console
from rich.table import Table

from configs import base
from experiments import command_line
from experiments.command_line import UsageError
from kha_jax.accounting import Accounting, account, cache_bytes
from kha_jax.attention import AttentionConfig
from kha_jax.budget import MEASURES, TOLERANCE, Fit, fit, folds, fused_kernel
from kha_jax.config import ConfigError, near
from kha_jax.model import ModelConfig
from kha_jax.training import RunConfig

CONFIG = command_line.define_config()
MATCH = flags.DEFINE_list(
    "match", ["params"], "params, flops or cache; or the cache and then one of the others."
)
ADD = flags.DEFINE_list("add", [], "Also FILE.py:VARIANT, configs of your own, by commas.")
MULTIPLE = flags.DEFINE_integer(
    "multiple", 1, "Feed-forward widths are multiples of it.", lower_bound=1
)
MEASURE = flags.DEFINE_bool("measure", False, "Also time a training step and decoding.")
ROUNDS = flags.DEFINE_integer("rounds", 8, "Turns of each in what is timed.", lower_bound=1)
JSON = flags.DEFINE_bool("json", False, "Print the table as JSON.")
CSV = flags.DEFINE_string("csv", None, "Also write the table to this file.")
CHECK = flags.DEFINE_bool("check", False, "Check what every variant has to keep instead.")
SCALING = flags.DEFINE_bool("scaling", False, "Time steps at several lengths instead.")
LENGTHS = flags.DEFINE_list("lengths", ["256", "512", "1024", "2048", "4096"], "Of --scaling.")
OUT = flags.DEFINE_string("out", "figures", "Folder of the figure of --scaling.")

log = logging.getLogger("kha_jax")
BROKEN = 1  # exit code of a check that failed
WAYS = 2  # devices that split the heads where collectives are counted


class Member(NamedTuple):
    """A model to compare, and the cache fields that make it what it is."""

    model: ModelConfig
    keep: tuple[str, ...] = ()


def plain(attention: AttentionConfig) -> AttentionConfig:
    """The projection alone."""
    return AttentionConfig(projection=attention.projection)


def members(config: RunConfig) -> Iterator[tuple[str, Member | ConfigError]]:
    """Every way by name, the baseline first; what the config's projection refuses, with the
    reason."""
    baseline = config.model.with_attention(plain)
    yield "baseline", Member(baseline)
    attention = baseline.attention
    makers = base.projections(attention)
    ways = {
        **{name: lambda a, name=name: base.projections(a)[name]() for name in makers},
        **{name: lambda a, name=name: base.varied(a, name) for name in base.variants(attention)},
    }
    for name, change in ways.items():
        try:
            model = baseline.with_attention(change)
        except ConfigError as error:
            yield name, error
        else:
            if model != baseline:
                yield name, Member(model, base.KEPT.get(name, ()))
    for named in ADD.value:
        path, _, variant = named.partition(":")
        run = command_line.load_variant(RunConfig, path, variant, "--add")
        yield f"{Path(path).stem}:{variant}" if variant else Path(path).stem, Member(run.model)


def known_members(config: RunConfig) -> dict[str, Member]:
    """`members`, the refused ones logged."""
    found = {}
    for name, member in members(config):
        if isinstance(member, ConfigError):
            log.info("left out %s: %s", name, member)
        elif name in found:
            raise UsageError(f"--add: there is a {name} already")
        else:
            found[name] = member
    return found


class Row(NamedTuple):
    """A line of the table. identity: whether mixers promise to start as their projection alone,
    None without any."""

    sizes: dict[str, int]
    errors: dict[str, float]
    parameters: int
    active: int
    training_flops: float
    cache_bytes: int
    collectives: dict[str, int] | None
    tpu: str | None
    gpu: str | None
    folds: bool | None
    identity: bool | None
    step_seconds: float | None = None
    decode_seconds: float | None = None


def row(config: RunConfig, fitted: Fit, cost: Accounting) -> Row:
    """What a fitted model has."""
    attentions = list(fitted.model.attentions().values())

    def fused(platform):
        found = {fused_kernel(a, platform, "bfloat16", config.seq_len) for a in attentions}
        return None if None in found else " ".join(sorted(found))

    keeps = all(attention.identity_at_start for attention in attentions)
    can_fold = {folds(attention) for attention in attentions}
    return Row(
        sizes=fitted.sizes,
        errors=fitted.errors,
        parameters=cost.parameters,
        active=cost.active,
        training_flops=cost.training_flops,
        cache_bytes=cache_bytes(fitted.model),
        collectives=collectives(attentions[-1], fitted.model.width),
        tpu=fused("tpu"),
        gpu=fused("gpu"),
        folds=False if False in can_fold else True if True in can_fold else None,
        identity=None if all(plain(a) == a for a in attentions) else keeps,
    )


def collectives(attention: AttentionConfig, width: int) -> dict[str, int] | None:
    """Those of a layer's forward pass whose heads are split over WAYS; None where they cannot
    be."""
    from kha_jax.properties import Layer, collectives_of

    try:
        return dict(collectives_of(Layer(attention, width), WAYS))
    except ConfigError:
        return None


def compare(config: RunConfig) -> tuple[Accounting, dict[str, Row], dict[str, ModelConfig]]:
    """The budget, the table, and the fitted models."""

    def count(model):
        return account(model, config.seq_len, tokens=config.tokens_per_step)

    found = known_members(config)
    budget, rows, models = count(found["baseline"].model), {}, {}
    for name, member in found.items():
        try:
            keep = member.keep
            fitted = fit(member.model, budget, MATCH.value, count, keep, MULTIPLE.value)
        except ConfigError as error:
            log.info("left out %s: %s", name, error.under("config.model"))
            continue
        rows[name] = row(config, fitted, count(fitted.model))
        models[name] = fitted.model
    return budget, rows, models


def measured(
    config: RunConfig, rows: dict[str, Row], models: dict[str, ModelConfig]
) -> tuple[float, dict[str, Row]]:
    """The machine's FLOP/s in one square product, and the rows with their times."""
    from experiments import peers
    from experiments.timing import decoding_step, interleaved, training_step

    steps = {"matmul": peers.matmul_step()}
    for name, model in models.items():
        log.info("compiling %s", name)
        steps[name] = training_step(config.replace(model=model)).step
    took = interleaved(steps, ROUNDS.value)
    tokens = interleaved({name: decoding_step(m) for name, m in models.items()}, ROUNDS.value)
    timed = {
        name: of._replace(step_seconds=took[name], decode_seconds=tokens[name])
        for name, of in rows.items()
    }
    return 2 * 2048**3 / took["matmul"], timed


def said(value: bool | None) -> str:
    return "" if value is None else "yes" if value else "no"


def show(rows: dict[str, Row], rate: float | None) -> None:
    """The table for people."""
    matched = " and ".join(MATCH.value)
    title = f"{matched} as the baseline's; collectives of a layer's forward pass, heads split in 2"
    if rate:
        title += f"; medians of {ROUNDS.value} turns, matmul rate {rate / 1e9:.0f} GFLOP/s"
    table = Table(title=title)
    names = ["", "solved", "off", "parameters", "training FLOPs a token", "cache, bytes a token"]
    names += ["collectives", "fused on TPU", "on GPU", "folds", "starts as none"]
    names += ["step ms", "ms for a token in 8 rows"] if rate else []
    for index, name in enumerate(names):
        table.add_column(name, justify="left" if index < 2 else "right")
    for name, row in rows.items():
        solved = ", ".join(f"{field.split('.')[-1]} {v:,}" for field, v in row.sizes.items())
        off = " ".join(
            f"{error:+.2%}{'' if abs(error) <= TOLERANCE else '!'}" for error in row.errors.values()
        )
        moved = "-" if row.collectives is None else _counts(row.collectives)
        cells = [name, solved, off, f"{row.parameters:,}", f"{row.training_flops / 1e6:,.3f}M"]
        cells += [f"{row.cache_bytes:,}", moved, row.tpu or "-", row.gpu or "-"]
        cells += [said(row.folds), said(row.identity)]
        if rate:
            from experiments.timing import NEW

            cells += [f"{row.step_seconds * 1e3:.1f}", f"{row.decode_seconds / NEW * 1e3:.2f}"]
        table.add_row(*cells)
    width = None if sys.stdout.isatty() else 210
    Console(soft_wrap=True, highlight=False, width=width).print(table)
    far = [
        name for name, row in rows.items() if any(abs(e) > TOLERANCE for e in row.errors.values())
    ]
    if far:
        print(
            f"! further than {TOLERANCE:.1%} from the budget, the nearest that its size allows: "
            + ", ".join(far)
        )


def _counts(found: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(found.items()))


def write_csv(path: str, rows: dict[str, Row]) -> None:
    """One line a variant; what is a group of figures is one column each."""
    flat = []
    for name, row in rows.items():
        values = {"variant": name, **row._asdict()}
        values["sizes"] = " ".join(f"{field}={value}" for field, value in row.sizes.items())
        values["collectives"] = _counts(row.collectives or {})
        errors = values.pop("errors")
        flat.append({**values, **{f"off_{measure}": error for measure, error in errors.items()}})
    try:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, flat[0])
            writer.writeheader()
            writer.writerows(flat)
    except OSError as error:
        raise UsageError(f"--csv={path} cannot be written: {error.strerror}") from None


def quickly_on_cpus() -> None:
    """Eight virtual devices, whose products are float32, and code that is not optimised, which
    compiles in a third of the time. jax reads this when it first computes."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}".strip()


def check(config: RunConfig) -> int:
    """A line for each variant, and the exit code."""
    from kha_jax.properties import check

    failed = []
    for name, member in known_members(config).items():
        began = time.perf_counter()
        found = check(member.model)
        broken = [f"{prop}: {of.text}" for prop, of in found.items() if of.holds is False]
        figures = [f"{prop} {of.figure:.1g}" for prop, of in found.items() if of.holds]
        words = f"FAILED {'; '.join(broken)}" if broken else f"ok {', '.join(figures)}"
        failed += [name] if broken else []
        print(f"{name:16} {words} ({time.perf_counter() - began:.1f} s)", flush=True)
    print(f"FAILED: {', '.join(failed)}" if failed else "all keep what they have to")
    return BROKEN if failed else command_line.DONE


def check_flags() -> None:
    """Raises UsageError where flags contradict each other."""
    for name in MATCH.value:
        if name not in MEASURES:
            raise UsageError(f"--match={name}: is not known; {near(name, MEASURES)}")
    if not MATCH.value or {"params", "flops"} <= set(MATCH.value):
        raise UsageError(
            f"--match={','.join(MATCH.value)}: parameters and FLOPs are met by one width; name one "
            "of params, flops, cache, or cache and one of the others"
        )
    if CHECK.value and SCALING.value:
        raise UsageError("--check: does nothing beside --scaling; leave out one of them")


def main() -> int | None:
    """See the module's docstring."""
    check_flags()
    config: RunConfig = command_line.parse_config(RunConfig, CONFIG)
    if CHECK.value:
        quickly_on_cpus()
        return check(config)
    if SCALING.value:
        from experiments import scaling

        return scaling.run(config, LENGTHS.value, ROUNDS.value, Path(OUT.value))
    jax.config.update("jax_num_cpu_devices", WAYS)
    budget, rows, models = compare(config)
    rate, rows = measured(config, rows, models) if MEASURE.value else (None, rows)
    if CSV.value:
        write_csv(CSV.value, rows)
    if JSON.value:
        shown: dict[str, Any] = {name: row._asdict() for name, row in rows.items()}
        matched = {name: MEASURES[name](budget) for name in MATCH.value}
        print(json.dumps({"budget": matched, "matmul_flops": rate, "variants": shown}, indent=1))
    else:
        show(rows, rate)
    return None


if __name__ == "__main__":
    command_line.run(main)
