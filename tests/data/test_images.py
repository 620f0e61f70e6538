"""Labelled images from folders and files, with the columns, splits and preparation that a Trainer takes."""

import shutil

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from PIL import Image
from transformers import ViTImageProcessor

from capsule_heads.data.images import load_images, open_image, prepare_images

N_PER_CLASS = 10


def picture(seed, mode="RGB"):
    return Image.fromarray((np.random.default_rng(seed).random((12, 10, 3)) * 255).astype("uint8")).convert(mode)


@pytest.fixture
def folder(tmp_path):
    """`train` of two classes with 10 images each, `test` with one each; one image is grey."""
    for split, count in (("train", N_PER_CLASS), ("test", 1)):
        for label, name in enumerate(("cat", "dog")):
            directory = tmp_path / "images" / split / name
            directory.mkdir(parents=True)
            for index in range(count):
                picture(100 * label + index, "L" if index == 3 else "RGB").save(directory / f"{index}.png")
    return tmp_path / "images"


def parquet(folder, image, label, **splits):
    """A dataset's files, as the Hub has them: `split=labels`."""
    folder.mkdir()
    for split, labels in splits.items():
        features = Features({image: ImageFeature(), label: ClassLabel(names=["a", "b"])})
        columns = {image: [picture(n) for n in range(len(labels))], label: labels}
        Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def test_a_folder_of_images(folder):
    splits = load_images("image_folder", folder)
    assert {name: len(split) for name, split in splits.items()} == {"train": 18, "validation": 2, "test": 2}
    assert splits["train"].features["label"].names == ["cat", "dog"]
    assert sorted(splits["validation"]["label"]) == [0, 1]  # of each class a tenth
    again = load_images("image_folder", folder)
    assert splits["validation"]["image"][0].tobytes() == again["validation"]["image"][0].tobytes()
    seen = {image.convert("RGB").tobytes() for name in ("train", "validation") for image in splits[name]["image"]}
    assert len(seen) == 2 * N_PER_CLASS  # no image is in both, none is lost


def test_the_columns_of_datasets_on_the_hub(tmp_path):
    cifar = load_images("cifar100", parquet(tmp_path / "cifar", "img", "fine_label", train=[0, 1] * 10, test=[1]))
    assert {name: len(split) for name, split in cifar.items()} == {"train": 18, "validation": 2, "test": 1}
    assert cifar["test"].column_names == ["image", "label"]
    files = parquet(tmp_path / "imagenet", "image", "label", train=[0, 1], validation=[1], test=[-1, -1])
    assert list(load_images("imagenet", files)) == ["train", "validation"]  # ImageNet's test has no labels


def test_pixel_values_are_the_processors(folder):
    splits = load_images("image_folder", folder)
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    prepared = prepare_images(splits, processor)
    assert prepared["train"].column_names == ["pixel_values", "labels"]
    grey = next(index for index, image in enumerate(splits["train"]["image"]) if image.mode == "L")
    for index in (0, grey):
        image = splits["train"][index]["image"].convert("RGB")
        expected = processor(image, return_tensors="pt")["pixel_values"][0]
        found = prepared["train"][index]
        assert torch.equal(torch.as_tensor(found["pixel_values"]), expected) and expected.shape == (3, 8, 8)
        assert found["labels"] == splits["train"][index]["label"]
    assert prepared["train"]["labels"][:] == splits["train"]["label"][:]


def test_an_image_that_cannot_be_read_is_named(folder):
    path = folder / "train" / "cat" / "5.png"
    path.write_bytes(path.read_bytes()[:200])
    prepared = prepare_images(load_images("image_folder", folder), ViTImageProcessor(size={"height": 8, "width": 8}))
    with pytest.raises(ValueError, match=rf"{path} is no image that can be read: .*truncated"):
        for split in ("train", "validation"):
            prepared[split][:]


def test_images_are_turned_as_the_camera_was_held(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by a quarter
    picture(0).save(tmp_path / "turned.jpg", exif=exif)
    assert picture(0).size == (10, 12) and open_image(tmp_path / "turned.jpg").size == (12, 10)


def test_classes_that_cannot_be_split(folder):
    for path in (folder / "train" / "dog").glob("[1-9].png"):
        path.unlink()
    with pytest.raises(ValueError, match=r"A class of .* has a single training image, and validation needs one"):
        load_images("image_folder", folder)
    shutil.rmtree(folder / "train" / "dog"), shutil.rmtree(folder / "test")
    with pytest.raises(ValueError, match=r"the columns image; expected image and label, or train/CLASS/.* two classes"):
        load_images("image_folder", folder)


def test_mistakes(folder, tmp_path):
    with pytest.raises(ValueError, match="image_folder needs a source: a directory with train/CLASS"):
        load_images("image_folder")
    with pytest.raises(FileNotFoundError, match=r"No images at .*none: there is no such directory"):
        load_images("image_folder", tmp_path / "none")
    with pytest.raises(
        ValueError, match=r"split train of .* has the columns image, label; expected img and fine_label"
    ):
        load_images("cifar100", folder)
    files = parquet(tmp_path / "test_only", "image", "label", test=[0, 1])
    with pytest.raises(ValueError, match="has the splits test; expected train"):
        load_images("image_folder", files)
    assert isinstance(load_images("image_folder", folder), DatasetDict)
