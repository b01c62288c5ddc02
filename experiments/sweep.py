"""Trains the rows of a table, or a free ablation, over seeds, and sums them up.

    python -m experiments.sweep --table=2 --scale=tiny --seeds=3 --out=runs/table2
    python -m experiments.sweep --configs=configs/kha_tiny.py:baseline,configs/kha_tiny.py:mlp \
        --set=config.optimizer.warmup_fraction=0.01,0.05 --set=config.steps=200 --out=runs/warmup
    python -m experiments.sweep --table=2 --scale=small --index=$SLURM_ARRAY_TASK_ID

Each run is a process of experiments.train with a folder of its own below --out. The same command
goes on where it was stopped, skips what is finished, goes past a run that fails, and may be started
several times at once. Runs of one seed have the same data in the same order and, wherever they have
the same parameters, the same initial values: their differences are paired. `python -m
experiments.report --sweep=FOLDER` draws what came of it. Exit codes: 0 done, 75 stopped, else that
of the first run that failed, 70 where a signal has ended it.
"""

import logging
import os
import shlex
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from rich import box
from rich.live import Live
from rich.table import Table

from configs.tables import SCALES, TABLES, load
from experiments.cli import codes, command_line, config_files, terminal
from experiments.cli.codes import UsageError
from experiments.run_folders import results, stored
from experiments.sweeps import members, planned
from experiments.sweeps.planned import Planned, Wanted
from experiments.sweeps.runner import LOG, Sweep
from kha_jax.config import near
from kha_jax.runs.results import RunResult
from kha_jax.training.run_config import RunConfig

TABLE = flags.DEFINE_string(
    "table", None, f"Required, or --configs: rows of a table, {', '.join(TABLES)}."
)
SCALE = flags.DEFINE_enum("scale", "tiny", ["paper", *SCALES], "Size of the table's runs.")
ROWS = flags.DEFINE_list("rows", [], "Some of the table's rows; all by default.")
FILES = flags.DEFINE_list(
    "configs", [], "Instead of a table: FILE.py[:VARIANT],... of which the first is the baseline."
)
SET = flags.DEFINE_multi_string(
    "set",
    [],
    "config.FIELD=VALUE for all runs, or config.FIELD=VALUE,VALUE,... for each; may be repeated.",
)
MATCH = flags.DEFINE_list(
    "match", [], "Bring each row to its baseline's params, flops or cache, as experiments.zoo does."
)
RATES = flags.DEFINE_list("learning_rates", [], "A grid for every row; the best one counts.")
SEEDS = flags.DEFINE_integer("seeds", 1, "Runs of each row, with seeds 0, 1, ...", lower_bound=1)
OUT = flags.DEFINE_string("out", None, "Folder of the sweep; runs/NAME-SCALE by default.")
INDEX = flags.DEFINE_integer("index", None, "Train this run of the list alone.", lower_bound=0)
KNOWN = flags.DEFINE_list("known", [], "Files runs.csv whose runs are not trained again.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "List the runs with their cost, and stop.")

log = logging.getLogger("kha_jax")
REFRESH = 2.0  # seconds between two looks at the run that trains
SPOKEN = 60.0  # seconds between two lines where there is no terminal
GUESSED_SHARE = 0.15  # of the matmul rate, which small models reach, until a run tells


def table_rows() -> tuple[str, list[Wanted]]:
    """(title, rows) of --table."""
    if TABLE.value not in TABLES:
        raise UsageError(f"--table={TABLE.value}: is not known; {near(TABLE.value, TABLES)}")
    file, table = TABLES[TABLE.value], load(TABLE.value)
    path = os.path.relpath(config_files.REPOSITORY / "configs" / f"{file}.py")
    for name in ROWS.value:
        if name not in table.rows:
            raise UsageError(f"--rows={name}: is not in the table; {near(name, table.rows)}")
        if (baseline := table.rows[name].baseline) not in ROWS.value:
            raise UsageError(f"--rows={name}: is compared with {baseline}; name that too")
    if flags.FLAGS["scale"].present and not table.scales:
        raise UsageError(f"--scale={SCALE.value}: --table={TABLE.value} has one size; leave it out")
    scale = f".{SCALE.value}" if SCALE.value in table.scales else ""
    rows = [
        Wanted(name, (f"--config={path}:{name}{scale}",), row.baseline, row.loss, row.note)
        for name, row in table.rows.items()
        if name in ROWS.value or not ROWS.value
    ]
    return table.title, rows


def config_rows() -> tuple[str, list[Wanted]]:
    """(title, rows) of --configs, named by the variant, or the file where that says more."""
    if ROWS.value or flags.FLAGS["scale"].present:
        raise UsageError("--rows, --scale: are of a table; --configs takes its files as they are")
    short = [
        name.rpartition(":")[2] if ":" in name else config_files.stem(name) for name in FILES.value
    ]
    names = short if len({*short}) == len(short) else list(map(config_files.stem, FILES.value))
    if len({*names}) < len(names):
        raise UsageError("--configs: names the same config twice; vary it with --set")
    for file in FILES.value:
        path, _, variant = file.partition(":")
        command_line.load_variant(RunConfig, path, variant, "--configs")
    rows = [Wanted(n, (f"--config={file}",), names[0]) for n, file in zip(names, FILES.value)]
    return f"Ablation of {', '.join(FILES.value)}", rows


def wanted() -> tuple[str, list[Wanted]]:
    """(title, rows) that the flags ask for."""
    if bool(TABLE.value) == bool(FILES.value):
        raise UsageError("--table or --configs: name one of them, such as --table=2")
    for text in SET.value:
        if RATES.value and text.partition("=")[0] == "config.optimizer.learning_rate":
            rates = f"--learning_rates={','.join(RATES.value)}"
            raise UsageError(f"--set={text}: sets the same as {rates}; leave out one of them")
    title, rows = table_rows() if TABLE.value else config_rows()
    rows = planned.varied(rows, SET.value)
    if not MATCH.value:
        return title, rows
    members.check_match(MATCH.value)
    return f"{title}, at the same {' and '.join(MATCH.value)}", members.matched(rows, MATCH.value)


def measured_rate(sweep: Sweep) -> tuple[float, str]:
    """(FLOP/s that training reaches here, how that is known)."""
    told = [
        run.flops() / run.config.steps / result.step_seconds
        for run in sweep.runs
        if (result := sweep.done().get(run.name))
    ]
    if told:
        return sorted(told)[len(told) // 2], f"{len(told)} finished runs"
    size = 2048
    x, product = jnp.ones((size, size)), jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    began = time.perf_counter()
    for _ in range(3):
        product(x, x).block_until_ready()
    rate = 3 * 2 * size**3 / (time.perf_counter() - began)
    share = f"{GUESSED_SHARE:.0%} of {rate / 1e9:,.0f} GFLOP/s, the rate of a matrix product here"
    return GUESSED_SHARE * rate, share


def list_runs(sweep: Sweep) -> None:
    """--dry_run."""
    rate, source = measured_rate(sweep)
    known = sweep.elsewhere()
    done = {**sweep.done(), **known}
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("index", "run", "parameters", "active", "MFLOP/token", "tokens", "minutes", ""):
        table.add_column(name, justify="left" if name in ("run", "") else "right", no_wrap=True)
    total = 0.0
    for index, run in enumerate(sweep.runs):
        cost = run.config.cost()
        seconds = run.flops() / rate
        total += 0.0 if run.name in done else seconds
        table.add_row(
            str(index),
            run.name,
            f"{cost.parameters / 1e6:,.2f}M",
            f"{cost.active / 1e6:,.2f}M",
            f"{cost.training_flops / 1e6:,.1f}",
            f"{run.tokens() / 1e6:,.1f}M",
            f"{seconds / 60:,.1f}",
            "known" if run.name in known else "done" if run.name in done else "",
        )
    terminal.show(table)
    terminal.say(
        f"{len(sweep.runs)} runs, {len(done)} done; about {total / 60:,.0f} minutes of training "
        f"are left, at {rate / 1e9:,.1f} GFLOP/s ({source})"
    )


class Board:
    """What a person watches: the rows by seeds on a terminal, a line now and then elsewhere."""

    def __init__(self, sweep: Sweep, rows: list[Wanted]):
        self.sweep, self.rows, self.live = sweep, rows, None
        if terminal.CONSOLE.is_interactive:
            kept = sys.stderr.isatty()  # a file is no place on this terminal
            self.live = Live(console=terminal.CONSOLE, auto_refresh=False, redirect_stderr=kept)
        self.looked, self.spoke, self.began = 0.0, 0.0, time.time()
        self.training: Planned | None = None

    def __enter__(self) -> "Board":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.live:
            self.show()
            self.live.stop()

    def watch(self) -> None:
        """Looks at the run that trains."""
        now = time.time()
        if self.live and now - self.looked > REFRESH:
            self.looked = now
            self.show()
        elif not self.live and now - self.spoke > SPOKEN:
            self.spoke = now
            terminal.say(f"{self.training.name}: {self.where(self.training)}")

    def where(self, run: Planned) -> str:
        """How far a run is."""
        row = self.sweep.last_line(run)
        if not row:
            return "begins"
        return f"step {row['step']}/{run.config.steps}, loss {row['loss']:.3f}"

    def show(self) -> None:
        """The table of all runs."""
        done, columns = self.sweep.done(), {}
        for run in self.sweep.runs:
            rate = "" if run.learning_rate is None else f" lr {run.learning_rate:g}"
            columns.setdefault(f"seed {run.seed}{rate}", {})[run.row] = run
        table = Table("row", *columns, box=box.SIMPLE_HEAD, title=str(self.sweep.folder))
        for row in self.rows:
            cells = [self.cell(by_row.get(row.name), done) for by_row in columns.values()]
            table.add_row(row.name, *cells)
        table.caption = f"{len(done)} of {len(self.sweep.runs)} runs done; cells: validation loss"
        self.live.update(table, refresh=True)

    def cell(self, run: Planned | None, done: dict[str, RunResult]) -> str:
        if run is None:
            return ""
        if run.name in done:
            return f"{done[run.name].val_loss:.4f}"
        if run.name in self.sweep.failed:
            return f"failed ({self.sweep.failed[run.name]})"
        if run is self.training:
            return self.where(run).removeprefix("step ")
        return "."


def train(sweep: Sweep, board: Board) -> int:
    """All runs that are missing; the exit code."""
    taken: set[str] = set()  # by others, when they were last looked at
    while left := [run for run in sweep.missing() if run.name not in sweep.failed]:
        free = [run for run in left if run.name not in taken]
        if not free:
            time.sleep(REFRESH)
            taken.clear()
            continue
        board.training, began = free[0], time.time()
        code = sweep.train(board.training, board.watch)
        if code is None:
            taken.add(board.training.name)
            continue
        if code == codes.PREEMPTED:
            terminal.say(f"stopped in {board.training.name}; the same command goes on from there")
            return code
        done = sweep.done()
        result = done.get(board.training.name)
        said = f"validation loss {result.val_loss:.4f}" if result else f"failed with {code}"
        terminal.say(
            f"{len(done)}/{len(sweep.runs)} {board.training.name}: {said}, "
            f"{time.time() - began:.0f} s"
        )
    for name, code in sweep.failed.items():
        run = next(run for run in sweep.runs if run.name == name)
        terminal.say(f"{name} failed with {code}: {sweep.why(run)}")
    if sweep.failed:
        first = sweep.folder / next(iter(sweep.failed)) / LOG
        log.error(
            "%d of %d runs failed; the log of the first: %s",
            len(sweep.failed),
            len(sweep.runs),
            first,
        )
    return sweep.code()


def command() -> str:
    """What a person would type for the whole sweep."""
    typed = [argument for argument in sys.argv[1:] if not argument.startswith("--index")]
    return shlex.join(["python", "-m", "experiments.sweep", *typed])


def main() -> int:
    """See the module's docstring."""
    title, rows = wanted()
    runs = planned.runs(rows, SEEDS.value, RATES.value)
    if INDEX.value is not None and INDEX.value >= len(runs):
        raise UsageError(f"--index={INDEX.value}: there are {len(runs)} runs, from 0 on")
    name = TABLES.get(TABLE.value or "", "ablation")
    default = config_files.REPOSITORY / "runs" / f"{name}-{SCALE.value}"
    folder = stored.own_folder("out", str(default) if OUT.value is None else OUT.value)
    sweep = Sweep(folder, runs, results.known(KNOWN.value))
    if DRY_RUN.value:
        list_runs(sweep)
        return codes.DONE
    terminal.spare()
    jax.config.update("jax_platforms", "cpu")  # the accelerators are for the runs
    fields = ("name", "baseline", "printed", "note")
    about = {
        "title": title,
        "command": command(),
        "scale": SCALE.value if TABLE.value and load(TABLE.value).scales else None,
        "commit": results.commit(),
        "rows": [{field: getattr(row, field) for field in fields} for row in rows],
    }
    sweep.begin(about)
    taken = sweep.take_known()
    if taken:
        print(f"{taken} runs are known")
    if INDEX.value is not None:
        sweep.runs = [runs[INDEX.value]]
    with Board(sweep, rows) as board:
        return train(sweep, board)


if __name__ == "__main__":
    command_line.run(main)
