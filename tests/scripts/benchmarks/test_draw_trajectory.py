"""scripts/benchmarks/draw_trajectory.py on the smallNORB network, and on a stand-in for a trained one."""

import types

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification
from transformers.utils import ModelOutput

from capsule_heads.paper import smallnorb, trajectory


@pytest.mark.slow
def test_a_trajectory_is_drawn(call, stereo_model, tmp_path):
    path = tmp_path / "trajectory.png"
    options = ("--data", "toy_norb", "--factor", "elevation", "--label", "truck", "--output", path)
    status, out, err = call("benchmarks/draw_trajectory.py", stereo_model, *options)
    assert status == 0, err
    assert len(out.splitlines()) == 5 and Image.open(path).size[0] > 800


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

    monkeypatch.setattr(smallnorb, "load_smallnorb", load_smallnorb)
    monkeypatch.setattr(AutoModelForImageClassification, "from_pretrained", lambda path, **_: Model())
    monkeypatch.setattr(AutoImageProcessor, "from_pretrained", lambda path, **_: process)
    return sources


def test_draw_trajectory(call, stand_ins, tmp_path, monkeypatch):
    titles, draw = [], trajectory.draw_trajectory
    monkeypatch.setattr(trajectory, "draw_trajectory", lambda *given: titles.append(given[4]) or draw(*given))
    path = tmp_path / "trajectory.png"
    options = ("--data", "smallnorb", "--source", "folder", "--factor", "elevation", "--label", "car", "--azimuth", 4)
    status, out, err = call("benchmarks/draw_trajectory.py", "model", *options, "--output", path)
    assert status == 0, err
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
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
    start = ("benchmarks/draw_trajectory.py", "model", "--output", tmp_path / "t.png", "--factor", "azimuth", "--data")
    assert "azimuth was given, but it is the factor that varies" in fails(*start, "toy_norb", "--azimuth", 0)
    assert "label is 'plane'; expected one of animal, human" in fails(*start, "toy_norb", "--label", "plane")
    assert "smallnorb needs --source" in fails(*start, "smallnorb")
    start = (*start, "smallnorb", "--source", "folder")
    assert "Unknown label 'plane'; expected truck, car" in fails(*start, "--label", "plane")
    assert "0 images in which azimuth varies with instance 7" in fails(*start, "--instance", 7)
    assert "Cannot fix azimuth" in fails(*start, "--azimuth", 0)
    assert not (tmp_path / "t.png").exists()
