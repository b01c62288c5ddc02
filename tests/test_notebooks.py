"""The notebooks: stories without definitions or outputs, which run from top to bottom."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ALONE = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}  # one device, as users have it
SMALL = (
    "--config.steps=60",
    "--config.batch_size=4",
    "--config.seq_len=64",
    "--config.model.layers=2",
    "--config.model.width=64",
    "--config.evaluation.every=20",
    "--config.evaluation.batches=1",
)


def cells(path, kind):
    book = json.loads(path.read_text())
    return [cell for cell in book["cells"] if cell["cell_type"] == kind]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_define_nothing_and_hold_no_outputs(path):
    found = cells(path, "code")
    assert found and all(not c["outputs"] and c["execution_count"] is None for c in found)
    defined = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for cell in found:
        tree = ast.parse("".join(cell["source"]))
        assert not any(isinstance(node, defined) for node in ast.walk(tree))
    assert sum("parameters" in c["metadata"].get("tags", ()) for c in found) == 1
    said = "".join("".join(cell["source"]) for cell in cells(path, "markdown"))
    assert said.startswith("# ") and said.count("**Look for**") >= 3


def test_there_are_three_notebooks():
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    for extra in ("nbformat", "nbclient", "matplotlib"):
        pytest.importorskip(extra)
    folder = tmp_path_factory.mktemp("runs")
    names = {"baseline": "baseline", "linear": "linear", "kha_tiny": "mlp"}
    for name, variant in names.items():
        config = f"--config=configs/kha_tiny.py:{variant}"
        command = ["-m", "experiments.train", config, *SMALL, f"--workdir={folder / name}"]
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=ALONE, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, runs):
    """With the folders of fresh runs in place of theirs."""
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    book = nbformat.read(path, as_version=4)
    for cell in book.cells:
        if "parameters" in cell.metadata.get("tags", ()):
            cell.source = cell.source.replace("../runs", str(runs))
    run = client.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(ROOT)}})
    run.execute(env=ALONE)
    outputs = [output for cell in book.cells for output in cell.get("outputs", ())]
    drawn = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(drawn) >= 3
    assert any(output.get("name") == "stdout" for output in outputs)
    assert not [output for output in outputs if output.get("name") == "stderr"]
