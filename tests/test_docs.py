"""The documentation: what it links to exists, what it tells one to type parses, its Python runs."""

import configparser
import csv
import itertools
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from configs import base, controls
from experiments.cli import command_line, config_files
from kha_jax import convert
from kha_jax.inference.folding import fold_model
from kha_jax.training.run_config import RunConfig
from kha_jax.training.run_folder import read_run
from tests.commands import defined
from tests.runs import SMALL, finish, start

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
FRONT = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [*FRONT, ROOT / "results" / "README.md", *DOCS]
RUN_ELSEWHERE = ("add_a_variant", "library")  # test_attention.py, test_library.py
WRONG = ("CHANGELOG", "faq")  # these name old flags, and misspelt ones
FIGURE = re.compile(r"\b[1-9]\d*\.\d{3,}\b|\b0\.\d{4,}\b|\b\d{2,3},\d{3}\b")  # no chance meeting
OTHERS = (  # flags of other programs
    *("--array", "--wrap", "--worker", "--xla"),
    *("--max-restarts", "--restart-on-exit-codes", "--requeue", "--signal", "sbatch "),
)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code(path: Path) -> list[str]:
    """Code spans, and the lines of code blocks but for Python's."""
    text = re.sub(r"```(?:python|mermaid)\n.*?```", "", path.read_text(), flags=re.DOTALL)
    lines = re.findall(r"^    (\S.*)", text, re.MULTILINE)
    return lines + [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def slugs(path: Path) -> set[str]:
    """The anchors that a page has, by GitHub's rule."""
    heads = re.findall(r"^#+ (.*)", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_and_files_exist(path):
    text = path.read_text()
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", text)
    for link in (a or b for a, b in links):
        target, _, anchor = link.partition("#")
        if target.startswith("http"):
            continue
        there = (path.parent / target).resolve() if target else path
        assert there.exists(), f"{link}: nothing is there"
        assert not anchor or anchor in slugs(there), f"{link}: no such heading"
    tops = "configs|docs|experiments|kha_jax|notebooks|tests"
    for file in re.findall(rf"`((?:{tops})/[\w./]+)`", text):
        new = f"`{file}`, a new file" in text
        assert new or (ROOT / file).exists(), f"{file}: nothing is there"


def test_every_page_is_in_the_index():
    linked = re.findall(r"\]\((\w+\.md)\)", (ROOT / "docs" / "README.md").read_text())
    assert sorted(linked) == [path.name for path in DOCS if path.name != "README.md"]


def test_every_extra_is_named_where_one_looks_for_it():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = set(setup["options.extras_require"])
    install = (ROOT / "docs" / "install.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", install, re.MULTILINE)) == extras
    readme = (ROOT / "README.md").read_text()
    assert extras <= set(re.findall(r"(?:`|EXTRAS=)(\w+)", readme))


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 180 and len(text.encode()) <= 12 * 1024


def measured() -> tuple[list[tuple[float, ...]], str]:
    """Of all reports of results/, the means with their intervals and what Holm's correction leaves
    of p (nan where there is none), and the text."""
    named = [
        ("difference", "low", "high", "p_by_holm"),
        ("sensitivity", "sensitivity_low", "sensitivity_high", ""),
    ]
    found = []
    for path in (ROOT / "results").glob("*/report.csv"):
        for line, names in itertools.product(csv.DictReader(path.open()), named):
            if all(line.get(field) for field in names[:3]):
                found.append(tuple(float(line.get(field) or "nan") for field in names))
    texts = (path.read_text() for path in (ROOT / "results").glob("*/report.md"))
    return found, "\n".join(texts)


@pytest.mark.parametrize("path", [FRONT[0], *DOCS], ids=name)
def test_intervals_are_those_of_the_results(path):
    """`MEAN (LOW to HIGH)`, in a table with `| P |` behind it, or `LOW to HIGH` alone, signed: to
    its printed digits one of a row in results/, as its CSV has it, or literally in a report."""
    rows, reports = measured()

    def prints(value: float, text: str) -> bool:
        digits = len(text.partition(".")[2])
        return abs(value - float(text)) <= 0.5 * 10**-digits + 1e-12

    number, page = r"[+-]\d+\.\d+", path.read_text()
    interval = re.compile(
        rf"(?:({number})(?:\*\*)?\s+\((?:95%[:,]\s+)?)?({number})\s+to\s+({number})"
        r"(?:\) \| (\d\.\d+) \|)?"
    )
    for match in interval.finditer(page):
        told = [(at, text) for at, text in enumerate(match.groups()) if text]
        known = any(all(prints(row[at], text) for at, text in told) for row in rows)
        literal = " to ".join(match.groups()[1:3]) in reports and match[4] is None
        assert known or literal, f"{match.group()!r}: no row of results/ has that"
    for mean, ends in re.findall(r"(\d\.\d{3}) \((\d\.\d{3} to \d\.\d{3})\)", page):
        assert f"| {mean} | {ends} |" in reports, f"{mean} ({ends}): no sensitivity of results/"


def test_tuned_variants_are_what_won():
    """Each is a control that is below its baseline, corrected for all rows of its sweep."""
    rows = controls.TABLE.rows
    with open(ROOT / "results" / "recipe_tiny" / "report.csv") as file:
        lines = {line["row"]: line for line in csv.DictReader(file)}
    for variant in base.TUNED:
        run = base.with_variant(rows["baseline"].run, variant)
        (line,) = (lines[name] for name, row in rows.items() if row.run == run)
        assert float(line["high"]) < 0 and float(line["p_by_holm"]) < 0.05, variant


def test_no_page_repeats_another():
    """Neither a figure that was measured nor a line of text stands on two pages."""
    seen = Counter()
    for path in PAGES:
        text = re.sub(r"https?://\S+|arXiv:\S+", "", path.read_text())
        lines = (line for line in text.splitlines() if len(line) > 60)
        seen.update({*FIGURE.findall(text), *lines})
    assert [what for what, pages in seen.items() if pages > 1] == []


# ---------------------------------------------------------------- command lines
@pytest.fixture(scope="module")
def known():
    """The flags of each command; --config is not among them."""
    return {name: one.flags for name, one in defined().items()}


def typed(path: Path) -> list[tuple[str, list[str]]]:
    """(command, arguments) of each command line of a page, but for those shown with their error
    after a `$`."""
    found = []
    for text in (text for text in code(path) if not text.startswith("$")):
        before, started, rest = text.partition("python -m experiments.")
        if started:
            quoted = next((mark for mark in "\"'" if before.count(mark) % 2), "\n")
            rest = re.split(r" +#| && |;", rest.split(quoted)[0])[0]
            command, *arguments = shlex.split(re.sub(r"\$\w+|\$\(\w+\)", "0", rest))
            found.append((command, arguments))
    return found


def is_config(argument: str) -> bool:
    return re.match(r"--config[.=]", argument) is not None


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_command_lines_parse(path, known):
    for command, arguments in typed(path):
        said = shlex.join([command, *arguments])
        values = known[command]
        values.unparse_flags()
        rest = values([command, *(a for a in arguments if not is_config(a))])
        assert len(rest) == 1 + (command == "convert"), said
        files = values["configs"].value or [] if command == "sweep" else []
        for config in [*filter(is_config, arguments)], *([f"--config={f}"] for f in files):
            command_line.config_of(RunConfig, config)


def holds(config, path: str) -> bool:
    """Whether a ConfigDict has a field or a group of this dotted name."""
    for part in path.split("."):
        if part not in config:
            return False
        config = config[part]
    return True


@pytest.mark.parametrize("path", [p for p in PAGES if p.stem not in WRONG], ids=name)
def test_flags_and_fields_exist(path, known):
    """Those in code spans of their own, such as `--seeds=3`, `config.steps`, `--config.steps=3`."""
    config = config_files.run_config_file(command_line.DEFAULT_CONFIG)
    names = {flag for values in known.values() for flag in values} | {"config", "help"}
    spans = [span for span in code(path) if not re.search("python|make|error: ", span)]
    for span in (span for span in spans if not span.startswith(OTHERS)):
        for field, _, value in re.findall(
            r"\bconfig\.(?!json|help|py)([a-z_\d.]+)\b(=([^\s,]+))?", span
        ):
            assert holds(config, field), f"{field} in {span}"
            if value:
                config_files.check_override(config, field, value)
        for flag in re.findall(r"(?:^| )--(\w+)", span):
            assert flag in names or flag.removeprefix("no") in names, f"--{flag} in {span}"


# ---------------------------------------------------------------- Python
@pytest.fixture(scope="module")
def place(tmp_path_factory, cache):
    """A folder with the runs that the pages read, which are one."""
    runs = tmp_path_factory.mktemp("docs") / "runs"
    small = "--config=configs/kha_tiny.py:linear", *SMALL, "--config.steps=2"
    code, _, err = finish(start(cache, runs / "linear", base=small))
    assert code == 0, err
    (runs / "kha_tiny").symlink_to("linear")
    _, _, variables = run = read_run(runs / "linear")
    model = run.config.model
    (stock := runs.parent / "Qwen3-0.6B").mkdir()
    convert.write(stock, *fold_model(model, variables))
    return runs.parent


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [p for p in PAGES if "```python" in p.read_text() and p.stem not in RUN_ELSEWHERE],
    ids=name,
)
def test_python_runs(path, place):
    program = "\n".join(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=place, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
