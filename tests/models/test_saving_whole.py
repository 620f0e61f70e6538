"""Models are saved whole or not at all, in the place of an earlier one."""

import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import modeling_utils

from capsule_heads import CapsuleHeadForSequenceClassification
from capsule_heads.models.checkpoint import UNFINISHED

load = CapsuleHeadForSequenceClassification.from_pretrained


def files(directory):
    return {path.name: path.stat().st_size for path in directory.iterdir()}


def same(model, other, batch):
    return torch.equal(model.eval()(**batch).logits, other.eval()(**batch).logits)


def cut_short(weights, path, **kwargs):
    save_file(weights, path, **kwargs)
    os.truncate(path, os.path.getsize(path) // 2)
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("head_only", [True, False])
@pytest.mark.parametrize("n_written", [0, 1])
def test_where_saving_fails_the_earlier_model_stays(make_model, pad, tmp_path, monkeypatch, head_only, n_written):
    model = make_model()
    model.save_pretrained(tmp_path, head_only=head_only)
    (tmp_path / "results.json").write_text("{}")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    saves = iter([save_file] * n_written + [cut_short])
    monkeypatch.setattr(modeling_utils, "safe_save_file", lambda *args, **kwargs: next(saves)(*args, **kwargs))
    other = make_model(seed=1, n_parts=5)
    with pytest.raises(OSError, match=f"{tmp_path} could not be written: .*No space left.*What was there is as it was"):
        other.save_pretrained(tmp_path, head_only=False, max_shard_size="10KB")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert same(model, load(tmp_path), pad())


@pytest.mark.parametrize("n_renamed", [0, 1, 2, 3])
def test_files_of_two_models_are_not_loaded_as_one(make_model, pad, tmp_path, monkeypatch, n_renamed):
    make_model().save_pretrained(tmp_path, head_only=False)
    replace, renamed = Path.replace, []

    def killed(self, target):
        if len(renamed) == n_renamed:
            raise KeyboardInterrupt
        renamed.append(target)
        return replace(self, target)

    other = make_model(seed=1)
    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        other.save_pretrained(tmp_path, head_only=False, max_shard_size="10KB")
    monkeypatch.undo()
    with pytest.raises(OSError, match=r"config\.json"):
        load(tmp_path)
    other.save_pretrained(tmp_path)
    assert same(other, load(tmp_path), pad())


@pytest.mark.parametrize("variant", [None, "other"])
def test_no_weights_of_an_earlier_model_stay(make_model, pad, tmp_path, variant):
    model, other = make_model(), make_model(seed=1)
    (tmp_path / "model.safetensors.md").write_text("notes")
    for options in ({}, {"max_shard_size": "10KB"}, {"max_shard_size": "20KB"}, {}):
        model.save_pretrained(tmp_path / "alone", head_only=False, variant=variant, **options)
        model.save_pretrained(tmp_path, head_only=False, variant=variant, **options)
        assert files(tmp_path / "alone").items() <= files(tmp_path).items()
        assert len(files(tmp_path)) == len(files(tmp_path / "alone")) + 2
        assert same(model, load(tmp_path, variant=variant), pad())
        model, other = other, model
    model.save_pretrained(tmp_path, head_only=False, variant="third")  # which leaves those of another name
    assert same(other, load(tmp_path, variant=variant), pad())


def test_what_a_killed_process_left_is_cleared_away(make_model, tmp_path):
    (tmp_path / UNFINISHED).mkdir()
    (tmp_path / UNFINISHED / "model.safetensors").write_text("half")
    make_model().save_pretrained(tmp_path)
    assert files(tmp_path).keys() == {"config.json", "model.safetensors"}


def test_saving_other_weights_and_from_another_process(make_model, pad, tmp_path):
    model, other = make_model(), make_model(seed=1)
    weights = other.state_dict()
    model.save_pretrained(tmp_path / "model", True, weights)
    assert same(other, load(tmp_path / "model"), pad())
    model.save_pretrained(tmp_path / "model", is_main_process=False)
    assert same(other, load(tmp_path / "model"), pad())
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not files(tmp_path / "none")
