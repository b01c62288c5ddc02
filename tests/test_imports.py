"""Imports point down only, and optional packages are imported where they are used: read from the
source, nothing is run."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = {
    "config": 0,
    "faults": 0,
    "watchdog": 0,
    "ops": 0,
    "sharding": 0,
    "tpu": 0,
    "parameters": 0.5,  # the base of all modules: config and ops.norm
    "data": 1,
    "optimizer": 1,
    "metrics": 1,
    "statistics": 1,
    "sampling": 1,
    "processes": 1,
    "attention": 2,
    "feed_forward": 2,
    "moe": 2,
    "remat": 2.4,
    "model": 2.5,
    "accounting": 2.6,  # what a block is made of, then the whole
    "training": 3,
    "manifest": 2.9,
    "checkpoint": 3,
    "decoding": 3,
    "properties": 2.7,
    "budget": 2.7,
    "compression": 3.1,
    "planning": 3.5,
    "inspect": 4,
    "convert": 4,
}
ALONE = ("config", "ops")  # these import nothing of kha_jax but themselves
OPTIONAL = ("torch", "transformers", "tensorboardX", "matplotlib", "wandb")
SOURCES = sorted(
    path.relative_to(ROOT)
    for folder in ("kha_jax", "experiments")
    for path in (ROOT / folder).rglob("*.py")
)


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(nodes, package: str) -> set[str]:
    """Dotted names that these statements import; `from a import b` counts as a.b, since b may be a
    module."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = (
                package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            )
            base = ".".join([*above, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def run_at_import(tree: ast.AST):
    """The nodes that run when the module is imported: all but the bodies of functions."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield node
            yield from run_at_import(node)


def package_of(path: Path) -> str:
    return module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]


def part_of(name: str) -> str | None:
    """kha_jax.ops.norm.rms_norm -> ops; None outside kha_jax, or for a name that
    kha_jax/__init__.py defines."""
    parts = name.split(".")
    if parts[0] != "kha_jax" or len(parts) == 1:
        return None
    exists = (ROOT / "kha_jax" / f"{parts[1]}.py").exists() or (
        ROOT / "kha_jax" / parts[1]
    ).is_dir()
    return parts[1] if exists or parts[1] in LAYERS else None


def upward_edges(path: Path, source: str) -> list[str]:
    """What is wrong with a module's imports, anywhere in it."""
    wrong, own = [], part_of(module_name(path))
    for name in sorted(imported(ast.walk(ast.parse(source)), package_of(path))):
        target = part_of(name)
        if path.parts[0] == "kha_jax" and name.split(".")[0] in ("experiments", "configs"):
            wrong.append(f"{path} imports {name}: the library never imports its programs")
        elif own is not None and target is not None:
            if not {own, target} <= set(LAYERS):
                wrong.append(
                    f"{path} imports {name}: one of them has no layer; give it one in "
                    "tests/test_imports.py"
                )
            elif LAYERS[target] > LAYERS[own]:
                wrong.append(
                    f"{path} (layer {LAYERS[own]}) imports {name} (layer {LAYERS[target]})"
                )
            elif own in ALONE and target != own:
                wrong.append(f"{path} imports {name}: {own} stands alone")
    return wrong


def eager_optional(path: Path, source: str) -> list[str]:
    """Optional packages that importing the module would need."""
    names = imported(run_at_import(ast.parse(source)), package_of(path))
    return sorted(name for name in names if name.split(".")[0] in OPTIONAL)


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_point_down(path):
    assert upward_edges(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_optional_packages_are_imported_where_they_are_used(path):
    assert eager_optional(path, (ROOT / path).read_text()) == []


def test_every_part_of_the_library_has_a_layer():
    parts = {part_of(module_name(path)) for path in SOURCES} - {None}
    assert {"config", "ops", "attention", "model"} <= parts <= set(LAYERS)


@pytest.mark.parametrize(
    "path, source, wrong",
    [
        ("kha_jax/attention/mixers.py", "from kha_jax.model import ModelConfig", True),
        ("kha_jax/model.py", "from kha_jax import training", True),
        ("kha_jax/model.py", "import kha_jax.training as t", True),
        ("kha_jax/model.py", "def f():\n    from kha_jax.checkpoint import Checkpoints", True),
        ("kha_jax/attention/mixers.py", "from .. import decoding", True),
        ("kha_jax/ops/norm.py", "from kha_jax.config import Config", True),
        ("kha_jax/config.py", "from kha_jax.ops import norm", True),
        ("kha_jax/parameters.py", "from kha_jax.optimizer import OptimizerConfig", True),
        ("kha_jax/training.py", "import experiments.train", True),
        ("kha_jax/training.py", "from configs import base", True),
        ("kha_jax/training.py", "from kha_jax.model import ModelConfig", False),
        ("kha_jax/attention/__init__.py", "from .attention import Attention", False),
        ("kha_jax/attention/mixers.py", "from ..parameters import Module", False),
        ("kha_jax/parameters.py", "from kha_jax.ops.norm import rms_norm", False),
        ("kha_jax/checkpoint.py", "from kha_jax import __version__", False),
        ("kha_jax/ops/losses.py", "from kha_jax.ops import norm\nimport jax", False),
        (
            "experiments/train.py",
            "from kha_jax.training import train_step\nfrom experiments import report",
            False,
        ),
    ],
)
def test_upward_edges_are_found(path, source, wrong):
    """The rule itself, on modules that break and that keep it."""
    assert bool(upward_edges(Path(path), source)) == wrong


@pytest.mark.parametrize(
    "source, found",
    [
        ("import torch", ["torch"]),
        ("import torch.nn as nn", ["torch.nn"]),
        (
            "try:\n    from transformers import AutoModel\nexcept ImportError:\n    pass",
            ["transformers.AutoModel"],
        ),
        ("class A:\n    import wandb", ["wandb"]),
        ("def f():\n    import matplotlib.pyplot as plt", []),
        ("class A:\n    def f(self):\n        from tensorboardX import SummaryWriter", []),
        ("import torchless\nfrom kha_jax import torch_free", []),
    ],
)
def test_eager_optional_imports_are_found(source, found):
    assert eager_optional(Path("kha_jax/metrics.py"), source) == found
