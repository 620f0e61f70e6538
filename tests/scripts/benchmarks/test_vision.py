"""scripts/benchmarks/vision.py, as a user runs it, on a few views of each toy."""

import json

import numpy as np
import pytest
import torch
import vision
from datasets import Dataset, DatasetDict
from variants import SpatialAlike, SpatialBetas, SpatialBoth

from capsule_heads.heads import SpatialPoseHead
from capsule_heads.paper import toy_norb
from capsule_heads.paper.stereo import stereo_features

SIZES = {"hidden_sizes": [6], "n_out": 5, "n_parts": 32}
SMALL = ("--steps", 4, "--seeds", 1, "--networks", "spatial pose", "linear")


@pytest.fixture(autouse=True)
def few_pairs(monkeypatch):
    """Noise instead of rendered toys, from every second elevation."""

    def load(**sizes):
        rng, splits = np.random.default_rng(0), {}
        for name in ("train", "validation", "test"):
            rows = {"image": rng.integers(0, 256, (10, 2, 96, 96)), "label": np.arange(10) % 5}
            rows |= {
                "instance": [0] * 10,
                "elevation": np.arange(10) % 5 * 2,
                "azimuth": [0] * 10,
                "lighting": [0] * 10,
            }
            splits[name] = Dataset.from_dict(rows, stereo_features())
        return DatasetDict(splits)

    monkeypatch.setattr(toy_norb, "load_toy_norb", load)


def scores(head):
    states = torch.randn(3, 9, 6, generator=torch.Generator().manual_seed(0))
    return head.eval()([states], torch.ones(3, 9), return_routing_probabilities=True)


def test_starts_change_the_start_alone():
    torch.manual_seed(0)
    usual = SpatialPoseHead(**SIZES)
    names = [name for name, _ in usual.named_parameters()]
    largest = {}
    for start in (SpatialBetas, SpatialAlike, SpatialBoth):
        head = start(**SIZES)
        head.reset_parameters()
        assert [name for name, _ in head.named_parameters()] == names
        found = scores(head)
        assert bool(found.a_out.any()) == (start is not SpatialAlike)
        largest[start] = float(found.routing_probabilities[1].amax(-1).mean().detach())
        head.load_state_dict(usual.state_dict())
        torch.testing.assert_close(scores(head).a_out, scores(usual).a_out)
    assert largest[SpatialAlike] < 0.5 < largest[SpatialBetas]  # of five classes


def test_accuracies_by_step(call, tmp_path):
    status, out, err = call("benchmarks/vision.py", *SMALL, "--marks", 2, "--runs", tmp_path)
    assert status == 0, err
    assert "| network | 2 | 4 | trainable parameters |" in out
    assert "| 271,688 |" in out and "| 187,981 |" in out
    found = json.loads((tmp_path / "all_4_linear_0" / vision.RESULTS).read_text())
    assert set(found["marks"]) == {"2", "4"} and set(found["marks"]["4"]) == {"test"}
    assert call("benchmarks/vision.py", *SMALL, "--marks", 2, "--runs", tmp_path)[:2] == (
        0,
        out,
    )  # nothing is run again


def test_viewpoints(call, tmp_path):
    options = (*SMALL, "--marks", 2, "--viewpoints", "elevation", "--runs", tmp_path)
    status, out, err = call("benchmarks/vision.py", *options)
    assert status == 0, err
    assert "| network | familiar | novel | step | familiar, matched | novel, matched |" in out
    found = json.loads((tmp_path / "elevation_4_linear_0" / vision.RESULTS).read_text())
    assert set(found["marks"]["4"]) == {vision.FAMILIAR_TEST, vision.NOVEL_TEST}


def test_controls_are_matched():
    marks = {str(step): {vision.FAMILIAR_TEST: x, vision.NOVEL_TEST: 0.5} for step, x in ((2, 0.7), (4, 0.9), (6, 0.8))}
    assert vision.match(marks, 0.79) == "6" and vision.match(marks, 0.75) == "2" and vision.match(marks, 1.0) == "4"


def test_estimates_and_mistakes(call, fails, tmp_path):
    status, out, err = call("benchmarks/vision.py", *SMALL[:-2], "linear", "--estimate", "--runs", tmp_path)
    assert status == 0, err
    assert "s a step" in out and "Together" in out
    message = "--marks has 8, and --steps is 4; expected none beyond."
    assert message in fails("benchmarks/vision.py", "--steps", 4, "--marks", 8)
