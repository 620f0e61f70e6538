"""Imports point only downward, and importing the package changes nothing but what it is asked for."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import capsule_heads

ROOT = Path(capsule_heads.__file__).parent

# Each may import those of the levels before its own, and itself.
LEVELS = (
    ("version", "checks", "ops", "weights"),
    ("layers", "mixup"),
    ("heads",),
    ("control_heads", "explain"),
    ("models", "data", "metrics", "results", "comparison"),
    ("hub", "convert", "faithfulness"),
    ("pictures",),
    ("training",),
    ("demo",),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}


def modules():
    return sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def part_of(path):
    """`layers` for layers.py, `models` for models/losses.py."""
    return path.parts[0].removesuffix(".py")


def imported_parts(path, source):
    """The parts of the package that a module imports, wherever in the file."""
    package = ["capsule_heads", *path.parts[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module or "").split(".")] if node.module else base
            names = [[*base, alias.name] for alias in node.names]
        else:
            continue
        yield from (name[1] if len(name) > 1 else "__init__" for name in names if name[0] == "capsule_heads")


@pytest.mark.parametrize("path", modules(), ids=str)
def test_imports_point_downward(path):
    part = part_of(path)
    assert part in LEVEL, f"{path} has no level in design.md's order"
    for other in imported_parts(path, (ROOT / path).read_text(encoding="utf-8")):
        assert other == part or LEVEL.get(other, len(LEVELS)) < LEVEL[part], f"{path} imports {other}"


@pytest.mark.parametrize(
    "path, source, parts",
    [
        ("models/losses.py", "from ..heads import X", ["heads"]),
        ("models/losses.py", "from .outputs import X", ["models"]),
        ("models/losses.py", "from .. import training", ["training"]),
        ("layers.py", "from .ops import X", ["ops"]),
        ("layers.py", "from . import ops, heads", ["ops", "heads"]),
        ("ops/fast.py", "def f():\n    from capsule_heads.training.trainer import X", ["training"]),
        ("ops/fast.py", "import capsule_heads.models, torch", ["models"]),
        ("ops/fast.py", "import capsule_heads", ["__init__"]),
        ("ops/fast.py", "from capsule_heads import Routing", ["Routing"]),
        ("ops/fast.py", "from torch import nn", []),
    ],
)
def test_the_reader_of_imports(path, source, parts):
    assert list(imported_parts(Path(path), source)) == parts


def test_the_root_hands_names_on_and_no_more():
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    definitions = [
        node for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom | ast.Assign | ast.Expr)
    ]
    assert definitions == []


# What transformers, torch and datasets do when they are imported is theirs: they come first.
PROGRAM = """
import json, logging, os, sys, warnings
import datasets, huggingface_hub, torch, transformers
import transformers.models.auto, transformers.trainer

def state():
    loggers = {name: logging.getLogger(name).level for name in sorted(logging.root.manager.loggerDict)}
    return {
        "environment": dict(os.environ),
        "levels": {"root": logging.root.level, **loggers},
        "handlers": len(logging.root.handlers),
        "filters": [str(entry) for entry in warnings.filters],
        "verbosity": [transformers.logging.get_verbosity(), datasets.logging.get_verbosity()],
        "torch": [torch.get_default_dtype().__str__(), torch.get_num_threads(), torch.is_grad_enabled()],
    }

before, modules = state(), set(sys.modules)
import capsule_heads
after = state()
new = {name: level for name, level in after["levels"].items() if name not in before["levels"]}
after["levels"] = {name: level for name, level in after["levels"].items() if name in before["levels"]}
json.dump([before, after, new, sorted(set(sys.modules) - modules)], sys.stdout)
"""


@pytest.fixture(scope="module")
def imported():
    # Not this process's environment: what the package were to change is changed in it already.
    environment = {name: os.environ[name] for name in ("HOME", "PATH", "PYTHONPATH") if name in os.environ}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_importing_changes_no_environment_logging_or_warnings(imported):
    before, after, new_loggers, _ = imported
    assert after == before
    assert {name: level for name, level in new_loggers.items() if name.startswith("capsule_heads") and level} == {}


def test_importing_leaves_what_only_some_need_alone(imported):
    loaded = {name.partition(".")[0] for name in imported[3]}
    assert "capsule_heads" in loaded
    assert loaded.isdisjoint({"evaluate", "matplotlib", "numba", "sklearn", "triton"})
