"""Saving and loading: heads alone, whole checkpoints, and what is refused."""

import copy
import json
import os

import pytest
import torch
from configurations import make_config
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification, BertForSequenceClassification, BertModel

from capsule_heads import CapsuleHeadConfig, CapsuleHeadForSequenceClassification

REVISION = "0123456789abcdef0123456789abcdef01234567"

create = CapsuleHeadForSequenceClassification.from_backbone
load = CapsuleHeadForSequenceClassification.from_pretrained
LOADERS = (load, AutoModelForSequenceClassification.from_pretrained)


@pytest.fixture
def hub(backbone_dir, tmp_path):
    """A cache of the Hub, with the model org/tiny in it: `(cache_dir, directory of its files)`."""
    repository = tmp_path / "cache" / "models--org--tiny"
    snapshot = repository / "snapshots" / REVISION
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION)
    (repository / "blobs").mkdir()
    AutoModel.from_pretrained(backbone_dir("bert")).save_pretrained(snapshot)
    return tmp_path / "cache", snapshot


def files(directory):
    return {path.name: path.stat().st_size for path in directory.iterdir()}


def saved_config(directory):
    return json.loads((directory / "config.json").read_text())


def assert_same(model, other, batch):
    """Bit-equal logits, and weights and buffers of the same values and dtypes."""
    assert torch.equal(model.eval()(**batch).logits, other.eval()(**batch).logits)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    others = dict(other.named_parameters()) | dict(other.named_buffers())
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == others[name].dtype and torch.equal(tensor, others[name]), name


# Heads alone


def test_a_head_alone_by_default(make_model, backbone_dir, pad, tmp_path, backbone_loads):
    model = make_model()
    model.save_pretrained(tmp_path)
    assert files(tmp_path).keys() == {"config.json", "model.safetensors"}
    assert load_file(tmp_path / "model.safetensors").keys() == model.head.state_dict(prefix="head.").keys()
    config = saved_config(tmp_path)
    assert (config["head_only"], config["base_model_name_or_path"]) == (True, backbone_dir("bert"))
    assert config["architectures"] == ["CapsuleHeadForSequenceClassification"]
    assert config["base_config"]["model_type"] == "bert"
    backbone_loads.clear()
    loaded, info = load(tmp_path, output_loading_info=True)
    assert backbone_loads == [backbone_dir("bert")]
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not loaded.training and not any(p.requires_grad for p in loaded.backbone.parameters())
    assert loaded.backbone.pooler is None
    assert loaded._no_split_modules == model._no_split_modules != set()  # what device_map="auto" goes by
    assert_same(model, loaded, pad())


def test_a_backbone_is_referred_to_from_anywhere(make_model, backbone_dir, pad, tmp_path, monkeypatch):
    monkeypatch.chdir(os.path.dirname(backbone_dir("bert")))
    model = create(os.path.basename(backbone_dir("bert")))
    model.save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert_same(model, load(tmp_path), pad())


def test_loading_and_saving_again(make_model, pad, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "1")
    load(tmp_path / "1").save_pretrained(tmp_path / "2")
    assert files(tmp_path / "1") == files(tmp_path / "2")
    assert saved_config(tmp_path / "1") == saved_config(tmp_path / "2")
    model.save_pretrained(tmp_path / "2")  # over an older one
    assert_same(model, load(tmp_path / "2"), pad())


def test_saving_in_one_way_does_not_change_the_next(make_model, pad, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "whole", head_only=False)
    model.save_pretrained(tmp_path / "head")
    assert files(tmp_path / "head")["model.safetensors"] < files(tmp_path / "whole")["model.safetensors"] / 2
    assert not saved_config(tmp_path / "whole")["head_only"] and saved_config(tmp_path / "head")["head_only"]
    assert_same(load(tmp_path / "head"), load(tmp_path / "whole"), pad())


def test_a_missing_backbone_is_named_with_the_remedy(make_model, backbone_dir, pad, tmp_path):
    gone = tmp_path / "gone"
    AutoModel.from_pretrained(backbone_dir("bert")).save_pretrained(gone)
    model = make_model()
    model.config.base_model_name_or_path = str(gone)
    model.save_pretrained(tmp_path / "head")
    gone.rename(tmp_path / "moved")
    with pytest.raises(OSError, match=f"{gone} could not be loaded: .* Pass base_model_name_or_path=.*load_backbone"):
        load(tmp_path / "head")
    for loader in LOADERS:
        loaded = loader(tmp_path / "head", base_model_name_or_path=str(tmp_path / "moved"))
        assert_same(model, loaded, pad())
    assert loaded.config.base_model_name_or_path == str(tmp_path / "moved")


def test_a_head_without_its_backbone(make_model, pad, tmp_path, backbone_loads):
    model, batch = make_model(), pad()
    states = torch.stack(model(**batch, output_hidden_states=True).hidden_states, dim=2)
    model.save_pretrained(tmp_path / "1")
    backbone_loads.clear()
    loaded = load(tmp_path / "1", load_backbone=False)
    assert backbone_loads == [] and loaded.backbone is None
    logits = loaded(hidden_states=states, attention_mask=batch["attention_mask"]).logits
    assert torch.equal(logits, model(**batch).logits)
    with pytest.raises(ValueError, match="head_only=False needs the backbone"):
        loaded.save_pretrained(tmp_path / "2", head_only=False)
    loaded.save_pretrained(tmp_path / "2")
    assert_same(model, load(tmp_path / "2"), batch)


def test_a_head_that_is_loaded_to_train_its_backbone_too(make_model, pad, tmp_path):
    make_model().save_pretrained(tmp_path / "head")
    model = load(tmp_path / "head", freeze_backbone=False)
    assert all(parameter.requires_grad for parameter in model.parameters()) and not model.training
    model.train()(**pad(), labels=torch.tensor([0, 1, 2])).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.save_pretrained(tmp_path / "whole")
    assert not saved_config(tmp_path / "whole")["head_only"]
    with pytest.raises(ValueError, match="head_only=True would lose the backbone"):
        model.save_pretrained(tmp_path / "lost", head_only=True)
    loaded = load(tmp_path / "whole")
    assert not loaded.config.freeze_backbone
    assert_same(model, loaded, pad())


def test_a_backbone_thawed_by_hand_is_saved(make_model, pad, tmp_path):
    model = make_model()
    model.config.freeze_backbone = False
    model.backbone.requires_grad_(True)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.1)
    model.save_pretrained(tmp_path)
    assert_same(model, load(tmp_path), pad())


# Whole checkpoints


def test_a_whole_checkpoint_needs_no_other(make_model, pad, tmp_path, backbone_loads, backbone_type):
    model = make_model(backbone_type, freeze_backbone=False)
    model.save_pretrained(tmp_path)
    assert {os.path.splitext(name)[1] for name in files(tmp_path)} == {".json", ".safetensors"}
    backbone_loads.clear()
    loaded, info = load(tmp_path, output_loading_info=True)
    assert backbone_loads == []
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same(model, loaded, pad())


def test_a_whole_checkpoint_in_shards(make_model, pad, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path, head_only=False, max_shard_size="10KB")
    assert len([name for name in files(tmp_path) if name.endswith(".safetensors")]) > 2
    assert_same(model, load(tmp_path), pad())


def test_a_whole_frozen_checkpoint_stays_whole(make_model, pad, tmp_path):
    make_model().save_pretrained(tmp_path / "1", head_only=False)
    model = load(tmp_path / "1")
    assert model.config.freeze_backbone and not any(p.requires_grad for p in model.backbone.parameters())
    model.save_pretrained(tmp_path / "2")
    assert not saved_config(tmp_path / "2")["head_only"]
    assert_same(model, load(tmp_path / "2"), pad())
    with pytest.raises(ValueError, match="head_only=True would lose the backbone"):
        model.save_pretrained(tmp_path / "3", head_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_only", [True, False])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_backbone_in_half_precision_under_a_float32_head(make_model, pad, tmp_path, kind, dtype, head_only):
    model = make_model(kind, dtype=dtype)
    assert model.backbone.dtype == dtype and model.dtype == model.head.detect_parts[0].depth_emb.dtype == torch.float32
    model.save_pretrained(tmp_path, head_only=head_only)
    loaded = load(tmp_path)
    assert loaded.backbone.dtype == dtype and loaded.config.base_config.dtype == dtype
    assert_same(model, loaded, pad())
    loaded.save_pretrained(tmp_path / "again")
    assert_same(model, load(tmp_path / "again"), pad())


@pytest.mark.parametrize("head_only", [True, False])
def test_a_half_precision_checkpoint_keeps_its_precision(make_model, pad, tmp_path, head_only):
    model = make_model(changes={"dtype": torch.bfloat16})
    assert model.backbone.dtype == torch.bfloat16 and model.head.detect_parts[0].depth_emb.dtype == torch.float32
    model.save_pretrained(tmp_path, head_only=head_only)
    assert_same(model, load(tmp_path), pad())


@pytest.mark.parametrize("head_only", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, "float16"])
def test_loading_in_another_precision(make_model, tmp_path, head_only, dtype):
    make_model().save_pretrained(tmp_path, head_only=head_only)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    for loader in LOADERS:
        loaded = loader(tmp_path, dtype=dtype)
        assert {parameter.dtype for parameter in loaded.parameters()} == {wanted}
    assert {parameter.dtype for parameter in load(tmp_path, dtype="auto").parameters()} == {torch.float32}


@pytest.mark.parametrize("head_only", [True, False])
def test_loading_with_another_implementation_of_attention(make_model, tmp_path, head_only):
    make_model().save_pretrained(tmp_path, head_only=head_only)
    for loader in LOADERS:
        loaded = loader(tmp_path, attn_implementation="eager")
        assert loaded.backbone.config._attn_implementation == "eager"
        assert loaded.config.base_config is loaded.backbone.config


@pytest.mark.parametrize("head_only", [True, False])
@pytest.mark.parametrize("fields", [{"single_beta": True}, {"num_labels": 1, "label_mean": 2.0}, {"layers": [-1]}])
def test_other_heads(make_model, pad, tmp_path, head_only, fields):
    model = make_model(**fields)
    model.save_pretrained(tmp_path, head_only=head_only)
    loaded, info = load(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (model.head.routings[0].beta_ign is None) == ("single_beta" in fields)
    assert_same(model, loaded, pad())


# Random backbones


def test_a_random_backbone_is_saved_whole(make_model, backbone_config, shake, pad, tmp_path):
    config = make_config(backbone_config("bert"), d_inp=8, n_parts=6)
    model = shake(CapsuleHeadForSequenceClassification(config))
    with pytest.raises(ValueError, match="head_only=True would lose the backbone"):
        model.save_pretrained(tmp_path, head_only=True)
    model.save_pretrained(tmp_path)
    assert_same(model, load(tmp_path), pad())


def test_a_head_only_configuration_does_not_hide_a_random_backbone(make_model, shake, pad, tmp_path):
    make_model().save_pretrained(tmp_path / "head")
    config = CapsuleHeadConfig.from_pretrained(tmp_path / "head")
    assert config.head_only
    for model in (AutoModelForSequenceClassification.from_config(config), CapsuleHeadForSequenceClassification(config)):
        shake(model).save_pretrained(tmp_path / "random")
        assert not saved_config(tmp_path / "random")["head_only"]
        assert_same(model, load(tmp_path / "random"), pad())


# Refusals


@pytest.mark.parametrize("given_config", [True, False])
@pytest.mark.parametrize("cls", [BertModel, BertForSequenceClassification])
def test_another_kind_of_checkpoint_is_refused(cls, given_config, backbone_config, tmp_path):
    cls(backbone_config("bert")).save_pretrained(tmp_path)
    config = make_config(backbone_config("bert"), head_only=True) if given_config else None
    with pytest.raises(ValueError, match=f"{tmp_path} is of a bert model, not of a capsule-head model.*from_backbone"):
        load(tmp_path, config=config)


def test_another_kind_of_configuration_is_refused(make_model, backbone_config, tmp_path):
    make_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="The config that was given is of a bert model"):
        load(tmp_path, config=backbone_config("bert"))


@pytest.mark.parametrize("ignore_mismatched_sizes", [False, True])
def test_a_checkpoint_that_lacks_weights_of_the_backbone_is_refused(make_model, tmp_path, ignore_mismatched_sizes):
    make_model().save_pretrained(tmp_path, head_only=False)
    weights = load_file(tmp_path / "model.safetensors")
    name = "backbone.embeddings.word_embeddings.weight"
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{tmp_path} lacks 1 weights of the backbone, among them {name}"):
        load(tmp_path, ignore_mismatched_sizes=ignore_mismatched_sizes)


def test_a_state_dict_in_the_place_of_a_checkpoint(make_model, pad):
    model = make_model()
    state_dict = model.state_dict()
    loaded = load(None, config=model.config, state_dict=dict(state_dict))
    assert not loaded.config.head_only
    assert_same(model, loaded, pad())
    head = {key: value for key, value in state_dict.items() if key.startswith("head.")}
    with pytest.raises(ValueError, match=r"The state_dict lacks \d\d weights of the backbone"):
        load(None, config=model.config, state_dict=head)


def test_a_head_that_says_it_is_whole_is_refused(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**saved_config(tmp_path), "head_only": False}))
    with pytest.raises(ValueError, match=r"lacks \d\d weights of the backbone, .*; expected a complete checkpoint"):
        load(tmp_path)


@pytest.mark.parametrize("head_only", [True, False])
def test_another_number_of_labels(make_model, tmp_path, head_only):
    model = make_model()
    model.save_pretrained(tmp_path, head_only=head_only)
    with pytest.raises(RuntimeError, match=r"head\.routings\.1\.B of shape \(6, 3, 1, 2\), .* makes it \(6, 5,"):
        load(tmp_path, num_labels=5)
    loaded, info = load(tmp_path, num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True)
    assert {key for key, *_ in info["mismatched_keys"]} == {
        f"head.routings.1.{name}" for name in ("W", "B", "beta_use", "beta_ign")
    }
    for name, parameter in model.named_parameters():
        other = loaded.get_parameter(name)
        if name.startswith("head.routings.1."):
            assert other.isfinite().all() and other.shape[1] == 5
            assert bool((other == 0).all()) == (not name.endswith(".W"))
        else:
            assert torch.equal(parameter, other), name


def test_a_backbone_of_another_shape_for_a_head_alone(make_model, pad, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "head")
    config = copy.deepcopy(model.config)
    config.base_config.intermediate_size *= 2
    n = config.base_config.intermediate_size
    name = "encoder.layer.0.intermediate.dense.bias"
    expected = rf"has {name} of shape \({n // 2},\), where .* makes it \({n},\), and \d more .*ignore_mismatched_sizes"
    with pytest.raises(RuntimeError, match=expected) as raised:
        load(tmp_path / "head", config=copy.deepcopy(config))
    assert "\n" not in str(raised.value)
    loaded, info = load(tmp_path / "head", config=config, ignore_mismatched_sizes=True, output_loading_info=True)
    differing = {key for key, *_ in info["mismatched_keys"]}
    assert f"backbone.{name}" in differing and all("intermediate" in key or "output.dense" in key for key in differing)
    for key, parameter in loaded.named_parameters():
        assert parameter.isfinite().all() and (key in differing or torch.equal(parameter, model.get_parameter(key)))
    with pytest.raises(ValueError, match="head_only=True would lose the backbone"):
        loaded.save_pretrained(tmp_path / "again", head_only=True)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(load(tmp_path / "again")(**pad()).logits, loaded(**pad()).logits)


@pytest.mark.parametrize("lacking", ["head.", "head.detect_parts.0.affine.weight", "head.detect_parts.0.norm."])
def test_a_head_that_lacks_weights_gets_them_initialised(make_model, tmp_path, lacking):
    model = make_model()
    model.save_pretrained(tmp_path)
    weights = {k: v for k, v in load_file(tmp_path / "model.safetensors").items() if not k.startswith(lacking)}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = load(tmp_path, ignore_mismatched_sizes=True)
    for name, parameter in loaded.named_parameters():
        if name.startswith(lacking):
            assert parameter.isfinite().all() and parameter.abs().max() < 10, name
            zeros = name.endswith(("bias", ".B", "beta_use", "beta_ign", "depth_emb"))
            assert bool((parameter == 0).all()) == zeros and parameter.requires_grad, name
            assert bool((parameter == 1).all()) == (name == "head.detect_parts.0.norm.weight"), name
        else:
            assert torch.equal(parameter, model.get_parameter(name)), name


# The Hub


def test_a_backbone_from_the_hub_is_pinned_to_its_commit(hub, pad, tmp_path, backbone_loads, shake):
    cache_dir, snapshot = hub
    model = create("org/tiny", revision="main", cache_dir=cache_dir)
    shake(model.head)
    assert (model.config.base_model_name_or_path, model.config.base_model_revision) == ("org/tiny", REVISION)
    model.save_pretrained(tmp_path / "head")
    # The branch moves on: the commit that the head was trained on is still the one that is loaded.
    moved = "f" * 40
    (snapshot.parents[1] / "refs" / "main").write_text(moved)
    other = AutoModel.from_pretrained(snapshot)
    shake(other, seed=3).save_pretrained(snapshot.parent / moved)
    assert_same(model, load(tmp_path / "head", cache_dir=cache_dir), pad())
    assert create("org/tiny", cache_dir=cache_dir).config.base_model_revision == moved
    with pytest.raises(OSError, match=rf"its backbone org/tiny \(revision {REVISION}\) could not be loaded"):
        load(tmp_path / "head", cache_dir=tmp_path / "empty")


def test_a_checkpoint_on_the_hub(hub, make_model, pad, backbone_loads):
    cache_dir, snapshot = hub
    repository = snapshot.parents[2] / "models--org--head"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "v1").write_text(REVISION)
    model = make_model()
    model.save_pretrained(repository / "snapshots" / REVISION)
    backbone_loads.clear()
    assert_same(model, load("org/head", revision="v1", cache_dir=cache_dir), pad())
    # The head's revision is not the backbone's.
    assert len(backbone_loads) == 1
    loaded = AutoModelForSequenceClassification.from_pretrained("org/head", revision="v1", cache_dir=cache_dir)
    assert_same(model, loaded, pad())


# Buffers


@pytest.mark.parametrize("head_only", [True, False])
@pytest.mark.parametrize("kind", ["bert", "roberta", "llama", "gpt2", "mamba", "deberta-v2"])
def test_buffers_that_are_not_saved_are_right(make_model, tmp_path, kind, head_only):
    model = make_model(kind)
    model.save_pretrained(tmp_path, head_only=head_only)
    buffers = dict(load(tmp_path).named_buffers())
    assert all(torch.equal(buffers[name], buffer) for name, buffer in model.named_buffers())
