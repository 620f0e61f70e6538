"""Which checkpoint a run is resumed from, and what is done to those on disk."""

import logging

import pytest

from capsule_heads.training.checkpoints import UNFINISHED, finish, resolve_checkpoint, rotate


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


def cut_short(checkpoint):
    (checkpoint / "model.safetensors").write_text("m" * 1100)


@pytest.mark.parametrize(
    "damage, fault",
    [
        (cut_short, r"model\.safetensors has 1,100 bytes, expected 1,200 bytes"),
        (lambda checkpoint: (checkpoint / "part" / "0").unlink(), r"part/0 is missing, expected 1 bytes"),
        (lambda checkpoint: (checkpoint / "files.json").write_text("{"), r"no list of its files \(Expecting"),
        (lambda checkpoint: (checkpoint / "files.json").write_text("[]"), r"files\.json does not say the size of each"),
    ],
)
def test_one_that_is_not_whole_is_passed_over_or_refused(tmp_path, caplog, damage, fault):
    write(tmp_path, 5)
    damaged = write(tmp_path, 10)
    damage(damaged)
    with caplog.at_level(logging.WARNING):
        assert resolve_checkpoint("last", tmp_path) == str(tmp_path / "checkpoint-5")
    assert f"{damaged} is not complete, and passed over" in caplog.text
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
    with pytest.raises(ValueError, match=r'is true, which is not a directory; expected a checkpoint\'s, or "last"'):
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
