import json
import math
import shutil

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from capsule_heads import CapsuleHeadForSequenceClassification
from capsule_heads.data.glue import GLUE_TASKS
from capsule_heads.training import experiment
from capsule_heads.training.experiment import (
    TASKS,
    DataArguments,
    ModelArguments,
    build_model,
    check_cache_options,
    check_labels_match,
    compute_metrics_of,
    evaluation_splits,
    load_classifier,
    load_processor,
    load_task,
    load_tokenizer,
    windows_for,
)

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


def labelled(values, names=("no", "yes")):
    feature = Value("float32") if names is None else ClassLabel(names=list(names))
    columns = {"text": ["good"] * len(values), "label": values}
    return Dataset.from_dict(columns, features=Features({"text": Value("string"), "label": feature}))


def test_tasks():
    assert list(TASKS) == [
        *("reviews", "sst5", "sst2_root"),
        *GLUE_TASKS,
        *("toy_norb", "smallnorb", "cifar100", "imagenet", "image_folder"),
    ]


def test_reviews():
    assert {name: len(split) for name, split in load_task("reviews").items()} == {
        "train": 495,
        "validation": 120,
        "test": 120,
    }
    with pytest.raises(ValueError, match=r"source is x\.zip, but reviews comes with the package; leave it out"):
        load_task("reviews", "x.zip")


def test_sst(trees):
    fine = load_task("sst5", trees)
    assert fine["train"].features["label"].num_classes == 5
    assert set(fine["train"]["text"]) == {"It 's fun", "It", "'s fun", "'s", "fun", "It 's long", "'s long", "long"}
    assert fine["test"]["text"][:] == ["So good", "So bad"]
    assert load_task("sst5", trees, phrases=False)["train"]["text"][:] == ["It 's fun", "It 's long"]
    binary = load_task("sst2_root", trees)
    assert binary["train"].features["label"].names == ["negative", "positive"]
    assert list(zip(binary["train"]["text"], binary["train"]["label"])) == [
        ("It 's fun", 1),
        ("'s fun", 1),
        ("fun", 1),
        ("long", 0),
    ]


def test_sst_comes_from_stanford_unless_a_source_is_given(monkeypatch):
    monkeypatch.setattr(experiment, "load_sst", lambda *args, **kwargs: (args, kwargs))
    expected = (("https://nlp.stanford.edu/sentiment/trainDevTestTrees_PTB.zip",), {"fine_grained": True})
    args, kwargs = load_task("sst5")
    assert (args, {"fine_grained": kwargs["fine_grained"]}) == expected


def test_glue(tmp_path):
    header = "index\tsentence1\tsentence2\tlabel\n"
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_text(header + "0\tA cat sat.\tA cat.\tentailment\n")
    (tmp_path / "test.tsv").write_text("index\tsentence1\tsentence2\n0\tA dog sat.\tA dog.\n")
    splits = load_task("rte", str(tmp_path))
    assert splits["train"][0] == {"text": "A cat sat.", "text_pair": "A cat.", "label": 0}
    assert list(evaluation_splits(splits, "validation")) == ["validation"]
    assert evaluation_splits(splits, "test") == {}  # it has no labels


def test_unknown_task():
    with pytest.raises(ValueError, match="Unknown GLUE task 'sst3'"):
        load_task("sst3")


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_metrics(task):
    assert callable(compute_metrics_of(task))


def test_load_tokenizer(bert, gpt2):
    assert load_tokenizer(bert).pad_token == "[PAD]"
    assert load_tokenizer(gpt2).pad_token is None
    assert load_tokenizer(gpt2, pad_token="[SEP]").pad_token_id == 3
    with pytest.raises(ValueError, match=r"pad_token is '<pad>', which is not in the vocabulary of .*gpt2.*tokenizer"):
        load_tokenizer(gpt2, pad_token="<pad>")
    with pytest.raises(OSError, match="none_such"):
        load_tokenizer("package:none_such/model")


@pytest.mark.parametrize("content", [b"[1]", b"3", b"", b"{", b"\xff"])
@pytest.mark.parametrize(
    ("task", "name", "what"),
    [
        ("sst5", "tokenizer.json", "tokenizer"),
        ("sst5", "tokenizer_config.json", "tokenizer"),
        ("image_folder", "preprocessor_config.json", "image processor"),
    ],
)
def test_files_of_a_processor_that_are_none(bert, tmp_path, task, name, what, content):
    folder = tmp_path / "backbone"
    shutil.copytree(bert, folder)
    (folder / name).write_bytes(content)
    with pytest.raises(OSError, match=rf"The {what} of {folder} cannot be read: .*again|not a valid JSON file"):
        load_processor(task, str(folder))


@pytest.mark.parametrize("architectures", [3, ["BertModel"], None])
def test_a_checkpoint_that_is_no_classifier(bert, tmp_path, architectures):
    model = CapsuleHeadForSequenceClassification.from_backbone(bert, num_labels=2)
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": architectures}))
    with pytest.raises(ValueError, match=r"is of .*; expected CapsuleHeadForSequenceClassification or"):
        load_classifier(str(tmp_path))


def test_build_model_for_classes(bert):
    arguments = ModelArguments(bert, layers=[0, -1], d_inp=8, n_parts=4, freeze_backbone=False, mixup_alpha=0.5)
    model = build_model(arguments, labelled([0, 1], ["no", "yes"]))
    config = model.config
    assert config.id2label == {0: "no", 1: "yes"}
    assert config.label2id == {"no": 0, "yes": 1}
    assert config.layers == [0, 2]
    assert (config.d_inp, config.n_parts, config.freeze_backbone, config.mixup_alpha) == (8, 4, False, 0.5)
    assert config.base_model_name_or_path == bert
    assert model.head.routings[1].n_out == 2


def test_build_model_for_numbers(bert):
    model = build_model(ModelArguments(bert, d_inp=8, n_parts=4), labelled([1.0, 2.0, 6.0], names=None))
    assert model.config.problem_type == "regression"
    assert model.config.label_mean == pytest.approx(3.0)
    assert model.config.label_std == pytest.approx(math.sqrt(14 / 3))


def test_every_option_of_the_model_reaches_it(bert):
    options = {
        "layers": [1],
        "head_type": "spatial_pose",
        "d_cov": 3,
        "d_inp": 4,
        "n_parts": 3,
        "d_cap": 5,
        "n_iters": 2,
        "p_model": "skm",
        "single_beta": True,
        "eps": 1e-3,
        "strategy": "reference",
        "mixup_alpha": 0.3,
        "class_weights": [1.0, 3.0],
        "freeze_backbone": False,
    }
    arguments = ModelArguments(bert, **options)
    assert set(vars(arguments)) == {"backbone", "backbone_revision", "pooling", *options}
    config = build_model(arguments, labelled([0, 1])).config
    assert {name: getattr(config, name) for name in options} == options
    linear = ModelArguments(bert, head_type="linear", pooling="last")
    assert build_model(linear, labelled([0, 1])).config.pooling == "last"


def test_windows_of_texts(bert):
    tokenizer = load_tokenizer(bert)  # its BERT takes 32 tokens
    assert windows_for(DataArguments("reviews"), tokenizer) == {}
    fields = windows_for(DataArguments("reviews", window_overlap=4), tokenizer)
    assert fields == {"window_length": 32, "window_overlap": 4, "window_special_tokens": [1, 1]}
    model = build_model(ModelArguments(bert, d_inp=8, n_parts=4), labelled([0, 1]), **fields)
    assert model.config.windowing == (32, 4, 1, 1)
    shorter = windows_for(DataArguments("reviews", window_overlap=4, window_length=16), tokenizer)
    assert shorter == {**fields, "window_length": 16}


def test_windows_that_make_no_sense(bert):
    with pytest.raises(ValueError, match="window_length needs window_overlap"):
        windows_for(DataArguments("reviews", window_length=16), load_tokenizer(bert))
    with pytest.raises(ValueError, match="window_overlap is for texts, and toy_norb is of images"):
        windows_for(DataArguments("toy_norb", window_overlap=16), load_processor("toy_norb", "new:stereo_conv"))


def test_evaluation_splits():
    splits = DatasetDict(
        train=labelled([0, 1]),
        validation_matched=labelled([0, 1]),
        validation_mismatched=labelled([1, 1]),
        test_matched=labelled([-1, -1]),
        test_mismatched=labelled([-1, 1]),
    )
    assert list(evaluation_splits(splits, "validation")) == ["validation_matched", "validation_mismatched"]
    assert list(evaluation_splits(splits, "test")) == ["test_mismatched"]
    numbers = DatasetDict(validation=labelled([0.0, 5.0], None), test=labelled([math.nan] * 2, None))
    assert list(evaluation_splits(numbers, "validation")) == ["validation"]
    assert evaluation_splits(numbers, "test") == {}


def test_check_labels_match(bert):
    def model(labels):
        return build_model(ModelArguments(bert, d_inp=8, n_parts=4), labels)

    classes, numbers = labelled([0, 1]), labelled([0.5, 1.0], None)
    assert isinstance(model(classes), CapsuleHeadForSequenceClassification)
    check_labels_match(model(classes), classes)
    check_labels_match(model(numbers), numbers)
    with pytest.raises(
        ValueError, match=r"for \['no', 'yes'\], and the dataset has \['yes', 'no'\]; expected the same"
    ):
        check_labels_match(model(classes), labelled([0, 1], ["yes", "no"]))
    with pytest.raises(ValueError, match=r"for \['no', 'yes'\], and the dataset has numbers"):
        check_labels_match(model(classes), numbers)
    with pytest.raises(ValueError, match=r"for numbers, and the dataset has \['no', 'yes'\]"):
        check_labels_match(model(numbers), classes)


def test_a_cache_is_kept_on_the_device_only_where_it_can_be():
    check_cache_options(DataArguments("reviews", cache_hidden_states=True, cache_on_device=True), n_workers=0)
    check_cache_options(DataArguments("reviews", cache_hidden_states=True), n_workers=2)
    with pytest.raises(ValueError, match=r"cache_on_device is true and cache_hidden_states is false; .* to true\."):
        check_cache_options(DataArguments("reviews", cache_on_device=True), n_workers=0)
    with pytest.raises(ValueError, match="dataloader_num_workers is 2; cache_on_device expects 0"):
        check_cache_options(DataArguments("reviews", cache_hidden_states=True, cache_on_device=True), n_workers=2)
