"""Labelled images: CIFAR-100, ImageNet, or folders of images, and what a model takes of them."""

from __future__ import annotations

import base64
import contextlib
import functools
import io
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from .inputs import count_kinds, download, is_address
from .splits import made_when_read, with_validation

if TYPE_CHECKING:
    import datasets
    from transformers import BaseImageProcessor, BatchFeature

logger = logging.getLogger(__name__)

# Where a task's images are on the Hub (None: only where the caller says), and its columns of images and labels.
IMAGE_DATASETS = {
    "cifar100": ("uoft-cs/cifar100", "img", "fine_label"),
    "imagenet": ("ILSVRC/imagenet-1k", "image", "label"),
    "image_folder": (None, "image", "label"),
}
LAYOUT = "train/CLASS/*.png and the like"
NUMBERS = ("F", "I", "I;16", "I;16B", "I;16L", "I;16N")  # modes whose values may not fit in 8 bits
SCALED = "scaled_from"  # in the info of an image of 8 bits, the mode that had 16
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # files that `datasets` reads in folders of images


def as_image(given: Any, name: str = "The image") -> Any:
    """Return an image as a processor gets it: in training, prediction, explanations and the demo.

    Images and files of them are turned as the camera was held, and become RGB, as in transformers' pipeline; a
    transparent background is dropped. Grey values of 16 bits are scaled to 8 bits, by 1/257. A pipeline does not scale
    them: it turns all above 255 into white, so pass it what this function returns.

    Args:
        given: An image of Pillow, in any mode; a path, an address, or a text of base64, as pipelines take them; the
            bytes of a file; a mapping with `bytes` or `path`, as datasets have it; or an array or tensor `[channels,
            rows, columns]` or `[rows, columns, channels]`, which is returned as it is.
        name: Of the image, for messages; that of a file is its path.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If it is something else.
        ValueError: If it cannot be read, or has values that 8 bits cannot hold.
    """
    if isinstance(given, Mapping):
        path, content = given.get("path"), given.get("bytes")
        given, name = (path, name) if content is None else (content, path or name)
    if isinstance(given, str | os.PathLike):
        return _open(os.fspath(given))
    if isinstance(given, bytes):
        return _as_rgb(io.BytesIO(given), name)
    if isinstance(given, Image.Image):
        return _as_rgb(given, name)
    if isinstance(given, np.ndarray | Tensor) and given.ndim >= 3:  # four are a batch, refused where it is several
        return _check_values(given, name)
    described = f"of shape {list(given.shape)}" if hasattr(given, "shape") else f"of type {type(given).__name__}"
    raise TypeError(f"{name} is {described}; expected an image, its path, or an array [channels, rows, columns].")


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read an image file completely, as `as_image` does.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no image, or a damaged one.
    """
    return as_image(path)


def _open(given: str) -> Image.Image:
    if is_address(given):
        return _as_rgb(io.BytesIO(download(given)), given)
    if os.path.isfile(given):
        return _as_rgb(given, given)
    with contextlib.suppress(ValueError):  # no base64, or of no image
        return _as_rgb(io.BytesIO(base64.b64decode(given.rpartition(",")[2], validate=True)), "base64")
    raise FileNotFoundError(f"{given:.200} is no file; the model classifies images, expected their files.")


def _as_rgb(image: Image.Image | str | io.BytesIO, name: str) -> Image.Image:
    try:
        if not isinstance(image, Image.Image):
            image = Image.open(image)
        image.load()
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode in NUMBERS:
            return _scale_grey(image)
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files
        raise ValueError(f"{name} is no image that can be read: {error}.") from None


def _scale_grey(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    low, high = values.min(), values.max()
    # Pillow before 10.3 opens PNGs of 16 bits in mode I, which holds 32.
    is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and (image.format == "PNG" or high > 255))
    if not (low >= 0 and high <= (65535 if is_16_bit else 255) and (values == np.floor(values)).all()):
        raise ValueError(
            f"its values (mode {image.mode}) go from {low} to {high}; expected whole numbers from 0 to 255, or to "
            "65535: scale them to one of these ranges"
        )
    rgb = Image.fromarray(np.rint(values / (257 if is_16_bit else 1)).astype(np.uint8)).convert("RGB")
    if is_16_bit:
        rgb.info[SCALED] = image.mode
    return rgb


def _check_values(array: Any, name: str) -> Any:
    """Return an array; whole numbers have to fit in 8 bits, since image processors cut them to these."""
    is_whole = not array.is_floating_point() if isinstance(array, Tensor) else array.dtype.kind in "iu"
    if is_whole and array.size and not (array.min() >= 0 and array.max() <= 255):
        raise ValueError(
            f"{name} holds whole numbers from {array.min()} to {array.max()}; expected 0 to 255: scale them first."
        )
    return array


def is_scaled(image: Any) -> bool:
    """Return whether `as_image` scaled an image of 16 bits to 8."""
    return SCALED in getattr(image, "info", {})


def warn_of_scaled(n_images: int) -> None:
    """Say, once for a run or a call, how many images were scaled."""
    if n_images:
        logger.warning("%d images have grey values of 16 bits, which are scaled to 8 bits (by 1/257).", n_images)


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
        ValueError: If image_folder comes without a source, the columns are others than expected, or a file with
            metadata or the name of a file cannot be read.
        OSError: If the source does not exist, or has no images.
    """
    import datasets

    name, image, label = IMAGE_DATASETS[task]
    if source is None and name is None:
        raise ValueError(f"{task} needs a source: a directory with {LAYOUT}.")
    if source is not None and not os.path.isdir(source):
        raise FileNotFoundError(f"No images at {source}: there is no such directory.")
    if source is not None and task == "image_folder":
        splits = _load_folder(Path(source))
    else:
        splits = datasets.load_dataset(str(source or name))
    for split, rows in splits.items():
        if not {image, label} <= set(rows.column_names):
            raise ValueError(
                f"The split {split} of {source or name} has the columns {', '.join(rows.column_names)}; expected "
                f"{image} and {label}, or {LAYOUT} for two classes or more."
            )
    splits = splits.select_columns([image, label])
    for old, new in ((image, "image"), (label, "label")):
        splits = splits if old == new else splits.rename_column(old, new)
    splits = with_validation(_with_classes(splits, str(source or name)), str(source or name), "image")
    if "test" in splits and set(splits["test"].unique("label")) == {-1}:
        del splits["test"]
    return splits


def _with_classes(splits: datasets.DatasetDict, source: str) -> datasets.DatasetDict:
    """Make classes of labels that are words or numbers, as a metadata file has them; the same ones in all splits."""
    import datasets

    if all(isinstance(rows.features["label"], datasets.ClassLabel) for rows in splits.values()):
        return splits
    values = {label for rows in splits.values() for label in rows.unique("label")}
    if None in values:
        raise ValueError(f"An image of {source} has no label; expected one for each in the files of metadata.")
    classes = datasets.ClassLabel(names=[str(label) for label in sorted(values)])
    return splits.cast_column("label", datasets.Value("string")).cast_column("label", classes)


def _load_folder(root: Path) -> datasets.DatasetDict:
    """Load a directory of the user's own: a folder of images per class, or a dataset's files."""
    import datasets

    kinds = count_kinds(root)
    if not kinds["image"] and kinds["audio"]:
        raise ValueError(f"{root} has {kinds['audio']} audio files and no images; use the task audio_folder.")
    if not kinds.total():
        raise FileNotFoundError(f"{root} has no files; expected {LAYOUT}.")
    try:
        # Named, so that it is not guessed from what most files are.
        if kinds["image"]:
            splits = datasets.load_dataset("imagefolder", data_dir=str(root))
        else:
            splits = datasets.load_dataset(str(root))
    except (datasets.exceptions.DatasetsError, OSError, ValueError, LookupError) as error:
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise ValueError(
            f"{_find_damaged(root) or root} cannot be read as part of a folder of images ({reason}); expected {LAYOUT}."
        ) from error
    for path in (root / name for name in METADATA):
        if path.is_file() and (root / "train").is_dir():
            logger.warning("%s is not read: expected it in the folder of a split, such as train.", path)
    n_rows = sum(len(rows) for rows in splits.values())
    if n_rows < kinds["image"]:
        logger.warning(
            "%d of the %d image files in %s are in no split: a metadata file, or a split's folder, leaves them out.",
            kinds["image"] - n_rows, kinds["image"], root,
        )  # fmt: skip
    return splits


def _find_damaged(root: Path) -> Path | None:
    """Return the file with metadata that cannot be read; None if all can be."""
    import pandas

    readers = {".csv": pandas.read_csv, ".jsonl": functools.partial(pandas.read_json, lines=True)}
    for path in sorted(path for name in METADATA for path in root.rglob(name)):
        try:
            columns = readers.get(path.suffix, pandas.read_parquet)(path).columns
        except (OSError, ValueError):
            return path
        if not any(str(name).endswith(("file_name", "file_names")) for name in columns):
            return path
    return None


def check_images(splits: Mapping[str, datasets.Dataset]) -> None:
    """Read all images, so that a damaged one is found before training, and say how many are scaled to 8 bits.

    Args:
        splits: As `load_images` returns them.

    Raises:
        ValueError: If an image cannot be read; the message names its file.
    """
    n_scaled = sum(is_scaled(image) for split in splits.values() for image in read_images(split))
    warn_of_scaled(n_scaled)


def read_images(split: datasets.Dataset) -> Iterable[Any]:
    """Return the images of a split, one after another, as `as_image` reads them; errors name their files."""
    import datasets

    # Not decoded by `datasets`, whose errors would not name them.
    for file in split.select_columns(["image"]).cast_column("image", datasets.Image(decode=False)):
        yield as_image(file["image"])


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
    return list(process_images(processor, [as_image(file) for file in files])["pixel_values"])


def resizes(processor: BaseImageProcessor) -> bool:
    """Return whether a processor resizes images, so that a batch of any can be made."""
    return getattr(processor, "do_resize", None) is not False


def process_images(processor: BaseImageProcessor, images: Sequence[Any]) -> BatchFeature:
    """Return what a processor makes of images from `as_image`.

    Raises:
        ValueError: If the processor does not take them, or makes tensors of several sizes of them.
    """
    try:
        return processor(list(images), return_tensors="pt")
    except (TypeError, ValueError) as error:
        shapes = {str(tuple(x.shape) if hasattr(x, "shape") else x.size) for x in images}
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{type(processor).__name__} makes no batch of images of {' and '.join(sorted(shapes))} ({reason}); "
            "expected channels that it takes and, where it does not resize, one size."
        ) from error
