"""Whenever a run is killed, and wherever writing fails, it goes on from its last whole checkpoint to the same end.

`killed_runs.py` has the runs.
"""

import json
import re
import signal
from pathlib import Path

import pytest
from processes import run_program

pytestmark = pytest.mark.slow

BEGAN_AT = {  # the checkpoint that each run goes on from
    "killed at byte 30,000 of the cache": 0,
    "killed before the first step": 0,
    "killed at step 1": 0,
    "killed at step 5": 3,
    "killed at step 7": 6,
    "killed before os.rename /cache/*": 0,
    "killed before open /unfinished/checkpoint-3/trainer_state.json": 0,
    "killed before open /unfinished/checkpoint-6/unfinished-model/config.json": 3,
    "killed before open /unfinished/checkpoint-6/files.json": 3,
    "killed before os.rename /unfinished/checkpoint-6": 3,
    "killed before os.rename /checkpoint-3": 6,
    "killed before os.remove optimizer.pt": 6,
    "killed at byte 1,000 of a file": 3,
    "killed at byte 2,300 of a file": 3,
    "killed at byte 10,000 of a file": 3,
    "one of two killed at step 7": 6,
    "one of two killed before open /unfinished/checkpoint-8/files.json": 6,
}
ERRORS = {  # each from another library
    "no room beyond 1,000 bytes": r"File too large",
    "no room beyond 2,300 bytes": r"File too large",
    "no room beyond 10,000 bytes": r"iostream error",
    "read-only": r"Permission denied",
}


@pytest.fixture(scope="module")
def results(bert, tokens_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    run_program(Path(__file__).with_name("killed_runs.py"), bert, tokens_folder, folder)
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("name", BEGAN_AT)
def test_a_killed_run_goes_on_and_ends_with_the_same_bits(results, name):
    run, whole = results[name], results["whole of two" if "of two" in name else "whole"]
    assert run["ends"] is None
    assert run["status"] == -(signal.SIGXFSZ if "byte" in name else signal.SIGKILL)
    assert [end["began_at"] for end in whole] == [0] * len(whole)
    assert [end["began_at"] for end in run["again"]] == [BEGAN_AT[name]] * len(whole)
    assert [end["weights"] for end in run["again"]] == [end["weights"] for end in whole]


@pytest.mark.parametrize("name", ERRORS)
def test_where_writing_fails_an_error_names_it_and_the_last_checkpoint_is_whole(results, name):
    run = results[name]
    assert (run["ends"], run["status"]) == (None, 1)
    (line,) = run["error"].splitlines()
    assert re.search(rf"/run/checkpoint-6 could not be written: .*{ERRORS[name]}", line)
    assert line.endswith(
        'Earlier checkpoints are as they were: make room, or correct output_dir, and resume from "last".'
    )
    assert run["left"] == ["checkpoint-3"]  # nothing that is half-written takes room
    assert [end["began_at"] for end in run["again"]] == [3]
    assert run["again"][0]["weights"] == results["whole"][0]["weights"]
