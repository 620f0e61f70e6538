"""Credits traced through backbones: the rules against a backbone written out, and that all adds up."""

import math

import pytest
import torch
from torch import nn
from transformers import SwinConfig, ViTConfig

from capsule_heads import CapsuleHeadForImageClassification, CapsuleHeadForSequenceClassification
from capsule_heads.explain import explain, tracing

TEXTS = ["the film is not good", "dull"]
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def half(x):
    return x / 2 + (x / 2).detach()


def layer_of_bert(x, layer, n_heads):
    """A layer of BERT, with the rules of tracing as constants and halves."""

    def normalise(x, norm):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt().detach() * norm.weight + norm.bias

    own = layer.attention.self
    query, key, value = (f(x).unflatten(-1, (n_heads, -1)).transpose(1, 2) for f in (own.query, own.key, own.value))
    scores = half(query @ key.mT) / math.sqrt(query.shape[-1])
    mixed = half(scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
    x = normalise(layer.attention.output.dense(mixed) + x, layer.attention.output.LayerNorm)
    inner = layer.intermediate.dense(x)
    active = inner * (nn.functional.gelu(inner) / inner).detach()
    return normalise(layer.output.dense(active) + x, layer.output.LayerNorm)


def test_credits_are_gradient_x_input_of_a_backbone_written_out(backbone_dir, shake, tokenizer):
    model = CapsuleHeadForSequenceClassification.from_backbone(backbone_dir(), num_labels=3, head_type="linear")
    shake(model, scale=0.3)
    model.double().eval()
    batch = tokenizer(TEXTS[0], return_tensors="pt")
    (found,) = explain(model, batch, through_backbone=True)
    with torch.no_grad():
        embeddings = model.backbone.embeddings(batch["input_ids"], batch["token_type_ids"])
    x = embeddings.requires_grad_()
    for layer in model.backbone.encoder.layer:
        x = layer_of_bert(x, layer, model.config.base_config.num_attention_heads)
    logits = model.head.affine(x.mean(1))[0]
    torch.testing.assert_close(found.logits.double(), logits.detach(), rtol=1e-5, atol=1e-6)
    slopes = (torch.autograd.grad(logit, embeddings, retain_graph=True)[0][0] for logit in logits)
    expected = torch.stack([(slope * embeddings[0]).sum(-1) for slope in slopes], dim=-1).detach()
    torch.testing.assert_close(found.by_token().double(), expected, rtol=1e-4, atol=1e-5)
    assert expected.abs().max() > 1e-2


@pytest.mark.parametrize("head_type", ["token_depth", "attentive_pooling"])
def test_at_the_embeddings_there_is_nothing_to_trace(make_model, tokenizer, head_type):
    model = make_model(head_type=head_type, layers=[0])
    explanations = explain(model, TEXTS, tokenizer, through_backbone=True)
    for found, expected in zip(explanations, explain(model, TEXTS, tokenizer)):
        torch.testing.assert_close(found.by_token(), expected.by_token())
        torch.testing.assert_close(found.baseline, expected.baseline, rtol=0, atol=1e-4)


@pytest.mark.parametrize("has_term", [False, True])
@pytest.mark.parametrize("kind", ["albert", "bert", "distilbert", "gpt2", "llama", "modernbert", "qwen3"])
def test_traced_credits_add_up(make_model, shake, tokenizer, kind, has_term):
    model = make_model(kind, calibration_temperature=1.7)
    if has_term:
        model.add_linear_term()
        shake(model.linear_term)
    implementation, hooks = model.backbone.config._attn_implementation, count_hooks(model)
    together = explain(model, TEXTS, tokenizer, through_backbone=True)
    assert (model.backbone.config._attn_implementation, count_hooks(model)) == (implementation, hooks)
    for text, found in zip(TEXTS, together):
        (usual,) = explain(model, text, tokenizer)
        torch.testing.assert_close(found.logits, usual.logits, rtol=1e-5, atol=1e-5)  # with other attention
        assert found.layers == (0,) and len(found.by_word()) == len(text.split())
        torch.testing.assert_close(found.baseline + found.by_token().sum(0), found.logits)
        assert (found.by_token() - usual.by_token()).abs().max() > 1e-4
        (alone,) = explain(model, text, tokenizer, through_backbone=True)
        torch.testing.assert_close(found.by_token(), alone.by_token(), rtol=1e-3, atol=1e-4)  # without padding
    assert all(parameter.grad is None for parameter in model.parameters())


def count_hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def test_patches_are_traced(shake):
    torch.manual_seed(0)
    backbone = ViTConfig(image_size=24, patch_size=8, **SMALL)
    model = CapsuleHeadForImageClassification.from_backbone(
        backbone, num_labels=3, d_inp=8, n_parts=6, freeze_backbone=False
    )
    shake(model.head)
    pixels = {"pixel_values": torch.rand(2, 3, 24, 24)}
    for found, usual in zip(explain(model, pixels, through_backbone=True), explain(model, pixels)):
        torch.testing.assert_close(found.logits, usual.logits)
        assert found.by_token().shape == (10, 3)
        torch.testing.assert_close(found.baseline + found.by_token().sum(0), found.logits)
    assert not pixels["pixel_values"].requires_grad


def test_what_cannot_be_traced(make_model, tokenizer, shake):
    def refused(model, reason, inputs=TEXTS, **options):
        with pytest.raises(ValueError, match=rf"through_backbone is True, and the model {reason}.*leave through_b"):
            explain(model, inputs, tokenizer, through_backbone=True, **options)

    refused(make_model("mamba"), "has a mamba backbone, whose attention transformers cannot exchange")
    windows = {"window_length": 8, "window_overlap": 2, "window_special_tokens": (1, 1)}
    refused(make_model(**windows), "cuts texts into windows")
    model = make_model()
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    states, _ = model.compute_hidden_states(**batch)
    hooks = count_hooks(model)
    of_states = {"hidden_states": states, "attention_mask": batch["attention_mask"]}
    refused(model, "was given hidden states", of_states)
    with pytest.raises(ValueError, match="parts_only and through_backbone are True; expected one of them"):
        explain(model, TEXTS, tokenizer, through_backbone=True, parts_only=True)
    with pytest.raises(ValueError, match=r"99 .*40"):
        explain(model, {"input_ids": torch.ones(1, 99, dtype=torch.long)}, tokenizer, through_backbone=True)
    assert count_hooks(model) == hooks and model.backbone.config._attn_implementation == "sdpa"
    swin = SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2)
    hierarchical = CapsuleHeadForImageClassification.from_backbone(
        swin, num_labels=3, d_inp=8, n_parts=6, freeze_backbone=False
    )
    shake(hierarchical.head)
    refused(hierarchical, "has a backbone whose layers", {"pixel_values": torch.rand(1, 3, 32, 32)})


@pytest.mark.parametrize(("kind", "names"), [("llama", ["gate_proj", "up_proj"]), ("modernbert", ["Wi"]), ("bert", [])])
def test_layers_that_are_multiplied_are_halved(make_model, kind, names):
    model = make_model(kind)
    of_modules = {module: name.rpartition(".")[2] for name, module in model.named_modules()}
    found = [of_modules[module] for module, hook in tracing._rules(model) if hook is tracing._halved]
    assert found == names * 2  # layers


def test_an_up_projection_without_a_gate_is_not_halved():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.up_proj, self.act = nn.Linear(2, 2), nn.GELU()

    layer = Layer()
    assert [hook for _, hook in tracing._rules(layer)] == [tracing._scaled]
