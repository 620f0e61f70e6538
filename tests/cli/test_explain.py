"""`capsule-heads explain`, as a user runs it."""

import torch
from PIL import Image
from transformers import AutoModel, ViTConfig, ViTImageProcessor

from capsule_heads import CapsuleHeadForImageClassification


def test_texts(call, classifier, tmp_path):
    status, out, err = call("explain", classifier, "good food", "it was\tbad", "--output_dir", tmp_path / "found")
    assert status == 0, err
    assert out == f"{tmp_path / 'found' / 'report.html'}\n"
    assert sorted(path.name for path in (tmp_path / "found").iterdir()) == [
        "001.png", "002.png", "parts.png", "report.html",
    ]  # fmt: skip
    assert ">good</span>" in (tmp_path / "found" / "report.html").read_text()
    assert Image.open(tmp_path / "found" / "001.png").size[0] > 300


def test_a_sample_of_a_test_set(call, classifier, tmp_path):
    options = ("--task", "reviews", "--max_inputs", 3, "--output_dir", tmp_path)
    status, _, err = call("explain", classifier, *options)
    assert status == 0, err
    assert (tmp_path / "report.html").read_text().count("true: ") == 3
    assert len(list(tmp_path.glob("0*.png"))) == 3


def test_images(call, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    AutoModel.from_config(ViTConfig(image_size=16, patch_size=8, **sizes)).save_pretrained(tmp_path / "vit")
    model = CapsuleHeadForImageClassification.from_backbone(str(tmp_path / "vit"), num_labels=2, d_inp=8, n_parts=6)
    model.save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "model")
    Image.effect_noise((20, 20), 60).convert("RGB").save(tmp_path / "noise.png")
    status, _, err = call("explain", tmp_path / "model", tmp_path / "noise.png", "--output_dir", tmp_path / "found")
    assert status == 0, err
    assert "data:image/png;base64," in (tmp_path / "found" / "report.html").read_text()
    assert (tmp_path / "found" / "001.png").exists()


def test_mistakes(fails, classifier, tmp_path):
    message = "error: Expected either texts or files, or --task with a test split to explain."
    assert fails("explain", classifier) == message
    assert fails("explain", classifier, "good", "--task", "reviews") == message
    assert "nowhere" in fails("explain", tmp_path / "nowhere", "good")
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in fails("explain", classifier, "good", "--output_dir", tmp_path / "file")
