"""One input, one score: training, `capsule-heads predict`, explanations and transformers' pipeline see the same."""

import io
import wave

import numpy as np
import pandas
import pytest
import torch
from datasets import Dataset, DatasetDict
from datasets import Image as ImageFeature
from PIL import Image
from transformers import (
    AutoModel,
    TextClassificationPipeline,
    ViTConfig,
    ViTImageProcessor,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    WhisperConfig,
    WhisperFeatureExtractor,
    pipeline,
)

from capsule_heads import CapsuleHeadForAudioClassification, CapsuleHeadForImageClassification
from capsule_heads.backbones.processors import load_processor
from capsule_heads.data import CapsuleCollator, tokenize
from capsule_heads.data.audio import AudioCollator, as_audio, audio_features
from capsule_heads.data.images import as_image, prepare_images
from capsule_heads.explain import explain
from capsule_heads.predicting import score_inputs

N_OUT = 3
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TOLERANCE = {"rtol": 0, "atol": 1e-5}


def save_classifier(model_class, config, processor, modality, folder, shake):
    """Save a backbone with its processor, and a model that was trained on it, as a training run does."""
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder / "backbone")
    processor.save_pretrained(folder / "backbone")
    model = model_class.from_backbone(folder / "backbone", num_labels=N_OUT, d_inp=8, n_parts=6)
    shake(model.head, scale=0.5)
    model.save_pretrained(folder / "run", head_only=False)
    load_processor(str(folder / "backbone"), modality).save_pretrained(folder / "run")
    return str(folder / "run")


def by_label(predictions):
    return [one["score"] for one in sorted(predictions, key=lambda one: one["label"])]


# Audio

RATE = 8_000


def whisper():
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    sizes |= {"max_source_positions": 50, "vocab_size": 64, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    extractor = WhisperFeatureExtractor(feature_size=6, sampling_rate=RATE, hop_length=80, chunk_length=1)
    return WhisperConfig(d_model=16, num_mel_bins=6, **sizes, **tokens), extractor


def wav2vec2(norm):
    convolutions = {"conv_dim": (8, 8), "conv_kernel": (8, 4), "conv_stride": (8, 2), "num_conv_pos_embeddings": 4}
    config = Wav2Vec2Config(
        feat_extract_norm=norm, conv_bias=norm == "layer", num_conv_pos_embedding_groups=2, **convolutions, **SMALL
    )
    return config, Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=False)


@pytest.fixture(scope="module", params=["wav2vec2 group", "wav2vec2 layer", "whisper"])
def listener(request, tmp_path_factory, shake):
    config, extractor = whisper() if request.param == "whisper" else wav2vec2(request.param.split()[1])
    folder = tmp_path_factory.mktemp("audio")
    return save_classifier(CapsuleHeadForAudioClassification, config, extractor, "audio", folder, shake)


def write_wav(path, samples, rate=RATE):
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(np.asarray(samples, "<i2").tobytes())
    return path


def test_the_same_audio_has_the_same_score_everywhere(listener, tmp_path):
    rng = np.random.default_rng(0)
    recordings = [(rng.normal(size=n) * 3_000).astype(np.int16) for n in (2_000, 900)]
    files = [write_wav(tmp_path / f"{n}.wav", samples) for n, samples in enumerate(recordings)]
    floats = [(samples / 2**15).astype(np.float32) for samples in recordings]
    classify = pipeline("audio-classification", model=listener, top_k=N_OUT)
    expected = torch.tensor([by_label(classify(samples)) for samples in floats])
    assert (expected[0] - expected[1]).abs().max() > 1e-4
    model = CapsuleHeadForAudioClassification.from_pretrained(listener)
    forms = {
        "paths": files,
        "texts": [str(file) for file in files],
        "bytes": [file.read_bytes() for file in files],
        "arrays": floats,
        "double": [x.astype(np.float64) for x in floats],
        "tensors": [torch.from_numpy(x) for x in floats],
        "int16": recordings,
        "int16 tensors": [torch.from_numpy(x) for x in recordings],
        "series": pandas.Series(floats),
        "array": [{"array": x, "sampling_rate": RATE} for x in floats],
        "raw": [{"raw": x.tolist(), "sampling_rate": RATE} for x in floats],
        "of datasets": [{"path": str(file), "bytes": None} for file in files],
    }
    for form, given in forms.items():
        found = torch.stack([x.probabilities for x in explain(model, given)])
        torch.testing.assert_close(found, expected, msg=lambda text, form=form: f"{form}: {text}", **TOLERANCE)
        (alone,) = explain(model, given[0])
        torch.testing.assert_close(alone.probabilities, expected[0], **TOLERANCE)
    processor = load_processor(listener, "audio")
    predicted = score_inputs(model, list(map(str, files)), processor, 8)
    torch.testing.assert_close(predicted, expected, **TOLERANCE)
    rows = [audio_features(as_audio(file, RATE), processor) for file in files]
    with torch.no_grad():
        trained = torch.cat([model(**AudioCollator(processor)([row])).logits.softmax(-1) for row in rows])
    torch.testing.assert_close(trained, expected, **TOLERANCE)


def test_a_stated_sampling_rate_is_resampled(listener, tmp_path):
    model = CapsuleHeadForAudioClassification.from_pretrained(listener)
    samples = (np.random.default_rng(0).normal(size=6_000) * 3_000).astype(np.int16)
    expected = explain(model, write_wav(tmp_path / "a.wav", samples, 44_100))[0].logits
    found = explain(model, {"array": samples, "sampling_rate": 44_100})[0].logits
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, explain(model, samples)[0].logits, atol=1e-4)


@pytest.mark.parametrize(
    "given, error, message",
    [
        (
            np.zeros((2, 800), np.float32),
            ValueError,
            r"The input has the shape \[2, 800\]; expected \[samples\]: av",
        ),
        (torch.zeros(2, 800), ValueError, "average the channels"),
        ([np.zeros(800), 0.5], TypeError, "Input 1 is a float; expected audio as an array"),
        (np.zeros(800, np.int64), TypeError, "The input is a int64 array; expected audio as .* of int16"),
        ({"array": np.zeros(800)}, ValueError, "The input has no sampling_rate; expected one beside array"),
        ({"array": np.zeros(800), "sampling_rate": 0}, ValueError, "The input has the sampling_rate 0; expected a who"),
        ({"array": np.zeros(800), "sampling_rate": None}, ValueError, "has the sampling_rate None"),
        (np.zeros(0), ValueError, "The input has no samples; expected audio"),
        (np.full(800, np.nan), ValueError, "The input has samples that are not finite"),
        (b"text", ValueError, "The input is not an audio file that can be read: "),
        ("none.wav", FileNotFoundError, "none.wav is not a file; expected an audio file"),
    ],
)
def test_what_is_no_audio(listener, given, error, message):
    with pytest.raises(error, match=message) as raised:
        explain(CapsuleHeadForAudioClassification.from_pretrained(listener), given)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_audio_shorter_than_a_frame_is_named(norm, tmp_path, shake):
    folder = save_classifier(CapsuleHeadForAudioClassification, *wav2vec2(norm), "audio", tmp_path, shake)
    model = CapsuleHeadForAudioClassification.from_pretrained(folder)
    noise = np.random.default_rng(0).normal(size=400).astype(np.float32)
    assert explain(model, noise[:32])[0].logits.isfinite().all()
    with pytest.raises(ValueError, match=r"Input 1 has 31 samples at .*; expected at least 32"):
        explain(model, [noise, noise[:31]])
    file = str(write_wav(tmp_path / "short.wav", noise[:31]))
    processor = load_processor(folder, "audio")
    with pytest.raises(ValueError, match=r"short\.wav has 31 samples at .*; expected at least 32"):
        score_inputs(model, [file], processor, 8)
    batch = AudioCollator(processor)([audio_features(x, processor) for x in (noise, noise[:31])])
    with pytest.raises(ValueError, match=r"Audio 1 of the batch has 31 samples, too few .* wav2vec2 .*at least 32"):
        model(**batch)
    with pytest.raises(ValueError, match=r"Audio 0 of the batch has 31 samples"):
        model(input_values=torch.zeros(1, 31))


# Images


@pytest.fixture(scope="module")
def viewer(tmp_path_factory, shake):
    config, processor = (
        ViTConfig(image_size=24, patch_size=8, **SMALL),
        ViTImageProcessor(size={"height": 24, "width": 24}),
    )
    folder = tmp_path_factory.mktemp("images")
    return save_classifier(CapsuleHeadForImageClassification, config, processor, "image", folder, shake)


def picture(mode):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 26, 4), np.uint8)
    if mode == "turned":
        return Image.fromarray(pixels[..., :3])
    return Image.fromarray(pixels, "RGBA").convert(mode) if mode != "CMYK" else Image.fromarray(pixels, "CMYK")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "turned"])
def test_the_same_image_has_the_same_score_everywhere(viewer, mode, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6 if mode == "turned" else 1
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    picture(mode).save(path, exif=exif)
    expected = by_label(pipeline("image-classification", model=viewer)(str(path)))
    model, processor = CapsuleHeadForImageClassification.from_pretrained(viewer), load_processor(viewer, "image")
    image, file = Image.open(path), {"path": str(path), "bytes": None}
    for given in (path, str(path), path.read_bytes(), image, [image], (image,), iter([image]), file):
        (explanation,) = explain(model, given)
        assert explanation.probabilities.tolist() == pytest.approx(expected, abs=1e-5)
        assert explanation.image.mode == "RGB"
    (predicted,) = score_inputs(model, [str(path)], processor, 8).tolist()
    assert predicted == pytest.approx(expected, abs=1e-5)
    rows = Dataset.from_dict({"image": [str(path)], "label": [0]}).cast_column("image", ImageFeature())
    pixels = torch.as_tensor(prepare_images(DatasetDict(train=rows), processor)["train"][:1]["pixel_values"][0])
    assert model(pixel_values=pixels[None]).logits.softmax(-1)[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_images_of_16_bits_are_scaled(viewer, tmp_path, caplog):
    rng = np.random.default_rng(0)
    model, processor = CapsuleHeadForImageClassification.from_pretrained(viewer), load_processor(viewer, "image")
    values = rng.integers(0, 65_536, (24, 24), np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    Image.fromarray(values).save(tmp_path / "a.tif")
    eight = Image.fromarray(np.rint(values / 257).astype(np.uint8))
    expected = explain(model, eight)[0].probabilities
    assert not caplog.records
    wide = Image.fromarray(values.astype(np.int32))
    given = [tmp_path / "a.png", tmp_path / "a.tif", Image.fromarray(values), wide, wide.convert("I;16B"), eight]
    for explanation in explain(model, given, batch_size=2):
        torch.testing.assert_close(explanation.probabilities, expected, rtol=0, atol=1e-5)  # batches differ
    (record,) = caplog.records
    assert record.getMessage().startswith("5 images have grey values of 16 bits, which are scaled to 8 bits")
    caplog.clear()
    for scores in score_inputs(model, [str(tmp_path / "a.png")] * 3, processor, 2):
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    (record,) = caplog.records
    assert record.getMessage().startswith("3 images")
    scores = pipeline("image-classification", model=viewer)(as_image(tmp_path / "a.png"))
    assert by_label(scores) == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    "given, error, message",
    [
        (
            Image.new("F", (9, 9), 300.0),
            ValueError,
            r"its values \(mode F\) go from 300.0 to 300.0; expected whole",
        ),
        (Image.new("F", (9, 9), 0.5), ValueError, "expected whole numbers from 0 to 255"),
        (Image.new("I", (9, 9), 65_536), ValueError, r"mode I\) go from 65536 to 65536"),
        (Image.new("I", (9, 9), -1), ValueError, "go from -1 to -1"),
        (
            np.full((3, 9, 9), 256, np.uint16),
            ValueError,
            "The input holds whole numbers from 256 to 256; expected 0",
        ),
        (np.zeros((9, 9), np.uint8), TypeError, r"The input is of shape \[9, 9\]; expected an image"),
        ([None], TypeError, "The input is of type NoneType; expected an image, its path, or an array"),
        ([Image.new("L", (9, 9)), 3], TypeError, "Input 1 is of type int"),
        (np.zeros((1, 9, 9), np.uint8), ValueError, r"makes no batch of images of \(1, 9, 9\) "),
        ("none.png", FileNotFoundError, "none.png is no file"),
        (b"text", ValueError, "The input is no image that can be read: "),
    ],
)
def test_what_is_no_image(viewer, given, error, message):
    with pytest.raises(error, match=message) as raised:
        explain(CapsuleHeadForImageClassification.from_pretrained(viewer), given)
    assert "\n" not in str(raised.value)


def test_images_that_are_not_resized(viewer):
    model = CapsuleHeadForImageClassification.from_pretrained(viewer)
    processor = ViTImageProcessor(do_resize=False)
    with pytest.raises(ValueError, match="images have 4x6 pixels, and the vit backbone takes patches of 8x8"):
        explain(model, Image.new("RGB", (6, 4)), processor)
    with pytest.raises(ValueError, match=r"makes no batch of images of \(24, 24\) and \(32, 32\) "):
        files = []
        for size in (24, 32):
            files.append({"path": None, "bytes": io.BytesIO()})
            Image.new("RGB", (size, size)).save(files[-1]["bytes"], "png")
            files[-1]["bytes"] = files[-1]["bytes"].getvalue()
        rows = Dataset.from_dict({"image": files, "label": [0, 1]}).cast_column("image", ImageFeature())
        prepare_images(DatasetDict(train=rows), processor)["train"][:]


# Texts


def test_the_same_text_has_the_same_score_everywhere(make_model, shake, tokenizer):
    model = make_model(num_labels=N_OUT).eval()
    shake(model.head, scale=0.5)
    classify = TextClassificationPipeline(model=model, tokenizer=tokenizer, top_k=None)
    texts, pair = ["the film is good", "dull"], {"text": "the film", "text_pair": "is good"}
    expected = torch.tensor([by_label(scores) for scores in classify(texts)])
    for given in (texts, np.array(texts), np.array(texts, object), pandas.Series(texts), iter(texts)):
        found = torch.stack([x.probabilities for x in explain(model, given, tokenizer)])
        torch.testing.assert_close(found, expected, **TOLERANCE)
    for given in (texts[0], np.str_(texts[0]), {"text": texts[0]}):
        assert explain(model, given, tokenizer)[0].text == texts[0]
    (expected,) = map(by_label, classify([pair]))
    for given in (pair, [pair], tuple(pair.values()), [tuple(pair.values())]):
        (explanation,) = explain(model, given, tokenizer)
        assert explanation.probabilities.tolist() == pytest.approx(expected, abs=1e-5)
        assert explanation.text == "the film\tis good"
    for wrong in (None, ["dull", None], {"text": None}, {"text": "a", "text_target": "b"}, ("a", "b", "c"), [["a"]]):
        with pytest.raises(TypeError, match=r"expected a text, or a pair: a tuple of two, or \{"):
            explain(model, wrong, tokenizer)


@pytest.mark.parametrize("pair", [("the film", "is good"), ("dull", ""), ("", "dull"), ("not", " ")])
def test_the_same_pair_has_the_same_score_everywhere(make_model, shake, tokenizer, pair):
    model = make_model(num_labels=N_OUT).eval()
    shake(model.head, scale=0.5)
    classify = TextClassificationPipeline(model=model, tokenizer=tokenizer, top_k=None)
    expected = torch.tensor(by_label(classify([dict(zip(("text", "text_pair"), pair))])[0]))
    others = ("good", "the film is good")  # in the same batch
    rows = Dataset.from_dict(dict(zip(("text", "text_pair"), zip(pair, others))))
    rows = tokenize(rows, tokenizer).remove_columns("length")
    with torch.no_grad():
        trained = model(**CapsuleCollator(tokenizer)([rows[0], rows[1]])).logits.softmax(-1)
    for found in (trained, score_inputs(model, [pair, others], tokenizer, 2)):
        torch.testing.assert_close(found[0], expected, **TOLERANCE)
    torch.testing.assert_close(explain(model, pair, tokenizer)[0].probabilities, expected, **TOLERANCE)


def test_texts_that_are_cut_are_counted(make_model, tokenizer, caplog):
    model = make_model(num_labels=N_OUT).eval()
    n_special = tokenizer.num_special_tokens_to_add()
    most = tokenizer.model_max_length = 12
    texts = ["dull " * (most - n_special), "dull " * (most + 5), "dull " * (most + 7)]
    found = explain(model, texts, tokenizer, batch_size=2)
    assert [x.n_cut for x in found] == [0, 5 + n_special, 7 + n_special]
    assert {len(x.tokens) for x in found} == {most}
    (record,) = (record for record in caplog.records if record.name.startswith("capsule_heads"))
    assert record.getMessage().startswith(f"2 of 3 texts are longer than the model takes: {12 + 2 * n_special} tokens")


def test_several_labels_are_predicted(make_model, shake, tokenizer):
    model = make_model(num_labels=N_OUT, problem_type="multi_label_classification").eval()
    shake(model.head, scale=0.5)
    (explanation,) = explain(model, "the film is good", tokenizer)
    expected = [model.config.id2label[k] for k in range(N_OUT) if explanation.probabilities[k] > 0.5]
    assert list(explanation.predicted_labels) == expected
    single = type(explanation)(**{**vars(explanation), "is_multi_label": False})
    assert single.predicted_labels == (single.labels[single.predicted],)
