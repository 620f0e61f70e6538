"""Audio models: samples and spectra, masks mapped to frames, mixup, saving, the auto classes."""

import pytest
import torch
from configurations import small
from transformers import AutoConfig, AutoModel, AutoModelForAudioClassification

from capsule_heads import CapsuleHeadForAudioClassification, CapsuleHeadForSequenceClassification, CapsuleHeadModel
from capsule_heads.models import modeling_capsule_head

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
CONVOLUTIONS = {"conv_dim": (8, 8), "conv_kernel": (4, 4), "conv_stride": (2, 2), "num_conv_pos_embedding_groups": 2}
WAVES = {**SIZES, **CONVOLUTIONS, "num_conv_pos_embeddings": 4, "feat_extract_norm": "layer", "conv_bias": True}
BACKBONES = {
    "wav2vec2": WAVES,
    "hubert": WAVES,
    "wavlm": WAVES,
    "wav2vec2-bert": {**SIZES, "feature_projection_input_dim": 6, "conv_depthwise_kernel_size": 3},
    "whisper": {
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "num_mel_bins": 6,
        "max_source_positions": 20,
        "vocab_size": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
    },
}
LABELS = torch.tensor([0, 2])


@pytest.fixture(params=BACKBONES)
def audio_type(request):
    return request.param


@pytest.fixture
def make_audio_model(tmp_path, shake):
    def make(kind="wav2vec2", **kwargs):
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **BACKBONES[kind])
        shake(AutoModel.from_config(config), scale=0.05).save_pretrained(tmp_path / kind)
        model = CapsuleHeadForAudioClassification.from_backbone(tmp_path / kind, **small(**{"num_labels": 3, **kwargs}))
        shake(model.head)
        return model

    return make


def sound(kind, n=2):
    generator = torch.Generator().manual_seed(1)
    if kind == "whisper":
        return {"input_features": torch.randn(n, 6, 40, generator=generator)}
    if kind == "wav2vec2-bert":
        return {"input_features": torch.randn(n, 30, 6, generator=generator)}
    return {"input_values": torch.randn(n, 200, generator=generator)}


# What every backbone has to do


def test_hidden_states_of_every_layer_reach_the_head(audio_type, make_audio_model):
    model, inputs = make_audio_model(audio_type), sound(audio_type)
    outputs = model(**inputs, output_hidden_states=True)
    n_frames = {"whisper": 20, "wav2vec2-bert": 30}.get(audio_type, 48)
    assert [tuple(x.shape) for x in outputs.hidden_states] == [(2, n_frames, 16)] * 3
    assert outputs.logits.shape == (2, 3) and outputs.logits.isfinite().all()
    assert torch.equal(model(hidden_states=outputs.hidden_states).logits, outputs.logits)


def test_training_and_saving(audio_type, make_audio_model, tmp_path):
    model, inputs = make_audio_model(audio_type).train(), sound(audio_type)
    model(**inputs, labels=LABELS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.head.parameters())
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    expected = model.eval()(**inputs).logits
    for head_only in (True, False):
        model.save_pretrained(tmp_path / "saved", head_only=head_only)
        loaded = AutoModelForAudioClassification.from_pretrained(tmp_path / "saved")
        assert type(loaded) is CapsuleHeadForAudioClassification
        assert torch.equal(loaded(**inputs).logits, expected)
    parts = AutoModel.from_pretrained(tmp_path / "saved")
    assert isinstance(parts, CapsuleHeadModel) and parts(**inputs).poses.shape == (2, 6, 1, 2)


# Masks


@pytest.mark.parametrize("kind", ["wav2vec2", "hubert", "wav2vec2-bert"])
@pytest.mark.parametrize("length", [120, 121, 122, 123])
def test_a_padded_batch_equals_single_sounds(kind, length, make_audio_model):
    model, inputs = make_audio_model(kind), sound(kind)
    (name, x), length = next(iter(inputs.items())), length if kind != "wav2vec2-bert" else length - 100
    mask = torch.ones(x.shape[:2], dtype=torch.long)
    mask[1, length:] = 0
    x[1, length:] = 0
    logits = model(**{name: x}, attention_mask=mask).logits
    single = torch.cat([model(**{name: x[:1]}).logits, model(**{name: x[1:, :length]}).logits])
    torch.testing.assert_close(logits, single, rtol=0, atol=1e-5)
    assert (model(**{name: x}).logits - single)[1].abs().max() > 1e-4  # without a mask padding is sound


def test_a_mask_leaves_out_the_frames_of_padding(make_audio_model):
    model, inputs = make_audio_model("whisper"), sound("whisper")
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, 13:] = 0  # of the spectrum; 7 of 20 frames are left
    states = model(**inputs, output_hidden_states=True).hidden_states
    left = model(hidden_states=[x[1:, :7] for x in states]).logits
    torch.testing.assert_close(model(**inputs, attention_mask=mask).logits[1:], left, rtol=0, atol=1e-5)


def test_mixup_mixes_states_masks_and_targets(make_audio_model, monkeypatch):
    model, inputs = make_audio_model("wav2vec2", mixup_alpha=0.2).train(), sound("wav2vec2")
    mask = torch.ones(2, 200, dtype=torch.long)
    mask[1, 100:] = 0
    drawn = (torch.tensor([0.75, 0.5]), torch.tensor([1, 0]))
    monkeypatch.setattr(modeling_capsule_head, "draw_mixup", lambda *args: drawn)
    loss = model(**inputs, attention_mask=mask, labels=LABELS).loss
    model.eval()
    seen = {}
    hook = model.head.register_forward_pre_hook(lambda module, args: seen.update(states=args[0], masks=args[1]))
    model(**inputs, attention_mask=mask)
    hook.remove()
    mixed = [[x * r + x[[1, 0]] * (1 - r) for x in seen[name] for r in [drawn[0].view(-1, *[1] * (x.ndim - 1))]]
             for name in ("states", "masks")]  # fmt: skip
    log_p = model.head(*mixed).a_out.log_softmax(-1)
    targets = torch.tensor([[0.75, 0, 0.25], [0.5, 0, 0.5]])
    torch.testing.assert_close(loss, -(targets * log_p).sum(-1).mean())


# Refusals


def test_one_input_is_expected(make_audio_model):
    model = make_audio_model("wav2vec2")
    with pytest.raises(ValueError, match="Pass one of input_values, input_features"):
        model(**sound("wav2vec2"), **sound("whisper"))


def test_a_text_model_is_no_audio_backbone(backbone_dir, tmp_path):
    with pytest.raises(
        ValueError, match="bert takes input_ids; expected a backbone that takes input_values or input_features"
    ):
        CapsuleHeadForAudioClassification.from_backbone(backbone_dir("bert"))
    AutoModel.from_config(AutoConfig.for_model("hubert", **WAVES)).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"hubert takes input_values.*for audio there is CapsuleHeadForAudioClassification"
    ):
        CapsuleHeadForSequenceClassification.from_backbone(tmp_path)
