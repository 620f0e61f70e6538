"""`capsule-heads export`: one file for ONNX Runtime, compared with torch, and a script that serves it without torch."""

import csv
import json
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoTokenizer, ViTConfig, ViTImageProcessor

from capsule_heads import CapsuleHeadForImageClassification, CapsuleHeadForSequenceClassification
from capsule_heads.data.images import process_images
from capsule_heads.exporting import export_onnx
from capsule_heads.predicting import score_inputs

TEXTS = ["the food was good", "bad", "it was long and bad " * 20, "a good film", "the film", "food"]
# Serves as a user does, and says that nothing heavy was imported.
SERVE = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
assert not {"torch", "transformers", "capsule_heads"} & set(sys.modules)
"""


def write_csv(path, texts, labels):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *zip(texts, labels)])
    return path


def serve(folder, *texts):
    done = subprocess.run([sys.executable, "-c", SERVE, folder / "serve.py", *texts], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def scores_of(folder, texts):
    """What `capsule-heads predict` gives, by class."""
    model = CapsuleHeadForSequenceClassification.from_pretrained(folder)
    given = [tuple(text.split("\t")) if "\t" in text else text for text in texts]
    scores = score_inputs(model, given, AutoTokenizer.from_pretrained(folder))
    return [dict(zip(model.config.class_names, row)) for row in scores.tolist()]


@pytest.mark.slow
def test_classes_served_without_torch(call, classifier, tmp_path):
    data = write_csv(tmp_path / "texts.csv", TEXTS, ["positive", "negative"] * 3)
    status, out, err = call("export", classifier, "--data", data, "--output_dir", tmp_path / "out")
    assert status == 0, err
    assert "Compared with torch: labels are equal for 6 of 6 examples" in out and "accuracy: " in out
    assert out.splitlines()[-1] == str(tmp_path / "out" / "model.onnx")
    assert "registration" not in err and "WARNING" not in err
    expected = {"model.onnx", "serve.py", "labels.json", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected
    texts = [*TEXTS, "good\tbad film"]  # one is cut, one is a pair
    for served, torchs in zip(serve(tmp_path / "out", *texts), scores_of(classifier, texts), strict=True):
        assert served == pytest.approx(torchs, abs=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("good").input_ids == [2, 9, 3]  # it pads nothing by itself


@pytest.mark.slow
def test_eight_bits(call, classifier, tmp_path):
    data = write_csv(tmp_path / "texts.csv", TEXTS, ["positive", "negative"] * 3)
    status, out, err = call(
        "export", classifier, "--data", data, "--output_dir", tmp_path / "out", "--quantize", "int8"
    )
    assert status == 0, err
    assert "WARNING" not in err and "labels are equal for " in out
    (tmp_path / "out" / "model.onnx").read_bytes().index(b"DynamicQuantizeLinear")
    served = serve(tmp_path / "out", "good")[0]
    assert served == pytest.approx(scores_of(classifier, ["good"])[0], abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields, labels, score",
    [
        ({"problem_type": "multi_label_classification", "num_labels": 2, "thresholds": [0.2, 0.8]}, None, "f1_micro"),
        ({"num_labels": 1, "label_mean": 5.0, "label_std": 2.0}, [3.5, 4, 7.25, 1, 2, 8], "mean_absolute_error"),
    ],
)
def test_several_labels_and_a_number(call, saved, tmp_path, fields, labels, score):
    model = saved(**fields)
    data = tmp_path / "texts.jsonl"
    rows = zip(TEXTS, labels or [["LABEL_0"], [], ["LABEL_0", "LABEL_1"]] * 2)
    data.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    status, out, err = call("export", model, "--data", data)
    assert status == 0, err
    assert "are equal for 6 of 6 examples" in out and f"{score}: " in out
    (served,) = serve(model / "onnx", "it was good")
    assert served == pytest.approx(scores_of(model, ["it was good"])[0], abs=1e-5)


@pytest.mark.slow
def test_images(call, tmp_path, shake):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    AutoModel.from_config(ViTConfig(image_size=16, patch_size=8, **sizes)).save_pretrained(tmp_path / "vit")
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    processor.save_pretrained(tmp_path / "vit")
    fields = {"id2label": {0: "bright", 1: "dark"}, "d_inp": 8, "n_parts": 6}
    model = CapsuleHeadForImageClassification.from_backbone(str(tmp_path / "vit"), **fields)
    shake(model.head, scale=0.5)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    rng = np.random.default_rng(0)
    for name, level in (("bright", 200), ("dark", 20)):
        (tmp_path / "test" / name).mkdir(parents=True)
        for n in range(2):
            Image.fromarray((level + 40 * rng.random((20, 20, 3))).astype("uint8")).save(
                tmp_path / "test" / name / f"{n}.png"
            )
    status, out, err = call("export", tmp_path / "model", "--data", tmp_path / "test")
    assert status == 0, err
    assert "labels are equal for 4 of 4 examples" in out and "There is no serve.py" in err
    session = onnxruntime.InferenceSession(tmp_path / "model" / "onnx" / "model.onnx")
    inputs = process_images(processor, [Image.new("RGB", (20, 20), (200, 30, 10))] * 3)["pixel_values"]
    with torch.no_grad():
        expected = model.eval()(pixel_values=inputs).logits
    (logits,) = session.run(None, {"pixel_values": inputs.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=0, atol=1e-4)


def test_mistakes(fails, classifier, tmp_path):
    data = write_csv(tmp_path / "one.csv", ["good"], ["positive"])
    out = ("--output_dir", tmp_path / "out")
    assert "Expected either --data" in fails("export", classifier)
    assert "There is 1 example to export with; expected two or more" in fails(
        "export", classifier, "--data", data, *out
    )
    assert "--output_dir is" in fails("export", classifier, "--data", data, "--output_dir", data)
    assert "invalid choice" in fails("export", classifier, "--data", data, "--format", "tflite")


def test_unknown_quantization(tmp_path):
    with pytest.raises(ValueError, match=r"^quantize is 'int4'; expected int8, or None to keep float32\.$"):
        export_onnx(None, None, None, tmp_path, quantize="int4")


def test_what_torch_cannot_export_leaves_nothing(fails, classifier, tmp_path, monkeypatch):
    data = write_csv(tmp_path / "texts.csv", TEXTS, ["positive", "negative"] * 3)
    arguments = ("export", classifier, "--data", data, "--output_dir", tmp_path / "out")

    def export(*_, **options):
        raise RuntimeError("data-dependent\nwith more lines")

    monkeypatch.setattr(torch.export, "export", export)
    assert fails(*arguments).endswith("torch cannot export this model, with the backbone bert: data-dependent")
    assert not list((tmp_path / "out").iterdir())
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert 'Export needs onnxscript: pip install "capsule-heads[onnx]"' in fails(*arguments)


def test_other_labels_are_refused(fails, classifier, tmp_path, monkeypatch):
    data = write_csv(tmp_path / "texts.csv", TEXTS, ["positive", "negative"] * 3)
    run = onnxruntime.InferenceSession.run
    monkeypatch.setattr(onnxruntime.InferenceSession, "run", lambda *given: [-x for x in run(*given)])
    found = fails("export", classifier, "--data", data, "--output_dir", tmp_path / "out")
    assert "predicts other labels than the model for 6 of 6 examples" in found
    assert not list((tmp_path / "out").iterdir())
