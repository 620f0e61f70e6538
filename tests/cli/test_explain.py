"""`capsule-heads explain`, as a user runs it."""

import pytest
import torch
from PIL import Image
from transformers import AutoModel, ViTConfig, ViTImageProcessor

from capsule_heads import CapsuleHeadForImageClassification, CapsuleHeadForSequenceClassification, tasks
from capsule_heads.data import load_reviews
from capsule_heads.explain import load_explanations
from capsule_heads.tasks import Task, register_task


def test_texts(call, classifier, tmp_path):
    status, out, err = call("explain", classifier, "good food", "it was\tbad", "--output_dir", tmp_path / "found")
    assert status == 0, err
    assert out == f"{tmp_path / 'found' / 'report.html'}\n"
    assert sorted(path.name for path in (tmp_path / "found").iterdir()) == [
        "001.png", "002.png", "explanations.json", "report.html",
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
    assert "data:image/webp;base64," in (tmp_path / "found" / "report.html").read_text()
    assert (tmp_path / "found" / "001.png").exists()


def test_credits_through_the_backbone(call, classifier, tmp_path):
    found = {}
    for name, options in (("usual", []), ("traced", ["--through_backbone"])):
        status, _, err = call("explain", classifier, "the food was good", *options, "--output_dir", tmp_path / name)
        assert status == 0, err
        (found[name],) = load_explanations(tmp_path / name / "explanations.json")
    assert (found["usual"].layers, found["traced"].layers) == ((0, 1, 2), (0,))
    assert (found["usual"].by_token() - found["traced"].by_token()).abs().max() > 1e-4


def test_a_thousand_inputs_keep_their_order(call, classifier, tmp_path, monkeypatch):
    drawn = []

    class Picture:
        def savefig(self, path):
            drawn.append(path.name)

    monkeypatch.setattr("capsule_heads.explain.pictures.draw_explanation", lambda explanation: Picture())
    status, _, err = call("explain", classifier, *["good"] * 1001, "--output_dir", tmp_path)
    assert status == 0, err
    assert drawn == sorted(drawn) and (drawn[0], drawn[-1]) == ("0001.png", "1001.png")


def test_mistakes(fails, classifier, tmp_path):
    message = "error: Expected texts or files to explain, --data with labelled data, or --task: one of them."
    assert fails("explain", classifier) == message
    assert fails("explain", classifier, "good", "--task", "reviews") == message
    assert "nowhere" in fails("explain", tmp_path / "nowhere", "good")
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in fails("explain", classifier, "good", "--output_dir", tmp_path / "file")


@pytest.mark.parametrize(
    ("name", "value", "needed"),
    [
        ("--source", "x", "--task"),
        ("--max_inputs", 50, "--data or --task"),
        ("--seed", 0, "--data or --task"),
        ("--label", "x", "--data"),
    ],
)
def test_options_of_data_need_it(fails, classifier, tmp_path, name, value, needed):
    line = fails("explain", classifier, "good", name, value, "--output_dir", tmp_path / "found")
    assert line == f"error: {name} is {value}, which has no effect without {needed}; leave it out."
    assert not (tmp_path / "found").exists()


def load_without_a_test_split(source):
    splits = load_reviews()
    del splits["test"]
    return splits


@pytest.fixture
def own_tasks(monkeypatch):
    """Tasks that are registered meanwhile are gone at the end."""
    monkeypatch.setattr(tasks, "_TASKS", {**tasks.registered_tasks()})


def test_a_task_without_a_test_split(fails, classifier, tmp_path, own_tasks):
    register_task(Task("reviews_without_test", "reviews", "text", load_without_a_test_split, is_own_data=True))
    line = fails("explain", classifier, "--task", "reviews_without_test", "--output_dir", tmp_path / "found")
    assert line == (
        "error: reviews_without_test has train, validation and no test split to explain; expected texts or files "
        "instead of --task."
    )


def test_a_task_of_other_classes(fails, classifier, tmp_path, own_tasks):
    from datasets import ClassLabel

    def load_other_classes(source):
        return load_reviews().cast_column("label", ClassLabel(names=["bad", "good"]))

    register_task(Task("reviews_of_others", "reviews", "text", load_other_classes, is_own_data=True))
    line = fails("explain", classifier, "--task", "reviews_of_others", "--output_dir", tmp_path / "found")
    assert "trained for ['negative', 'positive'], and the dataset has ['bad', 'good']" in line


def test_models_without_credits_are_refused_before_they_are_loaded(fails, backbone, tmp_path):
    for name, fields, message in (
        (
            "routing",
            {"head_type": "vector_routing"},
            "A VectorRoutingHead has no credits to explain; expected a classifier",
        ),
        ("value", {"num_labels": 1, "d_inp": 8, "n_parts": 6}, "this model is a regression, which has none; expected"),
    ):
        CapsuleHeadForSequenceClassification.from_backbone(backbone, **fields).save_pretrained(tmp_path / name)
        (tmp_path / name / "model.safetensors").unlink()
        assert message in fails("explain", tmp_path / name, "good", "--output_dir", tmp_path / "found")
    assert not (tmp_path / "found").exists()


@pytest.mark.slow
def test_a_sample_of_a_file_is_explained(call, classifier, tmp_path):
    (tmp_path / "rows.csv").write_text("review,stars\n" + "good food,positive\nbad film,negative\n" * 3)
    options = ("--data", tmp_path / "rows.csv", "--max_inputs", 2, "--output_dir", tmp_path / "found")
    status, _, err = call("explain", classifier, *options)
    assert status == 0, err
    assert "Columns: text from review, label from stars." in err
    assert (tmp_path / "found" / "report.html").read_text().count("true: ") == 2
