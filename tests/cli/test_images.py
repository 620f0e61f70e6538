"""Image classifiers through the commands: trained, evaluated, used, explained and converted."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoModel, ViTConfig, ViTImageProcessor

from capsule_heads import CapsuleHeadForImageClassification
from capsule_heads.paper.checkpoints import build_network
from capsule_heads.paper.image_processing_stereo import side_by_side
from capsule_heads.paper.toy_norb import build_toy, render_view


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    AutoModel.from_config(ViTConfig(image_size=16, patch_size=8, **sizes)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Ten bright and ten dark pictures to learn from, one each to test."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, count in (("train", 10), ("test", 1)):
        for name, level in (("bright", 200), ("dark", 20)):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                values = (level + 40 * rng.random((20, 20, 3))).astype("uint8")
                Image.fromarray(values).save(root / split / name / f"{index}.png")
    return root


@pytest.mark.slow
def test_a_folder_of_images_from_training_to_the_hub(call, vit, pictures, tmp_path, check_push):
    config, folder = tmp_path / "run.yaml", tmp_path / "run"
    keys = {"data": str(pictures), "backbone": str(vit), "output_dir": str(folder)}
    config.write_text(yaml.safe_dump({**keys, "num_train_epochs": 15, "learning_rate": 0.02, "save_strategy": "no"}))
    status, _, err = call("train", "--config", config)
    assert status == 0, err
    results = json.loads((folder / "results.json").read_text())
    assert (results["task"], results["head_type"], results["freeze_backbone"]) == ("own_data", "token_depth", True)
    assert results["steps"] == 15 and results["test_accuracy"] == 1.0

    status, out, _ = call("evaluate", folder, "--data", pictures, "--split", "test")
    assert status == 0
    assert json.loads(Path(out.splitlines()[-1]).read_text())["accuracy"] == 1.0

    files = [pictures / "test" / name / "0.png" for name in ("dark", "bright")]
    status, out, _ = call("predict", folder, *files)
    assert status == 0
    answers = [json.loads(line) for line in out.splitlines()]
    assert [(answer["image"], answer["label"]) for answer in answers] == list(zip(map(str, files), ("dark", "bright")))
    model, processor = CapsuleHeadForImageClassification.from_pretrained(folder), ViTImageProcessor.from_pretrained(vit)
    logits = model(**processor([Image.open(file) for file in files], return_tensors="pt")).logits
    assert [answer["score"] for answer in answers] == pytest.approx(logits.softmax(-1).amax(-1).tolist(), rel=1e-5)

    status, _, err = call("predict", folder, "--data", pictures / "test", "--output", tmp_path / "answers.csv")
    assert status == 0, err
    rows = (tmp_path / "answers.csv").read_text().splitlines()[1:]
    assert [row.split(",")[:2] for row in rows] == [["bright/0.png", "bright"], ["dark/0.png", "dark"]]
    options = ("--data", pictures, "--split", "test", "--output_dir", tmp_path / "found")
    status, _, err = call("explain", folder, *options)
    assert status == 0, err
    assert (tmp_path / "found" / "report.html").read_text().count("true: ") == 2
    check_push(folder)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_damaged_image_ends_training_before_it_begins(fails, vit, pictures, tmp_path, split):
    shutil.copytree(pictures, tmp_path / "own")
    path = tmp_path / "own" / split / "dark" / "0.png"
    path.write_bytes(path.read_bytes()[:80])
    keys = {"task": "image_folder", "source": tmp_path / "own", "backbone": vit, "output_dir": tmp_path / "run"}
    line = fails("train", *(x for name, value in keys.items() for x in (f"--{name}", value)))
    assert line.startswith(f"error: {path} is no image that can be read: ")


def test_stereo_pairs_are_classified(call, fails, stereo_model, tmp_path):
    toy = build_toy("car", np.random.default_rng(0))
    pair = render_view(toy, elevation=3, azimuth=2, lighting=1)
    side_by_side(pair).save(tmp_path / "car.png")
    status, out, _ = call("predict", stereo_model, tmp_path / "car.png")
    assert status == 0
    model = CapsuleHeadForImageClassification.from_pretrained(stereo_model)
    probabilities = model(torch.from_numpy(pair)[None] / 255).logits.softmax(-1)[0]
    best = int(probabilities.argmax())
    expected = {"label": model.config.id2label[best], "score": pytest.approx(probabilities[best].item(), rel=1e-5)}
    assert json.loads(out) == {"image": str(tmp_path / "car.png"), **expected}

    Image.new("L", (30, 20)).save(tmp_path / "single.png")
    assert "expected both views of a stereo pair side by side" in fails(
        "predict", stereo_model, tmp_path / "single.png"
    )
    line = fails("predict", stereo_model, tmp_path / "none.png")
    assert "none.png is no file; the model classifies images, expected their files" in line
    whole = (tmp_path / "car.png").read_bytes()
    for content in (whole[: len(whole) // 2], b"text", b""):
        (tmp_path / "cut.png").write_bytes(content)
        for command in ("predict", "explain"):
            line = fails(command, stereo_model, tmp_path / "car.png", tmp_path / "cut.png")
            assert line.startswith(f"error: {tmp_path / 'cut.png'} is no image that can be read: ")


@pytest.mark.slow
def test_a_sample_of_stereo_pairs_is_explained(call, stereo_model, tmp_path):
    options = ("--task", "toy_norb", "--max_inputs", 2, "--output_dir", tmp_path)
    status, _, err = call("explain", stereo_model, *options)
    assert status == 0, err
    assert Image.open(tmp_path / "002.png").size[0] > 300
    assert (tmp_path / "report.html").read_text().count("true: ") == 2


def test_checkpoints_are_converted(call, fails, tmp_path):
    model = build_network("smallnorb")
    state_dict = {}
    for key, tensor in model.state_dict().items():  # back to the original's names
        part, *rest = key.split(".")
        if part == "backbone":
            key = f"convolve.{3 * int(rest[1]) + int(rest[2])}.{rest[3]}"
        else:
            key = ".".join(rest)
            tensor = tensor[..., None] if tensor.ndim == 3 else tensor
        state_dict[key] = tensor
    torch.save(state_dict, tmp_path / "weights.pt")
    status, out, _ = call("convert", tmp_path / "weights.pt", "smallnorb", tmp_path / "model")
    assert (status, out.splitlines()[-1]) == (0, f"Wrote {tmp_path / 'model'}.")
    images = torch.rand(1, 2, 96, 96)
    loaded = CapsuleHeadForImageClassification.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded(images).logits, model(images).logits)
    line = fails("convert", tmp_path / "weights.pt", "sst2_root", tmp_path / "other")
    assert "not the weights of the sst2_root network" in line and not (tmp_path / "other").exists()
    assert "weights.pt" in fails("convert", tmp_path / "none" / "weights.pt", "smallnorb", tmp_path / "x")
