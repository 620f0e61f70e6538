"""Calibration: a temperature and thresholds that are fitted, kept, and divide the logits wherever there are scores."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import pipeline

from capsule_heads import CapsuleHeadConfig, CapsuleHeadForSequenceClassification
from capsule_heads.explain import explain
from capsule_heads.metrics import measure
from capsule_heads.predicting import score_inputs
from capsule_heads.training import CapsuleTrainer, CapsuleTrainingArguments, calibrate
from capsule_heads.training import calibration as module
from capsule_heads.training.calibration import choose_temperature, fit_temperature, fit_thresholds

TEXTS = ["the film is good", "dull", "the plot was not bad", "good good good"]


def drawn(n, temperature, seed=0):
    """Logits that are too large by a factor, and labels that are drawn from the right probabilities."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, 3)) * 2
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    labels = np.array([rng.choice(3, p=p) for p in probabilities])
    return logits * temperature, labels


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_temperature_is_found(temperature):
    logits, labels = drawn(4000, temperature)
    assert fit_temperature(logits, labels) == pytest.approx(temperature, rel=0.08)
    # Of labels of which an input has any number, the same.
    rng = np.random.default_rng(1)
    right = rng.normal(size=(4000, 2)) * 2
    several = (rng.random(right.shape) < 1 / (1 + np.exp(-right))).astype(float)
    assert fit_temperature(right * temperature, several) == pytest.approx(temperature, rel=0.08)


def test_a_gain_that_may_be_chance_is_left():
    logits, labels = drawn(4000, 3.0)
    assert choose_temperature(logits, labels) == fit_temperature(logits, labels)
    several = np.eye(3)[labels]
    assert choose_temperature(logits, several) == fit_temperature(logits, several)
    logits, labels = drawn(60, 1.0)
    assert choose_temperature(logits, labels) == 1 != fit_temperature(logits, labels)


def test_a_model_that_is_right_on_all_rows_is_not_sure_without_end():
    labels = np.arange(60) % 3
    several = np.eye(3)[labels]
    scaled = several / fit_temperature(several, labels)
    assert np.exp(scaled[0]).max() / np.exp(scaled[0]).sum() == pytest.approx(1 - 1 / 62, rel=1e-4)
    scaled = (2 * several - 1) / fit_temperature(2 * several - 1, several)
    assert 1 / (1 + np.exp(-scaled.max())) == pytest.approx(1 - 1 / 62, rel=1e-4)


def test_thresholds_have_the_highest_f1():
    rng = np.random.default_rng(0)
    labels = (rng.random((600, 2)) < [0.15, 0.02]).astype(float)  # the second label has too few examples
    logits = rng.normal(size=labels.shape) + 2 * labels - 2
    first, second = fit_thresholds(logits, labels)
    assert second == 0.5 and first < 0.5
    probabilities, is_there = 1 / (1 + np.exp(-logits[:, 0])), labels[:, 0] == 1

    def f1(threshold):
        predicted = probabilities > threshold
        return 2 * (predicted & is_there).sum() / (predicted.sum() + is_there.sum())

    assert f1(first) == max(map(f1, np.linspace(0, 1, 2001)))
    assert fit_thresholds(labels * 8 - 4, labels) is None  # at 0.5 all is right already


def prepared(n, tokenizer, labels):
    rows = [tokenizer(TEXTS[i % len(TEXTS)]) for i in range(n)]
    return Dataset.from_list([{**row, "labels": label} for row, label in zip(rows, labels)])


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification"])
def test_calibrate_sets_what_it_found(make_model, shake, tokenizer, tmp_path, caplog, problem_type):
    model = make_model(num_labels=3, problem_type=problem_type)
    shake(model.head, scale=1.5)  # much too sure
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 80).tolist()
    if problem_type.startswith("multi"):
        labels = [[float(label == k) for k in range(3)] for label in labels]
    arguments = CapsuleTrainingArguments(str(tmp_path), report_to="none", disable_tqdm=True, use_cpu=True)
    trainer = CapsuleTrainer(model, arguments, processing_class=tokenizer)
    found = calibrate(trainer, prepared(80, tokenizer, labels))
    assert found["after"]["negative_log_likelihood"] < found["before"]["negative_log_likelihood"]
    assert found["temperature"] == model.config.calibration_temperature > 1.1  # the labels are noise
    assert json.loads(json.dumps(found)) == found
    (record,) = caplog.records
    assert record.getMessage().startswith("Probabilities are calibrated on 80 validation rows, with a temperature of ")
    # What it promised is what the model does.
    predicted = trainer.predict(prepared(80, tokenizer, labels))
    again = measure(model.config, predicted.label_ids, predicted.predictions)
    assert again["negative_log_likelihood"] == pytest.approx(found["after"]["negative_log_likelihood"], rel=1e-5)
    model.save_pretrained(tmp_path / "model")
    loaded = CapsuleHeadConfig.from_pretrained(tmp_path / "model")
    assert loaded.calibration_temperature == found["temperature"]
    assert loaded.thresholds == found.get("thresholds")
    # Too few rows: nothing is set, and that is said.
    caplog.clear()
    assert calibrate(trainer, prepared(module.LEAST_ROWS - 1, tokenizer, labels)) is None
    assert (model.config.calibration_temperature, model.config.thresholds) == (1.0, None)
    assert "there are 49 validation rows, and calibration needs 50" in caplog.text


def test_a_regression_is_left_alone(make_model, tokenizer, tmp_path):
    arguments = CapsuleTrainingArguments(str(tmp_path))
    trainer = CapsuleTrainer(make_model(num_labels=1), arguments, processing_class=tokenizer)
    assert calibrate(trainer, prepared(80, tokenizer, [1.0] * 80)) is None


def test_training_begins_without_a_temperature(make_model, tokenizer, tmp_path, caplog):
    model = make_model(num_labels=3, calibration_temperature=2.5)
    arguments = CapsuleTrainingArguments(str(tmp_path), max_steps=1, save_strategy="no", report_to="none", use_cpu=True)
    rows = prepared(8, tokenizer, [0, 1, 2, 0, 1, 2, 0, 1])
    CapsuleTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer).train()
    assert model.config.calibration_temperature == 1.0
    assert "calibration_temperature is set to 1" in caplog.text


def test_one_score_everywhere_at_a_temperature(make_model, shake, tokenizer, tmp_path):
    model = make_model(num_labels=3).eval()
    shake(model.head, scale=0.5)
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        plain = model(**inputs).logits
        model.config.calibration_temperature = 2.5
        torch.testing.assert_close(model(**inputs).logits, plain / 2.5)
        torch.testing.assert_close(model.train()(**inputs).logits, plain)  # no dropout: the backbone is frozen
        model.eval()
    expected = (plain / 2.5).softmax(-1)
    assert (expected - plain.softmax(-1)).abs().max() > 0.01
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    classify = pipeline("text-classification", model=str(tmp_path / "model"), top_k=None)
    for scores, of_text in zip(classify(TEXTS), expected):
        by_label = {x["label"]: x["score"] for x in scores}
        assert [by_label[f"LABEL_{k}"] for k in range(3)] == pytest.approx(of_text.tolist(), abs=1e-5)
    loaded = CapsuleHeadForSequenceClassification.from_pretrained(tmp_path / "model")
    for explanation, of_text in zip(explain(loaded, TEXTS, tokenizer), expected):
        torch.testing.assert_close(explanation.probabilities, of_text, rtol=0, atol=1e-5)
        torch.testing.assert_close(explanation.parts.sum(0), explanation.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(score_inputs(loaded, TEXTS, tokenizer, 3), expected, rtol=0, atol=1e-5)
    fewer = CapsuleHeadConfig.from_pretrained(tmp_path / "model", num_labels=2)  # another head, which is not fitted
    assert fewer.calibration_temperature == 1.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"calibration_temperature": 0}, "calibration_temperature is 0; expected a positive number"),
        ({"calibration_temperature": float("nan")}, "calibration_temperature is nan"),
        ({"calibration_temperature": "2"}, "calibration_temperature is '2'"),
        ({"calibration_temperature": 2.0, "num_labels": 1}, "a regression has no probabilities"),
        ({"thresholds": [0.5, 0.5]}, "which is for multi-label models, and problem_type is None"),
        (
            {"thresholds": [0.5], "problem_type": "multi_label_classification"},
            "expected 2 probabilities, one",
        ),
        ({"thresholds": [0.5, 1.0], "problem_type": "multi_label_classification"}, "not including 1"),
    ],
)
def test_fields_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        CapsuleHeadConfig(**fields)
