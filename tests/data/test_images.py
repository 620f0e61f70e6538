"""Labelled images from folders and files, with the columns, splits and preparation that a Trainer takes."""

import base64
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from PIL import Image
from transformers import ViTImageProcessor

from capsule_heads.data.images import as_image, check_images, load_images, open_image, prepare_images

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


def test_small_and_uneven_classes_are_split(tmp_path):
    def count(**classes):
        root = tmp_path / str(len(classes)) / str(sum(classes.values()))
        for name, n_images in classes.items():
            (root / "train" / name).mkdir(parents=True)
            for index in range(n_images):
                picture(index).save(root / "train" / name / f"{index}.png")
        splits = load_images("image_folder", root)
        return [np.bincount(splits[name]["label"], minlength=len(classes)).tolist() for name in ("train", "validation")]

    assert count(cat=4, dog=4) == [[3, 3], [1, 1]]
    train, validation = count(cat=30, dog=2, eel=2)
    assert np.add(train, validation).tolist() == [30, 2, 2] and min(validation) == 1 and min(train) == 1


@pytest.mark.parametrize(
    "content",
    ["half", b"", b"this is text", b"\x89PNG\r\n\x1a\n", "bomb"],
    ids=["half", "empty", "text", "head", "bomb"],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_damaged_image_is_found_in_any_split(folder, split, content, monkeypatch):
    path = folder / split / "dog" / "0.png"
    if content == "bomb":
        Image.new("L", (300, 300)).save(path)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000)
    else:
        path.write_bytes(path.read_bytes()[:300] if content == "half" else content)
    with pytest.raises(ValueError, match=rf"^{path} is no image that can be read: ") as raised:
        check_images(load_images("image_folder", folder))
    assert "\n" not in str(raised.value)


def test_a_check_says_how_many_images_have_16_bits(folder, caplog):
    check_images(load_images("image_folder", folder))
    assert not caplog.records
    for index in range(2):
        Image.fromarray(np.full((9, 9), 20_000, np.uint16)).save(folder / "train" / "cat" / f"{index}.png")
    check_images(load_images("image_folder", folder))
    assert [x.getMessage().split(",")[0] for x in caplog.records] == ["2 images have grey values of 16 bits"]
    Image.fromarray(np.full((9, 9), 0.5, np.float32)).save(folder / "test" / "cat" / "f.tif")
    with pytest.raises(ValueError, match=r"f\.tif is no image that can be read: its values \(mode F\) go from 0\.5"):
        check_images(load_images("image_folder", folder))


def test_grey_values_of_16_bits_keep_their_differences(tmp_path):
    values = np.array([[0, 300, 20_000], [40_000, 65_534, 65_535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    expected = np.rint(values / 257).astype(int).tolist()
    for given in (tmp_path / "a.png", Image.fromarray(values), Image.fromarray(values.astype(np.int32))):
        assert np.asarray(as_image(given))[..., 2].tolist() == expected
    small = Image.fromarray(np.array([[0, 200]], np.int32))  # as 8 bits: nothing is lost
    assert np.asarray(as_image(small))[..., 0].tolist() == [[0, 200]]


def test_images_of_base64_and_addresses(tmp_path, monkeypatch):
    picture(0).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    text = base64.b64encode(content).decode()
    monkeypatch.setattr("capsule_heads.data.images.download", {"https://example.org/a.png": content}.__getitem__)
    for given in (text, f"data:image/png;base64,{text}", "https://example.org/a.png", content):
        assert as_image(given).tobytes() == picture(0).tobytes()


METADATA = {
    "a line that is no JSON": ("metadata.jsonl", b'{"file_name": "0.png", \x00\n'),
    "no names of files": ("metadata.jsonl", b'{"a": 1}\n'),
    "nothing": ("metadata.jsonl", b""),
    "a list": ("metadata.jsonl", b"[1, 2]\n"),
    "an open quote": ("metadata.csv", b'file_name,label\n"0.png,1\n'),
    "no UTF-8": ("metadata.csv", b"\xff\xfe\x00"),
    "no Parquet": ("metadata.parquet", b"text"),
}


@pytest.mark.parametrize("name", METADATA)
def test_damaged_metadata_is_named(folder, name):
    file, content = METADATA[name]
    path = folder / "train" / "dog" / file
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{path} cannot be read as part of a folder of images") as raised:
        load_images("image_folder", folder)
    assert "\n" not in str(raised.value)


def test_images_that_are_left_out_are_counted(folder, caplog):
    (folder / "metadata.jsonl").write_text("{")
    load_images("image_folder", folder)
    assert [x.getMessage() for x in caplog.records if x.name.startswith("capsule_heads")] == [
        f"{folder / 'metadata.jsonl'} is not read: expected it in the folder of a split, such as train."
    ]
    caplog.clear()
    (folder / "metadata.jsonl").unlink()
    shutil.rmtree(folder / "test")  # `datasets` refuses a split without metadata beside one with them
    (folder / "train" / "metadata.csv").write_text(
        "file_name,label\n" + "".join(f"{name}/{index}.png,{name}\n" for name in ("cat", "dog") for index in range(5))
    )
    load_images("image_folder", folder)
    (message,) = (x.getMessage() for x in caplog.records if x.name.startswith("capsule_heads"))
    assert re.match(r"10 of the 20 image files in .* are in no split", message)


@pytest.mark.parametrize("labels", [("wild", "tame"), (7, 3)], ids=["words", "numbers"])
def test_labels_of_metadata_become_classes(folder, labels):
    shutil.rmtree(folder / "test")
    given = dict(zip(("cat", "dog"), labels))
    rows = [f"{name}/{index}.png,{label}\n" for name, label in given.items() for index in range(N_PER_CLASS)]
    (folder / "train" / "metadata.csv").write_text("".join(["file_name,label\n", *rows]))
    splits = load_images("image_folder", folder)
    assert [split.features["label"].names for split in splits.values()] == [sorted(map(str, labels))] * 2
    for row in splits["train"].cast_column("image", ImageFeature(decode=False)):
        name = splits["train"].features["label"].int2str(row["label"])
        assert name == str(given[Path(row["image"]["path"]).parent.name])
    (folder / "train" / "metadata.csv").write_text("".join(["file_name,label\n", *rows[:-1], "dog/9.png,\n"]))
    with pytest.raises(ValueError, match=r"An image of .* has no label; expected one for each"):
        load_images("image_folder", folder)


def test_a_name_that_is_not_utf_8(folder):
    path = folder / "train" / "dog" / "0.png"
    os.rename(path, os.path.join(os.fsencode(path.parent), b"caf\xe9.png"))
    with pytest.raises(ValueError, match=r"train/dog/caf.\.png has a name that is not UTF-8; rename it"):
        load_images("image_folder", folder)


def test_other_folders(tmp_path):
    (tmp_path / "empty" / "train" / "cat").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"empty has no files; expected train/CLASS/\*\.png and the like"):
        load_images("image_folder", tmp_path / "empty")
    for name in ("loud", "quiet"):
        (tmp_path / "sounds" / "train" / name).mkdir(parents=True)
        (tmp_path / "sounds" / "train" / name / "0.wav").touch()
    with pytest.raises(ValueError, match="sounds has 2 audio files and no images; use the task audio_folder"):
        load_images("image_folder", tmp_path / "sounds")


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
