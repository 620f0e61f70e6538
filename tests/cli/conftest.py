"""Ways to run the commands as a user does."""

import io
import subprocess
import sys

import pytest

from capsule_heads.cli import main


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
def call(monkeypatch, capfd):
    """call(command, *arguments): status, output and errors of a command, in this process: it spares it the imports."""

    def call_command(*arguments, stdin=""):
        given = stdin if isinstance(stdin, bytes) else stdin.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        capfd.readouterr()
        status = 0
        try:
            main([str(x) for x in arguments])
        except SystemExit as error:
            status = error.code
        return status, *capfd.readouterr()

    return call_command
