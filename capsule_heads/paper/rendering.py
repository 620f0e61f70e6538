"""A small ray tracer, in numpy, for stereo pairs of solids on a floor.

A solid is an affine image of a unit ball, a unit cylinder, or a box that may narrow. Each of these is the set of points
that satisfy at most one quadric inequality and some linear ones. So a ray is inside a solid between the last of its
entries and the first of its exits, and one function traces all solids.

In world coordinates, `x` points to the right, `y` away from the cameras, `z` up, and the floor is at `z = 0`. In camera
coordinates, `x` points to the right, `y` down, `z` forward, and the camera is at the origin. Everything is float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import numpy as np
from numpy.typing import ArrayLike, NDArray

_TINY = np.float32(1e-12)  # keeps a divisor from being exactly zero
_SIGNS = np.array(list(product((-1, 1), repeat=3)), np.float32)  # signs of the corners of a cube

# The cameras: their distance from the toy, half the width of an image at the toy, and the distance between them, all in
# radii of a toy.
DISTANCE = 6.0
HALF_WIDTH = 1.2
BASELINE = 0.7

_FLOOR_ALBEDO = 0.62
_SAMPLES = 2  # samples per pixel, along rows and along columns


@dataclass(frozen=True)
class Solid:
    """The image of a unit solid under `center + axes @ point`.

    Attributes:
        center: `[3]`.
        axes: `[3, 3]`; its columns are the half axes.
        quadric: `[3]`, the coefficients of the squares in `sum(quadric * point ** 2) <= 1`; zeros for no quadric.
        planes: `[n_planes, 4]`, rows `(normal, bound)` of `normal @ point <= bound`.
        albedo: The fraction of light that it reflects.
    """

    center: NDArray
    axes: NDArray
    quadric: NDArray
    planes: NDArray
    albedo: float

    @property
    def corners(self) -> NDArray:
        """Return the corners `[8, 3]` of the parallelepiped around the solid."""
        return self.center + _SIGNS @ self.axes.T

    @property
    def bounds(self) -> NDArray:
        """Return the least and the greatest coordinates `[2, 3]`, exact for balls and boxes, near for cylinders."""
        norm = 2 if self.quadric.any() else 1
        extent = np.linalg.norm(self.axes, ord=norm, axis=1)
        return np.stack([self.center - extent, self.center + extent])

    def moved(self, matrix: ArrayLike, shift: ArrayLike) -> Solid:
        """Return the solid's image under `shift + matrix @ point`."""
        matrix = np.asarray(matrix, np.float32)
        center = (matrix @ self.center + shift).astype(np.float32)
        return replace(self, center=center, axes=(matrix @ self.axes).astype(np.float32))


def _solid(center: ArrayLike, axes: ArrayLike, quadric: ArrayLike, planes: ArrayLike, albedo: float) -> Solid:
    return Solid(
        center=np.asarray(center, np.float32),
        axes=np.asarray(axes, np.float32),
        quadric=np.asarray(quadric, np.float32),
        planes=np.asarray(planes, np.float32),
        albedo=float(albedo),
    )


def ball(center: ArrayLike, radii: ArrayLike, albedo: float, rotation: ArrayLike | None = None) -> Solid:
    """Return an ellipsoid with half axes along those of the world, or along the columns of a rotation."""
    axes = np.diag(np.broadcast_to(radii, 3)) if rotation is None else np.asarray(rotation) * radii
    return _solid(center, axes, (1, 1, 1), np.empty((0, 4)), albedo)


def rod(start: ArrayLike, end: ArrayLike, radius: float, albedo: float) -> Solid:
    """Return a cylinder between two points, with flat ends."""
    start, end = np.asarray(start, np.float64), np.asarray(end, np.float64)
    along = (end - start) / 2
    across = np.cross(along, (0, 0, 1) if abs(along[2]) < 0.9 * np.linalg.norm(along) else (1, 0, 0))
    across *= radius / np.linalg.norm(across)
    third = np.cross(along, across) / np.linalg.norm(along)
    axes = np.stack([across, third, along], axis=1)
    return _solid((start + end) / 2, axes, (1, 1, 0), [(0, 0, 1, 1), (0, 0, -1, 1)], albedo)


def box(center: ArrayLike, half_axes: ArrayLike, albedo: float, taper: tuple[float, float] = (1, 1)) -> Solid:
    """Return a box or a frustum, whose first two axes are `taper` times as long at the end of its third axis.

    Args:
        center: `[3]`.
        half_axes: Three lengths, or three half axes as columns, not necessarily at right angles.
        albedo: The fraction of light that its sides reflect.
        taper: Two factors, at most 1.
    """
    axes = np.asarray(half_axes, np.float64)
    planes = [(0, 0, 1, 1), (0, 0, -1, 1)]
    for axis, factor in enumerate(taper):
        lean = (1 - factor) / 2
        for sign in (1, -1):
            normal = np.zeros(3)
            normal[axis], normal[2] = sign, lean
            planes.append((*normal, 1 - lean))
    return _solid(center, np.diag(axes) if axes.ndim == 1 else axes, (0, 0, 0), planes, albedo)


def render_pair(
    solids: Sequence[Solid], elevation: float, lights: Sequence[tuple[ArrayLike, float]], ambient: float, size: int = 96
) -> NDArray[np.uint8]:
    """Render solids on the floor as two cameras side by side see them.

    Both cameras look at the point halfway up the solids, from the same height. Surfaces are Lambertian, lights are
    directional and cast shadows, and the floor is uniform.

    Args:
        solids: Solids in the world, on the floor, around its `z` axis.
        elevation: Elevation of the cameras, in degrees above the horizon.
        lights: For each light the direction towards it in world coordinates, and its strength.
        ambient: The strength of light from everywhere; surfaces that face down get less of it.
        size: Height and width of an image, in pixels.

    Returns:
        Grey values `[2, size, size]`, the left view first.
    """
    target = np.array([0, 0, max(solid.bounds[1, 2] for solid in solids) / 2])
    phi = np.deg2rad(elevation)
    middle = target + DISTANCE * np.array([0, -np.cos(phi), np.sin(phi)])
    views = []
    for side in (-0.5, 0.5):
        camera = np.add(middle, (side * BASELINE, 0, 0))
        forward = _unit(target - camera)
        down = _unit(np.cross(forward, (1, 0, 0)))  # so no camera is rolled against the line between them
        rotation = np.stack([np.cross(down, forward), down, forward])  # world to camera
        seen = [solid.moved(rotation, -rotation @ camera) for solid in solids]
        beams = [(_unit(rotation @ np.asarray(towards)), strength) for towards, strength in lights]
        views.append(_render(seen, rotation, camera[2], beams, ambient, size))
    return np.stack(views)


def _unit(vector: ArrayLike) -> NDArray:
    vector = np.asarray(vector, np.float32)
    return vector / np.linalg.norm(vector)


@cache
def _slopes(size: int) -> NDArray:
    """Return the slopes `[size * _SAMPLES]` of the rays through one row, or one column, of samples."""
    n_samples = size * _SAMPLES
    return (((np.arange(n_samples) + 0.5) / n_samples * 2 - 1) * HALF_WIDTH / DISTANCE).astype(np.float32)


def _render(solids: list[Solid], rotation: NDArray, height: float, lights: list, ambient: float, size: int) -> NDArray:
    """Render one view of solids in its camera's coordinates."""
    slopes = _slopes(size)
    rays = np.empty((len(slopes), len(slopes), 3), np.float32)
    rays[..., 0], rays[..., 1], rays[..., 2] = slopes, slopes[:, None], 1
    up = rotation[:, 2]

    # The floor is beneath everything, so a ray that hits nothing else reaches it.
    depth = -np.float32(height) / (rays @ up)
    index = np.full(depth.shape, -1, np.int16)
    for number, solid in enumerate(solids):
        window = _window(solid, slopes)
        enter, leave = _cross(solid, np.zeros(3, np.float32), rays[window])
        nearer = (enter < leave) & (enter < depth[window])
        depth[window][nearer] = enter[nearer]
        index[window][nearer] = number

    light = _shade(solids, rays * depth[..., None], index, up, lights, ambient)
    grey = light.reshape(size, _SAMPLES, size, _SAMPLES).mean(axis=(1, 3))
    return np.rint(255 * np.clip(grey, 0, 1)).astype(np.uint8)


def _shade(solids: list[Solid], points: NDArray, index: NDArray, up: NDArray, lights: list, ambient: float) -> NDArray:
    """Return the light from points `[..., 3]`, each on the solid of its index `[...]` or, for -1, on the floor."""
    points, shape, index = points.reshape(-1, 3), index.shape, index.ravel()
    normals = np.empty_like(points)
    normals[:] = up
    albedos = np.full(len(points), _FLOOR_ALBEDO, np.float32)
    order = np.argsort(index, kind="stable")
    ends = np.searchsorted(index[order], np.arange(-1, len(solids)), side="right")
    for solid, start, end in zip(solids, ends[:-1], ends[1:]):
        on_it = order[start:end]
        normals[on_it] = _normals(solid, points[on_it])
        albedos[on_it] = solid.albedo

    light = ambient * (0.75 + 0.25 * (normals @ up))
    raised = points + np.float32(2e-3) * normals  # else a solid would cast a shadow on its own points
    for towards, strength in lights:
        cosines = np.maximum(normals @ towards, 0)
        cosines[_find_shadowed(solids, raised, towards, cosines > 0)] = 0
        light += strength * cosines
    return (albedos * light).reshape(shape)


def _window(solid: Solid, slopes: NDArray) -> tuple[slice, slice]:
    """Return the rows and columns of samples in which a solid in front of the camera may be seen."""
    corners = solid.corners
    seen = corners[:, :2] / corners[:, 2:]
    low, high = np.searchsorted(slopes, seen.min(axis=0)), np.searchsorted(slopes, seen.max(axis=0))
    return slice(low[1], high[1]), slice(low[0], high[0])


def _cross(solid: Solid, origins: NDArray, directions: NDArray) -> tuple[NDArray, NDArray]:
    """Find where rays, `origins + t * directions`, enter and leave a solid.

    Args:
        solid: A solid in the coordinates of the rays.
        origins: `[..., 3]`. Either origins or directions may be one vector for all rays.
        directions: `[..., 3]`, of any length.

    Returns:
        Two arrays `[...]` of values of `t`, where rays enter and leave. A ray that misses the solid enters after it
        leaves.
    """
    inverse = np.linalg.inv(solid.axes).T
    o, d = (origins - solid.center) @ inverse, directions @ inverse
    enter, leave = np.asarray(-np.inf, np.float32), np.asarray(np.inf, np.float32)
    if solid.quadric.any():
        a = (d * d) @ solid.quadric + _TINY
        b = (d * o) @ solid.quadric
        c = (o * o) @ solid.quadric - 1
        root = np.sqrt(np.maximum(b * b - a * c, 0))  # 0 for a ray that misses: both values are its nearest point
        enter, leave = (-b - root) / a, (root - b) / a
    for *normal, bound in solid.planes:
        slope = d @ np.array(normal, np.float32) + _TINY
        t = (bound - o @ np.array(normal, np.float32)) / slope
        enter = np.where(slope < 0, np.maximum(enter, t), enter)
        leave = np.where(slope < 0, leave, np.minimum(leave, t))
    return enter, leave


def _normals(solid: Solid, points: NDArray) -> NDArray:
    """Return the outward unit normals at points on a solid's surface, `[n, 3]`."""
    inverse = np.linalg.inv(solid.axes)
    local = (points - solid.center) @ inverse.T
    gradients = local * solid.quadric
    if len(solid.planes):
        # A point is on the plane whose bound it meets, unless the quadric is nearer.
        slack = local @ solid.planes[:, :3].T - solid.planes[:, 3]
        nearest = slack.argmax(axis=1)
        on_plane = slack.max(axis=1) > ((local * gradients).sum(axis=1) - 1 if solid.quadric.any() else -np.inf)
        gradients = np.where(on_plane[:, None], solid.planes[nearest, :3], gradients)
    normals = gradients @ inverse
    return normals / np.linalg.norm(normals, axis=1, keepdims=True)


def _find_shadowed(solids: list[Solid], points: NDArray, towards: NDArray, facing: NDArray) -> NDArray:
    """Return the indices of the points `[n, 3]` that face a light and have a solid between them and the light."""
    # In a plane across the light's direction, only points in a solid's rectangle can be behind the solid.
    across = _unit(np.cross(towards, (0, 0, 1) if abs(towards[2]) < 0.9 else (1, 0, 0)))
    plane = np.stack([across, np.cross(towards, across)])
    corners = np.stack([solid.corners @ plane.T for solid in solids])
    low, high = corners.min(axis=1), corners.max(axis=1)
    x, y = plane @ points.T

    def within(low: NDArray, high: NDArray) -> NDArray:
        return (x > low[0]) & (x < high[0]) & (y > low[1]) & (y < high[1])

    near = np.flatnonzero(facing & within(low.min(axis=0), high.max(axis=0)))
    x, y, points = x[near], y[near], points[near]
    shadowed = np.zeros(len(near), bool)
    for number, solid in enumerate(solids):
        behind = np.flatnonzero(within(low[number], high[number]) & ~shadowed)
        enter, leave = _cross(solid, points[behind], towards)
        shadowed[behind] = (enter < leave) & (leave > 0)
    return near[shadowed]
