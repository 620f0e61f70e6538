"""Wrong tensors, damaged checkpoints, pickles and paths out of a repository: one clear error each, and nothing runs."""

import json
import pickle
import re
import shutil

import pytest
import torch

from capsule_heads import CapsuleHeadConfig, CapsuleHeadForImageClassification, CapsuleHeadForSequenceClassification
from capsule_heads.models.configuration_capsule_head import option_names
from capsule_heads.paper.configuration_stereo_conv import StereoConvConfig

load = CapsuleHeadForSequenceClassification.from_pretrained
create = CapsuleHeadForSequenceClassification.from_backbone
NAN = float("nan")

STATES, IDS, MASK = torch.zeros(2, 5, 3, 16), torch.full((2, 5), 7), torch.ones(2, 5)
LABELS = torch.tensor([0, 1])


# Tensors


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"hidden_states": STATES.long()}, "hidden_states are torch.int64; expected floating-point tensors"),
        ({"hidden_states": STATES.tolist()}, "hidden_states are list; expected floating-point tensors"),
        ({"hidden_states": "states"}, "hidden_states are str; expected floating-point tensors"),
        (
            {"hidden_states": [STATES[:1, :, 0], STATES[:, :, 1], STATES[:, :, 2]]},
            "hidden_states has shape [(1,",
        ),
        ({"hidden_states": STATES, "attention_mask": -MASK}, "attention_mask goes from -1.0 to -1.0; expected 1 for"),
        (
            {"hidden_states": STATES, "attention_mask": MASK * NAN},
            "attention_mask goes from nan to nan; expected",
        ),
        ({"hidden_states": STATES, "attention_mask": 2 * MASK}, "attention_mask goes from 2.0 to 2.0; expected 1 for"),
        ({"hidden_states": STATES, "attention_mask": [[1] * 5] * 2}, "attention_mask is a list; expected a tensor"),
        ({"input_ids": IDS, "attention_mask": MASK * NAN}, "attention_mask goes from nan to nan"),
        ({"input_ids": IDS, "attention_mask": MASK[:, None, None]}, "attention_mask has shape (2, 1, 1, 5); expected"),
        ({"input_ids": IDS.float()}, "input_ids are torch.float32 of shape (2, 5); expected integers [batch, tokens]"),
        ({"input_ids": IDS[0]}, "input_ids are torch.int64 of shape (5,); expected integers [batch, tokens]"),
        ({"input_ids": IDS.tolist()}, 'input_ids are a list; expected a tensor: return_tensors="pt"'),
        ({"input_ids": IDS + 99}, "input_ids go from 106 to 106, and the bert backbone has embeddings for 0 to 63"),
        ({"input_ids": -IDS}, "input_ids go from -7 to -7, and the bert backbone has embeddings for 0 to 63"),
        ({"input_ids": IDS[:0]}, "input_ids have shape (0, 5); expected at least one sample and one token"),
        ({"input_ids": IDS[:, :0]}, "input_ids have shape (2, 0); expected at least one sample and one token"),
        ({"input_ids": IDS, "labels": [0, 1]}, "labels are a list; expected a tensor"),
        ({"input_ids": IDS, "labels": torch.tensor([0, 1, 2])}, "There are labels of 3 samples, and inputs of 2"),
        (
            {"input_ids": IDS, "labels": torch.tensor([0, 3])},
            "labels go from 0 to 3; num_labels=3 expects",
        ),
        ({"hidden_states": STATES[:0], "labels": LABELS[:0]}, "labels are of no sample"),
    ],
)
def test_wrong_tensors_are_refused(make_model, inputs, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        make_model()(**inputs)


def test_more_tokens_than_positions_are_refused(make_model):
    model = make_model()
    length = model.backbone.config.max_position_embeddings + 1
    ids = torch.full((2, length), 7)
    with pytest.raises(ValueError, match=rf"texts have {length} tokens.* bert .* has positions for {length - 1}; "):
        model(input_ids=ids)
    with pytest.raises(ValueError, match=rf"position_ids go up to {length}, .* positions 0 to {length - 2}; leave"):
        model(input_ids=IDS, position_ids=torch.full_like(IDS, length))


def test_labels_of_another_number_than_images():
    model = CapsuleHeadForImageClassification.from_backbone(
        StereoConvConfig(hidden_sizes=[4] * 6), num_labels=3
    ).train()
    with pytest.raises(ValueError, match="There are labels of 3 samples, and inputs of 2"):
        model(pixel_values=torch.zeros(2, 2, 96, 96), labels=torch.tensor([0, 1, 2]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_channels": 0}, "num_channels is 0; expected a positive whole number"),
        ({"image_size": "96"}, "image_size is '96'; expected a positive whole number"),
        ({"hidden_sizes": 4}, "hidden_sizes is 4 and strides (1, 2, 1, 2, 1, 2); expected one of each per block"),
        ({"hidden_sizes": [4, 0], "strides": [1, 2]}, "hidden_sizes[1] is 0; expected a positive whole number"),
        ({"hidden_sizes": [4], "strides": [1.5]}, "strides[0] is 1.5; expected a positive whole number"),
    ],
)
def test_wrong_sizes_of_a_stereo_backbone_are_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        StereoConvConfig(**fields)


@pytest.mark.parametrize("inputs", [{"hidden_states": STATES[:0]}, {"hidden_states": STATES[:, :0]}])
def test_no_sample_and_no_token_have_finite_scores(make_model, inputs):
    logits = make_model()(**inputs).logits
    assert logits.shape == (len(inputs["hidden_states"]), 3) and logits.isfinite().all()


def test_hidden_states_of_several_precisions(make_model):
    model, states = make_model(), torch.randn(2, 5, 3, 16)
    expected = model(hidden_states=states).logits
    mixed = [states[:, :, 0].double(), states[:, :, 1], states[:, :, 2].double()]
    torch.testing.assert_close(model(hidden_states=mixed).logits, expected)
    halves = model(hidden_states=[states[:, :, 0].bfloat16(), *mixed[1:]]).logits
    torch.testing.assert_close(halves, expected, rtol=0, atol=0.02)


# Checkpoints


class Trap:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture
def trap(tmp_path):
    """A trap; the test fails if it was sprung."""
    yield Trap(tmp_path / "sprung")
    assert not (tmp_path / "sprung").exists()


@pytest.fixture(params=["head", "whole"])
def checkpoint(request, make_model, tmp_path):
    """A directory with a head alone, or a whole model."""
    make_model().save_pretrained(tmp_path / "model", head_only=request.param == "head")
    return tmp_path / "model"


def flipped(content, at):
    return content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]


DAMAGES = {
    "cut to half": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "four bytes": lambda content: content[:4],
    "another length of the header": lambda content: flipped(content, 0),
    "another header": lambda content: flipped(content, 9),
    "longer": lambda content: content + b"more",
    "something else": lambda content: b"not weights " * 100,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights(checkpoint, damage):
    file = checkpoint / "model.safetensors"
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    with pytest.raises(
        OSError, match=rf"The weights in {checkpoint} cannot be read: a file is damaged, cut short.*again"
    ):
        load(checkpoint)


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_a_pickle_in_the_place_of_weights_is_never_loaded(checkpoint, trap, kind):
    file = checkpoint / "model.safetensors"
    for name in ("model.safetensors", "pytorch_model.bin"):
        file.unlink(missing_ok=True)
        if kind == "pickle":
            (checkpoint / name).write_bytes(pickle.dumps({"weight": trap}))
        else:
            torch.save({"weight": trap}, checkpoint / name)
        with pytest.raises(OSError, match=r"cannot be read: a file is damaged|no file named model\.safetensors"):
            load(checkpoint)
        (checkpoint / name).unlink()


def test_not_even_a_harmless_pickle_is_loaded(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    for options in ({}, {"use_safetensors": False}):
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            load(tmp_path, **options)


def test_a_pickle_beside_the_weights_is_left_alone(checkpoint, trap, pad):
    expected = load(checkpoint)(**pad()).logits
    (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": trap}))
    assert torch.equal(load(checkpoint)(**pad()).logits, expected)


@pytest.mark.parametrize("damage", [*DAMAGES, "pickle"])
def test_a_damaged_backbone(backbone_dir, trap, tmp_path, damage):
    backbone = tmp_path / "backbone"
    shutil.copytree(backbone_dir("bert"), backbone)
    file = backbone / "model.safetensors"
    if damage == "pickle":
        file.unlink()
        torch.save({"weight": trap}, backbone / "pytorch_model.bin")
    else:
        file.write_bytes(DAMAGES[damage](file.read_bytes()))
    with pytest.raises(OSError, match=rf"The weights in {backbone} cannot be read: a file is damaged"):
        create(backbone)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../../outside.safetensors", "names the file ../../outside.safetensors; expected safetensors files beside it"),
        ("/etc/passwd", "names the file /etc/passwd; expected safetensors files beside it"),
        ("pytorch_model.bin", "names the file pytorch_model.bin; expected safetensors files beside it"),
        (3, "names the file 3; expected safetensors files beside it"),
        ("none.safetensors", "names the file none.safetensors, which is missing"),
        (None, "is not an index of files: expected JSON with metadata and a weight_map"),
    ],
)
def test_an_index_of_files_elsewhere(make_model, tmp_path, name, message):
    make_model().save_pretrained(tmp_path, head_only=False, max_shard_size="10KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = name and dict.fromkeys(index["weight_map"], name)
    path.write_text(json.dumps(index))
    with pytest.raises(OSError, match=re.escape(message)):
        load(tmp_path)
    del index["metadata"]
    for content in ("{", "[]", "3", '{"metadata": {}, "weight_map": {}}', json.dumps(index)):
        path.write_text(content)
        with pytest.raises(OSError, match="is not an index of files: expected JSON"):
            load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[]", b"[1]", b"3", b'"bert"', b"null", b"\xff\xfe\x00"])
def test_a_config_file_that_is_none(checkpoint, content):
    (checkpoint / "config.json").write_bytes(content)
    for loader in (load, CapsuleHeadConfig.from_pretrained):
        with pytest.raises(OSError, match=rf"{checkpoint}.*(not a valid JSON file|expected)"):
            loader(checkpoint)


def test_a_config_file_that_is_missing(checkpoint):
    config = CapsuleHeadConfig.from_pretrained(checkpoint)
    (checkpoint / "config.json").unlink()
    for kwargs in ({}, {"config": config}):
        with pytest.raises(OSError, match=f"{checkpoint} has no config.json with keys and values; expected"):
            load(checkpoint, **kwargs)
    (checkpoint / "config.json").mkdir()
    with pytest.raises(OSError, match=r"config\.json"):
        load(checkpoint)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("n_parts", "6", "n_parts is '6'; expected"),
        ("eps", [1], r"eps is \[1\]; expected"),
        ("layers", [7], r"layers is \[7\]; the backbone has 3 hidden states"),
        ("head_only", "yes", "head_only is 'yes'; expected"),
        ("base_config", None, "base_config is None; expected"),
        ("base_config", {}, "base_config is {}; expected"),
        ("model_type", 3, "is of a 3 model, not of a capsule-head model"),
        ("id2label", {"1": "a"}, "id2label is {'1': 'a'}; expected"),
    ],
)
def test_a_config_file_with_wrong_values(checkpoint, field, value, message):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(ValueError, match=message):
        load(checkpoint)


# Names


@pytest.mark.parametrize("name", ["package:torch/../numpy", "package:torch//etc", "package:torch/../../.."])
def test_a_package_folder_outside_the_package(name):
    with pytest.raises(OSError, match="the Python package torch has no folder"):
        create(name)


@pytest.mark.parametrize("name", [None, 3, ["bert"]])
def test_a_backbone_that_is_no_name(name):
    with pytest.raises(
        TypeError,
        match=r"The backbone is .*; expected a name on the Hub, a directory, a configuration, or a loaded model",
    ):
        create(name)


def test_saving_to_a_file(make_model, tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OSError, match="file is a file; expected a directory"):
        make_model().save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"


# Remote code


@pytest.fixture
def remote(tmp_path):
    """A backbone whose repository brings its own code, which makes a file when it runs."""
    folder = tmp_path / "remote"
    folder.mkdir()
    auto_map = {"AutoConfig": "code.RemoteConfig", "AutoModel": "code.RemoteModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": "remote_model", "auto_map": auto_map}))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\nclass RemoteConfig: pass\n")
    yield folder
    assert not (tmp_path / "sprung").exists()


def test_remote_code_of_a_backbone_needs_consent(remote, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "n")  # transformers asks, where there is someone to ask
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        create(remote)


def test_remote_code_of_a_checkpoints_backbone_needs_consent(remote, checkpoint, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "n")
    path = checkpoint / "config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": str(remote)}
    remote_config = json.loads((remote / "config.json").read_text())
    path.write_text(json.dumps({**config, "base_config": remote_config}))
    with pytest.raises(ValueError, match="remote_model"):
        load(checkpoint)
    path.write_text(json.dumps(config))
    if config["head_only"]:
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            load(checkpoint)
    else:  # its backbone is in the checkpoint
        load(checkpoint)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (
            {"n_parts": 32},
            RuntimeError,
            r"has head\.routings\.0\.B of shape \(1, 6, 1, 2\).* makes it \(1, 32, 1, 2\), and 7 more",
        ),
        (
            {"id2label": {"0": "a"}, "label2id": {"a": 0}},
            RuntimeError,
            r"has head\.routings\.1\.B of shape \(6, 3, 1, 2\)",
        ),
        (
            {"head_type": "linear", "layers": [2]},
            ValueError,
            r"lacks 2 weights of the head, among them head\.affine\.bias; ",
        ),
    ],
)
def test_weights_that_are_not_of_the_configuration(checkpoint, fields, error, message):
    file = checkpoint / "config.json"
    content = json.loads(file.read_text())
    if "head_type" in fields:
        content = {name: value for name, value in content.items() if name not in option_names()}
    file.write_text(json.dumps(content | fields))
    with pytest.raises(error, match=message):
        load(checkpoint)
    assert load(checkpoint, ignore_mismatched_sizes=True) is not None
