"""The configuration: what it accepts, refuses, resolves and keeps."""

import json
import re

import pytest
from configurations import make_config
from transformers import AutoConfig, BertConfig

from capsule_heads import CapsuleHeadConfig, CapsuleHeadForSequenceClassification


@pytest.fixture
def base(backbone_config):
    return backbone_config("bert")


# Round trips


def test_round_trip_through_a_directory(base, tmp_path):
    config = make_config(
        base,
        base_model_name_or_path="org/name",
        base_model_revision="a" * 40,
        freeze_backbone=False,
        layers=[-1, 0],
        d_inp=5,
        n_parts=7,
        d_cap=3,
        n_iters=2,
        p_model="skm",
        single_beta=True,
        eps=1e-4,
        strategy="reference",
        mixup_alpha=0.5,
        class_weights=[1.0, 2.0, 3.0],
        num_labels=3,
        output_hidden_states=True,
    )
    config.save_pretrained(tmp_path)
    for loaded in (CapsuleHeadConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is CapsuleHeadConfig
        assert type(loaded.base_config) is BertConfig
        assert loaded.base_config.to_dict() == base.to_dict()
        for name in ("head_only", "freeze_backbone", "d_inp", "n_parts", "d_cap", "n_iters", "p_model", "single_beta"):
            assert getattr(loaded, name) == getattr(config, name), name
        for name in ("eps", "strategy", "mixup_alpha", "class_weights", "num_labels", "output_hidden_states"):
            assert getattr(loaded, name) == getattr(config, name), name
        assert (loaded.base_model_name_or_path, loaded.base_model_revision) == ("org/name", "a" * 40)
        assert (loaded.layers, loaded.hidden_sizes) == ([0, 2], [16] * 3)


def test_round_trip_of_a_regression(base, tmp_path):
    make_config(base, num_labels=1, label_mean=2.5, label_std=1.5).save_pretrained(tmp_path)
    loaded = CapsuleHeadConfig.from_pretrained(tmp_path)
    assert (loaded.label_mean, loaded.label_std, loaded.num_labels) == (2.5, 1.5, 1)
    assert loaded.problem_type == "regression"


def test_base_config_as_object_is_kept_and_as_dict_is_built(base):
    assert make_config(base).base_config is base  # transformers sets things on it later
    config = make_config(base.to_dict(), hidden_sizes=[16] * 3)
    assert type(config.base_config) is BertConfig
    assert config.base_config.hidden_size == base.hidden_size


def test_round_trip_through_dict_and_json(base):
    config = make_config(base, d_inp=9)
    as_dict = config.to_dict()
    assert as_dict["base_config"]["model_type"] == "bert"
    assert CapsuleHeadConfig.from_dict(as_dict).to_dict() == as_dict
    assert json.loads(config.to_json_string(use_diff=False))["base_config"]["hidden_size"] == base.hidden_size
    assert CapsuleHeadConfig.from_dict(json.loads(config.to_json_string())).to_dict() == as_dict


def test_from_dict_leaves_the_dict_alone(base):
    as_dict = make_config(base).to_dict()
    copy = json.loads(json.dumps(as_dict))
    CapsuleHeadConfig.from_dict(as_dict, d_inp=3, num_labels=5)
    assert json.loads(json.dumps(as_dict)) == copy


def test_fields_given_to_from_pretrained_are_checked_and_resolved(base, tmp_path):
    make_config(base, num_labels=3).save_pretrained(tmp_path)
    loaded, unused = CapsuleHeadConfig.from_pretrained(
        tmp_path, layers=[-1], freeze_backbone=False, num_labels=5, cache_dir=None, other=1, return_unused_kwargs=True
    )
    assert (loaded.layers, loaded.freeze_backbone, loaded.num_labels, len(loaded.id2label)) == ([2], False, 5, 5)
    assert unused == {"other": 1}
    with pytest.raises(ValueError, match="n_parts is 0"):
        CapsuleHeadConfig.from_pretrained(tmp_path, n_parts=0)


# Depths


@pytest.mark.parametrize(
    ("layers", "resolved"),
    [(None, [0, 1, 2]), ([2, 0], [0, 2]), ([-1], [2]), ([-3, 1], [0, 1]), ((1,), [1])],
)
def test_layers_are_resolved(base, layers, resolved):
    assert make_config(base, layers=layers).layers == resolved


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "layers is []; expected a list of whole numbers"),
        (1, "layers is 1; expected a list of whole numbers"),
        ("all", "layers is 'all'; expected a list of whole numbers"),
        ([0.0], "layers is [0.0]; expected a list of whole numbers"),
        ([True], "layers is [True]; expected a list of whole numbers"),
        ([0, 3], "layers is [0, 3]; the backbone has 3 hidden states, so expected numbers from -3 to 2"),
        ([-4], "layers is [-4]; the backbone has 3 hidden states"),
        ([2, 2], "layers is [2, 2], which names a hidden state more than once"),
        ([2, -1], "layers is [2, -1], which names a hidden state more than once"),
    ],
)
def test_wrong_layers_are_refused(base, layers, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_config(base, layers=layers)


@pytest.mark.parametrize(
    ("kind", "sizes", "expected"),
    [
        ("gpt2", {"vocab_size": 8, "n_embd": 16, "n_layer": 5, "n_head": 2}, [16] * 6),
        ("resnet", {"embedding_size": 4, "hidden_sizes": [8, 12], "depths": [1, 1]}, [4, 8, 12]),
        ("convnext", {"hidden_sizes": [4, 8, 8, 12], "depths": [1, 1, 1, 1]}, [4, 4, 8, 8, 12]),
        (
            "swin",
            {"embed_dim": 4, "depths": [1, 1], "num_heads": [1, 1], "window_size": 2, "image_size": 32},
            [4, 8, 8],
        ),
    ],
    ids=["gpt2", "resnet", "convnext", "swin"],
)
def test_hidden_states_are_found_by_running_a_backbone_without_weights(kind, sizes, expected):
    config = make_config(AutoConfig.for_model(kind, **sizes))
    assert config.hidden_sizes == expected
    assert config.layers == list(range(len(expected)))
    assert make_config(config.base_config, hidden_sizes=[7] * 9).layers == list(range(9))


def test_heads_on_one_hidden_state_take_the_last(base):
    for head_type in ("linear", "spatial_pose"):
        assert make_config(base, head_type=head_type).layers == [2]
        assert make_config(base, head_type=head_type, layers=[-2]).layers == [1]


def test_capsules_have_the_sizes_of_the_paper(base):
    assert make_config(base, head_type="token_depth").d_cap == 2
    poses = make_config(base, head_type="spatial_pose")
    assert (poses.d_cov, poses.d_cap) == (4, 4)


# Errors


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_inp": 0}, "d_inp is 0; expected a positive whole number"),
        ({"n_parts": 2.5}, "n_parts is 2.5; expected a positive whole number"),
        ({"d_cap": True}, "d_cap is True; expected a positive whole number"),
        ({"head_type": "spatial_pose", "d_cov": 0}, "d_cov is 0; expected a positive whole number"),
        ({"d_cov": 2}, 'd_cov is 2, and head_type="token_depth" has no such option; expected one of n_parts, n_iters'),
        ({"hidden_sizes": [16, 0, 16]}, "hidden_sizes[1] is 0; expected a positive whole number"),
        ({"head_type": "mlp"}, "head_type is 'mlp'; expected one of token_depth, spatial_pose, linear"),
        ({"head_type": "linear", "layers": [0, 1]}, 'layers is [0, 1]; head_type="linear" takes one hidden state'),
        ({"n_iters": 0}, "n_iters is 0; expected"),
        ({"p_model": "normal"}, "p_model is 'normal'; expected"),
        ({"eps": 0}, "eps is 0; expected"),
        ({"strategy": "fast"}, "strategy is 'fast'; expected"),
        ({"mixup_alpha": -0.1}, "mixup_alpha is -0.1; expected a number, 0 (no mixup) or more"),
        ({"mixup_alpha": "0.2"}, "mixup_alpha is '0.2'; expected a number"),
        ({"mixup_alpha": True}, "mixup_alpha is True; expected a number"),
        ({"mixup_alpha": float("nan")}, "mixup_alpha is nan; expected a number"),
        ({"mixup_alpha": float("inf")}, "mixup_alpha is inf; expected a number"),
        ({"problem_type": "ranking"}, "ranking"),
        ({"class_weights": [1.0]}, "class_weights is [1.0]; expected 2 numbers"),
        ({"class_weights": [1.0, -1.0]}, "class_weights is [1.0, -1.0]; expected 2 numbers"),
        ({"class_weights": [0, 0]}, "class_weights is [0, 0]; expected 2 numbers"),
        ({"class_weights": [1.0], "num_labels": 1}, "class_weights were given for a regression"),
        ({"label_std": 0.0, "num_labels": 1}, "label_std is 0.0; expected a positive number"),
        ({"label_std": float("nan"), "num_labels": 1}, "label_std is nan; expected a positive number"),
        ({"label_std": "1"}, "label_std is '1'; expected a positive number"),
        ({"label_std": float("inf")}, "label_std is inf; expected a positive number"),
        ({"label_mean": float("nan")}, "label_mean is nan; expected a number"),
        ({"label_mean": None}, "label_mean is None; expected a number"),
        ({"class_weights": [float("nan"), 1.0]}, "class_weights is [nan, 1.0]; expected 2 numbers"),
        ({"class_weights": ["1", "1"]}, "class_weights is ['1', '1']; expected 2 numbers"),
        ({"class_weights": 1.0}, "class_weights is 1.0; expected 2 numbers"),
        ({"eps": "1e-5"}, "eps is '1e-5'; expected a positive number"),
        ({"eps": float("nan")}, "eps is nan; expected a positive number"),
        ({"eps": float("inf")}, "eps is inf; expected a positive number"),
        ({"eps": [1e-5]}, "eps is [1e-05]; expected a positive number"),
        ({"n_iters": True}, "n_iters is True; expected a positive whole number"),
        ({"n_iters": [3]}, "n_iters is [3]; expected a positive whole number"),
        ({"strategy": ["auto"]}, "strategy is ['auto']; expected one of auto"),
        ({"single_beta": "no"}, "single_beta is 'no'; expected True or False"),
        ({"freeze_backbone": 1}, "freeze_backbone is 1; expected True or False"),
        ({"head_only": None}, "head_only is None; expected True or False"),
        ({"hidden_sizes": 16}, "hidden_sizes is 16; expected the size of each hidden state"),
        ({"hidden_sizes": []}, "hidden_sizes is []; expected the size of each hidden state"),
        ({"num_labels": 0}, "num_labels is 0; expected a positive whole number"),
        ({"num_labels": "3"}, "num_labels is '3'; expected a positive whole number"),
        ({"id2label": ["a", "b"]}, "id2label is ['a', 'b']; expected the name of each class by its index"),
        ({"id2label": {0: "a", 2: "b"}}, "id2label is {0: 'a', 2: 'b'}; expected the name of each class by its index"),
        ({"id2label": {}}, "id2label is {}; expected the name of each class by its index"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path is 3; expected a string, or None"),
        ({"base_model_revision": 3}, "base_model_revision is 3; expected a string, or None"),
    ],
)
def test_wrong_values_are_refused(base, fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_config(base, **fields)


@pytest.mark.parametrize("base_config", ["bert", {"hidden_size": 4}])
def test_what_is_no_base_config_is_refused(base_config):
    with pytest.raises(ValueError, match=r"base_config is .*; expected the backbone's configuration"):
        make_config(base_config)


def test_the_configuration_of_another_model_is_refused(backbone_dir):
    with pytest.raises(ValueError, match=r"of a bert model, not of a capsule-head model.*from_backbone"):
        CapsuleHeadConfig.from_pretrained(backbone_dir("bert"))
    with pytest.raises(ValueError, match="of a bert model"):
        CapsuleHeadConfig.from_dict({"model_type": "bert", "hidden_size": 4})


@pytest.mark.parametrize("name", ["n_part", "label_smoothing", "head_only", "base_config", "base_model_revision"])
def test_from_backbone_refuses_what_is_no_field(backbone_dir, name):
    with pytest.raises(TypeError, match=f"Unknown arguments {name}; expected fields of CapsuleHeadConfig"):
        CapsuleHeadForSequenceClassification.from_backbone(backbone_dir("bert"), **{name: 1})


def test_misspelt_keys_are_refused(base, tmp_path):
    with pytest.raises(ValueError, match="has no n_part; expected n_parts, perhaps"):
        make_config(base, n_part=4)
    make_config(base, use_cache=False).save_pretrained(tmp_path)  # Trainer adds it
    CapsuleHeadConfig.from_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"mixup": 0.0, "strategie": "auto"}))
    with pytest.raises(ValueError, match="has no strategie; expected strategy, perhaps"):
        CapsuleHeadConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_unknown_dtypes_are_refused(base, backbone_dir, tmp_path, name):
    message = r"dtype is 'float99'; expected a torch.dtype or the name of one, such as \"bfloat16\""
    with pytest.raises(ValueError, match=message):
        make_config(base, **{name: "float99"})
    with pytest.raises(ValueError, match=message):
        CapsuleHeadForSequenceClassification.from_backbone(backbone_dir("bert"), **{name: "float99"})
    CapsuleHeadForSequenceClassification.from_backbone(backbone_dir("bert")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        CapsuleHeadForSequenceClassification.from_pretrained(tmp_path, **{name: "float99"})


# Labels


def test_labels_follow_transformers_rules(base):
    config = make_config(base)
    assert (config.num_labels, config.problem_type) == (2, None)
    config = make_config(base, id2label={0: "neg", 1: "neutral", 2: "pos"})
    assert (config.num_labels, config.id2label[2], config.problem_type) == (3, "pos", None)
    assert make_config(base, num_labels=4).id2label == {n: f"LABEL_{n}" for n in range(4)}


def test_one_label_means_regression_unless_it_is_said_otherwise(base):
    assert make_config(base, num_labels=1).problem_type == "regression"
    config = make_config(base, num_labels=1, problem_type="multi_label_classification")
    assert config.problem_type == "multi_label_classification"
    assert make_config(base, num_labels=3, problem_type="regression").problem_type == "regression"


# The backbone's own configuration


def test_wrapping_keeps_the_implementation_of_attention(backbone_config, tmp_path):
    base = backbone_config("bert", attn_implementation="eager")
    config = make_config(base)
    assert (config._attn_implementation, config.base_config._attn_implementation) == ("eager", "eager")
    config = make_config(backbone_config("bert", attn_implementation="eager"), attn_implementation="sdpa")
    assert config.base_config._attn_implementation == "sdpa"


def test_wrapping_keeps_the_implementation_of_experts(backbone_config, tmp_path):
    base = backbone_config("mixtral", experts_implementation="eager")
    config = make_config(base)
    assert config.base_config._experts_implementation == "eager"
    config.save_pretrained(tmp_path)
    CapsuleHeadConfig.from_pretrained(tmp_path)


def test_a_loaded_configuration_takes_the_implementation_of_attention(base, tmp_path):
    make_config(base).save_pretrained(tmp_path)
    loaded = CapsuleHeadConfig.from_pretrained(tmp_path, attn_implementation="eager")
    assert loaded.base_config._attn_implementation == "eager"


def test_vocabulary_and_width_are_the_backbones(backbone_config):
    config = make_config(backbone_config("distilbert", vocab_size=77, dim=24))
    assert (config.get_text_config().vocab_size, config.get_text_config().hidden_size) == (77, 24)
