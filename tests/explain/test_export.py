"""Explanations as JSON."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTImageProcessor

from capsule_heads import CapsuleHeadForImageClassification
from capsule_heads.explain import explain, load_explanations, save_explanations
from capsule_heads.explain.report import render_report


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, tuple) and a and isinstance(a[0], torch.Tensor):
        return len(a) == len(b) and all(map(same, a, b))
    return np.array_equal(a, b) if isinstance(a, np.ndarray | Image.Image) else a == b and type(a) is type(b)


def check(explanations, path):
    save_explanations(path, explanations)
    loaded = load_explanations(path)
    assert len(loaded) == len(explanations)
    for before, after in zip(explanations, loaded):
        for field in dataclasses.fields(before):
            assert same(getattr(before, field.name), getattr(after, field.name)), field.name
    if explanations[0].credits:
        assert render_report(loaded) == render_report(explanations)


@pytest.mark.parametrize("head_type", ["token_depth", "linear"])
def test_texts(make_model, tokenizer, tmp_path, head_type):
    model = make_model(head_type=head_type, problem_type="multi_label_classification", thresholds=[0.2, 0.5, 0.9])
    model.add_linear_term()
    texts = ["the film is good", ("not", "é \u2028 dull"), "the " * 90]
    check(explain(model, texts, tokenizer), tmp_path / "a.json")
    check(explain(model, "dull", tokenizer, parts_only=True), tmp_path / "b.json")
    row = json.loads((tmp_path / "b.json").read_text())["explanations"][0]
    assert row["labels"] == ["LABEL_0", "LABEL_1", "LABEL_2"] and row["credits"] == [] and row["baseline"] is None


@pytest.mark.parametrize("as_image", [lambda x: Image.fromarray(x), lambda x: x.transpose(2, 0, 1)], ids=["png", "npy"])
def test_images(shake, tmp_path, as_image):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    model = CapsuleHeadForImageClassification.from_backbone(
        ViTConfig(image_size=24, patch_size=8, **sizes), num_labels=3, d_inp=8, n_parts=6, freeze_backbone=False
    )
    shake(model.head)
    image = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)
    processor = ViTImageProcessor(size={"height": 24, "width": 24})
    check(explain(model, as_image(image), processor), tmp_path / "image.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "expected keys and values, found list"),
        ("{}", "has version None; expected 1, as save_explanations of this version"),
        ('{"version": 1}', r"holds no explanations \('explanations'\); expected a file that save_explanations wrote"),
        ('{"version": 1, "explanations": [{"labels": ["a"]}]}', "holds no explanations"),
        ('{"version": 1, "explanations": [3]}', "holds no explanations"),
    ],
)
def test_another_file(tmp_path, content, message):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_explanations(path)
