"""The layout of the package: imports point only downward, and importing it is light and changes nothing else."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest

import capsule_heads
from capsule_heads.heads import registered_heads

ROOT = Path(capsule_heads.__file__).parent
REPOSITORY = Path(__file__).parents[1]

# The floors of the package, the lowest first. A module may import from its own floor and from those below.
FLOORS = (
    ("version", "lazy", "requirements"),
    ("checks", "files", "hardware"),
    ("ops",),
    ("layers", "mixup", "weights"),
    ("heads",),
    ("backbones",),
    ("hub",),
    ("models",),
    ("data", "metrics"),
    ("engines",),
    ("explain", "predicting"),
    ("exporting",),
    ("paper",),
    ("tasks",),
    ("training",),
    ("cli",),
    ("estimator",),
    ("__main__",),
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
# The paper's wing stands apart: these alone may look into it, when they are asked for something of it.
KNOW_THE_PAPER = {Path("tasks.py"), Path("cli", "convert.py")}


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
    assert part in FLOOR, f"{path} is on no floor: add it to FLOORS"
    for other in imported_parts(path, (ROOT / path).read_text(encoding="utf-8")):
        assert other == part or FLOOR.get(other, len(FLOORS)) < FLOOR[part], f"{path} imports {other}"


def test_the_wheel_has_all_packages():
    """The list is kept by hand, because configs/ is a package of the wheel and not of the checkout."""
    with open(REPOSITORY / "pyproject.toml", "rb") as file:
        listed = tomllib.load(file)["tool"]["setuptools"]["packages"]
    found = [".".join(path.parent.relative_to(ROOT.parent).parts) for path in ROOT.rglob("__init__.py")]
    assert sorted(listed) == sorted([*found, "capsule_heads.configs"])


def test_the_papers_wing_stands_apart():
    for path in modules():
        if part_of(path) != "paper" and path not in KNOW_THE_PAPER:
            assert "paper" not in imported_parts(path, (ROOT / path).read_text(encoding="utf-8")), path


def top_level_names(tree):
    """The functions, classes and constants that a module defines, but for those of a decorator that registers them."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.decorator_list:
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                yield from (name.id for name in ast.walk(target) if isinstance(name, ast.Name))


def test_no_name_is_defined_and_unused():
    """A name that only tests know is unused too."""
    sources = {path: path.read_text(encoding="utf-8") for path in sorted(ROOT.rglob("*.py"))}
    users = [*sources.values(), *(path.read_text(encoding="utf-8") for path in REPOSITORY.glob("scripts/**/*.py"))]
    words = Counter(word for text in users for word in re.findall(r"\w+", text))
    unused = {
        f"{path.relative_to(ROOT)}: {name}"
        for path, text in sources.items()
        for name in top_level_names(ast.parse(text))
        if words[name] < 2 and not name.startswith("__")
    }
    assert unused == set()


def test_heads_are_known_by_the_registry_alone():
    names = [name for name, head in registered_heads().items() if head.__module__.startswith("capsule_heads")]
    for path in modules():
        if part_of(path) not in ("heads", "paper"):
            tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
            found = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and node.value in names]
            # "linear" is a schedule of transformers too.
            assert found == (["linear"] if path == Path("training", "arguments.py") else []), path


def test_scripts_leave_the_search_path_alone():
    for path in REPOSITORY.glob("scripts/**/*.py"):
        assert "sys.path" not in path.read_text(encoding="utf-8"), path


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


def modules_after(statement):
    """The libraries that a fresh process has loaded after a statement."""
    program = (
        f"{statement}\nimport json, sys; print(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    )
    environment = {name: os.environ[name] for name in ("HOME", "PATH", "PYTHONPATH") if name in os.environ}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


OF_TRANSFORMERS = {"accelerate", "scipy", "triton"}  # it imports these for its models
HEAVY = {"accelerate", "datasets", "evaluate", "matplotlib", "numba", "pandas", "scipy", "sklearn", "triton"}


@pytest.mark.parametrize(
    ("statement", "without"),
    [
        ("import capsule_heads", HEAVY | {"transformers", "torch", "numpy"}),
        ("from capsule_heads import Routing", HEAVY | {"transformers"}),
        (
            "from capsule_heads import CapsuleHeadForSequenceClassification",
            HEAVY - {"accelerate", "scipy", "triton"},
        ),  # of transformers itself
    ],
    ids=["root", "layer", "model"],
)
def test_importing_loads_what_is_used(statement, without):
    assert modules_after(statement) & without == set()


AUTO = """
{}
model_type, classes = "capsule_head", ("AutoModel", "AutoModelForSequenceClassification")
config_class = transformers.AutoConfig.for_model
assert type(transformers.models.auto.CONFIG_MAPPING[model_type]) is type
for name in classes:
    assert transformers.CONFIG_MAPPING[model_type] in getattr(transformers, name)._model_mapping, name
assert "stereo_conv" in transformers.CONFIG_MAPPING
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import capsule_heads, transformers",
        "import transformers, capsule_heads",
        "import transformers; transformers.AutoModel; import capsule_heads",
        "from capsule_heads import CapsuleHeadConfig; import transformers",
        "from capsule_heads.models import CapsuleHeadModel; import transformers",
        "import capsule_heads.explain; import transformers",
    ],
)
def test_auto_classes_know_the_models_whatever_is_imported_first(imports):
    modules_after(AUTO.format(imports))
