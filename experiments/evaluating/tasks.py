"""Benchmarks by name: those of lm-eval, without reading all 14,000 of them, and our own."""

import contextlib
import json
import logging
import os
import random
from pathlib import Path
from typing import Any, Iterator, NamedTuple, Sequence

from experiments.cli.codes import UsageError
from kha_jax.config import near
from kha_jax.errors import DataError
from kha_jax.storage import as_written

log = logging.getLogger("kha_jax")
OWN = Path(__file__).resolve().parents[2] / "configs" / "tasks"
PAPER = "kha_paper"
# lm-eval's folders of names that do not begin with theirs
FOLDERS = {
    "ai2_arc": "arc",
    "gpqa_main_n_shot": "gpqa",
    "hendrycks_math": "hendrycks_math",
    "minerva_math": "minerva_math",
}
FEW_SHOT_SEED = 1234  # lm-eval's own


class Line(NamedTuple):
    """A row of the paper's table 4. task: lm-eval's name; printed: baseline and KHA."""

    category: str
    name: str
    task: str
    metric: str
    printed: tuple[float, float]
    code: bool


def paper() -> list[Line]:
    """The rows of table 4."""
    entries = json.loads((OWN / f"{PAPER}.json").read_text())
    return [Line(**{**entry, "printed": tuple(entry["printed"])}) for entry in entries]


class Loaded(NamedTuple):
    """tasks: by name, lm-eval's. groups: the tasks of each name that was asked for and is not one
    itself. missing: names of the paper's list that are not to be had, with the reason."""

    tasks: dict[str, Any]
    groups: dict[str, list[str]]
    missing: dict[str, str]


def check() -> None:
    """Raises UsageError where lm-eval is not installed."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise UsageError("--tasks: needs the extra: pip install -e '.[eval]'") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def folder(include: str | None) -> Path | None:
    """The folder of --include.

    Raises:
        UsageError: there is none.
    """
    if include is not None and not os.path.isdir(path := as_written(include)):
        raise UsageError(f"--include={include}: is no folder; name one that holds YAML files")
    return None if include is None else path


def load(names: Sequence[str], include: Path | None = None) -> Loaded:
    """The tasks of these names, with their data.

    include: a folder of YAML files, whose tasks stand before those of lm-eval; it may name
    functions of Python files beside them, which are run.

    Raises:
        UsageError: a name is not known.
        DataError: its data are not there.
    """
    if not names:
        return Loaded({}, {}, {})
    check()
    optional = [line.task for line in paper() if not line.code] if PAPER in names else []
    asked = dict.fromkeys([*(name for name in names if name != PAPER), *optional])
    manager, found = _manager(tuple(asked), include), Loaded({}, {}, {})
    for name in asked:
        try:
            one = _with_data(manager, name)
        except DataError as error:
            if name not in optional:
                raise
            found.missing[name] = str(error)
            continue
        found.tasks.update(one["tasks"])
        if name not in one["tasks"]:
            found.groups[name] = list(one["tasks"])
    return found


def _manager(names: tuple[str, ...], include: Path | None) -> Any:
    """A TaskManager that knows the names: of the folders that look like theirs, or of all."""
    from lm_eval.tasks import TaskManager

    own = [OWN, *([include] if include else [])]
    manager = TaskManager(include_path=own, include_defaults=False)
    if unknown := [name for name in names if name not in manager.task_index]:
        folders = sorted({folder for name in unknown for folder in _folders(name)})
        manager = TaskManager(include_path=[*folders, *own], include_defaults=False)
    if any(name not in manager.task_index for name in names):
        log.info("reading the names of all of lm-eval's tasks, which takes half a minute")
        manager = TaskManager(include_path=own)
    for name in names:
        if name not in manager.task_index:
            known = [*manager.all_tasks, PAPER]
            hint = near(name, known)
            hint = hint if hint.startswith("did") else "lm-eval ls tasks lists what there is"
            raise UsageError(f"--tasks={name}: is no task; {hint}")
    return manager


def _folders(name: str) -> Iterator[Path]:
    """Those of lm-eval's folders that the name begins with, or that hold a file of the name."""
    import lm_eval

    root = Path(lm_eval.__file__).parent / "tasks"
    begins = {FOLDERS.get(name, name)} | {name.split(sep)[0] for sep in "_-"}
    for folder in root.iterdir():
        if folder.is_dir() and (folder.name in begins or name.startswith(f"{folder.name}_")):
            yield folder
        elif os.path.exists(folder / f"{name}.yaml"):  # False also where the name is no name
            yield folder


def _with_data(manager: Any, name: str) -> dict[str, Any]:
    """What the manager loads, its data too."""
    try:
        with _quiet():
            return manager.load([name])
    except Exception as error:  # what data sets, the hub and a task's own code raise
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(
            f"--tasks={name}: cannot be loaded, nor its data fetched ({why[:200]}); load it once "
            "with a network, or --include a copy of it with data of your own"
        ) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars and warnings of others."""
    import datasets

    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    yield


def run(lm: Any, loaded: Loaded, shots: int | None, limit: int | None, chat: bool) -> list[Any]:
    """What the model answered, document by document: lm-eval's samples by task.

    shots: examples in a prompt, where the task allows another number than its own; limit: documents
    of each task; chat: whether prompts go through the chat template.
    """
    from lm_eval.evaluator import evaluate

    random.seed(0)
    for task in loaded.tasks.values():
        own = task.get_config("num_fewshot")
        if own is None or (shots is not None and own != 0):
            task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=FEW_SHOT_SEED)
    try:
        results = evaluate(
            lm=lm,
            task_dict={"tasks": loaded.tasks, "groups": {}},
            limit=limit,
            log_samples=True,
            bootstrap_iters=0,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )
    except ValueError as error:
        if "unsafe" not in str(error):
            raise
        raise UsageError(f"--tasks: {error}; this command runs code by --run_code alone") from None
    return results["samples"]


def shots_of(loaded: Loaded) -> dict[str, Any]:
    """Examples in a prompt of each task, as it was run (known once it has been), and of groups."""
    shots = {name: task.get_config("num_fewshot") or 0 for name, task in loaded.tasks.items()}
    own = {group: {str(shots[task]) for task in some} for group, some in loaded.groups.items()}
    return shots | {group: ",".join(sorted(some)) for group, some in own.items()}


def aggregations(loaded: Loaded) -> dict[str, dict[str, Any]]:
    """What makes a score of the documents' values, by task and metric."""
    return {name: task.aggregation() for name, task in loaded.tasks.items()}
