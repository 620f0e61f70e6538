"""A config.json that is damaged, or means harm, ends in one sentence."""

import json

import pytest
import torch
from transformers import BertConfig, BertModel

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
        ("pad_token_id", 10**30),
        ("num_hidden_layers", 10**30),  # transformers would build layers without end
        ("num_hidden_layers", 10**7),
        ("num_labels", 10**30),
        ("text_config", {"num_layers": 10**30}),
        ("quantization_config", "x"),
        ("quantization_config", []),
        ("quantization_config", {"bits": 4}),
        ("quantization_config", {"quant_method": ["a"]}),
    ],
)
def test_a_value_that_no_backbone_has(folder, load, field, value):
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(ValueError, match=r"base_config|from its configuration|dtype is") as caught:
        load({**config, "base_config": {**config["base_config"], field: value}})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "bert", "num_hidden_layers": 10**30},
        {"model_type": "gemma3_text", "num_hidden_layers": 10**30},  # lists the kind of each layer
        {"model_type": "t5", "num_layers": 10**30},
        {"model_type": "mixtral", "num_local_experts": 10**30},
        {"model_type": "swin", "depths": [2, 10**30]},
    ],
)
def test_layers_without_end(tmp_path, fields):
    expected = r"=.*1000.*; expected at most 10,000: give the backbone's own number\.$"
    with pytest.raises(ValueError, match=f"^base_config has .*{expected}"):
        CapsuleHeadConfig(base_config=fields)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=f"^{tmp_path} has .*{expected}"):
        CapsuleHeadForSequenceClassification.from_backbone(tmp_path)


def test_a_configuration_with_layers_without_end():
    config = BertConfig(**{**SIZES, "num_hidden_layers": 10**30})
    expected = r"^The configuration of the bert backbone has num_hidden_layers=10+; expected at most 10,000"
    for make in (
        CapsuleHeadForSequenceClassification.from_backbone,
        lambda config: CapsuleHeadForSequenceClassification(CapsuleHeadConfig(config)),
        lambda config: CapsuleHeadForSequenceClassification(CapsuleHeadConfig(config, hidden_sizes=[16] * 3)),
    ):
        with pytest.raises(ValueError, match=expected):
            make(config)
    with pytest.raises(ValueError, match=r"^num_labels is 10+; expected at most 10,000,000"):
        CapsuleHeadConfig(num_labels=10**30)


@pytest.mark.parametrize("given", ["x", [], {}, 3, True, {"quant_method": "gptq", "bits": 4}])
def test_a_quantisation_of_the_model_with_its_head(folder, load, given):
    expected = "^quantization_config of the model is .*, and a head is never quantised; expected it in base_config"
    with pytest.raises(ValueError, match=expected):
        load({**json.loads((folder / "config.json").read_text()), "quantization_config": given})
    config = make_model().config
    config.quantization_config = given
    with pytest.raises(ValueError, match=expected):
        CapsuleHeadForSequenceClassification.from_pretrained(folder, config=config)


@pytest.mark.parametrize("given", ["x", {}, 3, {"bits": 4}])
def test_what_says_no_quantisation(tmp_path, given):
    BertModel(BertConfig(**SIZES)).save_pretrained(tmp_path)
    make = CapsuleHeadForSequenceClassification.from_backbone
    expected = r"has quantization_config=.*; expected an object of transformers, .* or a dict with the quant_method"
    with pytest.raises(ValueError, match=f"^Loading {tmp_path} {expected}"):
        make(tmp_path, quantization_config=given)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "quantization_config": given}))
    with pytest.raises(ValueError, match=f"^{tmp_path} {expected}"):
        make(tmp_path)


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
