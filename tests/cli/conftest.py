"""Ways to run the commands as a user does."""

import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer


@pytest.fixture(scope="session")
def run(environment):
    """run(command, *arguments): the finished process."""

    def run_command(command, *arguments, stdin=None):
        return subprocess.run(
            [sys.executable, "-m", "capsule_heads", command, *map(str, arguments)],
            env=environment,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run_command


@pytest.fixture
def check_push(tmp_path):
    """check_push(run): push a run, with its backbone, to a hub on loopback, and check what is there."""
    from transformers import AutoConfig

    def check(run):
        before = {path: path.stat().st_mtime_ns for path in Path(run).rglob("*")}
        with HubServer() as hub:
            command = [sys.executable, "-m", "capsule_heads", "push", str(run), "me/run", "--head_only", "false"]
            environment = hub.environment(tmp_path / "home", hub.token)
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
            assert {path: path.stat().st_mtime_ns for path in Path(run).rglob("*")} == before
            files = hub.repositories["me/run"].files()
            assert b'"backbone.' in files["model.safetensors"].content  # which is nowhere else
            assert {"config.json", "results.json", "README.md", "preprocessor_config.json"} <= files.keys()
            assert AutoConfig.from_pretrained(run).id2label[0] in files["README.md"].content.decode()

    return check


@pytest.fixture
def saved(backbone, tmp_path, shake):
    """saved(**fields): directory of a classifier with such fields, whose scores are not all alike."""

    from transformers import AutoTokenizer

    from capsule_heads import CapsuleHeadForSequenceClassification

    def save(**fields):
        model = CapsuleHeadForSequenceClassification.from_backbone(backbone, d_inp=8, n_parts=6, **fields)
        shake(model.head, scale=0.5)
        model.save_pretrained(tmp_path / "model")
        AutoTokenizer.from_pretrained(backbone).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save
