"""The ray tracer, against what geometry says."""

import math

import numpy as np
import pytest

from capsule_heads.paper import rendering
from capsule_heads.paper.rendering import ball, box, render_pair, rod

OVERHEAD = [((0, 0, 1), 0.5)]


def crossing(solid, origin, direction):
    enter, leave = rendering._cross(solid, np.array([origin], np.float32), np.array(direction, np.float32))
    return enter.item(), leave.item()


@pytest.mark.parametrize(
    "solid, origin, direction, expected",
    [
        (ball((0, 0, 5), 2, 1), (0, 0, 0), (0, 0, 1), (3, 7)),
        (ball((0, 0, 5), (1, 1, 3), 1), (0, 0, 0), (0, 0, 2), (1, 4)),
        (ball((0, 0, 5), 5, 1), (3, 0, 0), (0, 0, 1), (1, 9)),
        (rod((0, 0, 1), (0, 0, 4), 1, 1), (0.5, 0, 0), (0, 0, 1), (1, 4)),
        (rod((0, 0, 1), (0, 0, 4), 1, 1), (-3, 0, 2), (1, 0, 0), (2, 4)),
        (rod((1, 1, 0), (3, 1, 0), 0.5, 1), (0, 1, 0), (1, 0, 0), (1, 3)),
        (box((1, 2, 3), (1, 2, 3), 1), (-1, 2, 3), (1, 0, 0), (1, 3)),
        (box((0, 0, 0), (1, 1, 1), 1), (-2, -2, 0), (1, 1, 0), (1, 3)),
        # Half as wide along x at the top, three quarters in the middle.
        (box((0, 0, 0), (1, 1, 1), 1, taper=(0.5, 1)), (-2, 0, 0), (1, 0, 0), (1.25, 2.75)),
        (box((0, 0, 0), (1, 1, 1), 1, taper=(0.5, 1)), (0, -2, 0), (0, 1, 0), (1, 3)),
        # Sheared: at height z it has moved by z / 2.
        (box((0, 0, 0), [[1, 0, 0.5], [0, 1, 0], [0, 0, 1]], 1), (-3, 0, 0.8), (1, 0, 0), (2.4, 4.4)),
    ],
)
def test_a_ray_enters_and_leaves_where_geometry_says(solid, origin, direction, expected):
    assert crossing(solid, origin, direction) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("solid", [rod((0, 0, -1), (0, 0, 1), 1, 1), box((0, 0, 0), (1, 1, 1), 1)], ids=["rod", "box"])
def test_a_ray_that_misses_enters_after_it_leaves(solid):
    enter, leave = crossing(solid, (-3, 0, 1.5), (1, 0, 0))
    assert enter > leave


def test_normals_stand_on_the_surface():
    sphere = ball((1, 0, 0), 2, 1)
    np.testing.assert_allclose(rendering._normals(sphere, np.array([[1, 0, 2.0]])), [[0, 0, 1]], atol=1e-6)
    pole = rod((0, 0, 0), (0, 0, 2), 0.5, 1)
    points = np.array([[0.2, 0.1, 2], [0.3, 0.4, 1]])
    np.testing.assert_allclose(rendering._normals(pole, points), [[0, 0, 1], [0.6, 0.8, 0]], atol=1e-6)
    wedge = box((0, 0, 0), (1, 1, 1), 1, taper=(0.5, 1))  # its side leans by 1/2 in a height of 2
    expected = np.array([[1, 0, 0.25]]) / math.hypot(1, 0.25)
    np.testing.assert_allclose(rendering._normals(wedge, np.array([[0.75, 0, 0]])), expected, atol=1e-6)


def test_an_ellipsoid_may_be_turned():
    turned = ball((0, 0, 0), (2, 1, 1), 1, rotation=[[0, -1, 0], [1, 0, 0], [0, 0, 1]])
    np.testing.assert_allclose(turned.bounds, [[-1, -2, -1], [1, 2, 1]], atol=1e-6)


def test_bounds_and_moves():
    np.testing.assert_allclose(box((1, 2, 3), (1, 1, 2), 1).bounds, [[0, 1, 1], [2, 3, 5]])
    moved = ball((1, 0, 0), (1, 2, 3), 1).moved(2 * np.eye(3), (0, 0, 1))
    np.testing.assert_allclose(moved.bounds, [[0, -4, -5], [4, 4, 7]])


def test_the_floor_is_uniform_and_as_bright_as_its_albedo_and_light():
    pair = render_pair([ball((0, 0, 0.5), 0.01, 1)], 60, [((0, 0, 1), 0.5)], 0.25, size=32)
    assert pair.shape == (2, 32, 32) and pair.dtype == np.uint8
    assert pair[0, 0, 0] == round(255 * 0.62 * 0.75)
    assert (pair[:, :8] == pair[0, 0, 0]).all()


def test_a_surface_is_as_bright_as_lamberts_law_says():
    # From right above all but the walls of a box is its top; light comes at 60 degrees from the vertical.
    lights = [((math.sin(math.radians(60)), 0, math.cos(math.radians(60))), 0.7)]
    pair = render_pair([box((0, 0, 0.2), (2, 2, 0.2), 0.5)], 89.9, lights, 0.2, size=32)
    assert (pair == round(255 * 0.5 * (0.2 + 0.7 * 0.5))).all()


def test_a_solid_casts_a_shadow_away_from_the_light():
    floor = 255 * 0.62
    lights = [((-1, 0, 1), 0.5)]  # from the left: the shadow of the top falls as far to the right as it is high
    view = render_pair([ball((0, 0, 0.8), 0.2, 1)], 89.9, lights, 0.4, size=96).mean(axis=0)
    to_pixel = 48 / rendering.HALF_WIDTH
    column = int(48 + 0.8 * to_pixel * rendering.DISTANCE / (rendering.DISTANCE + 0.4))
    assert view[48, column] == pytest.approx(floor * 0.4, abs=1)
    assert view[48, 96 - column] == pytest.approx(floor * (0.4 + 0.5 * math.sqrt(0.5)), abs=1)


def test_a_solid_in_front_hides_those_behind():
    near, far = box((0, -0.5, 0.3), (0.3, 0.05, 0.3), 1.0), box((0, 0.5, 0.3), (0.2, 0.05, 0.2), 0.1)
    lights = [((0, -1, 1), 0.5)]
    both = render_pair([near, far], 10, lights, 0.4, size=32)
    swapped = render_pair([far, near], 10, lights, 0.4, size=32)
    assert np.array_equal(both, swapped)
    assert both[0, 16, 16] > 150


def test_disparity_is_that_of_the_cameras():
    # A ball nearer than the point looked at is further right in the left view, a farther one further left.
    def column(y):
        solids = [ball((0, y, 1.0), 0.1, 1.0), box((0, 0, 1.0), (0.001, 0.001, 1.0), 0.62)]
        pair = render_pair(solids, 0.5, [((0, -1, 0.2), 0.8)], 0.2, size=96)
        return [np.flatnonzero((view > 200).any(axis=0)).mean() for view in pair]

    pixels = 48 / (rendering.HALF_WIDTH / rendering.DISTANCE)
    for y in (-1.0, 1.0):
        left, right = column(y)
        expected = pixels * rendering.BASELINE * (1 / (rendering.DISTANCE + y) - 1 / rendering.DISTANCE)
        assert left - right == pytest.approx(expected, abs=1)
    left, right = column(0.0)
    assert left - right == pytest.approx(0, abs=1)


def test_views_are_symmetric_where_the_scene_is():
    pair = render_pair([ball((0, 0, 0.5), (0.3, 0.6, 0.5), 0.8)], 45, OVERHEAD, 0.3, size=48)
    assert np.abs(pair[0].astype(int) - pair[1, :, ::-1]).max() <= 1
