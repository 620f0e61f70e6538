"""Published checkpoints: what they are converted to, and what is refused. The real ones are outside the repository."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    pipeline,
)

from capsule_heads import CapsuleHeadForImageClassification, CapsuleHeadForSequenceClassification
from capsule_heads.paper.checkpoints import (
    NETWORKS,
    build_network,
    convert_checkpoint,
    convert_state_dict,
    read_state_dict,
)
from capsule_heads.paper.image_processing_stereo import StereoImageProcessor, side_by_side
from capsule_heads.paper.stereo import CATEGORIES

SHARED = Path(__file__).parents[3] / "shared"
FILES = {"sst2_root": ("SST2R", "sst2"), "sst5_root": ("SST5R", "sst5"), "smallnorb": ("smallNORB", "smallnorb")}
STRATEGIES = ("auto", "reference", "moments", "votes", "cpu")
PARAMETERS = {"sst2_root": 138_944, "sst5_root": 140_480, "smallnorb": 271_688}


def published(network):
    """The state dict's file, and the tensors that the original network computes with it."""
    weights = SHARED / "pretrained" / f"{FILES[network][0]}_pretrained_model_state_dict.pt"
    golden = SHARED / "goldens" / f"checkpoint_{FILES[network][1]}.safetensors"
    if not (weights.exists() and golden.exists()):
        pytest.skip(f"{weights} or {golden} is not on this machine")
    return weights, load_file(golden)


def original_state_dict(network):
    """Random weights by their original names, written out by hand."""
    torch.manual_seed(0)
    n_classes = {"sst2_root": 2, "sst5_root": 5, "smallnorb": 5}[network]
    if network == "smallnorb":
        shapes = {}
        for block, n_channels in enumerate([4, 64, 64, 64, 64, 64]):
            shapes |= normalisation(f"convolve.{3 * block}", n_channels)
            shapes[f"convolve.{3 * block + 1}.weight"] = (64, n_channels, 3, 3)
            shapes[f"convolve.{3 * block + 1}.bias"] = (64,)
        for name, size in (("compute_a", 64), ("compute_mu", 1024)):
            shapes |= normalisation(f"{name}.0", 64)
            shapes |= {f"{name}.1.weight": (size, 64, 1, 1), f"{name}.1.bias": (size,)}
        d_cov, d_inp, d_out = 4, 4, 4
    else:
        shapes = {"depth_emb": (37, 1280), "detect_parts.0.weight": (64, 1280), "detect_parts.0.bias": (64,)}
        shapes |= {"detect_parts.2.weight": (64,), "detect_parts.2.bias": (64,)}
        d_cov, d_inp, d_out = 1, 64, 2
    for layer, (i, j, d) in enumerate([(1, 64, d_inp), (64, n_classes, d_out)]):
        shapes |= {f"routings.{layer}.W": (i, j, d, d_out), f"routings.{layer}.B": (i, j, d_cov, d_out)}
        shapes |= {f"routings.{layer}.beta_use": (i, j), f"routings.{layer}.beta_ign": (i, j)}
        shapes[f"routings.{layer}.CONST_one"] = ()
    state_dict = {name: torch.rand(shape) for name, shape in shapes.items()}
    return {k: torch.tensor(3) if k.endswith("num_batches_tracked") else v for k, v in state_dict.items()}


def normalisation(name, n_channels):
    sizes = {key: (n_channels,) for key in ("weight", "bias", "running_mean", "running_var")}
    return {f"{name}.{key}": size for key, size in {**sizes, "num_batches_tracked": ()}.items()}


# The published weights


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("network", NETWORKS)
def test_agreement_with_the_original_networks(network, strategy, dtype, tolerance, tmp_path):
    weights, golden = published(network)
    convert_checkpoint(weights, network, tmp_path)
    kwargs = {"strategy": strategy, "dtype": dtype}
    if network == "smallnorb":
        model = AutoModelForImageClassification.from_pretrained(tmp_path, **kwargs)
        inputs = {"pixel_values": golden["in.images"].to(dtype)}
    else:
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path, load_backbone=False, **kwargs)
        inputs = {"hidden_states": golden["in.embs"].to(dtype), "attention_mask": golden["in.mask"]}
    assert model.head.routings[0].strategy == strategy
    with torch.no_grad():
        outputs = model(**inputs, output_capsules=True)
    for key, actual in {"a_out": outputs.logits, "mu_out": outputs.poses, "sig2_out": outputs.variances}.items():
        expected = golden[f"out.{key}"]
        assert (actual.dtype, actual.shape) == (dtype, expected.shape)
        assert (actual.double() - expected).norm() <= tolerance * expected.norm(), key


@pytest.mark.parametrize("network", ["sst2_root", "sst5_root"])
def test_the_published_heads_name_their_backbone(network, tmp_path):
    weights, _ = published(network)
    convert_checkpoint(weights, network, tmp_path)
    with pytest.raises(OSError, match="holds a head alone, and its backbone openai-community/gpt2-large could not be"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_the_published_vision_network_takes_pictures(tmp_path):
    weights, golden = published("smallnorb")
    convert_checkpoint(weights, "smallnorb", tmp_path)
    images = (golden["in.images"].clamp(0, 1) * 255).round().to(torch.uint8)
    found = pipeline("image-classification", str(tmp_path))([side_by_side(image) for image in images], top_k=1)
    model = CapsuleHeadForImageClassification.from_pretrained(tmp_path)
    logits = model(images / 255).logits
    assert [best[0]["label"] for best in found] == [CATEGORIES[index] for index in logits.argmax(-1)]
    expected = logits.softmax(-1).amax(-1).tolist()
    assert [best[0]["score"] for best in found] == pytest.approx(expected, rel=1e-4)


# Random weights by the original names


@pytest.mark.parametrize("network", NETWORKS)
def test_every_weight_is_put_in_its_place(network, tmp_path):
    state_dict = original_state_dict(network)
    torch.save(state_dict, tmp_path / "weights.pt")
    convert_checkpoint(tmp_path / "weights.pt", network, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert (
        sum(w.numel() for k, w in weights.items() if "running" not in k and "num_batches" not in k)
        == PARAMETERS[network]
    )
    values = sorted(float(w.double().sum()) for w in weights.values())
    expected = sorted(float(w.double().sum()) for k, w in state_dict.items() if not k.endswith("CONST_one"))
    assert values == pytest.approx(expected)
    head = "head." if network != "smallnorb" else "backbone."
    assert all(key.startswith(("head.", head)) for key in weights)


def test_labels_and_backbones():
    for network, names in {
        "sst2_root": ["negative", "positive"],
        "sst5_root": ["very negative", "negative", "neutral", "positive", "very positive"],
    }.items():
        config = build_network(network).config
        assert list(config.id2label.values()) == names and config.head_only and config.freeze_backbone
        assert (config.base_config.model_type, config.hidden_sizes) == ("gpt2", [1280] * 37)
    config = build_network("smallnorb").config
    assert tuple(config.id2label.values()) == CATEGORIES and not config.freeze_backbone and not config.head_only


def test_the_text_network_runs_on_its_backbone_where_that_is_at_hand(tmp_path, monkeypatch):
    # A GPT-2 of the same layer and width, but few heads and words, in the place of GPT-2-large.
    from transformers import GPT2Config, GPT2Model

    sizes = {"n_embd": 1280, "n_layer": 36, "n_head": 2, "vocab_size": 16, "n_positions": 8, "n_inner": 8}
    torch.manual_seed(0)
    backbone = GPT2Model(GPT2Config(**sizes)).half()
    backbone.save_pretrained(tmp_path / "gpt2")
    torch.save(original_state_dict("sst2_root"), tmp_path / "weights.pt")
    convert_checkpoint(tmp_path / "weights.pt", "sst2_root", tmp_path / "model")
    model = CapsuleHeadForSequenceClassification.from_pretrained(
        tmp_path / "model",
        base_model_name_or_path=str(tmp_path / "gpt2"),
        base_config=GPT2Config(**sizes),
        dtype=torch.float32,
    )
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    states = model(ids, output_hidden_states=True).hidden_states
    assert len(states) == 37
    alone = CapsuleHeadForSequenceClassification.from_pretrained(tmp_path / "model", load_backbone=False)
    torch.testing.assert_close(alone(hidden_states=torch.stack(states, 2)).logits, model(ids).logits)


# Refusals


def test_missing_unexpected_and_misshapen_tensors_are_all_named():
    state_dict = original_state_dict("sst5_root")
    del state_dict["routings.0.W"], state_dict["depth_emb"]
    state_dict["routings.2.W"] = torch.zeros(1)
    state_dict["routings.1.B"] = torch.zeros(64, 2, 1, 2)
    message = (
        r"not the weights of the sst5_root network: depth_emb is missing; routings\.0\.W is missing; "
        r"routings\.1\.B has shape \[64, 2, 1, 2\], expected \[64, 5, 1, 2\]; routings\.2\.W is unexpected\."
    )
    with pytest.raises(ValueError, match=message):
        convert_state_dict(state_dict, "sst5_root")


def test_another_network_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"not the weights of the sst2_root network: routings\.1\.B has shape \[64, 5"):
        convert_state_dict(original_state_dict("sst5_root"), "sst2_root")
    with pytest.raises(ValueError, match="network is 'sst3'; expected one of sst2_root, sst5_root, smallnorb"):
        build_network("sst3")


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


@pytest.mark.parametrize(
    "save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))], ids=["torch", "pickle"]
)
def test_nothing_in_a_file_is_executed(save, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pt"
    save({"depth_emb": Payload()}, path)
    with pytest.raises(ValueError, match=r"weights\.pt is not a state dict; expected a file of tensors by name"):
        read_state_dict(path)
    assert not (tmp_path / "executed").exists()


def test_files_that_are_no_state_dicts(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save([torch.zeros(1)], path)
    with pytest.raises(ValueError, match="holds a list that is not tensors by name; expected a state dict"):
        read_state_dict(path)
    torch.save(original_state_dict("sst2_root"), path)
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not a state dict; expected a file of tensors by name"):
            read_state_dict(path)
    with pytest.raises(OSError, match=r"none\.pt"):
        read_state_dict(tmp_path / "none.pt")


def test_a_model_is_not_overwritten(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is not empty; expected a new or empty directory"):
        convert_checkpoint(tmp_path / "weights.pt", "smallnorb", tmp_path)
    assert (tmp_path / "config.json").read_text() == "{}"


def test_a_model_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def fail(self, folder):
        raise OSError("No space left on device")

    torch.save(original_state_dict("smallnorb"), tmp_path / "weights.pt")
    with monkeypatch.context() as patch:
        patch.setattr(StereoImageProcessor, "save_pretrained", fail)
        with pytest.raises(OSError, match="No space left"):
            convert_checkpoint(tmp_path / "weights.pt", "smallnorb", tmp_path / "models" / "norb")
    assert not list((tmp_path / "models").iterdir())
    convert_checkpoint(tmp_path / "weights.pt", "smallnorb", tmp_path / "models" / "norb")
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["norb"]
