"""A hub on loopback, processes that speak to it, and what the first of them pushed there."""

import json
import subprocess
import sys

import pytest
import torch
from hub_programs import COMMON, PUSH
from hub_server import HubServer


@pytest.fixture(scope="session")
def hub():
    """The server."""
    with HubServer() as server:
        yield server


@pytest.fixture(scope="session")
def client(hub, tmp_path_factory):
    """client(program, *arguments): what a Python process with an empty cache prints, as JSON, and its errors.

    `token=None` is a user who has not logged in; `cache` another cache, `fails=True` a process that ends with an error.
    """

    def run(program, *arguments, token=HubServer.token, cache=None, fails=False, **environment):
        environment |= hub.environment(cache or tmp_path_factory.mktemp("home"), token)
        command = [sys.executable, "-c", program, *map(str, arguments)]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
        )
        assert (done.returncode != 0) == fails, done.stderr
        return done.stderr if fails else json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture(scope="session")
def pushed(client, tmp_path_factory):
    """What one process pushed: me/backbone, and on it me/head (twice), me/whole and me/secret; and me/pictures.

    It is a file with the logits of each, as `torch.save` writes them.
    """
    path = tmp_path_factory.mktemp("pushed") / "logits.pt"
    client(COMMON + PUSH, path)
    return path


@pytest.fixture
def expected(pushed):
    """The logits, by name."""
    return torch.load(pushed)
