"""The registry of tasks: their data, processors and metrics, and how a task of one's own gets there."""

import json
import shutil

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from PIL import Image
from transformers import AutoTokenizer

from capsule_heads import CapsuleHeadForSequenceClassification, tasks
from capsule_heads.data import sst
from capsule_heads.data.glue import GLUE_TASKS, HUB_REPOSITORY
from capsule_heads.data.images import IMAGE_DATASETS
from capsule_heads.hub.card import Dataset as CardDataset
from capsule_heads.metrics import compute_metrics_for
from capsule_heads.tasks import (
    MODALITIES,
    Task,
    get_task,
    load_classifier,
    register_task,
    registered_tasks,
    source_help,
)
from capsule_heads.training.run import evaluation_splits

TREES = {
    "train.txt": "(3 (2 It) (4 (2 's) (3 fun)))\n(2 (2 It) (2 (2 's) (0 long)))\n",
    "dev.txt": "(1 (2 Too) (1 long))\n(2 (2 a) (2 film))\n",
    "test.txt": "(4 (2 So) (4 good))\n(0 (2 So) (0 bad))\n",
}


@pytest.fixture
def trees(tmp_path):
    for name, content in TREES.items():
        (tmp_path / name).write_text(content)
    return str(tmp_path)


def test_tasks():
    assert list(registered_tasks()) == [
        *("reviews", "sst5", "sst2_root"),
        *GLUE_TASKS,
        *("toy_norb", "smallnorb", "cifar100", "imagenet", "image_folder", "audio_folder"),
    ]


def test_reviews():
    assert {name: len(split) for name, split in get_task("reviews").load().items()} == {
        "train": 495,
        "validation": 120,
        "test": 120,
    }
    with pytest.raises(ValueError, match=r"source is x\.zip, but reviews comes with the package; leave it out"):
        get_task("reviews").load("x.zip")


def test_sst(trees):
    fine = get_task("sst5").load(trees)
    assert fine["train"].features["label"].num_classes == 5
    assert set(fine["train"]["text"]) == {"It 's fun", "It", "'s fun", "'s", "fun", "It 's long", "'s long", "long"}
    assert fine["test"]["text"][:] == ["So good", "So bad"]
    assert get_task("sst5").load(trees, phrases=False)["train"]["text"][:] == ["It 's fun", "It 's long"]
    binary = get_task("sst2_root").load(trees)
    assert binary["train"].features["label"].names == ["negative", "positive"]
    assert list(zip(binary["train"]["text"], binary["train"]["label"])) == [
        ("It 's fun", 1),
        ("'s fun", 1),
        ("fun", 1),
        ("long", 0),
    ]


def test_sst_comes_from_stanford_unless_a_source_is_given(monkeypatch):
    monkeypatch.setattr(sst, "load_sst", lambda *args, **kwargs: (args, kwargs))
    (source,), kwargs = get_task("sst5").load()
    assert source == "https://nlp.stanford.edu/sentiment/trainDevTestTrees_PTB.zip"
    assert kwargs == {"fine_grained": True, "phrases": True}


def test_glue(tmp_path):
    header = "index\tsentence1\tsentence2\tlabel\n"
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_text(header + "0\tA cat sat.\tA cat.\tentailment\n")
    (tmp_path / "test.tsv").write_text("index\tsentence1\tsentence2\n0\tA dog sat.\tA dog.\n")
    splits = get_task("rte").load(str(tmp_path))
    assert splits["train"][0] == {"text": "A cat sat.", "text_pair": "A cat.", "label": 0}
    assert list(evaluation_splits(splits, "validation")) == ["validation"]
    assert evaluation_splits(splits, "test") == {}  # it has no labels


def test_unknown_tasks():
    with pytest.raises(ValueError, match=r"task is 'sst3'; expected one of reviews, sst5, .*\. Did you mean sst5\?$"):
        get_task("sst3")
    with pytest.raises(ValueError, match=r"task is 'dinner'; expected one of reviews, .*audio_folder\.$"):
        get_task("dinner")


@pytest.mark.parametrize("task", registered_tasks().values(), ids=lambda task: task.name)
def test_every_task_is_complete(task):
    assert callable(compute_metrics_for(task.metric))
    assert task.data is MODALITIES[task.modality]
    assert task.dataset is None or CardDataset(**task.dataset).name == task.title
    assert f"{task.name}" in source_help()
    assert task.modality in task.data.model_class().input_modalities


def test_where_the_data_is_on_the_hub():
    for name in GLUE_TASKS:
        fields = {"repository": HUB_REPOSITORY, "config": name, "license": None}
        assert get_task(name).dataset == {"name": f"GLUE {name}", **fields}
        assert get_task(name).metric == name
    for name, (repository, *_) in IMAGE_DATASETS.items():
        assert get_task(name).repository == repository


@pytest.mark.parametrize("name", ["smallnorb", "image_folder", "audio_folder"])
def test_tasks_that_need_a_source(name):
    with pytest.raises(ValueError, match=f"{name} needs a source: [at].*"):
        get_task(name).load()


def test_load_tokenizer(backbone, tmp_path):
    task, bare = get_task("sst5"), AutoTokenizer.from_pretrained(backbone)
    bare.pad_token = None
    bare.save_pretrained(tmp_path)
    assert task.load_processor(backbone).pad_token == "[PAD]"
    assert task.load_processor(str(tmp_path)).pad_token is None
    assert task.load_processor(str(tmp_path), pad_token="[SEP]").pad_token_id == 3
    with pytest.raises(ValueError, match=r"pad_token is '<pad>', which is not in the vocabulary of .*tokenizer"):
        task.load_processor(str(tmp_path), pad_token="<pad>")
    with pytest.raises(OSError, match="none_such"):
        task.load_processor("package:none_such/model")


@pytest.mark.parametrize("content", [b"[1]", b"3", b"", b"{", b"\xff"])
@pytest.mark.parametrize(
    ("task", "name", "what"),
    [
        ("sst5", "tokenizer.json", "tokenizer"),
        ("sst5", "tokenizer_config.json", "tokenizer"),
        ("image_folder", "preprocessor_config.json", "image processor"),
        ("audio_folder", "preprocessor_config.json", "feature extractor"),
    ],
)
def test_files_of_a_processor_that_are_none(backbone, tmp_path, task, name, what, content):
    folder = tmp_path / "copy"
    shutil.copytree(backbone, folder)
    (folder / name).write_bytes(content)
    with pytest.raises(OSError, match=rf"The {what} of {folder} cannot be read: .*again|not a valid JSON file"):
        get_task(task).load_processor(str(folder))


@pytest.mark.parametrize("architectures", [3, ["BertModel"], None])
def test_a_checkpoint_that_is_no_classifier(backbone, tmp_path, architectures):
    model = CapsuleHeadForSequenceClassification.from_backbone(backbone, num_labels=2)
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": architectures}))
    with pytest.raises(ValueError, match=r"has the architecture .*; expected CapsuleHeadForSequenceClassification or"):
        load_classifier(str(tmp_path))


def test_inputs_of_explanations(tmp_path):
    pairs = Dataset.from_dict({"text": ["a", "b"], "text_pair": ["c", "d"], "label": [0, 1]})
    assert MODALITIES["text"].inputs(pairs, None) == [("a", "c"), ("b", "d")]
    assert MODALITIES["text"].inputs(pairs.remove_columns("text_pair"), None) == ["a", "b"]
    (stereo,) = MODALITIES["image"].inputs(get_task("toy_norb").load()["test"].select([0]), None)
    assert isinstance(stereo, np.ndarray) and stereo.shape == (2, 96, 96)
    for split in ("train", "validation"):
        for name in ("x", "y"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / split / name / "1.png")
    first, second = MODALITIES["image"].inputs(get_task("image_folder").load(str(tmp_path))["train"], None)
    assert isinstance(first, Image.Image) and second.size == (4, 4)


def load_tickets(source, urgent=False):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["mine", "yours"])})
    rows = {"text": [f"{source} {urgent}"], "label": [1]}
    return DatasetDict(train=Dataset.from_dict(rows, features=features))


@pytest.fixture
def own_tasks(monkeypatch):
    monkeypatch.setattr(tasks, "_TASKS", dict(tasks._TASKS))


def test_a_task_of_ones_own(own_tasks):
    task = register_task(
        Task("tickets", "support tickets", "text", load_tickets, source_help="a folder", loader_options=("urgent",))
    )
    assert get_task("tickets") is task and "tickets: a folder" in source_help()
    assert task.load("x", urgent=True, phrases=False)["train"]["text"][:] == ["x True"]
    assert register_task(Task("tickets", "again, as in a notebook", "text", load_tickets)) is get_task("tickets")


def test_tasks_that_cannot_be_registered(own_tasks):
    with pytest.raises(ValueError, match="task 'reviews' is registered already, loaded by capsule_heads"):
        register_task(Task("reviews", "mine", "text", load_tickets))
    with pytest.raises(ValueError, match="modality is 'smell'; expected one of text, image, audio"):
        register_task(Task("perfumes", "perfumes", "smell", load_tickets))
