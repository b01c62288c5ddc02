"""What every command takes and says: its flags, frozen, its help, and quiet libraries."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.cli import command_line, config_files, help_text, hints
from kha_jax.config import dotted, to_dict
from kha_jax.training.run_config import RunConfig

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden" / "flags.txt"
COMMANDS = sorted(
    path.stem
    for path in (ROOT / "experiments").glob("*.py")
    if "command_line.run(main" in path.read_text()
)


def defined(name: str) -> set[str]:
    """The flags that a module of experiments/ defines, read from its source."""
    source = (ROOT / "experiments" / f"{name}.py").read_text()
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    names = {
        call.args[0].value
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr.startswith("DEFINE_")
    }
    return names | (
        defined("cli/command_line") if "command_line.define_config(" in source else set()
    )


def by_command(name: str) -> dict[str, list[str]]:
    """The flags of each command of a module that has several, read from its source."""
    source = (ROOT / "experiments" / f"{name}.py").read_text()
    tables = [
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "COMMANDS"
    ]
    return {
        key.value: sorted(ast.literal_eval(value.args[1]))
        for table in tables
        for key, value in zip(table.keys, table.values)
    }


def test_the_commands_are_listed_and_a_misspelt_one_names_the_nearest():
    code, out, _ = run("-m", "experiments")
    assert code == 0 and [line.split()[2] for line in out.splitlines()] == [
        f"experiments.{name}" for name in COMMANDS
    ]
    code, out, err = run("-S", "-m", "experiments.train")  # without what is installed
    assert code == 2 and "has no jax; run .venv/bin/python" in err and err.count("\n") == 1
    code, out, err = run("-m", "experiments", "trian")
    assert (code, out, err) == (2, "", "error: trian: is no command; did you mean 'train'?\n")


def test_what_one_types_stands_alone_at_the_top():
    """A file of experiments/ is a command, and none has the name of a standard module, which it
    would hide from whoever runs one as a file."""
    names = {path.stem for path in (ROOT / "experiments").glob("[a-z]*.py")}
    assert names == set(COMMANDS) and not names & sys.stdlib_module_names


def test_commands_have_the_flags_of_the_golden_list():
    """Flags are a promise: one that appears or goes away is meant."""
    lines = {name: sorted(defined(name)) for name in COMMANDS}
    for name in COMMANDS:
        several = by_command(name)
        assert not several or {flag for own in several.values() for flag in own} == defined(name)
        assert all(len(own) <= 8 for own in several.values())
        lines |= {f"{name} {word}": own for word, own in several.items()}
    text = "".join(f"{name}: {' '.join(own)}\n" for name, own in sorted(lines.items()))
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text(), "if that is meant, rewrite the list with UPDATE_GOLDEN=1"


def run(*line: str, **environment: str | None) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a Python started on this line; None takes a variable away."""
    settings = {k: v for k, v in {**os.environ, **environment}.items() if v is not None}
    done = subprocess.run(
        [sys.executable, *line], cwd=ROOT, env=settings, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "name", [n if n == "train" else pytest.param(n, marks=pytest.mark.slow) for n in COMMANDS]
)
def test_help_says_what_a_command_does_and_lists_its_flags(name):
    code, out, err = run("-m", f"experiments.{name}", "--config=nowhere.py", "--help")
    assert (code, err) == (0, "")
    assert f"    python -m experiments.{name} " in out and str(ROOT) not in out
    shown = re.findall(r"^  --(?:\[no\])?([\w.]+)", out.split("Flags:")[1], re.M)
    assert sorted(shown) == sorted(defined(name))


def test_help_on_a_config_shows_every_field_with_what_it_takes_and_means():
    config = RunConfig()
    text = "\n".join(help_text.of_fields(config, "config"))

    shown = re.findall(r"^  (--\S+)", text, re.M)
    values = dotted(to_dict(config), "config")

    def typed(value):
        return value[0] if isinstance(value, tuple) and len(value) == 1 else value

    assert sorted(shown) == sorted(f"--{field}={typed(value)}" for field, value in values.items())
    assert "--config.steps=1000  [int; default 1000]\n        Optimiser steps.\n" in text
    assert "kind=none  [one of none, talking;" in text and max(map(len, text.splitlines())) <= 80
    assert text.count("(NoMixer)\n    z: the baseline.\n") == 1 and "(NoMixer, as above)" in text


def test_a_field_is_found_by_what_one_types_of_it():
    """The group may be left out, the name be its initials or a slip; nothing is made up."""
    config = config_files.run_config_file(command_line.DEFAULT_CONFIG)
    found = {typed: hints.nested(config, typed) for typed in ("wd", "layer", "dropout")}
    assert found == {
        "wd": "config.optimizer.weight_decay",
        "layer": "config.model.layers or config.model.later.layer",
        "dropout": "",
    }


def test_libtpu_is_quiet_where_there_is_no_tpu():
    """jax starts every platform that is installed; nothing keeps it from a TPU that is there."""
    pytest.importorskip("libtpu", reason="needs the extra: pip install -e '.[plan]'")
    program = (
        "from experiments.cli import command_line; import jax; "
        "command_line.run(lambda: print(jax.default_backend(), jax.config.jax_platforms))"
    )
    alone = {name: None for name in ("JAX_PLATFORMS", *(n for n in os.environ if "TPU" in n))}
    code, out, err = run("-c", program, XLA_FLAGS="", **alone)
    if out.startswith("tpu"):
        pytest.skip("there is a TPU")
    assert (code, err, out.split()[1]) == (0, "", "None")


def test_a_config_file_is_run_once(tmp_path, capsys):
    """Also for a variant of it, with fields that are set and presets of its own."""
    path = tmp_path / "loud.py"
    path.write_text(
        "from configs import kha_tiny\nprint('run')\n"
        "PRESETS = {'1-device': {'seq_len': 64}}\n"
        "def get_config(variant):\n    return kha_tiny.get_config(variant)\n"
    )
    line = [f"--config={path}:linear", "--config.steps=3", "--config.mesh.preset=1-device"]
    config = command_line.config_of(RunConfig, line)
    assert (config.steps, config.seq_len) == (3, 64)
    assert command_line.config_of(RunConfig, line[:1]).steps != 3
    assert capsys.readouterr().out == "run\n"
