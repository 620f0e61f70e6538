"""A way to run the scripts as a user does."""

import io
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import capsule_heads

ROOT = Path(capsule_heads.__file__).parents[1]


@pytest.fixture(scope="session")
def run(environment):
    """run(script, *arguments): the finished process, run from the repository's root."""

    def run_script(script, *arguments, stdin=None):
        return subprocess.run(
            [sys.executable, ROOT / "scripts" / script, *map(str, arguments)],
            cwd=ROOT,
            env=environment,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run_script


@pytest.fixture
def call(monkeypatch, capfd):
    """call(script, *arguments): status, output and errors of a script, in this process: it spares it the imports."""

    def call_script(script, *arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capfd.readouterr()
        status = 0
        try:
            runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
        except SystemExit as error:
            status = error.code
        return status, *capfd.readouterr()

    return call_script
