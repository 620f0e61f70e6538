"""Stereo pairs: the columns of a data set of pairs, and the pixel values that the vision model takes."""

from __future__ import annotations

import datasets
import numpy as np
import torch
from torch import Tensor

from ..data.images import with_pixel_values

CATEGORIES = ("animal", "human", "airplane", "truck", "car")  # of smallNORB, in its order

PADDING = 16


def stereo_features(height: int = 96, width: int = 96) -> datasets.Features:
    """Return the columns of a set of stereo pairs.

    `image` is `[2, height, width]`, grey values from 0 to 255, the left view first. `label` is one of `CATEGORIES`, and
    `instance` is the number of the toy within its category. The views are numbered as in smallNORB: `elevation` 0 to 8
    for 30 to 70 degrees in steps of 5, `azimuth` 0, 2, ... 34 for tens of degrees, and `lighting` 0 to 5.
    """
    factors = ("instance", "elevation", "azimuth", "lighting")
    return datasets.Features(
        {
            "image": datasets.Array3D((2, height, width), "uint8"),
            "label": datasets.ClassLabel(names=list(CATEGORIES)),
            **{name: datasets.Value("int32") for name in factors},
        }
    )


def prepare_stereo(pairs: datasets.DatasetDict) -> datasets.DatasetDict:
    """Give stereo pairs the two columns that a Trainer takes; they are made when a pair is read.

    `pixel_values` is `[2, height, width]`, float32 in [0, 1], and `labels` is the class. In the split `train` a pair is
    cropped at random each time it is read. The crop comes from torch's global generator, so it follows the Trainer's
    random seed and differs between the workers of a DataLoader. Other splits are not cropped. Nothing is resized,
    mirrored or normalised.

    The training notebook of Heinsen (2019) does the same, with one difference. There the images for validation, which
    were those of the test split, were cropped at random too, but not when they were used for testing.

    Reading takes about 1.5 ms per pair. If a training step takes little more, let workers do the reading
    (`dataloader_num_workers`).

    Args:
        pairs: Splits with the columns `image` and `label`.

    Returns:
        The same splits. Columns already have their new names, so `remove_unused_columns` may be on or off.

    Raises:
        ValueError: If a split has no `image` or no `label`.
    """
    for name, split in pairs.items():
        if not {"image", "label"} <= set(split.column_names):
            raise ValueError(
                f"The split {name} has the columns {', '.join(split.column_names)}; expected image and label, as "
                "load_smallnorb and load_toy_norb return them."
            )
    pairs = pairs.select_columns(["image", "label"])
    return datasets.DatasetDict(
        {
            name: with_pixel_values(split, _crop_and_scale if name == "train" else _scale)
            for name, split in pairs.items()
        }
    )


def crop_randomly(images: Tensor, padding: int = PADDING) -> Tensor:
    """Pad images with their edge values on all sides, and crop them at random to their own size.

    Args:
        images: `[batch, channels, height, width]`. All channels, and so both views of a pair, are cropped alike.
        padding: Number of repeated edge pixels, which is the largest distance of a crop from the middle, in pixels.

    Returns:
        The crops, of the same shape and dtype. Each of the `(2 * padding + 1) ** 2` crops of an image is equally
        likely.
    """
    n_images, _, height, width = images.shape
    top, left = torch.randint(-padding, padding + 1, (2, n_images, 1))
    # Reading an image with clamped coordinates is cropping its padded version.
    rows = (torch.arange(height) + top).clamp(0, height - 1)[:, :, None]  # [batch, height, 1]
    columns = (torch.arange(width) + left).clamp(0, width - 1)[:, None]  # [batch, 1, width]
    crops = images[torch.arange(n_images)[:, None, None], :, rows, columns]  # [batch, height, width, channels]
    return crops.movedim(-1, 1).contiguous()


def _crop_and_scale(images: list) -> list[Tensor]:
    return list(crop_randomly(_as_tensor(images)).float() / 255)


def _scale(images: list) -> list[Tensor]:
    return list(_as_tensor(images).float() / 255)


def _as_tensor(images: list) -> Tensor:
    return torch.from_numpy(np.asarray(images, dtype=np.uint8))
