"""Ensembles: what they say is the mean of what their heads say, wherever they are saved, loaded and run."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, pipeline

from capsule_heads import (
    CapsuleHeadConfig,
    CapsuleHeadForSequenceClassification,
    CapsuleHeadModel,
    CapsuleTrainer,
    CapsuleTrainingArguments,
    make_ensemble,
)
from capsule_heads.explain import explain
from capsule_heads.hub import model_card, write_code
from capsule_heads.training import calibrate

load = CapsuleHeadForSequenceClassification.from_pretrained
# Heads of different types, layers, linear terms and temperatures.
HEADS = (
    {"linear_term": True},
    {"head_type": "linear", "pooling": "first"},
    {"head_type": "attentive_pooling", "layers": [0, 1], "linear_term": True},
)
MULTI_LABEL = {"problem_type": "multi_label_classification"}
REGRESSION = {"num_labels": 1, "label_mean": 3.0, "label_std": 1.5}


@pytest.fixture
def make_members(make_model):
    """Three models with different heads, none of whose weights is zero, on one backbone."""

    def make(**fields):
        models = [make_model(seed=seed, **heads, **fields) for seed, heads in enumerate(HEADS)]
        if models[0].config.problem_type != "regression":
            models[1].config.calibration_temperature = 0.3
        return models

    return make


def without_backbone(model):
    """The same head, without a backbone."""
    alone = type(model)(copy.deepcopy(model.config), build=False).eval()
    weights = {name: x for name, x in model.state_dict().items() if not name.startswith("backbone.")}
    alone.load_state_dict(weights)
    return alone


@torch.no_grad()
def mean_probabilities(models, batch, of=lambda logits: logits.softmax(-1)):
    each = torch.stack([of(model(**batch).logits.double()) for model in models])
    assert each.std(0).max() > 0.05  # so that no model alone has the mean
    return each.mean(0)


@torch.no_grad()
def test_probabilities_are_the_means_of_those_of_the_heads(make_members, pad):
    models = make_members()
    ensemble = make_ensemble(models)
    assert type(ensemble) is CapsuleHeadForSequenceClassification and not ensemble.training
    assert ensemble.config.layers == [0, 1, 2] and ensemble.backbone is models[0].backbone
    found = ensemble(**pad()).logits
    torch.testing.assert_close(found.double().exp(), mean_probabilities(models, pad()), rtol=0, atol=1e-6)
    ensemble.config.calibration_temperature = 2.0
    torch.testing.assert_close(ensemble(**pad()).logits, found / 2)
    models[0].head.routings[1].W.zero_()  # the ensemble has copies
    ensemble.config.calibration_temperature = 1.0
    assert torch.equal(ensemble(**pad()).logits, found)


@torch.no_grad()
def test_labels_have_the_means_of_the_heads_too(make_members, pad):
    models = make_members(**MULTI_LABEL)
    found = make_ensemble(models)(**pad()).logits
    expected = mean_probabilities(models, pad(), torch.sigmoid)
    torch.testing.assert_close(found.double().sigmoid(), expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_values_of_a_regression_are_means(make_members, pad):
    models = make_members(**REGRESSION)
    ensemble = make_ensemble(models)
    each = torch.stack([model(**pad()).logits for model in models])
    assert each.std(0).max() > 0.05
    torch.testing.assert_close(ensemble(**pad()).logits, each.mean(0))
    labels = torch.tensor([1.0, 5.0, 2.5])
    expected = ((each.mean(0)[:, 0] - labels) / 1.5).square().mean()
    torch.testing.assert_close(ensemble(**pad(), labels=labels).loss, expected)


@pytest.mark.parametrize(
    "problem, expected",
    [({}, [0.0, -600 - math.log(2), -300 - math.log(2)]), (MULTI_LABEL, [300 + math.log(2), -300 - math.log(2), 0.0])],
    ids=["classes", "labels"],
)
@torch.no_grad()
def test_heads_that_are_sure_keep_their_logits(make_model, pad, problem, expected):
    """Their probabilities are 0 and 1 in float32."""
    models = [make_model(head_type="linear", seed=seed, **problem) for seed in (0, 1)]
    for model, bias in zip(models, (300.0, 500.0)):
        model.head.affine.weight.zero_()
        model.head.affine.bias.copy_(torch.tensor([bias, -bias, 0.0]))
    torch.testing.assert_close(make_ensemble(models)(**pad()).logits[0], torch.tensor(expected))


@torch.no_grad()
def test_saved_and_loaded(make_members, pad, tmp_path):
    models = make_members()
    ensemble = make_ensemble(models)
    expected = ensemble(**pad()).logits
    ensemble.save_pretrained(tmp_path / "head")
    ensemble.save_pretrained(tmp_path / "whole", head_only=False)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("head", "whole")]
    assert sizes[0] < sizes[1] / 2
    for folder in ("head", "whole"):
        loaded = load(tmp_path / folder)
        assert torch.equal(loaded(**pad()).logits, expected)
        assert loaded.config.members == ensemble.config.members and loaded.config.averages == "classes"
    auto = AutoModelForSequenceClassification.from_pretrained(tmp_path / "head")
    assert torch.equal(auto(**pad()).logits, expected)
    states, masks = ensemble.compute_hidden_states(**pad())
    alone = load(tmp_path / "head", load_backbone=False)
    assert torch.equal(alone(hidden_states=states, attention_mask=masks[0]).logits, expected)
    with pytest.raises(ValueError, match=r"take the hidden states \[0, 1, 2\] of its own, and it has 2; exp"):
        load(tmp_path / "head", layers=[0, 1])
    with pytest.raises(ValueError, match="n_out is None, and EnsembleHead has no parts to stop at"):
        CapsuleHeadModel.from_pretrained(tmp_path / "head")


@torch.no_grad()
def test_heads_without_a_backbone(make_members, pad, tmp_path):
    models = make_members()
    expected = make_ensemble(models)(**pad()).logits
    states, masks = make_ensemble(models).compute_hidden_states(**pad())
    ensemble = make_ensemble([without_backbone(model) for model in models])
    assert ensemble.backbone is None
    assert torch.equal(ensemble(hidden_states=states, attention_mask=masks[0]).logits, expected)
    ensemble.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path)(**pad()).logits, expected)
    partly = make_ensemble([without_backbone(models[0]), *models[1:]])
    assert partly.backbone is models[1].backbone
    assert torch.equal(partly(**pad()).logits, expected)


def test_in_a_pipeline(make_members, tokenizer, tmp_path):
    models, text = make_members(), "the film was not dull"
    make_ensemble(models).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    classify = pipeline("text-classification", model=str(tmp_path), top_k=None)
    found = {answer["label"]: answer["score"] for answer in classify([text])[0]}
    (expected,) = mean_probabilities(models, tokenizer([text], return_tensors="pt"))
    assert [found[f"LABEL_{index}"] for index in range(3)] == pytest.approx(expected.tolist(), abs=1e-6)


@torch.no_grad()
def test_it_is_calibrated_as_any_model(make_members, pad, tmp_path):
    ensemble = make_ensemble([without_backbone(model) for model in make_members()])
    states = torch.randn(120, 4, 3, 16, generator=torch.Generator().manual_seed(0))
    before = ensemble(hidden_states=states, attention_mask=torch.ones(120, 4)).logits
    labels = np.where(np.arange(120) % 3 == 0, (before.argmax(-1) + 1) % 3, before.argmax(-1))  # less sure than it says
    arguments = CapsuleTrainingArguments(tmp_path, use_cpu=True, report_to="none", remove_unused_columns=False)
    columns = {"hidden_states": states.tolist(), "attention_mask": [[1.0] * 4] * 120, "labels": labels.tolist()}
    found = calibrate(CapsuleTrainer(ensemble, arguments), Dataset.from_dict(columns).with_format("torch"))
    assert found["temperature"] == ensemble.config.calibration_temperature != 1
    after = ensemble(hidden_states=states, attention_mask=torch.ones(120, 4)).logits
    torch.testing.assert_close(after, before / found["temperature"])


def test_it_is_not_trained_or_explained(make_members, pad, tokenizer, tmp_path):
    ensemble = make_ensemble(make_members())
    with pytest.raises(ValueError, match=r"^An EnsembleHead has no credits to explain; expected a classifier"):
        explain(ensemble, "the film", tokenizer)
    trainer = CapsuleTrainer(ensemble, CapsuleTrainingArguments(tmp_path, use_cpu=True, report_to="none"))
    with pytest.raises(
        ValueError, match=r'^head_type="ensemble_of_heads" cannot be trained: capsule_heads\.make_ensemble\('
    ):
        trainer.train()
    with pytest.raises(ValueError, match=r"heads are trained one by one, before capsule_heads\.make_ensemble"):
        ensemble.train()(**pad(), labels=torch.tensor([0, 1, 2]))


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda models: models[:1], ValueError, "^models is a list of 1; expected a list of two classifiers or more"),
        (
            lambda models: [models[0], models[1].head],
            TypeError,
            r"^models\[1\] is of class LinearHead and models\[0\] of Caps",
        ),
        (
            lambda models: [make_ensemble(models), models[0]],
            ValueError,
            r"^models\[0\] is an ensemble itself; pass",
        ),
    ],
)
def test_what_is_no_list_of_models(make_members, change, error, message):
    with pytest.raises(error, match=message):
        make_ensemble(change(make_members()))


@pytest.mark.parametrize(
    "field, value, message",
    [
        (
            "id2label",
            {0: "a", 1: "b", 2: "c"},
            r"has id2label {0: 'a', 1: 'b', 2: 'c'}, and models\[0\] has {0: 'LAB",
        ),
        ("problem_type", "multi_label_classification", r"has problem_type 'multi_label_classification', and models\[0"),
        ("base_model_name_or_path", "other", r"has base_model_name_or_path 'other', and models\[0\] has"),
        ("window_length", 9, r"has window_length 9, and models\[0\] has None"),
        ("freeze_backbone", False, r"has a backbone that trained with its head, or adapters in it; expected a frozen"),
    ],
)
def test_models_that_differ_in_more_than_heads(make_members, field, value, message):
    models = make_members()
    setattr(models[2].config, field, value)
    with pytest.raises(ValueError, match=rf"^models\[2\] {message}"):
        make_ensemble(models)


def test_models_whose_backbones_differ(make_members):
    models = make_members()
    with torch.no_grad():
        next(models[2].backbone.parameters()).add_(1)
    with pytest.raises(ValueError, match=r"^The backbones of the models have different weights; expected one frozen"):
        make_ensemble(models)


MEMBER = {"head_type": "linear", "options": {}, "layers": [0], "linear_term": False, "calibration_temperature": 1.0}


@pytest.mark.parametrize(
    "fields, message",
    [
        ({}, r"members is None; expected the descriptions of two heads or more: capsule_heads\.make_ensemble"),
        ({"members": [MEMBER, {}]}, "A member of an ensemble is {}; expected a dict of head_type, options, layers"),
        (
            {"members": [MEMBER, MEMBER | {"layers": [-1]}]},
            r"layers of a member is \[-1\]; expected what caps",
        ),
        ({"members": [MEMBER, MEMBER | {"head_type": "liner"}]}, "head_type is 'liner'; .* Did you mean linear?"),
        ({"members": [MEMBER, MEMBER], "linear_term": True}, 'linear_term is True, and the scores of head_type="ensem'),
    ],
)
def test_configurations_of_no_ensemble(fields, message):
    with pytest.raises(ValueError, match=message):
        CapsuleHeadConfig(head_type="ensemble_of_heads", **fields)


def test_its_card_and_its_code(make_members, make_model, tmp_path):
    models = [*make_members()[:2], make_model(seed=3, n_iters=2)]
    make_ensemble(models).save_pretrained(tmp_path)
    write_code(tmp_path)
    code = {path.name: path.read_text() for path in tmp_path.glob("*.py")}
    for name in ("TokenDepthHead", "LinearHead", "EnsembleHead", "LinearTerm"):
        assert f"class {name}(" in code["heads.py"]
    assert "class ScalarMixHead(" not in code["heads.py"] and "def credits" not in code["heads.py"]
    assert sum(len(text.splitlines()) for text in code.values()) <= 2000
    assert "AutoModel" not in json.loads((tmp_path / "config.json").read_text())["auto_map"]
    card = str(model_card(tmp_path, "me/x"))
    assert "An ensemble of 3 heads: 2 token_depth and 1 linear, whose probabilities are averaged, on the hidden" in card
    assert "| `members[1]` | linear: layers=[2], pooling=first, linear_term=False |" in card
    assert "token_depth: layers=[0, 1, 2], n_parts=6, n_iters=2, " in card and "## Explanations" not in card


@torch.no_grad()
def test_it_is_exported(make_members, pad):
    ensemble = make_ensemble(make_members()[1:])  # tests/models/test_export.py has the routing
    program = torch.export.export(ensemble, (), pad())
    torch.testing.assert_close(program.module()(**pad()).logits, ensemble(**pad()).logits)
