"""Sweeps: what is listed, what is trained and what is not trained again. Runs are made up, but for
one real sweep that is killed."""

import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from experiments.cli import codes
from experiments.cli.codes import UsageError
from experiments.run_folders import results
from experiments.run_folders.folder import RunFolder
from experiments.sweeps import members, planned
from experiments.sweeps.planned import Wanted
from experiments.sweeps.runner import Sweep
from kha_jax.data import batch_hash
from kha_jax.errors import DataError, SweepError
from kha_jax.mesh import MeshConfig, make_mesh
from kha_jax.runs.arrays import leaves
from kha_jax.runs.results import read_results
from kha_jax.training.step import make_trainer
from tests.runs import ROOT, SMALL

ROW = Wanted("mlp", ("--config=configs/kha_tiny.py", "--config.steps=4"), "mlp")
ONE_LAYER = ["config.model.layers=1", "config.model.width=16", "config.model.feed_forward.width=8"]


def rows(*names):
    return [
        Wanted(name, (f"--config=configs/kha_tiny.py:{name}", "--config.steps=4"), names[0])
        for name in names
    ]


@pytest.fixture
def trained(monkeypatch):
    """Names of the runs that were trained, whose processes are made up: a row called gate fails,
    others reach a loss of their own."""
    names = []

    def train(self, line, log, watch):
        folder = log.parent
        names.append(folder.name)
        if folder.name.startswith("gate"):
            log.write_text("error: more than one can say\n")
            return codes.NON_FINITE
        saved = folder / "checkpoints" / "00000004"
        saved.mkdir(parents=True)
        about = {
            "step": 4,
            "files": {"f": {"bytes": 1, "sha256": ""}},
            "data": "text" * 9,
            "validation": "held" * 9,
        }
        (saved / "MANIFEST.json").write_text(json.dumps({**about, "hardware": "a machine"}))
        steps = [{"step": n, "loss": 5.0 - n, "tokens_per_second": 4096.0} for n in range(1, 5)]
        steps[1]["attention/largest_logit"] = [7.0, math.nan, 9.5]  # of each layer
        lines = [*steps, {"step": 4, "val_loss": len(names) / 10, "val_bits_per_byte": 2.0}]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return codes.DONE

    monkeypatch.setattr(Sweep, "_train", train)
    monkeypatch.setattr(Sweep, "_texts", lambda self, config: ("text" * 3, "held" * 3))
    return names


def train_all(folder, runs, known=()):
    """What the command does, without what it shows; the sweep and the codes."""
    sweep = Sweep(folder, runs, known)
    sweep.begin({"title": "a sweep", "rows": []})
    taken = sweep.take_known()
    return sweep, taken, [sweep.train(run, print) for run in sweep.missing()]


def test_settings_make_rows_with_their_baselines():
    varied = planned.varied(
        rows("baseline", "mlp"), ["config.optimizer.b1=0.8,0.9", "config.steps=2"]
    )
    assert [(row.name, row.baseline) for row in varied] == [
        ("baseline-b1=0.8", "baseline-b1=0.8"),
        ("baseline-b1=0.9", "baseline-b1=0.9"),
        ("mlp-b1=0.8", "baseline-b1=0.8"),
        ("mlp-b1=0.9", "baseline-b1=0.9"),
    ]
    runs = planned.runs(varied, seeds=2, learning_rates=["1e-3", "0.1"])
    assert [run.name for run in runs[:2]] == [
        "baseline-b1=0.8-lr1e-3-seed0",
        "baseline-b1=0.8-lr0.1-seed0",
    ]
    assert len({run.name for run in runs}) == len({run.hash() for run in runs}) == 16
    last = runs[-1]
    assert (last.seed, last.config.seed, last.config.steps) == (1, 1, 2)
    assert (last.config.optimizer.b1, last.config.optimizer.learning_rate) == (0.9, 0.1)
    alone = planned.varied([ROW], ["config.optimizer.b1=0.8,0.9"])
    assert {row.baseline for row in alone} == {"mlp-b1=0.8"}


def test_matched_rows_have_the_parameters_of_their_baseline():
    """Counted in the trees themselves; a width of one more or less is no nearer."""

    def parameters(config, more=0):
        model = config.model
        width = model.feed_forward.width + more
        model = model.replace(feed_forward=model.feed_forward.replace(width=width))
        mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
        made = make_trainer(config.replace(model=model), mesh).abstract.params
        return sum(leaf.size for leaf in jax.tree.leaves(made))

    asked = planned.varied(rows("baseline", "mlp", "gated"), ["config.model.width=64"])
    before = {run.row: run.config for run in planned.runs(asked)}
    after = {run.row: run.config for run in planned.runs(members.matched(asked, ["params"]))}
    for row in asked:
        old, new = before[row.name], after[row.name]
        width = new.model.feed_forward.width
        assert new == old.replace(
            model=old.model.replace(feed_forward=old.model.feed_forward.replace(width=width))
        )
        target = parameters(before[row.baseline])
        off = [abs(parameters(new, more) - target) for more in (-1, 0, 1)]
        assert min(off) == off[1]
        assert (width == old.model.feed_forward.width) == (row.name == row.baseline)
    narrow = planned.varied(rows("baseline", "mlp"), ["config.model.feed_forward.width=1"])
    with pytest.raises(UsageError, match="mlp cannot be brought to baseline: .* small enough"):
        members.matched(narrow, ["params"])


@pytest.mark.parametrize(
    ("settings", "rates", "message"),
    [
        (["steps=3"], [], "--set=steps=3: must be config.FIELD=VALUE"),
        (["config.stepz=3"], [], "config.stepz: is not a known field; did you mean 'steps'?"),
        (["config.steps=3,x"], [], "config.steps: expected int, found 'x'"),
        (["config.evaluation.every=0"], [], "config.evaluation.every: .* found 0"),
        ([], ["fast"], "--learning_rates=fast: must be a number"),
        (["config.seed=1,2"], [], "use --seeds"),
        (["config.steps=4,4"], [], "twice"),
        (["config.steps=4", "config.steps=5"], [], "config.steps is set twice"),
        ([], ["1e-3", "0.001"], "twice"),
    ],
)
def test_what_cannot_be_planned_is_one_line(settings, rates, message):
    with pytest.raises(UsageError, match=message):
        planned.runs(planned.varied([ROW], settings), learning_rates=rates)


def test_the_commas_of_a_tuple_make_no_axis():
    (one,) = planned.varied([ROW], ["config.data.roots=('stdlib','packages')"])
    assert one.arguments[-1] == "--config.data.roots=('stdlib','packages')"
    two = planned.varied([ROW], ["config.data.roots=('stdlib',),('/usr/lib',)"])
    assert [row.name for row in two] == ["mlp-roots=stdlib", "mlp-roots=usr_lib"]  # are folders


def test_a_sweep_trains_what_is_missing_and_goes_past_what_fails(tmp_path, trained):
    runs = planned.runs(rows("baseline", "gate", "mlp"))
    sweep, _, codes = train_all(tmp_path, runs)
    assert trained == ["baseline-seed0", "gate-seed0", "mlp-seed0"]
    assert codes == [0, 76, 0] and sweep.failed == {"gate-seed0": 76}
    assert sweep.why(runs[1]) == "error: more than one can say"
    again, _, codes = train_all(tmp_path, runs)
    assert trained[3:] == ["gate-seed0"]
    line = again.done()["mlp-seed0"]
    assert (line.val_loss, line.train_loss, line.step_seconds) == (0.3, 1.0, 1.0)
    assert (line.hardware, line.curve) == ("a machine", {4: 0.3})
    assert (line.first_loss, line.largest_logit) == (4.0, 9.5)
    assert (line.data, line.validation) == ("text" * 3, "held" * 3)
    longer = planned.runs(
        [row._replace(arguments=(*row.arguments, "--config.steps=5")) for row in rows("mlp")]
    )
    assert not Sweep(tmp_path, longer).done()  # of another config


def test_known_results_are_not_trained_again_whatever_they_are_called(tmp_path, trained, caplog):
    caplog.set_level("INFO", "kha_jax")
    runs = planned.runs(rows("baseline", "mlp"))
    train_all(tmp_path / "here", runs)
    path = tmp_path / "here" / "runs.csv"
    known = results.known([str(path)])
    assert repr(known) == repr(list(Sweep(tmp_path / "here", runs).done().values()))  # with NaN
    renamed = [run._replace(name=f"other-{run.name}", row="other") for run in runs]
    assert set(Sweep(tmp_path / "dry", renamed, known).elsewhere()) == {r.name for r in renamed}
    sweep, taken, codes = train_all(tmp_path / "there", renamed, known)
    assert (taken, codes, len(trained)) == (2, [], 2)
    assert {result.row for result in sweep.done().values()} == {"other"}
    for name, (split, text, taken) in {
        "other": ("data", "another text", 0),
        "other_validation": ("validation", "another text", 0),
        "unknown": ("validation", None, 2),  # an older table, which is said
    }.items():
        elsewhere = [result._replace(**{split: text}) for result in known]
        assert train_all(tmp_path / name, renamed, elsewhere)[1] == taken
        assert ("without a hash of the validation data" in caplog.text) == (text is None)
    for split in ("data", "validation"):  # a sweep goes on with its own lines alone
        own = Sweep(tmp_path / "unknown", renamed)
        for result in own.done().values():
            own.keep(result._replace(**{split: "another text"}))
        with pytest.raises(DataError, match="name another --out"):
            own.begin({})
        for result in known:
            own.keep(result._replace(name=f"other-{result.name}"))
    path.write_text(path.read_text().replace("val_loss", "loss"))
    with pytest.raises(SweepError, match="is no table of runs"):
        results.known([str(path)])


OLD = ROOT / "tests" / "fixtures" / "sweep_66038df"
TINY_SWEEP = [
    *("config.steps=4", "config.batch_size=4", "config.seq_len=32", "config.evaluation.every=2"),
    *ONE_LAYER,
]


def test_runs_of_an_older_commit_are_known_and_go_on(tmp_path, monkeypatch):
    """runs.csv of 66038df, of a run on text and one on a task, and what the one on text wrote
    beside its arrays: configs and data of today still have the hashes of then, and the next batch
    is the one that it foresaw."""
    monkeypatch.setenv("KHA_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    for number in range(12):
        (tmp_path / "text" / f"module_{number}.py").write_text(f"x_{number} = {number}\n" * 400)
    on_text = ["config.data.roots=('text',)", "config.data.held_out=0.2"]
    wanted = [
        *planned.varied(
            [Wanted("text", (f"--config={ROOT}/configs/kha_tiny.py",), "text")], on_text
        ),
        Wanted("task", (f"--config={ROOT}/configs/mqar_tiny.py",), "task"),
    ]
    runs = planned.runs(planned.varied(wanted, TINY_SWEEP))
    sweep = Sweep(tmp_path / "sweep", runs, results.known([str(OLD / "runs.csv")]))
    sweep.begin({})
    assert sweep.take_known() == 2 and not sweep.missing()
    found = {run.name: sweep.done()[run.name] for run in runs}
    assert [line.data for line in found.values()] == ["5c3470f11ab0", "267e46ed9be1"]

    old = shutil.copytree(OLD / "text", tmp_path / "run")
    config, manifest = runs[0].config, json.loads(next(old.rglob("MANIFEST.json")).read_text())
    folder = RunFolder(old, config, [])
    sources = [config.data.open(split, config.seq_len, 0) for split in ("train", "validation")]
    folder.identify(*sources)
    draws = folder.begin_at(4)
    assert batch_hash(sources[0], draws=draws, seed=0, step=4) == manifest["next_batch"]
    folder.keep(4)
    folder.close()
    assert json.loads((old / "lineage.json").read_text())[0]["data"] == sources[0].fingerprint


def test_a_run_that_another_process_trains_is_passed_over(tmp_path, trained):
    (run,) = planned.runs([ROW])
    for name in ("claim", "lock"):  # of a sweep, and of a run that outlived its sweep
        folder = tmp_path / name / run.name
        folder.mkdir(parents=True)
        holder = subprocess.Popen(["flock", str(folder / name), "sleep", "60"])
        time.sleep(0.3)
        try:
            assert train_all(tmp_path / name, [run])[2] == [None]
        finally:
            holder.kill()
    assert not trained


def test_a_sweep_that_is_told_to_stop_begins_no_other_run(tmp_path, monkeypatch):
    """Also where the run that trains ends well before it hears of it. Paths mean the same to both,
    wherever a sweep is started."""
    monkeypatch.chdir(tmp_path)
    sweep = Sweep(tmp_path, [])
    log = pathlib.Path("log")
    log.touch()
    handler = "signal.signal(15, lambda *_: sys.exit(0))"
    imports = "import os, signal, sys, time, experiments"
    child = f"{imports}; {handler}; print(os.getcwd(), flush=True); time.sleep(60)"

    def stop():
        while not log.read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    assert sweep._train([sys.executable, "-c", child], log, print) == 0 and sweep.asked_to_stop
    assert log.read_text().strip() == str(tmp_path)


def test_runs_of_a_seed_start_from_the_same_values():
    """Every leaf that two rows have in common is equal to the bit."""
    starts, mesh = {}, make_mesh(MeshConfig(data=1), jax.devices()[:1])
    for run in planned.runs(planned.varied(rows("baseline", "mlp"), ONE_LAYER)):
        params = make_trainer(run.config, mesh).init(jax.random.key(run.seed)).params
        starts[run.row] = leaves(params)
    base = starts.pop("baseline")
    for other in starts.values():
        assert base and base.keys() < other.keys()
        assert all(np.array_equal(base[name], other[name]) for name in base)


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on_to_the_same_results(tmp_path):
    """kill -9 of the sweep in the middle of its second run, which lives on without it; then a run
    that cannot end well."""
    settings = [f"--set={flag.removeprefix('--')}" for flag in SMALL]
    line = [sys.executable, "-m", "experiments.sweep", *settings]
    line += ["--configs=configs/kha_tiny.py:baseline,configs/kha_tiny.py:mlp"]
    environment = {**os.environ, "KHA_JAX_CACHE": str(tmp_path / "cache"), "XLA_FLAGS": ""}

    def sweep(name, *more):
        return subprocess.Popen(
            [*line, f"--out={tmp_path / name}", *more],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    first = sweep("killed")
    while not (tmp_path / "killed" / "mlp-seed0" / "metrics.jsonl").exists():
        time.sleep(0.1)
        assert first.poll() is None
    first.send_signal(signal.SIGKILL)
    first.wait()
    again = sweep("killed")
    out, _ = again.communicate(timeout=300)
    assert again.returncode == 0 and "baseline-seed0:" not in out, out
    whole = sweep("whole")
    assert whole.wait(timeout=300) == 0

    def figures(name):
        return {
            (one.name, one.val_loss, one.train_loss)
            for one in read_results(tmp_path / name / "runs.csv")
        }

    assert figures("killed") == figures("whole") and len(figures("whole")) == 2
    bad = sweep("bad", "--set=config.optimizer.weight_decay=0.1,3e38", "--index=1")
    out, _ = bad.communicate(timeout=300)
    assert bad.returncode == 76 and "baseline-weight_decay=3e38-seed0 failed with 76" in out
    assert "runs failed; the log of the first" in out


def test_a_run_that_a_signal_ends_leaves_a_code_of_the_contract():
    for failed, expected in (({"a": -9}, codes.HANG), ({"a": 65, "b": -9}, 65), ({}, codes.DONE)):
        assert Sweep.code(SimpleNamespace(failed=failed)) == expected
