"""Command lines that nobody means: python -m tests.lines [--cases=1000] [--seed=0] [--only=train]

They are made from the flags that each command defines, so that a new command needs no line here.
Every one has to end with a code of the contract, a line or two on stderr and no traceback; one that
is still computing after a few seconds has taken what it was given, and is stopped. Prints the cases
that did otherwise, and how many ended with which code.
"""

import argparse
import collections
import os
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any, Iterator, NamedTuple

from kha_jax.config import dotted, to_dict
from kha_jax.training.run_config import RunConfig
from tests.commands import Defined, Result, defined, run_all
from tests.runs import SMALL

CODES = {0, 2, 65, 70, 74, 75, 76}
SECONDS = 2  # of computing, after which a command is at work
AT_WORK = -signal.SIGXCPU
TOGETHER = 50  # cases that one process is asked for
LINES = 2  # on stderr, of a command that refuses
TINY = (*SMALL, "--config.steps=2", "--config.model.layers=1", "--config.evaluation.every=0")
# What a command gets before anything odd, where it has the flag, so that nothing else is refused.
# What is written stays in `here`.
USUAL = {
    "workdir": "--workdir={here}/run",
    "out": "--out={here}/made",
    "prompt": "--prompt=def ",
    "tokens": "--tokens=4",
    "table": "--table=2",
    "dry_run": "--dry_run",
    "input": "--input={here}/a.txt",
    "workers": "--workers=1",
    "text": "--text={here}/a.txt",
    "kv_heads": "--kv_heads=1",
    "wait_seconds": "--wait_seconds=10",
    "rounds": "--rounds=1",
    "torch_compile": "--notorch_compile",
    "compile": "--nocompile",
}
OF_ITS_OWN = {
    ("report", "out"): "--out={here}/made.png",
    ("train", "workdir"): "--workdir={here}/{folder}",  # of a run that is done, or a new one
}
# Flags that stand in the place of a usual one.
INSTEAD = {"tasks": "text", "sweep": "workdir", "spikes": "workdir", "configs": "table"}
# Values that a flag or a field may have, by the type of its default.
APT = {
    bool: ("true", "false"),
    int: ("1", "2", "3", "4", "8"),
    float: ("0", "0.1", "0.5", "1", "2.5"),
    str: ("linear", "mlp", "compose", "talking", "latent", "grouped_tied", "moe", "none", "full"),
}
TYPES = {"bool": bool, "int": int, "float": float}
ODD = (
    *("", " ", "many", "true", "none", "0", "1", "-1", "2", "0.5", "-0", "1_0", "0x3", "٣"),
    *("9" * 30, "-" + "9" * 30, "1e400", "-1e9", "nan", "-nan", "inf", "-inf", "1e-320"),
    *("x" * 300, "y" * 5000, "é中🦜", "\u202etxt", "a\x1b[31mb", "\x07", "two\nlines", "\t"),
    *("\udcff", "a=b", "--", "-", "%s{0}", "$HOME", "'", '"', "1,2,,3", ",", "a,a", "1:2", ":"),
    *("{here}", "{here}/text", "{here}/none", "{here}/text/below", "{here}/pipe", "{here}/loop"),
    *(
        "{here}/zero",
        "{here}/empty",
        "{here}/run",
        "{here}/run/checkpoints",
        "{here}/run/config.json",
    ),
    *(
        "../" * 40 + "dev/null/nowhere",
        "gs://bucket/x",
        "odd://x",
        "~nobody/x",
        "~",
        "*",
        "configs",
        ".",
    ),
)


class Case(NamedTuple):
    """A command and what is typed after it; {here} stands for a folder of its own."""

    command: str
    arguments: list[str]


def cases(seed: int, count: int, only: str = "") -> Iterator[Case]:
    """So many, which the seed and the flags decide."""
    chance, known = random.Random(seed), defined()
    fields = dotted(to_dict(RunConfig()), "config")
    for _ in range(count):
        command = only or chance.choice(sorted(known))
        takes = known[command]
        names = sorted(takes.flags)
        given = [name for name in names if name in USUAL]
        if takes.takes_config:
            names += ["config", "config.help", *chance.sample(sorted(fields), len(names) // 2 + 1)]
        words = chance.choices([[*takes.words, "word"], takes.words or [""]], [1, 9])[0]
        words = [chance.choice(words)] if takes.words or words[0] else []
        odd = sum((said(chance, names, takes, fields) for _ in range(chance.choice((1, 1, 2)))), [])
        replaced = {old for new, old in INSTEAD.items() if f"--{new}" in " ".join(odd)}
        folder = chance.choice(("run", "new"))
        usual = [
            OF_ITS_OWN.get((command, name), USUAL[name]).replace("{folder}", folder)
            for name in given
            if name not in replaced
        ]
        # all but `train` are also asked what they do with the config that is there without a word
        small = takes.takes_config and (command == "train" or chance.random() < 0.5)
        yield Case(command, [*words, *usual, *(TINY if small else ()), *odd])


def value_of(chance: random.Random, flag: Any, default: Any) -> str:
    """Something odd, or as often something that a flag or a field of this default may have."""
    if chance.random() < 0.5:
        return chance.choice(ODD)
    if isinstance(default, (list, tuple)):
        return ",".join(map(str, default))
    if default is None:
        return chance.choice(APT[TYPES.get(flag.flag_type() if flag is not None else "", str)])
    choices = getattr(flag.parser, "enum_values", ()) if flag is not None else ()
    return chance.choice([str(default), *(choices or APT[type(default)])])


def said(
    chance: random.Random, names: list[str], takes: Defined, fields: dict[str, Any]
) -> list[str]:
    """A flag in one of the ways in which one can write it."""
    name = chance.choice(names)
    flag = takes.flags[name] if name in takes.flags else None
    value = value_of(chance, flag, flag.default if flag is not None else fields.get(name, ""))
    usual, ways = (
        [f"--{name}={value}"],
        [
            [f"--{name}", value],
            [f"--{name}"],
            [f"-{name}={value}"],
            [f"--no{name}"],
            [f"--no{name}={value}"],
            [f"--{name}={value}", f"--{name}={chance.choice(ODD)}"],
            [f"--{name.upper()}={value}"],
            [f"--{name[:-1]}={value}"],
            [f"--{name}.more={value}"],
            [f"{name}={value}"],
        ],
    )
    return usual if chance.random() < 0.6 else chance.choice(ways)


def prepare(here: Path, run: Path) -> None:
    """What the cases name."""
    here.mkdir()
    (here / "text").write_text("no folder")
    (here / "a.txt").write_text("def one():\n    return 1\n" * 20)
    (here / "empty").mkdir()
    os.mkfifo(here / "pipe")
    (here / "loop").symlink_to(here / "loop")
    (here / "zero").symlink_to("/dev/zero")
    shutil.copytree(run, here / "run")


def wrong(result: Result) -> str:
    """What a result breaks; empty where it is as it has to be."""
    lines = result.err.splitlines()
    if "Traceback" in result.err:
        return "a traceback"
    if result.code == AT_WORK:
        return ""
    if result.code not in CODES:
        return f"the code {result.code}"
    if result.code and not any(line.startswith("error: ") for line in lines):
        return f"the code {result.code} without a reason"
    if result.code and len(lines) > LINES:
        return f"{len(lines)} lines"
    if not all(c.isprintable() for line in lines for c in line):
        return "characters that a terminal obeys"
    return ""


def run(seed: int, count: int, only: str = "") -> Iterator[tuple[Case, Result]]:
    """Each case with what came of it."""
    made = list(cases(seed, count, only))
    place = Path(tempfile.mkdtemp(prefix="lines-"))
    try:
        ((code, _, err, _),) = run_all(
            [("train", [*TINY, f"--workdir={place / 'run'}"])], place / "cache"
        )
        assert code == 0, err
        for begin in range(0, len(made), TOGETHER):
            some, asked = made[begin : begin + TOGETHER], []
            for number, case in enumerate(some):
                here = place / f"{begin + number}"
                prepare(here, place / "run")
                typed = [argument.replace("{here}", str(here)) for argument in case.arguments]
                asked.append((case.command, typed, str(here), SECONDS))
            yield from zip(some, run_all(asked, place / "cache"))
            for *_, here, _ in asked:
                shutil.rmtree(here, ignore_errors=True)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def summary(results: list[tuple[Case, Result]]) -> str:
    """How many cases of each command ended with which code."""
    counts = collections.Counter((case.command, result.code) for case, result in results)
    rows = []
    for command in sorted({case.command for case, _ in results}):
        codes = {code: n for (name, code), n in sorted(counts.items()) if name == command}
        told = ", ".join(f"{n} {'at work' if c == AT_WORK else c}" for c, n in codes.items())
        rows.append(f"{command}: {sum(codes.values())} lines; {told}")
    return "\n".join(rows)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="one command")
    wanted = parser.parse_args()
    results = []
    for case, result in run(wanted.seed, wanted.cases, wanted.only):
        results.append((case, result))
        if problem := wrong(result):
            print(f"{problem}: {case.command} {ascii(case.arguments)[:600]}")
            print(f"    {ascii(result.err[-700:])}", flush=True)
    bad = sum(bool(wrong(result)) for _, result in results)
    print(summary(results))
    print(
        f"{len(results)} command lines, {bad} of them answered in another way than the contract's"
    )
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
