"""A way to run the scripts as a user does."""

import io
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import capsule_heads
from capsule_heads.heads import base

ROOT = Path(capsule_heads.__file__).parents[1]

# What a script sets for all of its process, which is here that of all tests.
OF_THE_PROCESS = (
    "datasets.disable_progress_bars",
    "logging.disable",
    "torch.set_num_threads",
    "transformers.utils.logging.disable_progress_bar",
)


@pytest.fixture(scope="session")
def run(environment):
    """run(script, *arguments, timeout=300): the finished process, run from the repository's root."""

    def run_script(script, *arguments, stdin=None, timeout=300):
        return subprocess.run(
            [sys.executable, ROOT / "scripts" / script, *map(str, arguments)],
            cwd=ROOT,
            env=environment,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run_script


@pytest.fixture
def tiny_set(tmp_path):
    """Folder with the set cr, of a few texts: those of odd rows have the label 1, others 0."""
    for split, n_rows in (("train", 24), ("validation", 12), ("test", 10)):
        rows = [f"the {('food', 'film')[n % 3 > 0]} was {('bad', 'good')[n % 2]},{n % 2}" for n in range(n_rows)]
        (tmp_path / "cr").mkdir(exist_ok=True)
        (tmp_path / "cr" / f"{split}.csv").write_text("\n".join(["text,label", *rows]))
    return tmp_path


@pytest.fixture
def own_registry(monkeypatch):
    """Heads that are registered during the test are so no more after it."""
    monkeypatch.setattr(base, "_HEADS", dict(base._HEADS))


@pytest.fixture
def call(monkeypatch, capfd, own_registry):
    """call(script, *arguments): status, output and errors of a script, in this process: it spares it the imports."""

    def call_script(script, *arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        for setting in OF_THE_PROCESS:
            monkeypatch.setattr(setting, lambda *given: None)
        capfd.readouterr()
        status = 0
        try:
            runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
        except SystemExit as error:
            status = error.code
        return status, *capfd.readouterr()

    return call_script
