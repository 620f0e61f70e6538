"""Which part of a model is the backbone: a stack of an encoder-decoder, a tower of several, packed patches."""

import pytest
import torch
from configurations import make_config
from tiny_backbones import tiny_config
from transformers import AutoConfig, AutoModel, BartConfig, CLIPConfig, FunnelConfig, T5Config, T5EncoderModel

from capsule_heads import CapsuleHeadForImageClassification, CapsuleHeadForSequenceClassification
from capsule_heads.backbones import Backbone, Part

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
T5 = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 2}
BART = {
    "vocab_size": 64,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 40,
}
ENCODER_DECODERS = {"t5": (T5Config, T5), "bart": (BartConfig, BART)}
TWO_TOWERS = {
    "text_config": {**SIZES, "vocab_size": 64, "max_position_embeddings": 40, "eos_token_id": 2},
    "vision_config": {**SIZES, "image_size": 16, "patch_size": 8},
    "projection_dim": 8,
}
HEAD = {"d_inp": 8, "n_parts": 6, "num_labels": 3}


@pytest.fixture
def save(tmp_path, shake):
    """Saves a whole model with random weights and returns it and its directory."""

    def save_whole(config):
        torch.manual_seed(0)
        whole = shake(AutoModel.from_config(config), scale=0.05).eval()
        whole.save_pretrained(tmp_path / "whole")
        return whole, tmp_path / "whole"

    return save_whole


def check_saving(model, inputs, tmp_path, ways=(True, False)):
    for head_only in ways:
        model.save_pretrained(tmp_path / "saved", head_only=head_only)
        loaded = type(model).from_pretrained(tmp_path / "saved")
        assert loaded.config.backbone.part == model.config.backbone.part
        assert loaded.backbone.state_dict().keys() == model.backbone.state_dict().keys()
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


# Encoder-decoders


@pytest.mark.parametrize("kind", ENCODER_DECODERS)
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_the_states_are_those_of_the_stack(kind, stack, save, pad, ids, tmp_path):
    config_class, sizes = ENCODER_DECODERS[kind]
    whole, directory = save(config_class(**sizes))
    model = CapsuleHeadForSequenceClassification.from_backbone(directory, stack=stack, **HEAD)
    states = model(input_ids=ids[0][None], output_hidden_states=True).hidden_states
    start = torch.tensor([getattr(whole.config, "decoder_start_token_id", whole.config.pad_token_id)])
    shifted = torch.cat([start, ids[0][:-1]])[None]
    with torch.no_grad():
        outputs = whole(input_ids=ids[0][None], decoder_input_ids=shifted, output_hidden_states=True)
    expected = outputs.encoder_hidden_states if stack == "encoder" else outputs.decoder_hidden_states
    last = outputs.encoder_last_hidden_state if stack == "encoder" else outputs.last_hidden_state
    assert model.config.hidden_sizes == [16] * len(expected) == [16] * (3 if stack == "encoder" else 4)
    assert all(torch.equal(x, y) for x, y in zip(states, [*expected[:-1], last], strict=True))
    check_saving(model, {"input_ids": ids[0][None]}, tmp_path)


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_of_an_encoder_decoder(stack, side, save, pad, ids):
    _, directory = save(T5Config(**T5))
    model = CapsuleHeadForSequenceClassification.from_backbone(directory, stack=stack, **HEAD)
    single = torch.cat([model(input_ids=sequence[None]).logits for sequence in ids])
    torch.testing.assert_close(model(**pad(side)).logits, single, rtol=0, atol=1e-5)


def test_the_encoder_alone_is_kept(save):
    whole, directory = save(T5Config(**T5))
    model = CapsuleHeadForSequenceClassification.from_backbone(directory, freeze_backbone=False, **HEAD)
    assert model.backbone.state_dict().keys() == T5EncoderModel(whole.config).encoder.state_dict().keys()
    model.train()(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([1])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert make_config(T5Config(**T5)).hidden_sizes == [16] * 3
    assert make_config(T5Config(**T5), stack="decoder").hidden_sizes == [16] * 4


def test_a_stack_that_is_none(backbone_config):
    with pytest.raises(ValueError, match="stack is 'both'; expected one of encoder, decoder"):
        make_config(T5Config(**T5), stack="both")
    with pytest.raises(ValueError, match=r'stack is "decoder", but bert is no encoder-decoder.*leave stack out'):
        CapsuleHeadForSequenceClassification.from_backbone(backbone_config("bert"), stack="decoder")


# Towers


def test_of_two_towers_the_text_tower_is_taken(save, ids, pad, tmp_path):
    whole, directory = save(CLIPConfig(**TWO_TOWERS))
    model = CapsuleHeadForSequenceClassification.from_backbone(directory, **HEAD)
    with torch.no_grad():
        expected = whole.text_model(input_ids=ids[0][None], output_hidden_states=True)
    states = model(input_ids=ids[0][None], output_hidden_states=True).hidden_states
    assert torch.equal(states[0], expected.hidden_states[0]) and torch.equal(states[-1], expected.last_hidden_state)
    single = torch.cat([model(input_ids=sequence[None]).logits for sequence in ids])
    torch.testing.assert_close(model(**pad("right")).logits, single, rtol=0, atol=1e-5)
    check_saving(model, {"input_ids": ids[0][None]}, tmp_path)


@pytest.mark.parametrize(
    ("cls", "tower"), [(CapsuleHeadForSequenceClassification, "text"), (CapsuleHeadForImageClassification, "vision")]
)
def test_a_tower_without_a_class_of_its_own_is_taken_out_of_the_whole(cls, tower, save, ids, tmp_path):
    whole, directory = save(tiny_config("owlvit"))
    model = cls.from_backbone(directory, **HEAD)
    assert model.config.backbone.part == Part("encoder", tower) and model.config.base_config.model_type == "owlvit"
    if tower == "text":
        inputs = {"input_ids": ids[0][None]}
        assert model.config.get_text_config() is model.config.base_config.text_config
    else:
        inputs = {"pixel_values": torch.rand(1, 3, *[whole.config.vision_config.image_size] * 2)}
    check_saving(model, inputs, tmp_path)


def test_a_tower_that_is_none(backbone_config):
    with pytest.raises(ValueError, match="tower is 'audio'; expected None, or a tower of clip, which has text, vision"):
        make_config(CLIPConfig(**TWO_TOWERS), tower="audio")
    with pytest.raises(ValueError, match="tower is 'text'; expected None, or a tower of bert, which has none"):
        make_config(backbone_config("bert"), tower="text")
    with pytest.raises(ValueError, match="tower is 'vision'; expected None, or a tower of bert, which has none"):
        Backbone(backbone_config("bert"), part=Part(tower="vision")).build()


# Token counts and widths that differ


def test_token_counts_that_vary_with_layer(save, pad, ids):
    config = FunnelConfig(
        vocab_size=64, block_sizes=[1, 1], d_model=16, n_head=2, d_head=8, d_inner=24, architectures=["FunnelBaseModel"]
    )
    torch.manual_seed(0)
    model = CapsuleHeadForSequenceClassification.from_backbone(config, **HEAD)
    batch = pad("right")
    states = model(**batch, output_hidden_states=True).hidden_states
    assert len({x.shape[1] for x in states}) > 1 and model(**batch).logits.isfinite().all()


def test_packed_patches_are_split_by_their_grids(tmp_path):
    sizes = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4}
    config = AutoConfig.for_model("qwen2_5_vl_vision", **sizes, out_hidden_size=16, fullatt_block_indexes=[1])
    model = CapsuleHeadForImageClassification.from_backbone(config, **HEAD)
    grids = torch.tensor([[1, 2, 4], [1, 4, 4]])
    pixels = torch.randn(24, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(0))
    outputs = model(pixels, image_grid_thw=grids, output_hidden_states=True)
    assert {tuple(x.shape) for x in outputs.hidden_states} == {(2, 16, 16)}
    single = [model(pixels[:8], image_grid_thw=grids[:1]), model(pixels[8:], image_grid_thw=grids[1:])]
    torch.testing.assert_close(outputs.logits, torch.cat([x.logits for x in single]), rtol=0, atol=1e-5)
    model.train()(pixels, image_grid_thw=grids, labels=torch.tensor([0, 2])).loss.backward()
    check_saving(model.eval(), {"pixel_values": pixels, "image_grid_thw": grids}, tmp_path, ways=[False])
