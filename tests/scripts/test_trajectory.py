"""scripts/draw_trajectory.py, as a user runs it."""

import pytest
import torch
from PIL import Image

from capsule_heads.paper.convert import build_network
from capsule_heads.paper.image_processing_stereo import StereoImageProcessor


@pytest.fixture(scope="module")
def stereo_model(tmp_path_factory):
    """The smallNORB network with random weights, none of them zero."""
    folder = tmp_path_factory.mktemp("stereo")
    torch.manual_seed(0)
    model = build_network("smallnorb")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    StereoImageProcessor().save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_trajectory_is_drawn(call, stereo_model, tmp_path):
    path = tmp_path / "trajectory.png"
    options = ("--data", "toy_norb", "--factor", "elevation", "--label", "truck", "--output", path)
    status, out, err = call("draw_trajectory.py", stereo_model, *options)
    assert status == 0, err
    assert len(out.splitlines()) == 5 and Image.open(path).size[0] > 800
