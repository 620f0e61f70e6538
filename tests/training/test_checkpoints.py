"""Which checkpoint a run is resumed from, and what is done to those on disk."""

import hashlib
import json
import logging
import subprocess
import sys

import pytest

from capsule_heads.training import checkpoints
from capsule_heads.training.checkpoints import UNFINISHED, finish, locked, resolve_checkpoint, rotate, writing


def write(run, step):
    """A checkpoint of two files, one of them in a folder."""
    unfinished = run / UNFINISHED / f"checkpoint-{step}"
    (unfinished / "part").mkdir(parents=True)
    (unfinished / "model.safetensors").write_text("m" * 1200)
    (unfinished / "part" / "0").write_text("p")
    finish(unfinished, run / f"checkpoint-{step}")
    return run / f"checkpoint-{step}"


def names(run):
    return sorted(path.name for path in run.glob("checkpoint-*"))


def test_the_last_is_that_of_most_steps(tmp_path):
    for step in (5, 10, 9):
        write(tmp_path, step)
    assert resolve_checkpoint("last", tmp_path) == resolve_checkpoint(True, tmp_path) == str(tmp_path / "checkpoint-10")
    assert resolve_checkpoint(None, tmp_path) is resolve_checkpoint(False, tmp_path) is None
    assert resolve_checkpoint(tmp_path / "checkpoint-5", tmp_path) == str(tmp_path / "checkpoint-5")


def test_the_list_of_files_says_what_sha256sum_says(tmp_path):
    listed = json.loads((write(tmp_path, 5) / "files.json").read_text())
    assert listed == {
        "model.safetensors": {"bytes": 1200, "sha256": hashlib.sha256(b"m" * 1200).hexdigest()},
        "part/0": {"bytes": 1, "sha256": hashlib.sha256(b"p").hexdigest()},
    }


def cut_short(checkpoint):
    (checkpoint / "model.safetensors").write_text("m" * 1100)


def flip_a_bit(checkpoint):
    content = bytearray((checkpoint / "model.safetensors").read_bytes())
    content[700] ^= 4
    (checkpoint / "model.safetensors").write_bytes(content)


def change_list(**records):
    def change(checkpoint):
        listed = json.loads((checkpoint / "files.json").read_text())
        (checkpoint / "files.json").write_text(json.dumps({**listed, **records}))

    return change


@pytest.mark.parametrize(
    "damage, fault",
    [
        (cut_short, r"model\.safetensors has 1,100 bytes, expected 1,200 bytes"),
        (
            flip_a_bit,
            r"model\.safetensors has changed since it was written \(its SHA-256 differs from the one in files\.json",
        ),
        (lambda checkpoint: (checkpoint / "part" / "0").unlink(), r"part/0 is missing"),
        (lambda checkpoint: (checkpoint / "files.json").write_text("{"), r"no list of its files \(.*json is not JSON"),
        (
            lambda checkpoint: (checkpoint / "files.json").write_text("[]"),
            r"no list of its files \(.*expected keys and",
        ),
        (
            lambda checkpoint: (checkpoint / "files.json").write_text("[" * 10**5),
            r"no list of its files \(.*is not JSON",
        ),
        (
            lambda checkpoint: (checkpoint / "files.json").write_bytes(b'{"\xff'),
            r"no list of its files \(.*is not JSON",
        ),
        *(
            (change_list(**{"part/0": record}), r"files\.json does not say the size and SHA-256 of part/0")
            for record in (1, None, {}, {"bytes": 1}, {"bytes": "1", "sha256": ""})
        ),
        (change_list(**{"part/0": {"bytes": 1, "sha256": None}}), r"part/0 has changed since it was written"),
    ],
)
def test_one_that_is_not_whole_is_passed_over_or_refused(tmp_path, caplog, damage, fault):
    write(tmp_path, 5)
    damaged = write(tmp_path, 10)
    damage(damaged)
    with caplog.at_level(logging.WARNING):
        assert resolve_checkpoint("last", tmp_path) == str(tmp_path / "checkpoint-5")
    assert f"{damaged} is not complete, and is skipped" in caplog.text
    with pytest.raises(
        ValueError, match=rf'checkpoint-10 is not complete: {fault}.*Resume from another, or from "last"\.'
    ):
        resolve_checkpoint(str(damaged), tmp_path)


def test_one_of_another_trainer_is_taken_by_name_alone(tmp_path):
    other = tmp_path / "checkpoint-7"
    other.mkdir()
    assert resolve_checkpoint("last", tmp_path) is None
    assert resolve_checkpoint(str(other), tmp_path) == str(other)


def test_none_yet(tmp_path):
    for run in (tmp_path, tmp_path / "none"):
        assert resolve_checkpoint("last", run) is None
        with pytest.raises(ValueError, match=r'no complete checkpoint in .* to resume from; "last" starts a new run'):
            resolve_checkpoint(True, run)
    with pytest.raises(
        ValueError, match=r'is true, which is not a directory; expected the directory of a checkpoint, or "last"'
    ):
        resolve_checkpoint("true", tmp_path)


def test_one_of_the_same_step_is_replaced(tmp_path):
    (write(tmp_path, 5) / "of another run").touch()
    assert not (write(tmp_path, 5) / "of another run").exists()
    assert resolve_checkpoint("last", tmp_path) == str(tmp_path / "checkpoint-5")


@pytest.mark.parametrize(
    "limit, best, left",
    [
        (None, None, [1, 2, 3, 4]),
        (0, None, [1, 2, 3, 4]),
        (9, None, [1, 2, 3, 4]),
        (2, None, [3, 4]),
        (1, None, [4]),
        (1, 1, [1, 4]),
        (3, 1, [1, 3, 4]),
        (1, 4, [4]),
    ],
)
def test_rotation_keeps_the_newest_and_the_best(tmp_path, limit, best, left):
    for step in (1, 2, 3, 4):
        newest = write(tmp_path, step)
    rotate(newest, limit, best and str(tmp_path / f"checkpoint-{best}"))
    assert names(tmp_path) == [f"checkpoint-{step}" for step in left]
    assert not any((tmp_path / UNFINISHED).iterdir())


@pytest.mark.parametrize(
    "error",
    [Exception("No space left\non device (os error 28)"), RuntimeError("No space left\n  on device"), OSError(28)],
)
def test_whatever_a_library_raises_is_one_sentence(tmp_path, error):
    message = r"checkpoint-3 could not be written: .*\. .* are free there\. Earlier"
    with pytest.raises(OSError, match=message) as caught, writing(tmp_path / "checkpoint-3"):
        raise error
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [KeyError("a key"), ValueError("a value")])
def test_what_is_not_of_writing_is_not_said_to_be(tmp_path, error):
    with pytest.raises(type(error)) as caught, writing(tmp_path / "checkpoint-3"):
        raise error
    assert caught.value is error


HOLDER = """
import sys
from capsule_heads.training.checkpoints import locked
with locked(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_two_processes_do_not_train_in_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "SECONDS_TO_LOCK", 0.2)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], **pipes) as holder:
        assert holder.stdout.readline() == b"locked\n"
        message = rf"^output_dir is {tmp_path}, in which another process is training; expected one run at a time: wait"
        with pytest.raises(OSError, match=message), locked(tmp_path):
            pass
        holder.kill()
    with locked(tmp_path):  # the system took it from the process that was killed
        assert resolve_checkpoint("last", tmp_path) is None
    with locked(tmp_path):
        pass


def test_a_folder_that_cannot_be_written_to_is_found_before_training(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=str(tmp_path)), locked(tmp_path / "file"):
        pass
