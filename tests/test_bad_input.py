"""What cannot work ends with one line on stderr, the contract's exit code, nothing compiled and no
traceback: the command line, config files, run folders, data, prompts.

Every row is a command as a user types it (see tests.commands); all of them are run once.
"""

import importlib.util
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.bad_inputs import GENERATE, INPUTS, OWN_DATA, TRAIN, no_damage, pipe
from tests.bad_lines import FILES, FLAGS, TINY
from tests.commands import ROOT, run_all


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder that holds a good `run` and the file `text`; the cache."""
    here, cache = tmp_path_factory.mktemp("bad"), tmp_path_factory.mktemp("cache")
    (here / "text").write_text("no folder")
    (here / "bad.jsonl").write_text('{"text": "good"}\n{"a": "bad"}\n')
    pipe(here / "pipe.py")
    ((code, _, err, _),) = run_all([("train", [*TINY, f"--workdir={here / 'run'}"])], cache)
    assert code == 0, err
    return here, cache


@pytest.fixture(scope="module")
def results(trained):
    """What each command of the tables left with, by name."""
    (here, cache), cases = trained, {}
    taken = socket.create_server(("", 0))
    for flags in FLAGS:
        arguments = flags.replace("{here}", str(here)).split(" ")
        arguments = [a.replace("{port}", str(taken.getsockname()[1])) for a in arguments]
        place = [] if "--workdir" in flags else [f"--workdir={here / 'new'}"]
        cases[flags] = "train", [*arguments, *place][:: -1 if flags == "--config" else 1]
    for number, content in enumerate(FILES):
        path = here / f"config_{number}.py"
        path.write_bytes(content.encode(errors="surrogateescape"))
        cases[content] = "train", [f"--config={path}", f"--workdir={here / 'new'}"]
    for number, (name, (damage, command, _, _)) in enumerate(INPUTS.items()):
        run = here / f"run_{number}"
        if damage is not no_damage:
            shutil.copytree(here / "run", run)
            if command is OWN_DATA:
                shutil.copytree(cache / "data", run / "tokens")
            damage(run)
        else:
            run = here / "run"
        told = [part.replace("{run}", str(run)).replace("{here}", str(here)) for part in command]
        cases[name] = told[0], told[1:]
    found = dict(zip(cases, run_all(list(cases.values()), cache)))
    taken.close()
    assert not (here / "new" / "checkpoints").exists()
    return found


def assert_refused(result, code, said):
    assert result.code == code and said in result.err and result.seconds < 3, result
    lines = result.err.strip().splitlines()
    assert "Traceback" not in result.err and lines[-1].startswith("error: "), result.err
    assert len(lines) == 1 or all(line.startswith("passed over") for line in lines[:-1]), lines


@pytest.mark.parametrize("flags", FLAGS, ids=ascii)
def test_bad_flags(trained, results, flags):
    assert_refused(results[flags], 2, FLAGS[flags].replace("{here}", str(trained[0])))


@pytest.mark.parametrize("content", FILES, ids=ascii)
def test_bad_config_files(results, content):
    assert_refused(results[content], 2, FILES[content])


@pytest.mark.parametrize("name", INPUTS, ids=ascii)
def test_bad_inputs(trained, results, name):
    if name not in ("report of nothing",) and INPUTS[name][1][0] == "report":
        pytest.importorskip("matplotlib")
    code, said = INPUTS[name][2:]
    assert_refused(results[name], code, said.replace("{here}", str(trained[0])))


# ---------------------------------------------------------------- output that is the product
FULL = 74, "error: the output cannot be written: No space left on device\n"
CLOSED = 74, "error: the output cannot be written: Bad file descriptor\n"
# a command, where its output goes, and with what it ends and says
OUTPUTS = [
    (("plan", "--json"), ">/dev/full", FULL),
    (("train", "--print_config"), ">/dev/full", FULL),
    (("train", "--print_config"), ">&-", CLOSED),
    (("train", "--print_config"), "| true", (0, "")),
    (("train", "--help"), ">/dev/full", FULL),
    (("train", "--config.help"), ">/dev/full", FULL),
    (("checkpoints", "--workdir={run}"), ">/dev/full", FULL),
    (("checkpoints", "--workdir={run}"), "| true", (0, "")),
    (GENERATE, ">/dev/full", FULL),
    (TRAIN, ">/dev/full", (0, "")),  # of which the product is the run
]


def test_output_that_is_the_product_is_there_or_missed(trained):
    here, cache = trained
    told = [[part.replace("{run}", str(here / "run")) for part in case[0]] for case in OUTPUTS]
    cases = [(name, [*flags, place]) for (name, *flags), (_, place, _) in zip(told, OUTPUTS)]
    for case, expected, result in zip(cases, OUTPUTS, run_all(cases, cache)):
        lines = [line for line in result.err.splitlines(True) if line.startswith("error: ")]
        assert (result.code, "".join(lines)) == expected[2], (case, result)
        assert "Traceback" not in result.err and "Exception" not in result.err, result


def test_streams_that_are_closed_from_the_start_are_no_traceback(tmp_path):
    """Nor are their numbers those of the files that a command opens."""
    python = f"cd {ROOT}; {sys.executable} -m experiments"
    said, number, file = (tmp_path / name for name in ("said", "number", "config.py"))
    file.write_text(f"with open({str(number)!r}, 'w') as f: f.write(str(f.fileno()))\n1 / 0")
    lines = {
        f"{python} >&- 2>{said}": 74,
        f"{python} >/dev/full 2>&-": 74,
        f"{python}.train --config={file} <&- >&- 2>&-": 2,
        f"{python}.train --print_config >&- 2>&-": 74,
    }
    begun = {line: subprocess.Popen(["sh", "-c", line]) for line in lines}
    assert {line: process.wait(timeout=60) for line, process in begun.items()} == lines
    assert said.read_text() == CLOSED[1] and int(number.read_text()) > 2


# ---------------------------------------------------------------- by itself
def begin(command, *arguments, **streams):
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    line = [sys.executable, "-m", f"experiments.{command}", *arguments]
    return subprocess.Popen(line, cwd=ROOT, text=True, **streams)


@pytest.mark.parametrize("command", ["train", "generate"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_imports_leaves_without_a_word(tmp_path, command, number):
    process = begin(command, f"--workdir={tmp_path / 'run'}", "--prompt=a")
    maps = f"/proc/{process.pid}/maps"
    while "multiarray" not in open(maps).read():  # numpy is there, jax is on its way
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == -number and not out and not err


@pytest.mark.slow
def test_odd_names_of_folders_are_names(tmp_path):
    """Rich's markup, a URL's and a shell's special characters, other alphabets."""
    names = "-a b*", "[red]x[/blue]", "50%41 a?b#c", "knöcking"
    cases = [("train", [*TINY, f"--workdir={tmp_path / name}"]) for name in names]
    for name, result in zip(names, run_all(cases, tmp_path / "cache")):
        assert result.code == 0 and str(tmp_path / name) in result.out, result
    cases = [("checkpoints", [f"--workdir={tmp_path / name}", "--verify"]) for name in names]
    for result in run_all(cases, tmp_path / "cache"):
        assert result.code == 0 and result.out.count("yes") == 2, result


@pytest.mark.slow
def test_odd_prompts_and_unevaluated_runs_are_no_errors(trained):
    """Escapes are understood, bytes that are no UTF-8 taken as they are."""
    here, cache = trained
    prompts = "--prompt=a\\n\\tb", "--prompt=a\\\\n", "--prompt=\udcff", "--prompt=knöcking"
    cases = [("generate", [f"--workdir={here / 'run'}", "--tokens=2", *prompts])]
    cases += [("report", [f"--workdir={here / 'run'}", f"--out={here / 'figure.png'}"])]
    told, drawn = run_all(cases, cache)
    assert told.code == 0 and "Traceback" not in told.err, told.err
    for shown in (r"--- 'a\n\tb'", r"--- 'a\\n'", "--- '\ufffd'", "--- 'knöcking'"):
        assert shown in told.out, told.out
    if importlib.util.find_spec("matplotlib"):
        assert drawn.code == 0 and (here / "figure.svg").exists(), drawn.err


@pytest.mark.slow
def test_a_reader_that_leaves_ends_the_text(trained):
    here, _ = trained
    flags = f"--workdir={here / 'run'}", "--prompt=def main(", "--tokens=4000", "--temperature=1"
    process = begin("generate", *flags)
    assert process.stdout.read(1) == "d"
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=120) == 0 and "Traceback" not in err and "Exception" not in err, err
