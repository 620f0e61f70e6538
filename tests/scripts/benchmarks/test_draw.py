"""The scripts that draw: draw_results.py on files, draw_trajectory.py on a stand-in for a trained image model."""

import json
import types

import numpy as np
import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset, DatasetDict
from transformers.utils import ModelOutput

import capsule_heads.data

PNG = b"\x89PNG\r\n\x1a\n"


def test_draw_results(run, tmp_path):
    done = run("draw_results.py", "--task", "sst5", "--output_dir", tmp_path / "new")
    assert done.returncode == 0, done.stderr
    paths = [tmp_path / "new" / f"sst5_{against}.png" for against in ("parameters", "year")]
    assert done.stdout.split() == [str(path) for path in paths]
    for path in paths:
        assert path.read_bytes().startswith(PNG)


@pytest.mark.parametrize("task", ["sst2_root", "smallnorb"])
def test_draw_results_of_other_tasks(call, tmp_path, task):
    assert call("draw_results.py", "--task", task, "--output_dir", tmp_path)[0] == 0
    assert len(list(tmp_path.glob(f"{task}_*.png"))) == 2


def test_draw_results_with_files_that_are_not_there(fails, tmp_path):
    assert "none.json" in fails("draw_results.py", "--task", "sst5", "--measured", tmp_path / "none.json")
    assert "--task" in fails("draw_results.py", "--task", "cola")


def test_summaries_go_where_draw_results_reads(call, fails, tmp_path):
    results, measured = tmp_path / "results.json", tmp_path / "measured.json"
    keys = {"task": "sst5", "seed": 0, "steps": 1, "trained_parameters": 1000, "training_seconds": 60.0}
    results.write_text(json.dumps({**keys, "validation_accuracy": 0.5, "test_accuracy": 0.25}))
    options = (results, "--measured", measured, "--commit", "abc", "--date", "2026-01-02")
    assert "do not say which backbone they had" in fails("summarize.py", *options)
    assert call("summarize.py", *options, "--backbone", "b")[0] == 0
    (record,) = json.loads(measured.read_text())
    assert (record["backbone"], record["test"]["mean"], record["commit"]) == ("b", 0.25, "abc")
    assert call("draw_results.py", "--task", "sst5", "--measured", measured, "--output_dir", tmp_path)[0] == 0


class Model(torch.nn.Module):
    """Activates the truck capsule at the lowest elevation and the car capsule elsewhere; the pose is 4 x 4 pixels."""

    config = types.SimpleNamespace(id2label={0: "truck", 1: "car"})

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, pixel_values, output_capsules=None):
        level = pixel_values[:, 0, 0, 0]
        poses = pixel_values[:, :, :4, :4] if output_capsules else None
        return ModelOutput(logits=torch.stack([0.05 - level, level - 0.05], -1), poses=poses)


@pytest.fixture
def stand_ins(monkeypatch):
    rows = [(elevation, azimuth) for elevation in range(5) for azimuth in range(0, 8, 2)]
    rng = np.random.default_rng(0)
    columns = {
        "image": [rng.integers(0, 9, (2, 96, 96)).astype(np.uint8) + np.uint8(40 * e) for e, _ in rows],
        **{name: [0] * len(rows) for name in ("instance", "lighting")},
        "label": [1] * len(rows),
        "elevation": [elevation for elevation, _ in rows],
        "azimuth": [azimuth for _, azimuth in rows],
    }
    split = Dataset.from_dict(columns).cast_column("label", ClassLabel(names=["truck", "car"]))
    sources = []

    def load_smallnorb(source):
        sources.append(source)
        return DatasetDict(test=split)

    def process(images, return_tensors):
        assert all(image.shape == (2, 96, 96) and image.dtype == np.uint8 for image in images)
        return {"pixel_values": torch.from_numpy(np.stack(images)).float() / 255}

    monkeypatch.setattr(capsule_heads.data, "load_smallnorb", load_smallnorb)
    for name, value in (("AutoModelForImageClassification", Model()), ("AutoImageProcessor", process)):
        stand_in = types.SimpleNamespace(from_pretrained=lambda path, value=value: value)
        monkeypatch.setattr(transformers, name, stand_in)
    return sources


def test_draw_trajectory(call, stand_ins, tmp_path, monkeypatch):
    from capsule_heads import pictures

    titles = []
    draw = pictures.draw_trajectory
    monkeypatch.setattr(pictures, "draw_trajectory", lambda *arguments: titles.append(arguments[4]) or draw(*arguments))
    path = tmp_path / "trajectory.png"
    options = ("--data", "smallnorb", "--source", "folder", "--factor", "elevation", "--label", "car", "--azimuth", 4)
    status, out, err = call("draw_trajectory.py", "model", *options, "--output", path)
    assert status == 0, err
    assert path.read_bytes().startswith(PNG)
    assert stand_ins == ["folder"]
    assert [line.partition(": stress")[0] for line in out.splitlines()] == [
        *(f"pose vector {i}" for i in (1, 2, 3, 4)),
        str(path),
    ]
    assert titles == [
        "Poses of the car capsule, activated in 4 of 5 images\n"
        "of one car as its elevation varies (smallnorb, instance 0, lighting 0, azimuth 4)"
    ]


def test_draw_trajectory_mistakes(fails, stand_ins, tmp_path):
    start = ("draw_trajectory.py", "model", "--output", tmp_path / "t.png", "--factor", "azimuth", "--data")
    assert "azimuth was given, and is to vary" in fails(*start, "toy_norb", "--azimuth", 0)
    assert "label is 'plane'; expected one of animal, human" in fails(*start, "toy_norb", "--label", "plane")
    assert "smallnorb needs --source" in fails(*start, "smallnorb")
    start = (*start, "smallnorb", "--source", "folder")
    assert "Unknown label 'plane'; expected truck, car" in fails(*start, "--label", "plane")
    assert "0 images in which azimuth varies with instance 7" in fails(*start, "--instance", 7)
    assert "Cannot fix azimuth" in fails(*start, "--azimuth", 0)
    assert not (tmp_path / "t.png").exists()
