import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from torch import nn
from transformers.utils import ModelOutput

from capsule_heads.paper.trajectory import (
    activated_poses,
    compute_capsules,
    draw_trajectory,
    pose_trajectory,
    select_sequence,
)

CIRCLE = 2 * np.pi * np.arange(8) / 8


def distances(points):
    return np.linalg.norm(points[:, None] - points[None], axis=-1)


def random_basis(rng, n):
    return np.linalg.qr(rng.normal(size=(n, n)))[0]


@pytest.mark.parametrize("d_out", [2, 4, 7])
def test_a_planar_trajectory_is_recovered_up_to_rotation(d_out):
    rng = np.random.default_rng(0)
    planar = rng.normal(size=(3, 10, 2)) * [5.0, 0.3]
    basis = random_basis(rng, d_out)[:2]
    poses = np.einsum("csk,kh->sch", planar, basis) + rng.normal(size=(3, d_out))  # [10, 3, d_out]
    trajectory = pose_trajectory(poses)
    assert trajectory.coordinates.shape == (3, 10, 2)
    for found, true in zip(trajectory.coordinates, planar):
        np.testing.assert_allclose(distances(found), distances(true), atol=1e-12)
        np.testing.assert_allclose(found.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(trajectory.stress, 0, atol=1e-7)


def test_a_circle_stays_a_circle():
    poses = np.zeros((8, 1, 5))
    poses[:, 0, 1], poses[:, 0, 3] = 3 * np.cos(CIRCLE), 3 * np.sin(CIRCLE)
    points = pose_trajectory(poses).coordinates[0]
    np.testing.assert_allclose(np.linalg.norm(points, axis=-1), 3, atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(np.diff(points, axis=0), axis=-1), 6 * np.sin(np.pi / 8), atol=1e-12)


def test_stress_is_what_a_plane_cannot_keep():
    # The corners of a regular tetrahedron with sides of 1: all six distances are 1.
    poses = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])[:, None] / np.sqrt(8)
    trajectory = pose_trajectory(poses)
    lost = 1 - distances(trajectory.coordinates[0])[np.triu_indices(4, 1)]
    assert (lost > -1e-12).all()  # a projection only shrinks
    assert trajectory.stress[0] == pytest.approx(np.sqrt((lost**2).sum() / 6))
    assert 0.1 < trajectory.stress[0] < 0.5


def test_vectors_that_do_not_move_or_have_one_dimension():
    still = pose_trajectory(np.ones((4, 2, 3)))
    assert (still.coordinates == 0).all() and (still.stress == 0).all()
    line = pose_trajectory(np.array([0.0, 1.0, 3.0])[:, None, None])
    np.testing.assert_allclose(line.coordinates[0], [[-4 / 3, 0], [-1 / 3, 0], [5 / 3, 0]], atol=1e-12)


def test_the_sign_of_an_axis_does_not_depend_on_that_of_the_poses():
    poses = np.random.default_rng(1).normal(size=(6, 2, 4))
    np.testing.assert_allclose(
        pose_trajectory(poses).coordinates, pose_trajectory(-poses[:, :, ::-1]).coordinates, atol=1e-12
    )


@pytest.mark.parametrize("shape", [(2, 4, 4), (5, 4), (5, 1, 4, 4)])
def test_poses_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"expected \[steps, d_cov, d_out\] with 3 steps or more"):
        pose_trajectory(np.zeros(shape))


def test_poses_that_are_not_finite():
    with pytest.raises(ValueError, match="not finite"):
        pose_trajectory(np.full((3, 1, 2), np.nan))


def test_the_capsule_activated_most_often():
    logits = np.array([[0.0, 5.0, 1.0], [2.0, 1.0, 0.0], [0.0, 9.0, 1.0]])
    poses = np.arange(3 * 3 * 2 * 2, dtype=float).reshape(3, 3, 2, 2)
    chosen, index, count = activated_poses(logits, poses)
    assert (index, count) == (1, 2)
    np.testing.assert_array_equal(chosen, poses[:, 1])


def test_capsules_activated_equally_often():
    logits = np.array([[0.0, 1.0], [3.0, 1.0]])  # means 1.5 and 1
    assert activated_poses(logits, np.zeros((2, 2, 1, 2)))[1:] == (0, 1)


def test_logits_and_poses_of_other_shapes():
    with pytest.raises(ValueError, match=r"logits \(2, 3\) and poses \(2, 4, 1, 2\); expected"):
        activated_poses(np.zeros((2, 3)), np.zeros((2, 4, 1, 2)))


@pytest.fixture(scope="module")
def dataset():
    """2 categories x 2 instances x 3 elevations x 4 azimuths x 2 lightings, shuffled; the image says which it is."""
    rows = [
        {"label": label, "instance": instance, "elevation": elevation, "azimuth": azimuth, "lighting": lighting}
        for label in (0, 1)
        for instance in (4, 6)
        for elevation in (0, 1, 2)
        for azimuth in (0, 2, 4, 6)
        for lighting in (0, 5)
    ]
    order = np.random.default_rng(0).permutation(len(rows))
    columns = {name: [rows[i][name] for i in order] for name in rows[0]}
    features = Features({name: Value("int64") for name in columns} | {"label": ClassLabel(names=["truck", "car"])})
    return Dataset.from_dict(columns, features=features)


def test_a_sequence_in_the_order_of_the_factor(dataset):
    sequence, fixed = select_sequence(dataset, "azimuth", label="car", instance=6, lighting=5, elevation=2)
    assert fixed == {"label": 1, "instance": 6, "lighting": 5, "elevation": 2}
    assert sequence["azimuth"][:] == [0, 2, 4, 6]
    for name, value in fixed.items():
        assert set(sequence[name][:]) == {value}


def test_what_is_not_fixed_takes_the_smallest_value(dataset):
    sequence, fixed = select_sequence(dataset, "elevation", lighting=5, instance=None)
    assert fixed == {"label": 0, "instance": 4, "lighting": 5, "azimuth": 0}
    assert sequence["elevation"][:] == [0, 1, 2]


def test_one_image_for_each_value(dataset):
    twice = Dataset.from_dict({name: dataset[name][:] * 2 for name in dataset.column_names})
    assert select_sequence(twice, "elevation", label="1")[0]["elevation"][:] == [0, 1, 2]


@pytest.mark.parametrize(
    "factor, fixed, message",
    [
        ("lighting", {}, "factor is 'lighting'; expected one of elevation, azimuth"),
        ("azimuth", {"azimuth": 2}, "Cannot fix azimuth while azimuth varies; expected some of label, instance"),
        ("azimuth", {"size": 2}, "Cannot fix size"),
        ("azimuth", {"label": "plane"}, "Unknown label 'plane'; expected truck, car"),
        ("azimuth", {"instance": 5}, "0 images in which azimuth varies with instance 5; expected 3 or more"),
    ],
)
def test_no_such_sequence(dataset, factor, fixed, message):
    with pytest.raises(ValueError, match=message):
        select_sequence(dataset, factor, **fixed)


def test_a_sequence_too_short_for_a_plane(dataset):
    two = dataset.filter(lambda row: row["azimuth"] < 4)
    with pytest.raises(ValueError, match="2 images in which azimuth varies with label 0, instance 4"):
        select_sequence(two, "azimuth")


def test_a_dataset_of_another_kind(dataset):
    with pytest.raises(ValueError, match="no column elevation, azimuth; it has label"):
        select_sequence(dataset.select_columns(["label", "instance", "lighting"]), "azimuth")


class MeanClassifier(nn.Module):
    """Scores and poses that are the mean pixels of the two channels."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.batches = []

    def forward(self, pixel_values, output_capsules=None):
        self.batches.append(len(pixel_values))
        assert output_capsules and not self.training
        means = pixel_values.mean((2, 3)) * self.weight  # [batch, 2]
        return ModelOutput(logits=means, poses=means[:, :, None, None].expand(-1, -1, 4, 4))


def process(images, return_tensors):
    assert return_tensors == "pt"
    return {"pixel_values": torch.from_numpy(np.stack(images)).float() / 255}


def test_capsules_of_all_images_batch_by_batch():
    images = [np.full((2, 6, 6), 51 * i, dtype=np.uint8) for i in range(5)]
    model = MeanClassifier()
    logits, poses = compute_capsules(model, process, images, batch_size=2)
    assert model.batches == [2, 2, 1]
    np.testing.assert_allclose(logits, np.arange(5)[:, None] * np.full((1, 2), 0.2), atol=1e-6)
    assert poses.shape == (5, 2, 4, 4)
    np.testing.assert_allclose(poses[:, 0, 2, 3], np.arange(5) * 0.2, atol=1e-6)


def test_a_head_without_capsules_has_no_poses():
    model = MeanClassifier()
    model.forward = lambda pixel_values, output_capsules: ModelOutput(logits=pixel_values.mean((2, 3)), poses=None)
    with pytest.raises(ValueError, match="a head without capsules, so there are no poses; expected a capsule head"):
        compute_capsules(model, process, [np.zeros((2, 6, 6), np.uint8)])


def test_the_picture():
    rng = np.random.default_rng(0)
    trajectory = pose_trajectory(rng.normal(size=(6, 4, 4)))
    images = [np.full((2, 8, 8), i, dtype=np.uint8) for i in range(6)]
    for image in images:
        image[1] = 200  # the right eye's, which is not shown
    figure = draw_trajectory(trajectory, images, [0, 2, 4, 6, 8, 10], "azimuth", "A title", closed=True)
    assert type(figure).__module__ == "matplotlib.figure"
    assert figure.get_suptitle() == "A title"
    above, below = figure.subfigs
    assert above.get_supylabel() == "azimuth"
    assert [axes.get_title() for axes in above.axes] == ["0", "2", "4", "6", "8", "10"]
    assert [axes.images[0].get_array().max() for axes in above.axes] == [0, 1, 2, 3, 4, 5]
    assert len(below.axes) == 4
    for i, axes in enumerate(below.axes):
        assert axes.get_title() == f"pose vector {i + 1} (stress {trajectory.stress[i]:.2f})"
        path = next(line for line in axes.lines if len(line.get_xdata()) == 6)
        np.testing.assert_array_equal(path.get_xydata(), trajectory.coordinates[i])
        _, first, last = axes.collections
        np.testing.assert_array_equal(first.get_offsets()[0], trajectory.coordinates[i, 0])
        np.testing.assert_array_equal(last.get_offsets()[0], trajectory.coordinates[i, -1])
        np.testing.assert_array_equal(axes.lines[-1].get_xydata(), trajectory.coordinates[i, [-1, 0]])
    assert len({axes.get_xlim() for axes in below.axes}) == 1  # one scale
    assert [text.get_text() for text in below.legends[0].get_texts()] == ["first", "last", "back to the first"]


def test_the_frame_of_an_image_has_the_colour_of_its_step():
    trajectory = pose_trajectory(np.random.default_rng(0).normal(size=(5, 2, 4)))
    images = [np.zeros((2, 8, 8), dtype=np.uint8)] * 5
    above, below = draw_trajectory(trajectory, images, list(range(5)), "elevation", "").subfigs
    frames = np.array([axes.spines["left"].get_edgecolor() for axes in above.axes])
    np.testing.assert_array_equal(below.axes[0].collections[0].get_facecolors(), frames)
    assert "back to the first" not in [text.get_text() for text in below.legends[0].get_texts()]


@pytest.mark.parametrize("d_cov, n_axes", [(1, 1), (3, 3), (6, 6)])
def test_another_number_of_vectors(d_cov, n_axes):
    trajectory = pose_trajectory(np.random.default_rng(0).normal(size=(4, d_cov, 2)))
    figure = draw_trajectory(trajectory, [np.zeros((2, 8, 8), dtype=np.uint8)] * 4, [0, 1, 2, 3], "elevation", "")
    assert sum(axes.axison for axes in figure.subfigs[1].axes) == n_axes
    figure.draw_without_rendering()


def test_unequal_numbers_of_steps():
    trajectory = pose_trajectory(np.zeros((4, 1, 2)))
    with pytest.raises(ValueError, match="4 steps, 3 images and 4 values; expected equal numbers"):
        draw_trajectory(trajectory, [np.zeros((2, 8, 8))] * 3, [0, 1, 2, 3], "elevation", "")


PROGRAM = """
import sys
import numpy as np
from capsule_heads.paper.trajectory import draw_trajectory, pose_trajectory
assert "matplotlib" not in sys.modules
trajectory = pose_trajectory(np.eye(3)[:, None])
sys.modules["matplotlib"] = None  # as if it were not installed
try:
    draw_trajectory(trajectory, [np.zeros((2, 8, 8))] * 3, [0, 1, 2], "elevation", "")
except ImportError as error:
    print(error)
"""


def test_computing_needs_no_matplotlib_and_drawing_says_which_extra():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.stdout == 'Drawing needs matplotlib: pip install "capsule-heads[pictures]".\n', done.stderr


def test_pyplot_is_left_alone():
    program = "import sys, numpy as np\nfrom capsule_heads.paper.trajectory import draw_trajectory, pose_trajectory\n"
    program += "images = [np.zeros((2, 8, 8))] * 3\n"
    program += "draw_trajectory(pose_trajectory(np.eye(3)[:, None]), images, [0, 1, 2], 'azimuth', '')\n"
    program += "assert 'matplotlib.pyplot' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
