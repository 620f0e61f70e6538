"""Image models: flat and hierarchical backbones, two towers, the paper's smallNORB network, mixup, the pipeline."""

import numpy as np
import pytest
import torch
from configurations import make_config, small
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    CLIPConfig,
    SiglipConfig,
    ViTImageProcessor,
    pipeline,
)

from capsule_heads import (
    CapsuleHeadForImageClassification,
    CapsuleHeadForSequenceClassification,
    CapsuleHeadModel,
)
from capsule_heads.heads import SpatialPoseHead
from capsule_heads.models import modeling_capsule_head
from capsule_heads.paper.configuration_stereo_conv import StereoConvConfig

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
FLAT = {**SIZES, "image_size": 16, "patch_size": 8}
BACKBONES = {
    "beit": FLAT,
    "clip_vision_model": FLAT,
    "deit": FLAT,
    "dinov2": FLAT,
    "dinov2_with_registers": FLAT,
    "siglip_vision_model": FLAT,
    "vit": FLAT,
    "convnext": {"hidden_sizes": [4, 8], "depths": [1, 1], "num_stages": 2, "image_size": 16},
    "resnet": {"embedding_size": 4, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"},
    "swin": {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2, "image_size": 16},
    "stereo_conv": {"num_channels": 3, "image_size": 16, "hidden_sizes": [8, 12], "strides": [1, 2]},
}
# Tokens and width of each hidden state for an image of 16 x 16.
SHAPES = {
    **dict.fromkeys(("beit", "clip_vision_model", "dinov2", "vit"), [(5, 16)] * 3),
    "deit": [(6, 16)] * 3,
    "dinov2_with_registers": [(9, 16)] * 3,
    "siglip_vision_model": [(4, 16)] * 3,
    "convnext": [(16, 4), (16, 4), (4, 8)],
    "resnet": [(16, 4), (16, 8), (4, 12)],
    "swin": [(16, 8), (4, 16), (4, 16)],
    "stereo_conv": [(14 * 14, 8), (6 * 6, 12)],
}
LABELS = torch.tensor([0, 2])


@pytest.fixture(params=BACKBONES)
def image_backbone_type(request):
    return request.param


@pytest.fixture(scope="session")
def image_backbone_dir(tmp_path_factory, shake):
    """A directory with a tiny pretrained image backbone."""
    saved = {}

    def save(kind):
        if kind not in saved:
            torch.manual_seed(0)
            directory = tmp_path_factory.mktemp(kind)
            backbone = AutoModel.from_config(AutoConfig.for_model(kind, **BACKBONES[kind]))
            shake(backbone, scale=0.05).save_pretrained(directory)
            saved[kind] = str(directory)
        return saved[kind]

    return save


@pytest.fixture
def make_image_model(image_backbone_dir, shake):
    def make(kind="vit", **kwargs):
        torch.manual_seed(0)
        model = CapsuleHeadForImageClassification.from_backbone(
            image_backbone_dir(kind), **small(**{"num_labels": 3, **kwargs})
        )
        shake(model.head)
        return model

    return make


@pytest.fixture(scope="session")
def images():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))


# What every backbone has to do


def test_hidden_states_of_every_layer_reach_the_head(image_backbone_type, make_image_model, images):
    model = make_image_model(image_backbone_type)
    outputs = model(images, output_hidden_states=True, output_capsules=True, output_routing=True)
    shapes = SHAPES[image_backbone_type]
    assert [tuple(states.shape[1:]) for states in outputs.hidden_states] == shapes
    assert model.config.hidden_sizes == [width for _, width in shapes]
    assert len(model.head.detect_parts) == len({width for _, width in shapes})
    assert (outputs.logits.shape, outputs.poses.shape) == ((2, 3), (2, 3, 1, 2))
    assert outputs.logits.isfinite().all() and (outputs.logits[0] != outputs.logits[1]).all()
    assert outputs.routing_probabilities[0].shape == (2, sum(n_tokens for n_tokens, _ in shapes), 6)
    assert torch.equal(model(hidden_states=outputs.hidden_states).logits, outputs.logits)


def test_every_layer_and_place_matters(image_backbone_type, make_image_model, images):
    model = make_image_model(image_backbone_type)
    states = [x.requires_grad_() for x in model(images, output_hidden_states=True).hidden_states]
    model(hidden_states=states).logits[:, 0].sum().backward()
    assert all((x.grad.abs().sum(-1) > 0).all() for x in states)


def test_a_step_of_training_moves_the_head_alone(image_backbone_type, make_image_model, images):
    model = make_image_model(image_backbone_type).train()
    assert not any(module.training for module in model.backbone.modules())
    model(images, labels=LABELS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.head.parameters())
    assert all(parameter.grad is None for parameter in model.backbone.parameters())


@pytest.mark.parametrize("head_only", [True, False])
def test_saving_and_loading(image_backbone_type, head_only, make_image_model, images, tmp_path):
    model = make_image_model(image_backbone_type)
    model.save_pretrained(tmp_path, head_only=head_only)
    for load in (CapsuleHeadForImageClassification, AutoModelForImageClassification):
        loaded = load.from_pretrained(tmp_path)
        assert isinstance(loaded, CapsuleHeadForImageClassification) and loaded.config.head_only == head_only
        assert torch.equal(loaded(images).logits, model(images).logits)
    parts = AutoModel.from_pretrained(tmp_path)
    assert isinstance(parts, CapsuleHeadModel)
    assert parts(pixel_values=images).poses.shape == (2, 6, 1, 2)


def test_an_unfrozen_backbone_is_trained(image_backbone_type, make_image_model, images):
    model = make_image_model(image_backbone_type, freeze_backbone=False).train()
    model(images, labels=LABELS).loss.backward()
    first = next(model.backbone.parameters())
    assert first.grad is not None and first.grad.abs().max() > 0


@pytest.mark.parametrize("head_type", ["spatial_pose", "linear"])
def test_other_heads_take_the_last_hidden_state(image_backbone_type, head_type, make_image_model, images, tmp_path):
    model = make_image_model(image_backbone_type, head_type=head_type)
    outputs = model(images, output_hidden_states=True, output_capsules=True)
    assert [tuple(x.shape[1:]) for x in outputs.hidden_states] == SHAPES[image_backbone_type][-1:]
    assert outputs.logits.shape == (2, 3)
    assert (outputs.poses is None) if head_type == "linear" else (outputs.poses.shape == (2, 3, 4, 4))
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForImageClassification.from_pretrained(tmp_path)(images).logits, outputs.logits)


# Hidden states


def test_the_states_are_the_backbones_own(make_image_model, image_backbone_dir, images):
    model = make_image_model("convnext")
    backbone = AutoModel.from_pretrained(image_backbone_dir("convnext")).eval()
    with torch.no_grad():
        maps = backbone(images, output_hidden_states=True).hidden_states
    for states, feature_map in zip(model(images, output_hidden_states=True).hidden_states, maps, strict=True):
        for row in range(feature_map.shape[2]):
            for column in range(feature_map.shape[3]):
                place = row * feature_map.shape[3] + column
                assert torch.equal(states[:, place], feature_map[:, :, row, column])


def test_some_layers(make_image_model, images):
    model = make_image_model("resnet", layers=[-1, 0])
    shapes = [tuple(x.shape[1:]) for x in model(images, output_hidden_states=True).hidden_states]
    assert model.config.layers == [0, 2] and shapes == [(16, 4), (4, 12)]


def test_images_of_another_size(make_image_model):
    model, larger = make_image_model("vit"), torch.rand(1, 3, 32, 32)
    assert model(larger, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states[0].shape[1] == 17
    with pytest.raises(ValueError, match=r"Input image size \(32\*32\) doesn't match model"):
        model(larger)
    assert make_image_model("resnet")(larger, output_hidden_states=True).hidden_states[0].shape[1] == 64


@pytest.mark.parametrize(("config", "states"), [(CLIPConfig, 5), (SiglipConfig, 4)], ids=["clip", "siglip"])
def test_of_two_towers_the_vision_tower_is_taken(config, states, images, tmp_path, shake):
    torch.manual_seed(0)
    towers = {"text_config": {**SIZES, "vocab_size": 64, "max_position_embeddings": 8}, "vision_config": FLAT}
    whole = shake(AutoModel.from_config(config(**towers)), scale=0.05)
    whole.save_pretrained(tmp_path / "whole")
    model = CapsuleHeadForImageClassification.from_backbone(tmp_path / "whole", **small(num_labels=3))
    assert model(images, output_hidden_states=True).hidden_states[0].shape == (2, states, 16)
    weights = whole.vision_model.state_dict()
    found = {key: weights[key.removeprefix("vision_model.")] for key in model.backbone.state_dict()}
    assert all(torch.equal(model.backbone.state_dict()[key], weight) for key, weight in found.items())
    model.save_pretrained(tmp_path / "head")
    loaded = CapsuleHeadForImageClassification.from_pretrained(tmp_path / "head")
    assert torch.equal(loaded(images).logits, model(images).logits)


# Refusals


def test_text_backbones_are_refused(backbone_dir, backbone_config):
    message = "bert takes input_ids; expected a backbone that takes pixel_values"
    with pytest.raises(ValueError, match=message):
        CapsuleHeadForImageClassification.from_backbone(backbone_dir("bert"))
    with pytest.raises(ValueError, match=message):
        CapsuleHeadForImageClassification(make_config(backbone_config("bert")))


def test_a_checkpoint_of_an_image_model_is_no_text_model(make_image_model, tmp_path):
    make_image_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="vit takes pixel_values; expected a backbone that takes input_ids"):
        CapsuleHeadForSequenceClassification.from_pretrained(tmp_path)


def test_wrong_inputs_are_refused(make_image_model, images):
    model = make_image_model("resnet")
    with pytest.raises(ValueError, match=r"Pass one of pixel_values \(or hidden_states"):
        model()
    with pytest.raises(ValueError, match=r"\[\(2, 16, 4\), \(2, 4, 12\)\]; .* with 3 layers of size \[4, 8, 12\]"):
        model(hidden_states=[torch.zeros(2, 16, 4), torch.zeros(2, 4, 12)])
    with pytest.raises(ValueError, match=r"pixel_values has shape \(2, 3, 16, 15\); expected \[batch, 3, 16, 16\]"):
        make_image_model("stereo_conv")(images[..., :-1])
    with pytest.raises(ValueError, match="and LinearHead has no parts to stop at; load a classifier"):
        CapsuleHeadModel(make_config(AutoConfig.for_model("vit", **FLAT), head_type="linear"))


# The network of the paper


def smallnorb(**kwargs):
    config = make_config(StereoConvConfig(), head_type="spatial_pose", num_labels=5, **kwargs)
    return CapsuleHeadForImageClassification(config)


def test_the_smallnorb_network_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = smallnorb(freeze_backbone=False)
    assert model.num_parameters(only_trainable=True) == model.num_parameters() == 271_688


def test_the_smallnorb_network_routes_every_part_of_every_place():
    model = smallnorb().eval()
    outputs = model(torch.rand(2, 2, 96, 96), output_routing=True, output_capsules=True, output_hidden_states=True)
    assert outputs.hidden_states[0].shape == (2, 81, 64)
    assert [tuple(x.shape) for x in outputs.routing_probabilities] == [(2, 5184, 64), (2, 64, 5)]
    assert outputs.poses.shape == outputs.variances.shape == (2, 5, 4, 4)


def test_initialisation_of_the_smallnorb_network(tmp_path):
    torch.manual_seed(0)
    model = smallnorb(freeze_backbone=False)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", ".B", "beta_use", "beta_ign")):
            assert not parameter.any(), name
        elif parameter.ndim == 1:
            assert (parameter == 1).all(), name  # normalisation
        elif not name.endswith(".W"):  # convolutions: Kaiming normal
            expected = (2 / parameter[0].numel()) ** 0.5
            assert abs(parameter.std() / expected - 1) < 5 / (2 * parameter.numel()) ** 0.5, name
    # Running statistics are neither lost nor made anew on the way through a checkpoint.
    model.train()(torch.rand(4, 2, 96, 96))
    model.save_pretrained(tmp_path)
    loaded = CapsuleHeadForImageClassification.from_pretrained(tmp_path)
    buffers = dict(loaded.named_buffers())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
        assert "running_mean" not in name or buffer.abs().max() > 0, name


def test_coordinates_are_rows_then_columns(make_image_model):
    backbone = make_image_model("stereo_conv").backbone
    seen = []
    backbone.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    backbone(torch.rand(2, 3, 16, 16))
    rows, columns = seen[0][0, 3], seen[0][1, 4]
    line = torch.linspace(-1, 1, 16)
    assert torch.equal(rows, line[:, None].expand(16, 16)) and torch.equal(columns, line.expand(16, 16))


# Mixup


def test_images_and_targets_are_mixed_in_training(make_image_model, images, monkeypatch):
    model = make_image_model("resnet", mixup_alpha=0.2).train()
    ratio, partner = torch.tensor([0.25, 0.9]), torch.tensor([1, 0])
    monkeypatch.setattr(modeling_capsule_head, "draw_mixup", lambda n, alpha, device: (ratio, partner))
    r = ratio.view(2, 1, 1, 1)
    mixed = r * images + (1 - r) * images[partner]
    outputs = model(images, labels=LABELS)
    logits = model(mixed).logits
    torch.testing.assert_close(outputs.logits, logits)
    log_p = logits.log_softmax(-1)
    expected = -(ratio * log_p[[0, 1], LABELS] + (1 - ratio) * log_p[[0, 1], LABELS[partner]]).mean()
    torch.testing.assert_close(outputs.loss, expected)
    # Hidden states, where they are given in the place of images.
    states = model(images, output_hidden_states=True).hidden_states
    r = ratio.view(2, 1, 1)
    expected = model(hidden_states=[r * x + (1 - r) * x[partner] for x in states]).logits
    torch.testing.assert_close(model(hidden_states=states, labels=LABELS).logits, expected)
    # And nothing is mixed without training, or with alpha 0.
    torch.testing.assert_close(model.eval()(images, labels=LABELS).logits, model(images).logits)


# The heads


def test_the_spatial_pose_head_agrees_with_the_straightforward_computation():
    torch.manual_seed(0)
    head = SpatialPoseHead(hidden_sizes=[5], n_out=3, n_parts=4, d_cov=2, d_cap=3).double().eval()
    with torch.no_grad():
        for tensor in (*head.parameters(), *head.buffers()):
            if tensor.is_floating_point():
                tensor.add_(0.3 * torch.rand_like(tensor))
    states = torch.randn(2, 6, 5, dtype=torch.float64)  # six places
    mask = torch.tensor([[1, 1, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1]])

    def normalise(norm, x):
        return (x - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias

    scores, poses = [], []
    for part in range(4):
        for place in range(6):
            (norm_a, conv_a), (norm_mu, conv_mu) = head.compute_a, head.compute_mu
            a = normalise(norm_a, states[:, place]) @ conv_a.weight[part, :, 0] + conv_a.bias[part]
            scores.append(a.masked_fill(mask[:, place] == 0, -torch.inf))
            rows = slice(part * 6, part * 6 + 6)
            mu = normalise(norm_mu, states[:, place]) @ conv_mu.weight[rows, :, 0].T + conv_mu.bias[rows]
            poses.append(mu.view(2, 2, 3))
    a, mu = torch.stack(scores, dim=1), torch.stack(poses, dim=1)
    for routing in head.routings:
        a, mu, sig2 = routing(a, mu)
    output = head([states], mask)
    for actual, expected in zip(output[:3], (a, mu, sig2)):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_the_linear_head_is_an_affine_map_of_the_mean(make_image_model, images):
    model = make_image_model("vit", head_type="linear")
    (states,) = model(images, output_hidden_states=True).hidden_states
    expected = states.mean(1) @ model.head.affine.weight.T + model.head.affine.bias
    torch.testing.assert_close(model(images).logits, expected)
    mask = torch.tensor([[1, 1, 0, 0, 1], [1, 1, 1, 1, 1]])
    expected = states[0, [0, 1, 4]].mean(0) @ model.head.affine.weight.T + model.head.affine.bias
    torch.testing.assert_close(model.head([states], mask).a_out[0], expected)


@pytest.mark.parametrize("head_type", ["token_depth", "spatial_pose", "linear"])
def test_regression(head_type, make_image_model, images):
    model = make_image_model("vit", head_type=head_type, num_labels=1, label_mean=10.0, label_std=2.0)
    outputs = model(images, labels=torch.tensor([9.0, 13.0]))
    assert outputs.logits.shape == (2, 1) and (outputs.logits - 10).abs().max() < 50
    expected = (((outputs.logits[:, 0] - torch.tensor([9.0, 13.0])) / 2) ** 2).mean()
    torch.testing.assert_close(outputs.loss, expected)


# The pipeline


def test_the_pipeline(make_image_model, tmp_path):
    names = {0: "cat", 1: "dog", 2: "cup"}
    model = make_image_model("vit", id2label=names, num_labels=None)
    model.save_pretrained(tmp_path)
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    processor.save_pretrained(tmp_path)
    picture = Image.fromarray((np.random.default_rng(0).random((20, 30, 3)) * 255).astype("uint8"))
    scores = {found["label"]: found["score"] for found in pipeline("image-classification", str(tmp_path))(picture)}
    expected = model(**processor(picture, return_tensors="pt")).logits.softmax(-1)[0].tolist()
    assert scores == pytest.approx(dict(zip(names.values(), expected)), rel=1e-5)
