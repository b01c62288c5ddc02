"""convert import and export as they are typed, on a small stock folder that we write ourselves, and
training that goes on from what was imported."""

import errno
import json
import os
import resource
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.cli.codes import code_of
from experiments.converting import stock
from kha_jax import convert
from kha_jax.attention import AttentionConfig
from kha_jax.attention.projections import GroupedQuery
from kha_jax.convert import agreement
from kha_jax.convert.folders import open_folder
from kha_jax.errors import DataError
from kha_jax.feed_forward import SwiGLU
from kha_jax.mesh import MeshConfig, make_mesh
from kha_jax.model import ModelConfig
from kha_jax.runs.arrays import leaves as by_path
from kha_jax.runs.checkpoint import Checkpoints
from kha_jax.runs.manifest import read_manifest
from kha_jax.storage import files
from kha_jax.training.run_folder import read_config, read_run
from kha_jax.training.step import abstract_variables, begun, make_trainer
from tests.commands import run_all

MLP = "--set=config.model.attention.value.kind=mlp"
LINEAR = "--set=config.model.attention.key.kind=linear"
STILL = "--config.optimizer.learning_rate=1e-12"  # training that changes nothing one can see
SHORT = (
    "--config.steps=2",
    "--config.batch_size=2",
    "--config.seq_len=32",
    "--config.evaluation.every=0",
    "--config.data.source=python_source",
    "--config.mesh.data=1",
)


def model() -> ModelConfig:
    projection = GroupedQuery(query_heads=4, kv_heads=2, head_dim=8)
    attention = AttentionConfig(projection=projection)
    return ModelConfig(
        layers=2, width=24, vocabulary_size=272, attention=attention, feed_forward=SwiGLU(width=40)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A stock folder with random weights, and what lies beside them."""
    path = written(tmp_path_factory.mktemp("stock"))
    (path / "generation_config.json").write_text('{"eos_token_id": 2}\n')
    (path / "chat_template.jinja").write_text("{{ messages }}")
    (path / "README.md").write_text("of somebody")
    return path


def written(path: Path) -> Path:
    """A stock folder with random weights."""
    random = np.random.default_rng(0)
    shapes = by_path(abstract_variables(model())).items()
    made = convert.nested(
        (name, random.normal(size=leaf.shape).astype(np.float32)) for name, leaf in shapes
    )
    convert.write(path, model(), made, dtype="bfloat16")
    return path


@pytest.fixture(scope="module")
def done(folder, tmp_path_factory, cache):
    """By name what each command said, and the folder that they wrote to."""
    here = tmp_path_factory.mktemp("made")
    given = (f"--model={folder}", "--noverify")
    with_both = (*given, LINEAR, MLP)
    cases = {
        "import": ("convert", ["import", *given, f"--out={here}/run"]),
        "back": (
            "convert",
            ["export", f"--workdir={here}/run", f"--out={here}/back", "--noverify"],
        ),
        "insert": ("convert", ["import", *with_both, f"--out={here}/mixed"]),
        "linear": ("convert", ["import", *given, LINEAR, f"--out={here}/linear"]),
        "fold": ("convert", ["fold", f"--workdir={here}/linear", f"--out={here}/folded"]),
        "folded": (
            "convert",
            ["export", f"--workdir={here}/folded", f"--out={here}/again", "--noverify"],
        ),
        "no data": ("train", [f"--workdir={here}/mixed", *SHORT[:3]]),
        "own code": (
            "convert",
            ["export", f"--workdir={here}/mixed", f"--out={here}/own", "--noverify"],
        ),
        "over": ("convert", ["import", *given, f"--out={here}/run"]),
        "help": ("convert", ["import", "--help"]),
        "another's flag": ("convert", ["import", *given, f"--out={here}/x", "--kv_heads=2"]),
        "no model": ("convert", ["import", f"--out={here}/x"]),
        "another model": (
            "convert",
            ["import", *given, f"--out={here}/x", "--set=config.model.width=32"],
        ),
        "no identity": (
            "convert",
            [
                *("import", given[0], f"--out={here}/x"),
                *("--set=config.model.attention.value.kind=linear",),
                "--set=config.model.attention.value.init=normal",
            ],
        ),
        "no such field": (
            "convert",
            ["import", *given, f"--out={here}/x", "--set=config.model.widht=3"],
        ),
        "shards of nothing": (
            "convert",
            ["export", f"--workdir={here}/run", f"--out={here}/x", "--shard_size=many"],
        ),
        "another width": ("train", [f"--workdir={here}/run", "--config.model.width=32"]),
    }
    return dict(zip(cases, run_all(list(cases.values()), cache))), here


def content(path: Path) -> dict:
    """Dtype, shape and bytes of every tensor."""
    found = open_folder(path).tensors.values()
    return {t.name: (t.dtype, t.shape, t.read().tobytes()) for t in found}


def test_a_run_of_stock_weights_goes_back_bit_equal_with_what_lay_beside_them(done, folder):
    said, here = done
    assert said["import"].code == said["back"].code == 0, said["import"].err + said["back"].err
    assert "not copied: README.md" in said["import"].err
    assert read_manifest(here / "run/checkpoints/00000000")["holds"] == "weights"
    assert content(here / "back") == content(folder)
    for name in ("generation_config.json", "chat_template.jinja"):
        assert (here / "back" / name).read_bytes() == (folder / name).read_bytes()
    assert not (here / "back" / "README.md").exists()
    config = json.loads((here / "back/config.json").read_text())
    assert config == json.loads((folder / "config.json").read_text())


def test_a_run_made_of_an_imported_one_keeps_what_came_with_its_weights(done, folder):
    said, here = done
    assert said["fold"].code == said["folded"].code == 0, said["fold"].err + said["folded"].err
    assert content(here / "again") == content(folder)
    assert (here / "again/chat_template.jinja").read_text() == "{{ messages }}"


def test_training_begins_from_the_imported_weights_and_not_from_new_ones(done):
    """With an optimiser that has seen nothing, on the mesh of the run."""
    config = read_config(done[1] / "mixed").replace(mesh=MeshConfig(model=2))
    trainer = make_trainer(config, make_mesh(config.mesh))
    with Checkpoints(done[1] / "mixed" / "checkpoints") as checkpoints:
        assert checkpoints.newest_good() == 0
        state = begun(trainer, checkpoints, 0)
    stored = by_path(read_run(done[1] / "mixed").variables["params"])
    for name, leaf in by_path(state.params).items():
        np.testing.assert_array_equal(leaf, stored[name])
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == trainer.shardings
    assert int(state.step) == int(state.optimizer[-1].count) == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.optimizer))


@pytest.mark.slow
def test_training_goes_on_from_the_imported_weights(done, cache):
    _, here = done
    shutil.copytree(here / "mixed", here / "trained")
    lines = [[f"--workdir={here}/trained", STILL, *SHORT], [f"--workdir={here}/trained"]]
    first, again = run_all([("train", line) for line in lines], cache)
    assert first.code == 0 and "from the weights of step 0" in first.out, first.err
    for step in (0, 2):
        assert (here / f"trained/checkpoints/{step:08}/MANIFEST.json").exists()
    before, after = (read_run(here / "trained", step) for step in (0, 2))
    assert after.config.steps == 2  # as it was set, and kept: nothing of a new run is fixed
    for name, leaf in by_path(before.variables).items():
        np.testing.assert_allclose(by_path(after.variables)[name], leaf, atol=1e-6)
    assert again.code == 0 and "already has its 2 steps" in again.out


def test_what_does_not_fold_comes_with_a_file_of_its_own(done):
    """The linear mixer folds; the command says why the other does not."""
    said, here = done
    assert said["own code"].code == 0, said["own code"].err
    assert "key folded" in said["own code"].out
    assert "value.kind=mlp is not linear, so no stock weights stand for it" in said["own code"].out
    text = (here / "own/modeling_kha.py").read_text()
    compile(text, "modeling_kha.py", "exec")
    assert "import Qwen3ForCausalLM as" in text and "Llama" not in text
    config = json.loads((here / "own/config.json").read_text())
    assert config["model_type"] == "kha_qwen3" and config["kha_mixers"] == {"v": "mlp"}
    names = content(here / "own")
    assert "model.layers.1.self_attn.v_proj.knocking_up" in names
    own = convert.open_stock(here / "own")  # which we read back ourselves
    assert own.model.attention.value.build is not None and own.kind == "qwen3"


@pytest.mark.parametrize(
    "name, code, what",
    [
        ("over", 2, "already holds checkpoints"),
        ("another's flag", 2, "--kv_heads: is no flag of import"),
        ("no model", 2, "--model: is required"),
        ("another model", 2, "--set=config.model.width=32: the stock model has 24"),
        ("no identity", 2, "config.model.attention.value: does not start as the identity"),
        ("no such field", 2, "config.model.widht: is not a known field; did you mean 'width'?"),
        ("shards of nothing", 2, "--shard_size=many: write a number with MB or GB"),
        ("no data", 65, "config.data.folder: names no folder; write --config.data.source=FOLDER"),
        ("another width", 2, "config.model.width: this run began with 24, found 32"),
    ],
)
def test_what_cannot_be_meant_is_one_line(done, name, code, what):
    found = done[0][name]
    assert (found.code, found.err.count("\n")) == (code, 1), found.err
    assert what in found.err


def test_help_of_a_command_lists_its_own_flags(done):
    out = done[0]["help"].out
    assert "--model=..." in out and "--[no]verify" in out and "--kv_heads" not in out


def test_nothing_is_left_of_what_failed(done):
    assert not (done[1] / "x").exists() and not list(done[1].glob(".*"))


@pytest.mark.parametrize("command", ["import", "export"])
@pytest.mark.parametrize("when", ["at first", "within the weights"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the store's own
def test_a_full_disk_leaves_nothing(done, folder, tmp_path, monkeypatch, command, when):
    """A file may not grow past a size here: the system refuses to write the rest, as a full disk
    does."""
    if when != "at first":
        monkeypatch.setattr(files, "PROBE", b"0")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    out = str(tmp_path / "out")
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(Exception) as caught:
            if command == "import":
                stock.import_run(str(folder), out, [], False)
            else:
                run = str(done[1] / "run")
                stock.export_run(run, out, *(None,) * 5, verify=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    told = os.strerror(errno.EFBIG), "bytes are needed"  # a checkpoint says it by its store
    assert any(one in str(caught.value) for one in told), caught.value
    assert code_of(caught.value) == 74 or when == "at first"
    assert list(tmp_path.iterdir()) == []


def test_logits_that_differ_leave_nothing(folder, tmp_path, monkeypatch):
    def others(path, ids, own_code=False):
        return [np.random.default_rng(0).normal(size=(*one.shape, 272)) for one in ids]

    monkeypatch.setattr(agreement, "can_compare", lambda: True)
    monkeypatch.setattr(agreement, "their_logits", others)
    with pytest.raises(DataError, match="of their spread, more than .*; nothing written"):
        stock.import_run(str(folder), str(tmp_path / "run"), [], True)
    assert list(tmp_path.iterdir()) == []


def test_a_fault_in_the_folder_ends_with_65(folder, tmp_path, cache):
    path = shutil.copytree(folder, tmp_path / "cut")
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    arguments = ["import", f"--model={path}", "--noverify", f"--out={tmp_path}/run"]
    (result,) = run_all([("convert", arguments)], cache)
    assert (result.code, result.err.count("\n")) == (65, 1) and "it was cut" in result.err
    assert not (tmp_path / "run").exists()
