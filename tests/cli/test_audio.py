"""Audio classifiers through the commands: trained, evaluated, used, explained and shown."""

import json
import shutil
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, Wav2Vec2Config, Wav2Vec2FeatureExtractor

from capsule_heads import CapsuleHeadForAudioClassification
from capsule_heads.data.audio import open_audio

RATE = 1_000


@pytest.fixture(scope="module")
def wav2vec2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wav2vec2")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    convolutions = {"conv_dim": (8, 8), "conv_kernel": (8, 4), "conv_stride": (8, 2), "conv_bias": True}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer"}
    AutoModel.from_config(Wav2Vec2Config(**sizes, **convolutions, **positions)).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(sampling_rate=RATE, do_normalize=False, return_attention_mask=True).save_pretrained(folder)
    return folder


def write_tone(path, hertz, seconds, level):
    samples = level * np.sin(2 * np.pi * hertz * np.arange(int(RATE * seconds)) / RATE)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes((samples * 32767).astype("<i2").tobytes())


@pytest.fixture(scope="module")
def tones(tmp_path_factory):
    """Ten loud and ten quiet tones of different lengths to learn from, two each to test."""
    root, rng = tmp_path_factory.mktemp("tones"), np.random.default_rng(0)
    for split, count in (("train", 10), ("test", 2)):
        for name, level in (("loud", 0.9), ("quiet", 0.02)):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                path = root / split / name / f"{index}.wav"
                write_tone(path, rng.uniform(50, 200), rng.uniform(0.1, 0.3), level)
    return root


@pytest.fixture(scope="module")
def trained(wav2vec2, tones, tmp_path_factory):
    from capsule_heads.cli import main

    folder = tmp_path_factory.mktemp("audio") / "run"
    keys = {"data": tones, "backbone": wav2vec2, "output_dir": folder, "save_strategy": "no"}
    keys |= {"num_train_epochs": 20, "learning_rate": 0.3, "d_inp": 8, "n_parts": 4, "use_cpu": True}
    main(["train", *(str(x) for name, value in keys.items() for x in (f"--{name}", value))])
    return folder


@pytest.mark.slow
def test_a_folder_of_audio_from_training_to_the_hub(call, trained, tones, tmp_path, check_push):
    results = json.loads((trained / "results.json").read_text())
    assert (results["task"], results["dataset"], results["steps"]) == ("own_data", None, 20)
    assert results["test_accuracy"] == 1.0
    status, out, _ = call("evaluate", trained, "--data", tones, "--split", "test")
    assert status == 0
    assert json.loads(Path(out.splitlines()[-1]).read_text())["accuracy"] == 1.0

    files = [tones / "test" / name / f"{n}.wav" for n in (0, 1) for name in ("quiet", "loud")]
    expected = []
    model = CapsuleHeadForAudioClassification.from_pretrained(trained)
    for file in files:
        samples = torch.from_numpy(open_audio(file, RATE))[None]
        expected.append(model(samples).logits.softmax(-1).max().item())
    for size in (1, 3):  # padding changes nothing
        status, out, _ = call("predict", trained, *files, "--batch_size", size)
        assert status == 0
        answers = [json.loads(line) for line in out.splitlines()]
        assert [(x["audio"], x["label"]) for x in answers] == list(zip(map(str, files), ("quiet", "loud") * 2))
        assert [x["score"] for x in answers] == pytest.approx(expected, rel=1e-4)
    status, out, _ = call("predict", trained, stdin=f"{files[0]}\n")
    assert json.loads(out)["label"] == "quiet"
    status, _, err = call("predict", trained, "--data", tones / "test", "--output", tmp_path / "answers.jsonl")
    assert status == 0, err
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert all(row["file"].startswith(f"{row['predicted_label']}/") for row in rows) and len(rows) == 4
    check_push(trained)


@pytest.mark.slow
def test_audio_is_explained(call, trained, tones, tmp_path):
    status, _, err = call("explain", trained, tones / "test" / "loud" / "0.wav", "--output_dir", tmp_path / "one")
    assert status == 0, err
    assert Image.open(tmp_path / "one" / "001.png").size[0] > 300
    options = ("--data", tones, "--split", "test", "--max_inputs", 3, "--output_dir", tmp_path / "task")
    status, _, err = call("explain", trained, *options)
    assert status == 0, err
    assert (tmp_path / "task" / "report.html").read_text().count("true: ") == 3


@pytest.mark.slow
def test_audio_is_shown_on_the_page(trained, tones):
    pytest.importorskip("gradio")
    from capsule_heads.cli.demo import _examples, build_demo

    page = build_demo(str(trained))
    (explain,) = [x.fn for x in page.fns.values() if x.fn is not None and x.fn.__name__ == "explain_input"]
    *_, shown = explain(str(tones / "test" / "loud" / "1.wav"))
    assert "<b>loud</b>" in shown and shown.count("data:image/webp") == 1
    *_, shown = explain(*_examples("audio")[0])
    assert "<b>" in shown


def test_a_short_recording_ends_training_before_it_begins(fails, wav2vec2, tones, tmp_path):
    shutil.copytree(tones, tmp_path / "own")
    path = tmp_path / "own" / "test" / "loud" / "0.wav"
    write_tone(path, 100, 0.02, 0.9)
    keys = {"task": "audio_folder", "source": tmp_path / "own", "backbone": wav2vec2, "output_dir": tmp_path / "run"}
    line = fails("train", *(x for name, value in keys.items() for x in (f"--{name}", value)))
    assert line.startswith(f"error: {path} has 20 samples at the backbone's sampling rate, too few for one frame")
    path.write_bytes(b"RIFF")
    line = fails("train", *(x for name, value in keys.items() for x in (f"--{name}", value)))
    assert line.startswith(f"error: {path} is not an audio file that can be read: ")


def test_mistakes(fails, trained, tones, tmp_path):
    (tmp_path / "note.wav").write_text("no audio")
    for command in ("predict", "explain"):
        assert "none.wav is not a file; expected an audio file" in fails(command, trained, tmp_path / "none.wav")
        assert "note.wav is not an audio file that can be read" in fails(command, trained, tmp_path / "note.wav")
    error = fails("evaluate", trained, "--task", "image_folder", "--source", tones)
    assert error == "error: image_folder is of images, and the model classifies audio; expected a task of audio."
