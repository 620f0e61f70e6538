import numpy as np
import pytest

from capsule_heads.paper import toy_norb
from capsule_heads.paper.stereo import CATEGORIES, stereo_features
from capsule_heads.paper.toy_norb import build_toy, load_toy_norb, render_sequence, render_view

FACTORS = ["elevation", "azimuth", "lighting"]


def load(folder, **settings):
    settings = {"n_train_instances": 2, "n_validation_instances": 1, "n_test_instances": 1, "n_views": 2} | settings
    return load_toy_norb(**settings, cache_dir=folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("toys")


@pytest.fixture(scope="module")
def toys(folder):
    return load(folder)


def rows(split):
    columns = split.with_format("numpy")
    return {name: np.asarray(columns[name][:]) for name in split.column_names}


def instances(split):
    columns = rows(split)
    return set(zip(columns["label"].tolist(), columns["instance"].tolist()))


def test_splits_and_columns(toys):
    assert list(toys) == ["train", "validation", "test"]
    assert {name: len(split) for name, split in toys.items()} == {"train": 20, "validation": 10, "test": 10}
    for name, split in toys.items():
        assert split.features == stereo_features()
        assert split.split == name
    assert rows(toys["train"])["label"].tolist() == np.repeat(range(5), 4).tolist()


def test_no_instance_is_in_two_splits(toys):
    train, validation, test = (instances(toys[name]) for name in ("train", "validation", "test"))
    assert test == {(label, 0) for label in range(5)}
    assert validation == {(label, 1) for label in range(5)}
    assert train == {(label, instance) for label in range(5) for instance in (2, 3)}


def test_images_are_what_their_factors_say(toys):
    row = toys["train"][13]
    label, instance = row["label"], row["instance"]
    toy = build_toy(CATEGORIES[label], np.random.default_rng([0, label, instance]))
    image = render_view(toy, row["elevation"], row["azimuth"] // 2, row["lighting"])
    assert (label, instance) == (3, 2)
    assert np.array_equal(row["image"], image)


def test_more_instances_for_training_leave_the_rest_as_it_is(toys, folder):
    more = load(folder, n_train_instances=3)
    assert len(more["train"]) == 30
    for name in ("validation", "test"):
        assert more[name].to_dict() == toys[name].to_dict()
    assert instances(more["train"]) > instances(toys["train"])


def test_more_views_contain_those_of_fewer(toys, folder):
    def views(split):
        return set(zip(*(rows(split)[name].tolist() for name in ("label", "instance", *FACTORS))))

    more = load(folder, n_views=3, n_train_instances=1)
    assert len(views(more["test"])) == 15
    assert views(more["test"]) > views(toys["test"])


def test_a_seed_gives_the_same_toys_again(toys, tmp_path):
    again = load(tmp_path)  # another cache: rendered anew
    for name, split in toys.items():
        assert again[name].to_dict() == split.to_dict()


def test_another_seed_gives_other_toys(toys, folder):
    other = load(folder, seed=1)
    first, second = rows(toys["test"])["image"], rows(other["test"])["image"]
    assert all(not np.array_equal(a, b) for a, b in zip(first, second))


def test_rendered_pairs_are_kept(toys, folder, monkeypatch):
    def fail(*arguments, **settings):
        raise AssertionError("rendered again")

    monkeypatch.setattr(toy_norb, "render_view", fail)
    assert load(folder)["test"].to_dict() == toys["test"].to_dict()


def test_a_change_of_the_images_is_not_served_from_the_cache(toys, folder, monkeypatch):
    monkeypatch.setattr(toy_norb, "_EDITION", toy_norb._EDITION + 1)
    monkeypatch.setattr(toy_norb, "render_view", lambda *arguments: np.zeros((2, 96, 96), np.uint8))
    assert not rows(load(folder)["test"])["image"].any()
    assert rows(toys["test"])["image"].any()


def test_all_views_are_those_of_the_factors():
    assert len(set(toy_norb._VIEWS)) == len(toy_norb._VIEWS) == 9 * 18 * 6
    assert [max(values) for values in zip(*toy_norb._VIEWS)] == [8, 17, 5]


@pytest.mark.parametrize("category", CATEGORIES)
def test_toys_stand_on_the_floor_in_view_and_differ(category):
    toys = [build_toy(category, np.random.default_rng([7, instance])) for instance in range(30)]
    for toy in toys:
        bounds = np.stack([part.bounds for part in toy])
        low, high = bounds[:, 0].min(axis=0), bounds[:, 1].max(axis=0)
        assert low[2] == pytest.approx(0, abs=1e-5)
        np.testing.assert_allclose(low[:2], -high[:2], atol=1e-5)
        assert 1.0 < (high - low).max() < 2.4
    lengths = [max(np.ptp(np.stack([part.bounds for part in toy]), axis=(0, 1))) for toy in toys]
    tones = [max(part.albedo for part in toy) for toy in toys]
    assert max(lengths) / min(lengths) > 1.1
    assert max(tones) - min(tones) > 0.3


@pytest.mark.parametrize("category", CATEGORIES)
def test_each_factor_changes_the_image_and_both_eyes_see_something_else(category):
    toy = build_toy(category, np.random.default_rng(3))
    image = render_view(toy, 2, 4, 0, size=48).astype(int)
    for changed in ((3, 4, 0), (2, 5, 0), (2, 4, 1)):
        assert (np.abs(render_view(toy, *changed, size=48) - image) > 10).mean() > 0.02
    assert 0.01 < (np.abs(image[0] - image[1]) > 10).mean() < 0.5


def test_no_simple_feature_tells_the_categories_apart():
    """Brightness, contrast, visible size, dark and bright parts: all together they get far fewer right than half."""

    def describe(image):
        differs = np.abs(image - np.median(image)) > 8
        return [image.mean(), image.std(), differs.mean(), (image < 60).mean(), (image > 190).mean()]

    def sample(first, count):
        features, labels = [], []
        for label, category in enumerate(CATEGORIES):
            for instance in range(first, first + count):
                rng = np.random.default_rng([11, label, instance])
                toy = build_toy(category, rng)
                for _ in range(3):
                    view = render_view(toy, rng.integers(9), rng.integers(18), rng.integers(6), size=32)
                    features.append(describe(view[0].astype(float)))
                    labels.append(label)
        return np.array(features), np.array(labels)

    train, train_labels = sample(0, 12)
    test, test_labels = sample(12, 8)
    mean, std = train.mean(axis=0), train.std(axis=0)
    centers = np.stack([((train - mean) / std)[train_labels == label].mean(axis=0) for label in range(5)])
    distances = np.linalg.norm(((test - mean) / std)[:, None] - centers, axis=-1)
    assert (distances.argmin(axis=1) == test_labels).mean() < 0.5


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"n_train_instances": 0}, r"n_train_instances is 0; expected at least 1"),
        ({"n_validation_instances": -1}, r"n_validation_instances is -1; expected at least 1"),
        ({"n_test_instances": 0}, r"n_test_instances is 0; expected at least 1"),
        ({"n_views": 0}, r"n_views is 0; expected 1 to 972"),
        ({"n_views": 973}, r"n_views is 973; expected 1 to 972"),
        ({"seed": -1}, r"seed is -1; expected 0 or more"),
    ],
)
def test_numbers_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        load_toy_norb(**settings)


def test_sequences_are_views_of_one_toy():
    sequence = render_sequence("azimuth", label="truck", instance=3, elevation=2, lighting=1)
    columns = rows(sequence)
    assert sequence.features == stereo_features()
    assert columns["azimuth"].tolist() == list(range(0, 36, 2))
    fixed = {"label": 3, "instance": 3, "elevation": 2, "lighting": 1}
    assert all((columns[name] == value).all() for name, value in fixed.items())
    toy = build_toy("truck", np.random.default_rng([0, 3, 3]))
    assert np.array_equal(columns["image"][5], render_view(toy, elevation=2, azimuth=5, lighting=1))
    assert rows(render_sequence("elevation", label=1))["elevation"].tolist() == list(range(9))


def test_a_sequence_shows_a_toy_of_the_test_split(toys):
    row = toys["test"][0]
    sequence = rows(render_sequence("azimuth", label=0, elevation=row["elevation"], lighting=row["lighting"]))
    assert np.array_equal(sequence["image"][row["azimuth"] // 2], np.asarray(row["image"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"factor": "lighting"}, "factor is 'lighting'; expected one of elevation, azimuth"),
        ({"factor": "azimuth", "azimuth": 2}, "azimuth was given, but it is the factor that varies; leave it out"),
        (
            {"factor": "azimuth", "label": "tree"},
            "label is 'tree'; expected one of animal, human, airplane, truck, car",
        ),
        ({"factor": "azimuth", "elevation": 9}, "elevation is 9; expected one of 0, 1, 2, 3, 4, 5, 6, 7, 8"),
        ({"factor": "elevation", "azimuth": 3}, "azimuth is 3; expected one of 0, 2, 4"),
        ({"factor": "elevation", "lighting": 6}, "lighting is 6; expected one of 0, 1, 2, 3, 4, 5"),
        ({"factor": "elevation", "instance": -1}, "instance is -1 and seed 0; expected 0 or more"),
    ],
)
def test_sequences_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        render_sequence(**arguments)
