"""The variants of the capsule head that compare_heads.py measures."""

import pytest
import torch
from configurations import make_config
from transformers import BertConfig
from variants import VARIANTS, register_variants

from capsule_heads import CapsuleHeadForSequenceClassification

STATES = [torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(n)) for n in range(4)]
MASK = torch.tensor([[1.0] * 5, [1.0] * 3 + [0.0] * 2])
AS_IT_IS = {"head_type": "token_depth"}


@pytest.fixture(autouse=True)
def registered(own_registry):
    register_variants()


def make(fields):
    torch.manual_seed(0)
    fields = {"hidden_sizes": [8] * 4, "num_labels": 3, "d_inp": 8, "n_parts": 6, **fields}
    model = CapsuleHeadForSequenceClassification(make_config(BertConfig(), head_only=True, **fields), build=False)
    return model.eval()


@torch.no_grad()
def shaken(fields):
    model = make(fields)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return model


def scores(model):
    states = [STATES[layer] for layer in model.config.layers]
    return model(hidden_states=states, attention_mask=MASK).logits


@pytest.mark.parametrize("name", VARIANTS)
def test_what_trains_has_a_gradient(name):
    model = shaken(VARIANTS[name]).train()
    (scores(model) * torch.randn(2, 3)).sum().backward()
    for key, parameter in model.named_parameters():
        assert not parameter.requires_grad or (parameter.grad.isfinite().all() and parameter.grad.any()), key


@pytest.mark.parametrize("name", VARIANTS)
def test_padding_changes_nothing(name):
    model = shaken(VARIANTS[name])
    states = [STATES[layer][1:, :3] for layer in model.config.layers]
    alone = model(hidden_states=states, attention_mask=MASK[1:, :3]).logits
    torch.testing.assert_close(alone, scores(model)[1:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_starts_as_the_head_itself():
    """A learned prior and temperature, with a prior of 0 and a factor of 1."""
    usual, variant = shaken(AS_IT_IS), make(VARIANTS["learned prior and temperature"])
    missing = variant.load_state_dict(usual.state_dict(), strict=False).missing_keys
    assert missing == ["head.log_prior", "head.factor"]
    torch.testing.assert_close(scores(variant), scores(usual), rtol=1e-4, atol=1e-5)
    variant.head.factor.fill_(0.5)
    assert not torch.allclose(scores(variant), scores(usual), rtol=1e-2)


@torch.no_grad()
def test_benefits_that_do_not_depend_on_content_are_those_of_the_head():
    usual, variant = shaken(AS_IT_IS), make(VARIANTS["benefits that depend on content"])
    variant.load_state_dict(usual.state_dict(), strict=False)
    routing = usual.head.routings[0]
    n = 5 * len(STATES)  # inputs of the first text
    for layer, beta in ((variant.head.use, routing.beta_use), (variant.head.ignore, routing.beta_ign)):
        layer.weight.zero_()
        layer.bias.copy_(n * beta[0])
    torch.testing.assert_close(scores(variant)[0], scores(usual)[0], rtol=1e-4, atol=1e-5)
    layer.weight.fill_(0.1)
    assert not torch.allclose(scores(variant)[0], scores(usual)[0], rtol=1e-2)


def test_initial_weights():
    assert make(VARIANTS["random initial betas"]).head.routings[1].beta_use.std() > 0.5
    assert (make(VARIANTS["initial betas of classes at one"]).head.routings[1].beta_ign == 1).all()
    W = make(VARIANTS["orthogonal initial votes"]).head.routings[0].W[0]  # 6 parts of 8 x 2: rows are orthogonal
    flat = W.movedim(0, 1).flatten(1)
    product = flat @ flat.mT
    torch.testing.assert_close(product, torch.eye(8) * product[0, 0], rtol=1e-4, atol=1e-5)
    usual = make(AS_IT_IS).head.routings[0].W
    torch.testing.assert_close(W.norm(), usual.norm(), rtol=0.3, atol=0.0)


def test_layers_are_dropped_in_training_alone():
    model = shaken(VARIANTS["layer dropout, 0.1"])
    assert torch.equal(scores(model), scores(model))
    model.train()
    torch.manual_seed(0)
    assert len({scores(model).sum().item() for _ in range(20)}) > 1
