import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from capsule_heads.paper import smallnorb
from capsule_heads.paper.smallnorb import load_smallnorb
from capsule_heads.paper.stereo import stereo_features

STEMS = {
    "train": "smallnorb-5x46789x9x18x6x2x96x96-training",
    "test": "smallnorb-5x01235x9x18x6x2x96x96-testing",
}
MAGIC = {"u1": 0x1E3D4C55, "i4": 0x1E3D4C54}
INSTANCES = {"train": (4, 6, 7, 8, 9), "test": (0, 1, 2, 3, 5)}
SIZE = 6  # of an image: nothing depends on its being 96


def matrix(array, order="<"):
    """The bytes of a matrix in the files' format, written down here from its description."""
    kind = array.dtype.str[1:]
    dims = [*array.shape, *[1] * (3 - array.ndim)]  # at least three are stored
    header = struct.pack(f"{order}Ii{len(dims)}i", MAGIC[kind], array.ndim, *dims)
    return header + array.astype(order + kind).tobytes()


def make_arrays(split, seed=0):
    """Two pairs of each of the 25 instances, shuffled."""
    rng = np.random.default_rng([seed, len(split)])
    toys = [(label, instance) for label in range(5) for instance in INSTANCES[split] for _ in range(2)]
    toys = np.array(toys, "i4")[rng.permutation(len(toys))]
    views = np.stack([rng.integers(9, size=50), 2 * rng.integers(18, size=50), rng.integers(6, size=50)], axis=1)
    return {
        "dat": rng.integers(0, 256, (50, 2, SIZE, SIZE), dtype="u1"),
        "cat": toys[:, 0].copy(),
        "info": np.concatenate([toys[:, 1:], views], axis=1).astype("i4"),
    }


ARRAYS = {split: make_arrays(split) for split in STEMS}


def write(folder, zipped=()):
    for split, arrays in ARRAYS.items():
        for kind, array in arrays.items():
            name = f"{STEMS[split]}-{kind}.mat"
            if kind in zipped:
                (folder / f"{name}.gz").write_bytes(gzip.compress(matrix(array)))
            else:
                (folder / name).write_bytes(matrix(array))
    return folder


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    return write(folder)


@pytest.fixture
def load(source, tmp_path):
    return lambda **settings: load_smallnorb(source, cache_dir=tmp_path / "cache", **settings)


def path(folder, kind, split="train"):
    return folder / f"{STEMS[split]}-{kind}.mat"


def read(split):
    columns = split.with_format("numpy")
    return {name: np.asarray(columns[name][:]) for name in split.column_names}


def assert_holds(split, arrays, rows=slice(None)):
    found = read(split)
    np.testing.assert_array_equal(found["image"], arrays["dat"][rows])
    np.testing.assert_array_equal(found["label"], arrays["cat"][rows])
    for column, name in enumerate(["instance", "elevation", "azimuth", "lighting"]):
        np.testing.assert_array_equal(found[name], arrays["info"][rows, column])


@pytest.mark.parametrize("zipped", [(), ("dat", "cat", "info"), ("dat",), ("cat", "info")], ids=" ".join)
def test_the_files_are_read(tmp_path, zipped, monkeypatch):
    monkeypatch.setattr(smallnorb, "_N_PAIRS_AT_ONCE", 8)  # does not divide 50: the last chunk is smaller
    splits = load_smallnorb(write(tmp_path, zipped), cache_dir=tmp_path / "cache")
    assert list(splits) == ["train", "validation", "test"]
    for split in splits.values():
        assert split.features == stereo_features(SIZE, SIZE)
    train = ARRAYS["train"]
    assert_holds(splits["train"], train, train["info"][:, 0] != 9)
    assert_holds(splits["validation"], train, train["info"][:, 0] == 9)
    assert_holds(splits["test"], ARRAYS["test"])
    assert [len(split) for split in splits.values()] == [40, 10, 50]


def test_a_header_of_four_dimensions_is_24_bytes_and_one_of_fewer_20(source):
    assert path(source, "dat").stat().st_size == 24 + 50 * 2 * SIZE * SIZE
    assert path(source, "cat").stat().st_size == 20 + 50 * 4
    assert smallnorb._read_header(path(source, "info"), "info").offset == 20


def test_the_last_of_fewer_than_three_dimensions_mean_nothing(source, load):
    content = bytearray(path(source, "cat").read_bytes())
    content[12:20] = struct.pack("<2i", 7, -3)
    path(source, "cat").write_bytes(content)
    assert_holds(load()["test"], ARRAYS["test"])


def toys(split):
    columns = read(split)
    return set(zip(columns["label"].tolist(), columns["instance"].tolist()))


def test_no_toy_is_in_two_splits(load):
    splits = load()
    train, validation, test = (toys(splits[name]) for name in ("train", "validation", "test"))
    assert validation == {(label, 9) for label in range(5)}
    assert train == {(label, instance) for label in range(5) for instance in (4, 6, 7, 8)}
    assert test == {(label, instance) for label in range(5) for instance in (0, 1, 2, 3, 5)}


def test_other_instances_may_be_for_validation(load):
    splits = load(validation_instances=(4, 7))
    assert {instance for _, instance in toys(splits["validation"])} == {4, 7}
    assert {instance for _, instance in toys(splits["train"])} == {6, 8, 9}


def test_without_validation_all_pairs_are_for_training(load):
    splits = load(validation_instances=())
    assert list(splits) == ["train", "test"]
    assert_holds(splits["train"], ARRAYS["train"])


@pytest.mark.parametrize(
    "wanted, message",
    [
        ((9, 3), r"has 3, which is not among the training files' instances 4, 6, 7, 8, 9; test instances are for"),
        ((4, 6, 7, 8, 9), r"validation_instances are \[4, 6, 7, 8, 9\], all of them; leave at least one"),
    ],
)
def test_validation_is_never_on_test_instances_nor_on_all_others(load, wanted, message):
    with pytest.raises(ValueError, match=message):
        load(validation_instances=wanted)


def test_the_images_are_mapped_not_read(source):
    images = smallnorb._generate_images(path(source, "dat"))
    assert isinstance(next(images).base, np.memmap)


def test_a_gzipped_file_is_read_chunk_by_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(smallnorb, "_N_PAIRS_AT_ONCE", 8)
    read_at_once = []

    def spy(file, n_bytes, path):
        read_at_once.append(n_bytes)
        return original(file, n_bytes, path)

    original = smallnorb._read
    monkeypatch.setattr(smallnorb, "_read", spy)
    folder = write(tmp_path, ["dat"])
    images = list(smallnorb._generate_images(folder / f"{STEMS['train']}-dat.mat.gz"))
    np.testing.assert_array_equal(images, ARRAYS["train"]["dat"])
    assert max(read_at_once) == 8 * 2 * SIZE * SIZE


def test_pairs_are_kept_and_files_that_changed_read_anew(source, load, monkeypatch):
    first = read(load()["test"])["image"]
    with monkeypatch.context() as patch:
        patch.setattr(smallnorb, "_generate_images", lambda path: pytest.fail("read again"))
        np.testing.assert_array_equal(read(load()["test"])["image"], first)
    file = path(source, "dat", "test")
    before = file.stat()
    file.write_bytes(matrix(255 - ARRAYS["test"]["dat"]))  # of the same size
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    np.testing.assert_array_equal(read(load()["test"])["image"], 255 - first)


def test_a_missing_directory_and_a_missing_file(source, load, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a directory; .* published at https://cs\.nyu\.edu/"):
        load_smallnorb(tmp_path / "nowhere")
    path(source, "info", "test").unlink()
    expected = r"files has neither \S+-testing-info\.mat nor \S+-testing-info\.mat\.gz; .* published at https://cs\.nyu"
    with pytest.raises(FileNotFoundError, match=expected):
        load()


@pytest.mark.parametrize("kind", ["dat", "cat", "info"])
def test_a_truncated_file(source, load, kind):
    file = path(source, kind)
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match=rf"training-{kind}\.mat is truncated: .*; fetch it again"):
        load()


@pytest.mark.parametrize("kind", ["dat", "cat", "info"])
@pytest.mark.parametrize("n_bytes", [0, 6, 15])
def test_a_file_that_ends_within_its_header(source, load, kind, n_bytes):
    file = path(source, kind, "test")
    file.write_bytes(file.read_bytes()[:n_bytes])
    with pytest.raises(ValueError, match=rf"testing-{kind}\.mat is truncated"):
        load()


def test_a_file_of_images_that_is_too_long(source, load):
    with path(source, "dat").open("ab") as file:
        file.write(b"?")
    with pytest.raises(ValueError, match=r"dat\.mat is too long: it has 3,625 bytes, expected 3,624"):
        load()


@pytest.mark.parametrize("kind", ["dat", "cat"])
def test_a_gzipped_file_whose_content_is_truncated(tmp_path, kind):
    folder = write(tmp_path, [kind])
    (folder / f"{STEMS['train']}-{kind}.mat.gz").write_bytes(gzip.compress(matrix(ARRAYS["train"][kind])[:-1]))
    with pytest.raises(ValueError, match=rf"{kind}\.mat\.gz is truncated: 1 bytes or more are missing; fetch it again"):
        load_smallnorb(folder, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("kind", ["dat", "info"])
def test_a_gzipped_file_whose_content_is_too_long(tmp_path, kind):
    folder = write(tmp_path, [kind])
    (folder / f"{STEMS['test']}-{kind}.mat.gz").write_bytes(gzip.compress(matrix(ARRAYS["test"][kind]) + b"?"))
    with pytest.raises(ValueError, match=rf"{kind}\.mat\.gz is too long: it holds more than its header says"):
        load_smallnorb(folder, cache_dir=tmp_path / "cache")


def damage(content):
    content = bytearray(content)
    content[-6] ^= 0xFF  # in the checksum
    return content


@pytest.mark.parametrize("harm", [lambda content: content[:-100], damage, lambda content: b"<html>no such file</html>"])
@pytest.mark.parametrize("kind", ["dat", "info"])
def test_a_damaged_gzip_file(tmp_path, kind, harm):
    folder = write(tmp_path, [kind])
    file = folder / f"{STEMS['train']}-{kind}.mat.gz"
    file.write_bytes(harm(file.read_bytes()))
    with pytest.raises(ValueError, match=rf"{kind}\.mat\.gz is not a complete gzip file \(.*\); fetch it again"):
        load_smallnorb(folder, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("kind, other", [("dat", "cat"), ("cat", "dat"), ("info", "dat")])
def test_a_wrong_magic_number(source, load, kind, other):
    path(source, kind).write_bytes(matrix(ARRAYS["train"][other]))
    types = {"dat": (0x1E3D4C55, "uint8"), "cat": (0x1E3D4C54, "int32"), "info": (0x1E3D4C54, "int32")}
    message = (
        rf"training-{kind}\.mat begins with the magic number 0x{types[other][0]:08X}; expected "
        rf"0x{types[kind][0]:08X} of a little-endian {types[kind][1]} matrix\. It is not the file its name says"
    )
    with pytest.raises(ValueError, match=message):
        load()


@pytest.mark.parametrize("kind", ["dat", "cat", "info"])
def test_a_big_endian_file(source, load, kind):
    path(source, kind).write_bytes(matrix(ARRAYS["train"][kind], order=">"))
    with pytest.raises(ValueError, match=rf"training-{kind}\.mat begins .* Its bytes are in big-endian order"):
        load()


@pytest.mark.parametrize(
    "kind, array, message",
    [
        ("dat", np.zeros((50, 6, 6), "u1"), r"is a matrix of 3 dimensions; expected 4"),
        ("cat", np.zeros((50, 4), "i4"), r"is a matrix of 2 dimensions; expected 1"),
        ("info", np.zeros(50, "i4"), r"is a matrix of 1 dimensions; expected 2"),
        ("dat", np.zeros((50, 1, 6, 6), "u1"), r"is a matrix of 50 x 1 x 6 x 6; expected pairs x 2 x height x width"),
        ("info", np.zeros((50, 5), "i4"), r"is a matrix of 50 x 5; expected pairs x 4"),
        ("cat", np.zeros(0, "i4"), r"is a matrix of 0; expected pairs"),
    ],
)
def test_a_matrix_of_another_shape(source, load, kind, array, message):
    path(source, kind).write_bytes(matrix(array))
    with pytest.raises(ValueError, match=rf"training-{kind}\.mat {message}"):
        load()


@pytest.mark.parametrize(
    "kind, message",
    [
        ("dat", r"dat\.mat has 49 pairs, and the cat and info files beside it have 50; expected the same number in"),
        ("cat", r"cat\.mat has 49 pairs and \S+info\.mat has 50; expected the same number in both"),
        ("info", r"cat\.mat has 50 pairs and \S+info\.mat has 49; expected the same number in both"),
    ],
)
def test_files_of_different_lengths(source, load, kind, message):
    path(source, kind).write_bytes(matrix(ARRAYS["train"][kind][:-1]))
    with pytest.raises(ValueError, match=message):
        load()


def test_an_unknown_category(source, load):
    path(source, "cat").write_bytes(matrix(np.append(ARRAYS["train"]["cat"][1:], 5).astype("i4")))
    with pytest.raises(ValueError, match=r"cat\.mat has the category 5; expected 0 to 4"):
        load()


def test_training_files_that_hold_test_instances(source, load):
    for kind in ("dat", "cat", "info"):
        path(source, kind, "train").write_bytes(path(source, kind, "test").read_bytes())
    with pytest.raises(ValueError, match=r"instance 0 of the category animal is in the training and in the test files"):
        load()


def test_a_plain_file_comes_before_a_gzipped_one(source, load):
    Path(f"{path(source, 'dat')}.gz").write_bytes(b"not read")
    assert len(load()["train"]) == 40
