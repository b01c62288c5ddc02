"""Asks trained models what they know.

    python -m experiments.evaluate --workdir=runs/kha_tiny --text=book.txt
    python -m experiments.evaluate --workdir=runs/baseline,runs/kha --tasks=hellaswag,piqa
    python -m experiments.evaluate --workdir=runs/kha --tasks=kha_paper

--text: loss, perplexity and bits per byte of a file, or of what prepare_data wrote (its validation
split, where it has one). Each token is predicted from up to --max_context tokens before it, in
windows that go on by --stride of them: with a smaller one there is more context and more to
compute. Bits per byte are the same measure for every tokenizer.

--tasks: benchmarks of lm-eval by name (extra: eval), of a folder (--include), and kha_paper, the
list of the paper's table 4 beside the printed scores. Data are fetched once by lm-eval; a task of
--include may have its own. humaneval, and tasks of --include whose answers are programs, run what
the model writes, and need --run_code.

Reads the run's newest checkpoint and folds linear mixers into the weights. Two runs are compared:
with --tasks document by document, with bootstrap intervals of the difference.
"""

import logging
import os
from pathlib import Path
from typing import Any

from absl import flags
from rich.table import Table

from experiments.cli import alone, command_line, terminal
from experiments.cli.codes import UsageError
from experiments.run_folders.folder import use_compilation_cache
from kha_jax.errors import StorageError
from kha_jax.storage import writable, write_json

MOST = 2**31 - 1

WORKDIR = flags.DEFINE_list("workdir", None, "Required: run folder to read, or two of them.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint to read; the newest good one by default.")
TEXT = flags.DEFINE_string("text", None, "Text to score: a file, or a folder of token shards.")
STRIDE = flags.DEFINE_integer(
    "stride",
    None,
    "Tokens of a text that a window predicts; half of --max_context by default.",
    lower_bound=1,
)
TASKS = flags.DEFINE_list("tasks", None, "Benchmarks by name, or kha_paper.")
INCLUDE = flags.DEFINE_string("include", None, "Folder of YAML files with tasks of your own.")
LIMIT = flags.DEFINE_integer(
    "limit", None, "Documents of each task at most.", lower_bound=1, upper_bound=MOST
)
SHOTS = flags.DEFINE_integer(
    "shots",
    None,
    "Examples in a prompt; those that the task says by default.",
    lower_bound=0,
    upper_bound=1000,
)
CHAT = flags.DEFINE_bool("chat", False, "Put the prompts of tasks into the chat template.")
RUN_CODE = flags.DEFINE_bool(
    "run_code", False, "Run the programs that answer a task, within limits that are no jail."
)
SAMPLES = flags.DEFINE_integer(
    "samples",
    1,
    "Answers to each problem of a code task, for pass@k.",
    lower_bound=1,
    upper_bound=1000,
)
BATCH_TOKENS = flags.DEFINE_integer(
    "batch_tokens", 16384, "Tokens that are computed at once.", lower_bound=1, upper_bound=MOST
)
MAX_CONTEXT = flags.DEFINE_integer(
    "max_context",
    None,
    "Tokens that the model reads at most; those that it was trained on by default.",
    lower_bound=2,
    upper_bound=MOST,
)
DEVICES = flags.DEFINE_integer(
    "devices", 1, "Devices that hold the model together, where one cannot.", lower_bound=1
)
OUT = flags.DEFINE_string("out", None, "Also write the results to this JSON file.")

ONLY_WITH = {"stride": "text"} | dict.fromkeys(
    ("include", "limit", "shots", "chat", "run_code", "samples"), "tasks"
)
log = logging.getLogger("kha_jax")


def check_out() -> None:
    """Raises UsageError where the file of --out cannot be written: before minutes of computing."""
    if OUT.value is None:
        return
    there = os.path.exists(OUT.value)
    if there and not os.path.isfile(OUT.value):
        raise UsageError(f"--out={OUT.value}: is no file; name one to write")
    try:
        open(OUT.value, "a").close()
        file = Path(OUT.value).resolve()
        if not there:
            file.unlink()
        writable(file.parent)  # results are written beside the file, which they replace
    except OSError as error:
        raise UsageError(f"--out={OUT.value} cannot be written: {error.strerror}") from None


def write(results: dict[str, Any]) -> None:
    """Puts results into the file of --out.

    Raises:
        StorageError: it cannot be written any more.
    """
    if OUT.value is None:
        return
    try:
        write_json(Path(OUT.value).resolve(), results)
    except OSError as error:
        raise StorageError(f"--out={OUT.value} cannot be written: {error.strerror}") from None


def runs() -> list[Any]:
    """Those of --workdir, opened."""
    from experiments.evaluating.models import Asked

    named = WORKDIR.value or [None]
    if len(named) > 2 or len(set(named)) < len(named):
        raise UsageError(f"--workdir={','.join(named)}: name one run, or two different ones")
    use_compilation_cache()
    fixed = {"max_length": MAX_CONTEXT.value, "devices": DEVICES.value}
    return [Asked(name, STEP.value, batch_tokens=BATCH_TOKENS.value, **fixed) for name in named]


def text() -> dict[str, Any]:
    """See the module's docstring."""
    from experiments.evaluating import texts

    texts.check(TEXT.value)
    asked, rows = runs(), {}
    for run in asked:
        rows[run.workdir] = texts.loss(run, TEXT.value, STRIDE.value)
        run.say_counts()
    table = Table(title=f"{TEXT.value}, {next(iter(rows.values())).bytes:,} bytes")
    for column in ("run", "bits per byte", "loss", "perplexity", "tokens"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for name, row in rows.items():
        figures = f"{row.bits_per_byte:.4f}", f"{row.loss:.4f}", f"{row.perplexity:.2f}"
        table.add_row(name, *figures, f"{row.tokens:,}")
    terminal.show(table)
    if len(rows) == 2:
        (first, a), (second, b) = rows.items()
        change = b.bits_per_byte - a.bits_per_byte
        print(f"{second} takes {change:+.4f} bits per byte against {first}")
    about = [{**run.about(), **rows[run.workdir]._asdict()} for run in asked]
    return {"text": TEXT.value, "stride": STRIDE.value, "runs": about}


def tasks() -> dict[str, Any]:
    """See the module's docstring."""
    from experiments.evaluating import code_tasks, tables
    from experiments.evaluating import tasks as benchmarks

    include = benchmarks.folder(INCLUDE.value)
    names = list(dict.fromkeys(TASKS.value))
    programs = code_tasks.load(names, include)
    check_programs(programs)
    coded = [task.name for task in programs]
    loaded = benchmarks.load([name for name in names if name not in coded], include)
    asked = runs()
    for name, why in loaded.missing.items():
        log.warning("left out of %s: %s", benchmarks.PAPER, why)
    if programs:
        code_tasks.say_limits()
    found = [tables.Run(run.workdir, {}) for run in asked]
    results = {
        "runs": [run.about() for run in asked],
        "limit": LIMIT.value,
        "chat": CHAT.value,
        "tasks": [],
        "missing": loaded.missing,
    }

    def keep(run: Any, scored: dict[tuple[str, str], Any]) -> None:
        """What is known is written as it comes: the rest may take hours, or never end."""
        run.found.update(scored)
        for (task, metric), one in scored.items():
            log.info("%s: %s %s %s", run.name, task, metric, tables.shown(metric, one.score))
        results["tasks"] = tables.as_json(found, benchmarks.shots_of(loaded))
        try:
            write(results)
        except StorageError as error:  # raised again at the end, when the table has been shown
            log.warning("warning: %s", error)

    for run, into in zip(asked, found):
        keep(into, answers(run, loaded))
        for task in programs:
            keep(into, code_tasks.run(run, task, SAMPLES.value, LIMIT.value))
    shots = benchmarks.shots_of(loaded)
    named = [name for name in names if name != benchmarks.PAPER]
    if named:
        terminal.show(tables.of_tasks(found, named, shots))
    if benchmarks.PAPER in names:
        terminal.show(tables.of_paper(benchmarks.paper(), found, shots, LIMIT.value))
    return results


def check_programs(programs: list[Any]) -> None:
    """Raises UsageError where code tasks, or the lack of them, and flags do not go together."""
    if not programs:
        if flags.FLAGS["samples"].present:
            raise UsageError("--samples: does nothing without a code task, such as humaneval")
        return
    name = programs[0].name
    if not RUN_CODE.value:
        raise UsageError(
            f"--tasks={name}: runs what the model writes; add --run_code, best where nothing can "
            "be harmed"
        )
    for flag in ("chat", "shots"):
        if flags.FLAGS[flag].present:
            raise UsageError(
                f"--{flag}: does nothing to {name}, which goes on with a program; run that alone, "
                "without it"
            )


def answers(run: Any, loaded: Any) -> dict[tuple[str, str], Any]:
    """What a run scores in each task and group."""
    from experiments.evaluating import adapter, scores
    from experiments.evaluating import tasks as benchmarks

    if CHAT.value and run.dialect.template is None:
        raise UsageError(f"--chat: {run.workdir} has no chat template; leave it out")
    if not loaded.tasks:
        return {}
    about = run.about()
    begins = "begins texts" if about["begins_texts"] else "begins no text"
    log.info(
        "%s: step %d; the tokenizer %s with a token of its own; an empty context is token %d; "
        "%s chat template; at most %d tokens",
        *(run.workdir, run.step, begins, about["prefix"]),
        *("the" if CHAT.value else "no", run.max_length),
    )
    lm = adapter.model(run)
    samples = benchmarks.run(lm, loaded, SHOTS.value, LIMIT.value, CHAT.value)
    run.say_counts()
    if lm.generated:
        lm.say_texts()
    found = scores.measured(samples, benchmarks.aggregations(loaded))
    for group, own in loaded.groups.items():
        found |= scores.pooled(found, group, own)
    return found


def main() -> None:
    """See the module's docstring."""
    alone.check("evaluate", "start it once; --devices splits the model over those of one host")
    given = {"text": TEXT.value, "tasks": TASKS.value}
    if sum(value is not None for value in given.values()) != 1:
        raise UsageError("--text or --tasks: give one of them; a file, or names such as hellaswag")
    for name, value in given.items():
        if value is not None and not (value and all(value)):
            raise UsageError(f"--{name}: is empty")
    for flag, of in ONLY_WITH.items():
        if flags.FLAGS[flag].present and given[of] is None:
            raise UsageError(f"--{flag}: does nothing without --{of}")
    check_out()
    write(text() if TEXT.value else tasks())


if __name__ == "__main__":
    command_line.run(main)
