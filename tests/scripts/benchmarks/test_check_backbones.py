"""A sample of the types in docs/reference/backbones.md, checked as its script checks all."""

import json
from pathlib import Path

import pytest
from backbone_check import check, check_apart
from results_pages.backbones import describe, render

ROOT = Path(__file__).parents[3]
SAMPLE = {
    "text": [
        "bert",
        "gpt2",
        "llama",
        "mamba",
        "jamba",
        "mixtral",
        "qwen2_vl",
        "clip",
        "t5",
        "bart",
        "canine",
        "funnel",
    ],
    "image": ["vit", "convnextv2", "segformer", "hiera", "swin", "detr", "qwen2_5_vl_vision", "siglip2_vision_model"],
    "audio": ["wav2vec2", "whisper", "audio-spectrogram-transformer", "wav2vec2-bert", "speech_to_text"],
}


@pytest.mark.parametrize(("modality", "model_type"), [(m, t) for m, types in SAMPLE.items() for t in types])
def test_a_sample_works(modality, model_type):
    found = check(model_type)
    assert found["works"], found["reason"]
    assert found["modality"] == modality


def test_what_does_not_work_has_a_reason():
    found = check("patchtst")
    assert not found["works"] and "patchtst takes past_values" in found["reason"]


def fake_check(model_type):
    if model_type == "endless":
        while True:
            pass
    if model_type == "large":
        raise MemoryError
    return {"works": True}


def test_a_process_for_each_with_a_time_limit():
    found = dict(check_apart(["endless", "large", "small"], seconds=1, job=fake_check))
    assert [found[name]["works"] for name in ("endless", "large", "small")] == [False, False, True]
    assert found["endless"]["reason"] == "took more than 1 s"
    assert found["large"]["reason"].startswith("died without a message")


def test_the_table():
    assert describe([[1, 4, 8], [1, 4, 8], [1, 2, 8]]) == "2 of 4 x 8, 1 of 2 x 8"
    types = {
        "a": {"works": True, "modality": "text", "states": [[1, 4, 8]], "padding": "neutral"},
        "b": {"works": False, "modality": "image", "reason": "one | two"},
        "c": {"works": False, "reason": "three"},
    }
    text = render({"date": "2026-01-02", "transformers": "5.0", "torch": "2.6", "types": types})
    assert "Of the 3 types" in text and "2 were built" in text and "**1 work**" in text
    assert "| a | text | 1 of 4 x 8 | neutral |" in text and "| b | one / two |" in text


def test_the_committed_table_is_the_one_of_its_numbers():
    report = json.loads((ROOT / "docs" / "reference" / "backbones.json").read_text(encoding="utf-8"))
    text = (ROOT / "docs" / "reference" / "backbones.md").read_text(encoding="utf-8")
    assert text == render(report)
    assert "site-packages" not in text  # no reason names a path of the machine
    works = sum(found["works"] for found in report["types"].values())
    assert f"{works} of the {len(report['types'])}" in (ROOT / "README.md").read_text(encoding="utf-8")
