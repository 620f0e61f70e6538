"""A config.json that is damaged, or means harm, ends in one sentence."""

import json

import pytest
import torch
from transformers import BertConfig

from capsule_heads import CapsuleHeadConfig, CapsuleHeadForSequenceClassification

SIZES = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def make_model(**fields):
    torch.manual_seed(0)
    return CapsuleHeadForSequenceClassification.from_backbone(
        BertConfig(**SIZES), **{"d_inp": 8, "n_parts": 4, **fields}
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(folder)
    return folder


@pytest.fixture
def load(folder, monkeypatch):
    """load(content): loads the model with another config.json."""
    original = (folder / "config.json").read_text()

    def load_with(content):
        (folder / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return CapsuleHeadForSequenceClassification.from_pretrained(folder)

    yield load_with
    (folder / "config.json").write_text(original)


@pytest.mark.parametrize(
    "field, value",
    [
        ("pad_token_id", [0]),
        ("layer_norm_eps", "x"),
        ("is_decoder", {}),
        ("num_attention_heads", None),
        ("dtype", [0]),
        ("dtype", "x"),
        ("dtype", {}),
        ("intermediate_size", -1),
        ("intermediate_size", 10**30),
        ("vocab_size", -1),
        ("hidden_act", "x"),
        ("model_type", "x"),
        ("model_type", ["bert"]),
        ("model_type", None),
    ],
)
def test_a_value_that_no_backbone_has(folder, load, field, value):
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(ValueError, match=r"base_config|from its configuration|dtype is") as caught:
        load({**config, "base_config": {**config["base_config"], field: value}})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize("content", ["[" * 10**5, '{"a": ' * 10**5, "", "{", "[]", "null", "\0", "1"])
def test_what_is_no_configuration(folder, load, content):
    with pytest.raises(OSError, match=str(folder)) as caught:
        load(content)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fields", [{"d_inp": 10**6, "n_parts": 10**6}, {"d_inp": 10**12}, {"n_parts": 10**30}])
def test_a_head_that_does_not_fit_in_memory(folder, load, fields):
    expected = r"The head's parameters take [\d,]+ GB, and .* GB of memory are free; expected smaller options .*d_inp="
    with pytest.raises(ValueError, match=expected):
        make_model(**fields)
    with pytest.raises(ValueError, match=expected):
        load({**json.loads((folder / "config.json").read_text()), **fields})
    CapsuleHeadConfig.from_pretrained(folder)  # a configuration takes no memory
