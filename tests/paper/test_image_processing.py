import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, PreTrainedConfig, ViTConfig, ViTForImageClassification, pipeline
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

from capsule_heads.paper.image_processing_stereo import StereoImageProcessor, side_by_side


@pytest.fixture(scope="module")
def pairs():
    return np.random.default_rng(0).integers(0, 256, (3, 2, 96, 96), dtype=np.uint8)


@pytest.fixture(scope="module")
def processor():
    return StereoImageProcessor()


def forms(pairs):
    """The same batch of pairs in each of the forms they may come in."""
    return {
        "array": pairs,
        "tensor": torch.from_numpy(pairs),
        "int64": torch.from_numpy(pairs).long(),
        "floats": pairs.astype(np.float64) / 255,
        "float tensor": torch.from_numpy(pairs).float() / 255,
        "list of arrays": list(pairs),
        "list of tensors": list(torch.from_numpy(pairs)),
        "tuple": tuple(pairs),
        "images": [side_by_side(pair) for pair in pairs],
        "colour images": [side_by_side(pair).convert("RGB") for pair in pairs],
        "all kinds": [pairs[0], torch.from_numpy(pairs[1]), side_by_side(pairs[2])],
    }


@pytest.mark.parametrize("form", forms(np.zeros((3, 2, 4, 4), np.uint8)))
def test_a_batch_in_any_form(processor, pairs, form):
    pixels = processor(forms(pairs)[form], return_tensors="pt")
    assert list(pixels) == ["pixel_values"]
    assert pixels["pixel_values"].dtype == torch.float32
    assert torch.equal(pixels["pixel_values"], torch.from_numpy(pairs).float() / 255)


@pytest.mark.parametrize("form", ["array", "tensor", "images", "floats"])
def test_one_pair_is_a_batch_of_one(processor, pairs, form):
    pixels = processor(forms(pairs)[form][1], return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, torch.from_numpy(pairs[1:2]).float() / 255)


def test_numpy_and_no_tensors(processor, pairs):
    expected = pairs.astype(np.float32) / np.float32(255)
    found = processor(pairs, return_tensors="np")["pixel_values"]
    assert isinstance(found, np.ndarray) and found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(processor(images=pairs)["pixel_values"], expected)


def test_side_by_side_has_the_left_view_on_the_left():
    pair = np.stack([np.full((4, 4), 10, np.uint8), np.full((4, 4), 200, np.uint8)])
    image = side_by_side(pair)
    assert image.mode == "L" and image.size == (8, 4)
    assert np.asarray(image).tolist() == [[10] * 4 + [200] * 4] * 4


def test_every_grey_value_survives_an_image_in_colour():
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = side_by_side(np.stack([values, values[::-1]])).convert("RGB")
    found = StereoImageProcessor(16)(image, return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(np.rint(255 * found), np.stack([values, values[::-1]]))


def test_side_by_side_rounds_floats():
    image = side_by_side(torch.tensor([0.0, 0.499, 0.501, 1.0]).view(2, 1, 2))
    assert np.asarray(image).tolist() == [[0, 127, 128, 255]]


def test_other_sizes_are_resized_each_view_by_itself():
    pair = np.stack([np.zeros((40, 40), np.uint8), np.full((40, 40), 255, np.uint8)])
    for images in (pair, side_by_side(pair)):
        pixels = StereoImageProcessor()(images, return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 2, 96, 96)
        assert (pixels[0, 0] == 0).all() and (pixels[0, 1] == 1).all()  # no light leaks over the edge between them


def test_resizing_is_bilinear():
    ramp = np.tile(np.arange(0, 256, 64, dtype=np.uint8), (2, 4, 1))  # 0 64 128 192
    pixels = StereoImageProcessor(8)(ramp, return_tensors="np")["pixel_values"]
    expected = np.array([0, 16, 48, 80, 112, 144, 176, 192]) / 255
    np.testing.assert_allclose(pixels[0, 1, 3], expected, atol=1e-6)
    halved = StereoImageProcessor(2)(ramp, return_tensors="np")["pixel_values"]
    assert halved.shape == (1, 2, 2, 2)
    assert (halved[..., 0] < halved[..., 1]).all()


def test_it_is_saved_and_loaded(tmp_path, pairs):
    processor = StereoImageProcessor({"height": 48, "width": 64})
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text(encoding="utf-8"))
    assert saved == {"image_processor_type": "StereoImageProcessor", "size": {"height": 48, "width": 64}}
    loaded = StereoImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert loaded(pairs, return_tensors="pt")["pixel_values"].shape == (3, 2, 48, 64)
    np.testing.assert_array_equal(loaded(pairs)["pixel_values"], processor(pairs)["pixel_values"])


class StereoTestConfig(PreTrainedConfig):
    model_type = "stereo-test"


@pytest.fixture
def registered():
    # By position: the argument's name was another before transformers had backends of image processors.
    AutoImageProcessor.register(StereoTestConfig, StereoImageProcessor)
    yield
    del IMAGE_PROCESSOR_MAPPING._extra_content[StereoTestConfig]


def test_auto_image_processor_loads_it(registered, tmp_path):
    StereoImageProcessor(64).save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is StereoImageProcessor
    assert loaded.size == {"height": 64, "width": 64}


def test_a_pipeline_takes_images(processor, pairs):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = ViTConfig(image_size=96, patch_size=48, num_channels=2, num_labels=5, **sizes)
    model = ViTForImageClassification(config).eval()
    with torch.no_grad():
        expected = model(processor(pairs, return_tensors="pt")["pixel_values"]).logits.softmax(-1)
    classify = pipeline("image-classification", model=model, image_processor=processor, device="cpu")
    found = classify([side_by_side(pair) for pair in pairs], top_k=5)
    scores = [[score["score"] for score in sorted(row, key=lambda score: score["label"])] for row in found]
    torch.testing.assert_close(torch.tensor(scores), expected)


@pytest.mark.parametrize(
    "size",
    [
        0,
        True,
        9.5,
        "96",
        [96, 96],
        {"height": 96},
        {"height": 96, "width": -1},
        {"height": "96", "width": 96},
        {"edge": 9},
    ],
)
def test_sizes_that_are_none(size):
    with pytest.raises(ValueError, match=r"size is .*; expected a number of pixels, or a height and a width"):
        StereoImageProcessor(size)


@pytest.mark.parametrize("content", ["[1]", '"x"'])
def test_a_file_without_keys_is_refused(tmp_path, content):
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(OSError, match=f"{tmp_path} has a preprocessor_config.json without keys and values"):
        StereoImageProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "images, message",
    [
        (Image.new("L", (96, 96)), r"The image is 96 pixels wide and 96 high; expected both views .* side by side"),
        (Image.new("RGB", (191, 96)), r"The image is 191 pixels wide and 96 high; .* twice as wide as high"),
        (np.zeros((96, 96), np.uint8), r"of shape \[96, 96\]; expected \[2, height, width\]"),
        (np.zeros((3, 96, 96), np.uint8), r"of shape \[3, 96, 96\]; expected \[2, height, width\]"),
        (np.zeros((96, 96, 2), np.uint8), r"of shape \[96, 96, 2\]; expected \[2, height, width\]"),
        (torch.zeros(4, 1, 96, 96), r"of shape \[1, 96, 96\]; expected \[2, height, width\]"),
        (np.zeros((2, 0, 96), np.uint8), r"of shape \[2, 0, 96\]; expected \[2, height, width\]"),
        (np.full((2, 96, 96), 256), r"holds int64 values from 256 to 256; expected integers from 0 to 255"),
        (np.full((2, 96, 96), 7.0), r"holds float64 values from 7\.0 to 7\.0; .* or floats from 0 to 1"),
        (torch.full((2, 96, 96), -0.5), r"holds float32 values from -0\.5 to -0\.5"),
        (np.full((2, 96, 96), np.nan), r"holds float64 values from nan to nan"),
        (np.zeros((2, 96, 96), bool), r"holds bool values from False to False"),
        ([], r"There are no images; expected one stereo pair or more"),
    ],
)
def test_what_is_not_a_stereo_pair_is_refused(processor, images, message):
    with pytest.raises(ValueError, match=message):
        processor(images)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda processor: processor([[[0, 0], [0, 0]]]), r"A stereo pair is a list; expected an image, an array"),
        (lambda processor: processor(np.zeros((2, 4, 4)), do_resize=False), r"has no option do_resize"),
        (lambda processor: side_by_side(Image.new("L", (8, 4))), r"pair is an image already"),
    ],
)
def test_other_types_and_options_are_refused(processor, call, message):
    with pytest.raises(TypeError, match=message):
        call(processor)


@pytest.mark.parametrize("mode", ["I", "I;16", "F"])
def test_images_whose_values_may_not_fit_are_refused(mode):
    with pytest.raises(ValueError, match=rf"of mode {mode}, whose values may not fit in 8 bits"):
        StereoImageProcessor()(Image.new(mode, (192, 96)))
