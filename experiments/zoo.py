"""Compares ways for heads to interact under one budget.

    python -m experiments.zoo --config=configs/kha_tiny.py --match=params
    python -m experiments.zoo --match=cache,flops --add=mine.py:variant --csv=zoo.csv
    python -m experiments.zoo --train=300 --seeds=3 --only=mlp,linear,mea --out=runs/zoo

Every projection and every mechanism of configs/base.py, and what --add names, is brought to the
parameters, training FLOPs per token or cached numbers per token of the config without mixers, by
the one size that is free: the feed-forward's width, or what the cache is made of. The table says
what each has then; --measure times a training step and decoding; --train trains each over seeds, in
folders of a sweep, and goes on where it was stopped. What each has to keep is
measured by experiments.check, step time against the length by experiments.benchmark.
"""

import csv
import json
import logging
import sys
from pathlib import Path
from typing import Any

import jax
from absl import flags
from rich.table import Table

from experiments.cli import codes, command_line, config_files, terminal
from experiments.cli.codes import UsageError
from experiments.run_folders import results, stored
from experiments.run_folders.identity import changed
from experiments.sweeps import members, planned, runner
from experiments.sweeps.members import Member, Row
from experiments.sweeps.planned import Planned, Wanted
from kha_jax.analysis.significance import paired
from kha_jax.comparing.budget import MEASURES, TOLERANCE
from kha_jax.training.run_config import RunConfig
from kha_jax.training.run_folder import read_config

command_line.define_config()
MATCH = flags.DEFINE_list(
    "match", ["params"], "params, flops or cache; or the cache and then one of the others."
)
ADD = flags.DEFINE_list("add", [], "Also FILE.py:VARIANT, configs of your own, by commas.")
ONLY = flags.DEFINE_list("only", [], "Of all variants, these, the baseline and --add.")
MULTIPLE = flags.DEFINE_integer(
    "multiple", 1, "Feed-forward widths are multiples of it.", lower_bound=1
)
MEASURE = flags.DEFINE_bool("measure", False, "Also time a training step and decoding.")
ROUNDS = flags.DEFINE_integer("rounds", 8, "Turns of each in what is timed.", lower_bound=1)
TRAIN = flags.DEFINE_integer("train", None, "Steps to also train each for.", lower_bound=1)
SEEDS = flags.DEFINE_integer("seeds", 1, "Runs of each in --train.", lower_bound=1)
JSON = flags.DEFINE_bool("json", False, "Print the table as JSON.")
CSV = flags.DEFINE_string("csv", None, "Also write the table to this file.")
OUT = flags.DEFINE_string("out", None, "Folder of --train; runs/zoo by default.")

log = logging.getLogger("kha_jax")


def measured(found: dict[str, Member], rows: dict[str, Row]) -> tuple[float, dict[str, Row]]:
    """The machine's FLOP/s in one square product, and the rows with their times."""
    from experiments.timing import peers, turns
    from experiments.timing.steps import TrainingStep, decoding_step

    steps = {"matmul": peers.matmul_step()}
    for name, member in found.items():
        log.info("compiling %s", name)
        steps[name] = TrainingStep(member.run)
    took = turns.here(steps, ROUNDS.value)
    decoders = {name: decoding_step(member.run.model) for name, member in found.items()}
    tokens = turns.here(decoders, ROUNDS.value)
    timed = {
        name: of._replace(step_seconds=took[name], decode_seconds=tokens[name])
        for name, of in rows.items()
    }
    return 2 * 2048**3 / took["matmul"], timed


def sweep_of(found: dict[str, Member]) -> runner.Sweep:
    """The runs of --train in the folder of a sweep, which holds none of them under another budget
    or with other settings."""
    usual = str(config_files.REPOSITORY / "runs" / "zoo")
    folder = stored.own_folder("out", usual if OUT.value is None else OUT.value)
    steps = f"--config.steps={TRAIN.value}"
    wanted = [Wanted(name, (*member.line(), steps), "baseline") for name, member in found.items()]
    sweep = runner.Sweep(folder, planned.runs(wanted, SEEDS.value))
    for run in sweep.runs:
        check_free(folder, run)
    fields = ("name", "baseline", "printed", "note")
    about = {
        "title": f"Ways for heads to interact at the same {' and '.join(MATCH.value)}",
        "command": " ".join(["python -m experiments.zoo", *sys.argv[1:]]),
        "scale": None,
        "commit": results.commit(),
        "rows": [{field: getattr(row, field) for field in fields} for row in wanted],
    }
    sweep.begin(about)
    return sweep


def check_free(folder: Path, run: Planned) -> None:
    """Raises UsageError where a folder of --train holds the run with what learns otherwise."""
    path = folder / run.name / "config.json"
    if not path.exists() or not any((path.parent / "checkpoints").glob("*")):
        return
    old = read_config(path.parent)
    for field, (before, after) in changed(old, run.config).items():
        raise UsageError(
            f"--out={folder}: {run.name} there began with config.{field}={before!r}, these flags "
            f"make it {after!r} (--train, --match, --multiple and --config decide that); name "
            "another --out"
        )


def trained(sweep: runner.Sweep, rows: dict[str, Row]) -> tuple[int, dict[str, Row]]:
    """Trains what is missing; the exit code, and the rows with their losses."""
    code = codes.DONE
    for run in sweep.missing():
        log.info("training %s", run.name)
        ended = sweep.train(run, lambda: None)
        if ended == codes.PREEMPTED:
            return ended, rows
        if ended is None:
            log.info("left out %s: another process trains it", run.name)
        elif ended:
            log.info("%s failed with %d: %s", run.name, ended, sweep.why(run))
            code = code or ended
    losses: dict[str, dict[int, float]] = {name: {} for name in rows}
    for result in sweep.done().values():
        losses[result.row][result.seed] = result.val_loss
    out = {}
    for name, row in rows.items():
        own, first = losses[name], losses["baseline"]
        out[name] = row._replace(
            loss=interval(own, dict.fromkeys(own, 0.0)),
            difference=interval(own, first) if name != "baseline" else None,
        )
    return code, out


def interval(
    values: dict[int, float], baseline: dict[int, float]
) -> tuple[float, float | None] | None:
    """(mean, half width of its 95% interval) of what is above the baseline, by seed."""
    found = paired(values, baseline)
    if not found.count:
        return None
    return found.mean, found.high - found.mean if found.count > 1 else None


def columns(name: str, row: Row) -> dict[str, str]:
    """What the table for people says of a row."""
    from experiments.timing.steps import NEW

    def yes(value):
        return "" if value is None else "yes" if value else "no"

    def with_width(pair, sign=""):
        if pair is None:
            return ""
        return f"{pair[0]:{sign}.4f}" + ("" if pair[1] is None else f" ± {pair[1]:.4f}")

    off = (f"{e:+.2%}{'' if abs(e) <= TOLERANCE else '!'}" for e in row.errors.values())
    out = {
        "": name,
        "solved": ", ".join(f"{path.split('.')[-1]} {size:,}" for path, size in row.sizes.items()),
        "off": " ".join(off),
        "parameters": f"{row.parameters:,}",
        "training FLOPs a token": f"{row.training_flops / 1e6:,.3f}M",
        "cache, bytes a token": f"{row.cache_bytes:,}",
        "collectives": "-" if row.collectives is None else counts(row.collectives),
        "fused on TPU": row.tpu or "-",
        "on GPU": row.gpu or "-",
        "folds": yes(row.folds),
        "starts as the identity": yes(row.identity),
    }
    if row.step_seconds:
        out["step ms"] = f"{row.step_seconds * 1e3:.1f}"
        out["ms a token in 8 rows"] = f"{row.decode_seconds / NEW * 1e3:.2f}"
    if row.loss:
        out["validation loss"] = with_width(row.loss)
        out["less the baseline's"] = with_width(row.difference, "+")
    return out


def show(rows: dict[str, Row], rate: float | None) -> None:
    """The table for people."""
    matched = " and ".join(MATCH.value)
    title = f"{matched} as the baseline's; collectives of a layer's forward pass, heads split in 2"
    if rate:
        title += f"; medians of {ROUNDS.value} turns, matmul rate {rate / 1e9:.0f} GFLOP/s"
    lines = [columns(name, row) for name, row in rows.items()]
    names = list(dict.fromkeys(column for line in lines for column in line))
    table = Table(title=title)
    for index, name in enumerate(names):
        table.add_column(name, justify="left" if index < 2 else "right")
    for line in lines:
        table.add_row(*(line.get(name, "") for name in names))
    terminal.show(table)
    far = [name for name, row in rows.items() if max(map(abs, row.errors.values())) > TOLERANCE]
    if far:
        nearest = f"further than {TOLERANCE:.1%} from the budget, the nearest that its size allows"
        print(f"! {nearest}: {', '.join(far)}")


def counts(found: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(found.items()))


def write_csv(path: str, rows: dict[str, Row]) -> None:
    """One line a variant; what is a group of figures is one column each."""
    flat = []
    for name, row in rows.items():
        values: dict[str, Any] = {"variant": name, **row._asdict()}
        values["sizes"] = " ".join(f"{field}={value}" for field, value in row.sizes.items())
        values["collectives"] = counts(row.collectives or {})
        for pair in ("loss", "difference"):
            values[pair], values[f"{pair}_half_width"] = values[pair] or (None, None)
        errors = values.pop("errors")
        flat.append({**values, **{f"off_{measure}": error for measure, error in errors.items()}})
    try:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, flat[0])
            writer.writeheader()
            writer.writerows(flat)
    except OSError as error:
        raise UsageError(f"--csv={path} cannot be written: {error.strerror}") from None


def check_flags() -> None:
    """Flags that do nothing beside each other are refused."""
    command_line.refuse_empty(MATCH, ADD, ONLY, CSV)
    needs = {"rounds": MEASURE, "seeds": TRAIN, "out": TRAIN}
    for name, other in needs.items():
        if flags.FLAGS[name].present and not other.value:
            raise UsageError(f"--{name}: does nothing without --{other.name}")


def main() -> int | None:
    """See the module's docstring."""
    check_flags()
    members.check_match(MATCH.value)
    config: RunConfig = command_line.parse_config(RunConfig)
    found = members.members(config, ADD.value, ONLY.value)
    jax.config.update("jax_num_cpu_devices", members.WAYS)
    budget, found, rows = members.fitted(found, MATCH.value, MULTIPLE.value)
    # what cannot be trained or written is known before hours of training
    sweep = sweep_of(found) if TRAIN.value else None
    if CSV.value:
        write_csv(CSV.value, rows)
    rate, code = None, codes.DONE
    if MEASURE.value:
        rate, rows = measured(found, rows)
    if sweep:
        code, rows = trained(sweep, rows)
    if CSV.value:
        write_csv(CSV.value, rows)
    if JSON.value:
        shown = {name: row._asdict() for name, row in rows.items()}
        matched = {name: MEASURES[name](budget) for name in MATCH.value}
        print(json.dumps({"budget": matched, "matmul_flops": rate, "variants": shown}, indent=1))
    else:
        show(rows, rate)
    return code


if __name__ == "__main__":
    command_line.run(main)
