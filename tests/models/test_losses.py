"""Losses of the three problem types, the labels they take, and mixup."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from configurations import make_config

from capsule_heads.heads.values import N_REGRESSION_CAPSULES
from capsule_heads.models import modeling_capsule_head
from capsule_heads.models.losses import check_labels, infer_problem_type, problem_loss, problem_targets

REGRESSION = {"num_labels": 1, "label_mean": 3.0, "label_std": 1.5}
MULTI_LABEL = {"problem_type": "multi_label_classification"}


@pytest.fixture
def config(backbone_config):
    """A configuration: `config(**fields)`, of three labels unless it is said otherwise."""
    return lambda **fields: make_config(backbone_config("bert"), **{"num_labels": 3, **fields})


@pytest.fixture
def logits():
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


def loss_of(config, logits, labels):
    targets = problem_targets(config, config.problem_type, labels)
    return problem_loss(config, config.problem_type, logits, targets)


# The functions


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 0.0]])
def test_cross_entropy(config, logits, weights):
    config = config(class_weights=weights, problem_type="single_label_classification")
    labels = torch.tensor([0, 1, 2, 1, 0])
    expected = F.cross_entropy(logits, labels, weight=None if weights is None else torch.tensor(weights))
    torch.testing.assert_close(
        loss_of(config, logits, labels),
        expected,
    )


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0]])
def test_cross_entropy_of_mixed_targets(config, logits, weights):
    config = config(class_weights=weights, problem_type="single_label_classification")
    targets = torch.rand(5, 3, generator=torch.Generator().manual_seed(1)).softmax(-1)
    per_class = targets * torch.tensor(weights or [1.0] * 3)
    expected = (per_class * -logits.log_softmax(-1)).sum() / per_class.sum()
    torch.testing.assert_close(problem_loss(config, config.problem_type, logits, targets), expected)
    if weights is None:
        torch.testing.assert_close(expected, F.cross_entropy(logits, targets))


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0]])
def test_binary_cross_entropy(config, logits, weights):
    config = config(class_weights=weights, **MULTI_LABEL)
    labels = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0], [1, 0, 0]])
    weight = None if weights is None else torch.tensor(weights)
    expected = F.binary_cross_entropy_with_logits(logits, labels.float(), weight=weight)
    for given in (labels, labels.float(), labels.bool()):
        torch.testing.assert_close(
            loss_of(config, logits, given),
            expected,
        )


def test_squared_error_in_units_of_the_labels_deviation(config):
    config = config(**REGRESSION)
    values, labels = torch.tensor([[2.0], [4.0]]), torch.tensor([5.0, 4.0])
    expected = torch.tensor((((2.0 - 5.0) / 1.5) ** 2 + 0) / 2)
    for given in (labels, labels[:, None]):
        torch.testing.assert_close(
            loss_of(config, values, given),
            expected,
        )


@pytest.mark.parametrize(
    ("fields", "labels", "expected"),
    [
        ({}, torch.tensor([0, 1]), "single_label_classification"),
        ({}, torch.ones(2, 3), "multi_label_classification"),
        ({"num_labels": 1}, torch.tensor([0, 1]), "regression"),
        ({"problem_type": "regression"}, torch.ones(2, 3), "regression"),
        (MULTI_LABEL, torch.ones(2, 3, dtype=torch.long), "multi_label_classification"),
    ],
)
def test_the_problem_type_is_inferred_from_the_labels_dtype(config, fields, labels, expected):
    assert infer_problem_type(config(**fields), labels) == expected


@pytest.mark.parametrize(
    ("problem_type", "n", "labels", "message"),
    [
        ("single_label_classification", 3, torch.tensor([0, 3]), "labels go from 0 to 3; num_labels=3 expects class"),
        ("single_label_classification", 3, torch.tensor([-100, 1]), "labels go from -100 to 1; num_labels=3"),
        ("single_label_classification", 3, torch.ones(2), "labels are torch.float32 of shape (2,); single-label"),
        ("single_label_classification", 3, torch.ones(2, 3).long(), "labels are torch.int64 of shape (2, 3)"),
        (
            "single_label_classification",
            3,
            torch.ones(2).to(torch.complex64),
            "labels are torch.complex64 of shape (2,)",
        ),
        ("single_label_classification", 3, torch.ones(0).long(), "labels are of no sample"),
        ("multi_label_classification", 2, torch.tensor([[0.0, 2]]), "labels go from 0.0 to 2.0; multi_label"),
        ("multi_label_classification", 2, torch.tensor([[0.0, math.nan]]), "labels go from nan to nan; multi_label"),
        ("regression", 1, torch.tensor([1.0, math.nan]), "labels go from nan to nan; regression expects"),
        ("regression", 1, torch.tensor([1.0, -math.inf]), "labels go from -inf to 1.0; regression expects finite"),
        ("multi_label_classification", 3, torch.ones(2), "labels have shape (2,); multi_label_classification expects"),
        ("multi_label_classification", 3, torch.ones(2, 2), "labels have shape (2, 2)"),
        ("multi_label_classification", 1, torch.ones(2), "labels have shape (2,)"),
        ("regression", 1, torch.ones(2, 2), "labels have shape (2, 2); regression expects [batch, 1]"),
        ("regression", 2, torch.ones(2), "labels have shape (2,); regression expects [batch, 2]"),
    ],
)
def test_wrong_labels_are_refused(problem_type, n, labels, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_labels(problem_type, n, labels)


# In the model


def test_the_models_loss_is_that_of_its_logits(make_model, pad):
    labels = torch.tensor([2, 0, 1])
    outputs = make_model()(**pad(), labels=labels)
    torch.testing.assert_close(outputs.loss, F.cross_entropy(outputs.logits, labels))
    outputs = make_model(class_weights=[1.0, 2.0, 3.0])(**pad(), labels=labels)
    expected = F.cross_entropy(outputs.logits, labels, weight=torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(outputs.loss, expected)
    labels = torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 0]])
    outputs = make_model()(**pad(), labels=labels)
    torch.testing.assert_close(outputs.loss, F.binary_cross_entropy_with_logits(outputs.logits, labels))


def test_regression_reads_values_from_poses_in_the_labels_unit(make_model, pad):
    model = make_model(**REGRESSION)
    labels = torch.tensor([1.0, 5.0, 2.5])
    outputs = model(**pad(), labels=labels, output_capsules=True)
    assert outputs.poses.shape == (3, N_REGRESSION_CAPSULES, 1, 2)
    expected = 3.0 + 1.5 * (outputs.poses.flatten(1) @ model.regressor.weight.T + model.regressor.bias)
    torch.testing.assert_close(outputs.logits, expected)
    torch.testing.assert_close(outputs.loss, F.mse_loss(outputs.logits[:, 0] / 1.5, labels / 1.5))


def test_regression_of_several_values(make_model, pad):
    model = make_model(num_labels=2, problem_type="regression")
    labels = torch.randn(3, 2)
    outputs = model(**pad(), labels=labels)
    assert outputs.logits.shape == (3, 2)
    torch.testing.assert_close(outputs.loss, F.mse_loss(outputs.logits, labels))


def test_the_problem_type_is_that_of_the_labels_and_leaves_no_trace(make_model, pad):
    """A forward pass changes no configuration: CapsuleTrainer does, with the first labels that it sees."""
    model = make_model()
    before = model.config.to_dict()
    multi_label, single_label = torch.ones(3, 3), torch.tensor([0, 1, 2])
    logits = model(**pad()).logits
    found = model(**pad(), labels=multi_label).loss
    torch.testing.assert_close(found, F.binary_cross_entropy_with_logits(logits, multi_label))
    torch.testing.assert_close(model(**pad(), labels=single_label).loss, F.cross_entropy(logits, single_label))
    with pytest.raises(ValueError, match="multi_label_classification expects"):
        model(**pad(), labels=torch.ones(3))  # a mistake: the classes as floats
    assert model.config.to_dict() == before and model.config.problem_type is None


@pytest.mark.parametrize(
    ("fields", "labels"),
    [
        ({}, torch.tensor([0, 1, 2])),
        ({"class_weights": [1.0, 2.0, 3.0]}, torch.tensor([0, 1, 2])),
        (MULTI_LABEL, torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 0]])),
        (REGRESSION, torch.tensor([1.0, 5.0, 2.5])),
    ],
)
@pytest.mark.parametrize("mixup_alpha", [0.0, 0.2])
def test_every_parameter_of_the_head_gets_a_gradient(make_model, pad, fields, labels, mixup_alpha):
    model = make_model(mixup_alpha=mixup_alpha, **fields).train()
    model(**pad(), labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


# Mixup

RATIO, PARTNER = torch.tensor([0.9, 0.3, 0.6]), torch.tensor([2, 0, 1])


@pytest.fixture
def fixed_mixup(monkeypatch):
    """Fixes what mixup draws, and records for which batches and alphas it was asked to."""
    calls = []

    def draw(n_samples, alpha, device):
        calls.append((n_samples, alpha))
        return RATIO.to(device), PARTNER.to(device)

    monkeypatch.setattr(modeling_capsule_head, "draw_mixup", draw)
    return calls


@pytest.mark.parametrize(
    ("fields", "labels", "targets"),
    [
        ({"class_weights": [1.0, 2.0, 3.0]}, torch.tensor([0, 1, 2]), torch.eye(3)),
        (MULTI_LABEL, torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 0]]), None),
        (REGRESSION, torch.tensor([1.0, 5.0, 2.5]), torch.tensor([[-2 / 1.5], [2 / 1.5], [-0.5 / 1.5]])),
    ],
)
def test_mixup_mixes_states_mask_and_targets(make_model, pad, fixed_mixup, fields, labels, targets):
    model = make_model(mixup_alpha=0.3, **fields).train()
    batch = pad()
    outputs = model(**batch, labels=labels)
    assert fixed_mixup == [(3, 0.3)]

    def mixed(x):
        ratio = RATIO.view(-1, *[1] * (x.ndim - 1))
        return ratio * x + (1 - ratio) * x[PARTNER]

    states = [mixed(x) for x in model.eval()(**batch, output_hidden_states=True).hidden_states]
    logits = model._logits(model.head(states, mixed(batch["attention_mask"].float())), None)
    torch.testing.assert_close(outputs.logits, logits)
    expected = problem_loss(
        model.config, model.config.problem_type, logits, mixed(labels if targets is None else targets)
    )
    torch.testing.assert_close(outputs.loss, expected)
    unmixed = model(**batch, labels=labels)
    assert abs(unmixed.loss - outputs.loss) > 1e-3


def test_mixup_is_for_training_with_labels_only(make_model, pad, fixed_mixup):
    labels = torch.tensor([0, 1, 2])
    model = make_model(mixup_alpha=0.2)
    expected = model(**pad(), labels=labels).logits
    assert torch.equal(model.train()(**pad()).logits, expected)
    model.config.mixup_alpha = 0.0
    assert torch.equal(model(**pad(), labels=labels).logits, expected)
    assert fixed_mixup == []
    model.config.mixup_alpha = 0.2
    assert not torch.equal(model(**pad(), labels=labels).logits, expected)


def test_mixup_of_hidden_states_that_are_given(make_model, pad, fixed_mixup):
    model, batch, labels = make_model(), pad(), torch.tensor([0, 1, 2])
    states = torch.stack(model(**batch, output_hidden_states=True).hidden_states, dim=2)
    model.train()
    expected = model(**batch, labels=labels).loss
    given = model(hidden_states=states, attention_mask=batch["attention_mask"], labels=labels).loss
    assert torch.equal(given, expected)
