"""Loading a tokenizer, image processor or feature extractor by the names that from_backbone knows."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

import capsule_heads
from capsule_heads import CapsuleHeadForSequenceClassification, load_processor

ANY = 10**30


@pytest.fixture
def folder(backbone_dir, tokenizer, tmp_path):
    """A directory of a backbone whose tokenizer says how many tokens it takes: folder(model_type, n)."""

    def make(model_type, n):
        path = tmp_path / f"{model_type}_{n}"
        shutil.copytree(backbone_dir(model_type), path)
        tokenizer.save_pretrained(path)
        file = path / "tokenizer_config.json"
        config = json.loads(file.read_text())
        config.pop("model_max_length")
        file.write_text(json.dumps({**config, **({} if n is None else {"model_max_length": n})}))
        return path

    return make


@pytest.mark.parametrize(
    ("model_type", "own", "expected"),
    [
        ("gpt2", None, 40),
        ("roberta", None, 38),
        ("roberta", 512, 38),
        ("roberta", 12, 12),
        ("llama", None, ANY),
        ("llama", 12, 12),
    ],
)
def test_a_tokenizer_cuts_texts_to_what_the_backbone_takes(folder, model_type, own, expected):
    path = folder(model_type, own)
    tokenizer = load_processor(path)
    assert min(tokenizer.model_max_length, ANY) == expected
    if expected < ANY:
        assert len(tokenizer("good film " * 50, truncation=True)["input_ids"]) == expected


def test_a_model_with_a_head_says_what_its_backbone_takes(folder, tmp_path):
    path = folder("roberta", None)
    for head_only in (True, False):
        model = CapsuleHeadForSequenceClassification.from_backbone(path, num_labels=2, d_inp=8, n_parts=4)
        saved = tmp_path / f"model_{head_only}"
        model.save_pretrained(saved, head_only=head_only)
        AutoTokenizer.from_pretrained(path).save_pretrained(saved)
        assert load_processor(saved).model_max_length == 38


def test_a_directory_with_a_tokenizer_alone(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert load_processor(tmp_path).model_max_length == tokenizer.model_max_length


def test_the_names_that_from_backbone_knows(folder, monkeypatch, tmp_path):
    package = tmp_path / "packages" / "texts_of_a_test"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    shutil.copytree(folder("gpt2", None), package / "model")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    assert load_processor("package:texts_of_a_test/model").model_max_length == 40
    assert "load_processor" in dir(capsule_heads)
    with pytest.raises(OSError, match="there is no such directory"):
        load_processor("./none")
    with pytest.raises(ValueError, match="modality is 'sound'; expected one of text, image, audio"):
        load_processor(package / "model", "sound")


@pytest.mark.parametrize("auto_class", ["AutoTokenizer", "AutoConfig"])
def test_code_of_a_repository_is_not_run_and_nobody_is_asked(folder, tmp_path, monkeypatch, auto_class):
    path, mark = folder("bert", None), tmp_path / "mark"
    (path / "own.py").write_text(f"open({str(mark)!r}, 'w')\nclass Own: ...\n")
    name = {"AutoTokenizer": "tokenizer_config.json", "AutoConfig": "config.json"}[auto_class]
    config = json.loads((path / name).read_text())
    config |= {"auto_map": {auto_class: ["own.Own", None] if auto_class == "AutoTokenizer" else "own.Own"}}
    config |= {"model_type": "unknown_type", "tokenizer_class": "Own"}
    (path / name).write_text(json.dumps(config))
    asked = []
    monkeypatch.setattr("builtins.input", lambda *question: asked.append(question) or "y")
    try:
        load_processor(path)
    except (OSError, ValueError) as error:
        assert "\n" not in str(error).strip() or "trust_remote_code" in str(error)
    assert asked == [] and not mark.exists()
