"""The run folder: what may change between two starts, who may write, and what is found out before
anything compiles."""

import contextlib
import functools
import json
import os
import platform
import pwd
import runpy
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.cli.codes import UsageError
from experiments.run_folders import folder as folder_module
from experiments.run_folders import stored
from experiments.run_folders.folder import RunFolder, use_compilation_cache
from experiments.sweeps import runner
from experiments.train import open_sources
from experiments.train_loop import data_check
from experiments.train_loop.loop import evaluate
from kha_jax.config import ConfigError, from_dict, to_dict
from kha_jax.data import Draws, MultiQueryAssociativeRecall, PythonSource
from kha_jax.errors import CheckpointError, DataError, RunError, StorageError
from kha_jax.mesh import make_mesh
from kha_jax.metrics import MetricsFile, plain_row
from kha_jax.ops.losses import TokenSums
from kha_jax.runs import faults
from kha_jax.runs.results import write_results
from kha_jax.storage import cache_folder, writable, write_text
from kha_jax.training.run_config import RunConfig
from kha_jax.training.run_folder import (
    NEXT,
    batch_sizes,
    config_hash,
    load,
    read_config,
    read_lineage,
)
from tests.runs import CONFIGS

RUN = RunConfig(batch_size=4, seq_len=64)
SOURCE = types.SimpleNamespace(fingerprint="text")
OTHER = types.SimpleNamespace(fingerprint="another text")


def begin(path, config=RUN, allowed=(), source=SOURCE, validation=SOURCE):
    """What train does before its state is there; the folder and whether a change was allowed."""
    folder = RunFolder(path, config, list(allowed))
    folder.identify(source, validation)
    return folder


@pytest.fixture
def folder(tmp_path):
    """A run that has a checkpoint."""
    first = begin(tmp_path)
    first.keep(0)
    first.close()
    (tmp_path / "checkpoints" / "00000001").mkdir(parents=True)
    return tmp_path


RATE = RUN.replace(optimizer=RUN.optimizer.replace(learning_rate=0.5))
WIDER = RUN.replace(model=RUN.model.replace(width=64))
REFUSED = {
    "a rate that is not named": (
        RATE,
        (),
        "optimizer.learning_rate: this run began with 0.00075, found 0.5",
    ),
    "more steps": (
        RUN.replace(steps=2000),
        (),
        "--allow_changes=steps, which .* the next learning rate is 1.5e-05 instead of 3e-05",
    ),
    "another is named": (RATE, ["seed"], "optimizer.learning_rate: this run"),
    "architecture": (WIDER, ["model.width"], "model.width: .*256, found 64; the model cannot"),
    "no field": (RUN, ["optimizer.learning_rat"], "did you mean 'optimizer.learning_rate'"),
    "part of a name": (RATE, ["optimizer.learn"], "is no field"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_change_leaves_the_folder_as_it_was(folder, name):
    config, allowed, message = REFUSED[name]
    before = {p: p.read_bytes() for p in folder.glob("*.json")}
    with pytest.raises(UsageError, match=message):
        begin(folder, config, allowed)
    assert {p: p.read_bytes() for p in folder.glob("*.json")} == before
    begin(folder).close()  # the original command goes on


@pytest.mark.parametrize("allowed", ["optimizer.learning_rate", "optimizer"])
def test_an_allowed_change_is_kept_once_the_state_is_there(folder, allowed):
    changed = begin(folder, RATE, [allowed])
    assert from_dict(RunConfig, json.loads((folder / "config.json").read_text())) == RUN
    changed.keep(7)
    changed.close()
    assert from_dict(RunConfig, json.loads((folder / "config.json").read_text())) == RATE
    before, after = json.loads((folder / "lineage.json").read_text())
    assert after["from_step"] == 7
    assert after["changes"] == {"optimizer.learning_rate": [0.00075, 0.5]}
    with pytest.raises(UsageError, match="began with 0.5, found 0.00075"):
        begin(folder)
    again = begin(folder, RATE)
    known = again.checkpoints({}).accepts
    assert [one["config"] for one in known[:2]] == [before["config"], after["config"]]
    again.close()


class Cut(BaseException):
    """A kill, at a place."""


@pytest.mark.parametrize("point", ["config_written", "lineage_written"])
@pytest.mark.parametrize("begun", [True, False])
def test_a_kill_between_config_and_lineage_leaves_one_of_two_runs(
    folder, point, begun, monkeypatch
):
    """begun: the run had a checkpoint; otherwise it starts again, as another one."""
    if not begun:
        (folder / "checkpoints" / "00000001").rmdir()

    def cut(where, step):
        if where == point:
            raise Cut

    changed = begin(folder, RATE, ["optimizer"])
    with monkeypatch.context() as patched, pytest.raises(Cut):
        patched.setattr(faults, "at", cut)
        changed.keep(7)
    changed.close()
    left = RATE if point == "lineage_written" else RUN
    assert read_config(folder) == left
    for config in (left, RATE):  # goes on as it is, and is changed after all
        again = begin(folder, config, ["optimizer"])
        again.keep(7)
        again.close()
        assert read_config(folder) == config
        assert not (folder / NEXT).exists()


def test_a_kind_is_known_while_it_is_given_up(folder, monkeypatch):
    """The registrations of before and of now both stand until config.json is the new one."""
    written = []
    monkeypatch.setattr(folder_module, "write_registrations", lambda _, *of: written.append(of))
    changed = begin(folder, RATE, ["optimizer"])
    changed.keep(7)
    changed.close()
    assert written == [(RUN, RATE), (RATE,)]


EDITED = {
    "a default": ("model.attention.projection.rope_theta", 10.0, "rope_theta=10.0 is not what"),
    "what had a value": ("seq_len", 32, "differs from what lineage.json records .hash"),
    "back to a default": ("batch_size", 16, "differs from what lineage.json records .hash"),
}


@pytest.mark.parametrize("name", EDITED)
def test_a_config_that_was_edited_is_refused_by_every_reader(folder, name):
    """What decides nothing that is learnt may be."""
    field, value, said = EDITED[name]
    *groups, last = field.split(".")
    path = folder / "config.json"

    def edit(*change):
        values = json.loads(path.read_text())
        functools.reduce(dict.__getitem__, groups, values)[last] = value
        path.write_text(json.dumps({**values, **dict(change)}))

    whole = path.read_text()
    edit(("max_nonfinite_steps", 3))
    for read in (read_config, load, lambda _: begin(folder)):
        with pytest.raises(DataError, match=f"config.json: .*{said}.*; put back") as found:
            read(folder)
        assert len(str(found.value).splitlines()) == 1
    path.write_text(whole.replace('"max_nonfinite_steps": 10', '"max_nonfinite_steps": 3'))
    assert read_config(folder) == RUN.replace(max_nonfinite_steps=3)


def test_a_config_that_is_gone_is_that_of_the_lineage(folder):
    (folder / "config.json").unlink()
    begin(folder).close()
    with pytest.raises(UsageError, match="is gone, and lineage.json records another"):
        begin(folder, RATE)


def test_an_older_config_is_none_of_the_last_entry(folder):
    """And its checkpoints are, as before."""
    before = (folder / "config.json").read_text()
    changed = begin(folder, RATE, ["optimizer"])
    changed.keep(7)
    changed.close()
    (folder / "config.json").write_text(before)
    with pytest.raises(DataError, match="config.json: differs"):
        read_config(folder)
    assert [one["config"] for one in read_lineage(folder, RUN)] == list(
        map(config_hash, (RUN, RATE))
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_that_is_read_back_has_its_hash(path):
    config = from_dict(RunConfig, runpy.run_path(str(path))["get_config"]())
    assert config_hash(from_dict(RunConfig, json.loads(json.dumps(to_dict(config))))) == (
        config_hash(config)
    )


def test_what_does_not_matter_to_the_result_may_change(folder):
    free = RUN.replace(evaluation=RUN.evaluation.replace(every=3), max_nonfinite_steps=2)
    changed = begin(folder, free)
    assert not changed.changes and config_hash(free) == config_hash(RUN) != config_hash(RATE)
    changed.close()


@pytest.mark.parametrize("split", ["data", "validation"])
def test_another_text_is_refused_unless_allowed(folder, split):
    other = {{"data": "source"}.get(split, split): OTHER}
    with pytest.raises(DataError, match="--allow_changes=data"):
        begin(folder, **other)
    changed = begin(folder, allowed=["data"], **other)
    assert changed.changes == {split: ("text", "another text")}
    changed.close()


def test_a_text_that_an_older_folder_does_not_name_is_taken_for_equal_and_said_once(folder, caplog):
    caplog.set_level("INFO", "kha_jax")
    path = folder / "lineage.json"
    entries = json.loads(path.read_text())
    path.write_text(
        json.dumps([{k: v for k, v in one.items() if k != "validation"} for one in entries])
    )
    older = read_lineage(folder, RUN)
    for said in (1, 1):
        again = begin(folder, validation=OTHER)
        assert again.checkpoints({}).accepts[0] == older[0] and not again.changes
        again.keep(3)
        again.close()
        assert caplog.text.count("names no validation data") == said
    with pytest.raises(DataError, match="began with another text, found text"):
        begin(folder)


def test_another_interpreters_text_names_both(folder):
    """And only where there are two."""
    other = types.SimpleNamespace(fingerprint="another text")
    path = folder / "checkpoints" / "00000001" / "MANIFEST.json"
    about = {"step": 1, "files": {"a": {"bytes": 1, "sha256": ""}}}
    for version, said in (
        ("2.7.18", "changes=data; its newest checkpoint is of Python 2.7.18, this is 3[.]"),
        (platform.python_version(), "changes=data$"),
    ):
        path.write_text(json.dumps({**about, "versions": {"python": version}}))
        with pytest.raises(DataError, match=said):
            begin(folder, source=other)


def test_another_tokenizer_is_refused(folder):
    path = folder / "lineage.json"
    path.write_text(path.read_text().replace("bytes-v1", "bpe"))
    with pytest.raises(UsageError, match="began with the tokenizer bpe, found bytes-v1"):
        begin(folder)


@pytest.mark.parametrize("damage", ["{", "[]x", '{"a": 1}', "[3]", '["text"]'])
def test_a_damaged_record_is_named(folder, damage):
    (folder / "lineage.json").write_text(damage)
    with pytest.raises(RunError, match="lineage.json: is damaged"):
        begin(folder)


@pytest.mark.parametrize(
    "damage", [b"{", b"[]", b"3", b"\xff", b'{"steps": "many"}', b'{"model": 1}']
)
def test_a_damaged_config_is_named(folder, damage):
    (folder / "config.json").write_bytes(damage)
    with pytest.raises(RunError, match="config.json: is damaged"):
        begin(folder)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match=f"--workdir={path} cannot be written"):
            begin(path)


def test_the_home_folder_is_written_as_people_write_it(tmp_path, monkeypatch):
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir(), here.mkdir(), (home / "module.py").write_text("pass\n" * 99)
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("KHA_JAX_CACHE", "~/k")
    assert cache_folder("data") == home / "k" / "data"
    assert stored.local_folder("workdir", "~/x") == stored.own_folder("out", "~/x") == home / "x"
    PythonSource(cache_dir="~/c", held_out=0.01, roots=("~",)).open("train", 8, 0)
    assert any((home / "c").iterdir()) and not any(here.iterdir())
    monkeypatch.setenv("HOME", "")
    assert cache_folder("data") == Path(pwd.getpwuid(os.getuid()).pw_dir) / "k" / "data"


FIXED = {
    "lock": lambda run: RunFolder(run, RUN, []),
    "metrics.jsonl": lambda run: MetricsFile(run / "metrics.jsonl", 0).write(1, {}),
    "metrics.tmp": lambda run: MetricsFile(run / "metrics.jsonl", 0),
    "config.json": lambda run: begin(run).keep(0),
    "lineage.json": lambda run: begin(run).keep(0),
    "config.PID.tmp": lambda run: begin(run).keep(0),
    "tokenizer_ids.json": lambda run: begin(run).keep(0),
    ".probe-PID": lambda run: writable(run),
    "runs.csv": lambda run: write_results(run / "runs.csv", []),
    "runs.tmp": lambda run: write_results(run / "runs.csv", []),
    "claim": lambda run: runner._locked(run / "claim").__enter__(),
    "report.md": lambda run: write_text(run / "report.md", "new"),
}


@pytest.mark.parametrize("kind", ["link", "pipe"])
@pytest.mark.parametrize("name", FIXED)
def test_a_file_of_a_fixed_name_is_not_opened_through_a_link(tmp_path, name, kind):
    """It is refused or replaced; what the link leads to stays as it is. A pipe hangs nobody."""
    (tmp_path / "outside").write_text('{"step": 5}\n')
    run = tmp_path / "run"
    run.mkdir()
    place = run / name.replace("PID", str(os.getpid()))
    if kind == "link":
        place.symlink_to(tmp_path / "outside")
    elif name != "metrics.jsonl":  # which is read first
        os.mkfifo(place)
    with contextlib.suppress(UsageError, OSError):
        FIXED[name](run)
    assert (tmp_path / "outside").read_text() == '{"step": 5}\n'
    left = {p.name for p in run.iterdir()} - {*FIXED, "run", place.name}
    assert not left, left


def test_a_cache_of_programs_that_cannot_be_written_costs_only_time(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KHA_JAX_CACHE", str(tmp_path / "file"))
    before = jax.config.jax_compilation_cache_dir
    use_compilation_cache()
    assert f"{tmp_path / 'file' / 'compiled'}: Not a directory; compiled programs" in caplog.text
    assert jax.config.jax_compilation_cache_dir == before


def test_caches_are_where_the_user_says_or_named_as_missing(tmp_path, monkeypatch):
    for name in ("KHA_JAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/of/the/user")
    before = jax.config.jax_compilation_cache_dir
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == before
    user = types.SimpleNamespace(pw_dir=str(tmp_path))
    monkeypatch.setattr(pwd, "getpwuid", lambda number: user)
    monkeypatch.setenv("HOME", "")
    assert cache_folder("data") == tmp_path / ".cache" / "kha_jax" / "data"
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    with pytest.raises(StorageError, match="no home folder; name one with KHA_JAX_CACHE"):
        cache_folder("data")


def test_checkpoints_that_do_not_fit_are_refused_with_path_and_bytes(tmp_path):
    folder = begin(tmp_path)
    huge = {"w": jax.ShapeDtypeStruct((2**40,), np.float32)}
    message = f"{tmp_path}/checkpoints: 3 checkpoints of 4,398,046,511,104 bytes .* bytes are free"
    with pytest.raises(CheckpointError, match=message):
        folder.checkpoints(huge)
    folder.close()


def test_a_resume_checks_its_next_batch(folder, tmp_path, capsys):
    config = RUN.replace(data=MultiQueryAssociativeRecall(pairs=4))
    source = config.data.open("train", 64, 0)
    here = begin(tmp_path / "run", config, source=source)
    with here.checkpoints({}) as checkpoints:
        checkpoints.save(5, {"w": np.zeros(3)})
    manifest = json.loads((checkpoints.path(5) / "MANIFEST.json").read_text())
    assert {"config", "data", "validation", "tokenizer", "next_batch", "versions", "files"} <= set(
        manifest
    )
    here.check_next_batch(checkpoints, 5)
    assert f"next batch {manifest['next_batch'][:12]} matches" in capsys.readouterr().out
    here.source = config.data.open("train", 64, 1)
    with pytest.raises(DataError, match="is not the checkpoint's"):
        here.check_next_batch(checkpoints, 5)
    here.close()


def test_a_changed_batch_size_goes_on_with_the_next_window(folder, tmp_path):
    """Also of the steps that are trained again after a walk back, and of what older folders did."""
    wider = RUN.replace(batch_size=8)
    changed = begin(folder, wider, ["batch_size"])
    assert changed.begin_at(10)(12) == range(4 * 10 + 8 * 2, 4 * 10 + 8 * 3)
    for step in (10, 6, 6):
        changed.keep(step)
        changed.close()
        changed = begin(folder, wider)
        assert changed.begin_at(20)(12) == range(
            4 * step + 8 * (12 - step), 4 * step + 8 * (13 - step)
        )
    changed.close()
    path = folder / "lineage.json"
    entries = json.loads(path.read_text())
    assert [one["from_step"] for one in entries] == [0, 10, 6]
    older = [{k: v for k, v in one.items() if k != "batch_size"} for one in entries[:2]]
    path.write_text(json.dumps(older))
    assert Draws(batch_sizes(folder, wider))(12) == range(8 * 12, 8 * 13)
    again = begin(folder, RUN, ["batch_size"])
    assert again.begin_at(20)(22) == range(8 * 20 + 4 * 2, 8 * 20 + 4 * 3)
    again.keep(20)
    again.close()
    assert Draws(batch_sizes(folder, RUN))(22) == range(8 * 20 + 4 * 2, 8 * 20 + 4 * 3)


@pytest.mark.parametrize("windows", [1, 3, 4, 11, 40])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_evaluation_counts_every_window_once_in_micro_batches(windows, accumulation):
    """Any number of them, also fewer than a batch; never more rows at once than a step has."""
    data = MultiQueryAssociativeRecall(pairs=4, validation_examples=windows)
    config = RUN.replace(batch_size=8, accumulation=accumulation, data=data)
    config = config.replace(evaluation=config.evaluation.replace(batches=2))
    source, seen = data.open("validation", 64, 0), []

    def step(state, batch):
        assert batch["tokens"].shape == (8 // accumulation, 64)
        counted = np.asarray(batch["weights"])
        seen.append(counted.sum(axis=1))
        tokens = (np.asarray(batch["tokens"]) * counted).sum()
        return TokenSums(loss=tokens, z_loss=0.0, correct=0.0, tokens=counted.sum())

    mesh = make_mesh(config.mesh, jax.devices()[:1])
    values = evaluate(step, None, source, config, mesh)
    expected = [source[i] for i in range(min(windows, 16))]
    total = sum((one["tokens"] * one["weights"]).sum() for one in expected)
    assert (np.concatenate(seen) > 0).sum() == len(expected)
    assert values["val_loss"] == pytest.approx(total / sum(o["weights"].sum() for o in expected))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_has_the_data_that_its_steps_and_evaluations_need(path, cache):
    config = from_dict(RunConfig, runpy.run_path(str(path))["get_config"]())
    if isinstance(config.data, PythonSource):
        config = config.replace(data=config.data.replace(cache_dir=cache))
    train, validation = open_sources(config)
    assert len(train) >= config.batch_size and len(validation) > 0


@pytest.mark.parametrize("split, share", [("validation", 1e-9), ("train", 1 - 1e-9)])
def test_a_split_of_no_module_is_the_fault_of_held_out(tmp_path, split, share):
    (tmp_path / "module.py").write_text("pass\n")
    source = PythonSource(held_out=share, roots=(str(tmp_path),), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(
        DataError, match=f"held_out={share}: leaves none of the 1 modules for {split}"
    ):
        source.open(split, 8, 0)


def test_too_little_data_is_found_before_anything_compiles(cache):
    config = RUN.replace(data=PythonSource(cache_dir=cache))
    with pytest.raises(DataError, match="train-.* holds 1?[0-9] windows, fewer than the 64"):
        open_sources(config.replace(batch_size=64, seq_len=2**20))
    with pytest.raises(DataError, match="validation-.* holds 0 windows.*config.evaluation.every=0"):
        open_sources(config.replace(batch_size=1, seq_len=2**21))
    unseen = config.evaluation.replace(every=0)
    open_sources(config.replace(batch_size=1, seq_len=2**21, evaluation=unseen))


def test_the_mean_of_no_target_is_none(tmp_path):
    """Windows without one are refused; where they are evaluated, the mean is not 0."""
    source = PythonSource(roots=(str(tmp_path),), held_out=0.5, cache_dir=str(tmp_path / "cache"))
    for number in range(100):  # of those that are held out none has a text
        path = tmp_path / f"{number}.py"
        path.write_text("" if source._is_held_out(path.name) else "a = 1\n")
    config = RUN.replace(data=source, seq_len=4)
    with pytest.raises(DataError, match="no target counts in the 1?[0-9] windows of an evaluation"):
        open_sources(config)
    unseen = config.replace(evaluation=config.evaluation.replace(every=0))
    _, validation = open_sources(unseen)

    def step(state, batch):
        return TokenSums(loss=0.0, z_loss=0.0, correct=0.0, tokens=np.sum(batch["weights"]))

    mesh = make_mesh(config.mesh, jax.devices()[:1])
    values = evaluate(step, None, validation, config, mesh)
    assert plain_row(values) == {"val_loss": None, "val_accuracy": None}


def test_a_large_run_does_not_train_on_what_its_ids_are_not_for(caplog):
    """Twice the ids and 10^9 tokens are at the limit; whoever types the data means it."""
    there = RUN.data.vocabulary_size()
    large = RUN.replace(seq_len=1000, batch_size=1000, steps=1000, accumulation=1)

    def with_ids(run, ids):
        return run.replace(model=run.model.replace(vocabulary_size=ids))

    for run in (
        with_ids(large, 2 * there + 1),
        with_ids(large.replace(steps=1001), 2 * there),
    ):
        data_check.check_vocabulary(run, ["--config=a.py", "--config.steps=1001"])
    beyond = with_ids(large.replace(steps=1001), 2 * there + 1)
    with pytest.raises(ConfigError, match="or say --config.data.source=python_source"):
        data_check.check_vocabulary(beyond, ["--config=a.py", "--config.model.layers=2"])
    data_check.check_vocabulary(beyond, ["--config=a.py", "--config.data.held_out=0.1"])
    for examples, warnings in ((250_000, 0), (249_999, 1)):
        data_check.warn_of_epochs(large, examples)
        assert len(caplog.messages) == warnings
