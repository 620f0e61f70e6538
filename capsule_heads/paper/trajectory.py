"""Pose trajectories: how the pose of a class capsule moves as the viewpoint changes ("reverse graphics", Heinsen 2019).

As in the paper, a picture shows images of one object whose elevation or azimuth varies. Below them it shows a
two-dimensional view of the trajectory of each pose vector. Smooth trajectories mean that a pose follows the viewpoint,
although viewpoints were never a target of training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from datasets import Dataset

from ..explain.pictures import new_figure
from ..models import CapsuleHeadForImageClassification

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

FACTORS = ("elevation", "azimuth")
_FIXED = ("label", "instance", "lighting", *FACTORS)


@dataclass(frozen=True)
class PoseTrajectory:
    """Two-dimensional view of the trajectories of pose vectors.

    Attributes:
        coordinates: `[d_cov, steps, 2]`, float64. Each vector has a plane of its own, in the unit of the poses, centred
            on the mean over the steps. Distances within a plane mean something. Directions, and one vector's position
            relative to another's, do not.
        stress: `[d_cov]`, Kruskal's stress-1. It is the square root of the summed squared errors of all distances
            between steps, divided by the summed squares of these distances. It is 0 if the vector moves in a plane.
    """

    coordinates: np.ndarray
    stress: np.ndarray


def select_sequence(
    dataset: Dataset, factor: Literal["elevation", "azimuth"], **fixed: int | str | None
) -> tuple[Dataset, dict[str, int]]:
    """Select the images of one object in which one factor of the viewpoint varies, and nothing else.

    Args:
        dataset: a data set with the columns `label`, `instance`, `elevation`, `azimuth` and `lighting`, integers.
        factor: the factor that varies.
        **fixed: values of the other columns. A label may be given by name, if its column is a `ClassLabel`. A column
            that is not given, or None, takes the smallest value that occurs with the values of the columns before it,
            in the order label, instance, lighting, elevation, azimuth.

    Returns:
        The images in the order of `factor`, one for each of its values, and the values of the other columns.

    Raises:
        ValueError: If `factor` is unknown or itself fixed, if a column is missing, or if there are fewer than 3 such
            images.
    """
    if factor not in FACTORS:
        raise ValueError(f"factor is {factor!r}; expected one of {', '.join(FACTORS)}.")
    names = [name for name in _FIXED if name != factor]
    unknown = sorted(name for name, value in fixed.items() if name not in names and value is not None)
    if unknown:
        raise ValueError(f"Cannot fix {', '.join(unknown)} while {factor} varies; expected some of {', '.join(names)}.")
    missing = [name for name in _FIXED if name not in dataset.column_names]
    if missing:
        raise ValueError(f"The data set has no column {', '.join(missing)}; it has {', '.join(dataset.column_names)}.")
    columns = {name: np.asarray(dataset[name][:]) for name in _FIXED}
    rows = np.ones(len(dataset), dtype=bool)
    values: dict[str, int] = {}
    for name in sorted(names, key=lambda name: fixed.get(name) is None):  # given values come first
        value = fixed.get(name)
        if isinstance(value, str):
            value = _label_index(dataset, value)
        if value is None:
            if not rows.any():
                break
            value = columns[name][rows].min()
        values[name] = int(value)
        rows &= columns[name] == value
    steps, first = np.unique(columns[factor][rows], return_index=True)
    if len(steps) < 3:
        wanted = ", ".join(f"{name} {value}" for name, value in values.items())
        raise ValueError(
            f"{len(steps)} images in which {factor} varies with {wanted}; expected 3 or more: choose other values."
        )
    return dataset.select(np.flatnonzero(rows)[first]), {name: values[name] for name in names}


def compute_capsules(
    model: CapsuleHeadForImageClassification,
    processor: Callable[..., Any],
    images: list[np.ndarray],
    batch_size: int = 16,
) -> tuple[np.ndarray, np.ndarray]:
    """Compute scores and poses of the class capsules.

    Args:
        model: an image classifier with a capsule head.
        processor: its image processor.
        images: uint8 arrays `[2, height, width]`.
        batch_size: number of images at a time.

    Returns:
        Scores `[images, n_classes]`, logits, and poses `[images, n_classes, d_cov, d_out]`.

    Raises:
        ValueError: If the model's head has no capsules.
    """
    model.eval()
    device = next(model.parameters()).device
    logits, poses = [], []
    for start in range(0, len(images), batch_size):
        inputs = processor(images[start : start + batch_size], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            outputs = model(pixel_values=inputs.to(device), output_capsules=True)
        if outputs.poses is None:
            raise ValueError("The model has a head without capsules, so there are no poses; expected a capsule head.")
        logits.append(outputs.logits.float().cpu())
        poses.append(outputs.poses.float().cpu())
    return torch.cat(logits).numpy(), torch.cat(poses).numpy()


def activated_poses(logits: np.ndarray, poses: np.ndarray) -> tuple[np.ndarray, int, int]:
    """Return the poses, over all images, of the class capsule that most of the images activate.

    An image activates the capsule with the highest score, which is the predicted class. A trajectory follows one
    capsule, as the poses of different capsules are in different spaces. If two capsules are activated equally often,
    the one with the higher mean score is taken.

    Args:
        logits: `[steps, n_classes]`, scores of the class capsules.
        poses: `[steps, n_classes, d_cov, d_out]`.

    Returns:
        The capsule's poses `[steps, d_cov, d_out]`, its class index, and the number of images that activate it.

    Raises:
        ValueError: If the shapes do not fit.
    """
    if logits.ndim != 2 or poses.ndim != 4 or poses.shape[:2] != logits.shape:
        raise ValueError(
            f"logits {logits.shape} and poses {poses.shape}; expected [steps, n_classes] and "
            f"[steps, n_classes, d_cov, d_out]."
        )
    counts = np.bincount(logits.argmax(1), minlength=logits.shape[1])
    index = int(max(range(len(counts)), key=lambda j: (counts[j], logits[:, j].mean())))
    return poses[:, index], index, int(counts[index])


def pose_trajectory(poses: np.ndarray) -> PoseTrajectory:
    """Embed the trajectory of each pose vector in a plane by classical multidimensional scaling (MDS).

    A pose vector is a row of a capsule's pose, so a pose of 4 x 4 has four. Classical MDS of Euclidean distances is the
    projection on the two directions in which the vector moves most. It is exact and has no random start. Distances can
    only shrink, as movement in other directions is lost; `stress` says how much. It finds no curved surface. The sign
    of each axis is arbitrary (here the coordinate furthest from 0 is positive).

    Args:
        poses: `[steps, d_cov, d_out]`, poses of one capsule; at least 3 steps.

    Raises:
        ValueError: If the shape does not fit, there are fewer than 3 steps, or a value is not finite.
    """
    poses = np.asarray(poses, dtype=np.float64)
    if poses.ndim != 3 or len(poses) < 3:
        raise ValueError(f"poses have shape {poses.shape}; expected [steps, d_cov, d_out] with 3 steps or more.")
    if not np.isfinite(poses).all():
        raise ValueError("poses have values that are not finite; check the model.")
    vectors = (poses - poses.mean(0)).transpose(1, 0, 2)  # [d_cov, steps, d_out]
    u, s, _ = np.linalg.svd(vectors, full_matrices=False)
    axes = (u * s[:, None, :])[..., :2]
    coordinates = np.zeros((*vectors.shape[:2], 2))
    coordinates[..., : axes.shape[-1]] = axes
    furthest = np.take_along_axis(coordinates, np.abs(coordinates).argmax(1)[:, None], axis=1)
    coordinates *= np.where(furthest < 0, -1.0, 1.0)
    true, kept = _distances(vectors), _distances(coordinates)
    total = (true**2).sum((1, 2))
    lost = ((true - kept) ** 2).sum((1, 2))
    stress = np.sqrt(np.divide(lost, total, out=np.zeros_like(total), where=total > 0))
    return PoseTrajectory(coordinates, stress)


def draw_trajectory(
    trajectory: PoseTrajectory,
    images: list[np.ndarray],
    steps: list[int],
    factor: str,
    title: str,
    closed: bool = False,
) -> Figure:
    """Draw the images in a row and, below, the trajectory of each pose vector.

    All trajectories have one scale. An image's frame has the colour of its step.

    Args:
        trajectory: the trajectory, of as many steps as there are images.
        images: uint8 arrays `[2, height, width]`; the first channel, the left view, is shown.
        steps: the value of `factor` for each image.
        factor: the factor that varies, such as "azimuth".
        title: title of the picture.
        closed: whether the first image follows the last one, as in a full circle of azimuths. A dotted line then joins
            them.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the numbers of steps differ.
    """
    d_cov, n_steps, _ = trajectory.coordinates.shape
    if not n_steps == len(images) == len(steps):
        raise ValueError(f"{n_steps} steps, {len(images)} images and {len(steps)} values; expected equal numbers.")
    columns = min(d_cov, 4)
    rows = -(-d_cov // columns)
    width, height = 2.9 * max(columns, 3), 2.9 * rows + 0.4  # size of the trajectories, in inches
    row = min(width / n_steps, 1.6) + 0.2
    figure = new_figure(width, row + height + 0.6)
    figure.suptitle(title, fontsize=11)
    grid = figure.add_gridspec(2, 1, height_ratios=[row, height])
    above, below = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    colors = _step_colors(n_steps)
    _draw_images(above, images, steps, factor, colors)
    limit = 1.15 * max(np.abs(trajectory.coordinates).max(), 1e-12)
    for i, axes in enumerate(np.ravel(below.subplots(rows, columns, squeeze=False))):
        if i >= d_cov:
            axes.set_axis_off()
            continue
        _draw_path(axes, trajectory.coordinates[i], colors, closed)
        axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
        axes.set_title(f"pose vector {i + 1} (stress {trajectory.stress[i]:.2f})", fontsize=9)
        axes.locator_params(nbins=5)
        axes.tick_params(labelsize=7)
        if i % columns:
            axes.tick_params(labelleft=False)
    handles, labels = below.axes[0].get_legend_handles_labels()
    below.legend(handles, labels, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8)
    return figure


def _draw_images(
    figure: SubFigure, images: list[np.ndarray], steps: list[int], factor: str, colors: np.ndarray
) -> None:
    for i, (axes, image) in enumerate(zip(np.ravel(figure.subplots(1, len(images), squeeze=False)), images)):
        axes.imshow(image[0], cmap="gray", vmin=0, vmax=255)
        axes.set(xticks=[], yticks=[])
        axes.set_title(f"{steps[i]}", fontsize=8, pad=3)
        for spine in axes.spines.values():
            spine.set(color=colors[i], linewidth=2)
    figure.supylabel(factor, fontsize=9)


def _draw_path(axes: Axes, points: np.ndarray, colors: np.ndarray, closed: bool) -> None:
    """Draw one vector's trajectory `[steps, 2]`."""
    axes.axhline(0, color="0.93", linewidth=0.8, zorder=0)
    axes.axvline(0, color="0.93", linewidth=0.8, zorder=0)
    x, y = points.T
    axes.plot(x, y, color="0.75", linewidth=1, zorder=1)
    axes.scatter(x, y, c=colors, s=16, zorder=2)
    for step, marker, name in ((0, "o", "first"), (-1, "s", "last")):
        color = [colors[step]]
        axes.scatter(x[step], y[step], c=color, s=60, marker=marker, edgecolors="black", zorder=3, label=name)
    if closed:
        axes.plot(x[[-1, 0]], y[[-1, 0]], color="0.6", linewidth=1, linestyle=":", zorder=1, label="back to the first")


def _step_colors(n_steps: int) -> np.ndarray:
    from matplotlib import colormaps

    return colormaps["viridis"](np.linspace(0, 0.95, n_steps))


def _distances(points: np.ndarray) -> np.ndarray:
    """Return the distances `[..., n, n]` between points `[..., n, d]`."""
    return np.linalg.norm(points[..., :, None, :] - points[..., None, :, :], axis=-1)


def _label_index(dataset: Dataset, name: str) -> int:
    names: list[str] = getattr(dataset.features["label"], "names", None) or []
    if not names and name.isdigit():
        return int(name)
    if name not in names:
        expected = ", ".join(names) or "an index, as the labels have no names"
        raise ValueError(f"Unknown label {name!r}; expected {expected}.")
    return names.index(name)
