import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from capsule_heads.paper.stereo import PADDING, crop_randomly, prepare_stereo, stereo_features


def make_pairs(n_pairs=6, size=40):
    images = np.random.default_rng(0).integers(0, 256, (n_pairs, 2, size, size), dtype=np.uint8)
    columns = {
        "image": list(images),
        "label": [index % 5 for index in range(n_pairs)],
        **{name: [0] * n_pairs for name in ("instance", "elevation", "azimuth", "lighting")},
    }
    return images, datasets.Dataset.from_dict(columns, features=stereo_features(size, size))


@pytest.fixture(scope="module")
def images_and_splits():
    images, pairs = make_pairs()
    return images, prepare_stereo(datasets.DatasetDict(train=pairs, validation=pairs, test=pairs))


def test_columns_are_those_of_the_factors():
    features = stereo_features()
    assert list(features) == ["image", "label", "instance", "elevation", "azimuth", "lighting"]
    assert features["image"] == datasets.Array3D((2, 96, 96), "uint8")
    assert features["label"].names == ["animal", "human", "airplane", "truck", "car"]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_pairs_to_evaluate_on_are_as_they_are(images_and_splits, split):
    images, splits = images_and_splits
    batch = splits[split][:]
    assert list(batch) == ["pixel_values", "labels"]
    assert batch["labels"] == [0, 1, 2, 3, 4, 0]
    pixels = torch.stack(batch["pixel_values"])
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels, torch.from_numpy(images).float() / 255, rtol=0, atol=0)


def test_one_pair_and_one_column(images_and_splits):
    images, splits = images_and_splits
    pair = splits["test"][4]
    assert pair["labels"] == 4
    assert torch.equal(pair["pixel_values"], torch.from_numpy(images[4]).float() / 255)
    assert list(splits["test"]["labels"]) == [0, 1, 2, 3, 4, 0]


def padded_crops(image):
    """All crops of an image with its edges repeated, by (top, left): the definition, for comparison."""
    padded = np.pad(image, ((0, 0), (PADDING, PADDING), (PADDING, PADDING)), mode="edge")
    size = image.shape[-1]
    offsets = range(2 * PADDING + 1)
    return {(top, left): padded[:, top : top + size, left : left + size] for top in offsets for left in offsets}


def find_crop(crop, crops):
    """The one offset at which both views were cropped."""
    found = [offset for offset, expected in crops.items() if np.array_equal(crop, expected)]
    assert len(found) == 1
    return found[0]


def test_training_pairs_are_crops_of_the_image_with_repeated_edges_the_same_for_both_views(images_and_splits):
    images, splits = images_and_splits
    crops = padded_crops(images[2])
    torch.manual_seed(0)
    seen = [splits["train"][2]["pixel_values"] for _ in range(20)]
    offsets = [find_crop((255 * crop).round().to(torch.uint8).numpy(), crops) for crop in seen]
    assert len(set(offsets)) >= 15
    assert len({top for top, _ in offsets}) >= 8 and len({left for _, left in offsets}) >= 8


def test_every_crop_is_as_likely_as_any_other():
    ramp = torch.arange(4.0).expand(1, 4, 4)  # its value says how far a crop is off
    images = torch.stack([ramp.mT, ramp], dim=1).expand(40_000, -1, -1, -1, -1).flatten(1, 2)
    torch.manual_seed(0)
    crops = crop_randomly(images, padding=1)
    tops = crops[:, 0, :, 0].sum(-1)  # 0 0 1 2, 0 1 2 3, 1 2 3 3
    lefts = crops[:, 1, 0].sum(-1)
    counts = torch.stack([(tops == top) & (lefts == left) for top in (3, 6, 9) for left in (3, 6, 9)]).sum(-1)
    assert counts.sum() == 40_000
    assert counts.min() > 40_000 / 9 - 300 and counts.max() < 40_000 / 9 + 300  # 4.8 standard deviations


def test_each_image_of_a_batch_is_cropped_by_itself():
    image = torch.from_numpy(make_pairs(1)[0])
    torch.manual_seed(0)
    crops = crop_randomly(image.expand(10, -1, -1, -1))
    assert crops.dtype == torch.uint8
    assert len({crop.numpy().tobytes() for crop in crops}) == 10


def test_no_padding_is_no_change():
    images = torch.rand(3, 2, 5, 7)
    assert torch.equal(crop_randomly(images, padding=0), images)


def test_crops_follow_from_torchs_seed(images_and_splits):
    _, splits = images_and_splits

    def read(seed):
        torch.manual_seed(seed)
        return torch.stack(splits["train"][:]["pixel_values"])

    assert torch.equal(read(0), read(0))
    assert not torch.equal(read(0), read(1))


def test_workers_of_a_loader_crop_by_its_seed_and_unlike_each_other():
    image = make_pairs(1)[0][0]
    _, pairs = make_pairs(4)
    same = pairs.map(lambda row: {"image": image}, new_fingerprint="all pairs alike", keep_in_memory=True)
    split = prepare_stereo(datasets.DatasetDict(train=same))["train"]

    def read(seed):
        loader = DataLoader(split, batch_size=2, num_workers=2, generator=torch.Generator().manual_seed(seed))
        return torch.stack([batch["pixel_values"] for batch in loader])  # one batch of each worker

    first = read(0)
    assert torch.equal(first, read(0))
    assert not torch.equal(first, read(1))
    assert not torch.equal(first[0], first[1])


class Probe(torch.nn.Module):
    """Takes what the vision model takes, and remembers it."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(5))
        self.seen = {True: [], False: []}

    def forward(self, pixel_values, labels=None):
        self.seen[self.training].append(pixel_values)
        logits = pixel_values.mean((1, 2, 3))[:, None] * self.scale
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("remove_unused_columns", [True, False])
def test_a_trainer_takes_the_splits_with_its_own_collator(images_and_splits, tmp_path, remove_unused_columns):
    images, splits = images_and_splits
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=3,
        per_device_eval_batch_size=6,
        remove_unused_columns=remove_unused_columns,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    model = Probe()
    trainer = Trainer(model, arguments, train_dataset=splits["train"], eval_dataset=splits["validation"])
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    plain = torch.from_numpy(images).float() / 255
    assert torch.equal(torch.cat(model.seen[False]), plain)
    trained = torch.cat(model.seen[True])
    assert trained.shape == plain.shape
    assert not any(torch.equal(crop, image) for crop in trained for image in plain)


def test_other_columns_are_refused():
    texts = datasets.Dataset.from_dict({"text": ["a"], "label": [0]})
    with pytest.raises(ValueError, match=r"split test has the columns text, label; expected image and label"):
        prepare_stereo(datasets.DatasetDict(test=texts))
