import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from results_pages.labels import label_points, place_labels

from capsule_heads.explain.pictures import new_figure

BOUNDS = np.array([0.0, 0.0, 1000.0, 600.0])


def markers(points, radius=5):
    return np.concatenate([points - radius, points + radius], -1)


def boxes(centres, sizes):
    return np.concatenate([centres - sizes / 2, centres + sizes / 2], -1)


def shared_area(a, b):
    return np.prod(np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0))


def check(points, sizes):
    found = boxes(place_labels(points, sizes, markers(points), BOUNDS, 10), sizes)
    for i, box in enumerate(found):
        assert all(shared_area(box, other) == 0 for other in [*found[:i], *markers(points)])
        assert (box[:2] >= BOUNDS[:2]).all() and (box[2:] <= BOUNDS[2:]).all()
    return found


def test_a_label_lies_right_beside_its_point():
    points = np.array([[500.0, 300.0]])
    (box,) = check(points, np.array([[100.0, 20.0]]))
    nearest = np.clip(points[0], box[:2], box[2:])
    assert np.linalg.norm(nearest - points[0]) == pytest.approx(10, abs=0.5)


def test_a_label_stays_within_the_bounds():
    for point in np.array([[8.0, 8.0], [992.0, 592.0], [8.0, 592.0]]):
        check(point[None], np.array([[200.0, 30.0]]))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_labels_of_a_crowd_hide_nothing(seed):
    rng = np.random.default_rng(seed)
    points = rng.uniform([300, 200], [700, 400], size=(8, 2))
    check(points, rng.uniform([60, 15], [120, 25], size=(8, 2)))


def test_lines_of_far_labels_cross_no_label():
    points = np.array([[500.0, 300.0 + 12 * i] for i in range(6)])
    sizes = np.full((6, 2), [90.0, 24.0])
    found = check(points, sizes)
    for i, point in enumerate(points):
        line = np.linspace(point, (found[i, :2] + found[i, 2:]) / 2, 50)
        others = np.delete(found, i, 0)
        inside = (line >= others[:, None, :2]) & (line <= others[:, None, 2:])
        assert not inside.all(-1).any()


def test_labels_of_axes_hide_neither_points_nor_error_bars():
    figure = new_figure(6, 4)
    axes = figure.add_subplot(xlim=(0, 10), ylim=(0, 10))
    xy, heights = np.array([[5.0, 5.0], [5.2, 5.0], [9.9, 9.9]]), np.array([2.0, 0.0, 0.0])
    label_points(axes, xy, heights, ["one label", "another\nlabel", "a long label in the corner"], fontsize=8)
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    extents = [text.get_window_extent(renderer).extents for text in axes.texts]
    bars = np.stack([np.zeros(3), heights], -1)
    low, high = axes.transData.transform(xy - bars), axes.transData.transform(xy + bars)
    obstacles = np.concatenate([low - 3, high + 3], -1)
    for i, box in enumerate(extents):
        assert all(shared_area(box, other) == 0 for other in [*extents[:i], *obstacles])
    frame = axes.get_window_extent(renderer).extents
    assert all((box[:2] >= frame[:2] - 1).all() and (box[2:] <= frame[2:] + 1).all() for box in extents)
