"""Numbers are taken from whatever holds them; what is no number is refused in one short sentence."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from configurations import make_config
from transformers import AutoModel, BertConfig

from capsule_heads import CapsuleHeadConfig, CapsuleHeadForSequenceClassification, Routing
from capsule_heads.checks import plain, shown
from capsule_heads.heads.token_depth import _warn_of_one_iteration
from capsule_heads.ops import route

SCALARS = {
    "NumPy": np.int64,
    "a NumPy array": np.array,
    "torch": torch.tensor,
    "pandas": lambda n: pd.Series([n])[0],
}
LISTS = {
    "NumPy": np.array,
    "torch": torch.tensor,
    "pandas": pd.Series,
    "a tuple": tuple,
    "NumPy's numbers": lambda numbers: [np.float32(number) for number in numbers],
    "a pandas index": pd.Index,
}


@pytest.fixture
def base(backbone_config):
    return backbone_config("bert")


@pytest.mark.parametrize("scalar", SCALARS.values(), ids=SCALARS)
def test_sizes(base, scalar, tmp_path):
    config = make_config(base, num_labels=scalar(3), n_parts=scalar(8), d_inp=scalar(5), n_iters=scalar(2))
    assert (config.num_labels, config.n_parts, config.d_inp, config.n_iters) == (3, 8, 5, 2)
    assert type(config.n_parts) is int
    config.save_pretrained(tmp_path)
    assert CapsuleHeadConfig.from_pretrained(tmp_path, n_parts=scalar(9)).n_parts == 9


@pytest.mark.parametrize("as_list", LISTS.values(), ids=LISTS)
def test_lists(base, as_list):
    config = make_config(base, num_labels=3, class_weights=as_list([1.0, 0.5, 2.0]))
    assert list(config.class_weights) == [1.0, 0.5, 2.0] and json.dumps(config.to_dict())


def test_numbers_with_a_point_and_classes(base):
    fields = {
        "mixup_alpha": np.float32(0.5),
        "eps": np.float32(0.25),
        "layers": range(0, 2),
        "hidden_sizes": np.full(3, 16),
    }
    config = make_config(base, id2label={np.int64(0): np.str_("a"), np.int64(1): np.str_("b")}, **fields)
    assert (config.mixup_alpha, config.eps, config.layers) == (0.5, 0.25, [0, 1])
    assert config.label2id == {"a": 0, "b": 1} and json.dumps(config.to_dict())
    regression = make_config(base, num_labels=1, label_mean=np.float32(2.5), label_std=torch.tensor(0.5))
    assert (regression.label_mean, regression.label_std) == (2.5, 0.5)


@pytest.mark.parametrize("scalar", SCALARS.values(), ids=SCALARS)
def test_routing(scalar):
    torch.manual_seed(0)
    layer = Routing(scalar(2), scalar(3), scalar(4), n_out=scalar(5), n_iters=scalar(2), eps=np.float32(1e-4))
    inputs = torch.randn(6), torch.randn(6, 2, 3)
    assert [tuple(x.shape) for x in layer(*inputs)] == [(5,), (5, 2, 4), (5, 2, 4)]
    tensors = layer.W, layer.B, layer.beta_use, layer.beta_ign
    assert route(*inputs, *tensors, n_out=scalar(5), n_iters=scalar(2))[0].shape == (5,)
    assert Routing(2, 3, 4)(*inputs, n_out=scalar(7))[0].shape == (7,)


@pytest.mark.parametrize(
    "value",
    [1, 2.5, "word", None, True, [1, "a"], {"a": [1]}, (1, (2, 3))],
)
def test_what_is_pythons_own_stays(value):
    assert plain(value) == value and type(plain(value)) is type(value)


def test_messages_are_short():
    assert shown([1] * 1000) == "a list" and shown("a") == "'a'" and shown("a\nb") == "'a\\nb'"
    with pytest.raises(ValueError, match="a DataFrame; expected a positive whole number"):
        Routing(pd.DataFrame({"a": range(100)}), 2, 3)


def test_what_is_given_with_a_configuration_counts_or_is_refused(backbone_config):
    make = CapsuleHeadForSequenceClassification.from_backbone
    for name in ("dtype", "torch_dtype"):
        model = make(backbone_config("bert"), d_inp=8, n_parts=4, **{name: "bfloat16"})
        assert model.backbone.dtype == torch.bfloat16 and model.head.routings[0].W.dtype == torch.float32
    assert make(backbone_config("bert"), dtype="auto").backbone.dtype == torch.float32
    for given in ({"attn_implementation": "eager"}, {"quantization_config": "x"}, {"revision": "main"}):
        with pytest.raises(
            TypeError, match=f"^{next(iter(given))} given with a configuration; expected a name to load"
        ):
            make(backbone_config("bert"), **given)


def test_a_loaded_model_is_a_backbone(backbone_config, tmp_path):
    model = AutoModel.from_config(backbone_config("bert"))
    made = CapsuleHeadForSequenceClassification.from_backbone(model, num_labels=3, d_inp=8, n_parts=4)
    with torch.no_grad():
        for x in made.head.parameters():
            x.add_(0.3 * torch.randn_like(x))
    assert made.backbone is model and not made.config.head_only
    made.save_pretrained(tmp_path)
    inputs = {"input_ids": torch.tensor([[3, 4, 5]])}
    loaded = CapsuleHeadForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**inputs).logits, made(**inputs).logits, rtol=0, atol=0)
    with pytest.raises(TypeError, match="revision given with a loaded BertModel; expected a name to load"):
        CapsuleHeadForSequenceClassification.from_backbone(model, revision="main")


@pytest.mark.parametrize("what", [torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(50)]), 7, ["a"]])
def test_what_is_no_backbone_is_refused_in_a_line(what):
    with pytest.raises(TypeError, match="expected a name on the Hub, a directory, a configuration") as error:
        CapsuleHeadForSequenceClassification.from_backbone(what)
    assert len(str(error.value)) < 250 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"id2label": {0: "a", 1: "b"}, "label2id": {"a": 1, "b": 0}}, "expected the same names with the same indices"),
        ({"id2label": {0: "a", 1: "a"}}, "no name twice"),
        ({"label2id": {"a": 0, "b": 2}}, "label2id is .* expected the name of each class by its index, from 0 on"),
        ({"id2label": {1: "a", 2: "b"}}, "id2label is .* expected the name of each class by its index, from 0 on"),
        ({"id2label": {0: "a", 1: "b"}, "num_labels": 3}, "num_labels is 3, and 2 classes have names"),
    ],
)
def test_names_of_classes_that_do_not_fit(base, fields, said):
    with pytest.raises(ValueError, match=said):
        make_config(base, **fields)


def test_names_of_classes_are_known_both_ways(base, tmp_path):
    for fields in ({"id2label": {0: "a", 1: "b", 2: "c"}}, {"label2id": {"a": 0, "b": 1, "c": 2}}):
        config = make_config(base, **fields)
        assert (config.id2label, config.label2id) == ({0: "a", 1: "b", 2: "c"}, {"a": 0, "b": 1, "c": 2})
    config.save_pretrained(tmp_path)
    load = CapsuleHeadConfig.from_pretrained
    assert load(tmp_path, id2label={0: "x", 1: "y", 2: "z"}).label2id == {"x": 0, "y": 1, "z": 2}
    assert load(tmp_path, label2id={"x": 0, "y": 1}).id2label == {0: "x", 1: "y"}
    assert load(tmp_path, num_labels=3).label2id == config.label2id
    assert load(tmp_path, num_labels=2).label2id == {"LABEL_0": 0, "LABEL_1": 1}


def test_one_iteration_is_said_to_see_no_hidden_state(base, caplog):
    _warn_of_one_iteration.cache_clear()
    for n_iters in (2, 1, 1):
        CapsuleHeadForSequenceClassification(make_config(base, n_iters=n_iters))
    assert [record.message[:60] for record in caplog.records] == [
        "n_iters is 1, so class scores do not depend on the hidden st"
    ]


def test_the_same_backbone_config_is_kept():
    config = BertConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    assert make_config(config, hidden_sizes=[16, 16]).base_config is config
