"""Labelled audio from folders and files, with the columns, splits and batches that a Trainer takes."""

import builtins
import os
import pickle
import wave

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import (
    AutoModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)

from capsule_heads import CapsuleHeadForAudioClassification, CapsuleTrainer, CapsuleTrainingArguments
from capsule_heads.data import AudioCollator, load_audio_folder, open_audio, prepare_audio
from capsule_heads.data.audio import as_audio, audio_features, check_audio, least_samples

RATE = 8000
N_PER_CLASS = 10


def write_wav(path, samples, sampling_rate=RATE):
    """Write `[samples]` or `[samples, channels]`, from -1 to 1, in 16 bits."""
    samples = np.asarray(samples)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(sampling_rate)
        file.writeframes((samples * 32767).astype("<i2").tobytes())


def tone(frequency, n_samples, sampling_rate=RATE):
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(n_samples) / sampling_rate)


@pytest.fixture
def folder(tmp_path):
    """`train` of two classes with 10 tones each, of many lengths, and `test` with one each."""
    for split, count in (("train", N_PER_CLASS), ("test", 1)):
        for name, frequency in (("high", 1000), ("low", 100)):
            directory = tmp_path / "audio" / split / name
            directory.mkdir(parents=True)
            for index in range(count):
                write_wav(directory / f"{index}.wav", tone(frequency + index, 300 + 37 * index))
    (tmp_path / "audio" / "train" / "high" / "notes.txt").write_text("not audio")
    return tmp_path / "audio"


@pytest.fixture
def feature_extractor():
    return Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=True)


@pytest.fixture
def model(tmp_path):
    """A head on a wav2vec2 of hidden size 16."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    sizes |= {"conv_dim": (8, 8), "conv_kernel": (4, 4), "conv_stride": (2, 2), "num_conv_pos_embedding_groups": 2}
    config = Wav2Vec2Config(**sizes, num_conv_pos_embeddings=4, feat_extract_norm="layer", conv_bias=True)
    AutoModel.from_config(config).save_pretrained(tmp_path / "backbone")
    model = CapsuleHeadForAudioClassification.from_backbone(tmp_path / "backbone", num_labels=2, d_inp=8, n_parts=6)
    with torch.no_grad():
        for parameter in model.head.parameters():  # the scores of a new head are all zero
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


@pytest.fixture
def make_trainer(tmp_path, model, feature_extractor):
    def make(**fields):
        train = fields.pop("train", None)
        fields = {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True, **fields}
        arguments = CapsuleTrainingArguments(str(tmp_path / "run"), **fields)
        return CapsuleTrainer(model, arguments, train_dataset=train, data_collator=AudioCollator(feature_extractor))

    return make


# Folders


def test_a_folder_of_audio(folder):
    splits = load_audio_folder(folder)
    assert {name: len(split) for name, split in splits.items()} == {"train": 18, "validation": 2, "test": 2}
    assert splits["train"].column_names == ["audio", "label"]
    assert splits["train"].features["label"].names == ["high", "low"]
    assert sorted(splits["validation"]["label"]) == [0, 1]  # of each class a tenth
    assert splits["validation"]["audio"][:] == load_audio_folder(str(folder))["validation"]["audio"][:]
    seen = {path for name in ("train", "validation") for path in splits[name]["audio"]}
    assert seen == {str(path) for path in (folder / "train").rglob("*.wav")}
    for split in splits.values():
        assert all(f"/{split.features['label'].names[row['label']]}/" in row["audio"] for row in split)


def test_a_small_folder_has_a_validation_file_per_class(folder):
    for path in (folder / "train").rglob("[2-9].wav"):
        path.unlink()
    splits = load_audio_folder(folder)
    assert [sorted(splits[name]["label"]) for name in ("train", "validation")] == [[0, 1]] * 2


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev"])
def test_a_validation_split_of_ones_own(folder, name):
    (folder / "test").rename(folder / name)
    assert {name: len(split) for name, split in load_audio_folder(folder).items()} == {"train": 20, "validation": 2}


def test_wrong_folders(folder, tmp_path):
    with pytest.raises(ValueError, match=r"audio_folder needs a source: a directory with train/CLASS/\*\.wav"):
        load_audio_folder(None)
    with pytest.raises(FileNotFoundError, match=r"No audio at .*none: there is no such directory"):
        load_audio_folder(tmp_path / "none")
    with pytest.raises(ValueError, match=r"has 0 folders with audio; expected train/CLASS/.* for two classes or more"):
        load_audio_folder(folder / "test")
    (folder / "train" / "stray.wav").touch()
    with pytest.raises(ValueError, match=r"stray\.wav is not in the folder of a class; expected train/CLASS/"):
        load_audio_folder(folder)
    (folder / "train" / "stray.wav").unlink()
    for path in (folder / "train" / "low").glob("[1-9].wav"):
        path.unlink()
    with pytest.raises(ValueError, match=r"A class of .*audio has a single training file, and validation needs one"):
        load_audio_folder(folder)
    (folder / "train").rename(folder / "other")
    with pytest.raises(ValueError, match="has the splits test; expected train"):
        load_audio_folder(folder)


# Files


def test_samples_are_those_of_the_file(tmp_path):
    write_wav(tmp_path / "a.wav", tone(440, 500))
    samples = open_audio(tmp_path / "a.wav", RATE)
    assert samples.dtype == np.float32 and samples.shape == (500,)
    np.testing.assert_allclose(samples, tone(440, 500), atol=1e-4)


def test_channels_are_averaged(tmp_path):
    write_wav(tmp_path / "stereo.wav", np.stack([tone(440, 500), tone(100, 500)], axis=1))
    expected = (tone(440, 500) + tone(100, 500)) / 2
    np.testing.assert_allclose(open_audio(tmp_path / "stereo.wav", RATE), expected, atol=1e-4)


@pytest.mark.parametrize("sampling_rate", [4000, 16000, 11025])
def test_audio_is_resampled(tmp_path, sampling_rate):
    write_wav(tmp_path / "a.wav", tone(440, 4000))
    samples = open_audio(tmp_path / "a.wav", sampling_rate)
    assert samples.dtype == np.float32 and abs(len(samples) - sampling_rate / 2) <= 1
    middle = slice(len(samples) // 4, 3 * len(samples) // 4)  # at the ends the filter sees silence
    expected = tone(440, len(samples), sampling_rate)
    np.testing.assert_allclose(samples[middle], expected[middle], atol=5e-3)


@pytest.mark.parametrize("kind", ["flac", "ogg", "mp3"])
def test_compressed_files(tmp_path, kind):
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(tmp_path / f"a.{kind}", tone(440, RATE), RATE)
    samples = open_audio(tmp_path / f"a.{kind}", RATE)
    assert abs(samples).max() == pytest.approx(0.5, abs=0.1) and len(samples) >= RATE


def test_files_that_cannot_be_read_are_named(folder, tmp_path, feature_extractor):
    with pytest.raises(FileNotFoundError, match=r"none\.wav is not a file; expected an audio file"):
        open_audio(tmp_path / "none.wav", RATE)
    for name in ("text.wav", "text.raw"):
        (tmp_path / name).write_text("this is text")
        with pytest.raises(ValueError, match=rf"{name} is not an audio file that can be read: "):
            open_audio(tmp_path / name, RATE)
    write_wav(tmp_path / "empty.wav", [])
    with pytest.raises(ValueError, match=r"empty\.wav has no samples; expected audio"):
        open_audio(tmp_path / "empty.wav", RATE)
    path = folder / "train" / "low" / "5.wav"
    path.write_bytes(b"RIFF")
    prepared = prepare_audio(load_audio_folder(folder), feature_extractor)
    with pytest.raises(ValueError, match=rf"{path} is not an audio file that can be read"):
        for split in ("train", "validation"):
            prepared[split][:]


@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize("kind", ["wav", "flac", "mp3"])
def test_a_file_that_is_cut_short_is_refused(tmp_path, kind, as_bytes):
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(tmp_path / f"a.{kind}", tone(440, 2 * RATE), RATE)
    content = (tmp_path / f"a.{kind}").read_bytes()
    cut = tmp_path / f"cut.{kind}"
    cut.write_bytes(content[: len(content) // 2])
    expected = r"cut short: its header announces \d+|is not an audio file that can be read"
    with pytest.raises(ValueError, match=expected) as raised:
        as_audio(cut.read_bytes() if as_bytes else cut, RATE)
    assert "\n" not in str(raised.value) and (as_bytes or str(cut) in str(raised.value))


def test_a_wav_file_from_a_pipe_announces_no_length(tmp_path):
    write_wav(tmp_path / "a.wav", tone(440, 500))
    content = (tmp_path / "a.wav").read_bytes()
    for size in (0xFFFFFFFF, 0x7FFFF000):
        sizes = size.to_bytes(4, "little")
        (tmp_path / "pipe.wav").write_bytes(content[:4] + sizes + content[8:40] + sizes + content[44:])
        np.testing.assert_array_equal(open_audio(tmp_path / "pipe.wav", RATE), open_audio(tmp_path / "a.wav", RATE))


def test_without_soundfile(tmp_path, monkeypatch):
    write_wav(tmp_path / "a.wav", tone(440, 500))
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "soundfile":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        ImportError, match=r'soundfile is needed, .*not installed: pip install "capsule-heads\[audio\]"'
    ):
        open_audio(tmp_path / "a.wav", RATE)


def test_a_damaged_or_short_file_is_found_before_training(folder, feature_extractor, model):
    path = folder / "test" / "low" / "0.wav"
    check_audio(load_audio_folder(folder), feature_extractor, model)
    assert least_samples(feature_extractor, model) == 10
    write_wav(path, tone(100, 9))
    with pytest.raises(ValueError, match=rf"^{path} has 9 samples at .* too few for one frame; expected at least 10"):
        check_audio(load_audio_folder(folder), feature_extractor, model)
    write_wav(path, tone(100, 10))
    check_audio(load_audio_folder(folder), feature_extractor, model)
    path.write_bytes(b"RIFF")
    with pytest.raises(ValueError, match=rf"^{path} is not an audio file that can be read"):
        check_audio(load_audio_folder(folder), feature_extractor, model)


def test_names_and_kinds_of_files(folder, tmp_path):
    path = folder / "train" / "low" / "0.wav"
    os.rename(path, os.path.join(os.fsencode(path.parent), b"caf\xe9.wav"))
    with pytest.raises(ValueError, match=r"train/low/caf.\.wav has a name that is not UTF-8; rename it"):
        load_audio_folder(folder)
    (tmp_path / "pictures" / "train" / "cat").mkdir(parents=True)
    (tmp_path / "pictures" / "train" / "cat" / "0.png").touch()
    with pytest.raises(ValueError, match="pictures has 1 images and no audio files; use the task image_folder"):
        load_audio_folder(tmp_path / "pictures")


@pytest.mark.parametrize("dtype, zero, most", [("int16", 0, 2**15), ("int32", 0, 2**31), ("uint8", 128, 128)])
def test_whole_numbers_are_scaled_as_those_of_files(dtype, zero, most):
    numbers = np.array([-0.5, 0, 0.25]) * most + zero
    found = as_audio(numbers.astype(dtype), RATE)
    np.testing.assert_allclose(found, [-0.5, 0, 0.25], atol=1e-2)
    assert found.dtype == np.float32


# What a model takes


def test_rows_are_the_feature_extractors(folder, feature_extractor):
    splits = load_audio_folder(folder)
    prepared = prepare_audio(splits, feature_extractor)
    assert prepared["train"].column_names == ["input_values", "labels"]
    for index in (0, 7):
        samples = open_audio(splits["train"][index]["audio"], RATE)
        expected = feature_extractor(samples, sampling_rate=RATE, return_tensors="np")["input_values"][0]
        row = prepared["train"][index]
        np.testing.assert_array_equal(row["input_values"], expected)
        assert len(row["attention_mask"]) == len(samples) and all(row["attention_mask"])
        assert row["labels"] == splits["train"][index]["label"]
    assert prepared["train"]["labels"][:] == splits["train"]["label"][:]


def test_a_batch_is_padded_to_its_longest(folder, feature_extractor):
    rows = prepare_audio(load_audio_folder(folder), feature_extractor)["train"]
    batch = AudioCollator(feature_extractor)([rows[index] for index in range(4)])
    lengths = [len(rows[index]["input_values"]) for index in range(4)]
    assert batch["input_values"].shape == batch["attention_mask"].shape == (4, max(lengths))
    assert batch["attention_mask"].sum(1).tolist() == lengths and batch["input_values"].dtype == torch.float32
    assert batch["labels"].tolist() == rows["labels"][:4]
    for row, length, values in zip(range(4), lengths, batch["input_values"]):
        np.testing.assert_array_equal(values[:length], rows[row]["input_values"])
        assert not values[length:].any()
    pickle.loads(pickle.dumps(AudioCollator(feature_extractor)))  # for workers


def test_spectra_of_one_length(folder):
    extractor = WhisperFeatureExtractor(feature_size=6, sampling_rate=RATE, chunk_length=1)
    rows = prepare_audio(load_audio_folder(folder), extractor)["train"]
    assert rows.column_names == ["input_features", "labels"]
    batch = AudioCollator(extractor)([rows[0], rows[1]])
    assert batch["input_features"].shape == (2, 6, 50) and batch["attention_mask"].shape == (2, 50)
    assert 0 < batch["attention_mask"].sum() < 100


def test_another_kind_of_feature_extractor_is_refused(folder, feature_extractor):
    feature_extractor.model_input_names = ["audio_codes"]
    with pytest.raises(
        ValueError, match=r"Wav2Vec2FeatureExtractor makes audio_codes; expected .* that makes input_va"
    ):
        prepare_audio(load_audio_folder(folder), feature_extractor)


# Training


@pytest.mark.parametrize("removes", [True, False])
@pytest.mark.parametrize("workers", [0, 1], ids=["no workers", "a worker"])
def test_a_trainer_trains_on_them(folder, feature_extractor, make_trainer, model, removes, workers):
    train = prepare_audio(load_audio_folder(folder), feature_extractor)["train"]
    before = [x.clone() for x in model.head.parameters()]
    fields = {"remove_unused_columns": removes, "dataloader_num_workers": workers, "max_steps": 2}
    trainer = make_trainer(train=train, per_device_train_batch_size=5, learning_rate=1e-2, **fields)
    trainer.train()
    assert trainer.state.global_step == 2
    assert any(not torch.equal(x, y) for x, y in zip(before, model.head.parameters()))
    assert model.config.problem_type == "single_label_classification"


def test_padding_changes_nothing(folder, feature_extractor, make_trainer):
    rows = prepare_audio(load_audio_folder(folder), feature_extractor)["train"]
    padded = make_trainer(per_device_eval_batch_size=18).predict(rows)
    alone = make_trainer(per_device_eval_batch_size=1).predict(rows)
    np.testing.assert_allclose(padded.predictions, alone.predictions, rtol=0, atol=1e-5)
    assert padded.predictions.std() > 1e-3
    assert padded.label_ids.tolist() == rows["labels"][:]


def test_a_single_recording_without_a_label(folder, feature_extractor, model):
    samples = open_audio(folder / "test" / "low" / "0.wav", RATE)
    batch = AudioCollator(feature_extractor)([audio_features(samples, feature_extractor)])
    assert batch.keys() == {"input_values", "attention_mask"}
    assert model(**batch).logits.shape == (1, 2)


def test_rows_go_through_a_data_loader_in_another_process(folder, feature_extractor):
    rows = prepare_audio(load_audio_folder(folder), feature_extractor)["test"]
    loader = DataLoader(rows, batch_size=2, collate_fn=AudioCollator(feature_extractor), num_workers=1)
    (batch,) = loader
    assert sorted(batch["labels"].tolist()) == [0, 1]
