"""How many tokens a backbone takes: one number, the same from a module and from a configuration, and it is true."""

import pytest
import torch
from transformers import AutoConfig, AutoModel

from capsule_heads.backbones.limits import find_positions, find_token_limit
from capsule_heads.backbones.running import all_hidden_states
from capsule_heads.data import window_fields

SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
GPT = {"vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 40}
BART = {"vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 40}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
FSMT = {**BART, "langs": ["en", "de"], "src_vocab_size": 64, "tgt_vocab_size": 64}
LIMITS = {
    "bert": (SMALL, 40),
    "roberta": (SMALL, 38),  # positions 0 and 1 are for padding
    "xlm-roberta": ({**SMALL, "pad_token_id": 3}, 36),
    "mpnet": (SMALL, 38),
    "esm": ({**SMALL, "position_embedding_type": "absolute", "mask_token_id": 3}, 38),
    "ibert": (SMALL, 38),  # a table of its own class
    "nystromformer": ({**SMALL, "num_landmarks": 4, "segment_means_seq_len": 4}, 40),  # two rows more
    "opt": ({**SMALL, "ffn_dim": 24, "word_embed_proj_dim": 16}, 40),  # two rows more, and an offset
    "bart": (BART, 40),
    "gpt2": (GPT, 40),
    "gptj": ({**GPT, "rotary_dim": 4}, 40),  # a buffer of sines
    "ctrl": ({**GPT, "dff": 24}, 40),
    "clip_text_model": ({**SMALL, "projection_dim": 16}, 40),
    "fsmt": (FSMT, None),  # a table that grows
    "xglm": ({**SMALL, "d_model": 16, "num_layers": 1, "attention_heads": 2, "ffn_dim": 24}, None),
    "llama": ({**SMALL, "num_key_value_heads": 1, "head_dim": 8}, None),
    "modernbert": (SMALL, None),
}


@pytest.mark.parametrize("model_type", LIMITS)
def test_a_backbone_takes_as_many_tokens_as_its_limit_says_and_no_more(model_type):
    fields, limit = LIMITS[model_type]
    config = AutoConfig.for_model(model_type, **fields)
    backbone = AutoModel.from_config(config).eval()
    found = find_positions(backbone)
    assert (found and found.n_tokens) == limit
    assert find_token_limit(config) == limit
    with torch.no_grad():
        backbone(input_ids=torch.full((1, limit or 100), 7))
        if limit is not None:
            with pytest.raises((IndexError, RuntimeError, ValueError)):
                backbone(input_ids=torch.full((1, limit + 1), 7))


def test_more_tokens_than_roberta_takes_are_refused_in_one_sentence(make_model):
    model = make_model("roberta")
    assert model(input_ids=torch.full((2, 38), 7)).logits.isfinite().all()
    for length in (39, 40, 41):
        with pytest.raises(ValueError, match=rf"texts have {length} tokens, .* roberta .* has positions for 38; cut"):
            model(input_ids=torch.full((2, length), 7))
    positions = torch.full((2, 5), 39)
    assert model(input_ids=torch.full((2, 5), 7), position_ids=positions).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"position_ids go up to 40, .* positions 0 to 39; leave"):
        model(input_ids=torch.full((2, 5), 7), position_ids=positions + 1)


def test_token_types_that_a_backbone_does_not_have(make_model):
    model, ids = make_model(), torch.full((2, 5), 7)
    for wrong in (2, -1):
        with pytest.raises(ValueError, match=rf"token_type_ids go from {wrong} to {wrong}, .* types 0 to 1; use its"):
            model(input_ids=ids, token_type_ids=torch.full_like(ids, wrong))
    assert model(input_ids=ids, token_type_ids=torch.ones_like(ids)).logits.isfinite().all()


def test_windows_longer_than_a_backbone_takes(make_model, backbone_dir, tokenizer, monkeypatch):
    with pytest.raises(ValueError, match="window_length is 39, and the roberta backbone takes 38 tokens; set window_"):
        make_model("roberta", window_length=39, window_overlap=2)
    assert make_model("roberta", window_length=38, window_overlap=2).config.windowing.length == 38
    assert make_model("llama", window_length=99, window_overlap=2).config.windowing.length == 99
    monkeypatch.setattr(tokenizer, "name_or_path", backbone_dir("roberta"))
    monkeypatch.setattr(tokenizer, "model_max_length", 40)  # says more than the backbone takes
    with pytest.raises(ValueError, match="The length of a window is 39, and the backbone takes 38 tokens; expected 38"):
        window_fields(tokenizer, overlap=2, length=39)
    assert window_fields(tokenizer, overlap=2)["window_length"] == 38


@pytest.mark.parametrize("model_type", ["nystromformer", "roberta", "bert", "opt"])
def test_positions_are_counted_as_the_backbone_counts_them(model_type):
    torch.manual_seed(0)
    backbone = AutoModel.from_config(AutoConfig.for_model(model_type, **LIMITS[model_type][0])).eval()
    ids = torch.arange(5, 13)[None]
    with torch.no_grad():
        expected = backbone(input_ids=ids, output_hidden_states=True).hidden_states
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        states = all_hidden_states(backbone, "encoder", given).states
    for x, y in zip(states, expected, strict=True):
        torch.testing.assert_close(x, y)
