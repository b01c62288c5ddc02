"""Every run config as text: its fields, its parameters with their shapes and mesh axes, its totals.

A difference is a change of what people train. When it is meant: UPDATE_GOLDEN=1 python -m pytest
tests/test_golden.py
"""

import json
import os
import re
import runpy

import jax
import pytest

from configs import tables
from kha_jax.accounting import account
from kha_jax.config import from_dict, to_dict
from kha_jax.mesh import MeshConfig, make_mesh
from kha_jax.training.run_config import RunConfig
from kha_jax.training.step import make_trainer
from tests.runs import CONFIGS, ROOT

# Rows of tables are the other configs with another attention; tests/test_accounting.py has them.
ALONE = [path for path in CONFIGS if path.stem not in tables.TABLES.values()]


def describe(config: RunConfig) -> str:
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    trainer = make_trainer(config, mesh)
    rows = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(trainer.abstract.params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        rows.append(f"{name}: {leaf.dtype}{list(leaf.shape)} {leaf.sharding.spec}")
    totals = [
        f"{name}: {value:,}"
        for name, value in account(config.model, config.seq_len)._asdict().items()
    ]
    return "\n".join([json.dumps(to_dict(config), indent=1), "", *rows, "", *totals]) + "\n"


@pytest.mark.parametrize("path", ALONE, ids=lambda path: path.stem)
def test_config_matches_its_golden_text(path):
    text = describe(from_dict(RunConfig, runpy.run_path(str(path))["get_config"]()))
    golden = ROOT / "tests" / "golden" / f"{path.stem}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text)
    assert golden.exists(), f"{golden} is missing; write it with UPDATE_GOLDEN=1"
    assert text == golden.read_text(), (
        "the config changed; if that is meant, rewrite its text with UPDATE_GOLDEN=1"
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_says_how_to_run_it(path):
    """A config file is a run book: its docstring holds the command, and to_dict reads back to the
    same config."""
    docstring = path.read_text().split('"""')[1]
    assert f"python -m experiments.train --config=configs/{path.name}" in docstring
    for table, row in re.findall(r"configs/table(\w+).py:(\S+)", docstring):
        tables.load(table).run(row)
    config = from_dict(RunConfig, runpy.run_path(str(path))["get_config"]())
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(config)))) == config
