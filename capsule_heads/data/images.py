"""Labelled images: CIFAR-100, ImageNet, or folders of images, and what a model takes of them."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps

from .splits import made_when_read, with_validation

if TYPE_CHECKING:
    import datasets
    from torch import Tensor
    from transformers import BaseImageProcessor

# Where a task's images are on the Hub (None: only where the caller says), and its columns of images and labels.
IMAGE_DATASETS = {
    "cifar100": ("uoft-cs/cifar100", "img", "fine_label"),
    "imagenet": ("ILSVRC/imagenet-1k", "image", "label"),
    "image_folder": (None, "image", "label"),
}


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read an image file completely, and turn it as the camera was held.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no image, or a damaged one.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is no file; the model classifies images, expected their files.")
    return _read_image(path, os.fspath(path))


def _read_image(file: str | os.PathLike[str] | io.BytesIO, name: str) -> Image.Image:
    try:
        return ImageOps.exif_transpose(Image.open(file))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow raises each of these
        raise ValueError(f"{name} is no image that can be read: {error}.") from None


def load_images(task: str, source: str | os.PathLike[str] | None = None) -> datasets.DatasetDict:
    """Load labelled images.

    Where a dataset has no validation split, a tenth of the training images of each class are split off, always the
    same ones. A test split without labels (ImageNet's) is left out.

    Args:
        task: One of `IMAGE_DATASETS`.
        source: A directory: of a dataset's files, or `train/CLASS/*.png` and the like with a folder per class, for
            image_folder. By default the Hub.

    Returns:
        The splits `train`, `validation` and, where there is one, `test`, with `image` and `label`.

    Raises:
        ValueError: If image_folder comes without a source, or the columns are others than expected.
        OSError: If the source does not exist.
    """
    import datasets

    name, image, label = IMAGE_DATASETS[task]
    if source is None and name is None:
        raise ValueError(f"{task} needs a source: a directory with train/CLASS/*.png and the like.")
    if source is not None and not os.path.isdir(source):
        raise FileNotFoundError(f"No images at {source}: there is no such directory.")
    splits = datasets.load_dataset(name if source is None else os.fspath(source))
    for split, rows in splits.items():
        if not {image, label} <= set(rows.column_names):
            raise ValueError(
                f"The split {split} of {source or name} has the columns {', '.join(rows.column_names)}; expected "
                f"{image} and {label}, or train/CLASS/*.png and the like for two classes or more."
            )
    splits = splits.select_columns([image, label])
    for old, new in ((image, "image"), (label, "label")):
        splits = splits if old == new else splits.rename_column(old, new)
    splits = with_validation(splits, str(source or name), "image")
    if "test" in splits and set(splits["test"].unique("label")) == {-1}:
        del splits["test"]
    return splits


def prepare_images(splits: datasets.DatasetDict, processor: BaseImageProcessor) -> datasets.DatasetDict:
    """Give images the two columns that a Trainer takes, `pixel_values` and `labels`, made when they are read.

    An image that cannot be read then raises a `ValueError` that names its file.

    Args:
        splits: With `image` and `label`.
        processor: The backbone's image processor, which resizes and normalizes.
    """
    import datasets

    process = functools.partial(_process_images, processor)
    files = splits.cast_column("image", datasets.Image(decode=False))  # whose errors would not name them
    return datasets.DatasetDict({name: with_pixel_values(split, process) for name, split in files.items()})


def with_pixel_values(split: datasets.Dataset, process: Callable[[list], list[Tensor]]) -> datasets.Dataset:
    """Give a split with `image` and `label` the columns `pixel_values` and `labels`.

    Args:
        split: With `image` and `label`.
        process: Makes pixel values of a batch of images, when they are read; a function that can be pickled.
    """
    return made_when_read(split, "image", "pixel_values", functools.partial(_as_pixel_values, process))


def _as_pixel_values(process: Callable[[list], list[Tensor]], images: list) -> dict[str, list[Tensor]]:
    return {"pixel_values": process(images)}


def _process_images(processor: BaseImageProcessor, files: list[dict[str, Any]]) -> list[Tensor]:
    images = [
        _read_image(file["path"] if file["bytes"] is None else io.BytesIO(file["bytes"]), file["path"] or "An image")
        for file in files
    ]
    return list(processor([image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"])
